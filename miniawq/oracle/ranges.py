"""The ends of the number formats, L1 and L3: ties, subnormal numbers, overflow, infinity, NaN, and values of float32.

Everything here is compared bit for bit. The products are built so that the sum is exact in float32 in any order, also
where the zero is taken out of it, and only the one rounding of the result is left: to nearest, ties to even.
"""

from random import Random

import torch
from torch import Tensor

import miniawq.oracle.cases as cases
import miniawq.oracle.truth as truth
from miniawq.oracle.cases import PackedCase, groups_of, shape, smallest
from miniawq.oracle.check import rule
from miniawq.oracle.combinations import (
    FORMS,
    exact_activations,
    expect_decoded,
    expect_product,
    few_weights,
    layers_over,
    multiplied,
    seed_of,
    unpacked,
    words_of_setting,
)
from miniawq.oracle.contract import Limits
from miniawq.oracle.covering import Factors, Setting
from miniawq.oracle.dequantization import counting_codes, every_scale
from miniawq.oracle.multiplication import dtypes_taken, product
from miniawq.oracle.subject import Lacking, Subject, expect_equal

NAN, INFINITY = float("nan"), float("inf")


def layer_with(target: Subject, scale: float, seed: int, groups: int = 2, columns: int = 3) -> PackedCase:
    """Random codes and zeros under one scale."""
    k, n, group_size = smallest(target.limits, groups, columns)
    scales = torch.full((groups_of(k, group_size), n), scale, dtype=torch.float16)
    return PackedCase(cases.codes(Random(seed), k, n), cases.codes(Random(seed + 1), *scales.shape), scales, group_size)


@rule("L1.every-product", "dequantize", flags=("TwoRoundings", "FlushedSubnormals"))
def every_product(target: Subject) -> None:
    """All 31743 positive scales times all 31 differences of code and zero: one rounding, ties to even."""
    k, _, group_size = smallest(target.limits)
    for scales in every_scale(target):
        for zero in (0, 15):
            zeros = torch.full((groups_of(k, group_size), len(scales)), zero, dtype=torch.uint8)
            layer = PackedCase(counting_codes(k, len(scales)), zeros, scales.expand(zeros.shape), group_size)
            target.judge(expect_decoded, *layer.packed)


@rule("L1.special-scales", "dequantize", over=layers_over(("special",)), allowed=few_weights)
def special_scales_of_layers(target: Subject, setting: Setting) -> None:
    """Scales that are negative, 0, infinite or NaN are refused, or give what they give, in their own group and column.

    Code equal to zero times infinity is NaN.
    """
    target.judge(expect_refused_or_decoded, *words_of_setting(setting, target.limits))


def expect_refused_or_decoded(
    target: Subject, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int
) -> None:
    """Any exception, or the weight of the definition."""
    got = target.unless_refused("dequantize", qweight, qzeros, scales, group_size)
    if got is not None:
        expected = truth.real_weight(truth.unpack(qweight), truth.unpack(qzeros), scales, group_size)
        expect_equal(got.to(torch.float64), expected.to(got.dtype).to(torch.float64), "weight")


def integers(random: Random, largest: int, *shape: int) -> Tensor:
    """Whole numbers from -largest to largest."""
    values = [random.randint(-largest, largest) for _ in range(torch.Size(shape).numel())]
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


def in_every_form(target: Subject, x: Tensor, *rest: Tensor | int) -> None:
    """Hold the target to the product of these rows, of each alone, as three dimensions, and of more than 64."""
    many = x.repeat(66 // len(x) + 1, 1)[: target.limits.max_rows]
    for form in (x, x[-1], x[None], many, *x.split(1)):
        target.judge(expect_product, form, *rest)


@rule("L3.result-rounding", "matmul", flags=("HalfAccumulation", "TwoRoundings"))
def result_rounding(target: Subject) -> None:
    """Whole numbers past what the dtype holds: product and bias are added first and rounded once, ties to even."""
    layer = layer_with(target, 1.0, 30, columns=8)
    k, n = layer.codes.shape
    for dtype in dtypes_taken(target):
        x = torch.zeros(6, k, dtype=dtype)
        for row, largest in zip(x, (1, 3, 15, 63, 127, 127), strict=True):
            places = Random(largest).sample(range(k), 6)
            row[places] = integers(Random(largest + 1), largest, 6).to(dtype)
        in_every_form(target, x, *layer.packed)
        bias = integers(Random(255), 255, n).to(dtype)
        in_every_form(target, x, *layer.packed, integers(Random(1), 1, n).to(dtype))
        in_every_form(target, x, *layer.packed, bias)


@rule("L3.long-exact-sums", "matmul", flags=("HalfAccumulation",))
def long_exact_sums(target: Subject) -> None:
    """Whole numbers summed over 4000 inputs: partial sums beyond 2048 are kept exactly, in every part and split."""
    group_size = max(target.limits.group_sizes)
    k, n, _ = shape(group_size, 132 if group_size == -1 else 4224 // group_size, 2, target.limits)
    layer = cases.random_layer(37, k, n, group_size, lambda random, *of: torch.ones(of, dtype=torch.float16))
    for dtype in dtypes_taken(target):
        signs = cases.codes(Random(37), 3, k) % 2
        in_every_form(target, (signs * 2.0 - 1).to(dtype), *layer.packed)


def single_values(values: list[float], k: int, dtype: torch.dtype) -> Tensor:
    """One row for each value, with that value at one place."""
    x = torch.zeros(len(values), k, dtype=dtype)
    for row, value in enumerate(values):
        x[row, (7 * row + 3) % k] = value
    return x


EXPONENTS = {"float16": (-14, -10, 6, 15), "bfloat16": (-100, -40, -20, 17, 40, 100), "float32": (-100, -40, 17, 100)}


@rule("L3.ranges", "matmul", flags=("HalfAccumulation",))
def ranges(target: Subject) -> None:
    """Activations and biases from one end of their dtype to the other: nothing passes through a narrower format."""
    layer = layer_with(target, 2.0**-6, 31)
    k, n = layer.codes.shape
    for dtype in dtypes_taken(target):
        exponents = EXPONENTS[str(dtype).removeprefix("torch.")]
        for exponent in exponents:  # each alone: a kernel may choose its format by the largest number
            in_every_form(target, single_values([1.5 * 2.0**exponent, -(2.0**exponent)], k, dtype), *layer.packed)
        values = [sign * 1.5 * 2.0**exponent for exponent in exponents for sign in (1, -1)]
        bias = torch.tensor(values, dtype=dtype).repeat(n)[:n]
        for nothing in (0.0, -0.0):
            in_every_form(target, torch.full((2, k), nothing, dtype=dtype), *layer.packed, bias)


@rule("L3.float32-bits", "matmul", flags=("TensorFloat32",))
def float32_bits(target: Subject) -> None:
    """A float32 x and bias keep their 24 bits: nothing is rounded to 16 bits or to TF32 on the way."""
    if torch.float32 not in dtypes_taken(target):
        raise Lacking("the target does not take float32")
    k, n, group_size = smallest(target.limits, 2, 2)
    zeros = torch.zeros(groups_of(k, group_size), n, dtype=torch.uint8)
    codes = torch.tensor([1, 2, 4, 8], dtype=torch.uint8).repeat(k * n)[: k * n].reshape(k, n)
    layer = PackedCase(codes, zeros, torch.ones(zeros.shape, dtype=torch.float16), group_size)
    values = [1 + 2.0**-23, 1 + 2.0**-12, 2.0**23 + 1, -(2.0**12) - 1, 1 / 3]
    in_every_form(target, single_values(values, k, torch.float32), *layer.packed)
    bias = torch.tensor(values, dtype=torch.float32).repeat(n)[:n]
    in_every_form(target, torch.zeros(1, k), *layer.packed, bias)


@rule("L3.subnormals", "matmul", flags=("FlushedSubnormals", "HalfAccumulation"))
def subnormal_factors(target: Subject) -> None:
    """Subnormal activations, scales and results keep their value in a product."""
    step = 2.0**-24
    for dtype in dtypes_taken(target):
        for scale, values in (
            (1.0, [step, -3 * step, 1023 * step, -1023 * step]),
            (step, [1.0, -1.0, 1024.0, 0.5]),
            (3 * step, [1.0, -1.0, 2.0**14, 0.5]),
            (17 * step, [1.0, -64.0]),
        ):
            layer = layer_with(target, scale, 32)
            x = single_values(values, layer.codes.shape[0], dtype)
            in_every_form(target, x, *layer.packed)


@rule("L3.overflow", "matmul", flags=("HalfAccumulation",))
def overflowing_results(target: Subject) -> None:
    """A float16 result from 65520 on is infinite, below it is the largest number: neither saturated nor too early."""
    if torch.float16 not in dtypes_taken(target):
        raise Lacking("the target does not take float16")
    layer = layer_with(target, 1.0, 33)
    k, n = layer.codes.shape
    layer.zeros[:], layer.codes[:] = 8, (8 + torch.where(torch.arange(n) % 2 == 0, 1, -1)).to(torch.uint8)
    x = torch.zeros(5, k, dtype=torch.float16)
    pieces = torch.tensor([32768.0, 16384.0, 8192.0, 4096.0, 2048.0, 1024.0], dtype=torch.float16)
    for row, rest in zip(x, (992.0, 1007.0, 1008.0, 2048.0, 65504.0), strict=True):
        row[1:7], row[-1] = pieces, rest
    in_every_form(target, x, *layer.packed)


def special_values(limits: Limits) -> Factors:
    """Where a value that is not finite stands."""
    return {
        "value": (NAN, INFINITY, -INFINITY, "another NaN", "a negative NaN"),
        "rows": tuple(rows for rows in (4, 1, 65, 129) if rows <= limits.max_rows) or (1,),
        "row": (0.0, 0.5, 1.0),
        "input": (0.0, 0.5, 1.0, 0.77),
        "form": tuple(FORMS),
        "dtype": limits.dtypes,
        "bias": (False, True),
    }


def one_row_alone(setting: Setting) -> bool:
    return setting["form"] != "[K]" or setting["rows"] == 1


def place(share: float, size: int) -> int:
    """The index at a share of a size."""
    return min(size - 1, int(share * size))


@rule("L3.special-inputs", "matmul", over=special_values, allowed=one_row_alone)
def special_inputs(target: Subject, setting: Setting) -> None:
    """NaN and infinity anywhere in x make every output of their row not finite, and change no other row.

    NaN gives NaN; infinity gives infinity of the product's sign, or NaN where the zero is taken out of the sum.
    """
    layer = cases.random_layer(34, *smallest(target.limits, 3, 2), cases.exact_scales)
    k, n = layer.codes.shape
    rows, dtype = setting["rows"], getattr(torch, setting["dtype"])
    x = exact_activations(seed_of(setting), rows, k, layer.group_size, dtype)
    row, column = place(setting["row"], rows), place(setting["input"], k)
    x[row, column] = cases.special(setting["value"], dtype)
    bias = (torch.arange(n) % 5 / 8).to(dtype) if setting["bias"] else None
    target.judge(expect_contained, x.reshape(FORMS[setting["form"]](rows, k)), *layer.packed, bias)


def expect_contained(target: Subject, x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int,
                     bias: Tensor | None) -> None:  # fmt: skip
    """Rows of finite inputs as they should be, and no finite output in the others."""
    words = (qweight, qzeros, scales, group_size)
    n = scales.shape[1]
    got = multiplied(target, x, words, bias).reshape(-1, n)
    expected = product(x, unpacked(*words), bias).to(x.dtype).reshape(-1, n)
    flat = x.reshape(len(got), -1)
    may_be_nan = flat.isinf().any(1, keepdim=True) & got.isnan()
    expect_equal(torch.where(may_be_nan, 0, got), torch.where(may_be_nan, 0, expected), "y")


@rule("L3.special-biases", "matmul")
def special_biases(target: Subject) -> None:
    """NaN and infinity in the bias stay in their column."""
    layer = cases.random_layer(35, *smallest(target.limits, 2, 2), cases.exact_scales)
    k, n = layer.codes.shape
    for dtype in dtypes_taken(target):
        for value in (NAN, INFINITY, -INFINITY):
            for column in (0, n // 2, n - 1):
                bias = (torch.arange(n) % 5 / 8).to(dtype)
                bias[column] = value
                x = exact_activations(Random(35), 3, k, layer.group_size, dtype)
                in_every_form(target, x, *layer.packed, bias)


@rule("L3.special-scales", "matmul")
def special_scales_of_factors(target: Subject) -> None:
    """A scale that is NaN or infinite is refused, or leaves no finite number in its column and no trace in others.

    Nor does it where a row of x is all zeros.
    """
    for dtype in dtypes_taken(target):
        for value in (NAN, INFINITY):
            for group, column in ((0, 0), (1, -1)):
                layer = cases.random_layer(36, *smallest(target.limits, 2, 2), cases.exact_scales)
                layer.scales[min(group, len(layer.scales) - 1), column] = value
                x = exact_activations(Random(36), 3, layer.codes.shape[0], layer.group_size, dtype)
                x[1] = 0
                target.judge(expect_column_lost, x, *layer.packed)


def expect_column_lost(
    target: Subject, x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int
) -> None:
    """A refusal, or the product with the columns of special scales not finite."""
    words = (qweight, qzeros, scales, group_size)
    got = target.unless_refused("matmul", x, *words)
    if got is None:
        return
    lost = ~scales.isfinite().all(0)
    clean = torch.where(lost, 1, scales)
    expected = product(x, unpacked(qweight, qzeros, clean, group_size)).to(x.dtype)
    expect_equal(torch.where(lost & ~got.isfinite(), NAN, got), torch.where(lost, NAN, expected), "y")
