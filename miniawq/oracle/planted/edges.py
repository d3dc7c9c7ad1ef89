"""Faults for the checks of `edges`, one each."""

from torch import Tensor

import miniawq.oracle.truth as truth
from miniawq.oracle.planted import Fault
from miniawq.oracle.planted.blind_second import cut, random_ties, signed_groups, square, square_product
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
    Fault("negative scales read as positive", "L3.negative-scales", {
        "matmul": lambda x, w, z, s, g, b=None: truth.matmul(x, w, z, s.abs(), g, b)}),
    Fault("a group_size of 0 or -2 taken for -1", "L3.refuses-group-sizes", {
        "matmul": lambda x, w, z, s, g, b=None: truth.matmul(x, w, z, s, without_size(g), b)}),
    Fault("a bias of one number broadcast", "L3.refuses-broadcasting", {
        "matmul": lambda x, w, z, s, g, b=None: truth.matmul(
            x, w, z, s, g, b if b is None or b.numel() > 1 else b.reshape(1).expand(s.shape[1]))}),
    Fault("a hundred tokens drawn at random", "L5.scales.many-tokens", {
        "search_scales": lambda w, x, g: truth.search_scales(*drawn_tokens(w, x), g)}),
    Fault("a hundred tokens drawn at random", "L5.clip.many-tokens", {
        "search_clip": lambda w, x, g: truth.search_clip(*drawn_tokens(w, x), g)}),
    Fault("square weights transposed", "L5.clip.square", {
        "search_clip": lambda w, x, g: truth.search_clip(square(w), x, g)}),
]  # fmt: skip
