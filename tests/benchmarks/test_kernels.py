"""How long one linear layer takes on this machine's processor: peers of `scripts/bench_products.py`, which has more.

    make bench
    OMP_NUM_THREADS=1 make bench ARGS="-k one_row"

Groups of 128. Weights of 2048x2048 (2 MB packed, in cache) and 4096x4096 (8 MB).
"""

import pytest
import torch

from tests.scripts import script

products = script("bench_products")
NAMES = pytest.mark.parametrize("name", ["ours", "eager", "bfloat16", "torch_int4"])


@pytest.fixture(scope="module", params=[2048, 4096], ids=["2048x2048", "4096x4096"])
def case(request):
    return products.Case(request.param, request.param, torch.device("cpu"))


@torch.inference_mode()
def time_product(benchmark, name, case, rows):
    candidate = products.PEERS["cpu"][name](case)(rows)
    if candidate is None:
        pytest.skip("a decode step of so many rows runs the eager form")
    # Enough to tell a wrong product from one of bfloat16; tests/compiled say how exact ours are.
    assert case.error(candidate.call(*candidate.sets[0])) < products.LARGEST_ERROR[candidate.dtype]
    benchmark.pedantic(candidate.call, candidate.sets[0], rounds=30, iterations=5, warmup_rounds=3)


@NAMES
def test_one_row(benchmark, name, case):
    benchmark.group = f"one row, {case.outputs} outputs"
    time_product(benchmark, name, case, 1)


@NAMES
@pytest.mark.parametrize("rows", [2, 4, 8, 16, 32, 64])
def test_rows(benchmark, name, rows, case):
    if case.outputs > 2048:
        pytest.skip("the sweep takes a minute with one size")
    benchmark.group = f"{rows} rows, {case.outputs} outputs"
    time_product(benchmark, name, case, rows)
