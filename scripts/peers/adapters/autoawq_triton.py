"""AutoAWQ's copy of vLLM's Triton kernels."""

import contextlib

from scripts.peers.adapters.files import file_module, folder_of, version_of
from scripts.peers.adapters.triton_kernels import functions

kernels = file_module(folder_of("awq") / "modules/triton/gemm.py")
kernels.get_same_device_cm = lambda tensor: contextlib.nullcontext()

name, version = "AutoAWQ Triton", version_of("autoawq")
dtypes = ("float16",)
dequantize, matmul = functions(kernels)
