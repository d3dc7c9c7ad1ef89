"""Codes that know each other: each is one of the two beside its weight, chosen with the errors of all others in view.

A layer of the quantized model sees inputs x', and is to give y. With the error E of its weight and d = W x' - y, its
loss is mean |E x' + d|^2 = tr(E C E^T) + 2 tr(E X^T) + mean |d|^2, with C = mean(x' x'^T) and X = mean(d x'^T)
(`streams.py`). As a function of the error of column i alone this is a parabola with its lowest point at

    E_i - P_i / C_ii        P = E C + X, the pull of all errors on each column

so the better of two codes is the one nearest to that point, and choosing it never raises the loss. Columns are visited
group by group: P by one product for a group, updated after each of its columns. Then the group's scale moves to the
least squares of its codes. The last sweep leaves scales alone, so each code ends beside its weight, and

    |w - w'| <= max(s, max(w) - (15 - z) s, -min(w) - z s)

`quantize/verify.py` checks that in the file, where plain rounding has s / 2 (docs/specification.md).

Shapes: weights lie with inputs first, so that a column of the layer is a row in memory: [I, O], [S, O], [G, O].
"""

import math

import torch
from torch import Tensor

from miniawq.awq import Statistics
from miniawq.packing import TOP_CODE, Quantized
from miniawq.quantize.ranges import shrunk
from miniawq.quantize.streams import Aim

SWEEPS = 5  # that move scales too, before the last one; more gain little (docs/log/neighbours.md)
DOUBT = 1.5  # how fast trust falls with inputs for each token (docs/log/neighbours.md)
LARGEST_MOVE = 1.25  # of a scale in one sweep, either way


def neighbouring_codes(weight_OI: Tensor, nearest: Quantized, statistics: Statistics) -> Quantized:
    """Better codes and scales for the same zeros: the last search of an `awq.Method`."""
    trusted = trust(weight_OI.shape[1], statistics.tokens)
    moments_II = shrunk(statistics.moments_II, trusted)
    weight_IO, scales_GO = weight_OI.t().contiguous(), nearest.scales_OG.t().contiguous()
    # Other statistics than an aim: without an error of its own, the layer would give what it is to give.
    pull_IO = trusted * statistics.pull_OI.t() if isinstance(statistics, Aim) else torch.zeros_like(weight_IO)
    zeros_GO = nearest.zeros_OG.t().float()
    size = nearest.group_size
    steps_IO = nearest.codes_OI.t() - zeros_GO.repeat_interleave(size, 0)
    error_IO = steps_IO * scales_GO.float().repeat_interleave(size, 0) - weight_IO
    for sweep in range(SWEEPS + 1):
        for group, scale_O in enumerate(scales_GO):
            here = slice(group * size, (group + 1) * size)
            before_SO, moments_SS = error_IO[here].clone(), moments_II[here, here]
            pull_SO = torch.addmm(pull_IO[here], moments_II[here], error_IO)
            lower_SO, upper_SO = errors_beside(weight_IO[here], scale_O, zeros_GO[group])
            descend(error_IO[here], pull_SO.clone(), moments_SS, lower_SO, upper_SO)
            if sweep < SWEEPS:
                pull_SO.addmm_(moments_SS, error_IO[here] - before_SO)
                refit(error_IO[here], weight_IO[here], scale_O, pull_SO, moments_SS)
    scale_IO = scales_GO.float().repeat_interleave(size, 0)
    codes_IO = ((error_IO + weight_IO) / scale_IO).round_() + zeros_GO.repeat_interleave(size, 0)
    return Quantized(codes_IO.t().to(torch.uint8).contiguous(), scales_GO.t().contiguous(), nearest.zeros_OG)


def trust(inputs: int, tokens: int) -> float:
    """What is left of covariances: some tokens do not determine those of many inputs."""
    return 1 / (1 + DOUBT * math.sqrt(inputs / max(1, tokens)))


def errors_beside(weight_SO: Tensor, scale_O: Tensor, zero_O: Tensor) -> tuple[Tensor, Tensor]:
    """The errors of the two codes beside each weight, in float32; beyond the last code there is one, twice."""
    # A quotient in float32 next to a whole number could be rounded onto it, and the code above be beside it no more.
    steps_SO = (weight_SO.double() / scale_O.double()).floor_().float()
    lower_SO = steps_SO.clamp(-zero_O, TOP_CODE - zero_O)
    upper_SO = (steps_SO + 1).clamp(-zero_O, TOP_CODE - zero_O)
    return lower_SO.mul_(scale_O).sub_(weight_SO), upper_SO.mul_(scale_O).sub_(weight_SO)


def descend(error_SO: Tensor, pull_SO: Tensor, moments_SS: Tensor, lower_SO: Tensor, upper_SO: Tensor) -> None:
    """Choose the better of two errors for one column after the other, in place. `pull_SO` is used up."""
    middle_SO = (lower_SO + upper_SO) / 2
    # A column that nothing enters pulls nowhere: its code stays.
    reach_S = moments_SS.diagonal().clamp(min=torch.finfo(torch.float32).tiny).reciprocal()
    for column in range(len(error_SO)):
        lowest_O = error_SO[column] - pull_SO[column] * reach_S[column]
        chosen_O = torch.where(lowest_O > middle_SO[column], upper_SO[column], lower_SO[column])
        pull_SO[column + 1 :].addr_(moments_SS[column + 1 :, column], chosen_O - error_SO[column])
        error_SO[column] = chosen_O


def refit(error_SO: Tensor, weight_SO: Tensor, scale_O: Tensor, pull_SO: Tensor, moments_SS: Tensor) -> None:
    """Move the scales of a group, in place, to where its codes lose least."""
    before_O = scale_O.float()
    steps_SO = ((error_SO + weight_SO) / before_O).round_()
    slope_O = (steps_SO * pull_SO).sum(0)
    curvature_O = (steps_SO * (moments_SS @ steps_SO)).sum(0)
    asked_O = before_O - slope_O / curvature_O
    moved_O = asked_O.clamp(before_O / LARGEST_MOVE, before_O * LARGEST_MOVE).to(scale_O.dtype)
    # Where all codes are zeros nothing asks for a scale: NaN.
    scale_O.copy_(moved_O.where((moved_O > 0) & moved_O.isfinite(), scale_O))
    error_SO.copy_(steps_SO.mul_(scale_O).sub_(weight_SO))
