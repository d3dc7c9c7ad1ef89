"""The INT4 product as expressions that `torch.compile` turns into one fast kernel each.

**Words and planes.** One load should bring eight weights, and no arithmetic should be needed to find out which. So a
group of S inputs of one output becomes P = S / 8 words, and word p of group g holds, sequentially, the codes of inputs
g S + 8 p + 0..7. A CPU reads the words of a group one after the other, [O, G, P]. On CUDA, where neighbouring threads
take neighbouring groups, the words of the same p lie together as a plane [O, G] of [O, P, G].

    rows      form                                                       where
    1..3      `reduce_planes`: multiply and sum, float32                 CUDA
    4..64     `dot_planes`: eight tensor-core products, one a nibble     CUDA
    more      `expand`, then the library's matmul, a slice at a time     CUDA
    1..       `reduce_words`: multiply and sum, float32                  CPU

A form is a pure function of tensors, to be called inside a larger compiled function; `compiled` compiles it alone.

Shapes: O outputs, I inputs, G groups, P planes (S / 8), N nibbles (8), J = P G words of one output, T rows, K splits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.choices import InductorChoices
from torch._inductor.codegen.triton import FixedTritonConfig
from torch._inductor.virtualized import V

from miniawq.packing import CODES_PER_WORD, SEQUENTIAL, pack, unpack

# Where `reduce_planes` finds nibble i: shift the word right by the first number, then the nibble begins at the second.
# Bit 16 is the last in place, because bit 23 of a float begins its exponent.
SUBNORMAL_PLACES = ((0, 0), (0, 4), (0, 8), (0, 12), (0, 16), (12, 8), (12, 12), (12, 16))
PRESCALE = 80

# Where `dot_planes` finds nibble i: shift the word left (right where negative), then the nibble begins at bit 12 or 16.
MAGIC_PLACES = ((16, 16), (8, 12), (8, 16), (0, 12), (0, 16), (-8, 12), (-8, 16), (-12, 16))


def sequential_words(codes_OI: Tensor, groups: int) -> Tensor:
    """The words [O, G, P] of codes 0..15."""
    return pack(codes_OI, SEQUENTIAL).unflatten(1, (groups, -1))


def codes_of_words(words_OGP: Tensor) -> Tensor:
    """The inverse of `sequential_words`."""
    return unpack(words_OGP.flatten(1), SEQUENTIAL)


def pack_grid(scales_OG: Tensor, zeros_OG: Tensor) -> Tensor:
    """A group's 16-bit scale and its zero as one int32, grid_OG: the scale's bits below, the zero above.

    Were they tensors of 16 and 8 bits, Triton would give every thread eight or sixteen neighbouring groups of one
    output, to fill its widest load; with four (of 32 bits) a thread has several outputs to use its activations for.
    """
    return zeros_OG.int() << 16 | (scales_OG.view(torch.int16).int() & 0xFFFF)


def unpack_grid(grid_OG: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The scales and zeros of `pack_grid`, in float32."""
    return grid_OG.to(torch.int16).view(scale_dtype).float(), (grid_OG >> 16).float()


def planes(words_OPG: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Views [O, V, G] of the words, one for each step of `reduce_planes`: plane q part v is word q V + v of a group."""
    return words_OPG.unflatten(1, (-1, parts)).unbind(1)


def prescale(x_TI: Tensor, groups: int, parts: int = 1) -> tuple[Tensor, Tensor]:
    """Activations as `reduce_planes` wants them: x_QNTVG float32, each times its nibble's power of two; sums_TVG.

    Powers of two are exact as long as |x| < 2^48. The sums are those of each part, in units of 2^(149 - PRESCALE).
    """
    x_TGQVN = x_TI.float().unflatten(-1, (groups, -1, parts, CODES_PER_WORD))
    scaled_N = [
        x_TGQV * 2.0 ** (PRESCALE - place)
        for (_, place), x_TGQV in zip(SUBNORMAL_PLACES, x_TGQVN.unbind(-1), strict=True)
    ]
    x_QNTVG = torch.stack(scaled_N).permute(3, 0, 1, 4, 2).contiguous()
    return x_QNTVG, x_TGQVN.sum((2, 4)).transpose(1, 2).contiguous() * 2.0 ** (PRESCALE - 149)


def reduce_planes(
    planes_OVG: Sequence[Tensor], grid_OG: Tensor, scale_dtype: torch.dtype, x_QNTVG: Tensor, sums_TVG: Tensor
) -> Tensor:
    """y [T, O] in float32 for a few rows: sum over groups of scale * (sum of code * x - zero * sum of x).

    Turning a nibble into a float costs one instruction. Masked out of the word and read as a float, a nibble n whose
    lowest bit is bit b has a zero exponent: it is the subnormal number n * 2^(b - 149), exactly. The activation it
    meets was multiplied by 2^(80 - b) beforehand (`prescale`), so every product is n * x * 2^(80 - 149), whichever b
    it came from, and one multiplication by 2^(149 - 80) at the end gives n * x:

        (word & (15 << b)) as float * (x * 2^(80 - b)) = n * x * 2^-69

    A fused multiply-add takes subnormal inputs at full speed and rounds its result, which is a normal number, once.
    So a weight costs two instructions, an AND and a multiply-add, and no weight is ever rounded.

    A group is summed in V parts. More parts mean more and shorter threads, each with fewer activations to load for
    every output it computes. The planes are tensors of their own, because Inductor marks a buffer that it loads once
    `evict_first`, and one loaded several times `evict_last`.
    """
    rows_OVG: list[Any] = [0.0] * x_QNTVG.shape[2]
    for words_OVG, x_NTVG in zip(planes_OVG, x_QNTVG.unbind(), strict=True):
        for (shift, place), x_TVG in zip(SUBNORMAL_PLACES, x_NTVG.unbind(), strict=True):
            shifted_OVG = words_OVG >> shift if shift else words_OVG
            codes_OVG = (shifted_OVG & (15 << place)).view(torch.float32)
            for row, (sum_OVG, x_VG) in enumerate(zip(rows_OVG, x_TVG.unbind(), strict=True)):
                rows_OVG[row] = sum_OVG + codes_OVG * x_VG
    scales_O1G, zeros_O1G = unpack_grid(grid_OG.unsqueeze(1), scale_dtype)
    y_TO = [
        (scales_O1G * (sum_OVG - zeros_O1G * sums_VG)).sum((1, 2)) * 2.0 ** (149 - PRESCALE)
        for sum_OVG, sums_VG in zip(rows_OVG, sums_TVG.unbind(), strict=True)
    ]
    return torch.stack(y_TO)


def magic_exponents(device: torch.device) -> Tensor:
    """The bits of 2^11 and 2^7 as floats, int32 [2]: a tensor, because one instruction takes one constant at most."""
    return torch.tensor([(127 + 11) << 23, (127 + 7) << 23], dtype=torch.int32, device=device)


def spread(x_TI: Tensor, groups: int) -> Tensor:
    """Activations as `dot_planes` wants them: x_NJT, the inputs of each nibble, T padded with zeros to 16, 32 or 64."""
    rows = x_TI.shape[0]
    padding = (16 if rows <= 16 else 32 if rows <= 32 else -(-rows // 64) * 64) - rows
    x_TGPN = torch.nn.functional.pad(x_TI, (0, 0, 0, padding)).unflatten(-1, (groups, -1, CODES_PER_WORD))
    return x_TGPN.permute(3, 2, 1, 0).flatten(1, 2).contiguous()


def dot_planes(
    words_OPG: Tensor,
    grid_OG: Tensor,
    scale_dtype: torch.dtype,
    x_NJT: Tensor,
    exponents: Tensor,
    splits: int = 1,
) -> Tensor:
    """y [O, T] for 4 to 64 rows: one tensor-core product for each of the eight nibbles of a word, in one kernel.

    A nibble n beginning at bit b of a float's mantissa, under the exponent of 2^(23 - b), is the number 2^(23 - b) + n.
    One multiply-add by the scale, with -(2^(23 - b) + zero) * scale to be added, leaves (n - zero) * scale.
    `splits` cuts the planes into parts summed by different programs, for matrices with few outputs.
    """
    exponent_12, exponent_16 = exponents.unbind()
    words_KOPG = words_OPG.unflatten(1, (splits, -1)).transpose(0, 1)
    scales_O1G, zeros_O1G = unpack_grid(grid_OG.unsqueeze(1), scale_dtype)
    offsets_O1G = zeros_O1G * scales_O1G
    y_KOT: Any = 0.0
    for (shift, place), x_JT in zip(MAGIC_PLACES, x_NJT.unbind(), strict=True):
        shifted_KOPG = words_KOPG << shift if shift > 0 else words_KOPG >> -shift
        magic_KOPG = (shifted_KOPG & (15 << place)) | (exponent_12 if place == 12 else exponent_16)
        weight_KOPG = magic_KOPG.view(torch.float32) * scales_O1G + (-offsets_O1G - scales_O1G * 2.0 ** (23 - place))
        weight_KOJ = weight_KOPG.to(x_NJT.dtype).flatten(2)
        if splits == 1:
            product_KOT = torch.mm(weight_KOJ.squeeze(0), x_JT).unsqueeze(0)
        else:
            product_KOT = torch.bmm(weight_KOJ, x_JT.unflatten(0, (splits, -1)))
        y_KOT = y_KOT + product_KOT
    if splits == 1:
        return y_KOT.squeeze(0)
    # `as_strided` makes Inductor write the partial sums in float32, as they are in registers, and not rounded.
    partial_KOT = y_KOT.float().as_strided(y_KOT.shape, y_KOT.stride())
    return partial_KOT.sum(0).to(x_NJT.dtype)


def in_storage_order(x_TI: Tensor, groups: int) -> Tensor:
    """The activations in the order of the words, for a weight that `expand` has written: [T, (P, G, N)]."""
    return x_TI.unflatten(-1, (groups, -1, CODES_PER_WORD)).transpose(1, 2).flatten(1)


def expand(
    words_OPG: Tensor, grid_OG: Tensor, scale_dtype: torch.dtype, exponents: Tensor, dtype: torch.dtype
) -> Tensor:
    """The weight [O, (P, G, N)] in storage order, each (code - zero) * scale rounded once to `dtype`, of 16 bits.

    A thread takes half a word and writes four weights as one int64, next to its neighbours'. The nibbles are moved
    under the exponent of 2^7, as in `dot_planes`; (2^7 + zero) * scale has 19 bits, so nothing is rounded before.
    """
    scales_O1G1, zeros_O1G1 = unpack_grid(grid_OG.unsqueeze(1).unsqueeze(-1), scale_dtype)
    offsets_O1G1 = -(zeros_O1G1 + 2.0**7) * scales_O1G1
    _, exponent = exponents.unbind()
    halves = torch.arange(0, 32, 16, device=words_OPG.device, dtype=torch.int32)
    half_OPG2 = words_OPG.unsqueeze(-1) >> halves
    bits: list[Tensor] = []
    for shift in (16, 12, 8, 4):
        magic_OPG2 = (half_OPG2 << shift) & (15 << 16) | exponent
        weight_OPG2 = magic_OPG2.view(torch.float32) * scales_O1G1 + offsets_O1G1
        bits.append(weight_OPG2.to(dtype).view(torch.int16).to(torch.int32))
    low, high = ((second << 16) | (first & 0xFFFF) for first, second in (bits[:2], bits[2:]))
    return (high.to(torch.int64) << 32 | (low.to(torch.int64) & 0xFFFFFFFF)).flatten(1)


def prescale_words(x_TI: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Activations as `reduce_words` wants them: x_NTGP float32, nibbles 0..6 divided by 16^nibble; means_TG.

    A mean is the sum of a group's activations, divided by its words: what one word's zeros take away.
    """
    x_TGPN = x_TI.float().unflatten(-1, (groups, -1, CODES_PER_WORD))
    x_NTGP = torch.stack([x_TGP * 16.0 ** -(nibble % 7) for nibble, x_TGP in enumerate(x_TGPN.unbind(-1))])
    return x_NTGP, x_TGPN.sum(-1).mean(-1)


def reduce_words(words_OGP: Tensor, scales_OG: Tensor, zeros_OG: Tensor, x_NTGP: Tensor, means_TG: Tensor) -> Tensor:
    """y [T, O] in float32 on a CPU: `reduce_planes` with conversions, at which a CPU is good, instead of subnormals.

    The words come as float32 and are read as int32 here, because Inductor's vector load of integers goes through the
    stack (`Vectorized<int32_t>::loadu` of torch 2.13 on AVX2) and that of floats does not. A nibble is converted where
    it stands, as n * 16^i, which the activation's 16^-i undoes; only the highest, beside the sign, is moved down.
    """
    words_OGP = words_OGP.view(torch.int32)
    rows_OGP: list[Any] = [0.0] * x_NTGP.shape[1]
    for nibble, x_TGP in enumerate(x_NTGP.unbind()):
        codes_OGP = ((words_OGP >> 28) & 15 if nibble == 7 else words_OGP & (15 << 4 * nibble)).float()
        for row, (sum_OGP, x_GP) in enumerate(zip(rows_OGP, x_TGP.unbind(), strict=True)):
            rows_OGP[row] = sum_OGP + codes_OGP * x_GP
    scales_OG1, zeros_OG = scales_OG.float().unsqueeze(-1), zeros_OG.float()
    y_TO = [
        (scales_OG1 * (sum_OGP - (zeros_OG * means_G).unsqueeze(-1))).sum((1, 2))
        for sum_OGP, means_G in zip(rows_OGP, means_TG.unbind(), strict=True)
    ]
    return torch.stack(y_TO)


class BlockSizes(InductorChoices):
    """Inductor's choices, except that `choose` knows the block sizes of the kernels of this file: no search."""

    def __init__(self, choose: Callable[..., dict[str, int] | None]) -> None:
        self.choose = choose

    def uuid(self) -> str:
        """Part of the key of Inductor's cache of compiled graphs."""
        return __name__

    def triton_kernel_kwargs(self, kernel_cls: Any, features: Any, groups: Any, kernel_kwargs: Any) -> dict[str, Any]:
        """The hook that Inductor offers for fixed configurations."""
        reductions = [node.node.get_reduction_type() for node in features.reduction_nodes()]
        words = [name for name in features.buf_accesses() if V.graph.get_dtype(name) == torch.int32]
        if "dot" in reductions:
            blocks = self.choose("dot", sizes={name: int(size) for name, size in groups[0].items()})
        elif reductions and len(words) >= 4:
            sizes = {"x": int(features.numel), "r0_": int(features.reduction_numel)}
            blocks = self.choose("planes", sizes=sizes, sums=len(reductions))
        else:
            blocks = None
        if blocks is None:
            return kernel_kwargs
        return kernel_kwargs | {"fixed_config": FixedTritonConfig(blocks), "override_persistent_reduction": False}


OPTIONS: dict[str, Any] = {
    "triton.native_matmul": True,
    # Below these thresholds Inductor would cut the long sums into several kernels.
    "realize_opcount_threshold": 100_000,
    "realize_reads_threshold": 1_000,
    "realize_acc_reads_threshold": 1_000,
    "cpp.enable_floating_point_contract_flag": "fast",
}


def compiled(
    function: Callable[..., Any], choose: Callable[..., dict[str, int] | None], **options: Any
) -> Callable[..., Any]:
    """`function` compiled for the shapes it meets, with the block sizes that `choose` knows."""
    lowered = torch.compile(function, fullgraph=True, dynamic=False, options=OPTIONS | options)
    choices = BlockSizes(choose)

    def call(*arguments: Any) -> Any:
        with V.set_choices_handler(choices):
            return lowered(*arguments)

    return call
