"""Grids beside `packing.asymmetric_grid`: for symmetric formats, and AutoAWQ's for comparison."""

import torch
from torch import Tensor

from miniawq.packing import SYMMETRIC_ZERO, TOP_CODE, Grid, asymmetric_grid, round_up


def symmetric_grid(weight_OGS: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The smallest scales [O, G] with an error of at most half a scale when every zero is 8.

    Codes reach from -8 to 7 scales, and half a scale beyond each end still rounds onto the end.
    """
    below_OG = -weight_OGS.amin(-1).clamp(max=0).double()
    above_OG = weight_OGS.amax(-1).clamp(min=0).double()
    needed_OG = torch.maximum(below_OG / (SYMMETRIC_ZERO + 0.5), above_OG / (TOP_CODE - SYMMETRIC_ZERO + 0.5))
    scales_OG = round_up(needed_OG, scale_dtype)
    return scales_OG, torch.full_like(scales_OG, SYMMETRIC_ZERO, dtype=torch.uint8)


def autoawq_grid(weight_OGS: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """AutoAWQ's scales and zeros [O, G], in float16 as its `pseudo_quantize_tensor` computes them, for comparison.

    Zero may lie outside the range, so weights of a group of one sign can be off by more than half a scale.
    """
    weight_OGS = weight_OGS.half()
    lowest_OG, highest_OG = weight_OGS.amin(-1), weight_OGS.amax(-1)
    scales_OG = (highest_OG - lowest_OG).clamp(min=1e-5) / TOP_CODE
    zeros_OG = (-(lowest_OG / scales_OG).round()).clamp(0, TOP_CODE)
    return scales_OG.to(scale_dtype), zeros_OG.to(torch.uint8)


GRIDS: dict[str, Grid] = {"asymmetric": asymmetric_grid, "symmetric": symmetric_grid, "autoawq": autoawq_grid}
