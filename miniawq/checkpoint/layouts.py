"""The layouts in which files hold a quantized weight: AutoAWQ GEMM (`packing.py`), AutoAWQ GEMV, compressed-tensors."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from miniawq.errors import InvalidInput
from miniawq.packing import CODES_PER_WORD, SEQUENTIAL, SYMMETRIC_ZERO, Quantized, decode_awq, encode_awq, pack, unpack

Tensors = Mapping[str, Tensor]


class Layout(NamedTuple):
    """How one file format stores a quantized weight; `decode(encode(q), q.group_size)` is `q`, bit for bit."""

    encode: Callable[[Quantized], dict[str, Tensor]]
    decode: Callable[[Tensors, int], Quantized]


def gemv_zero_words(groups: int, group_size: int) -> int:
    """Words W in a row of `qzeros` of the GEMV layout, padded for its kernel (AutoAWQ's `calculate_zeros_width`)."""
    multiple = 1 if group_size >= 128 else 2 if group_size == 64 else 4
    words = -(-groups // CODES_PER_WORD)
    return -(-words // multiple) * multiple


def encode_gemv(quantized: Quantized) -> dict[str, Tensor]:
    """AutoAWQ GEMV: `qweight` [O, I/8], `qzeros` [O, W], `scales` [O, 8 W], codes in order, padded with zeros."""
    codes_OI, scales_OG, zeros_OG = quantized
    words = gemv_zero_words(scales_OG.shape[1], quantized.group_size)
    padding = (0, words * CODES_PER_WORD - scales_OG.shape[1])
    return {
        "qweight": pack(codes_OI, SEQUENTIAL),
        "qzeros": pack(pad(zeros_OG, padding), SEQUENTIAL),
        "scales": pad(scales_OG, padding),
    }


def decode_gemv(tensors: Tensors, group_size: int) -> Quantized:
    """The inverse of `encode_gemv`; the group size says where the padding begins."""
    codes_OI = unpack(tensors["qweight"], SEQUENTIAL)
    groups = codes_OI.shape[1] // (codes_OI.shape[1] if group_size == -1 else group_size)
    zeros_OG = unpack(tensors["qzeros"], SEQUENTIAL)[:, :groups].contiguous()
    return Quantized(codes_OI, tensors["scales"][:, :groups].contiguous(), zeros_OG)


def encode_compressed_tensors_symmetric(quantized: Quantized) -> dict[str, Tensor]:
    """compressed-tensors `pack-quantized` without zeros: `weight_packed` [O, ceil(I/8)], `weight_scale` [O, G].

    The format has signed codes -8..7 and stores them with 8 added: these are our codes.
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
    """The inverse of both encoders; `weight_shape` says where the padding begins, absent zeros are 8."""
    outputs, inputs = tensors["weight_shape"].tolist()
    scales_OG = tensors["weight_scale"]
    if "weight_zero_point" in tensors:
        zeros_OG = unpack(tensors["weight_zero_point"].t(), SEQUENTIAL).t()[:outputs].contiguous()
    else:
        zeros_OG = torch.full_like(scales_OG, SYMMETRIC_ZERO, dtype=torch.uint8)
    codes_OI = unpack(tensors["weight_packed"], SEQUENTIAL)[:, :inputs].contiguous()
    return Quantized(codes_OI, scales_OG, zeros_OG)


def _fill_words(codes_RC: Tensor) -> Tensor:
    return pad(codes_RC, (0, -codes_RC.shape[-1] % CODES_PER_WORD))


LAYOUTS: dict[str, Layout] = {
    "awq": Layout(encode_awq, lambda tensors, group_size: decode_awq(tensors)),
    "gemv": Layout(encode_gemv, decode_gemv),
    "compressed-tensors": Layout(encode_compressed_tensors, decode_compressed_tensors),
    "compressed-tensors-symmetric": Layout(encode_compressed_tensors_symmetric, decode_compressed_tensors),
}


def part_shapes(
    layout: str, inputs: int, outputs: int, groups: int, scale_dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of each part that the layout's encoder makes, known before there are values."""
    if layout == "awq":
        return {
            "qweight": (torch.int32, (inputs, outputs // CODES_PER_WORD)),
            "qzeros": (torch.int32, (groups, outputs // CODES_PER_WORD)),
            "scales": (scale_dtype, (groups, outputs)),
        }
    parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight_packed": (torch.int32, (outputs, words_for(inputs))),
        "weight_scale": (scale_dtype, (outputs, groups)),
        "weight_shape": (torch.int64, (2,)),
    }
    if layout == "compressed-tensors":
        parts["weight_zero_point"] = (torch.int32, (words_for(outputs), groups))
    return parts


def words_for(codes: int) -> int:
    """Words that hold `codes` codes; the last one may have room left."""
    return -(-codes // CODES_PER_WORD)
