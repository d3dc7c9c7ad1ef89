"""The fourth blind set, searches: parts of tokens, outputs and groups, odd statistics, other losses."""

from collections.abc import Callable

import torch
from torch import Tensor

import miniawq.oracle.truth as truth
from miniawq.oracle.planted.blind_third import after
from miniawq.oracle.planted.grammar import Bred, Function, bred

BLIND_FOURTH_SEARCHES: list[Bred] = []


def seek(function: str, kind: str, wrong: Function) -> None:
    BLIND_FOURTH_SEARCHES.append(bred(function, kind, "", "", wrong))


def seek_kept(function: str, kind: str, make: Callable[[], Function]) -> None:
    BLIND_FOURTH_SEARCHES.append(Bred(function, kind, "", "", make))


def told(function: str, change: Callable[..., tuple[Tensor, Tensor]]) -> Function:
    """The right search of other arguments: `change(weight, x)`."""
    return lambda w, x, g: getattr(truth, function)(*change(w, x), g)


def factors_of(size: Tensor) -> list[Tensor]:
    """The candidates from a size of each channel, ones first."""
    made = [(size ** (step / 20)) for step in range(20)]
    return [(f / (f.max() * f.min()).sqrt()).float().double() for f in made]


def best_factors(loss: Callable[..., float], statistic: Callable[[Tensor], Tensor] | None = None) -> Function:
    """The search with another loss, `loss(weight, replacement, x)`."""

    def wrong(weight: Tensor, x: Tensor, group_size: int) -> Tensor:
        size = (x.abs().double().mean(0) if statistic is None else statistic(x)).clamp(min=1e-4)
        found = factors_of(size)
        losses = [loss(weight, truth.rounded_weight(weight.double() * f, group_size) / f, x) for f in found]
        return found[min(range(len(found)), key=lambda i: losses[i])].float()

    return wrong


def diagonal(weight: Tensor, replacement: Tensor, x: Tensor) -> float:
    change = (weight.double() - replacement.double()).square().sum(0)
    return float((x.double().square().sum(0) * change).sum())


def of_rounded_outputs(weight: Tensor, replacement: Tensor, x: Tensor) -> float:
    right = (x.double() @ weight.double().t()).bfloat16()
    return float(((x.double() @ replacement.double().t()).bfloat16() - right).float().square().sum())


def of_the_mean_token(weight: Tensor, replacement: Tensor, x: Tensor) -> float:
    return truth.output_loss(weight, replacement, x.double().mean(0, keepdim=True))


def one_token_squeezed(weight: Tensor, x: Tensor, group_size: int) -> Tensor:
    factors = truth.search_scales(weight, x, group_size)
    return factors.mean() if len(x) == 1 else factors


def not_a_number_of_silence(factors: Tensor, weight: Tensor, x: Tensor, group_size: int) -> Tensor:
    return factors * float("nan") if not bool(x.any()) else factors


def sum_in_float16(factors: Tensor, weight: Tensor, x: Tensor, group_size: int) -> Tensor:
    if x.dtype == torch.float16:
        return torch.where(x.double().abs().sum(0) > 65504, float("inf"), factors)
    return factors


def factors_in_float16(factors: Tensor, weight: Tensor, x: Tensor, group_size: int) -> Tensor:
    return factors.half().float()


def statistics_run_on() -> Function:
    kept: dict[int, Tensor] = {}

    def wrong(weight: Tensor, x: Tensor, group_size: int) -> Tensor:
        k = weight.shape[1]
        kept[k] = kept.get(k, torch.zeros(k, dtype=torch.float64)) + x.abs().double().mean(0)
        return best_factors(truth.output_loss, lambda _: kept[k])(weight, x, group_size)

    return wrong


def multiplied_and_divided(weight: Tensor, x: Tensor, group_size: int) -> Tensor:
    factors = truth.search_scales(weight, x, group_size)
    weight.mul_(factors.to(weight.dtype)).div_(factors.to(weight.dtype))
    return factors


def every_nth_token(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return weight, x[:: max(1, len(x) // 512)][:512]


def tokens_once(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return weight, x.unique(dim=0)


seek("search_scales", "the loss is that of each channel alone", best_factors(diagonal))
seek("search_scales", "the loss is that of outputs in bfloat16", best_factors(of_rounded_outputs))
seek("search_scales", "the loss is that of the mean token", best_factors(of_the_mean_token))
seek("search_scales", "the first 64 outputs alone", told("search_scales", lambda w, x: (w[:64], x)))
seek("search_scales", "the first 128 tokens alone", told("search_scales", lambda w, x: (w, x[:128])))
seek("search_scales", "every nth of more than 512 tokens", told("search_scales", every_nth_token))
seek("search_scales", "the same token counts once", told("search_scales", tokens_once))
seek("search_scales", "one token is squeezed", one_token_squeezed)
seek("search_scales", "no activation at all gives no numbers", after("search_scales", not_a_number_of_silence))
seek("search_scales", "a sum of float16 beyond its range", after("search_scales", sum_in_float16))
seek("search_scales", "factors go through float16", after("search_scales", factors_in_float16))
seek("search_scales", "the weight is multiplied and divided in place", multiplied_and_divided)
seek_kept("search_scales", "statistics run on from call to call", statistics_run_on)

# Bounds


def ratios(weight: Tensor, bounds: Tensor) -> Tensor:
    largest = weight.unflatten(1, (bounds.shape[1], -1)).abs().amax(-1).double()
    return torch.where(largest > 0, bounds.double() / largest, 1.0)


def with_ratio(change: Callable[[Tensor], Tensor], when: Callable[..., bool] = lambda *a: True) -> Function:
    """Bounds whose ratios to the largest of each group [N, G] are changed."""

    def wrong(weight: Tensor, x: Tensor, group_size: int) -> Tensor:
        bounds = truth.search_clip(weight, x, group_size)
        if not when(weight, x, group_size):
            return bounds
        largest = weight.unflatten(1, (bounds.shape[1], -1)).abs().amax(-1).double()
        return (change(ratios(weight, bounds)) * largest).float()

    return wrong


def best_bounds(losses_of: Callable[..., Tensor]) -> Function:
    """The search with another loss [N, G]: `losses_of(weight, replacement, x, group_size)`."""

    def wrong(weight: Tensor, x: Tensor, group_size: int) -> Tensor:
        n, k = weight.shape
        largest = weight.reshape(n, 1 if group_size == -1 else k // group_size, -1).abs().amax(-1).float()
        best, best_loss = largest, losses_of(weight, truth.rounded_weight(weight, group_size), x, group_size)
        for step in range(1, 10):
            bounds = largest * (1 - step / 20)
            replacement = truth.rounded_weight(truth.clamped(weight, bounds), group_size)
            loss = losses_of(weight, replacement, x, group_size)
            best, best_loss = torch.where(loss < best_loss, bounds, best), torch.minimum(loss, best_loss)
        return best

    return wrong


def diagonal_of_groups(weight: Tensor, replacement: Tensor, x: Tensor, group_size: int) -> Tensor:
    change = (weight.double() - replacement.double()).square() * x.double().square().sum(0)
    return change.unflatten(1, (1 if group_size == -1 else weight.shape[1] // group_size, -1)).sum(-1)


def of_the_whole_row(weight: Tensor, replacement: Tensor, x: Tensor, group_size: int) -> Tensor:
    losses = truth.group_losses(weight, replacement, x, group_size)
    whole = (x.double() @ (weight.double() - replacement.double()).t()).square().sum(0)
    return whole[:, None].expand_as(losses)


def of_all_outputs(weight: Tensor, replacement: Tensor, x: Tensor, group_size: int) -> Tensor:
    losses = truth.group_losses(weight, replacement, x, group_size)
    return losses.sum(0, keepdim=True).expand_as(losses)


def tail_of_blocks_is_nothing(bounds: Tensor, weight: Tensor, x: Tensor, group_size: int) -> Tensor:
    n = len(weight)
    if n > 64:
        bounds[n // 64 * 64 :] = 0
    return bounds


def half_past_128(bounds: Tensor, weight: Tensor, x: Tensor, group_size: int) -> Tensor:
    bounds[128:] = bounds[128:].half().float()
    return bounds


def nothing_by_nothing(bounds: Tensor, weight: Tensor, x: Tensor, group_size: int) -> Tensor:
    return torch.where(bounds == 0, float("nan"), bounds)


def square_exchanged(bounds: Tensor, weight: Tensor, x: Tensor, group_size: int) -> Tensor:
    return bounds.t().contiguous() if bounds.shape[0] == bounds.shape[1] else bounds


def repeated_past_64(t: Tensor) -> Tensor:
    return t[torch.arange(len(t)) % 64]


def last_two_alike(t: Tensor) -> Tensor:
    return torch.cat([t[:, :-1], t[:, -2:-1]], 1)


seek("search_clip", "the loss is that of each channel alone", best_bounds(diagonal_of_groups))
seek("search_clip", "the loss is that of the whole row", best_bounds(of_the_whole_row))
seek("search_clip", "one ratio for all outputs", best_bounds(of_all_outputs))
seek(
    "search_clip",
    "past whole blocks of 64 outputs, bounds are nothing",
    after("search_clip", tail_of_blocks_is_nothing),
)
seek("search_clip", "past 64 outputs, ratios repeat", with_ratio(repeated_past_64))
seek("search_clip", "the last of an odd number of groups has the ratio before it",
     with_ratio(last_two_alike, lambda w, x, g: g > 0 and w.shape[1] // g in range(3, 999, 2)))  # fmt: skip
seek("search_clip", "every nth of more than 512 tokens", told("search_clip", every_nth_token))
seek("search_clip", "the same token counts once", told("search_clip", tokens_once))
seek("search_clip", "past 128 outputs, bounds go through float16", after("search_clip", half_past_128))
seek("search_clip", "a group of nothing has no number", after("search_clip", nothing_by_nothing))
seek("search_clip", "a square of bounds is transposed", after("search_clip", square_exchanged))
