"""miniawq in the shapes and names of the contract: the default target of the suite, and an example of an adapter."""

from torch import Tensor

import miniawq
from miniawq import kernel, packing

name, version = "miniawq", miniawq.__version__
pack, unpack = packing.pack, packing.unpack
dequantize, matmul = kernel.dequantize, kernel.matmul


def quantize(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Plain rounding; the contract has inputs first, miniawq has `nn.Linear`'s orientation."""
    codes_OI, scales_OG, zeros_OG = packing.quantize(weight, group_size)
    return codes_OI.t(), zeros_OG.t(), scales_OG.t()
