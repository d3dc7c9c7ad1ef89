"""What `miniawq generate` tells about a text it has written: for machines, and for people on stderr."""

import dataclasses
from argparse import Namespace
from typing import Any, Protocol

from miniawq.commands.context import Context
from miniawq.engine.completion import Completion
from miniawq.engine.memory import bytes_per_token
from miniawq.engine.sampling import Sampling
from miniawq.engine.speculation import Lookup
from miniawq.engine.start import Decoders
from miniawq.hardware import peak_memory
from miniawq.model import Llama
from miniawq.text.tokenizer import Tokenizer


class Writing(Protocol):
    """What is known of the run that wrote the text."""

    arguments: Namespace
    model: Llama
    sampling: Sampling
    decoders: Decoders
    tokenizer: Tokenizer
    load_seconds: float
    next_seed: int
    context: Context
    texts_told: int
    lookup: Lookup | None

    def begin(self, prompt: str, is_chat: bool) -> tuple[Completion, int]:
        """A completion, and its seed."""

    def encode(self, prompt: str, is_chat: bool) -> list[int]:
        """The ids of a prompt."""

    def ends(self, is_chat: bool) -> frozenset[int]:
        """The ids that end an answer."""

    def report(self, completion: Completion, seed: int) -> None:
        """Say how it went, if the user wants to know."""


def figures(run: Writing, completion: Completion, seed: int) -> dict[str, Any]:
    """All that is known about one text, for --json."""
    return completion.record() | {
        "model": run.arguments.model or "demo",
        "sampling": dataclasses.asdict(run.sampling),
        "seed": seed,
        "load_s": run.load_seconds,
        "compile_s": run.decoders.build_seconds,
        "tokens_before_compiled": run.decoders.ahead,
        "compiled_tps": completion.rate_after(run.decoders.ahead + 2) if run.decoders.current else 0.0,
        "guessed": run.lookup.guessed if run.lookup else 0,
        "guessed_right": run.lookup.right if run.lookup else 0,
        "peak_memory": peak_memory(run.model.device) / 1e9,
        "gigabytes_per_s": completion.generation_rate * bytes_per_token(run.model) / 1e9,
    }


def in_one_line(run: Writing, completion: Completion, seed: int) -> str:
    """How fast the answer came, and the seed that gives it again."""
    found = figures(run, completion, seed)
    generation = _generation(found)
    return generation if run.sampling.temperature == 0 else f"{generation} (seed {seed})"


def in_full(run: Writing, completion: Completion, seed: int) -> str:
    """All that may be asked about one text, in several lines."""
    found = figures(run, completion, seed)
    kept = f"{found['cached_tokens']} of them kept, " if found["cached_tokens"] else ""
    guesses = f"Guesses: {found['guessed']} tokens, {found['guessed_right']} right\n" if found["guessed"] else ""
    settings = ", ".join(f"{name} {value:g}" for name, value in settings_on(run.sampling).items())
    return (
        f"Prompt: {found['prompt_tokens']} tokens, {kept}{found['prompt_tps']:.1f} tokens-per-sec\n"
        f"{_generation(found)}, {found['gigabytes_per_s']:.2f} GB of weights read per second\n"
        f"{guesses}"
        f"Time to first token: {found['first_token_s']:.3f} s\n"
        f"Loading: {found['load_s']:.3f} s; compiling: {found['compile_s']:.3f} s\n"
        f"Peak memory: {found['peak_memory']:.3f} GB\n"
        f"Sampling: {settings}, seed {seed}"
    )


def settings_on(sampling: Sampling) -> dict[str, float]:
    """Those that change what is chosen; the temperature in any case."""
    off = dataclasses.asdict(Sampling()) | {"temperature": None}
    return {name: value for name, value in dataclasses.asdict(sampling).items() if value != off[name]}


def _generation(found: dict[str, Any]) -> str:
    text = f"Generation: {found['generation_tokens']} tokens, {found['generation_tps']:.1f} tokens-per-sec"
    return f"{text}, {found['compiled_tps']:.1f} by the compiled step" if found["compiled_tps"] else text
