"""Faults for the checks of `large`: of the kinds that the fifth blind set has, in other places and of other sizes."""

from typing import Any

import torch
from torch import Tensor

import miniawq.oracle.truth as truth
from miniawq.oracle.planted import Fault
from miniawq.oracle.planted.blind_fourth_products import given, result, rows_in
from miniawq.oracle.planted.blind_third import after

Quantized = tuple[Tensor, Tensor, Tensor]


def late_codes_cut(codes: Tensor) -> Tensor:
    seen = codes.clone()
    seen[40_000:] &= 15
    return truth.pack(seen)


def late_nan_cleared(weight: Tensor, group_size: int) -> Quantized:
    seen = weight.clone()
    seen[20_000:] = seen[20_000:].nan_to_num(0, 0, 0)
    return truth.quantize(seen, group_size)


def last_scale_of_31_groups(found: Quantized, *_: Any) -> Quantized:
    codes, zeros, scales = found
    if len(scales) == 31:
        scales[-1] = torch.maximum(scales[-1], scales[-2])
    return codes, zeros, scales


def nearly_too_large(weight: Tensor, group_size: int) -> Quantized:
    try:
        return truth.quantize(weight, group_size)
    except ValueError:
        return truth.quantize(weight * (1 - 2.0**-12), group_size)


def last_inputs_left_out(x: Tensor, qweight: Tensor, **_: Any) -> dict[str, Any]:
    if rows_in(x) != 12 or len(qweight) <= 8192:
        return {}
    seen = x.clone()
    seen[..., -32:] = 0
    return {"x": seen}


def last_zeros_of_the_one_before(x: Tensor, qzeros: Tensor, **_: Any) -> dict[str, Any]:
    late = rows_in(x) > 3000 and len(qzeros) > 1
    return {"qzeros": torch.cat([qzeros[:-1], qzeros[-2:-1]])} if late else {}


def through_float16(y: Tensor, x: Tensor, **_: Any) -> Tensor:
    return y.half().to(y.dtype) if rows_in(x) == 129 else y


def column_flattened(bias: Tensor | None, **_: Any) -> dict[str, Any]:
    column = bias is not None and bias.dim() == 2 and bias.shape[1] == 1
    return {"bias": bias[:, 0]} if column and bias is not None else {}


FIFTH = [
    Fault("codes past 40,000 rows are cut to 4 bits", "L0.pack.refuses-late-codes", {"pack": late_codes_cut}),
    Fault("NaN past 20,000 outputs is taken for 0", "L2.refuses-late-nan", {"quantize": late_nan_cleared}),
    Fault("the last of 31 groups shares the larger scale of two", "L2.step-of-every-size", {
        "quantize": after("quantize", last_scale_of_31_groups)}),
    Fault("scales within a part in 4096 of 65504 are taken", "L2.refuses-scales-to-nearest", {
        "quantize": nearly_too_large}),
    Fault("12 rows and more than 8192 inputs: the last 32 are left out", "L3.few-rows-of-wide-layers", {
        "matmul": given(last_inputs_left_out)}),
    Fault("more than 3000 rows: the last group has the zeros before it", "L3.many-rows-of-groups", {
        "matmul": given(last_zeros_of_the_one_before)}),
    Fault("results of 129 rows go through float16", "L3.combinations-beyond-float16", {
        "matmul": result(through_float16)}),
    Fault("a bias of one column is flattened", "L3.refuses-other-biases", {"matmul": given(column_flattened)}),
    Fault("activations saturate at 65504", "L5.scales.beyond-float16", {
        "search_scales": lambda w, x, g: truth.search_scales(w, x.clamp(-65504, 65504), g)}),
]  # fmt: skip
