"""The flags of `miniawq generate`."""

import argparse
import logging
from pathlib import Path
from typing import Any

from miniawq import cli
from miniawq.checkpoint.hub import add_hub_flags
from miniawq.checkpoint.loading import DTYPES
from miniawq.commands import prompts
from miniawq.engine.sampling import SEEDS
from miniawq.errors import UsageError

DEFAULT_MAX_TOKENS = 512
FILTERS: dict[str, tuple[type, str]] = {
    "top_k": (int, "draw from the N best tokens; 0 is off"),
    "top_p": (float, "draw from the best tokens that together have probability X; 1 is off"),
    "min_p": (float, "draw from tokens at least X times as probable as the best; 0 is off"),
    "repetition_penalty": (float, "divide the logits of tokens in prompt and answer by X; 1 is off"),
    "presence_penalty": (float, "subtract X from the logits of tokens in the answer; 0 is off"),
    "frequency_penalty": (float, "subtract X for each time a token is in the answer; 0 is off"),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of `miniawq generate`."""
    parser = cli.parser(
        "generate",
        "Write text with a model. Text goes to stdout, everything else to stderr. Without a model, the demo that comes "
        "with miniawq tells a story.",
    )
    add = parser.add_argument
    add("model", nargs="?", help="directory, Hub id or id@revision (default: the demo)")
    add("--model", "-m", dest="model_flag", metavar="MODEL", help="the same, as a flag")
    prompts.add_prompt_flags(parser)
    _add_batch_flags(parser)
    add = parser.add_argument_group("length").add_argument
    most = f"most tokens to generate, -1 for all that fit ({DEFAULT_MAX_TOKENS})"
    add("--max-tokens", "-n", type=int, metavar="N", help=most)
    add("--max-seq-len", type=int, metavar="N", help="most tokens of prompt and answer together (the model's context)")
    shift = "leave out the oldest turns when a conversation fills it, or stop there"
    add("--context-shift", action=argparse.BooleanOptionalAction, default=True, help=shift)
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    add("--ignore-eos", action="store_true", help="go on after the model's own end")
    _add_sampling_flags(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object a text instead of the text")
    detail = output.add_mutually_exclusive_group()
    detail.add_argument("--stats", action="store_true", help="speed, memory and settings on stderr")
    detail.add_argument("--quiet", "-q", action="store_true", help="nothing on stderr but errors")
    add = parser.add_argument_group("loading").add_argument
    add("--device", help="cuda, cuda:1, cpu (cuda if there is one)")
    kinds, auto = ["auto", *DTYPES], "of activations (auto: config.json's; float32 on CPU)"
    add("--dtype", choices=kinds, default="auto", help=auto)
    compiled = "compile the steps (on a GPU); kept in MINIAWQ_CACHE, or the user's cache directory"
    add("--compile", action=argparse.BooleanOptionalAction, help=compiled)
    add("--no-memory-check", dest="memory_check", action="store_false", help="load even if `miniawq plan` says no")
    add_hub_flags(parser)
    return parser


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "sampling", "defaults: generation_config.json if it asks for sampling, else greedy"
    )
    temperature = group.add_mutually_exclusive_group()
    temperature.add_argument("--temperature", type=float, metavar="X", help="0 takes the most probable token")
    temperature.add_argument("--greedy", dest="temperature", action="store_const", const=0.0, help="--temperature 0")
    for name, (kind, meaning) in FILTERS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N" if kind is int else "X", help=meaning)
    group.add_argument("--seed", type=int, metavar="N", help="same seed, same text, on one machine (random, and shown)")
    samples = "texts to write, with seeds S, S+1, ... (1)"
    group.add_argument("--num-samples", type=int, default=1, metavar="N", help=samples)


def _add_batch_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("many prompts (--prompts)").add_argument
    add("--batch-size", type=int, metavar="N", help="texts at once (what memory allows; at most 64, on a CPU 32)")
    add("--output", "-o", type=Path, metavar="FILE", help="file for the records (stdout)")
    add("--resume", action="store_true", help="go on where the file of --output ends")


def _check_batch_flags(arguments: argparse.Namespace) -> None:
    if not arguments.prompts and (arguments.batch_size is not None or arguments.output or arguments.resume):
        raise UsageError("--batch-size, --output and --resume are for --prompts", "", "give --prompts FILE")
    if arguments.prompts and arguments.num_samples > 1:
        raise UsageError("--prompts does not go with --num-samples", "", "write the prompt on several lines")
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise UsageError(f"--batch-size {arguments.batch_size} makes no sense", "", "give 1 or more")
    if arguments.resume and not arguments.output:
        raise UsageError("--resume needs --output FILE", "what has been written to stdout cannot be read again")


def check_flags(arguments: argparse.Namespace) -> None:
    """UsageError on flags that make no sense, or not together. Afterwards `model` is set, however it was given."""
    if arguments.quiet:
        logging.getLogger("miniawq").setLevel(logging.ERROR)
    if arguments.model and arguments.model_flag:
        raise UsageError("two models are given", f"{arguments.model} and --model {arguments.model_flag}", "name one")
    arguments.model = arguments.model or arguments.model_flag
    prompts.check_prompt_flags(arguments)
    _check_batch_flags(arguments)
    if arguments.interactive and (arguments.json or arguments.num_samples > 1):
        raise UsageError("--interactive goes with neither --json nor --num-samples")
    if arguments.num_samples < 1:
        raise UsageError(f"--num-samples {arguments.num_samples} makes no sense", "", "give 1 or more")
    if arguments.seed is not None and not 0 <= arguments.seed < SEEDS:
        raise UsageError(f"--seed {arguments.seed} makes no sense", "", "give a number from 0 to 2**64 - 1")
    if arguments.max_tokens is not None and arguments.max_tokens < 1 and arguments.max_tokens != -1:
        raise UsageError(f"--max-tokens {arguments.max_tokens} makes no sense", "", "give 1 or more, or -1 for all")


def sampling_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the user asked for, None where nothing."""
    return {name: getattr(arguments, name) for name in ("temperature", *FILTERS)}
