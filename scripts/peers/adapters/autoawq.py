"""AutoAWQ: `packing_utils`, the packer of `WQLinear_GEMM`, `pseudo_quantize_tensor` on float16 weights."""

import importlib
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from scripts.peers.adapters.files import (
    codes_of,
    file_module,
    folder_of,
    hollow_packages,
    method,
    size_of,
    version_of,
)

ROOT = folder_of("awq")
packing = file_module(ROOT / "utils/packing_utils.py")
hollow_packages(ROOT, "awq", "awq.utils", "awq.modules", "awq.modules.linear", "awq.modules.triton")
sys.modules["awq.utils.utils"] = SimpleNamespace(get_best_device=lambda: "cpu")  # type: ignore[assignment]
gemm = importlib.import_module("awq.modules.linear.gemm")
quantizer = method(ROOT / "quantize/quantizer.py", "pseudo_quantize_tensor")

name, version = "AutoAWQ", version_of("autoawq")
multiple_of_n = 32  # the packer makes N // 32 * 4 words: any N that 32 does not divide ends in an IndexError


def pack(codes: Tensor) -> Tensor:
    k, n = codes.shape
    linear = torch.nn.Linear(k, n, bias=False)
    linear.weight.data = codes.t().float()
    layer = gemm.WQLinear_GEMM.from_linear(linear, 4, k, scales=torch.ones(1, n), zeros=torch.zeros(1, n))
    return layer.qweight


def unpack(words: Tensor) -> Tensor:
    codes, _ = packing.reverse_awq_order(*packing.unpack_awq(words, words, 4), 4)
    return torch.bitwise_and(codes, 15).to(torch.uint8)


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    return packing.dequantize_gemm(qweight, qzeros, scales, 4, size_of(group_size, len(qweight)))


def quantize(weight: Tensor, group_size: int) -> Any:
    me = SimpleNamespace(group_size=group_size, zero_point=True, w_bit=4)
    fake, scales, zeros = quantizer(me, weight.half())
    return codes_of(fake, scales, zeros, group_size), zeros.t().to(torch.uint8), scales.t()
