"""Products that one format of a sum, or one rounding of a weight, does not survive, L3.

The bound of `multiplication` allows for a rounding of every weight, which hides a second rounding of a sum. Here the
numbers are built so that nothing has to be allowed for: parts that all but cancel, sums that only their scale brings
into range, and rows that read one weight.
"""

from random import Random

import torch
from torch import Tensor

import miniawq.oracle.cases as cases
from miniawq.oracle.cases import PackedCase, groups_of, random_layer, shape
from miniawq.oracle.check import rule
from miniawq.oracle.combinations import inputs_of, multiplied, seed_of, sizes_taken, unpacked
from miniawq.oracle.contract import Limits
from miniawq.oracle.covering import Factors, Setting
from miniawq.oracle.multiplication import dtypes_taken, product
from miniawq.oracle.ranges import in_every_form
from miniawq.oracle.subject import Subject, expect_equal


@rule("L3.split-sums", "matmul", flags=("HalfAccumulation",))
def split_sums(target: Subject) -> None:
    """4000 numbers of which one half takes off the other: the parts beyond 2048 are exact, however they are dealt out.

    The row of bit b has the sign of bit b of the input, so that halves, quarters, blocks and lanes are of one sign.
    """
    group_size = max(target.limits.group_sizes)
    k, n, _ = shape(group_size, 132 if group_size == -1 else 4224 // group_size, 1, target.limits)
    layer = random_layer(130, k, n, group_size, lambda random, *of: torch.ones(of, dtype=torch.float16))
    layer.zeros.zero_()
    bits = torch.arange(k) >> torch.arange((k - 1).bit_length())[:, None] & 1
    for dtype in dtypes_taken(target):
        in_every_form(target, (1 - 2 * bits).to(dtype), *layer.packed)


@rule("L3.sums-before-scales", "matmul", flags=("HalfAccumulation",))
def sums_before_scales(target: Subject) -> None:
    """Steps times activations add up to more than 65504, which the scale brings back: it is applied before rounding."""
    for group_size in sizes_taken(target.limits):
        k, n = inputs_of({"group size": group_size, "groups": 2}, target.limits), target.limits.multiple_of_n
        scales = torch.full((groups_of(k, group_size), n), 2.0**-12, dtype=torch.float16)
        zeros = torch.zeros(scales.shape, dtype=torch.uint8)
        layer = PackedCase(cases.codes(Random(131), k, n) | 8, zeros, scales, group_size)
        for dtype in dtypes_taken(target):
            signs = torch.tensor([1024.0, -1024.0], dtype=dtype)[:, None]
            in_every_form(target, signs.expand(2, k).contiguous(), *layer.packed)


def single_weights(limits: Limits) -> Factors:
    """Numbers of rows that each read one weight."""
    rows = tuple(rows for rows in (1, 2, 8, 17, 65, 129) if rows <= limits.max_rows)
    return {"rows": rows, "dtype": limits.dtypes, "group size": sizes_taken(limits), "words": (2, 17)}


@rule("L3.single-weights", "matmul", flags=("TwoRoundings",), over=single_weights)
def rows_of_one_weight(target: Subject, setting: Setting) -> None:
    """A row with one input gives the weight of `dequantize` or the exact one, rounded once to the dtype of x."""
    size, random, rows = setting["group size"], seed_of(setting), setting["rows"]
    k, n = inputs_of(setting | {"groups": 3}, target.limits), setting["words"] * target.limits.multiple_of_n
    layer = random_layer(random.randrange(1 << 16), k, n, size)
    x = torch.zeros(rows, k, dtype=getattr(torch, setting["dtype"]))
    for row in x:
        row[random.randrange(k)] = random.choice((1.0, -1.0, 4.0, 0.5))
    target.judge(expect_one_weight, x, *layer.packed)


def expect_one_weight(
    target: Subject, x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int
) -> None:
    """One of the two roundings that the contract allows."""
    words = (qweight, qzeros, scales, group_size)
    got, layer = multiplied(target, x, words, None), unpacked(*words)
    once = product(x, layer).to(x.dtype)
    twice = (x.to(torch.float64) @ layer.weight.to(torch.float16).to(torch.float64)).to(x.dtype)
    expect_equal(torch.where(got == twice, once, got), once, "y")
