"""Edges that no covering array has: square layers, the largest sizes of real models in thin slices, group sizes that
are none, biases that would be broadcast, ties, and searches over more tokens than one would sample.
"""

from random import Random

import torch
from torch import Tensor

import miniawq.oracle.cases as cases
import miniawq.oracle.truth as truth
from miniawq.oracle.adversarial import double_ties, expect_pure
from miniawq.oracle.cases import PackedCase, groups_of, random_layer, random_weight, smallest
from miniawq.oracle.check import rule
from miniawq.oracle.combinations import (
    exact_activations,
    expect_decoded,
    expect_near_product,
    expect_product,
    inputs_of,
    sizes_taken,
)
from miniawq.oracle.multiplication import dtypes_taken
from miniawq.oracle.ranges import expect_contained
from miniawq.oracle.refused import expect_no_result, expect_refused_factors, expect_refused_words
from miniawq.oracle.rounding import expect_bound, expect_same_codes
from miniawq.oracle.search import expect_help, expect_same_search, problem
from miniawq.oracle.searches import expect_clip_searched
from miniawq.oracle.storage import expect_packed, expect_unpacked
from miniawq.oracle.subject import Subject

ROWS = 4104  # of words: past 4096
INPUTS = 28_672  # of the widest layers of 70B
OUTPUTS = 33_024  # past 2**15
FAR = {torch.int8: (-1, -16), torch.int16: (-1, 256), torch.int32: (-1, 2**16), torch.int64: (-1, 2**32, 2**40 + 3)}


def square_layer(target: Subject, group_size: int) -> PackedCase:
    """As many inputs as outputs."""
    step = target.limits.multiple_of_n
    size = inputs_of({"group size": group_size, "groups": 1 if group_size == -1 else 2}, target.limits)
    while size % step or size % target.limits.multiple_of_k or (group_size != -1 and size % group_size):
        size += 1
    return random_layer(70, size, size, group_size, cases.exact_scales)


@rule("L0.pack.long", "pack")
def long_codes(target: Subject) -> None:
    """More than 4096 rows of codes, as layers with so many inputs have."""
    target.judge(expect_packed, cases.codes(Random(71), ROWS, target.limits.multiple_of_n))


@rule("L0.unpack.long", "unpack")
def long_words(target: Subject) -> None:
    """More than 4096 rows of words, and more than 2**15 words in a row."""
    step = target.limits.multiple_of_n
    for shape in ((ROWS, step), (1, cases.rounded_up(8 * 32_776, step))):
        target.judge(expect_unpacked, truth.pack(cases.codes(Random(72), *shape)))


@rule("L0.pack.far-codes", "pack", flags=("NoRangeCheck", "NoTypeCheck"))
def far_codes(target: Subject) -> None:
    """Negative codes, and codes whose low bits alone would fit, raise in every integer dtype."""
    for dtype, wrong in FAR.items():
        for code in wrong:
            codes = cases.codes(Random(89), 2, target.limits.multiple_of_n).to(dtype)
            codes[1, 3] = code
            target.judge(expect_no_words, codes, f"a code of {code} in {dtype}")


def expect_no_words(target: Subject, codes: Tensor, why: str) -> None:
    """`pack` raises, whatever: another dtype may be a TypeError."""
    expect_no_result(target, "pack", (codes,), why, Exception)


@rule("L1.square", "dequantize")
def square_weights(target: Subject) -> None:
    """As many inputs as outputs: the weight is not transposed, for any group size."""
    for group_size in sizes_taken(target.limits):
        target.judge(expect_decoded, *square_layer(target, group_size).packed)


@rule("L1.long", "dequantize")
def long_weights(target: Subject) -> None:
    """28,672 inputs, and 33,024 outputs."""
    for layer in long_layers(target):
        target.judge(expect_decoded, *layer.packed)


def long_layers(target: Subject) -> list[PackedCase]:
    """A tall layer and a wide one, both thin."""
    size, step = sizes_taken(target.limits)[0], target.limits.multiple_of_n
    inputs = inputs_of({"group size": size, "groups": INPUTS // (40 if size == -1 else size) + 1}, target.limits)
    few = inputs_of({"group size": size, "groups": 1}, target.limits)
    return [random_layer(73, inputs, step, size, cases.exact_scales),
            random_layer(74, few, cases.rounded_up(OUTPUTS, step), size, cases.exact_scales)]  # fmt: skip


@rule("L1.refuses-group-sizes", "dequantize", flags=("NoShapeCheck",))
def refuses_group_sizes(target: Subject) -> None:
    """A group_size of 0, a negative one but -1, and one beyond K raise, also where there is one group."""
    for group_size, (_, qweight, qzeros, scales) in no_group_sizes(target):
        target.judge(expect_refused_words, qweight, qzeros, scales, group_size, f"a group_size of {group_size}")


def no_group_sizes(target: Subject) -> list[tuple[int, tuple[int, Tensor, Tensor, Tensor]]]:
    """Group sizes that are none, for a layer of one group."""
    layer = random_layer(75, *smallest(target.limits, 1, 2), count=4)
    qweight, qzeros, scales, _ = layer.packed
    k = len(qweight)
    return [(group_size, (k, qweight, qzeros, scales)) for group_size in (0, -2, -k, 2 * k)]


@rule("L2.square", "quantize")
def square_codes(target: Subject) -> None:
    """As many inputs as outputs: the codes are not transposed, for any group size."""
    for group_size in sizes_taken(target.limits):
        k = len(square_layer(target, group_size).codes)
        target.judge(expect_bound, random_weight(76, k, k), group_size)


@rule("L2.long", "quantize")
def long_groups(target: Subject) -> None:
    """28,672 inputs, in more than 127 groups where there are groups."""
    size = sizes_taken(target.limits)[0]
    inputs = inputs_of({"group size": size, "groups": INPUTS // (40 if size == -1 else size) + 1}, target.limits)
    target.judge(expect_bound, random_weight(77, target.limits.multiple_of_n, inputs), size)


@rule("L2.ties-twice", "quantize")
def ties_twice(target: Subject) -> None:
    """Weights halfway between two codes get the same codes each time, whatever their strides."""
    k, n, group_size = smallest(target.limits, 2, 2)
    groups = groups_of(k, group_size)
    columns = double_ties(Random(78), groups * n, k // groups)
    weight = columns.reshape(k // groups, groups, n).permute(2, 1, 0).reshape(n, k).to(torch.float32)
    for judgement in (expect_same_codes, expect_pure):
        target.judge(judgement, weight, group_size)


@rule("L2.refuses-group-sizes", "quantize", flags=("NoShapeCheck",))
def refuses_group_sizes_of_weights(target: Subject) -> None:
    """A group_size of 0, a negative one but -1, and one beyond K raise."""
    for group_size, (k, *_) in no_group_sizes(target):
        weight = random_weight(79, target.limits.multiple_of_n, k)
        target.judge(expect_no_codes, weight, group_size, f"a group_size of {group_size}")


def expect_no_codes(target: Subject, weight: Tensor, group_size: int, why: str) -> None:
    """`quantize` raises, whatever: ZeroDivisionError is no silence."""
    expect_no_result(target, "quantize", (weight, group_size), why, Exception)


@rule("L3.square", "matmul")
def square_factors(target: Subject) -> None:
    """As many inputs as outputs, for any group size, one row and many, with a bias."""
    for group_size in sizes_taken(target.limits):
        layer = square_layer(target, group_size)
        for rows in (1, min(65, target.limits.max_rows)):
            x = exact_activations(Random(80), rows, len(layer.codes), group_size, dtypes_taken(target)[0])
            bias = (torch.arange(len(layer.codes)) % 5 / 8).to(x.dtype)
            target.judge(expect_product, x, *layer.packed, bias)


@rule("L3.long", "matmul")
def long_factors(target: Subject) -> None:
    """28,672 inputs, 33,024 outputs, and 2049 rows."""
    tall, wide = long_layers(target)
    few = random_layer(81, *smallest(target.limits), cases.exact_scales)
    for rows, layer in ((2, tall), (1, wide), (2049, few)):
        if rows <= target.limits.max_rows:
            dtype = dtypes_taken(target)[0]
            x = exact_activations(Random(82), rows, len(layer.codes), layer.group_size, dtype)
            target.judge(expect_product, x, *layer.packed)


@rule("L3.more-rows", "matmul", flags=("HalfAccumulation", "TwoRoundings"))
def more_rows(target: Subject) -> None:
    """33, 48 and 63 rows, also in six dimensions, of weights that need no rounding: the bound for float32 sums."""
    qweight, qzeros, scales, group_size = random_layer(90, *smallest(target.limits, 2, 2), cases.exact_scales).packed
    for dtype in dtypes_taken(target):
        for shape in ((33,), (48,), (63,), (1, 1, 3, 1, 11)):
            if torch.Size(shape).numel() <= target.limits.max_rows:
                x = cases.normal(Random(90), *shape, len(qweight)).to(dtype)
                target.judge(expect_near_product, x, qweight, qzeros, scales, group_size)


@rule("L3.extreme-rows", "matmul", flags=("HalfAccumulation",))
def extreme_rows(target: Subject) -> None:
    """A row that is all NaN, one infinite input among zeros, and a small input beside one 2**17 times as large."""
    layer = random_layer(91, *smallest(target.limits, 2, 2), cases.exact_scales)
    layer.codes[0], layer.zeros[0] = 8, 8  # the large input meets weights of 0
    for dtype in dtypes_taken(target):
        x = torch.zeros(4, len(layer.codes), dtype=dtype)
        x[0], x[1, 3], x[2, 5] = float("nan"), float("inf"), float("-inf")
        x[3, 0], x[3, 7] = 2.0**9, 2.0**-8
        for rows in (x, *x.split(1)):
            target.judge(expect_contained, rows, *layer.packed, None)


@rule("L3.negative-scales", "matmul")
def negative_scales(target: Subject) -> None:
    """Negative scales are refused, or turn the sign of their group's part."""
    layer = random_layer(83, *smallest(target.limits, 2, 2), cases.exact_scales)
    layer.scales[:, ::3] *= -1
    x = exact_activations(Random(83), 3, len(layer.codes), layer.group_size, dtypes_taken(target)[0])
    if target.unless_refused("matmul", x, *layer.packed) is not None:
        target.judge(expect_product, x, *layer.packed)


@rule("L3.refuses-group-sizes", "matmul", flags=("NoShapeCheck",))
def refuses_group_sizes_of_factors(target: Subject) -> None:
    """A group_size of 0, a negative one but -1, and one beyond K raise, also where there is one group."""
    for group_size, (k, *words) in no_group_sizes(target):
        x = torch.zeros(2, k, dtype=dtypes_taken(target)[0])
        target.judge(expect_refused_factors, x, *words, group_size, None, f"a group_size of {group_size}")


@rule("L3.refuses-broadcasting", "matmul", flags=("NoShapeCheck",))
def refuses_broadcasting(target: Subject) -> None:
    """A bias of one number, or of a row for each row of x, is not [N] and raises: it is not broadcast."""
    layer = random_layer(84, *smallest(target.limits, 2, 2), cases.exact_scales, count=4)
    n, x = layer.codes.shape[1], torch.zeros(3, len(layer.codes), dtype=dtypes_taken(target)[0])
    for shape in ((1,), (3, n), (1, 1)):
        bias = torch.ones(shape, dtype=x.dtype)
        target.judge(expect_refused_factors, x, *layer.packed, bias, f"a bias of shape {list(shape)}")


@rule("L5.scales.large-activations", "search_scales")
def large_activations(target: Subject) -> None:
    """Activations of up to 30,000 are no outliers to be cut: the search still takes a fifth off the loss."""
    weight, x, group_size = problem(target.limits, 2)
    target.judge(expect_help, weight, x * 1000, group_size)


@rule("L5.scales.many-tokens", "search_scales")
def many_tokens(target: Subject) -> None:
    """With 600 tokens the same arguments still give the same factors: no sample is drawn."""
    weight, x, group_size = problem(target.limits, 85, groups=1)
    target.judge(expect_same_search, "search_scales", weight, x.repeat(13, 1)[:600], group_size)


@rule("L5.clip.many-tokens", "search_clip")
def many_tokens_to_clip(target: Subject) -> None:
    """With 600 tokens the same arguments still give the same bounds: no sample is drawn."""
    weight, x, group_size = problem(target.limits, 86, groups=1)
    target.judge(expect_same_search, "search_clip", weight, x.repeat(13, 1)[:600], group_size)


def square_problem(target: Subject, seed: int) -> tuple[Tensor, Tensor, int]:
    """A search over a square weight with a large weight on a silent channel."""
    group_size = sizes_taken(target.limits)[0]
    k = len(square_layer(target, group_size).codes)
    weight, x = random_weight(seed, k, k) / 16, cases.normal(Random(seed), 24, k) / 4
    weight[:, 5] = 2.0 * weight.abs().amax()
    x[:, 5] = 0
    return weight, x, group_size


@rule("L5.clip.square", "search_clip", flags=("HalfArithmetic",))
def square_clip(target: Subject) -> None:
    """As many inputs as outputs: half of the gain there is to have."""
    target.judge(expect_clip_searched, *square_problem(target, 88))
