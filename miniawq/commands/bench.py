"""`miniawq bench MODEL`: how fast a checkpoint runs here, for rows and contexts, and what a million tokens cost.

For each number of rows, random prompts of each length run through the model, as `miniawq generate` runs them, and then
so many new tokens a row, greedy. The median of some turns is told. Random text takes as long as any other.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from miniawq import cli
from miniawq.checkpoint.hub import add_hub_flags, hub_options
from miniawq.checkpoint.loading import DTYPES, KV_DTYPES, add_kv_dtype_flag, default_dtype, load_model
from miniawq.checkpoint.opening import Checkpoint, open_checkpoint
from miniawq.commands.sizes import add_memory_margin_flag
from miniawq.compiled import WORKSHOP, kept
from miniawq.engine.delivery import delivered
from miniawq.engine.memory import PREFILL_CHUNK, bytes_per_step, footprint, require_memory
from miniawq.engine.sampling import Sampling
from miniawq.engine.start import PlainStep, Step, threads_for
from miniawq.engine.step import DecodeStep
from miniawq.engine.weights import can_step
from miniawq.errors import DoesNotFit, UsageError
from miniawq.hardware import copy_bandwidth, device_memory, peak_memory, pick_device, threads
from miniawq.model import Llama

LONGEST_DEFAULT = 512
EXAMPLES = (
    "miniawq bench my-awq",
    "miniawq bench my-awq --rows 1,4,16 --context 512,4096",
    "miniawq bench my-awq --rows 16 --price 2.50",
)


@dataclass(frozen=True)
class Speed:
    """One line: rates are tokens per second of all rows together, memory is bytes, costs are for a million tokens.

    `share_of_bandwidth` is what the generation reads of weights and cache, beside how fast this device copies memory.
    """

    rows: int
    context: int
    new_tokens: int
    prompt_tokens_per_s: float
    generation_tokens_per_s: float
    ms_per_step: float
    share_of_bandwidth: float
    peak_memory: int
    planned_memory: int
    prompt_cost: float | None = None
    generation_cost: float | None = None


def cost_per_million(price_per_hour: float | None, tokens_per_s: float) -> float | None:
    """What a million tokens cost on a machine of this price."""
    return None if price_per_hour is None else price_per_hour / (3600 * tokens_per_s) * 1e6


def make_step(model: Llama, rows: int, positions: int, compiles: bool | None) -> Step:
    """A step as `generate` makes it: compiled if asked for, or by default on a GPU."""
    wanted = model.device.type == "cuda" if compiles is None else compiles
    if not (wanted and WORKSHOP.knows_torch and can_step(model)):
        return PlainStep(model, rows, positions, Sampling())
    step = DecodeStep(model, rows, positions)
    with kept(step.described()) as directory:
        step.compile(directory)
    if model.device.type == "cuda":
        step.read.compile()
    return step


@torch.inference_mode()
def time_text(model: Llama, step: Step, rows: int, context: int, new_tokens: int) -> tuple[float, float]:
    """Seconds of a prompt, to the first token, and of so many tokens after it, for all rows."""
    tokens_BL = torch.randint(model.config.vocab_size, (rows, context), device=model.device)
    step.begin(tokens_BL)
    started = time.perf_counter()
    for chunk_BL in tokens_BL.split(max(1, PREFILL_CHUNK // rows), dim=1):
        logits_BV = model.logits(step.read(chunk_BL, step.cache)[:, -1])
    ids_B = logits_BV.argmax(-1)
    ids_B.tolist()
    begun = time.perf_counter()
    for _ in delivered(step, ids_B, new_tokens + 1):
        pass
    return begun - started, time.perf_counter() - begun


def measure_speed(
    model: Llama,
    rows: int,
    context: int,
    *,
    new_tokens: int = 32,
    repeats: int = 3,
    compiles: bool | None = None,
    bandwidth: float,
    planned: int = 0,
    price: float | None = None,
) -> Speed:
    """The medians of some turns, after one that is not counted. `bandwidth` in bytes per second, `price` per hour."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    step = make_step(model, rows, context + new_tokens + 1, compiles)
    time_text(model, step, rows, context, 1)
    turns = [time_text(model, step, rows, context, new_tokens) for _ in range(repeats)]
    prompt, generation = (statistics.median(seconds) for seconds in zip(*turns, strict=True))
    prompt_rate, rate = rows * context / prompt, rows * new_tokens / generation
    read = bytes_per_step(model, rows, context + new_tokens // 2)
    return Speed(
        rows=rows,
        context=context,
        new_tokens=new_tokens,
        prompt_tokens_per_s=prompt_rate,
        generation_tokens_per_s=rate,
        ms_per_step=generation / new_tokens * 1e3,
        share_of_bandwidth=read * new_tokens / generation / bandwidth,
        peak_memory=peak_memory(model.device),
        planned_memory=planned,
        prompt_cost=cost_per_million(price, prompt_rate),
        generation_cost=cost_per_million(price, rate),
    )


COLUMNS: dict[str, tuple[str, Callable[[Speed], float | None]]] = {
    "rows": (".0f", lambda speed: speed.rows),
    "context": (".0f", lambda speed: speed.context),
    "prompt tok/s": (".1f", lambda speed: speed.prompt_tokens_per_s),
    "generation tok/s": (".2f", lambda speed: speed.generation_tokens_per_s),
    "ms/step": (".2f", lambda speed: speed.ms_per_step),
    "bandwidth": (".0%", lambda speed: speed.share_of_bandwidth),
    "peak GB": (".2f", lambda speed: speed.peak_memory / 1e9),
    "planned GB": (".2f", lambda speed: speed.planned_memory / 1e9),
    "prompt cost/1M": (".4f", lambda speed: speed.prompt_cost),
    "generation cost/1M": (".4f", lambda speed: speed.generation_cost),
}


def line_of(speed: Speed | None, has_price: bool) -> str:
    """A line of the table, or the names of its columns; costs only where there is a price."""
    columns = [item for item in COLUMNS.items() if has_price or "cost" not in item[0]]
    cells = [name if speed is None else format(value(speed), form) for name, (form, value) in columns]
    return "  ".join(cell.rjust(len(name)) for cell, (name, _) in zip(cells, columns, strict=True))


def numbers(text: str) -> list[int]:
    """A list such as 1,4,16."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text[:50]!r} is no list of numbers; write 1,4,16") from error
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{min(found)} makes no sense; give 1 or more")
    return found


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = cli.parser(
        "bench",
        "How fast a checkpoint runs on this machine, for rows and contexts, and at what\ncost.",
        usage="[MODEL] [flags]",
        examples=EXAMPLES,
        page="docs/performance.md",
    )
    add = parser.add_argument
    add("model", nargs="?", help="directory, Hub id or id@revision (the demo)")
    add("--rows", type=numbers, default=[1], metavar="N,N", help="texts at a time (1)")
    add("--context", type=numbers, metavar="N,N", help=f"tokens of a prompt ({LONGEST_DEFAULT}, or what fits)")
    add("--new-tokens", "-n", type=int, default=32, metavar="N", help="tokens to generate after it (32)")
    add("--repeats", type=int, default=3, metavar="N", help="turns of which the median is told (3)")
    add("--price", type=float, metavar="X", help="of this machine per hour, for the cost of a million tokens")
    add("--json", action="store_true", help="print one JSON object")
    add("--device", metavar="NAME", help="cuda, cuda:1, cpu (cuda if there is one)")
    auto = "of activations (config.json's; float32 on a CPU)"
    add("--dtype", choices=["auto", *DTYPES], default="auto", metavar="DTYPE", help=auto)
    add_kv_dtype_flag(add)
    add("--compile", action=argparse.BooleanOptionalAction, help="compile the steps (on a GPU)")
    add_memory_margin_flag(add)
    add_hub_flags(parser)
    return parser


def combinations_of(arguments: argparse.Namespace, checkpoint: Checkpoint) -> list[tuple[int, int]]:
    """Rows and contexts to measure; UsageError on what makes no sense."""
    for flag, least in (("new_tokens", 1), ("repeats", 1), ("price", 0)):
        if (value := getattr(arguments, flag)) is not None and not value >= least:
            raise UsageError(f"--{flag.replace('_', '-')} {value} makes no sense", "", f"give {least} or more")
    limit = checkpoint.model_config.max_position_embeddings
    longest = limit - arguments.new_tokens - 1
    if (asked := max(arguments.context or [1])) > longest:
        why = f"config.json: max_position_embeddings = {limit}, and {arguments.new_tokens} new tokens follow"
        raise UsageError(f"--context {asked} is too long", why, f"give {max(longest, 0)} or less")
    return list(itertools.product(arguments.rows, arguments.context or [min(LONGEST_DEFAULT, longest)]))


def _bench(arguments: argparse.Namespace) -> None:
    checkpoint = open_checkpoint(arguments.model, **hub_options(arguments)).with_kv_cache(KV_DTYPES[arguments.kv_dtype])
    wanted, device = combinations_of(arguments, checkpoint), pick_device(arguments.device)
    dtype = DTYPES.get(arguments.dtype) or default_dtype(checkpoint, device)
    fitting, left_out = [], None
    for rows, context in wanted:
        positions, margin = context + arguments.new_tokens + 1, arguments.memory_margin
        try:
            needed = footprint(
                checkpoint, dtype, device=device.type, batch=rows, max_seq_len=positions, overhead=margin
            )
            require_memory(needed, checkpoint, device, dtype)
            fitting.append((rows, context, needed.total))
        except DoesNotFit as error:
            left_out = error
            cli.say(f"{rows} rows of {context} tokens are left out: {error.why}")
    if left_out is not None and not fitting:
        raise left_out
    # Before there is a model, whose peak of memory is told.
    bandwidth, found = copy_bandwidth(device), []
    model = load_model(checkpoint, device, dtype)
    with threads(threads_for(model)):
        name = device_memory(device).name if device.type == "cuda" else f"cpu, threads: {torch.get_num_threads()}"
        if not arguments.json:
            print(f"{arguments.model or 'the demo'} on {name}, which copies {bandwidth / 1e9:.1f} GB/s")
            print(line_of(None, arguments.price is not None), flush=True)
        for rows, context, planned in fitting:
            found.append(
                measure_speed(
                    model, rows, context, new_tokens=arguments.new_tokens, repeats=arguments.repeats,
                    compiles=arguments.compile, bandwidth=bandwidth, planned=planned, price=arguments.price,
                )
            )  # fmt: skip
            if not arguments.json:
                print(line_of(found[-1], arguments.price is not None), flush=True)
    if arguments.json:
        machine = {"model": arguments.model or "demo", "device": name, "torch": torch.__version__, "dtype": str(dtype)}
        print(json.dumps(machine | {"bytes_per_s": bandwidth, "results": [asdict(speed) for speed in found]}))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return cli.run(_bench, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
