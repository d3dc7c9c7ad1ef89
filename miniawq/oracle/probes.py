"""A few small questions whose answers tell which wrong definition a target follows: zeros one too high, scales
inverted, codes in the order 0..7, codes cut off. Each is asked on a small problem of its own, whatever has failed.
"""

from collections.abc import Callable, Iterator
from random import Random

import torch
from torch import Tensor

import miniawq.oracle.cases as cases
import miniawq.oracle.truth as truth
from miniawq.oracle.cases import smallest
from miniawq.oracle.multiplication import dtypes_taken
from miniawq.oracle.search import loss_with, problem
from miniawq.oracle.subject import Subject

Wrong = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def by_row(values: Tensor, codes: Tensor) -> Tensor:
    """Values [G, N] for each row of the codes, float64."""
    return values.to(torch.float64).repeat_interleave(len(codes) // len(values), 0)


def other_zeros(change: Callable[[Tensor], Tensor]) -> Wrong:
    """The weight with other zeros."""
    return lambda q, z, s, g: (q.to(torch.float64) - change(by_row(z, q))) * by_row(s, q)


def in_order(codes: Tensor) -> Tensor:
    """Codes read with nibble i as column i."""
    words = truth.pack(codes).to(torch.int64) % 2**32
    return torch.stack([words >> 4 * i & 15 for i in range(8)], -1).flatten(1)


WRONG_WEIGHTS: dict[str, tuple[str, Wrong]] = {
    "zeros are read one too high": (
        "GPTQ (version 1) stores zeros less one and adds one; AutoAWQ stores them as they are",
        other_zeros(lambda z: z + 1),
    ),
    "zeros are read one too low": ("AutoAWQ stores zeros as they are: take nothing away", other_zeros(lambda z: z - 1)),
    "zeros are not subtracted": ("weight = (code - zero) * scale", other_zeros(lambda z: 0 * z)),
    "the zero is taken for 8": (
        "symmetric formats have a zero of 8; here it is stored",
        other_zeros(lambda z: 0 * z + 8),
    ),
    "the sign of the weight is lost or turned": (
        "weight = (code - zero) * scale, with code and zero as signed numbers before they are subtracted",
        lambda q, z, s, g: (by_row(z, q) - q.to(torch.float64)) * by_row(s, q),
    ),
    "scales are inverted": (
        "the weight is multiplied by the scale; it is the search's activations that are divided",
        lambda q, z, s, g: (q.to(torch.float64) - by_row(z, q)) / by_row(s, q),
    ),
    "codes are scaled before the zero is subtracted": (
        "the zero counts in codes: (code - zero) * scale, not code * scale - zero",
        lambda q, z, s, g: q.to(torch.float64) * by_row(s, q) - by_row(z, q),
    ),
    "codes are unpacked in the order 0..7": (
        "nibble i of an AutoAWQ word holds column (0, 2, 4, 6, 1, 3, 5, 7)[i]",
        lambda q, z, s, g: (in_order(q).to(torch.float64) - by_row(z, q)) * by_row(s, q),
    ),
    "zeros are unpacked in the order 0..7": (
        "zeros are packed in the order of the codes: (0, 2, 4, 6, 1, 3, 5, 7)",
        lambda q, z, s, g: (q.to(torch.float64) - by_row(in_order(z), q)) * by_row(s, q),
    ),
    "codes and zeros are unpacked in the order 0..7": (
        "nibble i of an AutoAWQ word holds column (0, 2, 4, 6, 1, 3, 5, 7)[i]",
        lambda q, z, s, g: (in_order(q).to(torch.float64) - by_row(in_order(z), q)) * by_row(s, q),
    ),
    "the first group's scale and zero are used for all": (
        "row k belongs to group k // group_size",
        lambda q, z, s, g: (q.to(torch.float64) - z[0].to(torch.float64)) * s[0].to(torch.float64),
    ),
    "groups follow each other row by row": (
        "row k belongs to group k // group_size, not to group k % groups",
        lambda q, z, s, g: (
            (q.to(torch.float64) - z.to(torch.float64).repeat(len(q) // len(z), 1))
            * s.to(torch.float64).repeat(len(q) // len(z), 1)
        ),
    ),
}


def weights_seen(target: Subject) -> Iterator[tuple[str, str, str]]:
    """For `dequantize` and `matmul` alike: which wrong weight they use."""
    k, n, group_size = smallest(target.limits, 3, 2)
    layer = cases.random_layer(60, k, n, group_size, cases.exact_scales)
    layer.zeros.clamp_(1, 14)  # one more and one less are zeros too
    for function in ("dequantize", "matmul"):
        if not target.has(function):
            continue
        x = torch.eye(k, dtype=dtypes_taken(target)[0])
        arguments = layer.packed if function == "dequantize" else (x, *layer.packed)
        seen = target.unless_refused(function, *arguments)
        if not isinstance(seen, Tensor):
            continue
        seen = seen.to(torch.float64)
        if seen.shape == (n, k) and n != k and torch.equal(seen.t(), layer.weight):
            yield "the weight is transposed", "files have inputs first: the result is [K, N]", function
        for title, (hint, wrong) in WRONG_WEIGHTS.items():
            expected = wrong(layer.codes, layer.zeros, layer.scales, group_size)
            if seen.shape == expected.shape and torch.allclose(seen, expected, 1e-2, 0):
                yield title, hint, function


ORDERS = {
    (0, 1, 2, 3, 4, 5, 6, 7): "the order 0..7",
    (0, 4, 1, 5, 2, 6, 3, 7): "the inverse of AutoAWQ's order",
    (7, 5, 3, 1, 6, 4, 2, 0): "AutoAWQ's order from the top nibble down",
}


def words_seen(target: Subject) -> Iterator[tuple[str, str, str]]:
    """For `pack` and `unpack`: which order they have, and which of them is wrong."""
    n = max(8, target.limits.multiple_of_n)
    codes = torch.arange(n, dtype=torch.uint8)[None] % 8
    right = truth.pack(codes)
    for function, argument, expected in (("pack", codes, right), ("unpack", right, codes)):
        got = target.unless_refused(function, argument) if target.has(function) else None
        if not isinstance(got, Tensor) or got.shape != expected.shape or torch.equal(got, expected):
            continue
        hint = "nibble i of a word holds column (0, 2, 4, 6, 1, 3, 5, 7)[i]: columns 0..7 are 0x75316420"
        for order, name in ORDERS.items():
            word = sum(int(codes[0, column]) << 4 * nibble for nibble, column in enumerate(order))
            columns = [truth.NIBBLE_HOLDS_COLUMN[order.index(column)] for column in range(8)]
            if function == "pack" and int(got[0, 0]) % 2**32 == word:
                yield f"codes are packed in {name}", hint, function
            if function == "unpack" and got[0, :8].tolist() == columns:
                yield f"words are unpacked in {name}", hint, function
    if target.has("pack") and target.has("unpack"):
        yield from which_is_wrong(target)


def which_is_wrong(target: Subject) -> Iterator[tuple[str, str, str]]:
    """Where packing and unpacking do not undo each other: the one that differs from the definition."""
    codes = cases.codes(Random(61), 2, 2 * target.limits.multiple_of_n)
    words = truth.pack(codes)
    packed, unpacked = target.unless_refused("pack", codes), target.unless_refused("unpack", words)
    if not isinstance(packed, Tensor) or not isinstance(unpacked, Tensor):
        return
    wrong = [name for name, right in (("pack", torch.equal(packed, words)), ("unpack", torch.equal(unpacked, codes)))
             if not right]  # fmt: skip
    if len(wrong) == 1:
        title = f"pack and unpack do not undo each other, and it is {wrong[0]} that is wrong"
        yield title, f"compare {wrong[0]} with the other one, word by word", wrong[0]


NEAREST = "code = round(weight / scale) + zero"
# From weight / scale, the zero before it was rounded, and the zero.
WRONG_CODES: dict[str, tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "codes are cut off instead of rounded to nearest": (NEAREST, lambda steps, exact, zero: steps.trunc() + zero),
    "codes are rounded down instead of rounded to nearest": (
        f"{NEAREST}; a cast to integers cuts off: round first, also after the zero is added",
        lambda steps, exact, zero: steps.floor() + zero,
    ),
    "codes are rounded up instead of rounded to nearest": (NEAREST, lambda steps, exact, zero: steps.ceil() + zero),
    "the zero is added before it is rounded": (
        f"{NEAREST}, with the zero rounded before it is added",
        lambda steps, exact, zero: (steps + exact).round(),
    ),
    "codes count from the lowest weight, and are cut off": (
        f"{NEAREST}, not (weight - lowest) / scale: the zero is rounded before it is added, and a cast cuts off",
        lambda steps, exact, zero: (steps + exact).floor(),
    ),
}


def rounding_seen(target: Subject) -> Iterator[tuple[str, str, str]]:
    """For `quantize`: how its codes follow from its own scales and zeros, and its scales from the weight."""
    k, n, group_size = smallest(target.limits, 3)
    weight = cases.random_weight(62, n, k)
    got = target.unless_refused("quantize", weight, group_size)
    if not isinstance(got, tuple) or len(got) != 3 or not all(isinstance(part, Tensor) for part in got):
        return
    codes, zeros, scales = got
    if codes.shape == (n, k) != (k, n):
        yield "codes are [N, K]", "results have inputs first: codes [K, N], zeros and scales [G, N]", "quantize"
    if codes.shape != (k, n) or zeros.shape != scales.shape or not len(scales) or k % len(scales):
        return
    groups = weight.t().to(torch.float64).reshape(len(scales), -1, n)
    step = (groups.amax(1).clamp(min=0) - groups.amin(1).clamp(max=0)) / 15
    if torch.allclose(scales.to(torch.float64) * step, torch.ones_like(step), 1e-2):
        yield "scales are inverted", "the scale is range / 15: what a code is multiplied by", "quantize"
    lowest = groups.amin(1).clamp(max=0)
    steps = weight.t().to(torch.float64) / by_row(scales, codes)
    exact_zeros = -lowest / scales.to(torch.float64)
    right = (steps.round() + by_row(zeros, codes)).clamp(0, 15)
    for title, (hint, wrong) in WRONG_CODES.items():
        expected = wrong(steps, by_row(exact_zeros, codes), by_row(zeros, codes)).clamp(0, 15)
        if agreement(expected, codes) > 0.99 and agreement(right, codes) < 0.95:  # half precision moves a few codes
            yield title, hint, "quantize"
    if torch.equal(exact_zeros.floor(), zeros.to(torch.float64)):
        yield "zeros are cut off instead of rounded to nearest", "zero = round(-min(w, 0) / scale)", "quantize"


def agreement(expected: Tensor, codes: Tensor) -> float:
    """The share of codes that are as expected."""
    return float((expected == codes.to(torch.float64)).double().mean())


def searches_seen(target: Subject) -> Iterator[tuple[str, str, str]]:
    """For the searches: whether they look at x, and whether their factors are inverted."""
    weight, x, group_size = problem(target.limits, 2)
    for function in ("search_scales", "search_clip"):
        if not target.has(function):
            continue
        one, other = (target.unless_refused(function, weight, some, group_size) for some in (x, x.roll(7, 1)))
        if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape:
            continue
        if torch.equal(one, other):
            what = "the output's error, not by the weight's" if function == "search_clip" else "x: loud channels matter"
            yield f"{function} does not depend on x", f"candidates are compared by {what}", function
        if function == "search_scales" and bool((one > 0).all()) and one.shape == (weight.shape[1],):
            plain, found, inverse = (
                loss_with(weight, x, factors, group_size, truth.quantize)
                for factors in (torch.ones_like(one), one, 1 / one)
            )
            if inverse < 0.9 * plain < found:
                hint = "weight * factors is rounded and x / factors given to it: loud channels have large factors"
                yield "factors are inverted", hint, function


PROBES = (words_seen, weights_seen, rounding_seen, searches_seen)
