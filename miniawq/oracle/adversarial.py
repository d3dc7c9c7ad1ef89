"""L2 on groups built to break it: ends that are ties on both sides, ranges just above what a float16 scale holds.

The promise of the contract is |w - (code - zero) * scale| <= scale / 2. It holds when the scale is the smallest
float16 that is not below the range / 15, and codes and zeros are the nearest under that stored scale:

* A scale rounded down by d leaves 15 d of the range outside the codes. With -m = (a + 1/2) R / 15 both ends lie just
  past a tie: zero and top code are rounded outwards, one end is clamped, and is off by 1/2 + (14.5 - a) d / s scales,
  up to 0.507. Sampled weights almost never have such ends.
* Codes computed from R / 15 instead of the stored scale are off by up to 15 steps' worth of its rounding.

A quotient w / s is at most 16; float32 arithmetic puts it 2 * 16 * 2**-24 steps off, which is all that is allowed.
"""

from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

import miniawq.oracle.cases as cases
import miniawq.oracle.truth as truth
from miniawq.oracle.cases import LAYOUTS, groups_of, laid_out, random_weight
from miniawq.oracle.check import rule
from miniawq.oracle.combinations import inputs_of, seed_of, sizes_taken, weights_in
from miniawq.oracle.contract import Limits
from miniawq.oracle.covering import Factors, Setting
from miniawq.oracle.rounding import expect_bound, expect_step, per_weight, quantize
from miniawq.oracle.subject import Subject, expect_equal, expect_within

ARITHMETIC = 32 * 2.0**-24  # of a scale; what float32 quotients may cost (above)


def scales_for(random: Random, n: int) -> Tensor:
    """Float16 scales [n] as float64, of every mantissa, 2**-12 to 2**-2."""
    bits = [random.randrange(3 << 10, 13 << 10) for _ in range(n)]
    return torch.tensor(bits, dtype=torch.int16).view(torch.float16).to(torch.float64)


def between_ends(random: Random, lowest: Tensor, highest: Tensor, size: int) -> Tensor:
    """Groups [size, n] with these ends, and between them halves of 1/15 of the range, on the ties and next to them."""
    step = (highest - lowest) / 15
    halves = cases.raw(random, (size, len(lowest)), torch.uint8).to(torch.float64) % 31
    nudge = (cases.codes(random, size, len(lowest)).to(torch.float64) % 4 - 1).clamp(max=1)
    groups = lowest + (halves / 2 + nudge * 2.0**-18) * step
    groups = torch.minimum(torch.maximum(groups, lowest), highest)
    groups[0], groups[size // 2], groups[-1] = lowest, 0.0, highest
    return groups


def double_ties(random: Random, n: int, size: int) -> Tensor:
    """Ranges of exactly 15 representable scales, both ends halfway between two codes."""
    scale, below = scales_for(random, n), torch.arange(n) % 15 + 0.5
    return between_ends(random, -below * scale, (15 - below) * scale, size)


def just_above(random: Random, n: int, size: int) -> Tensor:
    """Ranges between 0.01 and 0.49 of the distance to the next scale above 15 representable ones, ends past ties."""
    scale = scales_for(random, n)
    bits = scale.to(torch.float16).view(torch.int16)
    gap = (bits + 1).view(torch.float16).to(torch.float64) - scale
    share = torch.tensor([random.choice((0.01, 0.25, 0.45, 0.49)) for _ in range(n)], dtype=torch.float64)
    step, below = scale + share * gap, torch.arange(n) % 15 + 0.5
    return between_ends(random, -below * step, (15 - below) * step, size)


def sided(random: Random, n: int, size: int) -> Tensor:
    """Groups of one sign, every other one negative, with ranges just above a representable scale."""
    groups = just_above(random, n, size)
    groups = groups - groups.amin(0) + groups.amax(0) / 64 * (torch.arange(n) % 3)
    return torch.where(torch.arange(n) % 2 == 0, groups, -groups)


def flat(random: Random, n: int, size: int) -> Tensor:
    """Constant groups, zeros of both signs, and groups with a single weight that is not 0."""
    values = torch.tensor([0.5, -0.5, 1.0, -3.0, 2.0**-9, 1 / 3, -0.1], dtype=torch.float64)[torch.arange(n) % 7]
    groups = torch.where(torch.arange(n) % 4 == 0, values, -0.0).expand(size, n).clone()
    groups[random.randrange(size), 1::4] = values[1::4]
    return groups


def drawn(kind: str) -> Callable[[Random, int, int], Tensor]:
    """Groups of `random_weight`, with both signs in each."""

    def groups(random: Random, n: int, size: int) -> Tensor:
        weight = random_weight(random.randrange(1 << 16), n, size, kind).to(torch.float64)
        weight[:, 0], weight[:, 1] = weight[:, 0].abs(), -weight[:, 1].abs()
        return weight.t()

    return groups


def tiny_groups(random: Random, n: int, size: int) -> Tensor:
    """Ranges whose scales are subnormal, or below the smallest float16."""
    return drawn("plain")(random, n, size) * 2.0 ** -(17 + torch.arange(n) % 20).to(torch.float64)


def large_groups(random: Random, n: int, size: int) -> Tensor:
    """Ranges up to 15 times 65504."""
    groups = drawn("plain")(random, n, size)
    return groups / (groups.amax(0) - groups.amin(0)) * 15 * 2.0 ** (15 - torch.arange(n) % 8).to(torch.float64)


BOTH_SIGNS = {
    "plain": drawn("plain"),
    "outliers": drawn("outliers"),
    "on a grid": drawn("on a grid"),
    "double ties": double_ties,
    "just above a scale": just_above,
}
OTHER_GROUPS = {"one sign": sided, "flat": flat, "tiny": tiny_groups}
KINDS = BOTH_SIGNS | OTHER_GROUPS | {"large": large_groups}
WEIGHT_DTYPES = ("float32", "float16", "bfloat16", "float64")


def weights_over(kinds: tuple[str, ...], dtypes: tuple[str, ...]) -> Callable[[Limits], Factors]:
    """A function from limits to the factors of a weight."""

    def over(limits: Limits) -> Factors:
        return {
            "kind": kinds,
            "dtype": dtypes,
            "outputs": tuple(limits.multiple_of_n * m for m in (1, 2, 9, 33, 129)),
            "groups": (1, 2, 3, 5, 9, 16, 112),
            "group size": sizes_taken(limits),
            "layout": (*LAYOUTS, "repeated"),
        }

    return over


def few_weights_at_all(setting: Setting) -> bool:
    return weights_in(setting) <= 1 << 15


def some_weights(setting: Setting) -> bool:
    """As above, with room for many outputs in many groups."""
    return weights_in(setting) <= 1 << 17


def weight_of(setting: Setting, limits: Limits) -> tuple[Tensor, int]:
    """The weight [N, K] and the group size of a setting; every group of every output is one of its kind."""
    random, k, n = seed_of(setting), inputs_of(setting, limits), setting["outputs"]
    groups = groups_of(k, setting["group size"])
    columns = KINDS[setting["kind"]](random, groups * n, k // groups)
    weight = columns.reshape(k // groups, groups, n).permute(2, 1, 0).reshape(n, k)
    dtype = getattr(torch, setting["dtype"])
    weight = weight.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    return laid_out(weight, setting["layout"]), setting["group size"]


def expect_half_scale(target: Subject, weight: Tensor, group_size: int) -> None:
    """No weight is off by more than half a scale, whatever the arithmetic."""
    codes, zeros, scales = quantize(target, weight, group_size)
    wanted = weight.t().to(torch.float64)
    bound = (0.5 + ARITHMETIC) * per_weight(scales, weight.shape[1])
    expect_within(truth.real_weight(codes, zeros, scales, group_size), wanted, bound, "(code - zero) * scale at ")


def expect_nearest(target: Subject, weight: Tensor, group_size: int) -> None:
    """No other code under the same scale and zero is nearer to a weight."""
    codes, zeros, scales = quantize(target, weight, group_size)
    wanted, k = weight.t().to(torch.float64), weight.shape[1]
    scale, zero = per_weight(scales, k), per_weight(zeros, k)
    nearest = ((wanted / scale).round() + zero).clamp(0, 15)
    error, best = (((some - zero) * scale - wanted).abs() for some in (codes.to(torch.float64), nearest))
    expect_within(error, best, ARITHMETIC * scale, "error of weight")


def expect_neighbour(target: Subject, weight: Tensor, group_size: int) -> None:
    """Each scale is one of the two float16 numbers next to the range / 15; the smallest one stands for less."""
    scales = quantize(target, weight, group_size)[2]
    groups = weight.to(torch.float64).t().reshape(scales.shape[0], -1, weight.shape[0])
    step = (groups.amax(1).clamp(min=0) - groups.amin(1).clamp(max=0)) / 15
    bits = scales.view(torch.int16)
    below, above = ((bits + side).view(torch.float16).to(torch.float64) for side in (-1, 1))
    gap = torch.where(step > scales, above - scales, scales - below)
    expect_within(scales, step.clamp(min=2.0**-24), gap * (1 - 2.0**-12) + step * 2.0**-22, "scale")


def expect_pure(target: Subject, weight: Tensor, group_size: int) -> None:
    """The weight stays as it was, and a contiguous copy of it gives the same codes, zeros and scales."""
    got = target.pure("quantize", weight, group_size)
    for name, one, other in zip(
        ("code", "zero", "scale"), quantize(target, weight.contiguous(), group_size), got, strict=True
    ):
        expect_equal(other, one, name)


@rule("L2.combinations", "quantize", flags=("HalfArithmetic",),
      over=weights_over(tuple(BOTH_SIGNS), WEIGHT_DTYPES), allowed=some_weights)  # fmt: skip
def weight_combinations(target: Subject, setting: Setting) -> None:
    """Weights of every size class, dtype and view, both signs in each group: bound, step, and nothing written."""
    weight, group_size = weight_of(setting, target.limits)
    for judgement in (expect_pure, expect_bound, expect_step):
        target.judge(judgement, weight, group_size)


@rule("L2.combinations-of-groups", "quantize", flags=("ZeroNotInRange", "ScaleFloor", "HalfArithmetic"),
      over=weights_over(tuple(OTHER_GROUPS), ("float32", "float64")), allowed=few_weights_at_all)  # fmt: skip
def group_combinations(target: Subject, setting: Setting) -> None:
    """The same for groups of one sign, constant groups, zeros of both signs and groups with subnormal scales."""
    weight, group_size = weight_of(setting, target.limits)
    for judgement in (expect_pure, expect_bound, expect_step):
        target.judge(judgement, weight, group_size)


@rule("L2.half-scale", "quantize", flags=("ScaleToNearest", "HalfArithmetic", "ZeroNotInRange", "ScaleFloor"),
      over=weights_over(tuple(KINDS), WEIGHT_DTYPES), allowed=few_weights_at_all)  # fmt: skip
def half_scale(target: Subject, setting: Setting) -> None:
    """No weight is off by more than half a scale, in groups built so that only a scale rounded up keeps to it."""
    target.judge(expect_half_scale, *weight_of(setting, target.limits))


@rule("L2.nearest-code", "quantize", flags=("ScaleToNearest", "HalfArithmetic"),
      over=weights_over(tuple(KINDS), WEIGHT_DTYPES), allowed=some_weights)  # fmt: skip
def nearest_code(target: Subject, setting: Setting) -> None:
    """Every code is the nearest under the stored scale and zero, next to ties too."""
    target.judge(expect_nearest, *weight_of(setting, target.limits))


@rule("L2.neighbour", "quantize", flags=("HalfArithmetic", "ZeroNotInRange", "ScaleFloor"),
      over=weights_over(tuple(KINDS), WEIGHT_DTYPES), allowed=few_weights_at_all)  # fmt: skip
def neighbour(target: Subject, setting: Setting) -> None:
    """Every scale is one of the two float16 numbers around its group's range / 15."""
    target.judge(expect_neighbour, *weight_of(setting, target.limits))


@rule("L2.large-groups", "quantize", flags=("HalfArithmetic",),
      over=weights_over(("large",), ("float32",)), allowed=few_weights_at_all)  # fmt: skip
def large_group_combinations(target: Subject, setting: Setting) -> None:
    """Groups with scales up to 32768 keep the bound."""
    target.judge(expect_bound, *weight_of(setting, target.limits))
