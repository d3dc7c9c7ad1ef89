"""One layer: from its weight and the second moments of its inputs to codes.

Sixteen codes span a range of values in each group. Plain rounding spans all weights of the group; clipping chooses a
narrower (sometimes wider) range for what the layer's outputs lose. With C = mean(x x^T) over the calibration text, an
error E of the weight costs tr(E C E^T), so the search needs no text.

Shapes: O outputs, I inputs, G groups of S inputs, B some of the inputs, K candidates, R some of the rows O.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from miniawq.fused import Fused
from miniawq.packing import GRIDS, TOP_CODE, Quantized

CLIP_LIMITS = [1 - index / 20 for index in range(10)]
COARSE, FINE = (0.0, 0.1, -0.1, -0.2, -0.3), (0.0, 0.05, -0.05)
CANDIDATE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 27}
BLOCK = 2048
TRUST = 0.7
DAMPING = 0.01


@dataclass(frozen=True)
class Rounding:
    """Q: groups of `group_size` inputs (-1: all), scales and zeros by one of `packing.GRIDS`."""

    group_size: int = 128
    grid: str = "asymmetric"
    scale_dtype: torch.dtype = torch.float16

    def grouped(self, weight_OI: Tensor) -> Tensor:
        """The weight as [O, G, S]."""
        return weight_OI.unflatten(1, (-1, weight_OI.shape[1] if self.group_size == -1 else self.group_size))

    def ends(self, weight_OI: Tensor) -> Tensor:
        """The plain range of every group, [O, G, 2]: its lowest and its highest value, zero included."""
        groups_OGS = self.grouped(weight_OI)
        return torch.stack((groups_OGS.amin(-1).clamp(max=0), groups_OGS.amax(-1).clamp(min=0)), dim=-1)

    def scales_and_zeros(self, ends_OG2: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zeros [O, G] of given ranges: a grid depends on the ends alone."""
        return GRIDS[self.grid](ends_OG2, self.scale_dtype)

    def levels(self, ends_R2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scales, their reciprocals and zeros of ranges [..., R, 2] in float32, each [..., R, 1]."""
        scales_R, zeros_R = self.scales_and_zeros(ends_R2)
        scales_R1 = scales_R.float().unsqueeze(-1)
        return scales_R1, scales_R1.reciprocal(), zeros_R.float().unsqueeze(-1)

    def snap(self, weight_RS: Tensor, ends_R2: Tensor) -> Tensor:
        """Weights [..., R, S] at the nearest values of ranges [..., R, 2], in float32."""
        return nearest(weight_RS, *self.levels(ends_R2))

    def plain(self, weight_OI: Tensor) -> Tensor:
        """Q(W): plain rounding."""
        return self.snap(self.grouped(weight_OI), self.ends(weight_OI)).flatten(1)

    def scaled(self, weight_OI: Tensor, columns_I: Tensor) -> Tensor:
        """Q(W diag(s)) diag(1 / s): plain rounding of a weight whose columns are multiplied by s meanwhile."""
        weight_OGS, columns_GS = self.grouped(weight_OI), self.grouped(columns_I[None])[0]
        levels = self.levels(torch.stack(scaled_ends(weight_OGS, columns_GS), dim=-1))
        return scaled_nearest(weight_OGS, *levels, columns_GS, columns_GS.reciprocal()).flatten(1)


def nearest(weight_RS: Tensor, scales_R1: Tensor, reciprocals_R1: Tensor, zeros_R1: Tensor) -> Tensor:
    """Weights [..., R, S] at the nearest values of the grids of their groups."""
    # code - zero lies in -zero..15 - zero: small whole numbers, so clamping first is exact and passes once.
    return (weight_RS * reciprocals_R1).round_().clamp_(-zeros_R1, TOP_CODE - zeros_R1).mul_(scales_R1)


@Fused
def scaled_ends(weight_OGS: Tensor, columns_GS: Tensor) -> tuple[Tensor, Tensor]:
    """The two ends of the plain range of every group of W diag(s), [O, G]."""
    scaled_OGS = weight_OGS * columns_GS
    return scaled_OGS.amin(-1).clamp(max=0), scaled_OGS.amax(-1).clamp(min=0)


@Fused
def scaled_nearest(
    weight_OGS: Tensor,
    scales_OG1: Tensor,
    reciprocals_OG1: Tensor,
    zeros_OG1: Tensor,
    columns_GS: Tensor,
    column_reciprocals_GS: Tensor,
) -> Tensor:
    """W diag(s) at the nearest values of its ranges, times diag(1 / s)."""
    scaled_OGS = weight_OGS * columns_GS
    return nearest(scaled_OGS, scales_OG1, reciprocals_OG1, zeros_OG1).mul_(column_reciprocals_GS)


@Fused
def best_candidate(
    weight_RS: Tensor,
    ends_KR2: Tensor,
    scales_KR1: Tensor,
    reciprocals_KR1: Tensor,
    zeros_KR1: Tensor,
    pull_RS: Tensor,
    moments_SS: Tensor,
) -> tuple[Tensor, Tensor]:
    """The ends [R, 2] and the error E [R, S] with the lowest E C E^T + 2 E P^T; the first candidate's in a tie."""
    error_KRS = nearest(weight_RS, scales_KR1, reciprocals_KR1, zeros_KR1).sub_(weight_RS)
    loss_KR = (error_KRS @ moments_SS).add_(2 * pull_RS).mul_(error_KRS).sum(-1)
    lowest_R, best_R = loss_KR.min(0)
    best_R = best_R.where(lowest_R < loss_KR[0], 0)
    every_R = torch.arange(len(best_R), device=best_R.device)
    return ends_KR2[best_R, every_R], error_KRS[best_R, every_R]


def triangle(inputs: int) -> Iterator[slice]:
    """Blocks of the rows of a symmetric matrix: each with the columns up to its end, they cover the lower triangle."""
    return (slice(start, min(start + BLOCK, inputs)) for start in range(0, inputs, BLOCK))


def row_losses(error_OI: Tensor, moments_II: Tensor) -> Tensor:
    """The diagonal of E C E^T: the mean squared error of each output when the weight is off by E.

    C is symmetric, so what two blocks of inputs do together is multiplied once and counted twice.
    """
    losses_O = error_OI.new_zeros(len(error_OI))
    for here in triangle(len(moments_II)):
        own_OB, before = error_OI[:, here], slice(0, here.start)
        product_OB = (own_OB @ moments_II[here, here]).addmm_(error_OI[:, before], moments_II[before, here], alpha=2)
        losses_O += product_OB.mul_(own_OB).sum(1)
    return losses_O


def layer_loss(error_OI: Tensor, moments_II: Tensor) -> Tensor:
    """tr(E C E^T) / O: the mean squared error of a layer's outputs."""
    return row_losses(error_OI, moments_II).mean()


def shrunk(moments_II: Tensor) -> Tensor:
    """C with less between channels: how large they are differs less from text to text than how they go together."""
    shrunk_II = TRUST * moments_II
    shrunk_II.diagonal().copy_(moments_II.diagonal())
    return shrunk_II


Candidates = Callable[[Tensor, Tensor], Tensor]


def limited(plain_R2: Tensor, best_R2: Tensor, limits_K: Tensor) -> Tensor:
    """The paper's candidates [K, R, 2]: a range limited on both sides to parts of its largest magnitude."""
    limits_KR = limits_K[:, None] * plain_R2.abs().amax(-1)
    return torch.stack((plain_R2[:, 0].maximum(-limits_KR), plain_R2[:, 1].minimum(limits_KR)), dim=-1)


def moved(plain_R2: Tensor, best_R2: Tensor, steps_K2: Tensor) -> Tensor:
    """Candidates [K, R, 2]: each end of the best range so far moved by steps of its own, no move first."""
    return best_R2 + steps_K2[:, None] * plain_R2


def moves(steps: Sequence[float], device: torch.device) -> Candidates:
    """`moved` by every pair of steps, which are put on the device once and not for each group."""
    return partial(moved, steps_K2=torch.tensor(list(itertools.product(steps, repeat=2)), device=device))


def limit_search(weight_OI: Tensor, moments_II: Tensor, rounding: Rounding) -> Tensor:
    """The paper's clipping, ranges [O, G, 2]: each group by itself, as if the others had no error."""
    limits = partial(limited, limits_K=torch.tensor(CLIP_LIMITS, device=weight_OI.device))
    return _by_rows(weight_OI, moments_II, rounding, [limits], pulled=False)


def range_search(weight_OI: Tensor, moments_II: Tensor, rounding: Rounding) -> Tensor:
    """Ranges [O, G, 2] chosen group by group, both ends, with the errors that the other groups make.

    For the error E of a group and the pull P = E' C of the others' error E', the loss changes by E C E^T + 2 E P^T.
    C is `shrunk`, for the sake of other texts than this one.
    """
    stages = [moves(steps, weight_OI.device) for steps in (COARSE, FINE)]
    return _by_rows(weight_OI, moments_II, rounding, stages, pulled=True)


def _by_rows(
    weight_OI: Tensor, moments_II: Tensor, rounding: Rounding, stages: Sequence[Candidates], pulled: bool
) -> Tensor:
    """Rows do not know each other, so a few at a time bound the memory."""
    elements = CANDIDATE_ELEMENTS.get(weight_OI.device.type, CANDIDATE_ELEMENTS["cpu"])
    group_size = rounding.grouped(weight_OI).shape[-1]
    step = max(1, elements // (len(COARSE) ** 2 * group_size))
    return torch.cat([_search(rows_RI, moments_II, rounding, stages, pulled) for rows_RI in weight_OI.split(step)])


def _search(
    weight_RI: Tensor, moments_II: Tensor, rounding: Rounding, stages: Sequence[Candidates], pulled: bool
) -> Tensor:
    ends_RG2 = rounding.ends(weight_RI)
    error_RI = rounding.plain(weight_RI).sub_(weight_RI)
    group_size = rounding.grouped(weight_RI).shape[-1]
    for group, plain_R2 in enumerate(ends_RG2.clone().unbind(1)):
        here = slice(group * group_size, (group + 1) * group_size)
        weight_RS, moments_SS = weight_RI[:, here].contiguous(), moments_II[here, here]
        pull_RS = torch.zeros_like(weight_RS)
        if pulled:
            pull_RS = TRUST * (error_RI @ moments_II[:, here] - error_RI[:, here] @ moments_SS)
            moments_SS = shrunk(moments_SS)
        for candidates in stages:
            ends_KR2 = candidates(plain_R2, ends_RG2[:, group])
            ends_RG2[:, group], error_RI[:, here] = best_candidate(
                weight_RS, ends_KR2, *rounding.levels(ends_KR2), pull_RS, moments_SS
            )
    return ends_RG2


def compensated(weight_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor, moments_II: Tensor) -> Quantized:
    """Round column by column and let the columns to come make up for each error (GPTQ, arXiv 2210.17323).

    Codes are then no longer the nearest to the weights: errors of weights grow, errors of outputs shrink.
    """
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
