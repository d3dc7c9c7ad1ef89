"""How good a checkpoint is: perplexity, and against a reference the divergence of what the two predict.

The protocol is that of AutoAWQ, GPTQ and llm-awq for WikiText-2: the whole text is tokenized once, with one BOS at its
very start where the model has one, and cut into windows of 2048 tokens that do not overlap; a rest shorter than a
window is not scored. Perplexity is the exponential of the mean loss over all predicted tokens.

A model is read block by block in float32, INT4 weights as the numbers they stand for, so what is measured is the file
and not the arithmetic of one kernel, and a model larger than the memory can be measured too.
"""

import argparse
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from miniawq import cli
from miniawq.calibration import read_text
from miniawq.checkpoint import Checkpoint, open_checkpoint
from miniawq.errors import InvalidInput
from miniawq.memory import home
from miniawq.model import Llama
from miniawq.stream import BlockStream, micro_batches
from miniawq.tokenizer import Tokenizer

log = logging.getLogger("miniawq.evaluate")

POSITIONS_PER_STEP = 256


@dataclass(frozen=True)
class Scores:
    """Perplexity of a text; `reference` is what the comparison with another model adds."""

    perplexity: float
    mean_loss: float
    windows: int
    sequence_length: int
    tokens_scored: int
    reference: "Divergence | None" = None


@dataclass(frozen=True)
class Divergence:
    """How a model differs from its reference, over the same predicted tokens.

    Losses are in nats. `standard_error` is that of the mean difference of the paired losses. `kl` is the divergence of
    the model's next-token distribution from the reference's, KL(reference || model).
    """

    perplexity: float
    loss_difference: float
    standard_error: float
    kl_mean: float
    kl_95th_percentile: float
    top1_agreement: float


@dataclass(frozen=True)
class Predictor:
    """Hidden states [B, L, D] of a text, and the function from some of them to logits."""

    hidden_BLD: Tensor
    logits: Callable[[Tensor], Tensor]


def cut(ids: Sequence[int], sequence_length: int) -> Tensor:
    """Windows [B, L] that do not overlap; a text shorter than one window is one window.

    InvalidInput on fewer than two tokens: there is nothing to predict.
    """
    length = min(sequence_length, len(ids))
    if length < 2:
        raise InvalidInput("a window is too short to score", f"it has {length} tokens", "give at least two")
    count = len(ids) // length
    return torch.tensor(ids[: count * length]).view(count, length)


@torch.inference_mode()
def evaluate(
    checkpoint: Checkpoint, tokens_BL: Tensor, reference: Checkpoint | None = None, device: torch.device | str = "cpu"
) -> Scores:
    """Score a checkpoint, streamed block by block, on windows of token ids."""
    ours = stream_predictor(checkpoint, tokens_BL, device)
    return score(tokens_BL, ours, None if reference is None else stream_predictor(reference, tokens_BL, device))


@torch.inference_mode()
def perplexity(model: Llama, tokens_BL: Tensor, reference: Llama | None = None) -> Scores:
    """Score a model that is in memory, with its own kernels and dtype, on windows of token ids."""
    theirs = None if reference is None else model_predictor(reference, tokens_BL)
    return score(tokens_BL, model_predictor(model, tokens_BL), theirs)


def stream_predictor(checkpoint: Checkpoint, tokens_BL: Tensor, device: torch.device | str) -> Predictor:
    """Run the windows through the checkpoint's blocks, one block in memory at a time."""
    stream = BlockStream(checkpoint, device)
    place = home(tokens_BL.numel() * stream.config.hidden_size * torch.float32.itemsize, stream.device)
    hidden_BLD = torch.empty(*tokens_BL.shape, stream.config.hidden_size, device=place)
    stream.embed(tokens_BL, hidden_BLD)
    for layer in tqdm(range(stream.config.num_hidden_layers), desc="blocks", leave=False, disable=None):
        for rows, output_BLD in stream.run(stream.block(layer), layer, hidden_BLD):
            hidden_BLD[rows] = output_BLD.to(hidden_BLD.device)
    return Predictor(hidden_BLD, stream.head())


def model_predictor(model: Llama, tokens_BL: Tensor) -> Predictor:
    """Run the windows through a model in memory."""
    hidden = [model.hidden(tokens_BL[rows].to(model.device)).cpu() for rows in micro_batches(*tokens_BL.shape)]
    return Predictor(torch.cat(hidden), lambda hidden_TD: model.lm_head(hidden_TD.to(model.device)).float())


def score(tokens_BL: Tensor, model: Predictor, reference: Predictor | None = None) -> Scores:
    """Compare predictions with what the text says, and with the reference's predictions."""
    losses, others, divergences, agreements = [], [], [], []
    for hidden_places, next_T in _steps(tokens_BL):
        ours_TV = model.logits(model.hidden_BLD[hidden_places]).log_softmax(-1)
        next_T = next_T.to(ours_TV.device)
        losses.append(_loss(ours_TV, next_T))
        if reference is not None:
            theirs_TV = reference.logits(reference.hidden_BLD[hidden_places]).log_softmax(-1)
            others.append(_loss(theirs_TV, next_T))
            divergences.append((theirs_TV.exp() * (theirs_TV - ours_TV)).sum(-1).cpu())
            agreements.append((theirs_TV.argmax(-1) == ours_TV.argmax(-1)).cpu())
    loss_T = torch.cat(losses).double()
    compared = None
    if reference is not None:
        other_T, kl_T = torch.cat(others).double(), torch.cat(divergences).double()
        compared = Divergence(
            perplexity=math.exp(other_T.mean()),
            loss_difference=float((loss_T - other_T).mean()),
            standard_error=float((loss_T - other_T).std()) / math.sqrt(len(loss_T)),
            kl_mean=float(kl_T.mean()),
            kl_95th_percentile=float(kl_T.sort().values[int(0.95 * (len(kl_T) - 1))]),
            top1_agreement=float(torch.cat(agreements).double().mean()),
        )
    mean = float(loss_T.mean())
    windows, length = tokens_BL.shape
    return Scores(math.exp(mean), mean, windows, length, len(loss_T), compared)


def _steps(tokens_BL: Tensor) -> Iterator[tuple[tuple[int, slice], Tensor]]:
    """Places of a few positions of one window, and the tokens that follow them."""
    last = tokens_BL.shape[1] - 1
    for window, tokens_L in enumerate(tokens_BL):
        for start in range(0, last, POSITIONS_PER_STEP):
            places = slice(start, min(start + POSITIONS_PER_STEP, last))
            yield (window, places), tokens_L[places.start + 1 : places.stop + 1]


def _loss(log_probabilities_TV: Tensor, next_T: Tensor) -> Tensor:
    return -log_probabilities_TV.gather(-1, next_T[:, None])[:, 0].cpu()


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.parser("evaluate", "Perplexity of a model on a text, and its divergence from a reference model.")
    parser.add_argument("model", help="directory or Hub id of the model to measure")
    parser.add_argument("--text", required=True, help="a UTF-8 text file, or - for stdin")
    parser.add_argument("--reference", metavar="MODEL", help="the dense model it was made from")
    parser.add_argument("--sequence-length", type=int, default=2048, help="tokens of one window (default 2048)")
    parser.add_argument("--max-windows", type=int, help="score only the first windows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _body(arguments: argparse.Namespace) -> None:
    checkpoint = open_checkpoint(arguments.model, revision=arguments.revision)
    reference = open_checkpoint(arguments.reference) if arguments.reference else None
    ids = Tokenizer(checkpoint.directory).encode(read_text(arguments.text))
    tokens_BL = cut(ids, arguments.sequence_length)[: arguments.max_windows]
    log.info(
        "%d of %d tokens in %d windows of %d; BOS only where the tokenizer puts it, at the start of the text",
        tokens_BL.numel(), len(ids), *tokens_BL.shape,
    )  # fmt: skip
    scores = evaluate(checkpoint, tokens_BL, reference, arguments.device)
    print(json.dumps(asdict(scores), indent=2) if arguments.json else describe(scores))


def describe(scores: Scores) -> str:
    """The scores as lines for people."""
    lines = [
        f"perplexity {scores.perplexity:.4f} ({scores.tokens_scored} tokens in windows of {scores.sequence_length})"
    ]
    if other := scores.reference:
        lines += [
            f"reference perplexity {other.perplexity:.4f}",
            f"loss difference {other.loss_difference:+.5f} +- {other.standard_error:.5f} nats a token",
            f"KL divergence mean {other.kl_mean:.6f}, 95th percentile {other.kl_95th_percentile:.6f} nats",
            f"same first choice {other.top1_agreement:.2%}",
        ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m miniawq.evaluate`."""
    return cli.run(_body, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
