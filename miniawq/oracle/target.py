"""miniawq in the shapes and names of the contract: the default target of the suite, and an example of an adapter."""

from pathlib import Path

from torch import Tensor

import miniawq
from miniawq import awq, checkpoint, kernel, packing

name, version = "miniawq", miniawq.__version__
pack, unpack = packing.pack, packing.unpack
dequantize, matmul = kernel.dequantize, kernel.matmul
search_scales, search_clip = awq.search_scales, awq.search_clip


def quantize(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Plain rounding; the contract has inputs first, miniawq has `nn.Linear`'s orientation."""
    codes_OI, scales_OG, zeros_OG = packing.quantize(weight, group_size)
    return codes_OI.t(), zeros_OG.t(), scales_OG.t()


def load_checkpoint(directory: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint that `load_model` would take, packed layers decoded."""
    opened = checkpoint.open_checkpoint(directory)
    checkpoint.skeleton(opened)
    packed = {tensor for linear in opened.quantized.values() for tensor in linear.tensors.values()}
    dense = {name: opened.read(name) for name in opened.tensors if name not in packed}
    for name in opened.quantized:
        quantized = opened.read_linear(name)
        assert isinstance(quantized, packing.Quantized)
        dense[f"{name}.weight"] = packing.dequantize(quantized)
    return dense
