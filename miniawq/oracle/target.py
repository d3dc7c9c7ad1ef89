"""miniawq in the shapes and names of the contract: the default target of the suite, and an example of an adapter."""

from pathlib import Path

import torch
from torch import Tensor, nn

import miniawq
from miniawq import awq, kernel, packing
from miniawq.checkpoint.opening import open_checkpoint

name, version = "miniawq", miniawq.__version__
pack, unpack = packing.pack, packing.unpack
dequantize, matmul = kernel.dequantize_words, kernel.matmul


def quantize(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Plain rounding; the contract has inputs first, miniawq has the orientation of `nn.Linear`."""
    codes_OI, scales_OG, zeros_OG = packing.quantize(weight, group_size)
    return codes_OI.t(), zeros_OG.t(), scales_OG.t()


def load_checkpoint(directory: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint that `load_model` would take, packed layers decoded."""
    opened = open_checkpoint(directory)
    packed = {tensor for linear in opened.quantized.values() for tensor in linear.tensors.values()}
    dense = {name: opened.read(name) for name in opened.tensors if name not in packed}
    for name in opened.quantized:
        quantized = opened.read_linear(name)
        assert isinstance(quantized, packing.Quantized)
        dense[f"{name}.weight"] = packing.dequantize(quantized)
    return dense


@torch.no_grad()
def search_scales(weight: Tensor, x: Tensor, group_size: int = 128) -> Tensor:
    """The factors of the paper for a block that is one linear layer after a norm."""
    weight_OI = weight.float()
    block = nn.Module()
    block.norm = nn.RMSNorm(weight_OI.shape[1], device=weight.device)
    block.linear = nn.Linear(1, 1, bias=False)
    block.linear.weight = nn.Parameter(weight_OI, requires_grad=False)
    fold = awq.Fold("norm", ("linear",), "linear")
    return awq.PAPER.factors(block, fold, statistics_of(x), awq.Rounding(group_size)).factors_P


@torch.no_grad()
def search_clip(weight: Tensor, x: Tensor, group_size: int = 128) -> Tensor:
    """The largest magnitude in each range that the paper's clipping finds."""
    ranges_OG2 = awq.PAPER.ranges("linear", weight.float(), statistics_of(x), awq.Rounding(group_size))
    return ranges_OG2.abs().amax(-1)


def statistics_of(x: Tensor) -> awq.Statistics:
    """What a layer sees of inputs [T, K]."""
    statistics = awq.Statistics(x.shape[1], x.device)
    statistics.add(x.float())
    statistics.finish()
    return statistics
