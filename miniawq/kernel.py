"""Chapter 3: the INT4 product, y = x W^T from packed words, and the layer that holds them.

`matmul_reference` is the definition. `matmul` computes it in the dtype of x, with never more than a slice of the weight
in memory, and is all that a correct engine needs. What runs faster is in `compiled/` and is tested against these two.

Shapes: O outputs, I inputs, G groups along I, W int32 words, T tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from miniawq.compiled import (
    Arranged,
    arrange,
    arrange_awq,
    can_prepack,
    for_forms,
    multiply_prepacked,
    together,
    unarrange,
)
from miniawq.errors import InvalidInput
from miniawq.packing import CODES_PER_WORD, WEIGHTS_AT_ONCE, Quantized, decode_awq, encode_awq, unpack

WORDS = ("qweight", "qzeros", "scales")


def dequantize_words(
    qweight_IW: Tensor, qzeros_GW: Tensor, scales_GO: Tensor, group_size: int, dtype: torch.dtype | None = None
) -> Tensor:
    """The weight [I, O] that AutoAWQ GEMM words stand for: (code - zero) * scale, rounded once to `dtype`.

    qweight_IW int32 [I, O/8], qzeros_GW int32 [G, O/8], scales_GO [G, O]; `dtype` is that of the scales if not given.
    `group_size` is -1 for one group of all inputs.
    """
    group_size = qweight_IW.shape[0] if group_size == -1 else group_size
    codes_IO, zeros_GO = unpack(qweight_IW), unpack(qzeros_GW)
    fits = zeros_GO.shape == scales_GO.shape == (codes_IO.shape[0] // group_size, codes_IO.shape[1])
    if not fits or not scales_GO.is_floating_point():
        scales = f"scales {scales_GO.dtype} {list(scales_GO.shape)}"
        shapes = f"qweight {list(qweight_IW.shape)}, qzeros {list(qzeros_GW.shape)}, {scales}"
        raise InvalidInput(f"these tensors are no weight in groups of {group_size}", shapes)
    # code - zero has a sign and 4 bits: its product with a scale of at most 19 bits is exact in float32.
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
    """The definition: x [..., I] to y [..., O], summed in float64 and rounded once to the dtype of x."""
    weight_IO = dequantize_words(qweight_IW, qzeros_GW, scales_GO, group_size, torch.float64)
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
    """x [..., I] to y [..., O] in the dtype of x, for any number of rows.

    Each weight is rounded once to the dtype of x; the library's matmul sums in float32. InvalidInput where x is no
    float: its weights would be rounded to whole numbers.
    """
    if not x.is_floating_point():
        raise InvalidInput(f"x is {x.dtype}", "the weights would be rounded to whole numbers", "give x as floats")
    if bias_O is not None and bias_O.shape != scales_GO.shape[1:]:
        raise InvalidInput(f"the bias has shape {tuple(bias_O.shape)}", f"there are {scales_GO.shape[1]} outputs")
    inputs, outputs = qweight_IW.shape[0], scales_GO.shape[1]
    x_TI = x.reshape(-1, inputs)
    y_TO = x.new_empty(x_TI.shape[0], outputs)
    words = max(1, WEIGHTS_AT_ONCE // (inputs * CODES_PER_WORD))
    for first in range(0, qweight_IW.shape[1], words):
        some_W = slice(first, first + words)
        some_O = slice(first * CODES_PER_WORD, (first + words) * CODES_PER_WORD)
        weight_IO = dequantize_words(
            qweight_IW[:, some_W], qzeros_GW[:, some_W], scales_GO[:, some_O], group_size, x.dtype
        )
        if bias_O is None:
            y_TO[:, some_O] = x_TI @ weight_IO
        else:
            y_TO[:, some_O] = torch.addmm(bias_O[some_O].to(x.dtype), x_TI, weight_IO)
    return y_TO.view(*x.shape[:-1], outputs)


class QuantLinear(nn.Module):
    """`nn.Linear` with an INT4 weight, in one of two forms.

    As AutoAWQ files have it: buffers `qweight` int32 [I, O/8], `qzeros` int32 [G, O/8], `scales` [G, O]. Or
    `prepacked`, as its device reads it fastest: `prepare` goes there, `publish` comes back. `bias` [O] is there if
    asked for.
    """

    qweight: Tensor | None
    qzeros: Tensor | None
    scales: Tensor | None
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
        self.prepacked: Arranged | None = None
        groups, words = in_features // self.group_size, out_features // CODES_PER_WORD
        self.register_buffer("qweight", torch.zeros(in_features, words, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(groups, words, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=scale_dtype))
        self.register_buffer("bias", torch.zeros(out_features, dtype=scale_dtype) if bias else None)

    @classmethod
    def from_quantized(cls, quantized: Quantized, bias_O: Tensor | None = None) -> "QuantLinear":
        """The layer that holds these codes, prepacked if its device can."""
        outputs, inputs = quantized.codes_OI.shape
        with torch.device("meta"):
            layer = cls(inputs, outputs, False, quantized.group_size, quantized.scales_OG.dtype)
        layer.bias = bias_O
        return layer.hold(quantized)

    def hold(self, quantized: Quantized) -> "QuantLinear":
        """Take these codes in place of the weight that was here. Returns self."""
        if can_prepack(quantized.scales_OG.device, quantized.scales_OG.dtype):
            return self._keep(arrange(quantized))
        return self._keep(None, encode_awq(quantized))

    def to_quantized(self) -> Quantized:
        """The codes, scales and zeros of this layer."""
        return unarrange(self.prepacked) if self.prepacked else decode_awq(dict(zip(WORDS, self._words(), strict=True)))

    def prepare(self) -> "QuantLinear":
        """Prepack the published words, in place of them, where the device can: on CUDA scales must have 16 bits."""
        if self.prepacked is None:
            qweight_IW, qzeros_GW, scales_GO = self._words()
            if can_prepack(qweight_IW.device, scales_GO.dtype):
                self._keep(arrange_awq(qweight_IW, qzeros_GW, scales_GO))
        return self

    def prepare_to_compile(self) -> "QuantLinear":
        """`prepare`, as compiled products read it. Returns self."""
        arranged = self.prepare().prepacked
        return self if arranged is None else self._keep(for_forms(arranged))

    def publish(self) -> "QuantLinear":
        """Undo `prepare`: the buffers of an AutoAWQ file again. Returns self."""
        return self._keep(None, encode_awq(self.to_quantized())) if self.prepacked else self

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] to [..., O] in the dtype of x."""
        if self.prepacked is None:
            return matmul(x, *self._words(), self.group_size, self.bias)
        y_TO = multiply_prepacked(x.reshape(-1, self.in_features), self.prepacked, self.bias)
        return y_TO.reshape(*x.shape[:-1], self.out_features)

    @staticmethod
    def together(x: Tensor, layers: Sequence[Any]) -> Sequence[Tensor]:
        """The outputs [..., O] of layers that read the same input: one product, if their words allow it."""
        parts = [layer.prepacked for layer in layers if isinstance(layer, QuantLinear) and layer.prepacked]
        whole = together(parts) if len(parts) == len(layers) else None
        if whole is None:
            return [layer(x) for layer in layers]
        y = multiply_prepacked(x.flatten(0, -2), whole, joined_bias(layers))
        return y.unflatten(0, x.shape[:-1]).split([layer.out_features for layer in layers], -1)

    def _words(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.qweight is not None
        assert self.qzeros is not None
        assert self.scales is not None
        return self.qweight, self.qzeros, self.scales

    def _keep(self, prepacked: Arranged | None, words: dict[str, Tensor] | None = None) -> "QuantLinear":
        self.prepacked = prepacked
        for name in WORDS:
            setattr(self, name, None if words is None else words[name])
        return self

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self._refuse_prepacked("saved")
        super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._refuse_prepacked("loaded into")
        super()._load_from_state_dict(*arguments)

    def _refuse_prepacked(self, what: str) -> None:
        if self.prepacked is not None:
            why = "its weight lies as its device reads it fastest, which is no file format"
            raise InvalidInput(f"a prepared QuantLinear cannot be {what}", why, "call publish() on it first")

    def _apply(self, *arguments: Any, **options: Any) -> "QuantLinear":
        """What `to`, `cuda`, `half` and their like call: how words are prepacked depends on the device."""
        was_prepacked = self.prepacked is not None
        super(QuantLinear, self.publish())._apply(*arguments, **options)
        return self.prepare() if was_prepacked else self

    def extra_repr(self) -> str:
        """What `print(model)` shows in the brackets."""
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={bias}, group_size={self.group_size}"


def joined_bias(layers: Sequence[Any]) -> Tensor | None:
    """The biases of layers that all have one, or none, as one."""
    return None if layers[0].bias is None else torch.cat([layer.bias.data for layer in layers])
