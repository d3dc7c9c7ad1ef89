"""The INT4 matrix product: y = x W^T from packed words.

`dequantize` and `matmul_reference` are the definition. Everything else in this file computes the same function and is
tested against them. Shapes: I input features, O output features, G groups along I, W int32 words, T tokens.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from threading import Thread, current_thread
from typing import Any

import torch
from torch import Tensor, nn

from miniawq.arrange import (
    EXPAND_IN_TILES,
    Arranged,
    arrange,
    can_arrange,
    empty,
    expand,
    in_storage_order,
    lay_together,
    lie_together,
    out_of_blocks,
    restore,
    scales_and_zeros,
    slices,
)
from miniawq.errors import InvalidInput
from miniawq.packing import CODES_PER_WORD, LAYOUTS, Quantized, unpack
from miniawq.tiles import block_sizes

WEIGHTS_PER_SLICE = 1 << 22
CODES_PER_EAGER_SLICE = 1 << 20
CODES_PER_EXPANDED_SLICE = 1 << 27

# The only thread that may compile, if there is one: others do without, because Dynamo would make them wait for it.
compiler: Thread | None = None


def dequantize(
    qweight_IW: Tensor, qzeros_GW: Tensor, scales_GO: Tensor, group_size: int, dtype: torch.dtype | None = None
) -> Tensor:
    """The weight [I, O] that AutoAWQ GEMM words stand for: (code - zero) * scale, rounded once.

    qweight_IW int32 [I, O/8], qzeros_GW int32 [G, O/8], scales_GO [G, O]; `dtype` is that of the scales if not given.
    `group_size` counts the inputs that share a scale, -1 for all of them.
    """
    group_size = qweight_IW.shape[0] if group_size == -1 else group_size
    codes_IO, zeros_GO = unpack(qweight_IW), unpack(qzeros_GW)
    if not zeros_GO.shape == scales_GO.shape == (codes_IO.shape[0] // group_size, codes_IO.shape[1]):
        shapes = f"qweight {list(qweight_IW.shape)}, qzeros {list(qzeros_GW.shape)}, scales {list(scales_GO.shape)}"
        raise InvalidInput(f"these tensors are no weight in groups of {group_size}", shapes)
    # The product of a 5-bit integer and a scale of at most 19 bits is exact in float32.
    steps_GSO = codes_IO.float().unflatten(0, (-1, group_size)) - zeros_GO.float().unsqueeze(1)
    return (steps_GSO * scales_GO.float().unsqueeze(1)).flatten(0, 1).to(dtype or scales_GO.dtype)


def matmul_reference(
    x: Tensor,
    qweight_IW: Tensor,
    qzeros_GW: Tensor,
    scales_GO: Tensor,
    group_size: int,
    bias_O: Tensor | None = None,
) -> Tensor:
    """The definition of the product, x [..., I] to y [..., O] in the dtype of x: float64 sums, rounded once."""
    weight_IO = dequantize(qweight_IW, qzeros_GW, scales_GO, group_size, torch.float64)
    y = x.double() @ weight_IO
    return (y if bias_O is None else y + bias_O.double()).to(x.dtype)


def matmul(
    x: Tensor,
    qweight_IW: Tensor,
    qzeros_GW: Tensor,
    scales_GO: Tensor,
    group_size: int,
    bias_O: Tensor | None = None,
) -> Tensor:
    """x [..., I] to y [..., O] in the dtype of x, with never more than a slice of the weight in memory.

    The weight is rounded once to the dtype of x, and the library's matmul sums in float32.
    """
    inputs, outputs = qweight_IW.shape[0], scales_GO.shape[1]
    x_TI = x.reshape(-1, inputs)
    y_TO = x.new_empty(x_TI.shape[0], outputs)
    words = max(1, WEIGHTS_PER_SLICE // (inputs * CODES_PER_WORD))
    for first in range(0, qweight_IW.shape[1], words):
        some_W = slice(first, first + words)
        some_O = slice(first * CODES_PER_WORD, (first + words) * CODES_PER_WORD)
        weight_IO = dequantize(qweight_IW[:, some_W], qzeros_GW[:, some_W], scales_GO[:, some_O], group_size, x.dtype)
        if bias_O is None:
            y_TO[:, some_O] = x_TI @ weight_IO
        else:
            y_TO[:, some_O] = torch.addmm(bias_O[some_O].to(x.dtype), x_TI, weight_IO)
    return y_TO.view(*x.shape[:-1], outputs)


def arranged_product(x_TI: Tensor, arranged: Arranged, scale_dtype: torch.dtype, bias_O: Tensor | None) -> Tensor:
    """y_TO, for any number of rows; the bias is added before the sums are rounded to the dtype of x."""
    if x_TI.is_cuda and x_TI.dtype.itemsize == 2 and arranged.in_planes:
        return expanded_product(x_TI, arranged, scale_dtype, bias_O)
    y_TO = eager_product(x_TI, arranged, scale_dtype)
    return (y_TO if bias_O is None else y_TO + bias_O).to(x_TI.dtype)


def eager_product(x_TI: Tensor, arranged: Arranged, scale_dtype: torch.dtype) -> Tensor:
    """y_TO in float32 from arranged words by few calls of torch, on any device and for any number of rows.

    A byte, of which an output has B, holds the codes of two neighbouring inputs. Codes times scales are exact in
    float32; the zeros are taken away at the end, times the sum of each group's activations.
    """
    groups = arranged.grid.shape[1]
    sums_GT = x_TI.float().unflatten(-1, (groups, -1)).sum(-1).t()
    stored_TI = in_storage_order(x_TI, groups) if arranged.in_planes else x_TI
    # A row's activations lie together: with rows side by side the library is six times slower at 2 to 8 of them.
    even_BT, odd_BT = stored_TI.float().unflatten(-1, (-1, 2)).permute(2, 0, 1).contiguous().mT
    y_OT = sums_GT.new_empty(arranged.outputs, len(x_TI))
    for some_O, part in slices(arranged, CODES_PER_EAGER_SLICE):
        scales_OG, zeros_OG = scales_and_zeros(part, scale_dtype)
        byte_scales = scales_OG.unsqueeze(1 if arranged.in_planes else 2).unsqueeze(-1)
        words = part.words if arranged.in_planes else out_of_blocks(part.words)
        bytes_ = words.contiguous().unsqueeze(-1).view(torch.uint8)
        torch.mm((bytes_ & 15).float().mul_(byte_scales).flatten(1), even_BT, out=y_OT[some_O])
        y_OT[some_O].addmm_((bytes_ >> 4).float().mul_(byte_scales).flatten(1), odd_BT)
        y_OT[some_O].addmm_(scales_OG * zeros_OG, sums_GT, alpha=-1)
    return y_OT.t()


def expanded_product(x_TI: Tensor, arranged: Arranged, scale_dtype: torch.dtype, bias_O: Tensor | None) -> Tensor:
    """y_TO for many rows on CUDA: a slice of the weight at a time, rounded to the dtype of x, and the library's matmul.

    One slice after the other is written to the same memory, because nobody holds the one before.
    """
    y_TO = x_TI.new_empty(len(x_TI), arranged.outputs)
    form, codes = expansion()
    for some_O, part in slices(arranged, codes):
        weight_IO = form(*part, scale_dtype, x_TI.dtype).view(x_TI.dtype).t()
        if bias_O is None:
            torch.mm(x_TI, weight_IO, out=y_TO[:, some_O])
        else:
            torch.addmm(bias_O[some_O].to(x_TI.dtype), x_TI, weight_IO, out=y_TO[:, some_O])
        del weight_IO
    return y_TO


def expansion() -> tuple[Callable[..., Tensor], int]:
    """`expand`, compiled if this thread may, and the codes for one call. The results are the same: nothing is rounded
    before the last step. Uncompiled it has ten temporary tensors, so the calls are smaller.
    """
    if compiler in (None, current_thread()):
        return expand_by_one_kernel, CODES_PER_EXPANDED_SLICE
    return expand, CODES_PER_EXPANDED_SLICE // 8


def expand_by_one_kernel(words_OPG: Tensor, grid_OG: Tensor, scale_dtype: torch.dtype, dtype: torch.dtype) -> Tensor:
    """`expand`, compiled."""
    return compiled_expand(words_OPG.shape, scale_dtype, dtype, words_OPG.device)(words_OPG, grid_OG)


@cache
def compiled_expand(
    shape_OPG: torch.Size, scale_dtype: torch.dtype, dtype: torch.dtype, device: torch.device
) -> Callable[..., Tensor]:
    """`expand` of words of one shape as one kernel, called without Dynamo, whose guards would take as long as it."""
    outputs, _, groups = shape_OPG
    return import_module("miniawq.inductor").lowered(
        lambda words_OPG, grid_OG: expand(words_OPG, grid_OG, scale_dtype, dtype),
        [(tuple(shape_OPG), torch.int32), ((outputs, groups), torch.int32)],
        device,
        # Below this threshold Inductor would cut it in two.
        EXPAND_IN_TILES | {"realize_opcount_threshold": 1000},
        block_sizes,
    )


class QuantLinear(nn.Module):
    """`nn.Linear` with an INT4 weight, in the buffers that AutoAWQ GEMM checkpoints name.

    `qweight` int32 [I, O/8], `qzeros` int32 [G, O/8], `scales` [G, O] and, if asked for, `bias` [O]. After `prepare`
    the weight is `arranged` for its device instead, and these are computed when somebody asks for them.
    """

    PUBLISHED = ("qweight", "qzeros", "scales")

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        group_size: int = 128,
        scale_dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.group_size = in_features if group_size == -1 else group_size
        self.scale_dtype = scale_dtype
        self.arranged: Arranged | None = None
        groups, words = in_features // self.group_size, out_features // CODES_PER_WORD
        self.register_buffer("qweight", torch.zeros(in_features, words, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(groups, words, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=scale_dtype))
        self.register_buffer("bias", torch.zeros(out_features, dtype=scale_dtype) if bias else None)

    @classmethod
    def from_quantized(cls, quantized: Quantized, bias_O: Tensor | None = None) -> "QuantLinear":
        """The layer that holds these codes."""
        outputs, inputs = quantized.codes_OI.shape
        with torch.device("meta"):
            layer = cls(inputs, outputs, bias_O is not None, quantized.group_size, quantized.scales_OG.dtype)
        layer.load_state_dict(LAYOUTS["awq"].encode(quantized), strict=False, assign=True)
        layer.bias = bias_O
        return layer

    def to_quantized(self) -> Quantized:
        """The codes, scales and zeros of this layer: `from_quantized` undone."""
        if self.arranged is not None:
            return restore(self.arranged, self.group_size, self.scale_dtype)
        tensors = {"qweight": self.qweight, "qzeros": self.qzeros, "scales": self.scales}
        return LAYOUTS["awq"].decode(tensors, self.group_size)

    def prepare(self) -> "QuantLinear":
        """Arrange the words as this device reads them fastest, in place of the published buffers. Returns self.

        A slice at a time, so that no second copy of a large layer is in memory; larger ones on a GPU, which waits for
        the launches. Float32 scales stay as they are on
        CUDA, where a scale has 16 bits.
        """
        self.scale_dtype = self.scales.dtype
        if self.arranged is None and can_arrange(self.qweight.device, self.scale_dtype):
            arranged = empty(self.out_features, self.in_features, self.group_size, self.qweight.device)
            for some_O, part in slices(arranged, WEIGHTS_PER_SLICE * (4 if arranged.in_planes else 1)):
                some_W = slice(some_O.start // CODES_PER_WORD, some_O.stop // CODES_PER_WORD)
                tensors = {
                    "qweight": self.qweight[:, some_W],
                    "qzeros": self.qzeros[:, some_W],
                    "scales": self.scales[:, some_O],
                }
                arrange(LAYOUTS["awq"].decode(tensors, self.group_size), part)
            del self.qweight, self.qzeros, self.scales
            self.arranged = arranged
        return self

    def publish(self) -> "QuantLinear":
        """Undo `prepare`. Returns self."""
        if self.arranged is not None:
            tensors, self.arranged = LAYOUTS["awq"].encode(self.to_quantized()), None
            for name, tensor in tensors.items():
                self.register_buffer(name, tensor)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] to [..., O] in the dtype of x."""
        if self.arranged is None:
            return matmul(x, self.qweight, self.qzeros, self.scales, self.group_size, self.bias)
        y_TO = arranged_product(x.reshape(-1, self.in_features), self.arranged, self.scale_dtype, self.bias)
        return y_TO.reshape(*x.shape[:-1], self.out_features)

    @staticmethod
    def together(x: Tensor, layers: Sequence[Any]) -> Sequence[Tensor]:
        """The outputs of layers that read the same input, [..., O] each: by one product if their words lie together."""
        joined = joined_words(layers)
        if joined is None:
            return [layer(x) for layer in layers]
        y = arranged_product(x.flatten(0, -2), joined, layers[0].scale_dtype, joined_bias(layers))
        return y.unflatten(0, x.shape[:-1]).split([layer.out_features for layer in layers], -1)

    def __getattr__(self, name: str) -> Any:
        if name in self.PUBLISHED and self.__dict__.get("arranged") is not None:
            return LAYOUTS["awq"].encode(self.to_quantized())[name]
        return super().__getattr__(name)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.arranged is not None:
            tensors = LAYOUTS["awq"].encode(self.to_quantized())
            destination |= {prefix + name: tensor for name, tensor in tensors.items()}
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.publish()
        super()._load_from_state_dict(*arguments)

    def _apply(self, *arguments: Any, **options: Any) -> "QuantLinear":
        """What `to`, `cuda`, `half` and their like call: the arrangement depends on the device."""
        was_arranged = self.arranged is not None
        super(QuantLinear, self.publish())._apply(*arguments, **options)
        return self.prepare() if was_arranged else self

    def extra_repr(self) -> str:
        """What `print(model)` shows in the brackets."""
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={bias}, group_size={self.group_size}"


def joined_words(layers: Sequence[Any]) -> Arranged | None:
    """The weights of layers as one, if `fuse` has laid them together."""
    if not all(isinstance(layer, QuantLinear) and layer.arranged for layer in layers):
        return None
    words, grid = (lie_together(parts) for parts in zip(*(layer.arranged for layer in layers), strict=True))
    return None if words is None or grid is None else Arranged(words, grid)


def joined_bias(layers: Sequence[Any]) -> Tensor | None:
    """The biases of layers that all have one, or none, as one."""
    return None if layers[0].bias is None else torch.cat([layer.bias.data for layer in layers])


def fuse(layers: Sequence[QuantLinear]) -> Arranged:
    """Layers that read the same input as one arranged weight, outputs behind one another.

    Afterwards the layers hold views of it: there is never a second copy of more than these layers.
    """
    parts = [layer.prepare().arranged for layer in layers]
    present = [part for part in parts if part is not None]
    assert len(present) == len(layers)
    assert len({layer.scale_dtype for layer in layers}) == 1
    joined = Arranged(*map(lay_together, zip(*present, strict=True)))
    sizes = [len(part.words) for part in present]
    for layer, words, grid in zip(layers, joined.words.split(sizes), joined.grid.split(sizes), strict=True):
        layer.arranged = Arranged(words, grid)
    return joined
