"""One INT4 product on this machine's processor beside the others: ours compiled and eager, dense, torch's own INT4.

    OMP_NUM_THREADS=1 python scripts/cpu_product.py
    python scripts/cpu_product.py --threads 2 --shapes 4096x4096 --rows 1,4,16,64 --seconds 2

Groups of 128, random weights, activations in memory in the dtype that each takes. Everything of one shape and number of
rows is timed in turn, so a busy machine is busy for all; medians, of processor time for one thread and of wall time for
more. "ours" is compiled as a decode step has it, but called alone; "shared" is a quarter of a call with four such
products of four weights, which is nearer to a layer of a model. Everything else is one call, with one weight.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from miniawq import products
from miniawq.kernel import QuantLinear
from miniawq.model import DenseLinear
from miniawq.packing import Quantized, dequantize

GROUP, SHARING = 128, 4
SHAPES = ("2048x2048", "8192x2048", "2048x8192", "4096x4096", "28672x4096", "4096x14336")
ROWS = (1, 2, 3, 4, 6, 8, 16, 32, 64)
Form = Callable[[Tensor], Tensor]
Made = tuple[torch.dtype, Callable[[int], Form | None]]


def random_quantized(outputs: int, inputs: int) -> Quantized:
    """Any codes, scales near 0.01 and zeros in the middle."""
    generator = torch.Generator().manual_seed(0)
    codes_OI = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, generator=generator)
    scales_OG = (torch.rand(outputs, inputs // GROUP, generator=generator) * 0.01 + 0.005).half()
    zeros_OG = torch.randint(6, 10, (outputs, inputs // GROUP), dtype=torch.uint8, generator=generator)
    return Quantized(codes_OI, scales_OG, zeros_OG)


def ours(quantized: Quantized) -> Made:
    """The product of a decode step, if it has so many rows."""
    layer = QuantLinear.from_quantized(quantized)

    def of(rows: int) -> Form | None:
        if rows > products.MOST_ROWS_ON_CPU:
            return None
        of_layer = products.products_of([layer], rows)
        return products.lower(lambda x_TI: product(of_layer, x_TI), [products.WORDS])

    return torch.float32, of


def product(of_layer: tuple[products.Product, ...], x_TI: Tensor) -> Tensor:
    """Both steps."""
    return products.multiply(of_layer, products.prepare(of_layer, x_TI))


def shared(quantized: Quantized) -> Made:
    """Four products in one compiled call, as a layer has them, each waiting for the one before."""
    layers = [QuantLinear.from_quantized(Quantized(*(part.clone() for part in quantized))) for _ in range(SHARING)]

    def of(rows: int) -> Form | None:
        if rows > products.MOST_ROWS_ON_CPU:
            return None
        of_layers = [products.products_of([layer], rows) for layer in layers]

        def call(x_TI: Tensor) -> Tensor:
            y_TO = product(of_layers[0], x_TI)
            for of_layer in of_layers[1:]:
                y_TO = product(of_layer, x_TI + 1e-30 * products.written(y_TO)[:, :1])
            return y_TO

        return products.lower(call, [products.WORDS])

    return torch.float32, of


def eager(quantized: Quantized) -> Made:
    """The prepared layer without a compiler."""
    layer = QuantLinear.from_quantized(quantized).prepare()
    return torch.float32, lambda rows: layer


def bfloat16(quantized: Quantized) -> Made:
    """`torch.nn.functional.linear` with the dequantized weight."""
    weight_OI = dequantize(quantized, torch.bfloat16)
    return torch.bfloat16, lambda rows: lambda x_TI: linear(x_TI, weight_OI)


def dense(quantized: Quantized) -> Made:
    """The same weight and activations by the form that a decode step has for them."""
    layer = DenseLinear(*quantized.codes_OI.shape[::-1], bias=False)
    layer.weight.data = dequantize(quantized, torch.bfloat16)

    def of(rows: int) -> Form:
        of_layer = products.products_of([layer], rows)
        return products.lower(lambda x_TI: product(of_layer, x_TI), [of_layer[0].form])

    return torch.bfloat16, of


def float32(quantized: Quantized) -> Made:
    """`torch.nn.functional.linear` with all in float32."""
    weight_OI = dequantize(quantized, torch.float32)
    return torch.float32, lambda rows: lambda x_TI: linear(x_TI, weight_OI)


def int4pack(quantized: Quantized) -> Made:
    """torch's INT4 kernel for processors, whose weight is (code - 8) * scale + offset."""
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(quantized.codes_OI.int(), 1)
    scales_OG = quantized.scales_OG.float()
    offsets_OG = (8 - quantized.zeros_OG.float()) * scales_OG
    grid_GO2 = torch.stack([scales_OG, offsets_OG], -1).transpose(0, 1).contiguous().bfloat16()
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return torch.bfloat16, lambda rows: lambda x_TI: multiply(x_TI, words, GROUP, grid_GO2)


PEERS = {make.__name__: make for make in (ours, shared, eager, bfloat16, dense, float32, int4pack)}


def medians(calls: dict[str, Callable[[], Any]], seconds: float, clock: Callable[[], int]) -> dict[str, float]:
    """Microseconds of each call, called in turn for about so many seconds and at least 5 times."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(taken[next(iter(calls))]) < 5:
        for name, call in calls.items():
            start = clock()
            call()
            taken[name].append((clock() - start) / 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


def measure(made: dict[str, Made], weight_OI: Tensor, rows: int, seconds: float) -> dict[str, float]:
    """The medians of those that have this number of rows; each result is first compared with the weight's."""
    x_TI = torch.randn(rows, weight_OI.shape[1])
    expected_TO = x_TI @ weight_OI.t()
    calls = {}
    for name, (dtype, of) in made.items():
        form = of(rows)
        if form is not None:
            calls[name] = partial(form, x_TI.to(dtype))
            error = (calls[name]() - expected_TO).abs().max() / expected_TO.abs().max()
            assert error < (1e-5 if dtype == torch.float32 else 0.03), (name, rows, error)
    taken = medians(calls, seconds, time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns)
    return {name: time / (SHARING if name == "shared" else 1) for name, time in taken.items()}


@torch.inference_mode()
def main() -> None:
    """Print a table, row by row, and write all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="outputs x inputs (those of Llama 1B and 8B)")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help=",".join(map(str, ROWS)))
    parser.add_argument(
        "--peers", default=",".join(PEERS), help=f"which of {','.join(PEERS)}; the first is compared with"
    )
    parser.add_argument("--threads", type=int, help="threads (torch's default)")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each line (1)")
    parser.add_argument("--json", type=Path, help="file to write everything to")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch._dynamo.config.recompile_limit = 1000
    names = arguments.peers.split(",")
    lines = []
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, microseconds")
    first, *peers = names
    print("| shape | rows |", *(f"{name} |" for name in names), *(f"{name} / {first} |" for name in peers))
    for shape in arguments.shapes.split(","):
        outputs, inputs = map(int, shape.split("x"))
        quantized = random_quantized(outputs, inputs)
        made, weight_OI = {name: PEERS[name](quantized) for name in names}, dequantize(quantized, torch.float32)
        for rows in map(int, arguments.rows.split(",")):
            taken = measure(made, weight_OI, rows, arguments.seconds)
            lines.append({"shape": shape, "rows": rows, "threads": torch.get_num_threads(), "microseconds": taken})
            times = [f"{taken[name]:.0f} |" if name in taken else "|" for name in names]
            ratios = [f"{taken[name] / taken[first]:.2f} |" if {name, first} <= taken.keys() else "|" for name in peers]
            print(f"| {shape} | {rows} |", *times, *ratios, flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
