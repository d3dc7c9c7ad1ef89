"""How good a checkpoint is: its perplexity, and how its predictions diverge from those of a reference.

The protocol is that of AutoAWQ, GPTQ and llm-awq for WikiText-2: the whole text is tokenized once, with one BOS at its
start if the model has one, and cut into windows that do not overlap, of 2048 tokens or, where that is shorter, of the
context; a rest shorter than a window is not scored. Perplexity is the exponential of the mean loss over all predicted
tokens.

A model is read block by block and computed in float32, with INT4 weights as the numbers that they stand for. So the
file is measured and not the arithmetic of a kernel, and a model larger than the memory can be measured too.
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
from miniawq.checkpoint.blocks import BlockStream, micro_batches
from miniawq.checkpoint.hub import add_hub_flags, hub_options
from miniawq.checkpoint.opening import Checkpoint, open_checkpoint
from miniawq.errors import InvalidInput, UnsupportedCheckpoint, UsageError
from miniawq.hardware import pick_device, roomiest
from miniawq.model import Llama
from miniawq.text.plain import read_text
from miniawq.text.tokenizer import Tokenizer

log = logging.getLogger("miniawq.evaluate")

SEQUENCE_LENGTH = 2048
FIX_LENGTH = "give a smaller --sequence-length"
LARGEST_LOSS = 700.0  # whose exp is a number in float64
POSITIONS_PER_STEP = 256  # whose logits are in memory at once


@dataclass(frozen=True)
class Scores:
    """Perplexity of a model on a text; `reference` is the comparison with another model."""

    perplexity: float
    mean_loss: float
    windows: int
    sequence_length: int
    tokens_scored: int
    reference: "Divergence | None" = None


@dataclass(frozen=True)
class Divergence:
    """How a model differs from its reference on the same predicted tokens. `perplexity` is the reference's.

    Losses are in nats. `standard_error` is that of the mean difference of the paired losses. `kl` is
    KL(reference || model) of the distributions of the next token.
    """

    perplexity: float
    loss_difference: float
    standard_error: float
    kl_mean: float
    kl_95th_percentile: float
    top1_agreement: float


@dataclass(frozen=True)
class Predictor:
    """The hidden states of a text, and the function from some of them [T, D] to logits [T, V]."""

    hidden_BLD: Tensor
    logits: Callable[[Tensor], Tensor]


def cut_windows(ids: Sequence[int], sequence_length: int) -> Tensor:
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
    """Score a checkpoint, streamed block by block, on windows of token ids.

    UsageError if a window is longer than a context: positions that a model was not trained on are not its quality.
    """
    for one in (checkpoint, reference):
        if one and tokens_BL.shape[1] > (limit := one.model_config.max_position_embeddings):
            why = f"{one.directory / 'config.json'}: max_position_embeddings = {limit}"
            raise UsageError(f"windows of {tokens_BL.shape[1]} tokens are longer than the context", why, FIX_LENGTH)
    ours = stream_predictor(checkpoint.fetched(), tokens_BL, device)
    theirs = None if reference is None else stream_predictor(reference.fetched(), tokens_BL, device)
    return score(tokens_BL, ours, theirs)


@torch.inference_mode()
def perplexity(model: Llama, tokens_BL: Tensor, reference: Llama | None = None) -> Scores:
    """Score a model that is in memory, with its own kernels and dtype, on windows of token ids."""
    theirs = None if reference is None else model_predictor(reference, tokens_BL)
    return score(tokens_BL, model_predictor(model, tokens_BL), theirs)


def stream_predictor(checkpoint: Checkpoint, tokens_BL: Tensor, device: torch.device | str) -> Predictor:
    """Run the windows through the checkpoint's blocks, one block in memory at a time."""
    stream = BlockStream(checkpoint, device)
    place = roomiest(tokens_BL.numel() * stream.config.hidden_size * torch.float32.itemsize, stream.device)
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
    """Compare predictions with the text, and with the reference's predictions.

    UnsupportedCheckpoint if a model predicts nothing that is a number.
    """
    if reference is not None and tokens_BL.shape[0] * (tokens_BL.shape[1] - 1) < 2:
        raise InvalidInput("one predicted token cannot be compared", "its loss has no standard error", "give more text")
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
        if not kl_T.isfinite().all():
            raise _no_numbers("a model", "the divergence is not finite")
        compared = Divergence(
            perplexity=_perplexity(other_T, "the reference"),
            loss_difference=float((loss_T - other_T).mean()),
            standard_error=float((loss_T - other_T).std()) / math.sqrt(len(loss_T)),
            kl_mean=float(kl_T.mean()),
            kl_95th_percentile=float(kl_T.sort().values[int(0.95 * (len(kl_T) - 1))]),
            top1_agreement=float(torch.cat(agreements).double().mean()),
        )
    windows, length = tokens_BL.shape
    return Scores(_perplexity(loss_T, "the model"), float(loss_T.mean()), windows, length, len(loss_T), compared)


def _perplexity(loss_T: Tensor, whose: str) -> float:
    """exp of the mean; UnsupportedCheckpoint if that is no number, as with weights whose products overflow."""
    if not (mean := float(loss_T.mean())) < LARGEST_LOSS:
        raise _no_numbers(whose, f"the mean loss is {mean:g}")
    return math.exp(mean)


def _no_numbers(whose: str, why: str) -> UnsupportedCheckpoint:
    fix = "the weights are damaged: download the checkpoint again"
    return UnsupportedCheckpoint(f"the predictions of {whose} are no numbers", f"{why}: activations overflow", fix)


def _steps(tokens_BL: Tensor) -> Iterator[tuple[tuple[int, slice], Tensor]]:
    """Pairs of a window's index with a slice of its positions, and the tokens that follow these positions."""
    last = tokens_BL.shape[1] - 1
    for window, tokens_L in enumerate(tokens_BL):
        for start in range(0, last, POSITIONS_PER_STEP):
            places = slice(start, min(start + POSITIONS_PER_STEP, last))
            yield (window, places), tokens_L[places.start + 1 : places.stop + 1]


def _loss(log_probabilities_TV: Tensor, next_T: Tensor) -> Tensor:
    return -log_probabilities_TV.gather(-1, next_T[:, None])[:, 0].cpu()


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser("evaluate", "Perplexity of a model on a text, and its divergence from a reference model.")
    parser.add_argument("model", help="directory or Hub id of the model to measure")
    parser.add_argument("--text", required=True, help="a UTF-8 text file, or - for stdin")
    parser.add_argument("--reference", metavar="MODEL", help="the dense model it was made from")
    parser.add_argument(
        "--sequence-length",
        type=int,
        help=f"tokens of one window (default: {SEQUENCE_LENGTH}, or the context where that is shorter)",
    )
    parser.add_argument("--max-windows", type=int, help="score only the first windows")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_hub_flags(parser)
    return parser


def _evaluate(arguments: argparse.Namespace) -> None:
    for flag, value, least in (
        ("--sequence-length", arguments.sequence_length, 2),
        ("--max-windows", arguments.max_windows, 1),
    ):
        if value is not None and value < least:
            why, fix = "it leaves no token to predict", f"give {least} or more"
            raise UsageError(f"{flag} {value} makes no sense", why, fix)
    device, hub = pick_device(arguments.device), hub_options(arguments)
    checkpoint = open_checkpoint(arguments.model, **hub)
    # --revision is the model's; the reference names its own as MODEL@REVISION.
    reference = open_checkpoint(arguments.reference, **hub | {"revision": None}) if arguments.reference else None
    text, tokenizer = read_text(arguments.text), Tokenizer(checkpoint.directory)
    if reference is not None:
        check_same_ids(text, tokenizer, reference)
    ids = tokenizer.encode(text)
    contexts = [one.model_config.max_position_embeddings for one in (checkpoint, reference) if one]
    length = arguments.sequence_length or min(SEQUENCE_LENGTH, *contexts)
    tokens_BL = cut_windows(ids, length)[: arguments.max_windows]
    log.info(
        "%d of %d tokens in %d windows of %d; BOS only where the tokenizer puts it, at the start of the text",
        tokens_BL.numel(), len(ids), *tokens_BL.shape,
    )  # fmt: skip
    scores = evaluate(checkpoint, tokens_BL, reference, device)
    print(json.dumps(asdict(scores), indent=2) if arguments.json else describe_scores(scores))


def check_same_ids(text: str, tokenizer: Tokenizer, reference: Checkpoint) -> None:
    """UsageError if the reference's tokenizer.json gives other ids for the text: predictions could not be compared."""
    if "tokenizer.json" not in reference.files.names:
        log.warning("%s has no tokenizer.json: its ids are taken to mean the same", reference.files.name)
        return
    ours, theirs = (one.encode(text, add_special_tokens=False) for one in (tokenizer, Tokenizer(reference.directory)))
    if ours != theirs:
        raise UsageError(
            "the reference has another tokenizer than the model",
            f"{reference.directory / 'tokenizer.json'} gives other ids for this text than the model's tokenizer.json",
            "give as --reference the dense model that this one was made from",
        )


def describe_scores(scores: Scores) -> str:
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
    """Run the command line and return its exit code."""
    return cli.run(_evaluate, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
