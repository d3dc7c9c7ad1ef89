"""The INT4 matrix product: y = x W^T from packed words.

`dequantize` and `matmul_reference` are the definition. Everything else in this file computes the same function and is
tested against them. Shapes: I input features, O output features, G groups along I, W int32 words, T tokens.
"""

import torch
from torch import Tensor, nn

from miniawq.errors import InvalidInput
from miniawq.packing import CODES_PER_WORD, LAYOUTS, Quantized, unpack

WEIGHTS_PER_SLICE = 1 << 22


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


class QuantLinear(nn.Module):
    """`nn.Linear` with an INT4 weight, in the buffers that AutoAWQ GEMM checkpoints name.

    `qweight` int32 [I, O/8], `qzeros` int32 [G, O/8], `scales` [G, O] and, if asked for, `bias` [O].
    """

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
        tensors = {"qweight": self.qweight, "qzeros": self.qzeros, "scales": self.scales}
        return LAYOUTS["awq"].decode(tensors, self.group_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] to [..., O] in the dtype of x."""
        return matmul(x, self.qweight, self.qzeros, self.scales, self.group_size, self.bias)

    def extra_repr(self) -> str:
        """What `print(model)` shows in the brackets."""
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={bias}, group_size={self.group_size}"
