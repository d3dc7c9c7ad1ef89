"""The INT4 product on a GPU, as expressions that Inductor makes one kernel of each.

    rows      form                                                       arithmetic
    1..3      `reduce_planes`: multiply and sum                          float32
    4..256    `dot_planes`: eight tensor-core products, one a nibble     the dtype of x, summed in float32
    more      `eager.expand`, then the library's matmul                  the dtype of x, summed in float32

A form is a pure function of tensors that lie as `prepacked.py` says, to be called inside a larger compiled function.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from miniawq.compiled.launch import columns_for, splits_for
from miniawq.compiled.operations import sum_of_products
from miniawq.compiled.prepacked import unpack_grid, zeros_of
from miniawq.packing import CODES_PER_WORD

# Where `reduce_planes` finds nibble i: shift the word right by the first number, then the nibble begins at the second.
# Bit 16 is the last possible place, because bit 23 of a float begins its exponent.
SUBNORMAL_PLACES = ((0, 0), (0, 4), (0, 8), (0, 12), (0, 16), (12, 8), (12, 12), (12, 16))
PRESCALE = 80  # the exponent of 2 that activations are multiplied by, less the nibble's place

# Where `dot_planes` finds nibble i: shift the word left (right where negative), then the nibble begins at bit 12 or 16.
MAGIC_PLACES = ((12, 12), (12, 16), (4, 12), (4, 16), (-4, 12), (-4, 16), (-12, 12), (-12, 16))


def planes(words_OPG: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Views [O, V, G] of the words, one for each step of `reduce_planes`: plane q part v is word q V + v of a group."""
    return words_OPG.unflatten(1, (-1, parts)).unbind(1)


def prescale(x_TI: Tensor, groups: int, parts: int = 1) -> tuple[Tensor, Tensor]:
    """Activations as `reduce_planes` wants them: x_QNTVG float32, each times its nibble's power of two; sums_TVG.

    Powers of two are exact as long as |x| < 2^48. The sums are those of each part, in units of 2^(149 - PRESCALE).
    """
    x_TGQVN = x_TI.float().unflatten(-1, (groups, -1, parts, CODES_PER_WORD))
    scaled_N = [
        x_TGQV * 2.0 ** (PRESCALE - place)
        for (_, place), x_TGQV in zip(SUBNORMAL_PLACES, x_TGQVN.unbind(-1), strict=True)
    ]
    x_QNTVG = torch.stack(scaled_N).permute(3, 0, 1, 4, 2).contiguous()
    return x_QNTVG, x_TGQVN.sum((2, 4)).transpose(1, 2).contiguous() * 2.0 ** (PRESCALE - 149)


def reduce_planes(
    planes_OVG: Sequence[Tensor], grid_OG: Tensor, scale_dtype: torch.dtype, x_QNTVG: Tensor, sums_TVG: Tensor
) -> Tensor:
    """y [T, O] in float32 for a few rows: sum over groups of scale * (sum of code * x - zero * sum of x).

    Turning a nibble into a float costs one instruction. Masked out of the word and read as a float, a nibble n whose
    lowest bit is bit b has a zero exponent: it is the subnormal number n * 2^(b - 149), exactly. The activation it
    meets was multiplied by 2^(80 - b) beforehand (`prescale`), so every product is n * x * 2^(80 - 149), whichever b
    it came from, and one multiplication by 2^(149 - 80) at the end gives n * x:

        (word & (15 << b)) as float * (x * 2^(80 - b)) = n * x * 2^-69

    A fused multiply-add takes subnormal inputs at full speed and rounds its result, which is a normal number, once.
    So a weight costs two instructions, an AND and a multiply-add, and no weight is ever rounded. A device that flushes
    subnormals to zero gets this form wrong, and `proof.py` leaves it out there.

    A group is summed in V parts. More parts mean more and shorter threads, each with fewer activations to load for
    every output it computes. The planes are tensors of their own, because Inductor marks a buffer that it loads once
    `evict_first`, and a buffer loaded several times `evict_last`.
    """
    rows_OVG: list[Any] = [0.0] * x_QNTVG.shape[2]
    for words_OVG, x_NTVG in zip(planes_OVG, x_QNTVG.unbind(), strict=True):
        for (shift, place), x_TVG in zip(SUBNORMAL_PLACES, x_NTVG.unbind(), strict=True):
            shifted_OVG = words_OVG >> shift if shift else words_OVG
            codes_OVG = (shifted_OVG & (15 << place)).view(torch.float32)
            for row, (sum_OVG, x_VG) in enumerate(zip(rows_OVG, x_TVG.unbind(), strict=True)):
                rows_OVG[row] = sum_OVG + codes_OVG * x_VG
    scales_O1G, offsets_O1G = unpack_grid(grid_OG.unsqueeze(1), scale_dtype)
    zeros_O1G = zeros_of(offsets_O1G)
    y_TO = [
        (scales_O1G * (sum_OVG - zeros_O1G * sums_VG)).sum((1, 2)) * 2.0 ** (149 - PRESCALE)
        for sum_OVG, sums_VG in zip(rows_OVG, sums_TVG.unbind(), strict=True)
    ]
    return torch.stack(y_TO)


def whole_rows(rows: int) -> int:
    """The rows that `dot_planes` computes of so many: whole tiles."""
    return rows + -rows % columns_for(rows)


def in_whole_tiles(x_TI: Tensor) -> Tensor:
    """With rows of zeros, as many as `dot_planes` takes."""
    return with_rows(x_TI, whole_rows(len(x_TI)))


def with_rows(x_TI: Tensor, rows: int) -> Tensor:
    """x with so many rows; those it does not have are zeros."""
    return x_TI if len(x_TI) == rows else pad(x_TI, (0, 0, 0, rows - len(x_TI)))


def spread(x_TI: Tensor, groups: int) -> Tensor:
    """Activations as `dot_planes` wants them: x_NTPG, the inputs of each nibble, of whole tiles of rows.

    The inputs of a row lie together, as the tensor cores read them. So they are copied to shared memory while the tile
    before is multiplied, and never put into another order.
    """
    return in_whole_tiles(x_TI).unflatten(-1, (groups, -1, CODES_PER_WORD)).permute(3, 0, 2, 1)


def dot_planes(
    words_OPG: Tensor,
    grid_OG: Tensor,
    scale_dtype: torch.dtype,
    x_NTPG: Tensor,
    exponents_2O: Tensor,
    bias_O: Tensor | None = None,
    factors_T1: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """y [T, O] for 4 to 256 rows: one tensor-core product for each of the eight nibbles of a word, in one kernel.

    A nibble n beginning at bit b of a float's mantissa, under the exponent of 2^(23 - b), is the number 2^(23 - b) + n.
    One multiply-add by the scale, with -(2^(23 - b) + zero) * scale to be added, leaves (n - zero) * scale, exactly.
    `splits` cuts the planes into parts summed by different programs, for matrices with few outputs (`splits_for`).
    The sums of a row are multiplied by its factor, and the bias is added, before they are rounded to the dtype of x.
    """
    splits = splits or splits_for(words_OPG.shape, x_NTPG.shape[1])
    exponents_12, exponents_16 = exponents_2O.unsqueeze(2).unsqueeze(2).unbind()
    words_KOQG = words_OPG.unflatten(1, (splits, -1)).transpose(0, 1)
    scales_O1G, offsets_O1G = unpack_grid(grid_OG.unsqueeze(1), scale_dtype)
    offsets_16 = offsets_O1G * scales_O1G
    offsets_12 = offsets_16 - scales_O1G * (2.0**11 - 2.0**7)
    weights_KOJ = []
    for shift, place in MAGIC_PLACES:
        exponents, offsets = (exponents_12, offsets_12) if place == 12 else (exponents_16, offsets_16)
        shifted_KOQG = words_KOQG << shift if shift > 0 else words_KOQG >> -shift
        magic_KOQG = (shifted_KOQG & (15 << place)) | exponents
        weight_KOQG = magic_KOQG.view(torch.float32) * scales_O1G + offsets
        weights_KOJ.append(weight_KOQG.to(x_NTPG.dtype).flatten(2))
    x_KJT = list(x_NTPG.unflatten(2, (splits, -1)).flatten(3).permute(0, 2, 3, 1))
    y_KTO = sum_of_products(weights_KOJ, x_KJT).transpose(1, 2)
    if factors_T1 is not None:
        y_KTO = y_KTO * factors_T1
    if splits == 1:
        return written(with_bias(y_KTO.squeeze(0), bias_O, x_NTPG.dtype))
    # Partial sums: the kernel that reads them adds them.
    return with_bias(written(y_KTO).sum(0), bias_O, x_NTPG.dtype)


@lru_cache(maxsize=64)
def magic_exponents(device: torch.device, outputs: int) -> Tensor:
    """The bits of 2^11 and 2^7 as floats for each output, int32 [2, O].

    A tensor, because one instruction takes one constant at most. One entry for each output, because Triton brings words
    into the tensor cores' layout before it makes eight weights of each only if all that it needs for that is loaded in
    blocks; a single number would not be loaded in blocks.
    """
    bits = torch.tensor([(127 + 11) << 23, (127 + 7) << 23], dtype=torch.int32, device=device)
    return bits.unsqueeze(1).repeat(1, outputs)


def with_bias(y_TO: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The bias, if there is one, added before the one rounding to `dtype`."""
    return (y_TO if bias_O is None else y_TO + bias_O).to(dtype)


def written(x: Tensor) -> Tensor:
    """x, written to memory by one kernel, rows first; otherwise Inductor would compute it again in each reader."""
    x = x.flatten().unflatten(0, x.shape)
    return x.as_strided(x.shape, x.stride())
