"""The layout of each linear layer, recognised by names, dtypes and shapes: the tensors decide, not the config.

The `qweight` of a square layer has the same shape in AutoAWQ's GEMM and GEMV layouts, and the wrong choice gives
plausible nonsense. The scales tell them apart: GEMM has one row for each group, GEMV one row for each output.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn

import torch

from miniawq.checkpoint.headers import TensorInfo
from miniawq.checkpoint.layouts import gemv_zero_words, words_for
from miniawq.checkpoint.quant_config import QuantizationConfig, refuse_layout
from miniawq.errors import UnsupportedCheckpoint
from miniawq.packing import CODES_PER_WORD


class QuantizedLinear(NamedTuple):
    """A packed linear layer; `tensors` gives the checkpoint's name for each part of it.

    `group_size` is the number of inputs that share a scale, never -1. `symmetric` means that no zeros are stored.
    """

    layout: str
    in_features: int
    out_features: int
    group_size: int
    symmetric: bool
    tensors: dict[str, str]


Parts = Mapping[str, TensorInfo]


# Name endings that only one tool writes, with the tool.
FOREIGN_PARTS = {
    "g_idx": "GPTQ",
    "weight_g_idx": "compressed-tensors with activation ordering",
    "scaled_zeros": "llm-awq",
    "biases": "MLX",
    "absmax": "bitsandbytes",
    "SCB": "bitsandbytes",
    "pre_quant_scale": "NVIDIA ModelOpt",
    "weight_scale_2": "NVIDIA ModelOpt",
    "weight_scale_inv": "FP8",
    "W_q": "HQQ",
    "codebooks": "AQLM",
    "q_weight": "ExLlamaV2",
    "trellis": "ExLlamaV3",
    "B": "Marlin",
}
FOREIGN_DTYPES = {
    torch.float8_e4m3fn: "FP8",
    torch.float8_e5m2: "FP8",
    torch.uint8: "bitsandbytes or NVIDIA ModelOpt (bytes of two codes)",
    torch.int8: "INT8",
    torch.int32: "AMD Quark (packed words called weight)",
    torch.uint32: "MLX",
}
WORDS = (torch.int32, torch.uint32)
SCALES = (torch.float16, torch.bfloat16, torch.float32)


def find_quantized(
    tensors: Mapping[str, TensorInfo], config: QuantizationConfig | None, linears: Mapping[str, tuple[int, int]]
) -> dict[str, QuantizedLinear]:
    """Every packed linear layer by its name; `linears` are the (in_features, out_features) of the model's.

    UnsupportedCheckpoint on another tool's tensors, and if the config disagrees with the shapes.
    """
    layers: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        layer, _, part = name.rpartition(".")
        if part in FOREIGN_PARTS:
            refuse_layout(FOREIGN_PARTS[part], f"tensor {name}: {info}")
        if part == "weight" and info.dtype in FOREIGN_DTYPES:
            refuse_layout(FOREIGN_DTYPES[info.dtype], f"tensor {name}: {info}")
        layers.setdefault(layer, {})[part] = info
    found = {}
    for name, parts in layers.items():
        if "qweight" in parts:
            found[name] = _autoawq(name, parts, config)
        elif "weight_packed" in parts:
            found[name] = _compressed_tensors(name, parts, config)
    for name, linear in found.items():
        found[name] = _fitted(name, linear, linears.get(name))
        _check_groups(name, found[name], tensors)
    if config and not found:
        raise UnsupportedCheckpoint(
            "this checkpoint says that it is quantized, and no tensor is",
            f"{config.where}: quant_method = {config.method!r}, but there is no .qweight and no .weight_packed",
            "if the weights really are dense, remove that key",
        )
    return found


def _fitted(name: str, linear: QuantizedLinear, expected: tuple[int, int] | None) -> QuantizedLinear:
    """The layer with the model's number of inputs: compressed-tensors pads the last word of a row."""
    inputs, outputs = expected or (0, 0)
    padded = inputs if linear.layout != "compressed-tensors" else words_for(inputs) * CODES_PER_WORD
    if (linear.in_features, linear.out_features) != (padded, outputs):
        said = f"config.json makes it {inputs} to {outputs}" if expected else "config.json describes no such layer"
        raise UnsupportedCheckpoint(
            "the config and the tensors of this checkpoint disagree",
            f"{name} is packed for {linear.in_features} inputs and {linear.out_features} outputs, but {said}",
            "the files may be from different uploads: download the repository again",
        )
    return linear._replace(in_features=inputs, group_size=min(linear.group_size, inputs))


def _check_groups(name: str, linear: QuantizedLinear, tensors: Mapping[str, TensorInfo]) -> None:
    """UnsupportedCheckpoint if the scales of a compressed-tensors layer are not one for each group of its inputs."""
    if linear.layout == "compressed-tensors":
        scales = tensors[linear.tensors["weight_scale"]]
        if linear.in_features != scales.shape[1] * linear.group_size:
            _unknown(name, f"weight_scale {scales} for {linear.in_features} inputs")


def _is_gemm(q: tuple[int, ...], s: tuple[int, ...], z: tuple[int, ...] | None) -> bool:
    return s[1] == q[1] * CODES_PER_WORD and q[0] % s[0] == 0 and z in (None, (s[0], q[1]))


def _is_gemv(q: tuple[int, ...], s: tuple[int, ...], z: tuple[int, ...] | None) -> bool:
    return s[0] == q[0] and z is not None and z[0] == q[0] and s[1] == z[1] * CODES_PER_WORD


def _is_gptq(q: tuple[int, ...], s: tuple[int, ...], z: tuple[int, ...] | None) -> bool:
    return s[1] == q[1] and q[0] * CODES_PER_WORD % s[0] == 0


def _is_marlin(q: tuple[int, ...], s: tuple[int, ...], z: tuple[int, ...] | None) -> bool:
    return s[1] * 2 == q[1]


# With groups of more than 8 inputs, no two of these hold for the same shapes.
SHAPES: dict[str, Callable[[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None], bool]] = {
    "awq": _is_gemm,
    "gemv": _is_gemv,
    "GPTQ": _is_gptq,
    "Marlin": _is_marlin,
}


def _autoawq(name: str, parts: Parts, config: QuantizationConfig | None) -> QuantizedLinear:
    shown = ", ".join(f"{part} {parts[part]}" for part in ("qweight", "qzeros", "scales") if part in parts)
    if parts["qweight"].dtype == torch.int16:
        refuse_layout("AutoAWQ GEMV_FAST", f"{name}: {shown}")
    zeros = parts.get("qzeros")
    flat = [info.shape for part in ("qweight", "scales", "qzeros") if (info := parts.get(part))]
    words_wrong = any(info.dtype not in WORDS for info in (parts["qweight"], zeros) if info)
    if "scales" not in parts or words_wrong or any(len(shape) != 2 or 0 in shape for shape in flat):
        _unknown(name, shown)
    if parts["scales"].dtype not in SCALES:
        _unknown(name, shown)
    shapes = parts["qweight"].shape, parts["scales"].shape, zeros.shape if zeros else None
    layout = next((kind for kind, fits in SHAPES.items() if fits(*shapes)), None)
    if layout is None:
        _unknown(name, shown)
    if layout not in ("awq", "gemv"):
        refuse_layout(layout, f"{name}: {shown}")
    if config and config.layout not in (layout, None):
        _disagree(config, f"version or method = {config.layout!r}", f"{name} has the shapes of {layout!r}: {shown}")
    if zeros is None and not (config and config.symmetric):
        _disagree(config, "zero_point is not false", f"{name}.qzeros is missing")
    rows, columns = parts["qweight"].shape
    if layout == "awq":
        inputs, outputs = rows, columns * CODES_PER_WORD
        group_size = inputs // parts["scales"].shape[0]
    else:
        inputs, outputs = columns * CODES_PER_WORD, rows
        group_size = _gemv_group_size(name, inputs, parts["qzeros"].shape[1], config)
    _check_group_size(name, inputs, group_size, parts["scales"], config)
    present = [part for part in ("qweight", "qzeros", "scales") if part in parts]
    return QuantizedLinear(
        layout, inputs, outputs, group_size, zeros is None, {part: f"{name}.{part}" for part in present}
    )


def _gemv_group_size(name: str, inputs: int, zero_words: int, config: QuantizationConfig | None) -> int:
    """GEMV pads its rows of groups, so several group sizes have the same shapes, and the config has to choose."""
    sizes = [inputs if size == -1 else size for size in (config and config.group_sizes) or (128, 64, 32)]
    fitting = [size for size in sizes if inputs % size == 0 and gemv_zero_words(inputs // size, size) == zero_words]
    if len(fitting) != 1:
        _disagree(config, f"group_size is one of {sizes}", f"{name}.qzeros has {zero_words} words for {inputs} inputs")
    return fitting[0]


def _compressed_tensors(name: str, parts: Parts, config: QuantizationConfig | None) -> QuantizedLinear:
    shown = ", ".join(f"{part} {info}" for part, info in parts.items() if part.startswith("weight"))
    packed, scales, zeros = parts["weight_packed"], parts.get("weight_scale"), parts.get("weight_zero_point")
    if scales is None or "weight_shape" not in parts or len(packed.shape) != 2 or packed.dtype not in WORDS:
        _unknown(name, shown)
    outputs, words = packed.shape
    if len(scales.shape) != 2 or scales.shape[0] != outputs or not scales.shape[1] or scales.dtype not in SCALES:
        _unknown(name, shown)
    if parts["weight_shape"].dtype not in (torch.int64, torch.int32) or parts["weight_shape"].shape != (2,):
        _unknown(name, shown)
    if zeros is not None and (zeros.shape != (words_for(outputs), scales.shape[1]) or zeros.dtype not in WORDS):
        _unknown(name, shown)
    if config and config.layout not in ("compressed-tensors", None):
        _disagree(config, f"version or method = {config.method!r}", f"{name} is compressed-tensors: {shown}")
    if config and config.symmetric is False and zeros is None:
        _disagree(config, "symmetric = false", f"{name}.weight_zero_point is missing")
    # The last word of a row may be padded. `weight_shape` says how much, but a header does not show its values.
    inputs, groups = words * CODES_PER_WORD, scales.shape[1]
    sizes = (config and config.group_sizes) or frozenset()
    group_size = next((size for size in sizes if size != -1 and -(-inputs // size) == groups), inputs // groups)
    _check_group_size(name, inputs, group_size, scales, config)
    present = [part for part in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point") if part in parts]
    tensors = {part: f"{name}.{part}" for part in present}
    return QuantizedLinear("compressed-tensors", inputs, outputs, group_size, zeros is None, tensors)


def _check_group_size(
    name: str, inputs: int, group_size: int, scales: TensorInfo, config: QuantizationConfig | None
) -> None:
    if config is None or config.group_sizes is None:
        return
    if group_size not in {inputs if size == -1 else size for size in config.group_sizes}:
        said = ", ".join(map(str, sorted(config.group_sizes)))
        found = f"{name} has {inputs} inputs and scales {scales}, which is a group size of {group_size}"
        _disagree(config, f"group_size = {said}", found)


def _disagree(config: QuantizationConfig | None, said: str, found: str) -> NoReturn:
    raise UnsupportedCheckpoint(
        "the config and the tensors of this checkpoint disagree",
        f"{config.where if config else 'there is no quantization config'}: {said}; but {found}",
        "the file may be from another upload: download the repository again, or correct the config",
    )


def _unknown(name: str, shown: str) -> NoReturn:
    raise UnsupportedCheckpoint(
        f"the packed tensors of {name} are in no known layout", shown, "quantize the dense model with miniawq quantize"
    )
