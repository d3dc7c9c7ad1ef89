"""Tiny checkpoints for L4, built on the spot: valid ones with the tensors they stand for, and ones to be refused.

All are small models of the Llama family, of one layer with 64 inputs and groups of 32 unless told otherwise, written
with safetensors and `truth`. `model` makes one; the cases of `checkpoints` change a key, a tensor or a file of it.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import miniawq.oracle.cases as cases

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ATTENTION = "model.layers.0.self_attn"
PROJECTIONS = [*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))]
LINEARS = [f"model.layers.0.{name}" for name in PROJECTIONS]
VOCABULARY = 16


@dataclass
class Model:
    """A checkpoint before it is written: its config, its files of tensors, and what a reader must give."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    expected: dict[str, Tensor]
    layers: dict[str, cases.PackedCase]
    texts: dict[str, str] = field(default_factory=dict)
    shards: dict[str, list[str]] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """The directory, as a tool would have left it."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config, indent=1))
        for name, text in self.texts.items():
            (directory / name).write_text(text)
        for file, names in (self.shards or {WEIGHTS: list(self.tensors)}).items():
            tensors = {name: self.tensors[name].contiguous() for name in names}
            save_file(tensors, directory / file, metadata={"format": "pt"})
        if self.shards:
            weight_map = {name: file for file, names in self.shards.items() for name in names}
            (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def sequential(codes: Tensor) -> Tensor:
    """Codes [R, C] to words [R, C / 8] with nibble i holding column i: GEMV, GPTQ and compressed-tensors."""
    words = sum(codes[:, i::8].to(torch.int64) << 4 * i for i in range(8))
    assert isinstance(words, Tensor)
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)


def gemm(layer: cases.PackedCase) -> dict[str, Tensor]:
    qweight, qzeros, scales, _ = layer.packed
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales}


def gemv(layer: cases.PackedCase) -> dict[str, Tensor]:
    """AutoAWQ GEMV, groups of 32: four words of zeros at least (`calculate_zeros_width`)."""
    groups, n = layer.scales.shape
    width = (groups + 31) // 32 * 4
    padded = torch.zeros(n, width * 8, dtype=torch.uint8)
    padded[:, :groups] = layer.zeros.t()
    scales = torch.zeros(n, width * 8, dtype=torch.float16)
    scales[:, :groups] = layer.scales.t()
    return {"qweight": sequential(layer.codes.t()), "qzeros": sequential(padded), "scales": scales}


def gptq(layer: cases.PackedCase) -> dict[str, Tensor]:
    """GPTQ version 1: packed along the inputs, zeros less one."""
    k = layer.codes.shape[0]
    return {
        "qweight": sequential(layer.codes.t()).t(),
        "qzeros": sequential((layer.zeros.to(torch.int16) - 1).clamp(min=0).to(torch.uint8)),
        "scales": layer.scales,
        "g_idx": (torch.arange(k) // layer.group_size).to(torch.int32),
    }


def compressed(layer: cases.PackedCase) -> dict[str, Tensor]:
    """compressed-tensors pack-quantized, asymmetric: zeros packed along the outputs."""
    return {
        "weight_packed": sequential(layer.codes.t()),
        "weight_scale": layer.scales.t(),
        "weight_zero_point": sequential(layer.zeros).t(),
        "weight_shape": torch.tensor(layer.codes.t().shape, dtype=torch.int64),
    }


def compressed_symmetric(layer: cases.PackedCase) -> dict[str, Tensor]:
    """compressed-tensors pack-quantized, symmetric: all zeros are 8 and not stored."""
    parts = compressed(layer)
    del parts["weight_zero_point"]
    return parts


AWQ_BLOCK = {
    "quant_method": "awq",
    "zero_point": True,
    "group_size": 32,
    "bits": 4,
    "version": "gemm",
    "modules_to_not_convert": None,
}


def compressed_block(**weights: Any) -> dict[str, Any]:
    """The block of compressed-tensors; `weights` changes its settings."""
    settings = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    settings |= {"dynamic": False, "actorder": None, "observer": "minmax"} | weights
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": settings, "input_activations": None}},
        "ignore": ["lm_head"],
    }


def linear_shape(name: str, hidden: int, inner: int, head: int, key_heads: int) -> tuple[int, int]:
    """K and N of a linear layer: two query heads, one or two of keys and values."""
    last = name.rsplit(".", 1)[1]
    outputs = {"q_proj": 2 * head, "gate_proj": inner, "up_proj": inner}
    outputs |= {"k_proj": key_heads * head, "v_proj": key_heads * head}
    return {"o_proj": 2 * head, "down_proj": inner}.get(last, hidden), outputs.get(last, hidden)


def model(
    encode: Callable[[cases.PackedCase], dict[str, Tensor]] = gemm,
    block: dict[str, Any] | None = None,
    hidden: int = 64,
    head: int = 32,
    group_size: int = 32,
    scale_dtype: torch.dtype = torch.float16,
    dense: tuple[str, ...] = (),
    symmetric: bool = False,
    layers: int = 1,
    inner: int | None = None,
    key_heads: int = 1,
) -> Model:
    """A Llama whose linear layers, but for those named in `dense`, are packed by `encode`."""
    random, inner = Random(hidden + group_size), inner or hidden
    tensors = {"model.embed_tokens.weight": cases.normal(random, VOCABULARY, hidden).half()}
    for i in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = cases.normal(random, hidden).half()
    tensors["model.norm.weight"] = cases.normal(random, hidden).half()
    tensors["lm_head.weight"] = cases.normal(random, VOCABULARY, hidden).half()
    expected, packed = dict(tensors), {}
    for seed, name in enumerate(f"model.layers.{i}.{name}" for i in range(layers) for name in PROJECTIONS):
        layer = cases.random_layer(seed, *linear_shape(name, hidden, inner, head, key_heads), group_size)
        if symmetric:
            layer.zeros.fill_(8)
        if scale_dtype != torch.float16:
            layer = cases.PackedCase(layer.codes, layer.zeros, layer.scales.to(scale_dtype), group_size)
        weight = layer.weight.t().to(torch.float32).to(scale_dtype)
        expected[f"{name}.weight"] = weight.contiguous()
        packed[name] = layer
        if name in dense:
            tensors[f"{name}.weight"] = expected[f"{name}.weight"]
        else:
            tensors |= {f"{name}.{part}": tensor for part, tensor in encode(layer).items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": key_heads,
        "head_dim": head,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 64,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    if block is None:
        block = AWQ_BLOCK | {"group_size": group_size, "modules_to_not_convert": list(dense) or None}
    return Model(config | ({"quantization_config": block} if block else {}), tensors, expected, packed)


def in_two_shards(made: Model) -> Model:
    """The same tensors in two files with an index."""
    names = list(made.tensors)
    middle = len(names) // 2
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    made.shards = {first: names[:middle], second: names[middle:]}
    return made


def in_three_shards(made: Model) -> Model:
    """The same tensors in three files with an index, the parts of one layer in different ones."""
    names = list(made.tensors)
    made.shards = {f"model-{i + 1:05}-of-00003.safetensors": names[i::3] for i in range(3)}
    return made
