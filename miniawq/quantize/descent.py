"""The codes and scales of one group of inputs, chosen anew in view of all other errors: a visit of `neighbours.py`.

Shapes: inputs first, [S, O]; C is a few columns of the layer, which are rows here.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from miniawq.packing import TOP_CODE

COLUMNS_TOGETHER = 8  # between two updates of the pull on all later ones
LARGEST_MOVE = 1.25  # of a scale in one visit, either way

# From C, E and P of a group, its weights, scales and zeros to its errors and scales.
Visit = Callable[..., tuple[Tensor, Tensor]]


def errors_beside(weight_SO: Tensor, scale_O: Tensor, zero_O: Tensor) -> tuple[Tensor, Tensor]:
    """The errors of the two codes beside each weight, in float32; beyond the last code there is one, twice."""
    # A quotient in float32 next to a whole number could be rounded onto it, and the code above be beside it no more.
    steps_SO = (weight_SO.double() / scale_O.double()).floor_().float()
    lower_SO = steps_SO.clamp(-zero_O, TOP_CODE - zero_O)
    upper_SO = (steps_SO + 1).clamp(-zero_O, TOP_CODE - zero_O)
    return lower_SO.mul_(scale_O).sub_(weight_SO), upper_SO.mul_(scale_O).sub_(weight_SO)


def chosen_errors(
    moments_CC: Tensor, error_CO: Tensor, pull_CO: Tensor, lower_CO: Tensor, upper_CO: Tensor
) -> tuple[Tensor, Tensor]:
    """The better of two errors for one column after the other, and how far each moves."""
    middle_CO = (lower_CO + upper_CO) / 2
    # A column that nothing enters pulls nowhere: its code stays.
    reach_C = moments_CC.diagonal().clamp(min=torch.finfo(torch.float32).tiny).reciprocal()
    found: list[Tensor] = []
    moves: list[Tensor] = []
    for column, error_O in enumerate(error_CO.unbind()):
        pull_O = pull_CO[column]
        for before, move_O in enumerate(moves):
            pull_O = pull_O + moments_CC[column, before] * move_O
        lowest_O = error_O - pull_O * reach_C[column]
        found.append(torch.where(lowest_O > middle_CO[column], upper_CO[column], lower_CO[column]))
        moves.append(found[-1] - error_O)
    return torch.stack(found), torch.stack(moves)


def refitted(
    moments_SS: Tensor, error_SO: Tensor, pull_SO: Tensor, weight_SO: Tensor, scale_O: Tensor
) -> tuple[Tensor, Tensor]:
    """The scales of a group where its codes lose least, and the errors of these codes with them."""
    before_O = scale_O.float()
    steps_SO = ((error_SO + weight_SO) / before_O).round_()
    slope_O = (steps_SO * pull_SO).sum(0)
    curvature_O = (steps_SO * (moments_SS @ steps_SO)).sum(0)
    asked_O = before_O - slope_O / curvature_O
    moved_O = asked_O.clamp(before_O / LARGEST_MOVE, before_O * LARGEST_MOVE).to(scale_O.dtype)
    # Where all codes are zeros nothing asks for a scale: NaN.
    scale_O = moved_O.where((moved_O > 0) & moved_O.isfinite(), scale_O)
    return steps_SO * scale_O - weight_SO, scale_O


class Steps(NamedTuple):
    """The functions above, compiled or not."""

    beside: Callable[..., tuple[Tensor, Tensor]] = errors_beside
    choose: Callable[..., tuple[Tensor, Tensor]] = chosen_errors
    refit: Callable[..., tuple[Tensor, Tensor]] = refitted


def settled(
    steps: Steps,
    moments_SS: Tensor,
    error_SO: Tensor,
    pull_SO: Tensor,
    weight_SO: Tensor,
    scale_O: Tensor,
    zero_O: Tensor,
) -> tuple[Tensor, Tensor]:
    """The errors of a group after each of its codes was chosen anew, and its scales."""
    lower_SO, upper_SO = steps.beside(weight_SO, scale_O, zero_O)
    return descended(steps.choose, moments_SS, error_SO, pull_SO, lower_SO, upper_SO), scale_O


def resettled(steps: Steps, *group: Tensor) -> tuple[Tensor, Tensor]:
    """The same, and after that the scales move too."""
    moments_SS, error_SO, pull_SO, weight_SO, scale_O, _ = group
    settled_SO, _ = settled(steps, *group)
    pull_SO = torch.addmm(pull_SO, moments_SS, settled_SO - error_SO)
    return steps.refit(moments_SS, settled_SO, pull_SO, weight_SO, scale_O)


def descended(
    choose: Callable[..., tuple[Tensor, Tensor]],
    moments_SS: Tensor,
    error_SO: Tensor,
    pull_SO: Tensor,
    lower_SO: Tensor,
    upper_SO: Tensor,
) -> Tensor:
    """The better of two errors for all columns, a few at a time."""
    parts, pull_SO = [], pull_SO.clone()
    for begin in range(0, len(error_SO), COLUMNS_TOGETHER):
        few, later = slice(begin, begin + COLUMNS_TOGETHER), slice(begin + COLUMNS_TOGETHER, None)
        moments_CC = moments_SS[few, few].contiguous()  # what is compiled is for one stride
        found_CO, moves_CO = choose(moments_CC, error_SO[few], pull_SO[few], lower_SO[few], upper_SO[few])
        pull_SO[later].addmm_(moments_SS[later, few], moves_CO)
        parts.append(found_CO)
    return torch.cat(parts)
