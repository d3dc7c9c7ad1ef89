"""Instructions of the GPU forms, counted without a GPU. Needs Triton: `pip install triton==3.6.0` beside torch 2.13.

The limits are what the tiles chosen by `launch.block_sizes` cost. The fastest tile of a shape is not the one with the
fewest instructions (docs/log/gpu-products.md).
"""

import importlib.util
import json
import subprocess
import sys

import pytest

from miniawq.compiled import launch as tiles
from tests.helpers import TESTS

MOST = {
    ("reduce", 4096, 4096, 1): 2.7,
    ("reduce", 28672, 4096, 1): 2.7,
    ("reduce", 4096, 14336, 1): 2.9,
    ("reduce", 8192, 8192, 1): 3.0,
    ("reduce", 8192, 28672, 1): 2.9,
    ("reduce", 28672, 4096, 2): 3.8,
    ("reduce", 4096, 14336, 2): 3.9,
    ("reduce", 8192, 28672, 3): 5.1,
    ("dot", 28672, 4096, 8): 2.4,
    ("dot", 28672, 4096, 16): 2.4,
    ("dot", 4096, 14336, 16): 2.4,
    ("dot", 28672, 4096, 32): 2.6,
    ("dot", 28672, 4096, 64): 3.0,
    ("dot", 4096, 14336, 128): 3.0,
    ("weights", 28672, 4096, 256): 7.3,
    ("weights", 4096, 14336, 256): 7.7,
}
# The last one is nearly the demo model's.
LAYERS = {("layer", 4096, 14336, rows): 8 if rows == 1 else 7 for rows in (1, 5, 16)} | {("layer", 256, 768, 1): 8}
EXPAND = ("expand", 4096, 14336, 0)
CASES = [*MOST, *LAYERS, EXPAND]


@pytest.fixture(scope="module")
def counts():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: the GPU kernels' instructions are not counted")
    program = [sys.executable, TESTS / "helpers" / "inductor_counts.py", json.dumps(CASES)]
    answer = subprocess.run(program, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr[-2000:]
    return dict(zip(CASES, map(json.loads, answer.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("case", MOST, ids=lambda case: "-".join(map(str, case)))
def test_kernels_stay_small(counts, case):
    count = counts[case]
    assert count["per_weight"] <= MOST[case]
    assert count["stack"] == 0, "registers are spilled"
    # The sixteen parts of a sum are all of a row.
    assert count["row_by_row"] == (case[0] == "dot"), "rows of a tile begin in the same bank of shared memory"
    summed_apart = case[0] != "reduce" and tiles.splits_for((case[1] // 8, 8, case[2] // 128, 16), case[3]) > 1
    assert count["kernels"] == 1 + summed_apart


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: "-".join(map(str, layer[1:])))
def test_nothing_is_searched_and_parts_are_summed_where_they_are_read(counts, layer):
    """Three times activations in order and product, and once activations in order for the following layer; of one row,
    whose mean square takes a kernel of its own.
    """
    assert counts[layer] == {"kernels": LAYERS[layer], "searched": 0}


def test_a_weight_is_read_and_written_by_one_kernel(counts):
    """In one dimension, and in the order of memory: words and weights lie in the same order."""
    assert counts[EXPAND] == {"kernels": 1, "dimensions": [1], "in_order": [True]}
