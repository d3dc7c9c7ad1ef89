"""How long one linear layer takes on this machine's processor: ours, bfloat16 and torch's own INT4 kernel.

    make bench
    OMP_NUM_THREADS=1 make bench ARGS="-k one_row"

Groups of 128. Weights of 2048x2048 (2 MB packed, in cache) and 4096x4096 (8 MB).
"""

import pytest
import torch

from miniawq import products
from miniawq.kernel import QuantLinear
from miniawq.packing import dequantize, quantize

GROUP = 128
ROWS = (1, 2, 4, 8, 16, 32, 64)


@pytest.fixture(scope="module", params=[2048, 4096], ids=["2048x2048", "4096x4096"])
def quantized(request):
    torch.manual_seed(0)
    return quantize(torch.randn(request.param, request.param), GROUP)


def compiled(quantized, rows):
    """`reduce_words` as a decode step has it."""
    (product,) = products.products_of([QuantLinear.from_quantized(quantized)], 1)
    function = products.lower(lambda x_TI: products.multiply([product], x_TI), is_int4=True)
    return function, torch.float32


def eager(quantized, rows):
    """The prepared layer as a module, without a compiler."""
    return QuantLinear.from_quantized(quantized).prepare(), torch.float32


def bfloat16(quantized, rows):
    """`torch.nn.functional.linear` with the dequantized weight."""
    weight_OI = dequantize(quantized, torch.bfloat16)
    return lambda x_TI: torch.nn.functional.linear(x_TI, weight_OI), torch.bfloat16


def int4pack(quantized, rows):
    """torch's INT4 kernel for processors, whose weight is (code - 8) * scale + zero."""
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(quantized.codes_OI.int(), 1)
    scales_OG = quantized.scales_OG.float()
    offsets_OG = (8 - quantized.zeros_OG.float()) * scales_OG
    grid_GO2 = torch.stack([scales_OG, offsets_OG], -1).transpose(0, 1).contiguous().bfloat16()
    return lambda x_TI: torch.ops.aten._weight_int4pack_mm_for_cpu(x_TI, words, GROUP, grid_GO2), torch.bfloat16


def time_product(benchmark, make, quantized, rows):
    function, dtype = make(quantized, rows)
    x_TI = torch.randn(rows, quantized.codes_OI.shape[1])
    exact_TO = x_TI.double() @ dequantize(quantized, torch.float64).t()
    with torch.inference_mode():
        y_TO = function(x_TI.to(dtype))
        # Enough to tell a wrong product from one of bfloat16; tests/test_kernel*.py say how exact ours are.
        assert (y_TO - exact_TO).abs().max() < 0.03 * exact_TO.abs().max()
        benchmark.pedantic(function, (x_TI.to(dtype),), rounds=30, iterations=5, warmup_rounds=3)


@pytest.mark.parametrize("make", [compiled, eager, bfloat16, int4pack], ids=lambda make: make.__name__)
def test_one_row(benchmark, make, quantized):
    benchmark.group = f"one row, {quantized.codes_OI.shape[0]} outputs"
    time_product(benchmark, make, quantized, 1)


@pytest.mark.parametrize("make", [compiled, eager, bfloat16, int4pack], ids=lambda make: make.__name__)
@pytest.mark.parametrize("rows", ROWS[1:])
def test_rows(benchmark, make, rows, quantized):
    if len(quantized.codes_OI) > 2048:
        pytest.skip("the sweep takes a minute with one size")
    if make is compiled and rows > products.MOST_ROWS_ON_CPU:
        pytest.skip("a decode step of so many rows runs the eager form")
    benchmark.group = f"{rows} rows, {quantized.codes_OI.shape[0]} outputs"
    time_product(benchmark, make, quantized, rows)
