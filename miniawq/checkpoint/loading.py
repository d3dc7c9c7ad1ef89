"""A checkpoint becomes a model in memory: packed layers as `QuantLinear`, 16-bit matrices as they are stored."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from miniawq.checkpoint.layouts import LAYOUTS
from miniawq.checkpoint.opening import Checkpoint
from miniawq.checkpoint.reading import is_finite
from miniawq.compiled import PackedHalves, can_pack_halves, halves_product, hand_out, pack_halves
from miniawq.errors import InvalidInput
from miniawq.kernel import QuantLinear
from miniawq.model import Llama
from miniawq.packing import Quantized, dequantize

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
KV_DTYPES = {"auto": None, **DTYPES, "fp8": torch.float8_e4m3fn}
HALVES = (torch.float16, torch.bfloat16)
FEWEST_OUTPUTS_PACKED, MOST_ROWS_PACKED = 32_768, 32  # of a head (docs/log)
# Weights of a slice in float32, which stay in the cache while they are multiplied; a step shares small ones (docs/log).
WEIGHTS_PER_SLICE, WEIGHTS_PER_TASK = 1 << 20, 1 << 18


def load_model(checkpoint: Checkpoint, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float16) -> Llama:
    """The model with all its weights, to compute in `dtype`.

    Dense tensors take `dtype`, except that matrices of 16 bits do not become wider (`DenseLinear`). On a CPU, tensors
    that keep their dtype are views of the file. One tensor is read at a time, so there is never a second copy of the
    model.
    """
    checkpoint = replace(checkpoint, mapped=True).fetched()
    model = copy.deepcopy(checkpoint.skeleton)
    for name, module in list(model.named_modules()):
        for leaf in ("weight", "bias"):
            if f"{name}.{leaf}" in checkpoint.tensors:
                tensor = _converted(f"{name}.{leaf}", checkpoint.read(f"{name}.{leaf}", device), dtype)
                module.load_state_dict({leaf: tensor}, strict=False, assign=True)
        if isinstance(module, QuantLinear):
            _fill_packed(checkpoint, name, module, device)
        elif name in checkpoint.quantized:
            module.load_state_dict({"weight": _unpacked(checkpoint, name, device, dtype)}, strict=False, assign=True)
        if type(module) is nn.Linear and module.weight.dtype != dtype:
            model.set_submodule(name, DenseLinear.of(module))
    model.tie_weights()
    return model.requires_grad_(False).eval()


def add_kv_dtype_flag(add: Callable[..., Any]) -> None:
    """Add --kv-dtype, a name of KV_DTYPES, by an `add_argument` of argparse."""
    names = f"of the kv cache: {', '.join(KV_DTYPES)} (auto: that of activations)"
    add("--kv-dtype", "--kv-cache-dtype", choices=KV_DTYPES, default="auto", metavar="DTYPE", help=names)


def default_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """float32 on a CPU; on a GPU bfloat16 if config.json says so, else float16."""
    stated = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if stated == "bfloat16" else torch.float16


def _converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A dense tensor as the model takes it; InvalidInput if a value is too large for that."""
    converted = tensor.to(loaded_dtype(tensor.dtype, tensor.dim(), dtype))
    if converted.dtype == torch.float16 != tensor.dtype and not is_finite(converted):
        why = f"{name} has a value beyond {torch.finfo(torch.float16).max:g}"
        raise InvalidInput("these weights do not fit into float16", why, "compute in bfloat16 or float32: --dtype")
    return converted


def _fill_packed(checkpoint: Checkpoint, name: str, layer: QuantLinear, device: torch.device | str) -> None:
    """Give a layer the weight of the file, prepacked where the device can use it."""
    stored = checkpoint.quantized[name]
    parts = checkpoint.read_packed(name, device)
    if stored.layout != "awq":
        layer.hold(LAYOUTS[stored.layout].decode(parts, stored.group_size))
        return
    layer.load_state_dict(parts, strict=False, assign=True)
    layer.prepare()


def _unpacked(checkpoint: Checkpoint, name: str, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    quantized = checkpoint.read_linear(name, device)
    assert isinstance(quantized, Quantized)
    return dequantize(quantized, dtype)


def loaded_dtype(stored: torch.dtype, dimensions: int, dtype: torch.dtype) -> torch.dtype:
    """What a dense tensor becomes in a model that computes in `dtype`: matrices of 16 bits do not become wider."""
    return stored if dimensions == 2 and stored in HALVES and dtype.itemsize > stored.itemsize else dtype


def narrow_product(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """`linear` with a weight that may be narrower than x [..., I]: a slice of it at a time takes the dtype of x."""
    if weight_OI.dtype == x.dtype:
        return linear(x, weight_OI, bias_O)
    outputs, inputs = weight_OI.shape
    if x.numel() <= MOST_ROWS_PACKED * inputs:
        parts = weight_OI.split(max(1, WEIGHTS_PER_TASK // inputs))
        y = torch.cat(hand_out([partial(widened_product, x, part_OI) for part_OI in parts]), -1)
    else:
        step = min(outputs, max(1, WEIGHTS_PER_SLICE // inputs))
        y, slice_OI = x.new_empty(*x.shape[:-1], outputs), x.new_empty(step, inputs)
        for first in range(0, outputs, step):
            narrow_OI = weight_OI[first : first + step]
            y[..., first : first + step] = linear(x, slice_OI[: len(narrow_OI)].copy_(narrow_OI))
    return y if bias_O is None else y + bias_O


def widened_product(x: Tensor, weight_OI: Tensor) -> Tensor:
    """`linear` with the weight in the dtype of x."""
    return linear(x, weight_OI.to(x.dtype))


class DenseLinear(nn.Linear):
    """`nn.Linear` whose weight may be narrower than the activations.

    `prepare` makes a second copy of a large weight on a CPU, for products of few rows of float32: those of a head.
    """

    packed: PackedHalves | None = None

    @classmethod
    def of(cls, layer: nn.Linear) -> "DenseLinear":
        """A DenseLinear that holds the tensors of `layer`."""
        with torch.device("meta"):
            made = cls(layer.in_features, layer.out_features, layer.bias is not None)
        made.weight, made.bias = layer.weight, layer.bias
        return made

    def prepare(self) -> "DenseLinear":
        """Make the copy, unless it is there. Returns self."""
        is_head = self.out_features >= FEWEST_OUTPUTS_PACKED and self.weight.dtype in HALVES
        if self.packed is None and is_head and can_pack_halves(self.weight.device):
            self.packed = pack_halves(self.weight)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] to [..., O] in the dtype of x."""
        rows = x.numel() // self.in_features
        if self.packed is None or x.dtype != torch.float32 or not 0 < rows <= MOST_ROWS_PACKED:
            return narrow_product(x, self.weight, self.bias)
        y = halves_product(x.reshape(rows, -1), self.packed).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.packed = None
        super()._load_from_state_dict(*arguments)

    def _apply(self, *arguments: Any, **options: Any) -> "DenseLinear":
        self.packed = None
        return super()._apply(*arguments, **options)
