"""The formats that people compare AWQ with, each as the numbers that its file stands for, and the bits of that file.

A function takes a float32 weight and gives its numbers after a round trip through the format. The specification is in
each docstring with its source. Only GPTQ reads more than the weight: the second moments of a text.
`scripts/peers/formats.py` compares every one with another implementation.

Shapes: 8 are the groups of one of llama.cpp's super-blocks.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from miniawq.packing import TOP_CODE, asymmetric_grid, dequantize, grouped, quantize

DAMPING = 0.01
E4M3_LARGEST, E4M3_EPSILON, E2M1_LARGEST = 448.0, 0.125, 6.0
NF4_LEVELS = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip


class Approximation(NamedTuple):
    """The numbers [O, I] in float32 that a format holds in the place of a weight, and how many bits hold them all."""

    weight_OI: Tensor
    bits: int


class Format(NamedTuple):
    """How a weight is approximated, and the number of inputs that must divide a layer's."""

    approximate: Callable[[Tensor], Approximation]
    block: int


def _scaled(elements: Tensor, element_bits: int, scales: Tensor, scale_bits: int) -> Approximation:
    """Elements times scales: [O, I] and [O, 1], or [O, G, S] and [O, G, 1]."""
    bits = element_bits * elements.numel() + scale_bits * scales.numel()
    return Approximation((elements * scales).flatten(1), bits)


def bf16(weight_OI: Tensor) -> Approximation:
    """bfloat16: 8 bits of mantissa, rounded to nearest even."""
    return Approximation(weight_OI.bfloat16().float(), 16 * weight_OI.numel())


def rtn(weight_OI: Tensor, group_size: int) -> Approximation:
    """Plain rounding to the INT4 number of chapter 1: float16 scales, a zero of 4 bits in each group."""
    quantized = quantize(weight_OI, group_size)
    return Approximation(dequantize(quantized, torch.float32), int4_bits(weight_OI, group_size))


def int4_bits(weight_OI: Tensor, group_size: int) -> int:
    """Bits of an AWQ layer: codes, and a scale of 16 and a zero of 4 bits for each group."""
    return 4 * weight_OI.numel() + (16 + 4) * grouped(weight_OI, group_size).shape[:2].numel()


def int8(weight_OI: Tensor) -> Approximation:
    """One float32 scale a row, the largest magnitude / 127.5; codes -128..127 to nearest even.

    compressed-tensors: W8A16 with the strategy `channel`, symmetric (`calculate_qparams`).
    """
    scale_O1 = weight_OI.abs().amax(1, keepdim=True) / 127.5
    codes_OI = (weight_OI / nonzero(scale_O1)).round().clamp(-128, 127)
    return _scaled(codes_OI, 8, scale_O1, 32)


def fp8(weight_OI: Tensor) -> Approximation:
    """E4M3 without infinities, one float32 scale a row: the largest magnitude / 448.

    compressed-tensors: FP8_DYNAMIC; torchao: `Float8WeightOnlyConfig`. Micikevicius et al. 2022, arXiv 2209.05433.
    """
    scale_O1 = weight_OI.abs().amax(1, keepdim=True) / E4M3_LARGEST
    return _scaled(as_e4m3(weight_OI / nonzero(scale_O1)), 8, scale_O1, 32)


def nvfp4(weight_OI: Tensor) -> Approximation:
    """E2M1 in groups of 16 with an E4M3 scale each, and one float32 scale for all: 448 * 6 / the largest magnitude.

    compressed-tensors: NVFP4A16 (`generate_gparam`, `calculate_qparams`), after NVIDIA's TensorRT Model Optimizer.
    """
    groups_OGS = grouped(weight_OI, 16)
    whole = E4M3_LARGEST * E2M1_LARGEST / nonzero(weight_OI.abs().max())
    scales_OG1 = as_e4m3(whole * (groups_OGS.abs().amax(-1, keepdim=True) / E2M1_LARGEST))
    scales_OG1 = scales_OG1.where(scales_OG1 > 0, E4M3_EPSILON) / whole  # a group far below the largest
    found = _scaled(as_e2m1(groups_OGS / scales_OG1), 4, scales_OG1, 8)
    return found._replace(bits=found.bits + 32)


def mxfp4(weight_OI: Tensor) -> Approximation:
    """E2M1 in groups of 32 with a power of two each: 2 to the floor of log2 of the largest magnitude, less 2.

    OCP Microscaling Formats 1.0, section 6.3. Magnitudes beyond 6 become 6.
    """
    groups_OGS = grouped(weight_OI, 32)
    _, exponent_OG1 = groups_OGS.abs().amax(-1, keepdim=True).frexp()  # magnitude = [0.5, 1) * 2^exponent
    scales_OG1 = (exponent_OG1 - 1 - 2).clamp(-127, 127).float().exp2()
    return _scaled(as_e2m1(groups_OGS / scales_OG1), 4, scales_OG1, 8)


def nf4(weight_OI: Tensor) -> Approximation:
    """The nearest of 16 quantiles of a normal distribution, in groups of 64, with the largest magnitude in float32.

    bitsandbytes: `quantize_4bit` with quant_type nf4 and no second quantization. Dettmers et al. 2023, arXiv
    2305.14314, appendix E.
    """
    groups_OGS = grouped(weight_OI, 64)
    largest_OG1 = groups_OGS.abs().amax(-1, keepdim=True)
    levels_K = NF4_LEVELS.to(weight_OI.device)
    middles_K = (levels_K[1:] + levels_K[:-1]) / 2
    nearest_OGS = levels_K[torch.bucketize(groups_OGS / nonzero(largest_OG1), middles_K)]
    return _scaled(nearest_OGS, 4, largest_OG1, 32)


def q4_0(weight_OI: Tensor) -> Approximation:
    """llama.cpp's Q4_0: groups of 32; the weight of the largest magnitude, sign included, is -8 float16 scales.

    ggml-quants.c, `quantize_row_q4_0_ref`: codes are whole parts of w / d + 8.5 with d in float32, at most 15.
    """
    groups_OGS = grouped(weight_OI, 32)
    largest_OG1 = groups_OGS.gather(-1, groups_OGS.abs().argmax(-1, keepdim=True))
    scales_OG1 = largest_OG1 / -8
    inverse_OG1 = nonzero(scales_OG1).reciprocal().where(scales_OG1 != 0, 0)
    codes_OGS = (groups_OGS * inverse_OG1 + 8.5).trunc().clamp(0, 15)
    return _scaled(codes_OGS - 8, 4, scales_OG1.half().float(), 16)


def q4_k(weight_OI: Tensor) -> Approximation:
    """llama.cpp's Q4_K: w = d s code - e m, with 8 groups of 32 whose s and m have 6 bits, and d and e in float16.

    ggml-quants.c, `quantize_row_q4_K_ref`: each group's scale and lowest value are searched (`make_qkx2_quants`), then
    rounded to 6 bits, and codes chosen again.
    """
    blocks_OG8S = grouped(weight_OI, 256).unflatten(-1, (8, 32))
    scales_OG8, lowest_OG8 = searched_groups(blocks_OG8S)
    parts = []
    for values_OG8 in (scales_OG8, -lowest_OG8):
        largest_OG1 = values_OG8.amax(-1, keepdim=True)
        steps_OG8 = (63 / nonzero(largest_OG1) * values_OG8).round().clamp(0, 63)
        parts.append(steps_OG8 * (largest_OG1 / 63).half().float())
    scales_OG81, below_OG81 = (part_OG8.unsqueeze(-1) for part_OG8 in parts)
    codes_OG8S = ((blocks_OG8S + below_OG81) / nonzero(scales_OG81)).round().clamp(0, TOP_CODE)
    found_OG8S = codes_OG8S * scales_OG81 - below_OG81
    bits = 4 * weight_OI.numel() + (8 * (6 + 6) + 16 + 16) * blocks_OG8S.shape[:2].numel()
    return Approximation(found_OG8S.reshape(weight_OI.shape), bits)


def searched_groups(blocks_OG8S: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and lowest values (not above 0) [O, G, 8]: of 21 least squares fits, whichever loses least.

    Weights count by their size. A fit is that of the codes to which 14 to 16 steps lead, over the range from the
    lowest value of the best fit so far to the largest weight.
    """
    size_OG8S = blocks_OG8S.abs() + blocks_OG8S.square().mean(-1, keepdim=True).sqrt()
    highest_OG8, lowest_OG8 = blocks_OG8S.amax(-1), blocks_OG8S.amin(-1).clamp(max=0)

    def codes(steps: float) -> Tensor:
        inverse_OG8 = steps / nonzero(highest_OG8 - lowest_OG8)
        return ((blocks_OG8S - lowest_OG8[..., None]) * inverse_OG8[..., None]).round().clamp(0, TOP_CODE)

    def loss(codes_OG8S: Tensor, scales_OG8: Tensor, low_OG8: Tensor) -> Tensor:
        error_OG8S = scales_OG8[..., None] * codes_OG8S + low_OG8[..., None] - blocks_OG8S
        return (size_OG8S * error_OG8S.square()).sum(-1)

    scales_OG8 = (highest_OG8 - lowest_OG8) / TOP_CODE
    least_OG8 = loss(codes(TOP_CODE), scales_OG8, lowest_OG8)
    size_OG8, x_OG8 = size_OG8S.sum(-1), (size_OG8S * blocks_OG8S).sum(-1)
    for step in range(21):
        codes_OG8S = codes(TOP_CODE - 1 + 0.1 * step)
        l_OG8, l2_OG8 = (size_OG8S * codes_OG8S).sum(-1), (size_OG8S * codes_OG8S.square()).sum(-1)
        xl_OG8 = (size_OG8S * codes_OG8S * blocks_OG8S).sum(-1)
        determinant_OG8 = size_OG8 * l2_OG8 - l_OG8.square()
        fit_OG8 = (size_OG8 * xl_OG8 - x_OG8 * l_OG8) / determinant_OG8
        low_OG8 = (l2_OG8 * x_OG8 - l_OG8 * xl_OG8) / determinant_OG8
        fit_OG8, low_OG8 = fit_OG8.where(low_OG8 <= 0, xl_OG8 / l2_OG8), low_OG8.clamp(max=0)
        lost_OG8 = loss(codes_OG8S, fit_OG8, low_OG8)
        better_OG8 = (determinant_OG8 > 0) & (lost_OG8 < least_OG8)
        scales_OG8, lowest_OG8 = fit_OG8.where(better_OG8, scales_OG8), low_OG8.where(better_OG8, lowest_OG8)
        least_OG8 = lost_OG8.where(better_OG8, least_OG8)
    return scales_OG8, lowest_OG8


def gptq_rounding(weight_OI: Tensor, moments_II: Tensor, group_size: int, act_order: bool = False) -> Approximation:
    """GPTQ: inputs are rounded one after the other, and those after one take up its error by least squares.

    Frantar et al. 2022, arXiv 2210.17323, algorithm 1, with C = mean(x x^T) damped by a hundredth of its mean diagonal.
    The grid is that of chapter 1, taken of each group when its first input's turn has come. With `act_order` the inputs
    come by falling C_ii, groups are of neighbours in that order, and a file holds an int32 for each input.
    An input that the text never enters keeps its weights (the authors' code makes them 0).
    """
    inputs = weight_OI.shape[1]
    order_I = torch.arange(inputs, device=weight_OI.device)
    if act_order:
        order_I = moments_II.diagonal().argsort(descending=True, stable=True)
    weight_IO = weight_OI.t()[order_I].contiguous()
    damped_II = moments_II[order_I][:, order_I]
    damped_II.diagonal().add_(DAMPING * damped_II.diagonal().mean())
    upper_II = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped_II)), upper=True)
    size = grouped(weight_OI, group_size).shape[-1]
    for first in range(0, inputs, size):
        here, after = slice(first, first + size), slice(first + size, inputs)
        weight_SO, upper_SS = weight_IO[here], upper_II[here, here]
        error_SO = torch.empty_like(weight_SO)
        scales_O, zeros_O = (part_O1[:, 0] for part_O1 in asymmetric_grid(weight_SO.t()[:, None], torch.float16))
        for row in range(size):
            codes_O = ((weight_SO[row] / scales_O.float()).round() + zeros_O).clamp(0, TOP_CODE)
            rounded_O = (codes_O - zeros_O) * scales_O.float()
            error_SO[row] = (weight_SO[row] - rounded_O) / upper_SS[row, row]
            weight_SO[row] = rounded_O
            weight_SO[row + 1 :].addr_(upper_SS[row, row + 1 :], error_SO[row], alpha=-1)
        weight_IO[after].addmm_(upper_II[here, after].t(), error_SO, alpha=-1)
    bits = int4_bits(weight_OI, group_size) + act_order * 32 * inputs
    return Approximation(weight_IO[order_I.argsort()].t().contiguous(), bits)


def nonzero(scales: Tensor) -> Tensor:
    """The same numbers, with 1 for 0: divisors of weights that are all 0."""
    return scales.where(scales != 0, 1)


def as_e4m3(values: Tensor) -> Tensor:
    """The nearest numbers of float8 E4M3, to even in a tie; 448 beyond it."""
    return values.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn).float()


def as_e2m1(values: Tensor) -> Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with a sign, to even in a tie; 6 beyond it."""
    magnitude = values.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return (magnitude / step).round().mul_(step).clamp_(max=E2M1_LARGEST).copysign(values)


FORMATS = {
    "bf16": Format(bf16, 1),
    "int8": Format(int8, 1),
    "fp8": Format(fp8, 1),
    "nf4": Format(nf4, 64),
    "nvfp4": Format(nvfp4, 16),
    "mxfp4": Format(mxfp4, 32),
    "q4_0": Format(q4_0, 32),
    "q4_k": Format(q4_k, 256),
}
