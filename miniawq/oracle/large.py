"""Rules of small arguments, asked of large ones: refusals far inside, each scale at every size, and products of sizes
and results that meet nowhere else.

A check of arguments may look at the first rows alone, a kernel may be another one for eight rows and many outputs, or
for thousands of rows and several groups, and a result may pass through float16 only where it is the sum of parts.
"""

from random import Random

import torch
from torch import Tensor

import miniawq.oracle.cases as cases
from miniawq.oracle.cases import random_layer, random_weight, rounded_up, smallest
from miniawq.oracle.check import rule
from miniawq.oracle.combinations import (
    MOST,
    bias_of,
    exact_activations,
    expect_product,
    inputs_of,
    outputs,
    product_of,
    sizes_taken,
    weights_in,
)
from miniawq.oracle.contract import Limits
from miniawq.oracle.covering import Factors, Setting
from miniawq.oracle.multiplication import dtypes_taken
from miniawq.oracle.paths import far_layers, tall_codes
from miniawq.oracle.ranges import place
from miniawq.oracle.refusals import wide_range
from miniawq.oracle.refused import expect_refused_codes, expect_refused_factors, expect_refused_weight
from miniawq.oracle.rounding import expect_step
from miniawq.oracle.search import problem
from miniawq.oracle.searches import expect_searched
from miniawq.oracle.sizes import expect_product_whole, layers_of_sizes
from miniawq.oracle.subject import Subject

LATE = (0.06, 0.55, 1.0)  # shares of the way through a tensor
FEW_ROWS = range(2, 18)
WIDE = 16_392  # past 2**14
MANY_ROWS = (1100, 2500, 4200, 8300)


@rule("L0.pack.refuses-late-codes", "pack", flags=("NoRangeCheck",))
def refuses_late_codes(target: Subject) -> None:
    """A code above 15 among more than 2**16 rows or words is a ValueError, in each column of a word."""
    for codes in tall_codes(target):
        for column in range(8):
            late = codes.clone()
            late.view(-1)[place(LATE[column % 3], codes.numel() // 8 - 1) * 8 + column] = 16 + column
            target.judge(expect_refused_codes, late, f"a code of {16 + column} in column {column} of a word")


@rule("L2.refuses-late-nan", "quantize", flags=("NoRangeCheck",))
def refuses_late_nan(target: Subject) -> None:
    """NaN or infinity in a weight of more than 2**16 outputs or inputs is a ValueError."""
    for layer in far_layers(target):
        k, n = layer.codes.shape
        weight = random_weight(180, n, k)
        for share, value in zip(LATE, (float("inf"), float("-inf"), float("nan")), strict=True):
            broken = weight.clone()
            broken.view(-1)[place(share, weight.numel())] = value
            target.judge(expect_refused_weight, broken, layer.group_size, f"a weight that is {value}")


@rule("L2.step-of-every-size", "quantize", flags=("HalfArithmetic",))
def every_step(target: Subject) -> None:
    """Every number of outputs up to 36 words, and of groups up to 18, has the scale of each group's own range."""
    for layer in layers_of_sizes(target):
        k, n = layer.codes.shape
        target.judge(expect_step, random_weight(k + n, n, k), layer.group_size)


def just_too_large(limits: Limits) -> Factors:
    """Ranges whose scale is nearest to 65504, and above it."""
    return {
        "range": (15 * 65519.0, 15 * 65510.0, 15 * 65505.0),
        "lowest": (0.0, -0.5, -1.0),
        "group": (0, 2),
        "output": (0.0, 1.0),
        "group size": sizes_taken(limits),
    }


@rule("L2.refuses-scales-to-nearest", "quantize", flags=("NoRangeCheck", "ScaleToNearest"), over=just_too_large)
def refuses_scales_to_nearest(target: Subject, setting: Setting) -> None:
    """A group whose range is above 15 times 65504, if by ever so little, is a ValueError: scales are rounded up."""
    weight, group_size = wide_range(setting, setting["range"], target.limits)
    target.judge(expect_refused_weight, weight, group_size, f"a scale of {setting['range'] / 15:.6g}")


@rule("L3.few-rows-of-wide-layers", "matmul")
def few_rows_of_wide_layers(target: Subject) -> None:
    """Every small number of rows with more than 2**14 outputs, and with more than 2**14 inputs, with a bias."""
    size, step, dtypes = sizes_taken(target.limits)[0], target.limits.multiple_of_n, dtypes_taken(target)
    many = WIDE // (40 if size == -1 else size) + 1
    for groups, n in ((1, rounded_up(WIDE, step)), (many, step)):
        k = inputs_of({"group size": size, "groups": groups}, target.limits)
        layer = random_layer(181, k, n, size, cases.exact_scales)
        for i, rows in enumerate(rows for rows in FEW_ROWS if rows <= target.limits.max_rows):
            x = exact_activations(Random(182), rows, k, size, dtypes[i % len(dtypes)])
            target.judge(expect_product_whole, x, *layer.packed, bias_of("contiguous", n, x.dtype))


@rule("L3.many-rows-of-groups", "matmul")
def many_rows_of_groups(target: Subject) -> None:
    """1100 to 8300 rows with three groups and five, a bias and none: the last group is no other one."""
    sizes, dtypes = sizes_taken(target.limits), dtypes_taken(target)
    for i, rows in enumerate(rows for rows in MANY_ROWS if rows <= target.limits.max_rows):
        size, n = sizes[i % len(sizes)], 2 * target.limits.multiple_of_n
        k = inputs_of({"group size": size, "groups": (3, 5)[i % 2]}, target.limits)
        layer = random_layer(183 + i, k, n, size, cases.exact_scales)
        some = exact_activations(Random(184), 61, k, size, dtypes[i % len(dtypes)])
        bias = bias_of(("contiguous", "none")[i // 2], n, some.dtype)
        target.judge(expect_product, some.repeat(-(-rows // 61), 1)[:rows], *layer.packed, bias)


def scaled_products(limits: Limits) -> Factors:
    """Products whose results float16 has not, of every size class."""
    return {
        "times": (2.0**20, 2.0**-30),
        "dtype": tuple(dtype for dtype in limits.dtypes if dtype != "float16"),
        "rows": tuple(rows for rows in (1, 2, 5, 17, 65, 129, 1000) if rows <= limits.max_rows),
        "groups": (1, 3, 9, 33, 160),
        "outputs": outputs(limits)[:5],
        "group size": sizes_taken(limits),
        "bias": ("none", "contiguous"),
    }


def few_scaled_products(setting: Setting) -> bool:
    return weights_in(setting) * setting["rows"] <= MOST


@rule("L3.combinations-beyond-float16", "matmul", over=scaled_products, allowed=few_scaled_products)
def combinations_beyond_float16(target: Subject, setting: Setting) -> None:
    """Products of every size class with bfloat16 and float32 results that float16 has not: above 65504, below 2**-24.

    Activations and bias are multiplied by a power of two, so that sums stay exact.
    """
    whole = {"form": "[T, K]", "x": "contiguous", "layout of qweight": "contiguous", "layout of scales": "contiguous"}
    x, *words, bias = product_of(setting | whole, target.limits, dense=False)
    times = setting["times"]
    target.judge(expect_product, x * times, *words, None if bias is None else bias * times)


@rule("L3.refuses-other-biases", "matmul", flags=("NoShapeCheck",))
def refuses_other_biases(target: Subject) -> None:
    """A bias without a dimension, or with one of 1 before or after its outputs, is not [N] and raises."""
    layer = random_layer(185, *smallest(target.limits, 2, 2), cases.exact_scales, count=4)
    k, n = layer.codes.shape
    for shape in ((k,), (1, k), (n, k), (2, 3, k)):
        x = torch.zeros(shape, dtype=dtypes_taken(target)[0])
        if x[..., 0].numel() <= target.limits.max_rows:
            for other in ((), (1, n), (n, 1), (1, 1, n)):
                bias = torch.ones(other, dtype=x.dtype)
                target.judge(expect_refused_factors, x, *layer.packed, bias, f"a bias of shape {list(other)}")


def loud_beyond_float16(limits: Limits, seed: int) -> tuple[Tensor, Tensor, int]:
    """Channels from 10**3 to 10**9, in any order, whose large weights stand on the loudest."""
    weight, x, group_size = problem(limits, seed, groups=1, outliers=0)
    random, k = Random(seed), x.shape[1]
    loudness = random.sample(torch.logspace(3, 9, k).tolist(), k)
    for channel in torch.tensor(loudness).argsort(descending=True)[:3]:
        weight[:, channel] *= 6
    return weight, x * torch.tensor(loudness), group_size


@rule("L5.scales.beyond-float16", "search_scales", flags=("HalfArithmetic",))
def activations_beyond_float16(target: Subject) -> None:
    """Channels of which one half is beyond 65504, by ever more, are searched like any other."""
    for seed in (190, 194, 195):
        weight, x, group_size = loud_beyond_float16(target.limits, seed)
        for dtype in (torch.float32, torch.bfloat16):
            target.judge(expect_searched, weight, x.to(dtype), group_size)
