"""A second definition of reading a checkpoint: strict, small, and apart from miniawq's own reader.

Shapes that a Llama must have are worked out from config.json first; whatever does not fit them is refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import miniawq.oracle.truth as truth

NORMS = ("input_layernorm", "post_attention_layernorm")


class Refused(ValueError):
    """A directory that cannot be read rightly."""


def load_checkpoint(directory: Path) -> dict[str, Tensor]:
    """Every tensor under its Hugging Face name, quantized linears as dense weights [N, K]."""
    config = read_json(directory / "config.json")
    block = config.get("quantization_config") or read_side_block(directory)
    stored = read_tensors(directory)
    linears = shapes_of_linears(config)
    if "lm_head" in packed(stored):
        linears["lm_head"] = (config["hidden_size"], config["vocab_size"])
    result = {name: tensor for name, tensor in stored.items() if name.rpartition(".")[0] not in packed(stored)}
    result |= {name: tensor for name, tensor in stored.items() if name.endswith(".bias")}
    for linear in packed(stored):
        prefix = linear + "."
        parts = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
        if linear not in linears:
            raise Refused(f"{linear} is packed, but the model has no such linear layer")
        result[f"{linear}.weight"] = decode(linear, parts, {k.lower(): v for k, v in block.items()}, *linears[linear])
    check_shapes(result, dense_shapes(config, linears), config)
    return result


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise Refused(f"{path.name}: {error}") from error


def read_side_block(directory: Path) -> dict[str, Any]:
    """The block of a file of its own, or nothing."""
    path = directory / "quant_config.json"
    return read_json(path) if path.exists() else {}


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of the files that hold the model."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        if not (directory / "model.safetensors").exists():
            raise Refused("there is no model.safetensors; other formats, pickles above all, are not read")
        return read_file(directory / "model.safetensors")
    weight_map = read_json(index)["weight_map"]
    stored: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise Refused(f"the index names {file}, a path outside the directory")
        held = read_file(directory / file)
        stored |= {name: tensor for name, tensor in held.items() if weight_map.get(name) == file}
    absent = sorted(set(weight_map) - set(stored))
    if absent:
        raise Refused(f"the index names {absent[0]}, which no file holds")
    return stored


def read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of one file."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise Refused(f"{path.name}: {error}") from error


def packed(stored: dict[str, Tensor]) -> list[str]:
    """The linear layers with at least one packed part."""
    parts = ("qweight", "qzeros", "scales", "weight_packed")
    return sorted({name.rpartition(".")[0] for name in stored if name.rpartition(".")[2] in parts})


def shapes_of_linears(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """K and N of every linear layer but the head."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    keys = (config.get("num_key_value_heads") or heads) * head
    shapes = {"self_attn.q_proj": (hidden, heads * head), "self_attn.o_proj": (heads * head, hidden)}
    shapes |= {"self_attn.k_proj": (hidden, keys), "self_attn.v_proj": (hidden, keys)}
    shapes |= {"mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner), "mlp.down_proj": (inner, hidden)}
    layers = range(config["num_hidden_layers"])
    return {f"model.layers.{i}.{name}": shape for i in layers for name, shape in shapes.items()}


def dense_shapes(config: dict[str, Any], linears: dict[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor the model must have, quantized ones as dense weights."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (n, k) for name, (k, n) in linears.items()}
    shapes |= {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{norm}.weight": (hidden,) for norm in NORMS}
    biased = set(attention_with_bias(config))
    biased |= {"gate_proj", "up_proj", "down_proj"} if config.get("mlp_bias") else set()
    shapes |= {f"{name}.bias": (n,) for name, (_, n) in linears.items() if name.rpartition(".")[2] in biased}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def attention_with_bias(config: dict[str, Any]) -> tuple[str, ...]:
    """The projections of attention that have a bias: Qwen2 has three without saying so."""
    if config.get("model_type") == "qwen2":
        return ("q_proj", "k_proj", "v_proj")
    return ("q_proj", "k_proj", "v_proj", "o_proj") if config.get("attention_bias") else ()


def check_shapes(result: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> None:
    """Refuse what is missing or of another shape."""
    for name, shape in shapes.items():
        if name not in result:
            raise Refused(f"{name} is missing")
        if tuple(result[name].shape) != shape:
            raise Refused(f"{name} has the shape {tuple(result[name].shape)}, the config asks for {shape}")


def decode(linear: str, parts: dict[str, Tensor], block: dict[str, Any], k: int, n: int) -> Tensor:
    """The dense weight [N, K] of one packed layer, by the method its block names."""
    method = str(block.get("quant_method", "awq")).lower()
    if method == "awq":
        return decode_gemm(linear, parts, block, k, n)
    if method == "compressed-tensors":
        return decode_compressed(linear, parts, block, k, n)
    raise Refused(f"quant_method {method} is not read")


def decode_gemm(linear: str, parts: dict[str, Tensor], block: dict[str, Any], k: int, n: int) -> Tensor:
    bits, size = block.get("bits", block.get("w_bit")), int(block.get("group_size", block.get("q_group_size", 0)))
    if bits != 4:
        raise Refused(f"bits {bits}")
    if str(block.get("version")).lower() != "gemm":
        raise Refused(f"version {block.get('version')}")
    groups = 1 if size == -1 else k // size
    wanted = {"qweight": (k, n // 8), "qzeros": (groups, n // 8), "scales": (groups, n)}
    check_parts(linear, parts, wanted, f"group_size {size}")
    return truth.dequantize(parts["qweight"], parts["qzeros"], parts["scales"], size).t().contiguous()


def decode_compressed(linear: str, parts: dict[str, Tensor], block: dict[str, Any], k: int, n: int) -> Tensor:
    settings = block["config_groups"]["group_0"]["weights"]
    if block["format"] != "pack-quantized" or settings["num_bits"] != 4 or settings.get("actorder"):
        told = f"{settings['num_bits']} bits, actorder {settings.get('actorder')}"
        raise Refused(f"format {block['format']}, {told}")
    groups = 1 if settings["strategy"] == "channel" else k // settings["group_size"]
    wanted = {"weight_packed": (n, k // 8), "weight_scale": (n, groups), "weight_shape": (2,)}
    if not settings["symmetric"]:
        wanted["weight_zero_point"] = (n // 8, groups)
    elif "weight_zero_point" in parts:
        raise Refused(f"{linear}.weight_zero_point, but the config says symmetric")
    check_parts(linear, parts, wanted, f"group_size {settings['group_size']}")
    if parts["weight_shape"].tolist() != [n, k]:
        raise Refused(f"{linear}.weight_shape is {parts['weight_shape'].tolist()}, the config asks for {[n, k]}")
    zeros = torch.full((groups, n), 8) if settings["symmetric"] else nibbles(parts["weight_zero_point"].t())
    scales = parts["weight_scale"]
    exact = truth.real_weight(nibbles(parts["weight_packed"]).t(), zeros, scales.t(), k // groups)
    return exact.t().to(torch.float32).to(scales.dtype).contiguous()


def nibbles(words: Tensor) -> Tensor:
    """Words [R, W] to codes [R, 8 W], nibble i being column i."""
    shifts = 4 * torch.arange(8)
    return ((words.to(torch.int64) % 2**32).unsqueeze(-1) >> shifts & 15).flatten(1).to(torch.uint8)


def check_parts(linear: str, parts: dict[str, Tensor], wanted: Mapping[str, tuple[int, ...]], told: str) -> None:
    """Refuse parts that are missing, of another shape, or no 32-bit words."""
    for part, shape in wanted.items():
        if part not in parts:
            raise Refused(f"{linear}.{part} is missing ({told})")
        if tuple(parts[part].shape) != shape:
            raise Refused(f"{linear}.{part} has the shape {tuple(parts[part].shape)}, not {shape} ({told})")
        if part in ("qweight", "qzeros", "weight_packed", "weight_zero_point") and parts[part].dtype != torch.int32:
            raise Refused(f"{linear}.{part} has the dtype {parts[part].dtype}, not int32")
        if "scale" in part and not parts[part].is_floating_point():
            raise Refused(f"{linear}.{part} has the dtype {parts[part].dtype}")
