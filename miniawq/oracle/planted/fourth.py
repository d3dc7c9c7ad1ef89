"""Faults for the checks of `sizes`, `views`, `sums`, `dialects` and `crowds`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import miniawq.oracle.loader as loader
import miniawq.oracle.truth as truth
from miniawq.oracle.planted import Fault
from miniawq.oracle.planted.blind_fourth import (
    as_if_dense,
    changed,
    even_columns_doubled,
    index_in_float32,
    rounded_down,
    weight_as_dense,
)
from miniawq.oracle.planted.blind_fourth_products import (
    given,
    halves_of_splits,
    last_group_late,
    part,
    result,
    rows_from_a_multiple_of_eight,
    rows_in,
    scaled_after_rounding,
    scales_in_bfloat16,
)
from miniawq.oracle.planted.blind_fourth_readers import (
    bits_of_bfloat16,
    compressed_through_float16,
    parsed,
    reader,
    square_zero_points_exchanged,
    too_long_is_cut,
)
from miniawq.oracle.planted.blind_fourth_searches import (
    best_factors,
    every_nth_token,
    factors_in_float16,
    of_rounded_outputs,
    square_exchanged,
    tokens_once,
    told,
)
from miniawq.oracle.planted.blind_third import after

Stored = dict[str, Tensor]


def nothing_of(rows: int) -> Callable[..., Tensor]:
    """A change: a result of so many rows is all zeros."""
    return lambda found, *_: found * 0 if len(found) == rows else found


def last_word_of_25(weight: Tensor, *_: Any) -> Tensor:
    if weight.shape[1] == 200:
        weight[:, -8:] = 0
    return weight


def last_of_14_groups(found: tuple[Tensor, ...], *_: Any) -> tuple[Tensor, ...]:
    codes, zeros, scales = found
    if len(scales) == 14:
        codes[-(len(codes) // 14) :] = 0
    return codes, zeros, scales


def one_before_in_22(y: Tensor, x: Tensor, **_: Any) -> Tensor:
    if rows_in(x) == 22:
        y.view(22, -1)[-1] = y.view(22, -1)[-2]
    return y


def half_bits(t: Tensor) -> Tensor:
    return t.view(torch.float16)


def square_as_dense(t: Tensor) -> Tensor:
    return as_if_dense(t) if t.shape[0] == t.shape[1] and t.stride(0) == 1 else t


def transposed_where_square(name: str) -> dict[str, Callable[..., Any]]:
    """A reader that transposes one part of a layer where it is square."""

    def decode(linear: str, parts: Stored, *rest: Any) -> Tensor:
        part = parts.get(name)
        if part is not None and part.shape == part.t().shape:
            parts = parts | {name: part.t()}
        return loader.decode(linear, parts, *rest)

    return {"load_checkpoint": reader(decode=decode)}


FOURTH = [
    Fault("22 rows give nothing", "L0.pack.every-size", {"pack": after("pack", nothing_of(22))}),
    Fault("22 rows give nothing", "L0.unpack.every-size", {"unpack": after("unpack", nothing_of(22))}),
    Fault("the index of a word is a float32", "L0.pack.whole-layer", {
        "pack": lambda c: truth.pack(index_in_float32(c.clone(), c))}),
    Fault("the index of a code is a float32", "L0.unpack.whole-layer", {"unpack": after("unpack", index_in_float32)}),
    Fault("codes read from a multiple of four", "L0.pack.views", {"pack": lambda c: truth.pack(rounded_down(c, 4))}),
    Fault("a transposed square is read as if dense", "L0.unpack.views", {
        "unpack": lambda w: truth.unpack(square_as_dense(w))}),
    Fault("25 words: the last is zero", "L1.every-size", {"dequantize": after("dequantize", last_word_of_25)}),
    Fault("past 1024 outputs, in many groups two neighbours have one zero", "L1.whole-layer", {
        "dequantize": changed("qzeros", even_columns_doubled, lambda w, z, s, g: s.shape[1] > 1024 and len(s) > 9)}),
    Fault("scales expanded over the outputs are read on", "L1.views", {
        "dequantize": changed("scales", as_if_dense, lambda w, z, s, g: s.stride(1) == 0)}),
    Fault("scales of int16 are taken for bits", "L1.integer-scales", {
        "dequantize": changed("scales", half_bits, lambda w, z, s, g: s.dtype == torch.int16)}),
    Fault("a bias of int16 is taken for bits", "L3.integer-scales", {
        "matmul": part("bias", half_bits, lambda bias, **_: bias.dtype == torch.int16)}),
    Fault("14 groups: the codes of the last are zero", "L2.every-size", {
        "quantize": after("quantize", last_of_14_groups)}),
    Fault("a transposed square is read as if dense", "L2.views", {
        "quantize": weight_as_dense(lambda w: w.shape[0] == w.shape[1] and w.stride(0) == 1)}),
    Fault("22 rows: the last is the one before", "L3.every-size", {"matmul": result(one_before_in_22)}),
    Fault("past 2048 outputs, the last of nine groups or more has the scales before it", "L3.whole-layer", {
        "matmul": given(last_group_late)}),
    Fault("rows read from a pitch that is a multiple of eight", "L3.views", {
        "matmul": given(rows_from_a_multiple_of_eight)}),
    Fault("four parts of 4096 inputs are added in float16", "L3.split-sums", {"matmul": result(halves_of_splits)}),
    Fault("one group: the sum is rounded before its scale", "L3.sums-before-scales", {
        "matmul": result(scaled_after_rounding)}),
    Fault("more than 64 rows: scales in bfloat16", "L3.single-weights", {"matmul": given(scales_in_bfloat16)}),
    Fault("tensors taken in the order of the header", "L4.reads.dialects", {
        "load_checkpoint": reader(file=lambda path: parsed(path, in_order=True))}),
    Fault("square words transposed", "L4.reads.squares", transposed_where_square("qweight")),
    Fault("square scales transposed", "L4.reads.square-scales", transposed_where_square("scales")),
    Fault("square zeros transposed", "L4.reads.compressed-squares", {
        "load_checkpoint": reader(decode=square_zero_points_exchanged)}),
    Fault("square scales transposed", "L4.reads.compressed-square-scales", transposed_where_square("weight_scale")),
    Fault("weights go through float16", "L4.reads.wide-range", {
        "load_checkpoint": reader(decode=compressed_through_float16)}),
    Fault("bfloat16 scales read as the bits of float16", "L4.reads-or-refuses.bfloat16-scales", {
        "load_checkpoint": reader(decode=bits_of_bfloat16)}),
    Fault("no offset compared with the one before", "L4.refuses.header-overlap", {
        "load_checkpoint": reader(file=parsed)}),
    Fault("no offset compared with the shape", "L4.refuses.header-shape", {"load_checkpoint": reader(file=parsed)}),
    Fault("words with too many rows cut", "L4.refuses.each-tensor-long", {
        "load_checkpoint": reader(decode=too_long_is_cut)}),
    Fault("square activations transposed read as if dense", "L5.scales.views", {
        "search_scales": told("search_scales", lambda w, x: (w, square_as_dense(x)))}),
    Fault("every nth of more than 512 tokens", "L5.scales.few-in-a-crowd", {
        "search_scales": told("search_scales", every_nth_token)}),
    Fault("the same token counts once", "L5.scales.repeated-tokens", {
        "search_scales": told("search_scales", tokens_once)}),
    Fault("the loss of outputs in bfloat16", "L5.scales.large-outputs", {
        "search_scales": best_factors(of_rounded_outputs)}),
    Fault("factors go through float16", "L5.scales.wide-range", {
        "search_scales": after("search_scales", factors_in_float16)}),
    Fault("a square of bounds transposed", "L5.clip.views", {"search_clip": after("search_clip", square_exchanged)}),
    Fault("every nth of more than 512 tokens", "L5.clip.few-in-a-crowd", {
        "search_clip": told("search_clip", every_nth_token)}),
    Fault("the same token counts once", "L5.clip.repeated-tokens", {"search_clip": told("search_clip", tokens_once)}),
]  # fmt: skip
