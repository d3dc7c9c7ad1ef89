"""How long one linear layer takes on this machine's processor: the calls of `scripts/cpu_product.py`, which has more.

    make bench
    OMP_NUM_THREADS=1 make bench ARGS="-k one_row"

Groups of 128. Weights of 2048x2048 (2 MB packed, in cache) and 4096x4096 (8 MB).
"""

import sys
from pathlib import Path

import pytest
import torch

from miniawq.packing import dequantize

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from cpu_product import bfloat16, eager, int4pack, ours, random_quantized

PEERS = pytest.mark.parametrize("make", [ours, eager, bfloat16, int4pack], ids=lambda make: make.__name__)


@pytest.fixture(scope="module", params=[2048, 4096], ids=["2048x2048", "4096x4096"])
def quantized(request):
    return random_quantized(request.param, request.param)


def time_product(benchmark, make, quantized, rows):
    dtype, of = make(quantized)
    form = of(rows)
    if form is None:
        pytest.skip("a decode step of so many rows runs the eager form")
    x_TI = torch.randn(rows, quantized.codes_OI.shape[1])
    expected_TO = x_TI @ dequantize(quantized, torch.float32).t()
    with torch.inference_mode():
        # Enough to tell a wrong product from one of bfloat16; tests/test_kernel*.py say how exact ours are.
        assert (form(x_TI.to(dtype)) - expected_TO).abs().max() < 0.03 * expected_TO.abs().max()
        benchmark.pedantic(form, (x_TI.to(dtype),), rounds=30, iterations=5, warmup_rounds=3)


@PEERS
def test_one_row(benchmark, make, quantized):
    benchmark.group = f"one row, {len(quantized.codes_OI)} outputs"
    time_product(benchmark, make, quantized, 1)


@PEERS
@pytest.mark.parametrize("rows", [2, 4, 8, 16, 32, 64])
def test_rows(benchmark, make, rows, quantized):
    if len(quantized.codes_OI) > 2048:
        pytest.skip("the sweep takes a minute with one size")
    benchmark.group = f"{rows} rows, {len(quantized.codes_OI)} outputs"
    time_product(benchmark, make, quantized, rows)
