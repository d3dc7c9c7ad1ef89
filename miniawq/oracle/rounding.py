"""L2, rounding: properties of plain rounding. No golden codes, because correct implementations differ in them.

The tolerance. A group has range R = M - m with m = min(w, 0), M = max(w, 0), and a stored float16 scale s = R / 15 (1
+ d) with |d| <= u = 2**-11 when rounded to nearest, plus at most 2**-25 where s is subnormal. Two ways of coding are
correct:

* from the stored s: the error is s / 2 inside the range of the codes; where s was rounded down the sides of the range
  lie up to R - 15 s <= 15 u / (1 - u) s outside it;
* from R / 15 before it is rounded: s / 2 in its own step, and the step itself moves each of 15 codes by u s.

Either way |w - (code - zero) s| <= s (1/2 + 15 u / (1 - u)), plus 15 * 2**-25 for subnormal scales, plus 16 * 2**-23
s for float32 arithmetic (a quotient up to 16, two roundings). These checks hold for scales rounded up and to nearest
alike; the contract's own s / 2, which only scales rounded up keep, is asked for in `adversarial`. The faults in
`faults` show that the bound is not slack: a scale of 1.02 or 0.98, a zero off by one, `floor` and a lost top code all
exceed it or `L2.step`.
"""

import torch
from torch import Tensor

import miniawq.oracle.cases as cases
import miniawq.oracle.truth as truth
from miniawq.oracle.cases import groups_of, random_weight, shape, smallest
from miniawq.oracle.check import rule
from miniawq.oracle.refused import expect_refused_weight
from miniawq.oracle.subject import Broken, Lacking, Subject, expect_equal, expect_tensor, expect_within

HALF_ULP = 2.0**-11  # relative; the rounding of a float16
SUBNORMAL_STEP = 2.0**-24  # the distance of subnormal float16 numbers
BOUND_IN_SCALES = 0.5 + 15 * HALF_ULP / (1 - HALF_ULP) + 16 * 2.0**-23  # derived above
BOUND_SUBNORMAL = 15 * SUBNORMAL_STEP / 2  # 15 codes, each half a step off


def quantize(target: Subject, weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The target's codes, zeros and scales, of the right dtypes, shapes and ranges."""
    n, k = weight.shape
    groups = groups_of(k, group_size)
    result = target.call("quantize", weight, group_size)
    if not isinstance(result, tuple) or len(result) != 3:
        raise Broken("three tensors: codes, zeros, scales", type(result).__name__)
    codes = expect_tensor(result[0], torch.uint8, (k, n))
    zeros = expect_tensor(result[1], torch.uint8, (groups, n))
    scales = expect_tensor(result[2], torch.float16, (groups, n))
    for name, values in (("codes", codes), ("zeros", zeros)):
        if int(values.max()) > 15:
            raise Broken(f"{name} in 0..15", f"{name} up to {int(values.max())}")
    if not bool((scales.isfinite() & (scales > 0)).all()):
        raise Broken("scales positive and finite", f"scales from {float(scales.min())} to {float(scales.max())}")
    return codes, zeros, scales


def per_weight(values: Tensor, k: int) -> Tensor:
    """Values [G, N] of each group's weights, float64 [K, N]."""
    return values.to(torch.float64).repeat_interleave(k // values.shape[0], dim=0)


def expect_bound(target: Subject, weight: Tensor, group_size: int) -> None:
    """No weight is off by more than the bound of this module's docstring."""
    codes, zeros, scales = quantize(target, weight, group_size)
    rounded = truth.real_weight(codes, zeros, scales, group_size)
    bound = BOUND_IN_SCALES * per_weight(scales, weight.shape[1]) + BOUND_SUBNORMAL
    expect_within(rounded, weight.t(), bound, "(code - zero) * scale at ")


def expect_step(target: Subject, weight: Tensor, group_size: int) -> None:
    """Each scale is (M - m) / 15, off by at most the distance of two float16 numbers."""
    scales = quantize(target, weight, group_size)[2]
    groups = weight.to(torch.float64).t().reshape(scales.shape[0], -1, weight.shape[0])
    step = (groups.amax(1).clamp(min=0) - groups.amin(1).clamp(max=0)) / 15
    expect_within(scales, step, (step * 2 * HALF_ULP * 1.001).clamp(min=SUBNORMAL_STEP), "scale")


def plain(target: Subject, groups: int = 2, columns: int = 1, seed: int = 1) -> tuple[Tensor, int]:
    """A plain random weight and the smallest group size the target takes."""
    k, n, group_size = smallest(target.limits, groups, columns)
    return random_weight(seed, n, k), group_size


@rule("L2.shape-and-range", "quantize")
def shape_and_range(target: Subject) -> None:
    """Codes uint8 [K, N] and zeros uint8 [G, N] in 0..15, scales float16 [G, N], positive and finite."""
    target.judge(quantize, *plain(target, groups=3, columns=2))


@rule("L2.bound", "quantize", flags=("HalfArithmetic",), drawn=cases.weights)
def bound(target: Subject, drawn: tuple[Tensor, int]) -> None:
    """Where a group holds both signs, no weight is off by more than half a scale plus the rounding of the scale."""
    target.judge(expect_bound, *drawn)


@rule("L2.step", "quantize", flags=("HalfArithmetic",), drawn=cases.weights)
def step(target: Subject, drawn: tuple[Tensor, int]) -> None:
    """Where a group holds both signs, its scale is its range / 15 within a rounding to float16."""
    target.judge(expect_step, *drawn)


@rule("L2.nearest", "quantize", flags=("HalfArithmetic",), drawn=cases.weights)
def nearest(target: Subject, drawn: tuple[Tensor, int]) -> None:
    """No other code under the same scale and zero would be nearer, beyond what the rounding of the scale costs."""
    target.judge(expect_near_codes, *drawn)


def expect_near_codes(target: Subject, weight: Tensor, group_size: int) -> None:
    codes, zeros, scales = quantize(target, weight, group_size)
    error = (truth.real_weight(codes, zeros, scales, group_size) - weight.t().to(torch.float64)).abs()
    k, scale, zero = weight.shape[1], per_weight(scales, weight.shape[1]), per_weight(zeros, weight.shape[1])
    best_code = (weight.t().to(torch.float64) / scale + zero).round().clamp(0, 15)
    best = ((best_code - zero) * scale - weight.t().to(torch.float64)).abs()
    expect_within(error, best, 30 * HALF_ULP * per_weight(scales, k) + BOUND_SUBNORMAL, "error of weight")


@rule("L2.zero-stays-zero", "quantize", drawn=cases.weights)
def zero_stays_zero(target: Subject, drawn: tuple[Tensor, int]) -> None:
    """A weight of 0 between weights of both signs has the code of its zero, and comes back as 0."""
    weight, group_size = drawn
    weight = weight.clone()
    weight[:, 2::4] = 0
    target.judge(expect_codes_of_zero, weight, group_size)


def expect_codes_of_zero(target: Subject, weight: Tensor, group_size: int) -> None:
    codes, zeros, _ = quantize(target, weight, group_size)
    zero_codes = per_weight(zeros, weight.shape[1]).to(torch.uint8)
    expect_equal(torch.where(weight.t() == 0, codes, zero_codes), zero_codes, "code of 0 at ")


@rule("L2.monotone", "quantize", drawn=cases.weights)
def monotone(target: Subject, drawn: tuple[Tensor, int]) -> None:
    """Inside a group a larger weight never has a smaller code."""
    target.judge(expect_order, *drawn)


def expect_order(target: Subject, weight: Tensor, group_size: int) -> None:
    codes, zeros, _ = quantize(target, weight, group_size)
    groups = zeros.shape[0]
    by_group = weight.t().reshape(groups, -1, weight.shape[0])
    order = by_group.sort(1).indices
    ordered = codes.reshape(by_group.shape).to(torch.int16).gather(1, order)
    if bool((ordered.diff(dim=1) < 0).any()):
        raise Broken("codes in the order of the weights", "a larger weight with a smaller code")


@rule("L2.idempotent", "quantize")
def idempotent(target: Subject) -> None:
    """Weights that are on a grid keep their codes and zeros; the scales move by one float16 at most."""
    for group_size in target.limits.group_sizes:
        k, n, _ = shape(group_size, 3, 2, target.limits)
        layer = cases.random_layer(11, k, n, group_size)
        size = k // groups_of(k, group_size)
        layer.codes[::size], layer.codes[1::size] = 0, 15
        target.judge(expect_kept_layer, layer)


def expect_kept_layer(target: Subject, layer: cases.PackedCase) -> None:
    """The codes, zeros and scales of a layer come back, in groups that use the codes 0 and 15."""
    codes, zeros, scales = quantize(target, layer.weight.t().to(torch.float32).contiguous(), layer.group_size)
    groups = layer.codes.reshape(len(layer.scales), -1, layer.codes.shape[1])
    whole = (groups.amin(1) == 0) & (groups.amax(1) == 15)
    used = whole.repeat_interleave(groups.shape[1], 0)
    expect_equal(torch.where(used, codes, 0), torch.where(used, layer.codes, 0), "code")
    expect_equal(torch.where(whole, zeros, 0), torch.where(whole, layer.zeros, 0), "zero")
    difference = scales.view(torch.int16).to(torch.int32) - layer.scales.view(torch.int16).to(torch.int32)
    units = torch.where(whole, difference, 0)
    expect_within(units, torch.zeros_like(units), torch.ones(()), "units in the last place of scale")


@rule("L2.powers-of-two", "quantize", drawn=cases.weights)
def powers_of_two(target: Subject, drawn: tuple[Tensor, int]) -> None:
    """A weight times 2**k has the same codes and zeros, and scales times 2**k."""
    weight, group_size = drawn
    target.judge(expect_scaled, weight / 2.0 ** weight.abs().amax().log2().floor(), group_size)


def expect_scaled(target: Subject, weight: Tensor, group_size: int) -> None:
    """The rule for a weight with scales that are not subnormal."""
    largest = weight.reshape(len(weight), groups_of(weight.shape[1], group_size), -1).abs().amax(-1)
    if bool(((largest > 0) & (largest < 2.0**-6)).any()):
        return
    codes, zeros, scales = quantize(target, weight, group_size)
    for exponent in (-3, 2):
        again = quantize(target, weight * 2.0**exponent, group_size)
        expect_equal(again[0], codes, f"times 2**{exponent}: code")
        expect_equal(again[1], zeros, f"times 2**{exponent}: zero")
        if bool((scales > 2.0**-10).all()):
            expect_equal(again[2], scales * 2.0**exponent, f"times 2**{exponent}: scale")


@rule("L2.permutations", "quantize")
def permutations(target: Subject) -> None:
    """Exchanging output channels, groups, or weights inside a group exchanges the results and changes nothing else."""
    weight, group_size = plain(target, groups=4, columns=2, seed=12)
    n, k = weight.shape
    groups = groups_of(k, group_size)
    target.judge(
        expect_permuted, weight * (1 + torch.arange(n))[:, None] * (1 + torch.arange(k) * groups // k), group_size
    )


def expect_permuted(target: Subject, weight: Tensor, group_size: int) -> None:
    n, k = weight.shape
    groups = groups_of(k, group_size)
    codes, zeros, scales = quantize(target, weight, group_size)
    rows = torch.arange(n).flip(0)
    blocks = torch.arange(groups).roll(1)
    inputs = torch.arange(k).reshape(groups, -1)[blocks].flip(1).reshape(-1)
    got = quantize(target, weight[rows][:, inputs].contiguous(), group_size)
    expect_equal(got[0], codes[inputs][:, rows], "code")
    expect_equal(got[1], zeros[blocks][:, rows], "zero")
    expect_equal(got[2], scales[blocks][:, rows], "scale")


@rule("L2.groups-independent", "quantize")
def groups_independent(target: Subject) -> None:
    """Other values in one group or output channel leave all other groups alone; the last group has its own scale."""
    weight, group_size = plain(target, groups=3, columns=1, seed=13)
    target.judge(expect_independent, weight, group_size)


def expect_independent(target: Subject, weight: Tensor, group_size: int) -> None:
    codes, zeros, scales = quantize(target, weight, group_size)
    groups = zeros.shape[0]
    size = weight.shape[1] // groups
    changed = weight.clone()
    changed[-1, -size:] *= 100
    got = quantize(target, changed, group_size)
    for name, old, new in zip(("code", "zero", "scale"), (codes, zeros, scales), got, strict=True):
        keep = torch.ones_like(old, dtype=torch.bool)
        keep[-(size if name == "code" else 1) :, -1] = False
        expect_equal(torch.where(keep, new, 0), torch.where(keep, old, 0), name)
    target.judge(expect_bound, changed, group_size)


@rule("L2.one-signed", "quantize", flags=("ZeroNotInRange",))
def one_signed(target: Subject) -> None:
    """Groups of only positive or only negative weights keep the bound: zero is in the range of every group."""
    weight, group_size = plain(target, seed=14)
    for sign in (1, -1):
        for distance in (4.0, 1.0, 1 / 64):
            target.judge(expect_bound, sign * (weight.abs() / 8 + distance), group_size)


@rule("L2.constant", "quantize", flags=("ZeroNotInRange",))
def constant(target: Subject) -> None:
    """A group of one repeated value keeps it, within the bound of a scale of value / 15."""
    weight, group_size = plain(target)
    for value in (0.5, -0.5, 1.0, -3.0, 2.0**-9):
        target.judge(expect_bound, torch.full_like(weight, value), group_size)
        target.judge(expect_step, torch.full_like(weight, value), group_size)


@rule("L2.zero-group", "quantize")
def zero_group(target: Subject) -> None:
    """A group of zeros comes back as zeros, with a positive scale."""
    weight, group_size = plain(target)
    weight[:, : weight.shape[1] // groups_of(weight.shape[1], group_size)] = 0
    target.judge(expect_zeros, weight, group_size)


def expect_zeros(target: Subject, weight: Tensor, group_size: int) -> None:
    """Weights of 0 come back as 0."""
    codes, zeros, scales = quantize(target, weight, group_size)
    rounded = truth.real_weight(codes, zeros, scales, group_size).t()
    expect_equal(torch.where(weight == 0, rounded, 0.0), torch.zeros_like(rounded), "weight")


@rule("L2.tiny", "quantize", flags=("ScaleFloor", "ZeroNotInRange", "HalfArithmetic"))
def tiny(target: Subject) -> None:
    """Weights of 1e-5 and 1e-7 keep the bound, with scales that follow them into the subnormal numbers."""
    weight, group_size = plain(target, seed=15)
    for spread in (2.0**-17, 2.0**-23, 2.0**-30):
        target.judge(expect_bound, weight * spread, group_size)
        target.judge(expect_step, weight * spread, group_size)


@rule("L2.outlier", "quantize", flags=("HalfArithmetic",))
def outlier(target: Subject) -> None:
    """One weight of 1000 among weights of 1, on either side, is in range: its code is the top or the bottom one."""
    for value in (1000.0, -1000.0):
        weight, group_size = plain(target, seed=16)
        weight[0, 3] = value
        target.judge(expect_bound, weight, group_size)
        target.judge(expect_step, weight, group_size)


@rule("L2.one-group", "quantize")
def one_group_of_weights(target: Subject) -> None:
    """A group_size of -1 is one group of all K inputs."""
    target.must_take(-1)
    k, n, _ = shape(-1, 5, 1, target.limits)
    target.judge(expect_bound, random_weight(17, n, k), -1)


@rule("L2.dtypes", "quantize", flags=("HalfArithmetic",))
def half_weights(target: Subject) -> None:
    """Weights of float16 and bfloat16 keep the bound too: the arithmetic is not that of the weight's dtype."""
    weight, group_size = plain(target, groups=4, columns=2, seed=18)
    for dtype in (torch.float16, torch.bfloat16):
        for offset in (0.0, 0.5):
            target.judge(expect_bound, (weight + offset).to(dtype), group_size)


@rule("L2.same-twice", "quantize")
def same_codes_twice(target: Subject) -> None:
    """The same weight gives the same result, whatever its strides, and is not written into."""
    target.judge(expect_same_codes, *plain(target, columns=2, seed=19))


def expect_same_codes(target: Subject, weight: Tensor, group_size: int) -> None:
    before = weight.clone()
    expected = quantize(target, weight, group_size)
    if not torch.equal(weight, before):
        raise Broken("the weight as it was", "quantize changed it")
    for view in (weight, weight.t().contiguous().t(), torch.stack([weight, weight], -1)[..., 0]):
        for name, old, new in zip(("code", "zero", "scale"), expected, quantize(target, view, group_size), strict=True):
            expect_equal(new, old, name)


@rule("L2.refuses-nan", "quantize", flags=("NoRangeCheck",))
def refuses_nan(target: Subject) -> None:
    """NaN and infinity anywhere in the weight are a ValueError."""
    for value in (float("nan"), float("inf"), float("-inf")):
        for place in ((0, 0), (-1, -1)):
            weight, group_size = plain(target)
            weight[place] = value
            target.judge(expect_refused_weight, weight, group_size, f"a weight that is {value}")


@rule("L2.refuses-part-groups", "quantize", flags=("NoShapeCheck",))
def refuses_part_groups(target: Subject) -> None:
    """A group_size that does not divide the inputs is a ValueError: no weight is dropped or padded."""
    sizes = [size for size in target.limits.group_sizes if size > 1]
    if not sizes:
        raise Lacking("the target takes no group_size but -1")
    for group_size in sizes:
        weight = random_weight(20, target.limits.multiple_of_n, group_size + group_size // 2)
        why = f"{weight.shape[1]} inputs in groups of {group_size}"
        target.judge(expect_refused_weight, weight, group_size, why)


@rule("L2.refuses-large-weights", "quantize", flags=("NoRangeCheck",))
def refuses_large_weights(target: Subject) -> None:
    """Weights whose scale would be beyond 65504 are a ValueError, not an infinite or saturated scale."""
    weight, group_size = plain(target)
    target.judge(expect_refused_weight, weight * 1e7, group_size, "a scale above 65504")
