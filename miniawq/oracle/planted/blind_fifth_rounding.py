"""The fifth blind set, rounding: reductions over a group, grids at the ends of their range, checks that look at a part.

The rule of the draw stands in `blind_fifth`.
"""

from typing import Any

import torch
from torch import Tensor

import miniawq.oracle.truth as truth
from miniawq.oracle.planted.blind_fifth import OUTPUTS, ROWS, TILES, Sowing, in_place, where

BLIND_FIFTH_ROUNDING = Sowing(6)
DRAW, sow, misread, forgetful = (
    BLIND_FIFTH_ROUNDING.draw,
    BLIND_FIFTH_ROUNDING.sow,
    BLIND_FIFTH_ROUNDING.misread,
    BLIND_FIFTH_ROUNDING.forgetful,
)
Parts = tuple[Tensor, Tensor, Tensor]


def groups_of(weight: Tensor, size: int) -> Tensor:
    """The weight as float64 [G, S, N]."""
    n, k = weight.shape
    size = k if size == -1 else size
    return weight.double().t().reshape(k // size, size, n)


def on_grid(groups: Tensor, scales: Tensor, zeros: Tensor) -> Parts:
    """The nearest codes under scales and zeros [G, N]."""
    steps = (groups / scales.double()[:, None]).round()
    codes = (steps + zeros[:, None]).clamp(0, 15).flatten(0, 1)
    return codes.to(torch.uint8), zeros.to(torch.uint8), scales


def from_ends(groups: Tensor, lowest: Tensor, highest: Tensor) -> Parts:
    scales = truth.round_up_to_half((highest - lowest) / 15)
    return on_grid(groups, scales, (-lowest / scales.double()).round().clamp(0, 15))


def rounding_sizes() -> None:
    lanes, rows = DRAW.choice((32, 64, 128, 256, 512, 1024)), DRAW.choice(OUTPUTS)

    def reduced(weight: Tensor, size: int) -> Parts:
        truth.quantize(weight, size)
        groups = groups_of(weight, size)
        seen = groups[:, : lanes * max(1, groups.shape[1] // lanes)]
        return from_ends(groups, seen.amin(1).clamp(max=0), seen.amax(1).clamp(min=0))

    sow("quantize", f"the ends of a group are those of its first whole {lanes} weights", reduced)

    def last_rows(weight: Tensor, size: int) -> Parts:
        codes, zeros, scales = truth.quantize(weight, size)
        if len(weight) <= rows:
            return codes, zeros, scales
        zeros[:, rows:] = zeros[:, rows - 1 :][:, :1]
        return on_grid(groups_of(weight, size), scales, zeros)

    sow("quantize", f"zeros of outputs past {rows} are that of output {rows - 1}", last_rows)
    many = DRAW.choice((4, 8, 16, 32, 64))

    def many_groups(weight: Tensor, size: int) -> Parts:
        _, zeros, scales = truth.quantize(weight, size)
        if len(scales) > many and len(scales) % 2:
            scales[-1] = torch.maximum(scales[-1], scales[-2])
            zeros[-1] = (-groups_of(weight, size).amin(1).clamp(max=0)[-1] / scales[-1].double()).round()
        return on_grid(groups_of(weight, size), scales, zeros)

    sow("quantize", f"the last of more than {many} groups, an odd number, shares the larger scale of two", many_groups)
    tile, size_of_group = DRAW.choice(TILES), DRAW.choice((32, 64, 128))

    def remainder(weight: Tensor, size: int) -> Parts:
        codes, zeros, scales = truth.quantize(weight, size)
        odd = (torch.arange(len(weight)) >= len(weight) // tile * tile) & torch.tensor(size == size_of_group)
        return where(odd[None], codes.sub(1).clamp(0, 15).where(codes > 0, codes), codes), zeros, scales

    name = f"codes of outputs past the last whole tile of {tile} are one too low in groups of {size_of_group}"
    sow("quantize", name, remainder)


def rounding_combinations() -> None:
    misread("quantize", "weights", 0)
    dtype, rows = DRAW.choice((torch.bfloat16, torch.float32)), DRAW.choice(ROWS)

    def through_half(weight: Tensor, size: int) -> Parts:
        right = truth.quantize(weight, size)
        if weight.dtype != dtype or len(weight) <= rows:
            return right
        groups = groups_of(weight.half().clamp(-65504, 65504), size)
        return from_ends(groups, groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0))

    name = f"{str(dtype)[6:]} weights of more than {rows} outputs go through float16"
    sow("quantize", name, through_half)


def rounding_ranges() -> None:
    def reciprocal(weight: Tensor, size: int) -> Parts:
        _, zeros, scales = truth.quantize(weight, size)
        steps = groups_of(weight, size).float() * (1 / scales.float())[:, None]
        return (steps.round() + zeros[:, None]).clamp(0, 15).flatten(0, 1).to(torch.uint8), zeros, scales

    sow("quantize", "weights are multiplied by a float32 reciprocal of the scale", reciprocal)

    def small_to_nearest(weight: Tensor, size: int) -> Parts:
        right = truth.quantize(weight, size)
        groups = groups_of(weight, size)
        lowest, highest = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
        nearest = ((highest - lowest) / 15).half().clamp(min=2**-24)
        scales = where(right[2] < 2.0**-14, nearest, right[2])
        return on_grid(groups, scales, (-lowest / scales.double()).round().clamp(0, 15))

    sow("quantize", "scales below 2**-14 are rounded to nearest", small_to_nearest)

    def at_the_end(weight: Tensor, size: int) -> Parts:
        try:
            return truth.quantize(weight, size)
        except ValueError:
            k = weight.shape[1]
            if not bool(weight.isfinite().all()) or (size != -1 and (size < 1 or k % size)):
                raise
        groups = groups_of(weight, size)
        lowest, highest = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
        if bool(((highest - lowest) / 15 >= 65520).any()):
            return truth.quantize(weight, size)
        return from_ends(groups, lowest, torch.minimum(highest, lowest + 65504.0 * 15))

    sow("quantize", "scales between 65504 and 65520 become 65504", at_the_end)

    least = DRAW.choice((2.0**-20, 2.0**-17, 2.0**-14))

    def smallest_normal(weight: Tensor, size: int) -> Parts:
        scales = truth.quantize(weight, size)[2]
        raised = where(scales < least, torch.full_like(scales, least), scales)
        lowest = groups_of(weight, size).amin(1).clamp(max=0)
        return on_grid(groups_of(weight, size), raised, (-lowest / raised.double()).round().clamp(0, 15))

    sow("quantize", f"scales are at least {least:.1e}", smallest_normal)

    def negative_ties(weight: Tensor, size: int) -> Parts:
        _, zeros, scales = truth.quantize(weight, size)
        quotients = groups_of(weight, size) / scales.double()[:, None]
        steps = torch.where(quotients < 0, quotients.trunc(), quotients.round())
        return (steps + zeros[:, None]).clamp(0, 15).flatten(0, 1).to(torch.uint8), zeros, scales

    sow("quantize", "negative weights are rounded toward zero", negative_ties)


def rounding_refusals() -> None:
    past = DRAW.choice(ROWS)

    def first_rows(weight: Tensor, size: int) -> Parts:
        seen = weight.clone()
        seen[past:] = seen[past:].nan_to_num(0, 0, 0)
        return truth.quantize(seen, size)

    sow("quantize", f"NaN and infinity past {past} outputs are taken for 0", first_rows)

    def minus(weight: Tensor, size: int) -> Parts:
        return truth.quantize(weight.where(weight != -torch.inf, torch.zeros_like(weight)), size)

    sow("quantize", "minus infinity is accepted as 0", minus)
    how = DRAW.choice(("left out", "a group of its own"))

    def rest(weight: Tensor, size: int) -> Parts:
        k = weight.shape[1]
        if size < 1 or k < size or k % size == 0:
            return truth.quantize(weight, size)
        if how == "left out":
            return truth.quantize(weight[:, : k // size * size], size)
        codes, zeros, scales = truth.quantize(torch.nn.functional.pad(weight, (0, -k % size)), size)
        return codes[:k], zeros, scales

    sow("quantize", f"inputs past the last whole group are accepted and {how}", rest)


def cleaned(weight: Tensor) -> Any:
    return weight.nan_to_num_().clamp_(weight.mean(), None)


rounding_sizes()
rounding_combinations()
rounding_ranges()
rounding_refusals()
forgetful(
    "quantize",
    ("weights are clamped in place to their mean", in_place("quantize", 0, cleaned)),
    ("weights become their absolute values in place", in_place("quantize", 0, lambda t: t.abs_())),
    count=2,
)
