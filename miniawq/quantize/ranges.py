"""Our search of ranges: both sides of a range move on their own, and the errors of the other groups count.

The paper clips a group on both sides alike, as if the other groups had no error. With the error E of one group and the
pull P = E' C of the error E' of all others, the loss of a layer changes by E C E^T + 2 E P^T. Groups are visited one
after the other, and C is `shrunk` so that the choice holds for other texts too. No step raises this shrunk loss; that
no row loses more than by plain rounding is the work of `awq.quantize_layer`. On the demo model these ranges remove
20.2 % of what plain rounding loses (its KL divergence from the dense model), the paper's clipping 13.7 %
(docs/log/factors-and-ranges.md).

Shapes, beside the book's: K candidates. O is some of the outputs: rows do not depend on each other.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from miniawq.awq import Rounding, Statistics
from miniawq.packing import grouped

# Moves of each side, in parts of that side of the plain range: wide ones first, then fine ones around the best.
COARSE, FINE = (0.0, 0.1, -0.1, -0.2, -0.3), (0.0, 0.05, -0.05)
TRUST = 0.7  # of covariances: correlations transfer from text to text worse than variances do
CANDIDATE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 27}  # float32 numbers of all candidates at a time: 4 and 512 MiB


def plain_ranges(name: str, weight_OI: Tensor, statistics: Statistics, rounding: Rounding) -> Tensor:
    """No search, as a search of an `awq.Method`: every range stays as it is."""
    return rounding.ranges(weight_OI)


def independent_sides(name: str, weight_OI: Tensor, statistics: Statistics, rounding: Rounding) -> Tensor:
    """Ranges [O, G, 2] with both sides searched, group by group: the second search of an `awq.Method`."""
    elements = CANDIDATE_ELEMENTS.get(weight_OI.device.type, CANDIDATE_ELEMENTS["cpu"])
    rows = max(1, elements // (len(COARSE) ** 2 * grouped(weight_OI, rounding.group_size).shape[-1]))
    stages = [
        torch.tensor(list(itertools.product(moves, repeat=2)), device=weight_OI.device) for moves in (COARSE, FINE)
    ]
    return torch.cat(
        [search_rows(some_OI, statistics.moments_II, rounding, stages) for some_OI in weight_OI.split(rows)]
    )


def search_rows(weight_OI: Tensor, moments_II: Tensor, rounding: Rounding, stages: Sequence[Tensor]) -> Tensor:
    """The ranges of some rows. Each stage [K, 2] holds the moves of the two sides that its candidates make."""
    ranges_OG2 = rounding.ranges(weight_OI)
    error_OI = rounding.plain(weight_OI).sub_(weight_OI)
    size = grouped(weight_OI, rounding.group_size).shape[-1]
    for group, plain_O2 in enumerate(ranges_OG2.clone().unbind(1)):
        here = slice(group * size, (group + 1) * size)
        weight_OS, moments_SS = weight_OI[:, here].contiguous(), moments_II[here, here]
        pull_OS = TRUST * (error_OI @ moments_II[:, here] - error_OI[:, here] @ moments_SS)
        for moves_K2 in stages:
            ranges_KO2 = ranges_OG2[:, group] + moves_K2[:, None] * plain_O2
            ranges_OG2[:, group], error_OI[:, here] = best_candidate(
                weight_OS, ranges_KO2, rounding, pull_OS, shrunk(moments_SS)
            )
    return ranges_OG2


def best_candidate(
    weight_OS: Tensor, ranges_KO2: Tensor, rounding: Rounding, pull_OS: Tensor, moments_SS: Tensor
) -> tuple[Tensor, Tensor]:
    """The range [O, 2] and the error E [O, S] with the lowest E C E^T + 2 E P^T; in a tie the first candidate."""
    error_KOS = rounding.snap(weight_OS, ranges_KO2).sub_(weight_OS)
    loss_KO = (error_KOS @ moments_SS).add_(2 * pull_OS).mul_(error_KOS).sum(-1)
    lowest_O, best_O = loss_KO.min(0)
    best_O = best_O.where(lowest_O < loss_KO[0], 0)
    every_O = torch.arange(len(best_O), device=best_O.device)
    return ranges_KO2[best_O, every_O], error_KOS[best_O, every_O]


def shrunk(moments_SS: Tensor, trust: float = TRUST) -> Tensor:
    """C with all but its diagonal multiplied by `trust`."""
    shrunk_SS = trust * moments_SS
    shrunk_SS.diagonal().copy_(moments_SS.diagonal())
    return shrunk_SS
