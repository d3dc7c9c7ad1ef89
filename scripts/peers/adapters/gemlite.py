"""gemlite: `A16Wn` from codes, zeros and scales, made anew for each product; its words are its own, so ours are
unpacked here. Needs a CUDA GPU.
"""

import importlib
import sys
from typing import Any

from scripts.peers.adapters.files import file_module, folder_of, version_of

# The kernels read this module when they are imported: without tuning one configuration or two are built for each shape.
config = file_module(folder_of("gemlite") / "triton_kernels/config.py")
for kernel in config.MATMUL_DTYPES:
    setattr(config.AUTOTUNE, kernel, "default")
sys.modules["gemlite.triton_kernels.config"] = config

from torch import Tensor  # noqa: E402

from miniawq.oracle import truth  # noqa: E402

A16Wn = importlib.import_module("gemlite.helper").A16Wn

name, version = "gemlite", version_of("gemlite")
multiple_of_k, multiple_of_n = 32, 32
dtypes = ("float16", "bfloat16")


def matmul(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, bias: Any = None) -> Tensor:
    size = len(qweight) if group_size == -1 else group_size
    codes, zeros = (truth.unpack(words).t().contiguous() for words in (qweight, qzeros))
    linear = A16Wn(device=x.device, dtype=x.dtype).from_weights(codes, scales.t().contiguous(), zeros, 4, size, bias)
    return linear(x)
