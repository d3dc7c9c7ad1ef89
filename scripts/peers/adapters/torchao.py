"""torchao: affine parameters, codes and values; the int4 matmul of PyTorch for CPUs. Words are unpacked here."""

from typing import Any

import torch
from torch import Tensor
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

from miniawq.oracle import truth
from scripts.peers.adapters.files import size_of, version_of

name, version = "torchao", version_of("torchao")
group_sizes, multiple_of_n = (32, 64, 128), 16


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    codes = truth.unpack(qweight).t().contiguous()
    zeros, size = truth.unpack(qzeros).t(), size_of(group_size, codes.shape[1])
    return dequantize_affine(codes, (1, size), scales.t(), zeros.int(), torch.uint8, 0, 15,
                             output_dtype=torch.float16).t()  # fmt: skip


def quantize(weight: Tensor, group_size: int) -> Any:
    size = size_of(group_size, weight.shape[1])
    scales, zeros = choose_qparams_affine(weight, MappingType.ASYMMETRIC, (1, size), torch.uint8, 0, 15, eps=1e-6)
    codes = quantize_affine(weight, (1, size), scales, zeros, torch.uint8, 0, 15)
    shape = (len(weight), -1)
    return codes.t(), zeros.reshape(shape).t().to(torch.uint8), scales.reshape(shape).t().half()


def matmul(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, bias: Any = None) -> Tensor:
    codes, zeros = truth.unpack(qweight).t().contiguous().int(), truth.unpack(qzeros).to(x.dtype)
    if zeros.shape != scales.shape:
        raise ValueError("the pairs of scales and zeros are made here")
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = scales.to(x.dtype)
    pairs = torch.stack([scales, (8 - zeros) * scales], dim=-1)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, packed, size_of(group_size, len(qweight)), pairs)
    return (y if bias is None else y + bias).reshape(*x.shape[:-1], len(codes))
