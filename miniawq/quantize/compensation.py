"""`--compensate`: GPTQ's error compensation (arXiv 2210.17323) after AWQ's factors and ranges. It is no part of AWQ."""

import torch
from torch import Tensor

from miniawq.awq import Statistics
from miniawq.packing import TOP_CODE, Quantized
from miniawq.quantize.ranges import shrunk

DAMPING = 0.01  # of the mean of C's diagonal, added to it so that C can be inverted


def compensated(weight_OI: Tensor, nearest: Quantized, statistics: Statistics) -> Quantized:
    """Round column by column; the columns not yet rounded make up for each error. For the end of an `awq.Method`.

    The codes are then not the nearest to the weights: errors of weights grow, errors of outputs shrink.
    """
    _, scales_OG, zeros_OG = nearest
    moments_II = statistics.moments_II
    if not moments_II.any():
        return nearest  # no output has an error that another column could make up for
    damping = DAMPING * moments_II.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    damped_II = shrunk(moments_II) + damping * torch.eye(len(moments_II), device=moments_II.device)
    factor_II = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped_II)), upper=True)
    rest_OI, codes_OI = weight_OI.clone(), torch.empty_like(weight_OI, dtype=torch.uint8)
    group_size = weight_OI.shape[1] // scales_OG.shape[1]
    for column in range(weight_OI.shape[1]):
        scale_O, zero_O = scales_OG[:, column // group_size].float(), zeros_OG[:, column // group_size]
        code_O = ((rest_OI[:, column] / scale_O).round() + zero_O).clamp(0, TOP_CODE)
        error_O = (rest_OI[:, column] - (code_O - zero_O) * scale_O) / factor_II[column, column]
        rest_OI[:, column + 1 :] -= error_O[:, None] * factor_II[column, column + 1 :]
        codes_OI[:, column] = code_O.to(torch.uint8)
    return Quantized(codes_OI, scales_OG, zeros_OG)
