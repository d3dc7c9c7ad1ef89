"""compressed-tensors: its AutoAWQ converter and its decompressor, its quantization parameters and codes."""

from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import quantize as to_codes
from compressed_tensors.quantization.utils.helpers import calculate_qparams
from torch import Tensor

from scripts.peers.adapters.files import size_of, version_of

name, version = "compressed-tensors", version_of("compressed-tensors")
multiple_of_n = 16  # unpack_from_int32 cannot view one transposed row of packed zeros as bytes, so N = 8 fails


def settings(group_size: int) -> QuantizationArgs:
    """INT4 with zeros, in groups or one a channel."""
    strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    return QuantizationArgs(num_bits=4, type="int", symmetric=False, **strategy)


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    tensors = {"m.qweight": qweight, "m.qzeros": qzeros, "m.scales": scales}
    converted = AutoAWQConverter(group_size=group_size).process(tensors)
    local = {name.removeprefix("m."): tensor for name, tensor in converted.items()}
    scheme = QuantizationScheme(targets=["Linear"], weights=settings(group_size))
    return PackedQuantizationCompressor.decompress(local, scheme)["weight"].t()


def quantize(weight: Tensor, group_size: int) -> Any:
    args, size = settings(group_size), size_of(group_size, weight.shape[1])
    if weight.shape[1] % size:
        to_codes(weight, torch.ones(len(weight), 1), torch.zeros(len(weight), 1), args, dtype=torch.int8)
    groups = weight.unflatten(1, (-1, size))
    scales, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    codes = to_codes(weight, scales, zeros, args, dtype=torch.int8)
    return (codes + 8).t().to(torch.uint8), (zeros + 8).t().to(torch.uint8), scales.t().half()
