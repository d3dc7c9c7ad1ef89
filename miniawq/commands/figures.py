"""What `miniawq generate` tells about a text it has written: for machines, and for people on stderr."""

import dataclasses
from argparse import Namespace
from typing import Any, Protocol

from miniawq.cli import say
from miniawq.engine.completion import Completion
from miniawq.engine.memory import bytes_per_token
from miniawq.engine.sampling import Sampling
from miniawq.engine.start import Decoders
from miniawq.hardware import peak_memory
from miniawq.model import Llama


class Writing(Protocol):
    """What is known of the run that wrote the text."""

    arguments: Namespace
    model: Llama
    sampling: Sampling
    decoders: Decoders
    load_seconds: float


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
        "peak_memory": peak_memory(run.model.device) / 1e9,
        "gigabytes_per_s": completion.generation_rate * bytes_per_token(run.model) / 1e9,
    }


def report(run: Writing, completion: Completion, seed: int) -> None:
    """Say on stderr how it went: in one line, or with --stats in several."""
    if run.arguments.quiet or not completion.ids:
        return
    found = figures(run, completion, seed)
    generation = f"Generation: {found['generation_tokens']} tokens, {found['generation_tps']:.1f} tokens-per-sec"
    if found["compiled_tps"]:
        generation += f", {found['compiled_tps']:.1f} by the compiled step"
    if not run.arguments.stats:
        return say(generation if run.sampling.temperature == 0 else f"{generation} (seed {seed})")
    kept = f"{found['cached_tokens']} of them kept, " if found["cached_tokens"] else ""
    settings = ", ".join(f"{name} {value:g}" for name, value in found["sampling"].items())
    say(
        f"Prompt: {found['prompt_tokens']} tokens, {kept}{found['prompt_tps']:.1f} tokens-per-sec\n"
        f"{generation}, {found['gigabytes_per_s']:.2f} GB of weights read per second\n"
        f"Time to first token: {found['first_token_s']:.3f} s\n"
        f"Loading: {found['load_s']:.3f} s; compiling: {found['compile_s']:.3f} s\n"
        f"Peak memory: {found['peak_memory']:.3f} GB\n"
        f"Sampling: {settings}, seed {seed}"
    )
