"""L5 over a covering array: searches with more outputs, channels and tokens than a tile, and all that matters in one
corner.

A search that looks at a part of its arguments is found by problems whose gain lies in the other part: all outputs but
eight are zero, all tokens but eight are silent, the loud channel is the last one. It is held to half of what the
search of `truth` gains there (a coarser grid of candidates loses less), and to no loss where plain rounding has none.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

import miniawq.oracle.cases as cases
import miniawq.oracle.truth as truth
from miniawq.oracle.cases import LAYOUTS, groups_of, laid_out, random_weight
from miniawq.oracle.check import rule
from miniawq.oracle.combinations import inputs_of, seed_of, sizes_taken
from miniawq.oracle.contract import Limits
from miniawq.oracle.covering import Factors, Setting
from miniawq.oracle.ranges import place
from miniawq.oracle.search import (
    NOTHING,
    SUMMING,
    Problem,
    Rounding,
    bounds_of,
    clip_losses,
    factors_of,
    hold_to_no_clip_loss,
    hold_to_no_loss,
    loss_with,
    under_one,
)
from miniawq.oracle.subject import Broken, Subject

MOST = 1 << 20  # tokens times weights of a case
CLEAR = 0.8  # of plain rounding: a gain of the reference that a search must share
LAST = ("few outputs at the end", "few tokens at the end", "few outputs", "few tokens")
KINDS = ("loud channels", "a loud last channel", "one output at the end", *LAST, "on the grid", "two crowds", "quiet")
CLIP_KINDS = ("silent outliers", "a silent last group", "loud outliers", *LAST, "on the grid", "quiet")


KIND_OF = {"a loud last channel": "loud channels", "a silent last group": "silent outliers"}


def searches(kinds: tuple[str, ...]) -> Callable[[Limits], Factors]:
    """A function from limits to the factors of a search."""

    def over(limits: Limits) -> Factors:
        return {
            "kind": kinds,
            "tokens": (12, 1, 2, 65, 129, 300),
            "outputs": tuple(limits.multiple_of_n * m for m in (1, 3, 9, 17)),
            "groups": (1, 3, 5, 9),
            "group size": sizes_taken(limits),
            "dtype": ("float32", "float16", "bfloat16"),
            "layout of weight": LAYOUTS,
            "layout of x": LAYOUTS,
        }

    return over


def few_losses(setting: Setting) -> bool:
    size = setting["group size"]
    return setting["groups"] * (40 if size == -1 else size) * setting["outputs"] * setting["tokens"] <= MOST


def grid_weight(random: Random, n: int, k: int, group_size: int) -> Tensor:
    """A weight that plain rounding keeps: codes 0 and 15 in every group, scales that are powers of two."""
    layer = cases.random_layer(random.randrange(1 << 16), k, n, group_size, cases.exact_scales)
    size = k // groups_of(k, group_size)
    layer.codes[::size], layer.codes[1::size] = 0, 15
    return layer.weight.t().contiguous()


def search_problem(setting: Setting, limits: Limits) -> Problem:
    """Weight, activations and group size of a setting."""
    random, kind, share = seed_of(setting), setting["kind"], 1.0 if "end" in setting["kind"] else 0.4
    share = 1.0 if "last" in kind else share
    kind = KIND_OF.get(kind, kind.removesuffix(" at the end"))
    k, n, tokens, group_size = inputs_of(setting, limits), setting["outputs"], setting["tokens"], setting["group size"]
    weight = (random_weight(random.randrange(1 << 16), n, k) / 16).to(torch.float64)
    x = cases.normal(random, tokens, k).to(torch.float64) / 4
    size = k // groups_of(k, group_size)
    row, channel, token = (place(share, length) for length in (n, k, tokens))
    if kind in ("few outputs", "one output"):
        weight[(torch.arange(n) - row).abs() > (4 if kind == "few outputs" else 0)] = 0
    if kind == "few tokens":
        x[(torch.arange(tokens) - token).abs() > 4] = 0
    if kind == "on the grid":
        weight = grid_weight(random, n, k, group_size)
    if kind in ("loud channels", "one output", "few outputs", "few tokens", "on the grid"):
        x[:, channel] *= 32
        x[:, random.randrange(k)] *= 32
    if kind == "two crowds":
        x[: tokens // 2, channel] *= 64
        x[tokens // 2 :, random.randrange(k)] *= 64
    if kind in ("silent outliers", "loud outliers"):
        column = channel // size * size + random.randrange(size)
        weight[:, column] = 2.0 * weight.abs().amax()
        x[:, column] *= 1 / 1024 if kind == "silent outliers" else 32
    dtype = getattr(torch, setting["dtype"])
    weight, x = weight.to(dtype), x.to(dtype)
    return laid_out(weight, setting["layout of weight"]), laid_out(x, setting["layout of x"]), group_size


def clip_problem(setting: Setting, limits: Limits) -> Problem:
    """As `search_problem`; the few outputs and tokens have silent outliers."""
    weight, x, group_size = search_problem(setting, limits)
    if setting["kind"] in LAST:
        size = weight.shape[1] // groups_of(weight.shape[1], group_size)
        column = weight.shape[1] // size // 2 * size + 3
        weight[:, column] = torch.where(weight[:, column] == 0, 0, 2.0 * weight.abs().amax())
        x[:, column] = 0
    return weight, x, group_size


def expect_searched(target: Subject, weight: Tensor, x: Tensor, group_size: int) -> None:
    """Never worse than plain rounding, and half of what the reference gains, where it gains a fifth."""
    factors = factors_of(target, weight, x, group_size)
    hold_to_no_loss(target, factors, weight, x, group_size)
    reference = truth.search_scales(weight, x, group_size)

    def judge(rounding: Rounding) -> Broken | None:
        ones = torch.ones(weight.shape[1])
        plain, best, found = (loss_with(weight, x, some, group_size, rounding) for some in (ones, reference, factors))
        return too_little(plain, best, found)

    under_one(target, judge)


def too_little(plain: float, best: float, found: float) -> Broken | None:
    """A gain of less than half of the reference's, where that is clear."""
    if best > CLEAR * plain or found <= (plain + best) / 2:
        return None
    told = f"a loss of at most {(plain + best) / 2:.6g} (plain rounding has {plain:.6g}, a search reaches {best:.6g})"
    return Broken(told, f"a loss of {found:.6g}")


def expect_clip_searched(target: Subject, weight: Tensor, x: Tensor, group_size: int) -> None:
    """No group worse than plain rounding, and half of what the reference gains by clipping, where it gains a fifth."""
    bounds = bounds_of(target, weight, x, group_size)
    hold_to_no_clip_loss(target, bounds, weight, x, group_size)
    reference = truth.search_clip(weight, x, group_size)

    def judge(rounding: Rounding) -> Broken | None:
        plain, best, found = (
            float(clip_losses(weight, x, some, group_size, rounding).sum()) for some in (None, reference, bounds)
        )
        return too_little(plain, best, found)

    under_one(target, judge)


@rule("L5.scales.combinations", "search_scales", flags=("HalfArithmetic",),
      over=searches(KINDS), allowed=few_losses)  # fmt: skip
def scale_searches(target: Subject, setting: Setting) -> None:
    """Searches of every size class, dtype and view: never worse than all ones, and half of the gain there is to have.

    What there is to gain lies in a few outputs, tokens or channels.
    """
    target.judge(expect_searched, *search_problem(setting, target.limits))


@rule("L5.clip.combinations", "search_clip", flags=("HalfArithmetic",),
      over=searches(CLIP_KINDS), allowed=few_losses)  # fmt: skip
def clip_searches(target: Subject, setting: Setting) -> None:
    """Searches of every size class, dtype and view: no group is worse, and half of the gain there is to have.

    A large weight on a silent channel is to be clipped, one on a loud channel is not.
    """
    target.judge(expect_clip_searched, *clip_problem(setting, target.limits))


def corners(kinds: tuple[str, ...]) -> Callable[[Limits], Factors]:
    """A function from limits to every kind in a problem that is larger than a tile in all directions."""

    def over(limits: Limits) -> Factors:
        sizes: dict[str, tuple[Any, ...]] = {
            "tokens": (129,),
            "outputs": (9 * limits.multiple_of_n,),
            "groups": (5,),
            "dtype": ("float32",),
        }
        sizes["group size"] = tuple(dict.fromkeys((sizes_taken(limits)[0], sizes_taken(limits)[-1])))
        return {"kind": kinds, **sizes, "layout of weight": LAYOUTS[:2], "layout of x": LAYOUTS[:2]}

    return over


@rule("L5.scales.corners", "search_scales", flags=("HalfArithmetic",), over=corners(KINDS))
def scale_corners(target: Subject, setting: Setting) -> None:
    """The same with more outputs, tokens and channels than a tile together, for all that there may be to gain."""
    target.judge(expect_searched, *search_problem(setting, target.limits))


@rule("L5.clip.corners", "search_clip", flags=("HalfArithmetic",), over=corners(CLIP_KINDS))
def clip_corners(target: Subject, setting: Setting) -> None:
    """The same with more outputs, tokens and channels than a tile together, for all that there may be to gain."""
    target.judge(expect_clip_searched, *clip_problem(setting, target.limits))


def orders(limits: Limits) -> Factors:
    """Orders of the tokens."""
    return {"order": ("reversed", "halves exchanged", "shuffled"), "kind": ("two crowds", "few tokens"),
            "tokens": (12, 129), "group size": sizes_taken(limits)}  # fmt: skip


def ordered(setting: Setting, limits: Limits) -> tuple[Tensor, Tensor, int, list[int]]:
    """A problem, and another order of its tokens."""
    whole = setting | {"outputs": limits.multiple_of_n, "groups": 2, "dtype": "float32"}
    whole |= {"layout of weight": "contiguous", "layout of x": "contiguous"}
    weight, x, group_size = search_problem(whole, limits)
    tokens, half = list(range(len(x))), len(x) // 2
    orders = {"reversed": tokens[::-1], "halves exchanged": tokens[-half:] + tokens[:-half]}
    order = orders.get(setting["order"]) or Random(5).sample(tokens, len(x))
    return weight, x, group_size, order


@rule("L5.scales.any-order", "search_scales", over=orders)
def scales_in_any_order(target: Subject, setting: Setting) -> None:
    """Tokens in another order give factors as good, also where the halves of the tokens differ."""
    target.judge(expect_factors_in_order, *ordered(setting, target.limits))


def expect_factors_in_order(target: Subject, weight: Tensor, x: Tensor, group_size: int, order: Sequence[int]) -> None:
    """The loss with the tokens in another order."""
    losses = [
        loss_with(weight, x, factors_of(target, weight, some, group_size), group_size, truth.quantize)
        for some in (x, x[order].contiguous())
    ]
    expect_as_good(losses[0], losses[1], truth.output_loss(weight, torch.zeros_like(weight), x))


@rule("L5.clip.any-order", "search_clip", over=orders)
def clip_in_any_order(target: Subject, setting: Setting) -> None:
    """Tokens in another order give bounds as good, also where the halves of the tokens differ."""
    target.judge(expect_bounds_in_order, *ordered(setting, target.limits))


def expect_bounds_in_order(target: Subject, weight: Tensor, x: Tensor, group_size: int, order: Sequence[int]) -> None:
    """The loss with the tokens in another order."""
    losses = [
        float(clip_losses(weight, x, bounds_of(target, weight, some, group_size), group_size, truth.quantize).sum())
        for some in (x, x[order].contiguous())
    ]
    expect_as_good(losses[0], losses[1], truth.output_loss(weight, torch.zeros_like(weight), x))


def expect_as_good(one: float, other: float, whole: float) -> None:
    """Two losses that differ by no more than float32 sums of them may."""
    if abs(one - other) > SUMMING * one + NOTHING * whole:
        raise Broken(f"a loss of {one:.6g} in any order of the tokens", f"a loss of {other:.6g} in another order")
