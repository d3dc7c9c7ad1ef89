"""A large dense weight of 16 bits times few rows of float32 on a CPU: FBGEMM's float16 weights, where they are exact.

A copy in float32 of a slice at a time, which the library multiplies, takes twice to three times as long (docs/log).
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miniawq.compiled.sharing import hand_out
from miniawq.compiled.workshop import WORKSHOP

LARGEST_EXPONENT, LARGEST_SCALING = 15, 100  # float16 ends below 2^16; a power of two that float32 has
SMALLEST = {torch.bfloat16: 2.0**-17, torch.float16: 0.0}  # from here on float16 has all bits of this dtype
OUTPUTS_OF_CALL = 1 << 13  # 1 ms: a helper thread takes one after the other


class PackedHalves(NamedTuple):
    """Some outputs each, as FBGEMM reads them: the weight times 2^exponent."""

    pieces: tuple[Any, ...]
    exponent: int


def can_pack_halves(device: torch.device) -> bool:
    """Whether a device has FBGEMM's product, and it is right."""
    has_product = device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines
    return has_product and WORKSHOP.accepts(("halves", device), prove_halves)


def pack_halves(weight_OI: Tensor) -> PackedHalves | None:
    """None if a weight would be rounded.

    A power of two brings the largest weight to the end of float16's range: bfloat16's 8 bits then fit down to 2^-32 of
    the largest.
    """
    largest, pieces, exponent = weight_OI.abs().max().float(), [], 0
    if not largest.isfinite():
        return None
    if weight_OI.dtype == torch.bfloat16:
        exponent = min(LARGEST_EXPONENT - int(torch.frexp(largest).exponent), LARGEST_SCALING)
    for part_OI in weight_OI.split(OUTPUTS_OF_CALL):
        scaled_OI = part_OI.float().mul_(2.0**exponent)
        if ((scaled_OI != 0) & (scaled_OI.abs() < SMALLEST[weight_OI.dtype])).any():
            return None
        pieces.append(torch.ops.quantized.linear_prepack_fp16(scaled_OI, None))
    return PackedHalves(tuple(pieces), exponent)


def halves_product(x_TI: Tensor, packed: PackedHalves) -> Tensor:
    """y_TO in float32."""
    multiply = torch.ops.quantized.linear_dynamic_fp16
    parts = hand_out([partial(multiply, x_TI, piece) for piece in packed.pieces])
    return torch.cat(parts, -1).mul_(2.0**-packed.exponent)


def prove_halves(name: str, device: torch.device) -> str:
    """Why it is not to be used: a number of a small exact product is wrong. Empty if all are right."""
    outputs, inputs, rows = 70, 45, 5  # whole tiles and a rest of each
    weight_OI = (torch.arange(outputs * inputs) % 37 - 18).bfloat16().view(outputs, inputs)
    x_TI = (torch.arange(rows * inputs) * 7 % 11 - 5).float().view(rows, inputs)
    packed = pack_halves(weight_OI)
    is_right = packed is not None and torch.equal(halves_product(x_TI, packed), x_TI @ weight_OI.float().t())
    return "" if is_right else "its numbers are wrong"
