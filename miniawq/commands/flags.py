"""The flags of `miniawq generate`."""

import argparse
import logging
from pathlib import Path
from typing import Any

from miniawq import cli
from miniawq.checkpoint.hub import add_hub_flags
from miniawq.checkpoint.loading import DTYPES, add_kv_dtype_flag
from miniawq.commands import prompts
from miniawq.commands.sizes import add_memory_margin_flag
from miniawq.engine.sampling import SEEDS
from miniawq.errors import UsageError
from miniawq.hardware import device_memory, devices, size

DEFAULT_MAX_TOKENS, MOST_LOGPROBS = 512, 1000
ESSENTIAL = """
model prompt file interactive prompts output resume system_prompt think max_tokens max_seq_len temperature top_p seed
num_samples stop output_format stats quiet device dtype compile
""".split()
EXAMPLES = (
    'miniawq generate Qwen/Qwen3-8B-AWQ -p "Why is the sky blue?"',
    "miniawq generate Qwen/Qwen3-8B-AWQ --chat --no-think",
    "miniawq generate Qwen/Qwen3-8B-AWQ --prompts questions.jsonl -o answers.jsonl",
)
FILTERS: dict[str, tuple[type, str]] = {
    "top_k": (int, "draw from the N best tokens; 0 is off"),
    "top_p": (float, "draw from the best, X probable together; 1 is off"),
    "min_p": (float, "draw from tokens at least X times as probable as the best; 0 is off"),
    "repetition_penalty": (float, "divide the logits of tokens in prompt and answer by X; 1 is off"),
    "presence_penalty": (float, "subtract X from the logits of tokens in the answer; 0 is off"),
    "frequency_penalty": (float, "subtract X for each time a token is in the answer; 0 is off"),
    "repeat_last_n": (int, "tokens at the end that --repetition-penalty looks at; 0 is none, -1 all"),
}
ALIASES = {"repetition_penalty": ["--repeat-penalty"]}


def build_parser() -> argparse.ArgumentParser:
    """The parser of `miniawq generate`."""
    parser = cli.parser(
        "generate",
        "Write text with a model: to stdout, and everything else to stderr.",
        usage="[MODEL] [-p TEXT | -i | --prompts FILE] [flags]",
        examples=EXAMPLES,
        page="docs/generate.md",
        essential=ESSENTIAL,
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="directory, Hub id or id@revision (a demo)")
    add("--model", "-m", dest="model_flag", metavar="MODEL", help="the same, as a flag")
    prompts.add_prompt_flags(parser)
    _add_batch_flags(parser)
    add = parser.add_argument_group("length").add_argument
    most = f"most tokens to generate, -1 for all that fit ({DEFAULT_MAX_TOKENS})"
    add("--max-tokens", "--max-new-tokens", "--n-predict", "-n", type=int, metavar="N", help=most)
    most = "most tokens of prompt and answer (what fits)"
    add("--max-seq-len", "--ctx-size", "--max-model-len", "-c", type=int, metavar="N", help=most)
    shift = "leave out the oldest turns when a conversation fills it, or stop there"
    add("--context-shift", action=argparse.BooleanOptionalAction, default=True, help=shift)
    stops = "end before this text; repeatable"
    add("--stop", "--reverse-prompt", "-r", action="append", default=[], metavar="TEXT", help=stops)
    add("--ignore-eos", action="store_true", help="go on after the model's own end")
    ends = "ids or texts of tokens that end an answer too"
    add("--extra-eos-token", nargs="+", action="extend", default=[], metavar="TOKEN", help=ends)
    _add_sampling_flags(parser)
    output = parser.add_argument_group("output")
    formats = "text; json: one object; jsonl: one a piece"
    kind = output.add_mutually_exclusive_group()
    kinds = ["text", "json", "jsonl"]
    kind.add_argument("--output-format", choices=kinds, default="text", metavar="KIND", help=formats)
    kind.add_argument("--json", dest="output_format", action="store_const", const="json", help="--output-format json")
    streams = "write a text as it comes, or whole at its end"
    output.add_argument("--stream", action=argparse.BooleanOptionalAction, default=True, help=streams)
    probable = "in JSON: log-probabilities of the tokens, and of the N best in each place"
    output.add_argument("--logprobs", type=int, metavar="N", help=probable)
    detail = output.add_mutually_exclusive_group()
    detail.add_argument("--stats", "--verbose", "-v", action="store_true", help="speed, memory and settings on stderr")
    shown = "show what runs, in how much memory, and where each setting is from, on stderr"
    output.add_argument("--show-config", action="store_true", help=shown)
    detail.add_argument("--quiet", "-q", action="store_true", help="nothing on stderr but errors")
    add = parser.add_argument_group("loading").add_argument
    add("--device", metavar="NAME", help="cuda, cuda:1, cpu (cuda if there is one)")
    add("--list-devices", nargs=0, action=_ListDevices, help="show what --device can be here, and its memory")
    kinds, auto = ["auto", *DTYPES], "of activations (config.json's; float32 on a CPU)"
    add("--dtype", choices=kinds, default="auto", metavar="DTYPE", help=auto)
    add_kv_dtype_flag(add)
    compiled = "compile the steps (on a GPU), and keep them"
    add("--compile", action=argparse.BooleanOptionalAction, help=compiled)
    guessed = "guess tokens where the text repeats itself, and check several by one compiled step"
    add("--speculate", action="store_true", help=guessed)
    add_memory_margin_flag(add)
    add("--no-memory-check", dest="memory_check", action="store_false", help="load even if `miniawq plan` says no")
    add_hub_flags(parser)
    return parser


class _ListDevices(argparse.Action):
    """Says what devices there are, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        for memory in map(device_memory, devices()):
            print(f"{memory.name}: {size(memory.free)} of {size(memory.total)} are free")
        parser.exit()


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "sampling", "defaults: generation_config.json if it asks for sampling, else greedy"
    )
    temperature = group.add_mutually_exclusive_group()
    temperature.add_argument("--temperature", "--temp", type=float, metavar="X", help="0 takes the most probable token")
    temperature.add_argument("--greedy", dest="temperature", action="store_const", const=0.0, help="--temperature 0")
    for name, (kind, meaning) in FILTERS.items():
        names = [f"--{name.replace('_', '-')}", *ALIASES.get(name, ())]
        group.add_argument(*names, type=kind, metavar="N" if kind is int else "X", help=meaning)
    group.add_argument("--seed", type=int, metavar="N", help="same seed, same text, on one machine (random)")
    samples = "texts to write at once, with seeds S, S+1, ... (1)"
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
    if arguments.model and arguments.model.isdecimal() and not Path(arguments.model).exists():
        why = "in other programs -m is the number of tokens"
        raise UsageError(f"{arguments.model} is no model", why, f"write -n {arguments.model}, and name a model")
    prompts.check_prompt_flags(arguments)
    _check_batch_flags(arguments)
    if arguments.interactive and (arguments.output_format != "text" or arguments.num_samples > 1):
        raise UsageError("--interactive goes with neither --json nor --num-samples")
    as_they_come = arguments.interactive or arguments.prompts or arguments.output_format == "jsonl"
    if as_they_come and not arguments.stream:
        why = "conversations, --prompts and jsonl are written as they come"
        raise UsageError("--no-stream is for plain texts", why, "leave it out; --json is written whole in any case")
    if arguments.speculate and (arguments.prompts or arguments.num_samples > 1 or arguments.logprobs is not None):
        raise UsageError(
            "--speculate is for one text at a time", "it goes with no --prompts, --num-samples, --logprobs"
        )
    if arguments.logprobs is not None and not (arguments.prompts or arguments.output_format != "text"):
        raise UsageError("--logprobs is for JSON", "", "give --json, or --output-format jsonl")
    if arguments.logprobs is not None and not 0 <= arguments.logprobs <= MOST_LOGPROBS:
        raise UsageError(f"--logprobs {arguments.logprobs} is out of range", "", f"give 0 to {MOST_LOGPROBS}")
    if arguments.num_samples < 1:
        raise UsageError(f"--num-samples {arguments.num_samples} makes no sense", "", "give 1 or more")
    if arguments.seed is not None and not 0 <= arguments.seed < SEEDS:
        raise UsageError(f"--seed {arguments.seed} makes no sense", "", "give a number from 0 to 2**64 - 1")
    if arguments.max_tokens is not None and arguments.max_tokens < 1 and arguments.max_tokens != -1:
        raise UsageError(f"--max-tokens {arguments.max_tokens} makes no sense", "", "give 1 or more, or -1 for all")


def sampling_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the user asked for, None where nothing."""
    return {name: getattr(arguments, name) for name in ("temperature", *FILTERS)}
