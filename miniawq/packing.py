"""The INT4 number: floats <-> codes, scales and zeros; codes <-> int32 words, for every layout on disk.

A linear layer's weight is cut along its inputs into groups of `group_size`. One group of one output channel shares a
scale and a zero; each of its weights is a code of four bits:

    weight = (code - zero) * scale        code and zero in 0..15

Eight codes make one int32 word. Nibble i of a word is its bits 4i..4i+3, and which of eight neighbours it holds is the
layout's choice. AutoAWQ's GEMM layout interleaves eight output channels, so that a GPU can unpack two at a time:

    bits      31..28  27..24  23..20  19..16  15..12  11..8   7..4    3..0
    nibble       7       6       5       4       3       2       1       0
    channel      7       5       3       1       6       4       2       0        codes 0..7 -> 0x75316420

Shapes: O output features, I input features, G groups along I, S inputs of one group, W int32 words, R and C any rows
and columns. Inside the project a quantized weight has the orientation of `nn.Linear`: `Quantized`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from miniawq.errors import InvalidInput

TOP_CODE = 15
SYMMETRIC_ZERO = 8
CODES_PER_WORD = 8

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SEQUENTIAL = (0, 1, 2, 3, 4, 5, 6, 7)

WEIGHTS_PER_SLICE = 1 << 22


class Quantized(NamedTuple):
    """A weight of shape [O, I] as uint8 codes 0..15, positive float scales and uint8 zeros 0..15."""

    codes_OI: Tensor
    scales_OG: Tensor
    zeros_OG: Tensor

    @property
    def group_size(self) -> int:
        """Inputs that share one scale."""
        return self.codes_OI.shape[1] // self.scales_OG.shape[1]


Grid = Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]


def asymmetric_grid(weight_OGS: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales and zeros under which no weight is off by more than half a scale.

    Zero is always in range, so a group of one sign keeps its values, and a scale is rounded up, so the range is always
    covered. Both are needed for the bound (docs/specification.md).
    """
    lowest_OG = weight_OGS.amin(-1).clamp(max=0).double()
    highest_OG = weight_OGS.amax(-1).clamp(min=0).double()
    scales_OG = round_up((highest_OG - lowest_OG) / TOP_CODE, scale_dtype)
    zeros_OG = (-lowest_OG / scales_OG.double()).round().clamp(0, TOP_CODE)
    return scales_OG, zeros_OG.to(torch.uint8)


def symmetric_grid(weight_OGS: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales for zeros of 8 everywhere: the smallest with an error of at most half a scale.

    The codes reach from -8 to 7 scales, and half a scale beyond each end still rounds onto it.
    """
    below_OG = -weight_OGS.amin(-1).clamp(max=0).double()
    above_OG = weight_OGS.amax(-1).clamp(min=0).double()
    needed_OG = torch.maximum(below_OG / (SYMMETRIC_ZERO + 0.5), above_OG / (TOP_CODE - SYMMETRIC_ZERO + 0.5))
    scales_OG = round_up(needed_OG, scale_dtype)
    return scales_OG, torch.full_like(scales_OG, SYMMETRIC_ZERO, dtype=torch.uint8)


def autoawq_grid(weight_OGS: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """AutoAWQ's scales and zeros, in half arithmetic as `pseudo_quantize_tensor` computes them, for comparison.

    Zero may lie outside the range, so a group of one sign can be off by more than half a scale.
    """
    weight_OGS = weight_OGS.half()
    lowest_OG, highest_OG = weight_OGS.amin(-1), weight_OGS.amax(-1)
    scales_OG = (highest_OG - lowest_OG).clamp(min=1e-5) / TOP_CODE
    zeros_OG = (-(lowest_OG / scales_OG).round()).clamp(0, TOP_CODE)
    return scales_OG.to(scale_dtype), zeros_OG.to(torch.uint8)


GRIDS: dict[str, Grid] = {"asymmetric": asymmetric_grid, "symmetric": symmetric_grid, "autoawq": autoawq_grid}


def round_up(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest positive number of `dtype` that is not below each of `values` (>= 0); infinity where it has none."""
    bits_dtype = torch.int16 if dtype.itemsize == 2 else torch.int32
    nearest = values.to(dtype)
    # The bit patterns of positive floats are ordered like the floats: adding one gives the next number.
    bits = nearest.view(bits_dtype) + (nearest.double() < values)
    return bits.clamp(min=1).view(dtype)


def check_scales(scales_OG: Tensor) -> None:
    """InvalidInput on a scale that its dtype cannot hold.

    Grids do not ask: a search tries thousands, and a GPU would wait for each answer.
    """
    if not scales_OG.isfinite().all():
        raise InvalidInput(
            f"a scale does not fit in {scales_OG.dtype}",
            f"it is beyond {torch.finfo(scales_OG.dtype).max:.6g}, the largest number of that kind",
            "store the scales in bfloat16, or look for a broken weight",
        )


def quantize(
    weight_OI: Tensor,
    group_size: int,
    grid: Grid = asymmetric_grid,
    scale_dtype: torch.dtype = torch.float16,
    name: str = "the weight",
) -> Quantized:
    """Round a weight to the nearest codes of `grid` (plain rounding), groups of `group_size` inputs; -1 is all inputs.

    InvalidInput names the tensor when it holds NaN or infinity, or when its inputs do not divide into groups.
    """
    groups_OGS = grouped(weight_OI, group_size, name)
    # One sum is not finite exactly when an element is not (float64 cannot overflow here), and needs no second tensor.
    if not weight_OI.sum(dtype=torch.float64).isfinite() and not weight_OI.isfinite().all():
        raise InvalidInput(
            f"{name} holds NaN or infinity",
            f"{int((~weight_OI.isfinite()).sum())} of {weight_OI.numel()} values are not finite",
            "a checkpoint with such values is damaged: download or train it again",
        )
    return round_to_grid(weight_OI, *grid(groups_OGS, scale_dtype))


def round_to_grid(weight_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor) -> Quantized:
    """The nearest codes to a weight under given scales and zeros; InvalidInput on a scale that is not finite."""
    check_scales(scales_OG)
    codes_OI = torch.empty_like(weight_OI, dtype=torch.uint8)
    for rows in row_slices(weight_OI):
        groups_OGS = weight_OI[rows].unflatten(1, (scales_OG.shape[1], -1))
        # float32 would round a quotient next to a tie onto it and break the half-scale bound.
        steps_OGS = groups_OGS.double() / scales_OG[rows].double().unsqueeze(-1)
        codes_OGS = (steps_OGS.round() + zeros_OG[rows].unsqueeze(-1)).clamp(0, TOP_CODE)
        codes_OI[rows] = codes_OGS.flatten(1).to(torch.uint8)
    return Quantized(codes_OI, scales_OG, zeros_OG)


def dequantize(quantized: Quantized, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [O, I] that the codes stand for: (code - zero) * scale, rounded once, to `dtype` (the scales' own)."""
    codes_OI, scales_OG, zeros_OG = quantized
    weight_OI = torch.empty_like(codes_OI, dtype=dtype or scales_OG.dtype)
    for rows in row_slices(codes_OI):
        # The product of a 5-bit and an 11-bit number is exact in float32.
        codes_OGS = codes_OI[rows].unflatten(1, (scales_OG.shape[1], -1)).float()
        weight_OGS = (codes_OGS - zeros_OG[rows].unsqueeze(-1)) * scales_OG[rows].float().unsqueeze(-1)
        weight_OI[rows] = weight_OGS.flatten(1).to(weight_OI.dtype)
    return weight_OI


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


def row_slices(matrix: Tensor) -> Iterator[slice]:
    """Slices of rows small enough that temporaries of wider types stay small."""
    rows, columns = matrix.shape
    step = max(1, WEIGHTS_PER_SLICE // max(1, columns))
    return (slice(start, start + step) for start in range(0, rows, step))


def pack(codes_RC: Tensor, order: tuple[int, ...] = AWQ_ORDER) -> Tensor:
    """Codes [R, C] to int32 words [R, C / 8]: nibble i of a word holds column `order[i]` of its eight.

    InvalidInput on a code above 15, which would spill into its neighbour, and when C is not a multiple of 8.
    """
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
    """`pack` of codes known to be 0..15: nothing is checked, since a GPU would have to be waited for."""
    codes_RW8 = codes_RC.to(torch.uint8).unflatten(-1, (-1, CODES_PER_WORD))
    # Byte by byte, the lowest first, as an int32 lies in memory: a quarter of the traffic of whole words.
    bytes_RW4 = torch.empty(*codes_RW8.shape[:-1], 4, dtype=torch.uint8, device=codes_RC.device)
    for byte, (low, high) in enumerate(zip(order[::2], order[1::2], strict=True)):
        bytes_RW4[..., byte] = codes_RW8[..., low] | codes_RW8[..., high] << 4
    return bytes_RW4.view(torch.int32).squeeze(-1)


def unpack(words_RW: Tensor, order: tuple[int, ...] = AWQ_ORDER) -> Tensor:
    """int32 words [R, W] to uint8 codes [R, 8 W]: the inverse of `pack` on every bit pattern."""
    bytes_RW4 = words_RW.contiguous().view(torch.uint8).unflatten(-1, (-1, 4))
    codes_RW8 = torch.empty(*words_RW.shape, CODES_PER_WORD, dtype=torch.uint8, device=words_RW.device)
    for byte, (low, high) in enumerate(zip(order[::2], order[1::2], strict=True)):
        codes_RW8[..., low] = bytes_RW4[..., byte] & TOP_CODE
        codes_RW8[..., high] = bytes_RW4[..., byte] >> 4
    return codes_RW8.flatten(-2)


Tensors = Mapping[str, Tensor]


class Layout(NamedTuple):
    """How one file format stores a quantized weight; `decode(encode(q), q.group_size)` is `q`, bit for bit."""

    encode: Callable[[Quantized], dict[str, Tensor]]
    decode: Callable[[Tensors, int], Quantized]


def encode_awq(quantized: Quantized) -> dict[str, Tensor]:
    """AutoAWQ GEMM: `qweight` [I, O/8], `qzeros` [G, O/8], `scales` [G, O], interleaved along the outputs."""
    codes_OI, scales_OG, zeros_OG = quantized
    return {
        "qweight": pack(codes_OI.t()),
        "qzeros": pack(zeros_OG.t()),
        "scales": scales_OG.t().contiguous(),
    }


def decode_awq(tensors: Tensors, group_size: int) -> Quantized:
    """The inverse of `encode_awq`; the shapes hold the group size."""
    return Quantized(
        unpack(tensors["qweight"]).t().contiguous(),
        tensors["scales"].t().contiguous(),
        unpack(tensors["qzeros"]).t().contiguous(),
    )


def gemv_zero_words(groups: int, group_size: int) -> int:
    """Words of zeros in a row of the GEMV layout, padded for its kernel (AutoAWQ's `calculate_zeros_width`)."""
    multiple = 1 if group_size >= 128 else 2 if group_size == 64 else 4
    words = -(-groups // CODES_PER_WORD)
    return -(-words // multiple) * multiple


def encode_gemv(quantized: Quantized) -> dict[str, Tensor]:
    """AutoAWQ GEMV: `qweight` [O, I/8], `qzeros` [O, W], `scales` [O, 8 W], sequential, zero-padded to W words."""
    codes_OI, scales_OG, zeros_OG = quantized
    words = gemv_zero_words(scales_OG.shape[1], quantized.group_size)
    padding = (0, words * CODES_PER_WORD - scales_OG.shape[1])
    return {
        "qweight": pack(codes_OI, SEQUENTIAL),
        "qzeros": pack(torch.nn.functional.pad(zeros_OG, padding), SEQUENTIAL),
        "scales": torch.nn.functional.pad(scales_OG, padding),
    }


def decode_gemv(tensors: Tensors, group_size: int) -> Quantized:
    """The inverse of `encode_gemv`: the group size says where the padding begins."""
    codes_OI = unpack(tensors["qweight"], SEQUENTIAL)
    groups = codes_OI.shape[1] // (codes_OI.shape[1] if group_size == -1 else group_size)
    zeros_OG = unpack(tensors["qzeros"], SEQUENTIAL)[:, :groups].contiguous()
    return Quantized(codes_OI, tensors["scales"][:, :groups].contiguous(), zeros_OG)


def encode_compressed_tensors_symmetric(quantized: Quantized) -> dict[str, Tensor]:
    """compressed-tensors `pack-quantized` without zeros: `weight_packed` [O, ceil(I/8)], `weight_scale` [O, G].

    The format speaks of signed codes -8..7 and stores them with 8 added, which are our codes.
    InvalidInput when a zero is not 8.
    """
    if (quantized.zeros_OG != SYMMETRIC_ZERO).any():
        raise InvalidInput("these codes are not symmetric", "a zero is not 8", "use the layout compressed-tensors")
    codes_OI = quantized.codes_OI
    return {
        "weight_packed": pack(_fill_words(codes_OI), SEQUENTIAL),
        "weight_scale": quantized.scales_OG,
        "weight_shape": torch.tensor(codes_OI.shape, dtype=torch.int64),
    }


def encode_compressed_tensors(quantized: Quantized) -> dict[str, Tensor]:
    """compressed-tensors `pack-quantized` with `weight_zero_point` [ceil(O/8), G], packed along the outputs."""
    symmetric = quantized._replace(zeros_OG=torch.full_like(quantized.zeros_OG, SYMMETRIC_ZERO))
    zero_words_GW = pack(_fill_words(quantized.zeros_OG.t()), SEQUENTIAL)
    return encode_compressed_tensors_symmetric(symmetric) | {"weight_zero_point": zero_words_GW.t().contiguous()}


def decode_compressed_tensors(tensors: Tensors, group_size: int) -> Quantized:
    """The inverse of both: `weight_shape` says where the padding begins, absent zeros are 8."""
    outputs, inputs = tensors["weight_shape"].tolist()
    scales_OG = tensors["weight_scale"]
    if "weight_zero_point" in tensors:
        zeros_OG = unpack(tensors["weight_zero_point"].t(), SEQUENTIAL).t()[:outputs].contiguous()
    else:
        zeros_OG = torch.full_like(scales_OG, SYMMETRIC_ZERO, dtype=torch.uint8)
    codes_OI = unpack(tensors["weight_packed"], SEQUENTIAL)[:, :inputs].contiguous()
    return Quantized(codes_OI, scales_OG, zeros_OG)


def _fill_words(codes_RC: Tensor) -> Tensor:
    return torch.nn.functional.pad(codes_RC, (0, -codes_RC.shape[-1] % CODES_PER_WORD))


LAYOUTS: dict[str, Layout] = {
    "awq": Layout(encode_awq, decode_awq),
    "gemv": Layout(encode_gemv, decode_gemv),
    "compressed-tensors": Layout(encode_compressed_tensors, decode_compressed_tensors),
    "compressed-tensors-symmetric": Layout(encode_compressed_tensors_symmetric, decode_compressed_tensors),
}
