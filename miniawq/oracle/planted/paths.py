"""Faults for the checks of `paths`, and of others that were written with them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import miniawq.oracle.truth as truth
from miniawq.oracle.planted import CORRECT, Fault
from miniawq.oracle.planted.blind_second import cut
from miniawq.oracle.planted.blind_third import shifted_in_place
from miniawq.oracle.planted.blind_third_products import buffer_of_one_row, one_row_stride, rows_of, with_x
from miniawq.oracle.planted.blind_third_readers import (
    bounded,
    factors_of_half_sums,
    factors_of_other_groups,
    no_links,
    tied_over,
)

Function = Callable[..., Any]


def in_place(function: str, place: int, dtype: torch.dtype) -> dict[str, Function]:
    """An argument that already has the dtype a program works in is not copied, and halved."""

    def wrong(*arguments: Any) -> Any:
        result = CORRECT[function](*arguments)
        if len(arguments) > place and arguments[place].dtype == dtype:
            arguments[place].copy_(arguments[place] // 2 if not dtype.is_floating_point else arguments[place] / 2)
        return result

    return {function: wrong}


def dirty(function: str) -> dict[str, Function]:
    """The call after one that was refused gives zeros."""
    refused = [False]

    def wrong(*arguments: Any) -> Any:
        was, refused[0] = refused[0], True
        result = CORRECT[function](*arguments)
        refused[0] = False
        if not was:
            return result
        return (result[0] * 0, *result[1:]) if isinstance(result, tuple) else result * 0

    return {function: wrong}


def losing_rows() -> Function:
    """One product in a hundred of more than 16 rows loses its last row."""
    calls = [0]

    def wrong(x: Tensor, *rest: Any) -> Tensor:
        y = truth.matmul(x, *rest)
        calls[0] += rows_of(x) > 16
        return y if rows_of(x) <= 16 or calls[0] % 100 else cut(y, rows=y.shape[-2] - 1)

    return wrong


def bounds_of_tiles(w: Tensor, x: Tensor, g: int) -> Tensor:
    """Groups of 128 are clipped whatever is asked, and each group given the bound of its tile."""
    if w.shape[1] % 128 or g in (-1, 128):
        return truth.search_clip(w, x, g)
    return truth.search_clip(w, x, 128).repeat_interleave(128 // g, 1)


def forgetting_bias(x: Tensor, *rest: Any) -> Tensor:
    return truth.matmul(x, *rest[:4]) if rows_of(x) >= 1024 else truth.matmul(x, *rest)


PATHS = [
    Fault("rows past 65535 zero", "L0.pack.past-16-bits", {"pack": lambda c: cut(truth.pack(c), rows=65535)}),
    Fault("rows past 65535 zero", "L0.unpack.past-16-bits", {"unpack": lambda w: cut(truth.unpack(w), rows=65535)}),
    Fault("codes that are int32 already shifted in place", "L0.pack.other-dtypes-unchanged", {
        "pack": lambda c: shifted_in_place(truth.pack(c), c)}),
    Fault("words of 64 bits shifted in place", "L0.unpack.other-dtypes-unchanged", in_place("unpack", 0, torch.int64)),
    Fault("codes after a refused call zero", "L0.pack.after-refusals", dirty("pack")),
    Fault("outputs past 65535 zero", "L1.past-16-bits", {
        "dequantize": lambda *a: cut(truth.dequantize(*a), columns=65535)}),
    Fault("scales that are float32 already changed in place", "L1.other-dtypes-unchanged",
          in_place("dequantize", 2, torch.float32)),
    Fault("weights after a refused call zero", "L1.after-refusals", dirty("dequantize")),
    Fault("codes past 65535 outputs zero", "L2.past-16-bits", {
        "quantize": lambda w, g: (cut(truth.quantize(w, g)[0], columns=65535), *truth.quantize(w, g)[1:])}),
    Fault("a weight of integers changed in place", "L2.other-dtypes-unchanged", in_place("quantize", 0, torch.int32)),
    Fault("codes after a refused call zero", "L2.after-refusals", dirty("quantize")),
    Fault("outputs counted in 16 bits", "L3.past-16-bits", {
        "matmul": lambda *a: truth.matmul(*a)[..., torch.arange(a[3].shape[1]) % 65536]}),
    Fault("1024 rows and more forget the bias", "L3.long-with-bias", {"matmul": forgetting_bias}),
    Fault("the rows of x[:, 1:] all one stride apart", "L3.batches-in-memory", {"matmul": with_x(one_row_stride)}),
    Fault("scales that are float32 already changed in place", "L3.other-dtypes-unchanged",
          in_place("matmul", 3, torch.float32)),
    Fault("products after a refused call zero", "L3.after-refusals", dirty("matmul")),
    Fault("one row is written in the buffer of the last call", "L3.state-of-one-row", {"matmul": buffer_of_one_row()}),
    Fault("every 100th call with more than 16 rows loses one", "L3.state-of-more-rows", {"matmul": losing_rows()}),
    Fault("a tied head written over the head of the file", "L4.reads-or-refuses.tied-to-another", {
        "load_checkpoint": tied_over}),
    Fault("links to files of other names refused", "L4.reads.hub-cache", {"load_checkpoint": no_links}),
    Fault("sums of float16 activations overflow", "L5.scales.large-sums", {"search_scales": factors_of_half_sums}),
    Fault("a loss above 1e9 leaves the bound 0", "L5.clip.extreme-activations", {
        "search_clip": lambda w, x, g: bounded(w, x, g, truth.group_losses, truth.clamped, 1e9)}),
    Fault("groups of 128 tried whatever is asked", "L5.scales.whole-tiles", {
        "search_scales": factors_of_other_groups}),
    Fault("groups of 128 tried whatever is asked", "L5.clip.whole-tiles", {"search_clip": bounds_of_tiles}),
]  # fmt: skip
