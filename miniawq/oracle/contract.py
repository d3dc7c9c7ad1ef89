"""What an implementation promises. The docstrings of `Target` are the specification; `FLAGS` are the legal differences.

A target is any object (a module, a class instance, a program that speaks `stdio`) with some of the functions below, or
with further attributes of `Limits` where it does not take every shape. What it lacks is reported as skipped, never as
passed.

Shapes: K input features, N output features, G groups along K (K / group_size), W int32 words (N / 8), T tokens. The
orientation is that of the files: [K, N], the transpose of `nn.Linear.weight`. Tensors arrive on the device the suite
was started with; results may lie on any device and may be anything that `torch.as_tensor` takes, a NumPy array
included. No function may change the tensors it is given, or a result that it has given. Arguments may be views with any
strides and offsets, unless a function says otherwise; none requires a gradient. What is refused for its dtype may also
be taken rightly.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

CONTRACT = "1"
FUNCTIONS = ("pack", "unpack", "dequantize", "quantize", "matmul", "load_checkpoint", "search_scales", "search_clip")

LEVELS = {
    "L0": "storage",
    "L1": "dequantization",
    "L2": "rounding",
    "L3": "multiplication",
    "L4": "checkpoints",
    "L5": "search",
}

FLAGS = {
    "ZeroNotInRange": "The grid spans min..max of the group instead of min(w, 0)..max(w, 0), as AutoAWQ's and "
    "llm-awq's does. The file is valid, but a group whose weights all have one sign is off by far more than half a "
    "scale: weights of 1.0 to 1.1 come back as 0.1, a constant 0.5 as 0.00001.",
    "HalfArithmetic": "Scales or codes are computed in half precision. The file is valid; a weight near the middle of "
    "two codes may get the farther one, with an error of up to 0.522 scales (float16) or 0.57 scales (bfloat16).",
    "ScaleFloor": "Scales have a floor, such as AutoAWQ's 1e-5 / 15, below which groups of tiny weights all get one "
    "scale. The file is valid; such weights lose relative precision, and the scale no longer follows the weights.",
    "HalfAccumulation": "The matmul adds in half precision. Every exact check still holds; sums of many unequal "
    "products carry errors of up to K / 2048 of their size, and partial sums beyond 65504 overflow.",
    "NoShapeCheck": "Arguments that do not fit together are not refused. With right arguments results are right.",
    "NoRangeCheck": "Codes above 15 or weights that are not finite are not refused. On legal input results are right.",
    "TwoRoundings": "The product is rounded more than once (to bfloat16 on the way, or as code * scale - zero * "
    "scale). Weights are off by up to one unit in the last place of the rougher format.",
    "TensorFloat32": "A float32 x is multiplied as TF32 or float16, with 11 bits, as tensor cores do by default.",
    "ScaleToNearest": "Scales are rounded to nearest instead of up, or codes are computed from the scale before it is "
    "rounded. The file is valid; a weight at the end of its group's range is off by up to 0.508 scales, not 0.5.",
    "NoTypeCheck": "Arguments of a wrong dtype are taken as they lie in memory, or cut to the right one.",
    "FlushedSubnormals": "Scales or weights below 2**-14 become zero. Real checkpoints do hold such scales.",
}


@dataclass(frozen=True)
class Limits:
    """Shapes and types a target takes, read from its attributes of the same names; checks outside them are skipped."""

    group_sizes: tuple[int, ...] = (-1, 32, 64, 128)
    multiple_of_k: int = 1
    multiple_of_n: int = 8
    dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32")
    max_rows: int = 1 << 30
    max_weights: int = 1 << 40

    @classmethod
    def of(cls, target: Any) -> "Limits":
        """The target's own limits; an attribute it lacks has the default."""
        return cls(**{name: getattr(target, name, getattr(cls, name)) for name in cls.__dataclass_fields__})


class Target(Protocol):
    """The contract, version `CONTRACT`. `name` and `version` (strings) are optional and only printed."""

    def pack(self, codes: Tensor) -> Tensor:
        """Codes uint8 [R, C], values 0..15, to words int32 [R, C / 8].

        Nibble i (bits 4i to 4i + 3) of word j holds column 8j + (0, 2, 4, 6, 1, 3, 5, 7)[i]: AutoAWQ's GEMM order, so
        columns 0..7 with codes 0..7 give 0x75316420. ValueError on a code above 15 or when C is no multiple of 8.
        """

    def unpack(self, words: Tensor) -> Tensor:
        """Words int32 [R, C / 8] to codes uint8 [R, C]: the inverse of `pack`, for every pattern of 32 bits."""

    def dequantize(self, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
        """Weights float16 [K, N] from qweight int32 [K, N / 8], qzeros int32 [G, N / 8] and scales float16 [G, N].

        weight[k, n] = (code[k, n] - zero[k // group_size, n]) * scale[k // group_size, n], the exact product rounded
        once to nearest even. Zeros are stored as they are, with no offset. A group_size of -1 means one group of K
        inputs; no other number below 1 is a size. Raises (anything) when the shapes do not fit together.
        """

    def quantize(self, weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes uint8 [K, N], zeros uint8 [G, N] and scales float16 [G, N] of a weight [N, K] of any float dtype.

        Plain rounding to nearest, no search. With m = min(w, 0) and M = max(w, 0) of a group, the scale is (M - m) / 15
        rounded up to float16, positive and finite, and no weight is off by more than half a scale. A scale rounded to
        nearest costs up to 0.508 scales and has a name, `ScaleToNearest`. ValueError on NaN, on infinity, on a scale
        beyond float16, or when group_size does not divide K.
        """

    def matmul(
        self, x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, bias: Tensor | None = None
    ) -> Tensor:
        """`x @ weight + bias`, x [..., K] of float16, bfloat16 or float32, the result [..., N] in the dtype of x.

        The weight is that of `dequantize`, rounded to the dtype of x or not rounded at all; sums are kept in float32 or
        better. bias [N] has the dtype of x; another shape is not broadcast. Any number of leading dimensions, any
        strides, no rows included. Infinity in x may give NaN, where the zero is taken out of the sum. Raises (anything)
        when the shapes do not fit together.
        """

    def load_checkpoint(self, directory: Path) -> Mapping[str, Tensor]:
        """Every tensor of the model under its Hugging Face name, quantized linears as dense weights [N, K].

        Dense tensors as they are stored, quantized ones as `dequantize` gives them, transposed. A key of config.json
        that is null is an absent one. Raises (anything) on what it would otherwise read wrongly; the message names the
        file, the tensor or the key at fault.
        """

    def search_scales(self, weight: Tensor, x: Tensor, group_size: int) -> Tensor:
        """One positive float32 factor [K] for each input of a weight float [N, K], from activations float [T, K].

        Rounding `weight * factors` and giving it `x / factors` is on x never worse than rounding `weight`: all ones are
        among the candidates. The same arguments give the same factors.
        """

    def search_clip(self, weight: Tensor, x: Tensor, group_size: int) -> Tensor:
        """The largest absolute value float32 [N, G] to keep in each group of a weight float [N, K].

        Rounding the clamped weight, or the weight on the clamped one's grid, is for every output channel and group, on
        x, never worse than rounding the weight. No bound is above the group's own largest absolute value.
        """
