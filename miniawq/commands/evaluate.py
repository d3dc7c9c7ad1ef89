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
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from miniawq import cli
from miniawq.checkpoint.blocks import BlockStream, micro_batches
from miniawq.checkpoint.hub import add_hub_flags, hub_options
from miniawq.checkpoint.loading import KV_DTYPES, add_kv_dtype_flag
from miniawq.checkpoint.opening import Checkpoint, open_checkpoint
from miniawq.commands import contest
from miniawq.commands.scores import (
    Predictor,
    Scores,
    WorstToken,
    cut_windows,
    score,
    summary,
    token_scores,
    worst_tokens,
)
from miniawq.errors import UnsupportedCheckpoint, UsageError
from miniawq.hardware import device_memory, pick_device, roomiest
from miniawq.model import Llama
from miniawq.quantize.calibration import read_calibration
from miniawq.quantize.memory import hidden_states
from miniawq.text.plain import read_text
from miniawq.text.tokenizer import Tokenizer

log = logging.getLogger("miniawq.evaluate")

EXAMPLES = (
    "miniawq evaluate my-awq --text held-out.txt --reference ./my-model",
    "miniawq evaluate my-awq --text held-out.txt --reference ./my-model --worst 20",
    "miniawq evaluate ./my-model --text held-out.txt --formats rtn,nf4,q4_k",
)
SEQUENCE_LENGTH = 2048
CALIBRATION_LENGTH = 512
FIX_LENGTH = "give a smaller --sequence-length"


@torch.inference_mode()
def evaluate(
    checkpoint: Checkpoint, tokens_BL: Tensor, reference: Checkpoint | None = None, device: torch.device | str = "cpu"
) -> Scores:
    """Score a checkpoint, streamed block by block, on windows of token ids."""
    return score(tokens_BL, *predictors(checkpoint, tokens_BL, reference, device))


@torch.inference_mode()
def predictors(
    checkpoint: Checkpoint, tokens_BL: Tensor, reference: Checkpoint | None, device: torch.device | str
) -> tuple[Predictor, Predictor | None]:
    """What both models make of the windows, one model after the other."""
    for one in (checkpoint, reference):
        if one:
            check_context(one, tokens_BL)
    ours = stream_predictor(checkpoint.fetched(), tokens_BL, device)
    return ours, None if reference is None else stream_predictor(reference.fetched(), tokens_BL, device)


def check_context(checkpoint: Checkpoint, tokens_BL: Tensor) -> None:
    """UsageError on windows longer than the context: positions that a model was not trained on are not its quality."""
    if tokens_BL.shape[1] > (limit := checkpoint.model_config.max_position_embeddings):
        why = f"{checkpoint.directory / 'config.json'}: max_position_embeddings = {limit}"
        raise UsageError(f"windows of {tokens_BL.shape[1]} tokens are longer than the context", why, FIX_LENGTH)


@torch.inference_mode()
def perplexity(model: Llama, tokens_BL: Tensor, reference: Llama | None = None) -> Scores:
    """Score a model that is in memory, with its own kernels and dtype, on windows of token ids."""
    theirs = None if reference is None else model_predictor(reference, tokens_BL)
    return score(tokens_BL, model_predictor(model, tokens_BL), theirs)


def stream_predictor(checkpoint: Checkpoint, tokens_BL: Tensor, device: torch.device | str) -> Predictor:
    """Run the windows through the checkpoint's blocks, one block in memory at a time.

    What is kept of a prediction is its last hidden state: the head makes its logits of it again, many times as many.
    Hidden states that take more than half of the free memory are kept in a temporary file.
    """
    stream = BlockStream(checkpoint, device)
    nbytes = tokens_BL.numel() * stream.config.hidden_size * torch.float32.itemsize
    place = roomiest(nbytes, stream.device)
    crowded = place.type == "cpu" and 2 * nbytes > device_memory(place).free
    shape = (*tokens_BL.shape, stream.config.hidden_size)
    hidden_BLD = hidden_states(shape, place, Path(tempfile.gettempdir()) if crowded else None)
    stream.embed(tokens_BL, hidden_BLD)
    for layer in tqdm(range(stream.config.num_hidden_layers), desc="blocks", leave=False, disable=None):
        stream.advance(stream.block(layer), layer, hidden_BLD)
    return Predictor(hidden_BLD, stream.head())


def model_predictor(model: Llama, tokens_BL: Tensor) -> Predictor:
    """Run the windows through a model in memory."""
    hidden = [model.model(tokens_BL[rows].to(model.device)).cpu() for rows in micro_batches(*tokens_BL.shape)]
    return Predictor(torch.cat(hidden), lambda hidden_TD: model.logits(hidden_TD.to(model.device)).float())


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(
        "evaluate",
        "Perplexity of a model on a text, and its divergence from a reference; or what\nformats cost a dense model.",
        usage="MODEL --text FILE [--reference MODEL] [flags]",
        examples=EXAMPLES,
        page="docs/quality.md",
    )
    add = parser.add_argument
    add("model", help="directory or Hub id of the model to measure")
    add("--text", required=True, metavar="FILE", help="a UTF-8 text file, or - for stdin")
    add("--reference", metavar="MODEL", help="the dense model it was made from")
    longest = f"tokens of a window ({SEQUENCE_LENGTH}, or the model's context)"
    add("--sequence-length", type=int, metavar="N", help=longest)
    add("--max-windows", type=int, metavar="N", help="score at most N, spread over the text")
    add("--worst", type=int, default=0, metavar="N", help="show the N tokens that diverge most")
    add("--device", metavar="NAME", help="cuda, cuda:1, cpu (cuda if there is one)")
    add_kv_dtype_flag(add)
    add("--json", action="store_true", help="print one JSON object")
    add = parser.add_argument_group("formats of a dense model, side by side").add_argument
    add("--formats", type=_names, metavar="A,B", help=f"some of {', '.join(contest.ALL)}")
    sizes = "of the formats that have one, -1 for a row (128)"
    add("--group-size", type=_sizes, default=[128], metavar="N,N", help=sizes)
    add("--calib", metavar="FILE", help="text for the formats that learn from one")
    add("--num-samples", type=int, default=128, metavar="N", help="windows of it, of 512 tokens (128)")
    add("--plot", type=Path, metavar="FILE", help="draw quality against bytes (the extra `plots`)")
    add_hub_flags(parser)
    return parser


def _names(value: str) -> list[str]:
    names = value.split(",")
    if unknown := [name for name in names if name not in contest.ALL]:
        raise argparse.ArgumentTypeError(f"there is no format {unknown[0]!r}: choose from {', '.join(contest.ALL)}")
    return names


def _sizes(value: str) -> list[int]:
    sizes = [int(size) for size in value.split(",")]
    if any(size < 1 and size != -1 for size in sizes):
        raise argparse.ArgumentTypeError(f"{value!r}: a group has at least one input, or -1 for all of a row")
    return sizes


def check_flags_of_evaluate(arguments: argparse.Namespace) -> None:
    """UsageError on numbers that make no sense, and on flags that do not go together."""
    for flag, value, least in (
        ("--sequence-length", arguments.sequence_length, 2),
        ("--max-windows", arguments.max_windows, 1),
        ("--num-samples", arguments.num_samples, 1),
        ("--worst", arguments.worst, 0),
    ):
        if value is not None and value < least:
            why, fix = "it leaves no token to predict", f"give {least} or more"
            raise UsageError(f"{flag} {value} makes no sense", why, fix)
    if arguments.formats and arguments.reference:
        why = "the formats are compared with the model itself"
        raise UsageError("--formats goes with no --reference", why, "leave out --reference")
    if arguments.worst and not arguments.reference:
        raise UsageError("--worst needs a --reference", "", "give the dense model that this one was made from")
    if (learners := [name for name in arguments.formats or [] if name in contest.LEARNERS]) and not arguments.calib:
        raise UsageError(f"{learners[0]} needs a text", "it searches on one", "give one with --calib FILE")
    if arguments.plot and find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib", "it is not installed", "pip install 'miniawq[plots]'")
    if arguments.plot:
        contest.check_picture(arguments.plot)


def _evaluate(arguments: argparse.Namespace) -> None:
    check_flags_of_evaluate(arguments)
    hub = hub_options(arguments)
    checkpoint = open_checkpoint(arguments.model, **hub).with_kv_cache(KV_DTYPES[arguments.kv_dtype])
    # --revision is the model's; the reference names its own as MODEL@REVISION.
    reference = open_checkpoint(arguments.reference, **hub | {"revision": None}) if arguments.reference else None
    text, tokenizer = read_text(arguments.text), Tokenizer(checkpoint.directory)
    if reference is not None:
        check_same_ids(text, tokenizer, reference)
    ids = tokenizer.encode(text)
    contexts = [one.model_config.max_position_embeddings for one in (checkpoint, reference) if one]
    length = arguments.sequence_length or min(SEQUENCE_LENGTH, *contexts)
    tokens_BL = cut_windows(ids, length, arguments.max_windows)
    told = protocol(tokens_BL, ids, tokenizer)
    log.info("%s", told)
    if arguments.formats:
        compare_formats(arguments, checkpoint, tokens_BL, tokenizer, told)
        return
    ours, theirs = predictors(checkpoint, tokens_BL, reference, pick_device(arguments.device))
    found = token_scores(tokens_BL, ours, theirs)
    scores, worst = summary(tokens_BL, found), []
    if arguments.worst and theirs and found.kl_T is not None:
        worst = worst_tokens(tokens_BL, found.kl_T, arguments.worst, ours, theirs, tokenizer)
    if arguments.json:
        more = {"protocol": told, "worst_tokens": [asdict(one) for one in worst]}
        print(json.dumps(asdict(scores) | more, indent=2))
    else:
        print("\n".join([describe_scores(scores), *map(describe_worst, worst)]))


def protocol(tokens_BL: Tensor, ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """How the text was cut, and where it has BOS."""
    bos = f"BOS ({tokenizer.bos_id})" if tokenizer.bos_id is not None and ids[0] == tokenizer.bos_id else "no BOS"
    windows, length = tokens_BL.shape
    return (
        f"{tokens_BL.numel()} of {len(ids)} tokens in {windows} windows of {length} that do not overlap; {bos} at the "
        "start of the text, none at the start of other windows; the first token of a window is not predicted"
    )


def compare_formats(
    arguments: argparse.Namespace, checkpoint: Checkpoint, tokens_BL: Tensor, tokenizer: Tokenizer, told: str
) -> None:
    """Print a row for each format, and draw them."""
    if checkpoint.quantized:
        raise UnsupportedCheckpoint(
            f"{checkpoint.directory} is quantized already",
            f"{next(iter(checkpoint.quantized))} is packed",
            "give the dense model that it was made from",
        )
    check_context(checkpoint, tokens_BL)
    calibration_BL = None
    if arguments.calib:
        length = min(CALIBRATION_LENGTH, checkpoint.model_config.max_position_embeddings)
        calibration_BL = read_calibration(arguments.calib, tokenizer, arguments.num_samples, length).tokens_BL
    asked = contest.fitting(checkpoint, arguments.formats, arguments.group_size)
    device = pick_device(arguments.device)
    dense, entries = contest.run_formats(checkpoint.fetched(), tokens_BL, asked, calibration_BL, device)
    found = contest.results(checkpoint, tokens_BL, dense, entries)
    if arguments.json:
        print(json.dumps({"protocol": told, "formats": [asdict(row) for row in found]}, indent=2))
    else:
        print(contest.format_table(found))
    if arguments.plot:
        contest.draw_formats(arguments.plot, found)


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
            f"KL divergence mean {other.kl_mean:.6f} +- {other.kl_standard_error:.6f}, "
            f"95th percentile {other.kl_95th_percentile:.6f} nats",
            f"same first choice {other.top1_agreement:.2%}",
        ]
    return "\n".join(lines)


def describe_worst(token: WorstToken) -> str:
    """A token that is predicted badly, in one line."""
    return (
        f"KL {token.kl:.3f} at {token.context!r}: the reference expects {token.expected!r} "
        f"({token.expected_probability:.2f}), the model {token.chosen!r} ({token.chosen_probability:.2f}); "
        f"the text has {token.next!r}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return cli.run(_evaluate, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
