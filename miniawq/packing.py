"""Chapter 1: the INT4 number, and AutoAWQ's words.

A linear layer's weight [O, I] is cut along its inputs into groups of `group_size`. The weights of one group of one
output share a scale and a zero; each weight is a code of four bits:

    weight = (code - zero) * scale        code and zero in 0..15

Eight codes make one int32 word. Nibble i of a word is its bits 4i..4i+3. AutoAWQ puts the codes of eight neighbouring
outputs into one word, in an interleaved order that lets a GPU unpack two at a time:

    bits      31..28  27..24  23..20  19..16  15..12  11..8   7..4    3..0
    nibble       7       6       5       4       3       2       1       0
    output       7       5       3       1       6       4       2       0        codes 0..7 -> 0x75316420

Inside miniawq a quantized weight has the orientation of `nn.Linear`, [O, I] (`Quantized`); AutoAWQ's files have [I, O].

Shapes: O outputs, I inputs, G groups along I, S inputs of one group, W words, R and C any rows and columns.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from miniawq.errors import InvalidInput

TOP_CODE = 15  # the largest number of four bits
SYMMETRIC_ZERO = 8  # the zero of every group of a symmetric grid: codes stand for -8..7 scales
CODES_PER_WORD = 8  # 32 bits / 4 bits

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds output AWQ_ORDER[i] of its eight
SEQUENTIAL = (0, 1, 2, 3, 4, 5, 6, 7)

WEIGHTS_AT_ONCE = 1 << 22  # weights of a slice of rows: their float64 copy takes 32 MiB


class Quantized(NamedTuple):
    """A weight [O, I] as uint8 codes 0..15, positive float scales and uint8 zeros 0..15."""

    codes_OI: Tensor
    scales_OG: Tensor
    zeros_OG: Tensor

    @property
    def group_size(self) -> int:
        """Inputs that share one scale."""
        return self.codes_OI.shape[1] // self.scales_OG.shape[1]


Grid = Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]


def asymmetric_grid(weight_OGS: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales and zeros [O, G] under which no weight is off by more than half a scale (docs/specification.md, 1.6, has
    the proof). Only the ends of each group count, so a search gives its ranges [O, G, 2] instead of weights.

    The bound needs two choices: zero is always in range, and the scale is rounded up, so that codes cover the range.
    """
    lowest_OG = weight_OGS.amin(-1).clamp(max=0).double()
    highest_OG = weight_OGS.amax(-1).clamp(min=0).double()
    scales_OG = round_up((highest_OG - lowest_OG) / TOP_CODE, scale_dtype)
    zeros_OG = (-lowest_OG / scales_OG.double()).round().clamp(0, TOP_CODE)
    return scales_OG, zeros_OG.to(torch.uint8)


def round_up(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest positive number of `dtype` greater than or equal to each of `values` (>= 0); infinity beyond its
    range.
    """
    bits_dtype = torch.int16 if dtype.itemsize == 2 else torch.int32
    nearest = values.to(dtype)
    # Positive floats are ordered like their bit patterns: adding one to the pattern gives the next float.
    bits = nearest.view(bits_dtype) + (nearest.double() < values)
    return bits.clamp(min=1).view(dtype)


def quantize(
    weight_OI: Tensor,
    group_size: int,
    grid: Grid = asymmetric_grid,
    scale_dtype: torch.dtype = torch.float16,
    name: str = "the weight",
) -> Quantized:
    """Plain rounding: a weight at the nearest codes of `grid`, in groups of `group_size` inputs (-1: all inputs).

    InvalidInput names the tensor when it holds NaN or infinity, or when its inputs do not divide into groups.
    """
    groups_OGS = grouped(weight_OI, group_size, name)
    # A float64 sum is finite exactly if every element is (no overflow here), and needs no second tensor.
    if not weight_OI.sum(dtype=torch.float64).isfinite() and not weight_OI.isfinite().all():
        raise InvalidInput(
            f"{name} holds NaN or infinity",
            f"{int((~weight_OI.isfinite()).sum())} of {weight_OI.numel()} values are not finite",
            "a checkpoint with such values is damaged: download or train it again",
        )
    return round_to_grid(weight_OI, *grid(groups_OGS, scale_dtype))


def grouped(weight_OI: Tensor, group_size: int, name: str = "the weight") -> Tensor:
    """The weight as [O, G, S]; InvalidInput when its inputs do not divide into groups."""
    inputs = weight_OI.shape[1]
    group_size = inputs if group_size == -1 else group_size
    if group_size < 1 or inputs % group_size:
        raise InvalidInput(
            f"{name} cannot be cut into groups of {group_size}",
            f"its {inputs} input features are not a multiple of {group_size}",
            "use a smaller group size (64, 32), or leave this layer dense",
        )
    return weight_OI.unflatten(1, (-1, group_size))


def round_to_grid(weight_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor) -> Quantized:
    """The nearest codes to a weight under given scales and zeros; InvalidInput on a scale that is not finite."""
    # Grids do not check this: a search tries thousands of them, and a GPU would wait at each check.
    if not scales_OG.isfinite().all():
        raise InvalidInput(
            f"a scale does not fit in {scales_OG.dtype}",
            f"it is beyond {torch.finfo(scales_OG.dtype).max:.6g}, the largest number of that kind",
            "store the scales in bfloat16, or look for a broken weight",
        )
    codes_OI = torch.empty_like(weight_OI, dtype=torch.uint8)
    for rows in row_slices(weight_OI):
        groups_OGS = weight_OI[rows].unflatten(1, (scales_OG.shape[1], -1))
        # float32 could round a quotient next to a tie onto the tie, and so break the half-scale bound.
        steps_OGS = groups_OGS.double() / scales_OG[rows].double().unsqueeze(-1)
        codes_OGS = (steps_OGS.round() + zeros_OG[rows].unsqueeze(-1)).clamp(0, TOP_CODE)
        codes_OI[rows] = codes_OGS.flatten(1).to(torch.uint8)
    return Quantized(codes_OI, scales_OG, zeros_OG)


def dequantize(quantized: Quantized, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [O, I] that the codes stand for, rounded once to `dtype` (by default the dtype of the scales)."""
    codes_OI, scales_OG, zeros_OG = quantized
    weight_OI = torch.empty_like(codes_OI, dtype=dtype or scales_OG.dtype)
    for rows in row_slices(codes_OI):
        # code - zero has a sign and 4 bits, a scale 11 (bfloat16: 8): their product is exact in float32.
        codes_OGS = codes_OI[rows].unflatten(1, (scales_OG.shape[1], -1)).float()
        weight_OGS = (codes_OGS - zeros_OG[rows].unsqueeze(-1)) * scales_OG[rows].float().unsqueeze(-1)
        weight_OI[rows] = weight_OGS.flatten(1).to(weight_OI.dtype)
    return weight_OI


def row_slices(matrix: Tensor) -> Iterator[slice]:
    """Slices of rows of at most `WEIGHTS_AT_ONCE` weights, so that copies in wider dtypes take little memory."""
    rows, columns = matrix.shape
    step = max(1, WEIGHTS_AT_ONCE // max(1, columns))
    return (slice(start, start + step) for start in range(0, rows, step))


def pack(codes_RC: Tensor, order: tuple[int, ...] = AWQ_ORDER) -> Tensor:
    """Codes [R, C] as int32 words [R, C / 8]: nibble i of a word holds column `order[i]` of its eight.

    InvalidInput on a code above 15, which would spill into its neighbour, on codes that are no integers, and when C is
    not a multiple of 8.
    """
    if codes_RC.is_floating_point():
        raise InvalidInput(f"the codes are {codes_RC.dtype}", "1.5 would become 1", "give the codes as integers")
    if codes_RC.shape[-1] % CODES_PER_WORD:
        raise InvalidInput(
            f"{codes_RC.shape[-1]} codes do not fill whole words",
            f"a word holds {CODES_PER_WORD} codes",
            "this layer cannot be stored in this layout: leave it dense",
        )
    if codes_RC.numel() and (codes_RC.amax() > TOP_CODE or codes_RC.amin() < 0):
        raise InvalidInput("a code is outside 0..15", f"the codes reach from {codes_RC.min()} to {codes_RC.max()}")
    return words_of(codes_RC, order)


def words_of(codes_RC: Tensor, order: tuple[int, ...]) -> Tensor:
    """`pack` for codes known to be 0..15: a check would make the host wait for a GPU."""
    codes_RW8 = codes_RC.to(torch.uint8).unflatten(-1, (-1, CODES_PER_WORD))
    # An int32 lies in memory lowest byte first, and each byte holds two neighbouring nibbles.
    bytes_RW4 = torch.empty(*codes_RW8.shape[:-1], 4, dtype=torch.uint8, device=codes_RC.device)
    for byte, (low, high) in enumerate(zip(order[::2], order[1::2], strict=True)):
        bytes_RW4[..., byte] = codes_RW8[..., low] | codes_RW8[..., high] << 4
    return bytes_RW4.view(torch.int32).squeeze(-1)


def unpack(words_RW: Tensor, order: tuple[int, ...] = AWQ_ORDER) -> Tensor:
    """int32 words [R, W] as uint8 codes [R, 8 W]: the inverse of `pack`, on every bit pattern."""
    # One word is contiguous whatever its stride, but only with stride 1 can it be viewed as bytes: hence a copy.
    bytes_RW4 = words_RW.clone(memory_format=torch.contiguous_format).view(torch.uint8).unflatten(-1, (-1, 4))
    codes_RW8 = torch.empty(*words_RW.shape, CODES_PER_WORD, dtype=torch.uint8, device=words_RW.device)
    for byte, (low, high) in enumerate(zip(order[::2], order[1::2], strict=True)):
        codes_RW8[..., low] = bytes_RW4[..., byte] & TOP_CODE
        codes_RW8[..., high] = bytes_RW4[..., byte] >> 4
    return codes_RW8.flatten(-2)


def encode_awq(quantized: Quantized) -> dict[str, Tensor]:
    """The tensors of a layer in an AutoAWQ GEMM file: `qweight` [I, O/8], `qzeros` [G, O/8], `scales` [G, O]."""
    return {
        "qweight": pack(quantized.codes_OI.t()),
        "qzeros": pack(quantized.zeros_OG.t()),
        "scales": quantized.scales_OG.t().contiguous(),
    }


def decode_awq(tensors: Mapping[str, Tensor]) -> Quantized:
    """The inverse of `encode_awq`; the shapes hold the group size."""
    return Quantized(
        unpack(tensors["qweight"]).t().contiguous(),
        tensors["scales"].t().contiguous(),
        unpack(tensors["qzeros"]).t().contiguous(),
    )
