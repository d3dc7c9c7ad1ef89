"""The Triton kernels that vLLM and AutoAWQ share; leading dimensions and bias as in WQLinear."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

Functions = tuple[Callable[..., Tensor], Callable[..., Tensor]]


def functions(kernels: ModuleType) -> Functions:
    """`dequantize` and `matmul` of a file of kernels."""

    def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
        return kernels.awq_dequantize_triton(qweight, scales, qzeros)

    def matmul(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, bias: Any = None) -> Tensor:
        y = kernels.awq_gemm_triton(x.reshape(-1, x.shape[-1]), qweight, scales, qzeros, 8)
        return (y if bias is None else y + bias).reshape(*x.shape[:-1], y.shape[-1])

    return dequantize, matmul
