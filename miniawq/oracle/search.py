"""L5, search: what AWQ's searches of factors (`search_scales`) and ranges must keep to, whatever their candidates are.

Losses are computed here, in float64, from what the target returns, with the oracle's own rounding: a fault of the
target's `quantize` is not one of its search. A search that measured with another correct rounding, with scales to
nearest or with the target's own `quantize`, may be ahead under that one by less than the roundings differ; so a search
that is no worse under one of the three passes. A target that sums its losses in float32 may take two nearly equal
candidates for each other: its output differs from the exact one by about 2**-24 |y|, the rounding error it measures
is above |y| / 100, so 1e-3 of the loss is ample, and a real fault (no identity in the grid, a wrong sign of the
exponent) costs far more.
"""

from collections.abc import Callable, Iterator
from random import Random

import torch
from hypothesis import strategies as st
from torch import Tensor

import miniawq.oracle.cases as cases
import miniawq.oracle.truth as truth
from miniawq.oracle.cases import groups_of, random_weight, smallest
from miniawq.oracle.check import rule
from miniawq.oracle.contract import Limits
from miniawq.oracle.subject import Broken, Subject, expect_equal, expect_tensor, expect_within

SUMMING = 1e-3  # relative; what float32 sums of losses may cost (above)
NOTHING = 1e-9  # of the output's own size: what counts as no loss where plain rounding has none
TOKENS = 48  # of activations: more than one group has inputs, and quick

Problem = tuple[Tensor, Tensor, int]


def problem(limits: Limits, seed: int, groups: int = 3, kind: str = "plain", outliers: int = 2) -> Problem:
    """A weight [N, K], activations [T, K] with some loud channels, and a group size."""
    k, n, group_size = smallest(limits, groups, columns=2)
    random = Random(seed)
    x = cases.normal(random, TOKENS, k) / 4
    for channel in random.sample(range(k), outliers):
        x[:, channel] *= 32
    return random_weight(seed, n, k, kind) / 16, x, group_size


def problems(limits: Limits) -> st.SearchStrategy[Problem]:
    """Problems of every kind of weight, with and without loud channels."""
    return st.builds(
        problem,
        st.just(limits),
        st.integers(0, 2**16),
        st.integers(1, 4),
        st.sampled_from(cases.WEIGHT_KINDS),
        st.integers(0, 4),
    )


Rounding = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]


def roundings(target: Subject) -> Iterator[Rounding]:
    """The oracle's rounding, the same with scales to nearest, and the target's own."""
    yield truth.quantize
    yield to_nearest
    if target.has("quantize"):
        yield lambda weight, group_size: own_quantize(target, weight, group_size)


def to_nearest(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Plain rounding under scales that are rounded to nearest."""
    _, _, scales = truth.quantize(weight, group_size)
    groups = weight.to(torch.float64).t().reshape(scales.shape[0], -1, weight.shape[0])
    lowest, highest = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    nearest = ((highest - lowest) / 15).to(torch.float16).clamp(min=truth.SMALLEST_HALF)
    zeros = (-lowest / nearest.to(torch.float64)).round().clamp(0, 15)
    codes = ((groups / nearest.to(torch.float64)[:, None]).round() + zeros[:, None]).clamp(0, 15).flatten(0, 1)
    return codes.to(torch.uint8), zeros.to(torch.uint8), nearest


def own_quantize(target: Subject, weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The target's plain rounding; a failure is about the search, not about this call."""
    last = target.last
    codes, zeros, scales = target.call("quantize", weight.to(torch.float32), group_size)
    target.last = last
    return codes, zeros, scales


def under_one(target: Subject, judge: Callable[[Rounding], Broken | None]) -> None:
    """Raise the failure under the oracle's rounding, unless there is none under another one."""
    first = None
    for rounding in roundings(target):
        try:
            broken = judge(rounding)
        except (Broken, ValueError, TypeError, RuntimeError):
            continue  # the target's own quantize fails, which L2 tells
        if broken is None:
            return
        first = first or broken
    if first is not None:
        raise first


def rounded(rounding: Rounding, weight: Tensor, group_size: int) -> Tensor:
    """The weight [N, K] after plain rounding, float64."""
    return truth.real_weight(*rounding(weight, group_size), group_size).t()


def factors_of(target: Subject, weight: Tensor, x: Tensor, group_size: int) -> Tensor:
    """The target's factors, positive and finite, from arguments that stay as they are."""
    factors = expect_tensor(target.pure("search_scales", weight, x, group_size), torch.float32, (weight.shape[1],))
    if not bool((factors.isfinite() & (factors > 0)).all()):
        raise Broken("factors positive and finite", f"factors from {float(factors.min())} to {float(factors.max())}")
    return factors


def loss_with(weight: Tensor, x: Tensor, factors: Tensor, group_size: int, rounding: Rounding) -> float:
    """The squared change of the output when `weight * factors` is rounded."""
    exact = factors.to(torch.float64)
    return truth.output_loss(weight, rounded(rounding, weight.to(torch.float64) * exact, group_size) / exact, x)


def expect_no_worse(target: Subject, weight: Tensor, x: Tensor, group_size: int, share: float = 1 + SUMMING) -> None:
    """The loss with the target's factors is at most `share` of the loss of plain rounding."""
    hold_to_no_loss(target, factors_of(target, weight, x, group_size), weight, x, group_size, share)


def hold_to_no_loss(
    target: Subject, factors: Tensor, weight: Tensor, x: Tensor, group_size: int, share: float = 1 + SUMMING
) -> None:
    """As `expect_no_worse`, of factors that are there."""

    def judge(rounding: Rounding) -> Broken | None:
        plain = loss_with(weight, x, torch.ones(weight.shape[1]), group_size, rounding)
        found = loss_with(weight, x, factors, group_size, rounding)
        if found <= plain * share + NOTHING * truth.output_loss(weight, torch.zeros_like(weight), x):
            return None
        told = f"a loss of at most {plain * share:.6g} ({share:.4g} of plain rounding, in the oracle's own rounding)"
        return Broken(told, f"a loss of {found:.6g}")

    under_one(target, judge)


@rule("L5.scales.positive", "search_scales")
def scales_positive(target: Subject) -> None:
    """The factors are float32 [K], positive and finite."""
    target.judge(factors_of, *problem(target.limits, 1))


@rule("L5.scales.never-worse", "search_scales", flags=("HalfArithmetic",), effort=0.3, drawn=problems)
def scales_never_worse(target: Subject, drawn: Problem) -> None:
    """On the given activations the factors are never worse than all ones."""
    target.judge(expect_no_worse, *drawn)


@rule("L5.scales.helps", "search_scales")
def scales_help(target: Subject) -> None:
    """With two loud input channels the search takes at least a fifth off the loss of plain rounding."""
    target.judge(expect_help, *problem(target.limits, 2))


def expect_help(target: Subject, weight: Tensor, x: Tensor, group_size: int) -> None:
    """A fifth less, where the reference gains a quarter."""
    best = loss_with(weight, x, truth.search_scales(weight, x, group_size), group_size, truth.quantize)
    if best <= 0.75 * loss_with(weight, x, torch.ones(weight.shape[1]), group_size, truth.quantize):
        expect_no_worse(target, weight, x, group_size, 0.8)


@rule("L5.scales.folding-is-exact", "search_scales")
def folding_is_exact(target: Subject) -> None:
    """`x / factors` times `weight * factors` is the product it was, but for one rounding to float32 of each."""
    target.judge(expect_exact_folding, *problem(target.limits, 3, kind="outliers"))


def expect_exact_folding(target: Subject, weight: Tensor, x: Tensor, group_size: int) -> None:
    factors = factors_of(target, weight, x, group_size)
    folded = (x / factors).to(torch.float64) @ (weight * factors).to(torch.float64).t()
    size = x.to(torch.float64).abs() @ weight.to(torch.float64).abs().t()
    expect_within(folded, x.to(torch.float64) @ weight.to(torch.float64).t(), size * 3 * 2.0**-24, "folded y")


@rule("L5.scales.silent-channels", "search_scales")
def silent_channels(target: Subject) -> None:
    """Channels that are always 0, and activations that are all 0, give no zero, infinite or NaN scale."""
    weight, x, group_size = problem(target.limits, 4)
    x[:, ::3] = 0
    target.judge(expect_no_worse, weight, x, group_size)
    target.judge(expect_no_worse, weight, torch.zeros_like(x), group_size)


@rule("L5.scales.extreme-activations", "search_scales")
def extreme_activations(target: Subject) -> None:
    """Activations of 1e-6 and of 1e5, whose squares do not fit in float16, are searched like any other."""
    weight, x, group_size = problem(target.limits, 5)
    for size in (1e-6, 1e5):
        target.judge(expect_no_worse, weight, x * size, group_size)


@rule("L5.scales.few-tokens", "search_scales")
def few_tokens(target: Subject) -> None:
    """One token is enough to search with."""
    weight, x, group_size = problem(target.limits, 6, groups=1)
    target.judge(expect_no_worse, weight, x[:1], group_size)


@rule("L5.scales.same-twice", "search_scales")
def scales_same_twice(target: Subject) -> None:
    """The same arguments give the same factors, and are not written into."""
    target.judge(expect_same_search, "search_scales", *problem(target.limits, 7))


@rule("L5.scales.token-order", "search_scales")
def token_order(target: Subject) -> None:
    """The order of the tokens does not matter: the loss stays what it was."""
    target.judge(expect_any_order, *problem(target.limits, 8))


def expect_any_order(target: Subject, weight: Tensor, x: Tensor, group_size: int) -> None:
    """The loss with the tokens reversed."""
    losses = []
    for rows in (x, x.flip(0)):
        factors = factors_of(target, weight, rows, group_size)
        losses.append(loss_with(weight, x, factors, group_size, truth.quantize))
    if abs(losses[0] - losses[1]) > SUMMING * losses[0]:
        raise Broken(f"a loss of {losses[0]:.6g} in any order", f"a loss of {losses[1]:.6g} with the tokens reversed")


def bounds_of(target: Subject, weight: Tensor, x: Tensor, group_size: int) -> Tensor:
    """The target's clipping bounds: not negative, and not above the largest weight of their group; nothing changed."""
    n, k = weight.shape
    groups = groups_of(k, group_size)
    bounds = expect_tensor(target.pure("search_clip", weight, x, group_size), torch.float32, (n, groups))
    largest = weight.to(torch.float32).reshape(n, groups, -1).abs().amax(-1)
    wrong = ~((bounds >= 0) & (bounds <= largest * (1 + 2.0**-20)))
    if bool(wrong.any()):
        at = tuple(int(i) for i in wrong.nonzero()[0])
        raise Broken(f"a bound{list(at)} from 0 to {float(largest[at]):.6g}", f"{float(bounds[at]):.6g}")
    return bounds


def clip_losses(weight: Tensor, x: Tensor, bounds: Tensor | None, group_size: int, rounding: Rounding) -> Tensor:
    """The loss of every output channel and group, float64 [N, G], with the weight clamped to `bounds` or not.

    An implementation may round the clamped weight, or the weight itself on the clamped one's grid, which differs in a
    code at the ends of the range, and it may clamp in the dtype of the weight; the smallest loss counts.
    """
    if bounds is None:
        return truth.group_losses(weight, rounded(rounding, weight, group_size), x, group_size)
    losses = []
    for limits in {torch.float32, weight.dtype} - {torch.float64}:
        codes, zeros, scales = rounding(truth.clamped(weight, bounds.to(limits)), group_size)
        size = len(codes) // len(scales)
        zero = zeros.repeat_interleave(size, 0)
        steps = (weight.t().to(torch.float64) / scales.to(torch.float64).repeat_interleave(size, 0)).round()
        for some in (codes, (steps + zero).clamp(0, 15)):
            replacement = truth.real_weight(some, zeros, scales, group_size).t()
            losses.append(truth.group_losses(weight, replacement, x, group_size))
    return torch.stack(losses).amin(0)


def expect_clip_no_worse(target: Subject, weight: Tensor, x: Tensor, group_size: int) -> None:
    """No output channel and group has a larger loss with the target's bounds."""
    hold_to_no_clip_loss(target, bounds_of(target, weight, x, group_size), weight, x, group_size)


def hold_to_no_clip_loss(target: Subject, bounds: Tensor, weight: Tensor, x: Tensor, group_size: int) -> None:
    """As `expect_clip_no_worse`, of bounds that are there."""
    whole = truth.group_losses(weight, torch.zeros_like(weight), x, group_size)

    def judge(rounding: Rounding) -> Broken | None:
        plain = clip_losses(weight, x, None, group_size, rounding)
        found = clip_losses(weight, x, bounds, group_size, rounding)
        worse = found > plain * (1 + SUMMING) + NOTHING * whole
        if not bool(worse.any()):
            return None
        at = tuple(int(i) for i in worse.nonzero()[0])
        told = f"a loss{list(at)} of at most {float(plain[at]):.6g}, in the oracle's own rounding"
        return Broken(told, f"{float(found[at]):.6g} after clipping")

    under_one(target, judge)


@rule("L5.clip.in-range", "search_clip")
def clip_in_range(target: Subject) -> None:
    """The bounds are float32 [N, G], from 0 to the largest absolute weight of their group."""
    target.judge(bounds_of, *problem(target.limits, 11, kind="outliers"))


@rule("L5.clip.never-worse", "search_clip", flags=("HalfArithmetic",), effort=0.3, drawn=problems)
def clip_never_worse(target: Subject, drawn: Problem) -> None:
    """No output channel and group is worse on the given activations after clipping."""
    target.judge(expect_clip_no_worse, *drawn)


@rule("L5.clip.helps", "search_clip")
def clip_helps(target: Subject) -> None:
    """A large weight on a silent channel is clipped: the loss of its group falls by a fifth at least."""
    weight, x, group_size = problem(target.limits, 12, outliers=0)
    weight[:, 5] = 2.0 * weight.abs().amax()
    x[:, 5] /= 1024
    target.judge(expect_clipped, weight, x, group_size)


def expect_clipped(target: Subject, weight: Tensor, x: Tensor, group_size: int) -> None:
    """The loss of the first group falls by a fifth, where it falls by a quarter in the reference."""
    bounds, reference = bounds_of(target, weight, x, group_size), truth.search_clip(weight, x, group_size)

    def judge(rounding: Rounding) -> Broken | None:
        plain, best, found = (
            float(clip_losses(weight, x, some, group_size, rounding)[:, 0].sum()) for some in (None, reference, bounds)
        )
        if found <= 0.8 * plain or best > 0.75 * plain:
            return None
        return Broken(f"a loss of at most {0.8 * plain:.6g} (0.8 of no clipping)", f"{found:.6g}")

    under_one(target, judge)


@rule("L5.clip.silent-channels", "search_clip")
def clip_silent_channels(target: Subject) -> None:
    """Activations that are partly or all 0, and groups of zeros, give bounds in range."""
    weight, x, group_size = problem(target.limits, 13)
    weight[0] = 0
    x[:, ::2] = 0
    target.judge(expect_clip_no_worse, weight, x, group_size)
    target.judge(expect_clip_no_worse, weight, torch.zeros_like(x), group_size)


@rule("L5.clip.rows-independent", "search_clip")
def clip_rows_independent(target: Subject) -> None:
    """The bounds of one output channel do not depend on the others."""
    target.judge(expect_rows_independent, *problem(target.limits, 14, kind="outliers"))


def expect_rows_independent(target: Subject, weight: Tensor, x: Tensor, group_size: int) -> None:
    expected = bounds_of(target, weight, x, group_size)
    order = torch.arange(weight.shape[0]).flip(0)
    got = bounds_of(target, weight[order].contiguous(), x, group_size)
    expect_within(got, expected[order], 1e-6 * expected[order].to(torch.float64), "bound of the reversed channels at ")


@rule("L5.clip.same-twice", "search_clip")
def clip_same_twice(target: Subject) -> None:
    """The same arguments give the same bounds, and are not written into."""
    target.judge(expect_same_search, "search_clip", *problem(target.limits, 7))


def expect_same_search(target: Subject, function: str, weight: Tensor, x: Tensor, group_size: int) -> None:
    """Two calls, one result, arguments as they were."""
    before = weight.clone(), x.clone()
    first = target.call(function, weight, x, group_size)
    if not (torch.equal(weight, before[0]) and torch.equal(x, before[1])):
        raise Broken("the arguments as they were", f"{function} changed them")
    expect_equal(target.call(function, weight, x, group_size), first, "the second result at ")
