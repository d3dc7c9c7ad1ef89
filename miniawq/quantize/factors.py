"""Our search of factors: two formulas instead of one, from coarse to fine.

The second formula is AutoAWQ's ("duo scaling"): a channel's factor also falls with the size of its weights. On the
demo model factors of both formulas remove 5.1 % of what plain rounding loses (its KL divergence from the dense model),
those of the paper's formula alone 4.9 %. Coarse to fine tries 18 candidates instead of 41 and loses nothing
(docs/log/factors-and-ranges.md).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from miniawq.awq import FactorSearch, Fold, Rounding, Statistics, Trial, loss_of, normalised
from miniawq.packing import grouped

Formula = Literal["activations", "duo"]
Candidate = tuple[Formula, int]  # formula, and the exponent in steps of 1 / `ratios`

PLAIN: Candidate = ("activations", 0)  # t = a^0: plain rounding
DECISIVE = 0.75  # part of plain rounding's loss; learned codes gain more without factors that gain less than that
SMALLEST = torch.finfo(torch.float32).tiny  # the least size of a group's largest weight: no division by zero


def factors_by(formula: Formula, ratio: float, activation_P: Tensor, weight_P: Tensor) -> Tensor:
    """a^r (the paper), or a^r / w^(1 - r) ("duo"), normalised.

    activation_P is a = mean |x|, weight_P is w = mean of |weight| relative to the largest of its group. A channel that
    is never active, or has no weights, keeps the factor 1.
    """
    log_P = ratio * activation_P.log()
    if formula == "duo":
        log_P = log_P - (1 - ratio) * weight_P.log()
    return normalised(log_P, (activation_P > 0) & (weight_P > 0))


def relative_weight(weights: Sequence[Tensor], group_size: int) -> Tensor:
    """The mean over the rows of a set of linears of |weight| / (the largest |weight| of its group), [I]."""
    groups_OGS = grouped(torch.cat(list(weights)).abs_(), group_size)
    return groups_OGS.div_(groups_OGS.amax(-1, keepdim=True).clamp(min=SMALLEST)).mean(0).flatten()


def search_coarse_to_fine(
    block: nn.Module,
    fold: Fold,
    statistics: Statistics,
    rounding: Rounding,
    *,
    formulas: Sequence[Formula],
    ratios: int,
    stride: int,
    worth: float,
) -> FactorSearch:
    """The factors that lose least: every `stride`-th exponent of each formula, then those around the best.

    Exponents are multiples of 1 / `ratios`. Plain rounding is tried first and wins ties. It stays where the first
    exponents leave more than `worth` of its loss.
    """
    weights = [block.get_parameter(f"{name}.weight").data for name in fold.balance_layers]
    activation_P = fold.gather(statistics.magnitude_I)
    weight_P = fold.gather(relative_weight(weights, rounding.group_size))
    found: dict[Candidate, float] = {}

    def factors(candidate: Candidate) -> Tensor:
        return factors_by(candidate[0], candidate[1] / ratios, activation_P, weight_P)

    def run(candidates: Sequence[Candidate]) -> None:
        # All losses are fetched at once: waiting for each would leave a GPU idle.
        losses = torch.stack(
            [loss_of(block, fold, statistics, rounding, factors(candidate)) for candidate in candidates]
        )
        found.update(zip(candidates, losses.nan_to_num(nan=torch.inf).tolist(), strict=True))

    coarse = [(formula, step) for formula in formulas for step in range(0, ratios + 1, stride)]
    run([PLAIN, *(candidate for candidate in coarse if candidate != PLAIN)])
    formula, best = min(found, key=found.__getitem__)
    if found[formula, best] > worth * found[PLAIN]:
        return FactorSearch(fold, factors(PLAIN), [Trial("activations", 0, found[PLAIN])])
    around = range(max(0, best - stride + 1), min(ratios, best + stride - 1) + 1)
    if fine := [(formula, step) for step in around if formulas and (formula, step) not in found]:
        run(fine)
    trials = [Trial(formula, step / ratios, loss) for (formula, step), loss in found.items()]
    return FactorSearch(fold, factors(min(found, key=found.__getitem__)), trials)


def coarse_to_fine(
    formulas: Sequence[Formula], ratios: int, stride: int, worth: float = 1
) -> Callable[..., FactorSearch]:
    """`search_coarse_to_fine` as the first search of an `awq.Method`; without formulas there is no scaling."""
    return partial(search_coarse_to_fine, formulas=formulas, ratios=ratios, stride=stride, worth=worth)
