"""L1, dequantization: (code - zero) * scale with one rounding to float16.

Why bit equality is fair: the exact product has 4 + 11 significant bits, so float16, float32 and float64 arithmetic all
give the same float16 after one rounding. No tolerance is needed, and none is given. The sign of a zero is not compared.
"""

from collections.abc import Iterator
from random import Random

import torch
from torch import Tensor

import miniawq.oracle.cases as cases
import miniawq.oracle.truth as truth
from miniawq.oracle.cases import PackedCase, groups_of, shape, smallest
from miniawq.oracle.check import rule
from miniawq.oracle.refused import expect_refused_words
from miniawq.oracle.subject import Broken, Subject, expect_equal


def dequantize(target: Subject, layer: PackedCase) -> Tensor:
    """The target's weight, of the right dtype and shape."""
    return target.tensor("dequantize", layer.packed, torch.float16, tuple(layer.codes.shape))


def expect_exact_weight(target: Subject, layer: PackedCase) -> None:
    """The target's weight has the bits of the definition."""
    expect_equal(dequantize(target, layer), truth.dequantize(*layer.packed), "weight")


def counting_codes(k: int, n: int) -> Tensor:
    """Row k holds code k % 16 in every column."""
    return (torch.arange(k) % 16).to(torch.uint8)[:, None].expand(k, n).contiguous()


@rule("L1.shape-and-dtype", "dequantize")
def shape_and_dtype_of_weight(target: Subject) -> None:
    """The weight is float16 [K, N]: input features first, as the files have it."""
    dequantize(target, cases.random_layer(1, *smallest(target.limits, groups=2, columns=3)))


@rule("L1.all-pairs", "dequantize")
def all_pairs(target: Subject) -> None:
    """All 16 codes against all 16 zeros: no offset on the zeros, no lost sign, no lost code."""
    k, n, group_size = smallest(target.limits, columns=2 if target.limits.multiple_of_n == 8 else 1)
    groups = groups_of(k, group_size)
    for first_zero in range(0, 16, n):
        zeros = ((torch.arange(n) + first_zero) % 16).to(torch.uint8).expand(groups, n).contiguous()
        scales = torch.ones(groups, n, dtype=torch.float16)
        target.judge(expect_exact_weight, PackedCase(counting_codes(k, n), zeros, scales, group_size))


@rule("L1.all-scales", "dequantize", flags=("TwoRoundings", "FlushedSubnormals"))
def all_scales(target: Subject) -> None:
    """Every positive float16 as a scale, subnormals included, against codes 0..15: one rounding, ties to even."""
    k, _, group_size = smallest(target.limits)
    groups = groups_of(k, group_size)
    for scales in every_scale(target):
        n = len(scales)
        zeros = cases.codes(Random(3), groups, n)
        target.judge(expect_exact_weight, PackedCase(counting_codes(k, n), zeros, scales.repeat(groups, 1), group_size))


def every_scale(target: Subject) -> Iterator[Tensor]:
    """All positive float16 numbers, about a thousand in a layer, so that the one that fails is soon found."""
    multiple = target.limits.multiple_of_n
    n = cases.rounded_up(1024, multiple)
    for first in range(0, cases.LARGEST_HALF_BITS, n):
        yield ((torch.arange(n) + first) % cases.LARGEST_HALF_BITS + 1).to(torch.int16).view(torch.float16)


@rule("L1.subnormals", "dequantize", flags=("FlushedSubnormals",))
def subnormals(target: Subject) -> None:
    """Scales and weights below 2**-14 keep their value."""
    k, n, group_size = smallest(target.limits)
    groups = groups_of(k, group_size)
    for bits in (1, 2, 3, 0x200, 0x3FF, 0x400):
        scales = torch.full((groups, n), bits, dtype=torch.int16).view(torch.float16)
        zeros = torch.full((groups, n), 3, dtype=torch.uint8)
        target.judge(expect_exact_weight, PackedCase(counting_codes(k, n), zeros, scales, group_size))


@rule("L1.overflow", "dequantize")
def overflow(target: Subject) -> None:
    """A product above 65504 is infinite in float16, neither saturated nor NaN."""
    k, n, group_size = smallest(target.limits)
    groups = groups_of(k, group_size)
    scales = torch.full((groups, n), 60000.0, dtype=torch.float16)
    target.judge(
        expect_exact_weight,
        PackedCase(counting_codes(k, n), torch.ones(groups, n, dtype=torch.uint8), scales, group_size),
    )


@rule("L1.group-boundaries", "dequantize")
def group_boundaries(target: Subject) -> None:
    """Each group decodes with its own scale and zero, the rows on both sides of a boundary included.

    The scales of one group are also told apart by column, so tiled, transposed, shifted and first-only ones differ.
    """
    for group_size in target.limits.group_sizes:
        k, n, _ = shape(group_size, 4, 2, target.limits)
        groups = groups_of(k, group_size)
        scales = torch.arange(1, groups * n + 1).reshape(groups, n).to(torch.float16)
        zeros = (torch.arange(groups)[:, None] + torch.arange(n)).to(torch.uint8) % 15
        target.judge(
            expect_exact_weight, PackedCase(torch.full((k, n), 15, dtype=torch.uint8), zeros, scales, group_size)
        )


@rule("L1.one-group", "dequantize")
def one_group_of_words(target: Subject) -> None:
    """A group_size of -1 is one group of all K inputs."""
    target.must_take(-1)
    target.judge(expect_exact_weight, cases.random_layer(4, *shape(-1, 6, 2, target.limits)))


@rule("L1.every-column", "dequantize")
def every_column(target: Subject) -> None:
    """Words, zeros and scales of each column meet: a layer with N of 8, 24 and 136, columns all different."""
    k, n, group_size = smallest(target.limits, groups=2)
    for columns in (1, 3, 17):
        target.judge(expect_exact_weight, cases.random_layer(columns, k, n * columns, group_size))


@rule("L1.random", "dequantize", flags=("TwoRoundings",), layer=cases.layers(cases.usual_scales))
def random_case(target: Subject, layer: PackedCase) -> None:
    """Any layer with scales as real checkpoints hold them."""
    target.judge(expect_exact_weight, layer)


@rule("L1.random-scales", "dequantize", flags=("TwoRoundings", "FlushedSubnormals"),
       layer=cases.layers(cases.half_scales))  # fmt: skip
def random_scales(target: Subject, layer: PackedCase) -> None:
    """Any layer with scales from the whole range of float16."""
    target.judge(expect_exact_weight, layer)


@rule("L1.strides", "dequantize")
def strides_of_words(target: Subject) -> None:
    """Transposed and sliced arguments give what their contiguous copies give."""
    layer = cases.random_layer(5, *smallest(target.limits, groups=2, columns=2))
    qweight, qzeros, scales, group_size = layer.packed
    expected = truth.dequantize(*layer.packed)
    for view in (lambda t: t.t().contiguous().t(), lambda t: torch.stack([t, t], dim=-1)[..., 1]):
        got = target.tensor("dequantize", (view(qweight), view(qzeros), view(scales), group_size),
                            torch.float16, tuple(expected.shape))  # fmt: skip
        expect_equal(got, expected, "weight")


@rule("L1.inputs-unchanged", "dequantize")
def words_and_scales_unchanged(target: Subject) -> None:
    """No argument is written into."""
    arguments = cases.random_layer(6, *smallest(target.limits, groups=2)).packed
    before = [a.clone() for a in arguments[:3]]
    target.call("dequantize", *arguments)
    for name, old, new in zip(("qweight", "qzeros", "scales"), before, arguments[:3], strict=True):
        if not torch.equal(old, new):
            raise Broken("the arguments as they were", f"{name} changed")


@rule("L1.refuses-wrong-shapes", "dequantize", flags=("NoShapeCheck",))
def refuses_wrong_shapes(target: Subject) -> None:
    """Too few or too many groups of zeros or scales, or columns that do not match, raise."""
    layer = cases.random_layer(7, *smallest(target.limits, groups=2, columns=2), count=2)
    qweight, qzeros, scales, group_size = layer.packed
    for why, arguments in {
        "one group of scales missing": (qweight, qzeros, scales[:-1], group_size),
        "one group of zeros missing": (qweight, qzeros[:-1], scales, group_size),
        "one group of zeros and scales missing": (qweight, qzeros[:-1], scales[:-1], group_size),
        "a group too many": (qweight, torch.cat([qzeros, qzeros]), torch.cat([scales, scales]), group_size),
        "columns of scales missing": (qweight, qzeros, scales[:, :8], group_size),
        "columns of zeros missing": (qweight, qzeros[:, :1], scales, group_size),
    }.items():
        target.judge(expect_refused_words, *arguments, why)
