"""GPTQModel: its copy of `packing_utils`, and its `pseudo_quantize_tensor` in the dtype of the weight."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from scripts.peers.adapters.files import codes_of, file_module, folder_of, method, size_of, version_of

ROOT = folder_of("gptqmodel")
packing = file_module(ROOT / "quantization/awq/utils/packing_utils.py")
quantizer = method(ROOT / "looper/awq_processor.py", "pseudo_quantize_tensor")

name, version = "GPTQModel", version_of("gptqmodel")


def pack(codes: Tensor) -> Tensor:
    return packing.pack_awq(codes, codes, 4)[0]


def unpack(words: Tensor) -> Tensor:
    codes, _ = packing.reverse_awq_order(*packing.unpack_awq(words, words, 4), 4)
    return codes.to(torch.uint8)


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    return packing.dequantize_gemm(qweight, qzeros, scales, 4, size_of(group_size, len(qweight)))


def quantize(weight: Tensor, group_size: int) -> Any:
    me = SimpleNamespace(qcfg=SimpleNamespace(group_size=group_size, sym=False, bits=4))
    fake, scales, zeros = quantizer(me, weight)
    return codes_of(fake, scales, zeros, group_size), zeros.t().to(torch.uint8), scales.t().half()
