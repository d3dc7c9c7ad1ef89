"""`python -m miniawq.quantize SOURCE DESTINATION`: make an AWQ INT4 checkpoint from a dense one."""

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from miniawq import cli
from miniawq.checkpoint.hub import add_hub_flags, hub_options
from miniawq.checkpoint.loading import load_model
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.checkpoint.quant_config import PACKED_HEADS
from miniawq.checkpoint.shards import SHARD_BYTES
from miniawq.errors import UsageError
from miniawq.hardware import pick_device
from miniawq.model import Llama
from miniawq.quantize.calibration import (
    Calibration,
    add_own_windows,
    check_length,
    check_text,
    read_calibration,
    sample_calibration,
)
from miniawq.quantize.grids import GRIDS
from miniawq.quantize.job import Quantizer, Settings, check_destination, quantize_checkpoint
from miniawq.quantize.memory import plan_memory, plan_sampling
from miniawq.quantize.packable import left_dense
from miniawq.quantize.recipes import RECIPES
from miniawq.text.tokenizer import Tokenizer

log = logging.getLogger("miniawq.quantize")

FORMATS = ("awq", "compressed-tensors")
LARGEST = 1_000_000_000  # of the numbers that count something
ESSENTIAL = "source destination calib num_samples sequence_length recipe group_size format dtype device".split()
EXAMPLES = (
    "miniawq quantize ./my-model my-awq --calib my-texts.txt",
    "miniawq quantize Qwen/Qwen3-8B qwen3-awq --calib chats.jsonl --group-size 64",
    "miniawq quantize ./my-model my-awq --calib my-texts.txt --recipe neighbours",
)
STORED_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(
        "quantize",
        "Make an AWQ INT4 checkpoint from a dense one, one block in memory at a time.",
        usage="SOURCE DESTINATION [--calib FILE] [flags]",
        examples=EXAMPLES,
        page="docs/guides/quantize.md",
        essential=ESSENTIAL,
    )
    parser.add_argument("source", help="directory or Hub id of a dense Llama-family model")
    parser.add_argument("destination", help="directory to write; an interrupted run in it goes on")
    add = parser.add_argument_group("calibration text").add_argument
    add("--calib", metavar="FILE", help=".txt, .jsonl, or - (text the model writes itself)")
    add("--num-samples", type=_positive, default=128, metavar="N", help="windows of text (128)")
    add("--sequence-length", type=_positive, default=512, metavar="N", help="tokens of a window (512)")
    add("--own-windows", type=_positive, metavar="N", help="more windows, in which the model goes on from FILE's")
    add("--seed", type=_seed, default=0, metavar="N", help="of text the model writes itself (0)")
    add = parser.add_argument_group("method").add_argument
    recipes = "default; neighbours: better, slower, 16,000 tokens or more; paper; plain: no search"
    add("--recipe", choices=RECIPES, default="default", metavar="NAME", help=recipes)
    sizes = "inputs that share a scale, -1 for all (128)"
    add("--group-size", type=_inputs_of_a_group, default=128, metavar="N", help=sizes)
    add("--grid", choices=GRIDS, default="asymmetric", help="how a range becomes scale and zero")
    compared = "that modules' outputs are compared on (4096)"
    add("--compared-tokens", type=_positive, default=4096, metavar="N", help=compared)
    add("--no-clip", action="store_true", help="leave out the search of ranges")
    add = parser.add_argument_group("output").add_argument
    add("--format", choices=FORMATS, default="awq", metavar="NAME", help=f"{', '.join(FORMATS)} (awq)")
    dtypes = f"of scales and dense tensors: {', '.join(STORED_DTYPES)}"
    add("--lm-head", action="store_true", help="pack the head too; of one tied to the embedding, a copy")
    add("--dtype", choices=STORED_DTYPES, default="float16", metavar="DTYPE", help=dtypes)
    add("--shard-gigabytes", type=_gigabytes, default=SHARD_BYTES / 1e9, metavar="X", help="largest file (5)")
    parser.add_argument("--device", metavar="NAME", help="cuda, cuda:1, cpu (cuda if there is one)")
    parser.add_argument("--offload-directory", type=Path, help="keep the hidden states of the text in a file there")
    add_hub_flags(parser)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 10 or not 1 <= int(text) <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text:.50} is not a whole number from 1 to {LARGEST:,}")
    return int(text)


def _seed(text: str) -> int:
    """A CPU takes 32 bits of a seed: larger ones would give the text of smaller ones."""
    if not text.isdecimal() or len(text) > 10 or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text:.50} is not a whole number from 0 to {(1 << 32) - 1:,}")
    return int(text)


def _gigabytes(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 1e-9 <= size <= 1e9:
        raise argparse.ArgumentTypeError(f"{text:.50} is not a number of gigabytes above 0")
    return size


def _inputs_of_a_group(text: str) -> int:
    return -1 if text == "-1" else _positive(text)


def _command(arguments: argparse.Namespace) -> None:
    dtype = STORED_DTYPES[arguments.dtype]
    recipe = replace(
        RECIPES[arguments.recipe],
        group_size=arguments.group_size,
        grid=arguments.grid,
        scale_dtype=dtype,
    )
    if arguments.no_clip:
        recipe = replace(recipe, clip="none")
    symmetric = arguments.format == "compressed-tensors" and arguments.grid == "symmetric"
    layout = "compressed-tensors-symmetric" if symmetric else arguments.format
    checkpoint = open_checkpoint(arguments.source, **hub_options(arguments))
    shard_bytes = int(arguments.shard_gigabytes * 1e9)
    settings = Settings(recipe, layout, dtype, arguments.compared_tokens, shard_bytes, arguments.lm_head)
    device = pick_device(arguments.device)
    if arguments.lm_head:
        log.warning("%s", PACKED_HEADS[arguments.format])
    job = Quantizer(checkpoint, settings, device)
    if told := left_dense(checkpoint.model_config, checkpoint.linears, recipe.group_size):
        log.warning("%s", told)
    check_destination(job, Path(arguments.destination))
    calibration = calibrate(job, arguments)
    log.info(
        "calibration: %d tokens in %d windows, of %d found, %s",
        calibration.tokens_BL.numel(), len(calibration.tokens_BL), calibration.tokens_found, calibration.source,
    )  # fmt: skip
    report = quantize_checkpoint(
        checkpoint,
        arguments.destination,
        calibration,
        settings,
        device=device,
        offload_directory=arguments.offload_directory,
    )
    log.info("%s", report.summary())
    source, destination = shlex.quote(arguments.source), shlex.quote(arguments.destination)
    told = "try it: miniawq generate %s --prompt TEXT; measure it: miniawq evaluate %s --text FILE --reference %s"
    log.info(told, destination, destination, source)


def calibrate(job: Quantizer, arguments: argparse.Namespace) -> Calibration:
    """The text named on the command line, and text that the model writes."""
    own, size = arguments.own_windows, (arguments.num_samples, arguments.sequence_length)
    if own and not arguments.calib:
        raise UsageError("--own-windows goes on from a text", "there is none", "give --calib FILE, or leave both out")
    check_length(job.checkpoint, arguments.sequence_length)
    tokenizer = Tokenizer(job.checkpoint.directory)
    if not arguments.calib:
        log.info("no --calib: the model writes its own calibration text, seed %d", arguments.seed)
        model = model_that_writes(job, arguments, arguments.num_samples, *size)
        return sample_calibration(model, tokenizer, *size, arguments.seed)
    given = read_calibration(arguments.calib, tokenizer, *size)
    if not own:
        return given
    check_text(job.checkpoint, given)
    log.info("the model goes on from the text in %d windows, seed %d", own, arguments.seed)
    windows, length = given.tokens_BL.shape
    return add_own_windows(given, model_that_writes(job, arguments, own, windows + own, length), own, arguments.seed)


def model_that_writes(
    job: Quantizer, arguments: argparse.Namespace, own: int, windows: int, sequence_length: int
) -> Llama:
    """The whole model, if it fits while it writes its own windows, and a run with all windows after it.

    Writing can take hours: what would be refused after it is refused before.
    """
    checkpoint, device, settings = job.checkpoint, job.device, job.settings
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    plan_sampling(checkpoint, dtype, device, own, sequence_length).check(device)
    offload, learns = arguments.offload_directory is not None, settings.recipe.learns
    run = checkpoint, job.folds, windows, sequence_length, settings.compared_tokens
    plan_memory(*run, device, offload, learns, settings.lm_head).check(device)
    return load_model(checkpoint, device, dtype)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_command, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
