"""Small checkpoints in every layout, as other tools write them: random weights, files by safetensors' own writer."""

import copy
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from miniawq.checkpoint.config import llama_config
from miniawq.checkpoint.layouts import LAYOUTS
from miniawq.model import Llama
from miniawq.packing import Quantized, dequantize, quantize
from miniawq.quantize.grids import GRIDS
from tests.helpers.marks import thorough_but

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 48,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biased": {"attention_bias": True, "mlp_bias": True},
    "llama-tied": {"tie_word_embeddings": True},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": None},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 64, "use_sliding_window": False},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 48},
    "phi3": {"architectures": ["Phi3ForCausalLM"]},
    "granite4": {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "shared_intermediate_size": 256,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.3,
    },
    "glm4": {"architectures": ["Glm4ForCausalLM"], "attention_bias": True},
    "olmo2": {"architectures": ["Olmo2ForCausalLM"]},
}
# For tests that take seconds: one of each way in which families differ runs thoroughly only.
THOROUGH = ("phi3", "granite4", "glm4", "olmo2")
SOME_THOROUGHLY = thorough_but(FAMILIES.keys() - {*THOROUGH}, FAMILIES)
AWQ_BLOCK = {
    "quant_method": "awq",
    "zero_point": True,
    "group_size": 64,
    "bits": 4,
    "version": "gemm",
    "modules_to_not_convert": None,
}
CT_WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64}
CT_BLOCK = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": CT_WEIGHTS, "input_activations": None}},
    "ignore": ["lm_head"],
}
# What `make` takes for each kind of packed file, by name.
PACKINGS = {
    "awq": {"layout": "awq"},
    "awq-bf16-scales": {"layout": "awq", "scale_dtype": torch.bfloat16},
    "awq-fp32-scales": {"layout": "awq", "scale_dtype": torch.float32},
    "gemv": {"layout": "gemv"},
    "gemv-32": {"layout": "gemv", "group_size": 32, "block": AWQ_BLOCK | {"version": "gemv", "group_size": 32}},
    "compressed-tensors": {"layout": "compressed-tensors"},
    "compressed-tensors-symmetric": {
        "layout": "compressed-tensors-symmetric",
        "grid": "symmetric",
        "block": CT_BLOCK
        | {"config_groups": {"g": {"targets": ["Linear"], "weights": CT_WEIGHTS | {"symmetric": True}}}},
    },
    "compressed-tensors-channel": {
        "layout": "compressed-tensors",
        "group_size": -1,
        "block": CT_BLOCK
        | {
            "config_groups": {
                "g": {"weights": CT_WEIGHTS | {"strategy": "channel", "group_size": None}, "targets": ["Linear"]}
            }
        },
    },
    "compressed-tensors-bf16-scales": {"layout": "compressed-tensors", "scale_dtype": torch.bfloat16},
}
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def config_of(family: str = "llama", **changes: Any) -> dict[str, Any]:
    return CONFIG | FAMILIES[family] | changes


def dense_model(config: Mapping[str, Any], seed: int = 0) -> Llama:
    """A float32 model whose biases and norms matter."""
    torch.manual_seed(seed)
    model = Llama(llama_config(config)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.normal_(mean=float("norm" in name), std=0.3)
    return model


def quantized_linears(model: Llama, also: tuple[str, ...] = ()) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and (name != "lm_head" or name in also)
    ]


def pack_model(
    model: Llama,
    layout: str = "awq",
    group_size: int = 64,
    scale_dtype: torch.dtype = torch.float16,
    grid: str = "asymmetric",
    also: tuple[str, ...] = (),
    leave: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """The tensors of the packed model; the model's own weights become what the codes stand for."""
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    for name in quantized_linears(model, also):
        if name in leave:
            continue
        weight = model.get_submodule(name).weight
        packed = quantize(weight, group_size, GRIDS[grid], scale_dtype)
        weight.copy_(dequantize(packed, torch.float32))
        tensors.pop(f"{name}.weight")
        tensors |= {f"{name}.{part}": tensor for part, tensor in LAYOUTS[layout].encode(packed).items()}
    return tensors


def write(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], shards: int = 0) -> Path:
    """A checkpoint as transformers lays it out, in one file or in `shards` with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if not shards:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    files = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
    weight_map = {name: files[position % shards] for position, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, directory / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@functools.cache
def _packed(config: str, layout: str, **packing: Any) -> tuple[dict[str, Tensor], Llama]:
    model = dense_model(json.loads(config))
    return pack_model(model, layout, **packing), model


def make(
    directory: Path,
    layout: str = "awq",
    family: str = "llama",
    block: Mapping[str, Any] | None = None,
    shards: int = 0,
    changes: Mapping[str, Any] | None = None,
    stored: torch.dtype = torch.float32,
    **packing: Any,
) -> tuple[Path, Llama]:
    """A checkpoint and the dense model of the same codes. Block None stands for the usual one of the layout.

    Dense tensors are `stored` in that dtype, and in float32 in the model.
    """
    config = config_of(family, **(changes or {}))
    tensors, model = copy.deepcopy(_packed(json.dumps(config), layout, **packing))
    dense = tensors.keys() & model.state_dict().keys()
    tensors |= {name: tensors[name].to(stored) for name in dense}
    if block is None:
        block = (
            CT_BLOCK
            if layout.startswith("compressed")
            else AWQ_BLOCK | {"version": {"awq": "gemm"}.get(layout, layout)}
        )
    config |= {"quantization_config": block} if block else {}
    return write(directory, config, tensors, shards), model


def make_dense(directory: Path, family: str = "llama", **changes: Any) -> tuple[Path, Llama]:
    config = config_of(family, **changes)
    model = dense_model(config)
    tensors = dict(model.state_dict())
    if config.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight")
    return write(directory, config, tensors), model


def make_with_its_own_head(directory: Path, layout: str = "awq") -> tuple[Path, Llama]:
    """config.json says that the head is tied, and a head with other values is stored. The model has that head."""
    _, model = make(directory, layout, family="llama-tied")
    untied = dense_model(config_of())
    untied.load_state_dict(model.state_dict())
    untied.lm_head.weight = torch.nn.Parameter(torch.randn(48, 128), requires_grad=False)
    file = directory / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": untied.lm_head.weight.clone()}, file)
    return directory, untied


def same(first: Quantized, second: Quantized) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(first, second, strict=True))
