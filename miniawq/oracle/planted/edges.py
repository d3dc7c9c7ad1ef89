"""Faults for the checks of `edges`, one each."""

import torch
from torch import Tensor

import miniawq.oracle.truth as truth
from miniawq.oracle.planted import Fault
from miniawq.oracle.planted.blind_second import (
    cut,
    random_ties,
    signed_groups,
    split_halves,
    square,
    square_product,
)
from miniawq.oracle.planted.blind_second_readers import drawn_tokens


def rows_past_1024(x: Tensor, *rest: Tensor | int | None) -> Tensor:
    y = truth.matmul(x, *rest)  # type: ignore[arg-type]
    return cut(y, rows=1024) if y.dim() == 2 else y


def without_size(group_size: int) -> int:
    """Whatever is no size stands for all inputs."""
    return group_size if group_size > 0 else -1


EDGES = [
    Fault("rows past 4096 zero", "L0.pack.long", {"pack": lambda c: cut(truth.pack(c), rows=4096)}),
    Fault("rows past 4096 zero", "L0.unpack.long", {"unpack": lambda w: cut(truth.unpack(w), rows=4096)}),
    Fault("-1 taken for 15", "L0.pack.far-codes", {"pack": lambda c: truth.pack(c % 16 if bool((c < 0).any()) else c)}),
    Fault("square weights transposed", "L1.square", {"dequantize": lambda *a: square(truth.dequantize(*a))}),
    Fault("inputs past 16384 zero", "L1.long", {"dequantize": lambda *a: cut(truth.dequantize(*a), rows=16384)}),
    Fault("a group_size of 0 or -2 taken for -1", "L1.refuses-group-sizes", {
        "dequantize": lambda w, z, s, g: truth.dequantize(w, z, s, without_size(g))}),
    Fault("square codes transposed", "L2.square", {
        "quantize": lambda w, g: (square(truth.quantize(w, g)[0]), *truth.quantize(w, g)[1:])}),
    Fault("zeros past the 127th group in reverse order", "L2.long", {"quantize": signed_groups}),
    Fault("ties broken at random", "L2.ties-twice", {"quantize": random_ties}),
    Fault("a group_size of 0 or -2 taken for -1", "L2.refuses-group-sizes", {
        "quantize": lambda w, g: truth.quantize(w, without_size(g))}),
    Fault("square weights transposed", "L3.square", {
        "matmul": lambda x, w, z, s, g, b=None: square_product(x, w, z, s, g, b)}),
    Fault("rows past 1024 zero", "L3.long", {"matmul": rows_past_1024}),
    Fault("sums of 33 to 63 rows of bfloat16 in two halves of bfloat16", "L3.more-rows", {
        "matmul": lambda x, w, z, s, g, b=None: (
            split_halves if x.dtype == torch.bfloat16 and 32 < x[..., 0].numel() < 64 else truth.matmul)(
            x, w, z, s, g, b)}),
    Fault("rows that are all NaN give 0", "L3.extreme-rows", {
        "matmul": lambda x, *a: torch.where(x.isnan().all(-1, keepdim=True), 0, truth.matmul(x, *a))}),
    Fault("negative scales read as positive", "L3.negative-scales", {
        "matmul": lambda x, w, z, s, g, b=None: truth.matmul(x, w, z, s.abs(), g, b)}),
    Fault("a group_size of 0 or -2 taken for -1", "L3.refuses-group-sizes", {
        "matmul": lambda x, w, z, s, g, b=None: truth.matmul(x, w, z, s, without_size(g), b)}),
    Fault("a bias of one number broadcast", "L3.refuses-broadcasting", {
        "matmul": lambda x, w, z, s, g, b=None: truth.matmul(
            x, w, z, s, g, b if b is None or b.numel() > 1 else b.reshape(1).expand(s.shape[1]))}),
    Fault("activations above 100 clamped", "L5.scales.large-activations", {
        "search_scales": lambda w, x, g: truth.search_scales(w, x.clamp(-100, 100), g)}),
    Fault("a hundred tokens drawn at random", "L5.scales.many-tokens", {
        "search_scales": lambda w, x, g: truth.search_scales(*drawn_tokens(w, x), g)}),
    Fault("a hundred tokens drawn at random", "L5.clip.many-tokens", {
        "search_clip": lambda w, x, g: truth.search_clip(*drawn_tokens(w, x), g)}),
    Fault("square weights transposed", "L5.clip.square", {
        "search_clip": lambda w, x, g: truth.search_clip(square(w), x, g)}),
]  # fmt: skip
