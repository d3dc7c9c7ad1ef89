"""Sizes one by one, and one layer as large as those of real models, L0 to L3.

A covering array has some sizes of each class; a tile of 48, 80 or 192, or a switch over numbers of rows, is wrong at
others. Here every small number of rows, words and groups is tried, none included. A whole layer has many outputs, many
inputs, many groups and more than 2**24 weights at once, where an index kept as float32 is no longer exact.
"""

from collections.abc import Iterator
from functools import cache
from random import Random
from typing import Any

import torch
from torch import Tensor

import miniawq.oracle.cases as cases
import miniawq.oracle.truth as truth
from miniawq.oracle.cases import PackedCase, random_layer, random_weight, rounded_up
from miniawq.oracle.check import rule
from miniawq.oracle.combinations import (
    bias_of,
    exact_activations,
    expect_decoded,
    expect_product,
    inputs_of,
    sizes_taken,
)
from miniawq.oracle.multiplication import dtypes_taken
from miniawq.oracle.rounding import expect_bound
from miniawq.oracle.storage import expect_packed, expect_unpacked
from miniawq.oracle.subject import Lacking, Subject, expect_equal

ROWS = (*range(67), 80, 96, 127, 160, 192, 224, 320, 384)
WORDS = (*range(1, 37), 40, 44, 48, 52, 56, 60)
GROUPS = (*range(1, 19), 24, 31, 40, 48, 63, 65)


def tables_of_sizes(target: Subject) -> Iterator[Tensor]:
    """Codes of every number of rows, none included, and of every number of words."""
    step = target.limits.multiple_of_n
    codes = cases.codes(Random(120), ROWS[-1], WORDS[-1] * step)
    for rows in ROWS:
        yield codes[:rows, : (1 + rows % 3) * step].contiguous()
    for words in WORDS:
        yield codes[: 2 + words % 3, : words * step].contiguous()


@rule("L0.pack.every-size", "pack")
def every_table(target: Subject) -> None:
    """Every number of rows up to 66 and of words up to 36 is packed like the definition; no rows may be refused."""
    for codes in tables_of_sizes(target):
        if len(codes) or target.unless_refused("pack", codes) is not None:
            target.judge(expect_packed, codes)


@rule("L0.unpack.every-size", "unpack")
def every_table_of_words(target: Subject) -> None:
    """Every number of rows up to 66 and of words up to 36 is unpacked like the definition; no rows may be refused."""
    for codes in tables_of_sizes(target):
        words = truth.pack(codes)
        if len(words) or target.unless_refused("unpack", words) is not None:
            target.judge(expect_unpacked, words)


def layers_of_sizes(target: Subject) -> Iterator[PackedCase]:
    """Layers of every number of outputs in words, and of every number of groups, the group sizes in turn."""
    step, sizes = target.limits.multiple_of_n, sizes_taken(target.limits)
    for words in WORDS:
        size = sizes[words % len(sizes)]
        k = inputs_of({"group size": size, "groups": 1 + words % 3}, target.limits)
        yield random_layer(words, k, words * step, size, cases.exact_scales)
    for groups in GROUPS:
        for size in (sizes[0], sizes[groups % len(sizes)]):
            k = inputs_of({"group size": size, "groups": groups}, target.limits)
            yield random_layer(groups, k, step, size, cases.exact_scales)


@rule("L1.every-size", "dequantize")
def every_layer(target: Subject) -> None:
    """Every number of outputs up to 36 words, and of groups up to 18, decodes like the definition."""
    for layer in layers_of_sizes(target):
        target.judge(expect_decoded, *layer.packed)


@rule("L2.every-size", "quantize", flags=("HalfArithmetic",))
def every_weight(target: Subject) -> None:
    """Every number of outputs up to 36 words, and of groups up to 18, keeps the bound."""
    for layer in layers_of_sizes(target):
        k, n = layer.codes.shape
        target.judge(expect_bound, random_weight(k + n, n, k), layer.group_size)


@rule("L3.every-size", "matmul")
def products_of_sizes(target: Subject) -> None:
    """Every number of rows up to 66, outputs up to 36 words, and groups up to 18, with a bias and without."""
    dtypes, most = dtypes_taken(target), target.limits.max_rows
    for i, layer in enumerate(layers_of_sizes(target)):
        k, n = layer.codes.shape
        rows, dtype = min((1, 2, 17)[i % 3], most), dtypes[i // 3 % len(dtypes)]
        x = exact_activations(Random(i), rows, k, layer.group_size, dtype)
        target.judge(expect_product, x, *layer.packed, bias_of(("none", "contiguous")[i // 2 % 2], n, dtype))
    layer = random_layer(121, *cases.smallest(target.limits, 2, 2), cases.exact_scales)
    k, n = layer.codes.shape
    for dtype in dtypes:
        many = exact_activations(Random(122), ROWS[-1], k, layer.group_size, dtype)
        for rows in ROWS:
            if rows <= most:
                bias = bias_of(("none", "contiguous")[rows % 2], n, dtype)
                target.judge(expect_product, many[:rows], *layer.packed, bias)


INPUTS, OUTPUTS = 3840, 4480  # 30 and 35 tiles of 128: more than 2**24 weights


Words = tuple[Tensor, Tensor, Tensor, int]


def real_layer(target: Subject) -> tuple[Tensor, Words]:
    """Codes and words of a layer of that size in the smallest groups, if the target takes so large a one."""
    size, n = sizes_taken(target.limits)[0], rounded_up(OUTPUTS, target.limits.multiple_of_n)
    k = inputs_of({"group size": size, "groups": -(-INPUTS // (40 if size == -1 else size))}, target.limits)
    if k * n > target.limits.max_weights:
        raise Lacking(f"the target takes {target.limits.max_weights} weights, not {k * n}")
    codes, (qweight, qzeros, scales, _) = made_once(k, n, size)
    return codes.clone(), (qweight.clone(), qzeros.clone(), scales.clone(), size)


@cache
def made_once(k: int, n: int, group_size: int) -> tuple[Tensor, Words]:
    """Four checks have the same layer. A target might write into it, so each gets a copy."""
    layer = random_layer(123, k, n, group_size, cases.exact_scales)
    return layer.codes, layer.packed


@rule("L0.pack.whole-layer", "pack")
def whole_codes(target: Subject) -> None:
    """More than 2**24 codes of a layer as large as those of real models are packed whole."""
    target.judge(expect_packed, real_layer(target)[0])


@rule("L0.unpack.whole-layer", "unpack")
def whole_words(target: Subject) -> None:
    """More than 2**24 codes of a layer as large as those of real models are unpacked whole."""
    target.judge(expect_unpacked, real_layer(target)[1][0])


def decoded(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """The weight [K, N] in float32, which holds 4 bits times 11: the definition's float64 would take seconds here."""
    size = len(qweight) // len(scales)
    steps = truth.unpack(qweight).to(torch.float32).unflatten(0, (-1, size)) - truth.unpack(qzeros)[:, None]
    return (steps * scales.to(torch.float32)[:, None]).flatten(0, 1)


def expect_decoded_whole(target: Subject, *words: Any) -> None:
    """As `expect_decoded`."""
    expected = decoded(*words).to(torch.float16)
    expect_equal(target.tensor("dequantize", words, torch.float16, tuple(expected.shape)), expected, "weight")


def expect_product_whole(target: Subject, x: Tensor, *rest: Any) -> None:
    """As `expect_product`; every partial sum is exact in float32."""
    *words, bias = rest
    expected = (x.to(torch.float32) @ decoded(*words) + bias.to(torch.float32)).to(x.dtype)
    expect_equal(target.tensor("matmul", (x, *rest), x.dtype, tuple(expected.shape)), expected, "y")


@rule("L1.whole-layer", "dequantize")
def whole_weight(target: Subject) -> None:
    """Many outputs, inputs and groups at once, more than 2**24 weights, decode like the definition."""
    target.judge(expect_decoded_whole, *real_layer(target)[1])


@rule("L3.whole-layer", "matmul")
def whole_product(target: Subject) -> None:
    """Many outputs, inputs and groups at once, more than 2**24 weights, with one row and a bias."""
    (codes, words), dtype = real_layer(target), dtypes_taken(target)[0]
    k, n = codes.shape
    x = exact_activations(Random(124), 1, k, words[3], dtype)
    target.judge(expect_product_whole, x, *words, bias_of("contiguous", n, dtype))
