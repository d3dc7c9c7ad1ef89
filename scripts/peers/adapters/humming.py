"""humming-kernels: its layer made of AutoAWQ's tensors, anew for each product. Needs a CUDA GPU."""

from typing import Any

from humming.layer import HummingLayer
from torch import Tensor

from scripts.peers.adapters.files import version_of

name, version = "humming", version_of("humming-kernels")
group_sizes = (64, 128)
multiple_of_k, multiple_of_n = 128, 128  # its tiles: other multiples of 64 outputs end in an AssertionError
dtypes = ("bfloat16", "float16")


def matmul(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, bias: Any = None) -> Tensor:
    layer = HummingLayer(
        shape_n=scales.shape[1],
        shape_k=len(qweight),
        weight_config={"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True},
        torch_dtype=x.dtype,
        has_bias=bias is not None,
    ).to(x.device)
    tensors = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
    layer.load_from_tensors(tensors if bias is None else {**tensors, "bias": bias})
    layer.transform()
    return layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], scales.shape[1])
