"""What a checkpoint says about its quantization, in every dialect seen, and the blocks we write ourselves.

The block is in config.json, as `quantization_config` or `compression_config`, or in a file of its own. What is kept of
it is what the tensors are checked against; blocks of other methods are refused by name. docs/checkpoints.md lists the
dialects and who writes them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from miniawq.checkpoint.values import Key, checked_values, shown
from miniawq.errors import UnsupportedCheckpoint

CONFIG_KEYS = ("quantization_config", "compression_config")
CONFIG_FILES = ("quant_config.json", "quantize_config.json")
BITS = 4

# What `version` may say, with the layout it means. exllama and ipex are kernels that AutoAWQ runs on GEMM tensors.
VERSIONS = {
    "gemm": "awq",
    "exllama": "awq",
    "exllamav2": "awq",
    "exllama_v2": "awq",
    "ipex": "awq",
    "gemv": "gemv",
}
REFUSED_VERSIONS = {
    "gemv_fast": "AutoAWQ GEMV_FAST",
    "llm-awq": "llm-awq",
    "marlin": "Marlin",
    "gptq": "GPTQ",
    "gptq_v2": "GPTQ v2",
}
REFUSED_METHODS = {
    "gptq": "GPTQ",
    "marlin": "Marlin",
    "mlx": "MLX",
    "bitsandbytes": "bitsandbytes",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "quark": "AMD Quark",
    "modelopt": "NVIDIA ModelOpt",
    "modelopt_fp4": "NVIDIA ModelOpt",
    "auto-round": "auto-round",
    "intel/auto-round": "auto-round",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "torchao": "torchao",
    "quanto": "quanto",
    "eetq": "EETQ",
    "exl2": "ExLlamaV2",
    "exl3": "ExLlamaV3",
    "mxfp4": "MXFP4",
    "openvino": "OpenVINO",
}
PACK_QUANTIZED, MIXED = "pack-quantized", "mixed-precision"

# What engines do with a packed head, by format; each was read in the source of that version (docs/checkpoints.md).
PACKED_HEADS = {
    "awq": "a packed head in this format: vLLM 0.32.0 reads it where 64 divides the vocabulary; transformers 5.24.0 "
    "and SGLang 0.5.23 do not, and fail or write nonsense: for these use compressed-tensors",
    "compressed-tensors": "a packed head in this format: vLLM 0.32.0, SGLang 0.5.23 and transformers 5.24.0 read it",
}

# Types of what is read of a block, whatever its method; what is implemented is checked where it is read.
_PLACES = {key: Key("object", "the quantization") for key in (*CONFIG_KEYS, "text_config")}
_BLOCK = {
    **{key: Key("text", "the method") for key in ("quant_method", "method")},
    **{key: Key("text", "the layout") for key in ("version", "checkpoint_format")},
    **{key: Key("flag", "whether zeros are stored") for key in ("zero_point", "sym", "symmetric")},
    **{key: Key("object", "settings") for key in ("dynamic", "config_groups", "sparsity_config", "transform_config")},
}
_GROUP = {"weights": Key("object", "the form of the weights")}
_WEIGHTS = {"symmetric": Key("flag", "whether all zeros are 8", default=True)}


class QuantizationConfig(NamedTuple):
    """What the tensors must agree with; None is for what the block does not say."""

    where: str
    method: str
    layout: str | None
    group_sizes: frozenset[int] | None
    symmetric: bool | None


def refuse_layout(what: str, why: str) -> NoReturn:
    """Raise UnsupportedCheckpoint: the checkpoint is in another tool's layout."""
    raise UnsupportedCheckpoint(
        f"this checkpoint is in {what} form, which miniawq does not read",
        why,
        "look for an AutoAWQ (gemm) or compressed-tensors upload, or quantize the dense model with miniawq quantize",
    )


def refuse_setting(where: str, key: str, value: object, why: str) -> NoReturn:
    """Raise UnsupportedCheckpoint: this setting of the block is not implemented."""
    raise UnsupportedCheckpoint(
        f"this checkpoint has {key} = {shown(value)}",
        f"{where}: {why}",
        "going on would give wrong text: look for another upload, or quantize the dense model with miniawq quantize",
    )


def read_block(config: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> QuantizationConfig | None:
    """The quantization a checkpoint declares; None for a dense one.

    `config` is config.json, `files` the parsed CONFIG_FILES that are there. UnsupportedCheckpoint on another method.
    """
    if isinstance(config.get("quantization"), Mapping):
        refuse_layout("MLX", "config.json: quantization is the key that mlx-lm writes")
    outer = checked_values("config.json", config, _PLACES)
    inner = checked_values("config.json: text_config", outer["text_config"] or {}, _PLACES)
    places = [("config.json", outer), ("config.json: text_config", inner)]
    blocks = [(f"{where}: {key}", block[key]) for where, block in places for key in CONFIG_KEYS]
    for where, block in [*blocks, *files.items()]:
        if found := {} if block is None else checked_values(where, block, {}):
            return _read(where, found)
    return None


def _read(where: str, block: Mapping[str, Any]) -> QuantizationConfig:
    if len(lower := {key.lower(): value for key, value in block.items()}) < len(block):
        refuse_setting(where, "keys", sorted(block), "two of them differ only in their case")
    block = {key: value for key, value in checked_values(where, lower, _BLOCK).items() if key in lower}
    method = _word(block, "quant_method", "method") or _guess_method(block)
    if method in REFUSED_METHODS:
        refuse_layout(REFUSED_METHODS[method], f"{where}: quant_method = {method!r}")
    if method == "awq":
        return _read_awq(where, block)
    if method == "compressed-tensors":
        return _read_compressed_tensors(where, block)
    refuse_layout(shown(method), f"{where}: quant_method = {shown(method)}; known: awq, compressed-tensors")


def _word(block: Mapping[str, Any], *keys: str) -> str | None:
    return next((str(block[key]).lower() for key in keys if block.get(key) is not None), None)


def _guess_method(block: Mapping[str, Any]) -> str:
    """The method of a block that names none, as AutoGPTQ and old AutoAWQ write it, from keys that only one writes."""
    if "config_groups" in block:
        return "compressed-tensors"
    return "gptq" if {"desc_act", "damp_percent"} & block.keys() else "awq"


def _read_awq(where: str, block: Mapping[str, Any]) -> QuantizationConfig:
    bits = next((block[key] for key in ("bits", "w_bit", "num_bits") if block.get(key) is not None), BITS)
    if bits != BITS:
        refuse_setting(where, "bits", bits, "only 4 bits are implemented")
    for key, plain in (("desc_act", False), ("pack_dtype", "int32"), ("rotation", None)):
        if block.get(key) not in (plain, None):
            refuse_setting(where, key, block[key], "it changes what the packed weights mean")
    # GPTQModel: "-:regex" leaves modules dense, which the tensors show; any other entry changes settings of modules.
    if overrides := [key for key, value in (block.get("dynamic") or {}).items() if value and key[:2] != "-:"]:
        refuse_setting(where, "dynamic", overrides, "settings of single modules are not implemented")
    words = [_word(block, key) for key in ("version", "checkpoint_format", "format")]
    for word in filter(None, words):
        if word in REFUSED_VERSIONS:
            refuse_layout(REFUSED_VERSIONS[word], f"{where}: version = {word!r}")
        if word not in VERSIONS:
            refuse_setting(where, "version", word, "known: " + ", ".join(VERSIONS))
    group_size = next((block[key] for key in ("group_size", "q_group_size") if block.get(key) is not None), None)
    zero_point = block.get("zero_point")
    if zero_point is None and (symmetric := block.get("sym", block.get("symmetric"))) is not None:
        zero_point = not symmetric
    return QuantizationConfig(
        where=where,
        method="awq",
        layout=next((VERSIONS[word] for word in words if word), None),
        group_sizes=None if group_size is None else frozenset([_checked_group_size(where, group_size)]),
        symmetric=None if zero_point is None else not zero_point,
    )


def _checked_group_size(where: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and value != -1):
        refuse_setting(where, "group_size", value, "expected a positive number, or -1 for whole rows")
    return value


def _read_compressed_tensors(where: str, block: Mapping[str, Any]) -> QuantizationConfig:
    named = (block.get("config_groups") or {}).items()
    groups = {name: checked_values(f"{where}: config_groups.{name}", group, _GROUP) for name, group in named}
    groups = {name: group for name, group in groups.items() if group["weights"]}
    forms = [group.get("format") for group in groups.values()]
    # Where each group states its form, "mixed-precision" says no more.
    for form in [*forms, *([] if block.get("format") == MIXED and forms and all(forms) else [block.get("format")])]:
        if form not in (None, PACK_QUANTIZED):
            refuse_setting(where, "format", form, f"of its formats only {PACK_QUANTIZED} is implemented")
    if (sparsity := block.get("sparsity_config") or {}).get("format", "dense") != "dense":
        refuse_setting(where, "sparsity_config.format", sparsity["format"], "sparse weights are not implemented")
    if (block.get("transform_config") or {}).get("config_groups"):
        refuse_setting(where, "transform_config", "present", "rotations at run time are not implemented")
    sizes, symmetric = set(), set()
    for name, group in groups.items():
        weights = checked_values(f"{where}: config_groups.{name}.weights", group["weights"], _WEIGHTS)
        _check_weights(where, name, group, weights)
        channel = weights.get("strategy") == "channel"
        if channel or weights.get("group_size") is not None:
            sizes.add(-1 if channel else _checked_group_size(where, weights["group_size"]))
        symmetric.add(weights["symmetric"])
    return QuantizationConfig(
        where=where,
        method="compressed-tensors",
        layout="compressed-tensors",
        group_sizes=frozenset(sizes) or None,
        symmetric=symmetric.pop() if len(symmetric) == 1 else None,
    )


def _check_weights(where: str, name: str, group: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    allowed: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
        ("weights.num_bits", weights.get("num_bits"), (BITS,)),
        ("weights.type", weights.get("type", "int"), ("int",)),
        ("weights.strategy", weights.get("strategy"), ("group", "channel", None)),
        ("weights.dynamic", weights.get("dynamic", False), (False,)),
        ("weights.actorder", weights.get("actorder"), (None, False, "weight", "static")),
        ("input_activations", group.get("input_activations"), (None,)),
        ("output_activations", group.get("output_activations"), (None,)),
    )
    for key, value, values in allowed:
        if value not in values:
            why = f"implemented: {', '.join(map(repr, values))}; targets = {shown(group.get('targets'))}"
            refuse_setting(where, f"config_groups.{name}.{key}", value, why)


def awq_block(group_size: int, dense_linears: Sequence[str]) -> dict[str, Any]:
    """The six keys of AutoAWQ (`AwqConfig.to_transformers_dict`), and `lm_head` of GPTQModel where the head is packed.

    Without that key readers know by themselves that it is dense.

    `dense_linears` are the full names of the linear layers that stay dense: vLLM and AutoAWQ search for them as
    substrings, so a shorter name could match other layers.
    """
    listed = [name for name in dense_linears if name != "lm_head"]
    block = {
        "quant_method": "awq",
        "zero_point": True,
        "group_size": group_size,
        "bits": BITS,
        "version": "gemm",
        "modules_to_not_convert": listed or None,
    }
    return block if "lm_head" in dense_linears else block | {"lm_head": True}


def compressed_tensors_block(group_size: int, symmetric: bool, dense_linears: Sequence[str]) -> dict[str, Any]:
    """The block of compressed-tensors for `pack-quantized` weights, as llm-compressor's W4A16 and W4A16_ASYM write it.

    Keys that only newer releases know are left out: older readers reject them. A packed head is a target by its name:
    for vLLM and SGLang it is no Linear.
    """
    targets = ["Linear"] if "lm_head" in dense_linears else ["Linear", "lm_head"]
    weights = {
        "num_bits": BITS,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": PACK_QUANTIZED,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(dense_linears),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
