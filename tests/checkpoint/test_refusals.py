"""What does not load: refused by name, with the file and the key, before any wrong text."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from miniawq.checkpoint.loading import load_model
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.errors import NotFound, UnsupportedCheckpoint
from tests.helpers import tiny_checkpoints as tiny

Q = "model.layers.0.self_attn.q_proj"  # square: 128 to 128
DOWN = "model.layers.0.mlp.down_proj"  # 256 to 128


def refused(directory: Path, *words: str) -> None:
    with pytest.raises(UnsupportedCheckpoint) as caught:
        load_model(open_checkpoint(directory), dtype=torch.float32)
    assert caught.value.exit_code == 3
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert len(text.splitlines()) in (2, 3)


def edit_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(directory / "model.safetensors")), directory / "model.safetensors")


# name: changes to the quantization block of an AutoAWQ checkpoint, words of the message
AWQ_SETTINGS = {
    "bits-3": ({"bits": 3}, ["bits = 3", "quantization_config"]),
    "w_bit-8": ({"bits": None, "w_bit": 8}, ["bits = 8"]),
    "gemv_fast": ({"version": "gemv_fast"}, ["GEMV_FAST", "version"]),
    "llm-awq": ({"version": "llm-awq"}, ["llm-awq", "version"]),
    "marlin": ({"version": "marlin"}, ["Marlin", "version"]),
    "version-unknown": ({"version": "gemm2"}, ["version = 'gemm2'"]),
    "checkpoint_format-gptq": ({"version": None, "checkpoint_format": "gptq"}, ["GPTQ", "quantization_config"]),
    "desc_act": ({"desc_act": True}, ["desc_act"]),
    "dynamic": ({"dynamic": {"+:.*down.*": {"bits": 8}}}, ["dynamic"]),
    "pack_dtype": ({"pack_dtype": "int16"}, ["pack_dtype"]),
    "rotation": ({"rotation": "hadamard"}, ["rotation"]),
    "group-size-128-for-64": ({"group_size": 128}, ["group_size = 128", "group size of 64", DOWN, "scales"]),
    "group-size-of-whole-rows-for-64": ({"group_size": -1}, ["group_size = -1", "group size of 64"]),
    "group-size-no-number": ({"group_size": "64"}, ["group_size = '64'"]),
    "group-size-0": ({"group_size": 0}, ["group_size = 0"]),
    "gemv-said-gemm-stored": ({"version": "gemv"}, ["'gemv'", "'awq'", "qweight"]),
    **{
        f"method-{method}": ({"quant_method": method}, [name, "quant_method"])
        for method, name in {
            "gptq": "GPTQ",
            "mlx": "MLX",
            "bitsandbytes": "bitsandbytes",
            "fp8": "FP8",
            "quark": "Quark",
            "modelopt": "ModelOpt",
            "hqq": "HQQ",
            "auto-round": "auto-round",
            "never-heard-of": "never-heard-of",
        }.items()
    },
}


@pytest.mark.parametrize("setting", AWQ_SETTINGS)
def test_awq_setting_refused(tmp_path, setting):
    changes, words = AWQ_SETTINGS[setting]
    directory, _ = tiny.make(tmp_path, block=tiny.AWQ_BLOCK | changes)
    refused(directory, *words)


# name: path into the compressed-tensors block, value, words of the message
CT_SETTINGS = {
    "format": (["format"], "int-quantized", ["format = 'int-quantized'"]),
    "format-of-group": (["config_groups", "group_0", "format"], "nvfp4-pack-quantized", ["nvfp4"]),
    "bits-8": (["config_groups", "group_0", "weights", "num_bits"], 8, ["group_0.weights.num_bits = 8", "['Linear']"]),
    "head-of-8-bits": (
        ["config_groups", "group_1"],
        {"targets": ["lm_head"], "weights": {"num_bits": 8, "strategy": "channel"}},
        ["group_1.weights.num_bits = 8", "['lm_head']"],
    ),
    "format-mixed": (["format"], "mixed-precision", ["mixed-precision"]),
    "block-structure": (["config_groups", "group_0", "weights", "strategy"], "tensor_group", ["'tensor_group'"]),
    "dynamic-ordering": (["config_groups", "group_0", "weights", "actorder"], "dynamic", ["actorder = 'dynamic'"]),
    "float": (["config_groups", "group_0", "weights", "type"], "float", ["type = 'float'"]),
    "block": (["config_groups", "group_0", "weights", "strategy"], "block", ["strategy = 'block'"]),
    "activation-ordering": (["config_groups", "group_0", "weights", "actorder"], "group", ["actorder = 'group'"]),
    "activations": (["config_groups", "group_0", "input_activations"], {"num_bits": 8}, ["input_activations"]),
    "sparse": (["sparsity_config"], {"format": "sparse-24-bitmask"}, ["sparsity_config"]),
    "transforms": (["transform_config"], {"config_groups": {"R1": {}}}, ["transform_config"]),
    "group-size": (
        ["config_groups", "group_0", "weights", "group_size"],
        32,
        ["group_size = 32", "group size of 64", DOWN],
    ),
}


@pytest.mark.parametrize("setting", CT_SETTINGS)
def test_compressed_tensors_setting_refused(tmp_path, setting):
    path, value, words = CT_SETTINGS[setting]
    block = copy.deepcopy(tiny.CT_BLOCK)
    place = block
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    directory, _ = tiny.make(tmp_path, layout="compressed-tensors", block=block)
    refused(directory, "quantization_config", *words)


def gptq(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        f"{Q}.qweight": torch.zeros(128 // 8, 128, dtype=torch.int32),
        f"{Q}.qzeros": torch.zeros(2, 128 // 8, dtype=torch.int32),
        f"{Q}.scales": torch.ones(2, 128, dtype=torch.float16),
    }


def one(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[..., dict[str, torch.Tensor]]:
    return lambda tensors: {name: torch.zeros(*shape).to(dtype)}


# name: tensors to add to (or replace in) an AutoAWQ checkpoint with no config block, words of the message
FOREIGN = {
    "gptq-by-shape": (gptq, ["GPTQ", Q]),
    "gptq-by-g_idx": (one(f"{Q}.g_idx", 128, dtype=torch.int32), ["GPTQ", "g_idx"]),
    "marlin-by-shape": (one(f"{Q}.qweight", 8, 256, dtype=torch.int32), ["Marlin", Q]),
    "gemv_fast-by-dtype": (one(f"{Q}.qweight", 32, 128, dtype=torch.int16), ["GEMV_FAST", "I16", Q]),
    "llm-awq-v2": (one(f"{Q}.scaled_zeros", 8, 128), ["llm-awq", "scaled_zeros"]),
    "mlx": (one(f"{Q}.biases", 128, 2), ["MLX", "biases"]),
    "bitsandbytes-nf4": (one(f"{Q}.weight.absmax", 256), ["bitsandbytes", "absmax"]),
    "bitsandbytes-int8": (one(f"{Q}.SCB", 128), ["bitsandbytes", "SCB"]),
    "modelopt": (one(f"{Q}.pre_quant_scale", 128), ["ModelOpt", "pre_quant_scale"]),
    "fp8": (one(f"{Q}.weight", 128, 128, dtype=torch.float8_e4m3fn), ["FP8", f"{Q}.weight"]),
    "fp8-blocks": (one(f"{Q}.weight_scale_inv", 1, 1), ["FP8", "weight_scale_inv"]),
    "int8": (one(f"{Q}.weight", 128, 128, dtype=torch.int8), ["INT8", f"{Q}.weight"]),
    "quark": (one(f"{Q}.weight", 128, 16, dtype=torch.int32), ["Quark", f"{Q}.weight"]),
    "activation-ordering": (one(f"{Q}.weight_g_idx", 128, dtype=torch.int32), ["activation ordering"]),
    "no-known-layout": (one(f"{Q}.scales", 3, 5, dtype=torch.float16), ["no known layout", Q]),
    "one-dimension": (one(f"{Q}.scales", 128, dtype=torch.float16), ["no known layout", Q]),
    "words-as-floats": (one(f"{Q}.qweight", 128, 16), ["no known layout", Q]),
    "experts": (
        lambda t: {
            f"model.layers.0.mlp.experts.0.up_proj.{p}": t[f"{Q}.{p}"].clone() for p in ("qweight", "qzeros", "scales")
        },
        ["no such layer", "experts.0.up_proj"],
    ),
    "fused-qkv": (
        lambda t: {
            f"model.layers.0.self_attn.qkv_proj.{p}": t[f"{Q}.{p}"].clone() for p in ("qweight", "qzeros", "scales")
        },
        ["no such layer", "qkv_proj"],
    ),
    "another-shape-than-config": (
        lambda t: {f"{DOWN}.{p}": t[f"{Q}.{p}"].clone() for p in ("qweight", "qzeros", "scales")},
        ["config.json makes it 256 to 128", DOWN],
    ),
    "unexpected": (one(f"{Q}.bias", 128), ["unexpected", f"{Q}.bias"]),
    "misshapen": (one("model.norm.weight", 64), ["another shape", "model.norm.weight [64] for [128]"]),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_tensors_refused(tmp_path, kind):
    change, words = FOREIGN[kind]
    directory, _ = tiny.make(tmp_path, block={})
    edit_tensors(directory, lambda tensors: tensors | change(tensors))
    refused(directory, *words)


def test_marlin_without_zeros_refused(tmp_path):
    """AutoAWQ's Marlin files: symmetric, no `qzeros`, words in tiles."""
    directory, _ = tiny.make(tmp_path, block=tiny.AWQ_BLOCK | {"zero_point": False})
    tiles = {f"{Q}.qweight": torch.zeros(8, 256, dtype=torch.int32), f"{Q}.scales": torch.ones(2, 128).half()}
    edit_tensors(directory, lambda t: {name: value for name, value in (t | tiles).items() if name != f"{Q}.qzeros"})
    refused(directory, "Marlin form", Q)


@pytest.mark.parametrize("missing", ["qzeros", "scales"])
def test_part_of_a_packed_layer_missing_refused(tmp_path, missing):
    directory, _ = tiny.make(tmp_path)
    edit_tensors(directory, lambda t: {name: tensor for name, tensor in t.items() if name != f"{DOWN}.{missing}"})
    refused(directory, DOWN)


def test_zero_points_missing_refused(tmp_path):
    directory, _ = tiny.make(tmp_path, layout="compressed-tensors")
    name = f"{DOWN}.weight_zero_point"
    edit_tensors(directory, lambda t: {key: tensor for key, tensor in t.items() if key != name})
    refused(directory, "symmetric = false", name)


def test_weight_shape_that_disagrees_refused(tmp_path):
    directory, _ = tiny.make(tmp_path, layout="compressed-tensors")
    edit_tensors(directory, lambda t: t | {f"{DOWN}.weight_shape": torch.tensor([128, 255])})
    refused(directory, f"{DOWN}.weight_shape", "255")


def test_square_layer_alone_tells_gemv_from_gemm(tmp_path):
    """`qweight` has the same shape in both layouts: the scales must tell, with a config that says the other."""
    changes = {"num_key_value_heads": 4, "intermediate_size": 128}
    gemv, _ = tiny.make(tmp_path / "gemv", layout="gemv", block=tiny.AWQ_BLOCK, changes=changes)
    gemm, _ = tiny.make(tmp_path / "gemm", block=tiny.AWQ_BLOCK | {"version": "gemv"}, changes=changes)
    shapes = [load_file(directory / "model.safetensors")[f"{Q}.qweight"].shape for directory in (gemv, gemm)]
    assert shapes[0] == shapes[1]
    refused(gemv, "version", "'gemv'")
    refused(gemm, "version", "'gemv'")


def test_gemv_group_size_that_disagrees_refused(tmp_path):
    directory, _ = tiny.make(tmp_path, layout="gemv", block=tiny.AWQ_BLOCK | {"version": "gemv", "group_size": 32})
    refused(directory, "group_size", "32", "qzeros has 2 words")


def test_gemv_group_size_that_does_not_divide_refused(tmp_path):
    """192 inputs in one group and in groups of 128 are both padded to one word of zeros."""
    changes = {"hidden_size": 192, "head_dim": 48, "intermediate_size": 192}
    block = tiny.AWQ_BLOCK | {"version": "gemv", "group_size": 128}
    directory, _ = tiny.make(tmp_path, layout="gemv", block=block, group_size=-1, changes=changes)
    refused(directory, "group_size", "128", "192 inputs")


@pytest.mark.parametrize("missing", ["model.norm.weight", f"{DOWN}.qweight", "model.embed_tokens.weight"])
def test_missing_tensor_refused(tmp_path, missing):
    directory, _ = tiny.make(tmp_path)
    edit_tensors(directory, lambda t: {name: tensor for name, tensor in t.items() if name != missing})
    refused(directory, "missing", missing.removesuffix(".qweight"))


def test_head_missing_though_not_tied_refused(tmp_path):
    directory, _ = tiny.make(tmp_path, changes={"tie_word_embeddings": False})
    edit_tensors(directory, lambda t: {name: tensor for name, tensor in t.items() if name != "lm_head.weight"})
    refused(directory, "missing", "lm_head.weight")


def test_quantized_in_word_only_refused(tmp_path):
    directory, _ = tiny.make_dense(tmp_path)
    edit_config(directory, quantization_config=tiny.AWQ_BLOCK)
    refused(directory, "no tensor is", "quant_method")


# name: changes to config.json, words of the message
ARCHITECTURES = {
    "mixture-of-experts": ({"num_experts": 128}, ["num_experts = 128", "mixture of experts"]),
    "mixtral": ({"architectures": ["MixtralForCausalLM"], "num_local_experts": 8}, ["Mixtral", "num_local_experts"]),
    "deepseek-v3": ({"architectures": ["DeepseekV3ForCausalLM"], "kv_lora_rank": 512}, ["kv_lora_rank", "latent"]),
    "hybrid": ({"linear_num_key_heads": 16}, ["linear_num_key_heads", "hybrid"]),
    "layer-types": ({"layer_types": ["linear_attention", "full_attention"]}, ["layer_types", "linear_attention"]),
    "mamba": ({"architectures": ["JambaForCausalLM"], "mamba_d_state": 16}, ["mamba_d_state"]),
    "vision": ({"vision_config": {"depth": 32}}, ["vision_config", "pictures"]),
    "sound": ({"audio_config": {"depth": 32}}, ["audio_config"]),
    "gemma": ({"architectures": ["Gemma2ForCausalLM"], "final_logit_softcapping": 30.0}, ["Gemma2", "softcapping"]),
    "gpt2": ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "LlamaForCausalLM"]),
    "mpt": ({"architectures": ["MPTForCausalLM"]}, ["MPTForCausalLM"]),
    "own-code": ({"architectures": ["RuQwen2ForCausalLM"], "auto_map": {"AutoModel": "m.M"}}, ["RuQwen2ForCausalLM"]),
    "own-head": ({"add_bias_to_lm_head": True}, ["add_bias_to_lm_head"]),
    "no-architecture": ({"architectures": None}, ["architectures"]),
    "rope": ({"rope_scaling": {"rope_type": "su", "factor": 4.0}}, ["rope_type", "'su'"]),
    "longrope": ({"rope_scaling": {"rope_type": "longrope"}}, ["short_factor = None", "expected 16 numbers"]),
    "scaled": ({"residual_multiplier": 0.2}, ["residual_multiplier = 0.2", "scaled residuals"]),
    "experts-beside": (
        {"architectures": ["GraniteMoeHybridForCausalLM"], "num_local_experts": 8},
        ["num_local_experts = 8"],
    ),
    "mamba-layers": (
        {"architectures": ["GraniteMoeHybridForCausalLM"], "layer_types": ["mamba", "attention"]},
        ["['mamba']"],
    ),
    "window-of-no-layer": (
        {"architectures": ["SmolLM3ForCausalLM"], "sliding_window": 8, "use_sliding_window": True},
        ["layer_types"],
    ),
    "pattern": (
        {"architectures": ["Exaone4ForCausalLM"], "sliding_window": 8, "sliding_window_pattern": "LLLG"},
        ["sliding_window_pattern = 'LLLG'"],
    ),
    "no-rope": (
        {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1]},
        ["no_rope_layers = [1]", "2 numbers"],
    ),
    "odd-rotary": (
        {"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.1},
        ["partial_rotary_factor = 0.1", "32 channels"],
    ),
    "activation": ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
    "mlx": ({"quantization": {"group_size": 64, "bits": 4}}, ["MLX", "config.json: quantization"]),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_architecture_refused(tmp_path, kind):
    changes, words = ARCHITECTURES[kind]
    directory, _ = tiny.make(tmp_path)
    edit_config(directory, **changes)
    refused(directory, "config.json", *words)


def test_custom_code_is_never_run(tmp_path):
    """A known architecture loads although the repository brings code; the code stays a file."""
    directory, _ = tiny.make(tmp_path)
    edit_config(directory, auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    (directory / "modeling.py").write_text("raise SystemExit('run')")
    load_model(open_checkpoint(directory))


# name: files of a repository without safetensors, words of the message
FILES = {
    "gguf": (["model-Q4_K_M.gguf"], ["GGUF"]),
    "openvino": (["openvino_model.xml", "openvino_model.bin"], ["OpenVINO"]),
    "pickle": (["pytorch_model.bin"], ["pickle", "run code"]),
    "llm-awq": (["llama-w4-g128-v2.pt"], ["pickle", ".pt"]),
    "onnx": (["model.onnx"], ["model.onnx"]),
    "nothing": ([], ["lacks model.safetensors"]),
}


@pytest.mark.parametrize("kind", FILES)
def test_foreign_files_refused(tmp_path, kind):
    names, words = FILES[kind]
    (tmp_path / "config.json").write_text(json.dumps(tiny.config_of()))
    for name in names:
        (tmp_path / name).write_bytes(b"never read")
    refused(tmp_path, *words)


def test_modelopt_files_refused(tmp_path):
    directory, _ = tiny.make_dense(tmp_path)
    (directory / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "W4A16_AWQ"}}')
    refused(directory, "ModelOpt", "hf_quant_config.json")


def test_single_file_refused(tmp_path):
    directory, _ = tiny.make(tmp_path)
    refused(directory / "model.safetensors", "single file", "name its directory; GGUF files are not read")


def test_lfs_pointer_refused(tmp_path):
    directory, _ = tiny.make(tmp_path)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (directory / "model.safetensors").write_bytes(pointer)
    refused(directory, "Git LFS pointer", "git lfs pull", "model.safetensors")


@pytest.mark.parametrize("kept", [0, 5, 300, -1], ids=["empty", "length", "header", "values"])
def test_truncated_file_refused(tmp_path, kept):
    directory, _ = tiny.make(tmp_path)
    file = directory / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:kept])
    refused(directory, "model.safetensors is damaged or incomplete", f"{len(content[:kept])} bytes")


def test_header_longer_than_the_file_refused(tmp_path):
    directory, _ = tiny.make(tmp_path)
    (directory / "model.safetensors").write_bytes(b"\xff" * 64)
    refused(directory, "damaged")


INDEXES = {
    "missing-shard": (
        lambda m: m | {"x": "model-00009-of-00009.safetensors"},
        ["weight files are missing", "1 of 3 files", "00009"],
    ),
    "parent": (lambda m: m | {"x": "../other/model.safetensors"}, ["outside the checkpoint", ".."]),
    "absolute": (lambda m: m | {"x": "/etc/model.safetensors"}, ["outside the checkpoint", "/etc"]),
    "pickle": (lambda m: m | {"x": "model.bin"}, ["outside the checkpoint", "model.bin"]),
    "empty": (lambda m: {}, ["weight_map"]),
    "tensor-not-there": (lambda m: m | {"ghost.weight": "model-00001-of-00002.safetensors"}, ["ghost.weight"]),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_index_refused(tmp_path, kind):
    change, words = INDEXES[kind]
    directory, _ = tiny.make(tmp_path, shards=2)
    index = directory / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": change(weight_map)}))
    refused(directory, "index.json", *words)


def test_shards_without_index_refused(tmp_path):
    directory, _ = tiny.make(tmp_path, shards=2)
    (directory / "model.safetensors.index.json").unlink()
    refused(directory, "no index", "model-00001-of-00002.safetensors")


def test_tensor_in_two_shards_refused(tmp_path):
    directory, _ = tiny.make(tmp_path, shards=2)
    shard = directory / "model-00002-of-00002.safetensors"
    save_file(load_file(shard) | {"model.embed_tokens.weight": torch.ones(48, 128)}, shard)
    refused(directory, "model.embed_tokens.weight", "twice", "00001", "00002")


JSON = {
    "key-twice": ('{"vocab_size": 48, "vocab_size": 49}', "'vocab_size' is there twice"),
    "nan": ('{"rms_norm_eps": NaN}', "NaN"),
    "cut": ('{"vocab_size": 4', "config.json"),
    "deep": ("[" * 100_000, "config.json"),
}


@pytest.mark.parametrize("kind", JSON)
def test_broken_json_refused(tmp_path, kind):
    text, word = JSON[kind]
    directory, _ = tiny.make(tmp_path)
    (directory / "config.json").write_text(text)
    refused(directory, word)


def test_no_config_file(tmp_path):
    directory, _ = tiny.make(tmp_path)
    (directory / "config.json").unlink()
    with pytest.raises(NotFound, match=r"config\.json is missing"):
        open_checkpoint(directory)


def test_directory_that_is_not_there():
    with pytest.raises(NotFound, match="no directory"):
        open_checkpoint("./not/here")
