"""Arguments of wrong dtypes, L0 to L3: refused or read rightly; a kernel may read int64 words, but not half of each."""

from random import Random

import torch
from torch import Tensor

import miniawq.oracle.cases as cases
import miniawq.oracle.truth as truth
from miniawq.oracle.cases import PackedCase, random_layer, random_weight, smallest
from miniawq.oracle.check import rule
from miniawq.oracle.combinations import seed_of
from miniawq.oracle.multiplication import dtypes_taken, product
from miniawq.oracle.ranges import expect_refused_or_decoded
from miniawq.oracle.rounding import expect_bound
from miniawq.oracle.subject import Broken, Subject, expect_equal


@rule("L0.pack.wrong-dtypes", "pack", flags=("NoTypeCheck",))
def wrong_dtypes_of_codes(target: Subject) -> None:
    """Codes of a wider integer dtype are refused or packed rightly; 16 and 256 are refused in each."""
    codes = cases.codes(seed_of({}), 3, 2 * target.limits.multiple_of_n)
    for dtype in (torch.int16, torch.int32, torch.int64):
        got = target.unless_refused("pack", codes.to(dtype))
        if got is not None:
            expect_equal(got, truth.pack(codes), "word")
        for code in (16, 256):
            wrong = codes.to(dtype)
            wrong[1, 3] = code
            expect_refused(target, "pack", (wrong,), f"a code of {code} in {dtype}")


def expect_refused(target: Subject, function: str, arguments: tuple[object, ...], why: str) -> None:
    """Any exception."""
    if target.unless_refused(function, *arguments) is not None:
        raise Broken(f"an exception because of {why}", "a result, with no error")


FINER = {torch.float32: 3 * 2.0**-13, torch.float64: 3 * 2.0**-13, torch.bfloat16: 0.0}  # bits that float16 lacks


@rule("L1.wrong-dtypes", "dequantize", flags=("NoTypeCheck",))
def wrong_dtypes_of_words(target: Subject) -> None:
    """Words of 64 bits or as floats, and scales of other float dtypes, are refused or decoded rightly."""
    qweight, qzeros, scales, group_size = random_layer(45, *smallest(target.limits, 2, 2), cases.exact_scales).packed
    for dtype in (torch.int64, torch.float64):
        for words in ((qweight.to(dtype), qzeros), (qweight, qzeros.to(dtype))):
            expect_right_words(target, "dequantize", (*words, scales, group_size), qweight, qzeros)
    for dtype, finer in FINER.items():
        target.judge(expect_refused_or_decoded, qweight, qzeros, scales.to(dtype) * (1 + finer), group_size)


def expect_right_words(
    target: Subject, function: str, arguments: tuple[object, ...], qweight: Tensor, qzeros: Tensor
) -> None:
    """A refusal, or what words of 32 bits give."""
    got = target.unless_refused(function, *arguments)
    if got is None:
        return
    *x, _, _, scales, group_size = arguments
    layer = PackedCase(truth.unpack(qweight), truth.unpack(qzeros), scales, group_size)  # type: ignore[arg-type]
    expected = product(x[0], layer) if x else layer.weight  # type: ignore[arg-type]
    expect_equal(got.to(torch.float64), expected.to(got.dtype).to(torch.float64), function)


@rule("L3.wrong-dtypes", "matmul", flags=("NoTypeCheck",))
def wrong_dtypes_of_factors(target: Subject) -> None:
    """Words of 64 bits or as floats, and a bias of another float dtype are refused or read rightly."""
    layer = random_layer(46, *smallest(target.limits, 2, 2), cases.exact_scales)
    qweight, qzeros, scales, group_size = layer.packed
    dtype = dtypes_taken(target)[0]
    x = cases.exact_rows(seed_of({}), 2, len(qweight), dtype)
    for other in (torch.int64, torch.float64):
        for words in ((qweight.to(other), qzeros), (qweight, qzeros.to(other))):
            expect_right_words(target, "matmul", (x, *words, scales, group_size), qweight, qzeros)
    for other in {torch.float64, torch.float32, torch.float16} - {dtype}:
        bias = torch.full((scales.shape[1],), 0.5, dtype=other)
        got = target.unless_refused("matmul", x, *layer.packed, bias)
        if got is not None:
            expect_equal(got.to(torch.float64), product(x, layer, bias), "y")


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@rule("L1.integer-scales", "dequantize", flags=("NoTypeCheck",))
def integer_scales(target: Subject) -> None:
    """Scales of integers are refused or are the numbers that they are: not the bits of float16, and no sign is lost."""
    qweight, qzeros, scales, group_size = random_layer(50, *smallest(target.limits, 2, 2), cases.exact_scales).packed
    for dtype in INTEGERS:
        whole = (torch.arange(scales.numel()) % 3 + 1).to(dtype).view(scales.shape)
        target.judge(expect_refused_or_decoded, qweight, qzeros, whole, group_size)


@rule("L3.integer-scales", "matmul", flags=("NoTypeCheck",))
def integer_scales_and_biases(target: Subject) -> None:
    """Scales and biases of integers are refused or are the numbers that they are, in a product too."""
    layer = random_layer(51, *smallest(target.limits, 2, 2), cases.exact_scales)
    qweight, qzeros, scales, group_size = layer.packed
    x = cases.exact_rows(Random(51), 2, len(qweight), dtypes_taken(target)[0])
    for dtype in INTEGERS:
        whole, bias = torch.ones_like(scales, dtype=dtype), torch.full((scales.shape[1],), 3, dtype=dtype)
        expect_right_words(target, "matmul", (x, qweight, qzeros, whole, group_size), qweight, qzeros)
        got = target.unless_refused("matmul", x, *layer.packed, bias)
        if got is not None:
            expect_equal(got.to(torch.float64), product(x, layer, bias).to(x.dtype).to(torch.float64), "y")


@rule("L2.wrong-dtypes", "quantize", flags=("NoTypeCheck",))
def wrong_dtypes_of_weights(target: Subject) -> None:
    """A weight of integers is refused or rounded rightly."""
    k, n, group_size = smallest(target.limits, 2)
    weight = (random_weight(47, n, k) * 8).to(torch.int32)
    if target.unless_refused("quantize", weight, group_size) is not None:
        target.judge(expect_bound, weight, group_size)


@rule("L0.pack.fractions", "pack", flags=("NoTypeCheck",))
def fractions(target: Subject) -> None:
    """Codes as floats are refused or, where all are whole, packed rightly: 1.5 is no code and is not cut to 1."""
    codes = cases.codes(Random(48), 3, 2 * target.limits.multiple_of_n)
    for dtype in (torch.float16, torch.float32, torch.float64):
        got = target.unless_refused("pack", codes.to(dtype))
        if got is not None:
            expect_equal(got, truth.pack(codes), "word")
        for code in (0.5, 1.5, 14.75):
            wrong = codes.to(dtype)
            wrong[1, 3] = code
            expect_refused(target, "pack", (wrong,), f"a code of {code} in {dtype}")


@rule("L3.integer-inputs", "matmul", flags=("NoTypeCheck",))
def integer_inputs(target: Subject) -> None:
    """An x of integers is refused or multiplied rightly: the result is not a whole number, nor are the weights."""
    layer = random_layer(49, *smallest(target.limits, 2, 2), cases.exact_scales)
    bits = cases.codes(Random(49), 3, len(layer.codes)) & 1
    for dtype in (torch.int8, torch.int32, torch.int64):
        got = target.unless_refused("matmul", bits.to(dtype), *layer.packed)
        if got is not None:
            expect_equal(got.to(torch.float64), product(bits, layer), "y")
