"""Write text with a model: the command line, and the same in Python.

model, tokenizer = load("owner/name-AWQ")
for piece in complete(model, tokenizer, tokenizer.encode("Once upon a time"), max_tokens=100): ...
for ids in generate(model, tokens_BL, max_tokens=100, stop_ids=tokenizer.eos_ids): ...
"""

import argparse
import dataclasses
import json
import logging
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from miniawq import cli, prompts
from miniawq.chat import Message
from miniawq.checkpoint import Checkpoint, load_model, open_checkpoint
from miniawq.completion import Completion, EagerStart, bytes_per_token, complete, generate, peak_memory
from miniawq.decode import DecodeStep
from miniawq.errors import DoesNotFit, InvalidInput, UsageError
from miniawq.footprint import require_memory
from miniawq.model import Llama
from miniawq.repl import converse
from miniawq.sampling import Sampling
from miniawq.tokenizer import Tokenizer, read_object

__all__ = ["build_parser", "complete", "generate", "load", "main"]

# Not __name__, which is __main__ for those who run this file.
log = logging.getLogger("miniawq.generate")

DEFAULT_MAX_TOKENS = 512
DEMO_SEED = 0
SMALLEST_CACHE = 1024
SMALL_MODEL_BYTES = 32 << 20
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
FILTERS: dict[str, tuple[type, str]] = {
    "top_k": (int, "draw from the N best tokens; 0 is off"),
    "top_p": (float, "draw from the best tokens that together have probability X; 1 is off"),
    "min_p": (float, "draw from tokens at least X times as probable as the best; 0 is off"),
    "repetition_penalty": (float, "divide the logits of tokens in prompt and answer by X; 1 is off"),
    "presence_penalty": (float, "subtract X from the logits of tokens in the answer; 0 is off"),
    "frequency_penalty": (float, "subtract X for each time a token is in the answer; 0 is off"),
}


def load(
    model: str | Path | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> tuple[Llama, Tokenizer]:
    """A dense or INT4 model and its tokenizer, from a directory, a Hub id, "id@revision", or (None) the demo.

    `device` defaults to CUDA where there is one, `dtype` to that of the checkpoint on a GPU and float32 on a CPU.
    """
    checkpoint = open_checkpoint(model, revision=revision, local_files_only=local_files_only)
    device = pick_device(device)
    return load_model(checkpoint, device, dtype or pick_dtype(checkpoint, device)), Tokenizer(checkpoint.directory)


def pick_device(wanted: torch.device | str | None) -> torch.device:
    """The device asked for, or the best there is; UsageError if there is none of this name here."""
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=wanted)
        return torch.device(wanted)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {str(wanted)!r} cannot be used", str(error).splitlines()[0], "try cpu") from error


def pick_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The half precision that config.json states, float16 if it states none, and float32 on a CPU."""
    stated = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if stated == "bfloat16" else torch.float16


def build_parser() -> argparse.ArgumentParser:
    """The flags of `miniawq generate`."""
    parser = cli.parser(
        "generate",
        "Write text with a model. Text goes to stdout, everything else to stderr. Without a model, the demo that comes "
        "with miniawq tells a story.",
    )
    add = parser.add_argument
    add("model", nargs="?", help="directory, Hub id or id@revision (default: the demo)")
    add("--model", "-m", dest="model_flag", metavar="MODEL", help="the same, as a flag")
    prompts.add_flags(parser)
    add = parser.add_argument_group("length").add_argument
    add(
        "--max-tokens",
        "-n",
        type=int,
        metavar="N",
        help=f"most tokens to generate, -1 for all that fit ({DEFAULT_MAX_TOKENS})",
    )
    add("--max-seq-len", type=int, metavar="N", help="most tokens of prompt and answer together (the model's context)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    add("--ignore-eos", action="store_true", help="go on behind the model's own end")
    group = parser.add_argument_group(
        "sampling", "defaults: generation_config.json if it asks for sampling, else greedy"
    )
    temperature = group.add_mutually_exclusive_group()
    temperature.add_argument("--temperature", type=float, metavar="X", help="0 takes the most probable token")
    temperature.add_argument("--greedy", dest="temperature", action="store_const", const=0.0, help="--temperature 0")
    for name, (kind, meaning) in FILTERS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N" if kind is int else "X", help=meaning)
    group.add_argument("--seed", type=int, metavar="N", help="same seed, same text, on one machine (random, and shown)")
    group.add_argument(
        "--num-samples", type=int, default=1, metavar="N", help="texts to write, with seeds S, S+1, ... (1)"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object a text instead of the text")
    detail = output.add_mutually_exclusive_group()
    detail.add_argument("--stats", action="store_true", help="speed, memory and settings on stderr")
    detail.add_argument("--quiet", "-q", action="store_true", help="nothing on stderr but errors")
    add = parser.add_argument_group("loading").add_argument
    add("--device", help="cuda, cuda:1, cpu (cuda if there is one)")
    add(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="of activations (auto: config.json's; float32 on CPU)",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the steps (on a GPU); kept in ~/.cache/miniawq",
    )
    add("--no-memory-check", dest="memory_check", action="store_false", help="load even if `miniawq plan` says no")
    add("--revision", help="branch, tag or commit on the Hub")
    add("--local-files-only", action="store_true", help="never use the network")
    add("--cache-dir", help="where downloads are kept")
    add("--token", help="access token of the Hub")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. See `build_parser`."""
    return cli.run(_run, build_parser(), argv)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.quiet:
        logging.getLogger("miniawq").setLevel(logging.ERROR)
    _check_flags(arguments)
    try:
        _write(arguments)
    except torch.OutOfMemoryError as error:
        fix = "give a smaller --max-tokens, or ask `miniawq plan` what fits"
        raise DoesNotFit("the memory of the device is full", str(error).splitlines()[0], fix) from error


def _write(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    checkpoint = open_checkpoint(
        arguments.model,
        revision=arguments.revision,
        local_files_only=arguments.local_files_only,
        token=arguments.token,
        cache_dir=arguments.cache_dir,
    )
    # Whatever can be refused is refused before the weights are read.
    device, tokenizer = pick_device(arguments.device), Tokenizer(checkpoint.directory)
    stated = read_object(checkpoint.directory / "generation_config.json")
    sampling = Sampling.choose(stated, **{name: getattr(arguments, name) for name in ("temperature", *FILTERS)})
    prompt = None if arguments.interactive else prompts.read(arguments, tokenizer)
    if prompt is None and not tokenizer.has_chat_template:
        raise UsageError("this model cannot talk", "it has no chat template: a base model", "use --prompt")
    limit = checkpoint.model_config.max_position_embeddings
    if not 0 < (arguments.max_seq_len or limit) <= limit:
        why = f"config.json: max_position_embeddings = {limit}"
        raise UsageError(f"--max-seq-len {arguments.max_seq_len} is out of range", why, f"give {limit} or less")
    dtype = DTYPES.get(arguments.dtype) or pick_dtype(checkpoint, device)
    if arguments.memory_check:
        at_least = arguments.max_seq_len or min(limit, max(arguments.max_tokens or 0, DEFAULT_MAX_TOKENS))
        require_memory(checkpoint, device, dtype, max_seq_len=at_least)
    model = load_model(checkpoint, device, dtype)
    writer = Writer(arguments, model, tokenizer, sampling, load_seconds=time.perf_counter() - started)
    with threads_for(model):
        if prompt is None:
            converse(writer.answer, prompts.system_message(arguments))
        else:
            writer.write_all(*prompt)
        writer.wait_for_compiler()


@contextmanager
def threads_for(model: Llama) -> Iterator[None]:
    """One thread for a model that is done before a second one has woken up; all of them for the others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if bytes_per_token(model) < SMALL_MODEL_BYTES else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_flags(arguments: argparse.Namespace) -> None:
    if arguments.model and arguments.model_flag:
        raise UsageError("two models are given", f"{arguments.model} and --model {arguments.model_flag}", "name one")
    arguments.model = arguments.model or arguments.model_flag
    prompts.check_flags(arguments)
    if arguments.interactive and (arguments.json or arguments.num_samples > 1):
        raise UsageError("--interactive goes with neither --json nor --num-samples")
    if arguments.num_samples < 1:
        raise UsageError(f"--num-samples {arguments.num_samples} makes no sense", "", "give 1 or more")
    if arguments.max_tokens is not None and arguments.max_tokens < 1 and arguments.max_tokens != -1:
        raise UsageError(f"--max-tokens {arguments.max_tokens} makes no sense", "", "give 1 or more, or -1 for all")


class Writer:
    """A loaded model with the user's settings, writing texts to stdout and figures to stderr."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        model: Llama,
        tokenizer: Tokenizer,
        sampling: Sampling,
        load_seconds: float,
    ) -> None:
        self.arguments, self.model, self.tokenizer, self.sampling = arguments, model, tokenizer, sampling
        self.load_seconds = load_seconds
        self.tells_story = not prompts.is_given(arguments)
        chosen = DEMO_SEED if arguments.model is None else secrets.randbits(32)
        self.next_seed = chosen if arguments.seed is None else arguments.seed
        self.is_reproducible = arguments.model is None or arguments.seed is not None or sampling.temperature == 0
        self.limit = arguments.max_seq_len or model.config.max_position_embeddings
        on_gpu = model.device.type == "cuda"
        self.compiles = on_gpu if arguments.compile is None else arguments.compile
        self.decoder: EagerStart | None = None

    def write_all(self, prompt: str, is_chat: bool) -> None:
        """All samples of one prompt."""
        for number in range(self.arguments.num_samples):
            completion, seed = self.begin(prompt, is_chat)
            try:
                if self.arguments.json:
                    list(completion)
                    print(json.dumps({"prompt": prompt} | self.figures(completion, seed), ensure_ascii=False))
                else:
                    print("\n" if number else "", prompt if self.tells_story else "", sep="", end="")
                    self.write_text(completion)
            finally:
                self.report(completion, seed)

    @staticmethod
    def write_text(completion: Completion) -> None:
        """Each piece as it comes, and an end of line even if it is interrupted."""
        try:
            for piece in completion:
                print(piece, end="", flush=True)
        finally:
            print(flush=True)

    def answer(self, messages: list[Message]) -> Iterator[str]:
        """The next turn of a conversation."""
        prompt = self.tokenizer.render_chat(messages, **self.arguments.chat_template_kwargs)
        completion, seed = self.begin(prompt, is_chat=True)
        try:
            yield from completion
        finally:
            if self.arguments.stats:
                print(file=sys.stderr)
                self.report(completion, seed)

    def begin(self, prompt: str, is_chat: bool) -> tuple[Completion, int]:
        """A completion with the next seed."""
        if self.arguments.show_prompt:
            print(prompt, file=sys.stderr)
        prompt_ids = self.tokenizer.encode(prompt, add_special_tokens=not is_chat)
        seed, self.next_seed = self.next_seed, self.next_seed + 1
        ends = self.tokenizer.eos_ids | (self.tokenizer.end_of_turn_ids() if is_chat else frozenset())
        max_tokens = self.room(len(prompt_ids))
        completion = complete(
            self.model,
            self.tokenizer,
            prompt_ids,
            max_tokens=max_tokens,
            stop=self.arguments.stop,
            stop_ids=frozenset() if self.arguments.ignore_eos else ends,
            sampling=self.sampling,
            seed=seed,
            decoder=self.compiled(len(prompt_ids) + max_tokens) if self.compiles else None,
        )
        return completion, seed

    def compiled(self, positions: int) -> EagerStart:
        """One decode step for all texts, made again when a text is longer than its cache."""
        if self.decoder is None or self.decoder.cache.max_seq_len < positions:
            self.wait_for_compiler()
            self.decoder = None
            room = max(SMALLEST_CACHE, 1 << (positions - 1).bit_length())
            step = DecodeStep(self.model, 1, min(room, self.limit), self.sampling)
            self.decoder = EagerStart(self.model, step, streams=not self.is_reproducible)
        return self.decoder

    def wait_for_compiler(self) -> None:
        """Let the compiler finish what it has begun, so that the next process finds it."""
        if self.decoder is not None and self.decoder.is_compiling:
            log.info("still compiling, so that the next text begins faster (Ctrl-C leaves it)")
            self.decoder.wait()
            log.info("compiled in %.1f s", self.compile_seconds())

    def compile_seconds(self) -> float:
        """Time that compiling the decode step has taken."""
        return 0.0 if self.decoder is None else self.decoder.compiled.build_seconds

    def room(self, prompt_length: int) -> int:
        """How many tokens to generate: as many as asked for, or as fit."""
        wanted, left = self.arguments.max_tokens, self.limit - prompt_length
        if left < 1:
            why = f"it has {prompt_length} tokens, and prompt and answer together may have {self.limit}"
            raise InvalidInput("the prompt does not fit into the context", why, "shorten it, or begin again")
        if wanted is not None and wanted > left:
            log.info("only %d new tokens fit behind a prompt of %d in a context of %d", left, prompt_length, self.limit)
        return left if wanted == -1 else min(wanted or DEFAULT_MAX_TOKENS, left)

    def figures(self, completion: Completion, seed: int) -> dict[str, Any]:
        """All that is known about one text, for --json."""
        ahead = 0 if self.decoder is None else self.decoder.ahead
        return completion.record() | {
            "model": self.arguments.model or "demo",
            "sampling": dataclasses.asdict(self.sampling),
            "seed": seed,
            "load_s": self.load_seconds,
            "compile_s": self.compile_seconds(),
            "tokens_before_compiled": ahead,
            "compiled_tps": completion.rate_behind(ahead + 2) if self.compiles else 0.0,
            "peak_memory": peak_memory(self.model) / 1e9,
            "gigabytes_per_s": completion.generation_rate * bytes_per_token(self.model) / 1e9,
        }

    def report(self, completion: Completion, seed: int) -> None:
        """Say on stderr how it went."""
        if self.arguments.quiet:
            return
        found = self.figures(completion, seed)
        generation = f"Generation: {found['generation_tokens']} tokens, {found['generation_tps']:.1f} tokens-per-sec"
        if found["compiled_tps"]:
            generation += f", {found['compiled_tps']:.1f} by the compiled step"
        if not self.arguments.stats:
            print(generation, "" if self.sampling.temperature == 0 else f"(seed {seed})", file=sys.stderr)
            return
        settings = ", ".join(f"{name} {value:g}" for name, value in found["sampling"].items())
        print(
            f"Prompt: {found['prompt_tokens']} tokens, {found['prompt_tps']:.1f} tokens-per-sec",
            f"{generation}, {found['gigabytes_per_s']:.2f} GB of weights read per second",
            f"Time to first token: {found['first_token_s']:.3f} s",
            f"Loading: {found['load_s']:.3f} s; compiling: {found['compile_s']:.3f} s",
            f"Peak memory: {found['peak_memory']:.3f} GB",
            f"Sampling: {settings}, seed {seed}",
            sep="\n",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
