"""What probably happened: failures grouped by a cause, each cause with one line on what is usually wrong.

A cause is found by asking the target a few small questions and comparing its answers with those of wrong definitions
that people have written (zeros one too high, scales inverted, codes in the order 0..7). What no question explains is
grouped by function and kind of check, and told by the circumstances without which it does not fail.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

import miniawq.oracle.cases as cases
import miniawq.oracle.truth as truth
from miniawq.oracle.cases import smallest
from miniawq.oracle.check import Result
from miniawq.oracle.multiplication import dtypes_taken
from miniawq.oracle.search import loss_with, problem
from miniawq.oracle.subject import Broken, Crash, Lacking, Subject


@dataclass
class Cause:
    """A probable cause: what happened, what is usually wrong, and the failures it explains, the lowest level first."""

    title: str
    hint: str = ""
    failures: list[Result] = field(default_factory=list)


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
    quotient = weight.t().to(torch.float64) / by_row(scales, codes)
    for name, change in (("cut off", torch.trunc), ("rounded down", torch.floor), ("rounded up", torch.ceil)):
        other = (change(quotient) + by_row(zeros, codes)).clamp(0, 15)
        nearest = (quotient.round() + by_row(zeros, codes)).clamp(0, 15)
        if torch.equal(other, codes.to(torch.float64)) and not torch.equal(other, nearest):
            yield f"codes are {name} instead of rounded to nearest", "code = round(weight / scale) + zero", "quantize"
    exact_zero = -groups.amin(1).clamp(max=0) / scales.to(torch.float64)
    together = (quotient + by_row(exact_zero, codes)).round().clamp(0, 15)
    nearest = (quotient.round() + by_row(zeros, codes)).clamp(0, 15)
    if torch.equal(together, codes.to(torch.float64)) and not torch.equal(together, nearest):
        hint = "code = round(weight / scale) + zero, with the zero rounded before it is added"
        yield "the zero is added before it is rounded", hint, "quantize"


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


def diagnose(target: Subject, failed: list[Result]) -> list[Cause]:
    """The causes of these failures, that of the lowest level first; each failure stands under one."""
    causes: dict[str, Cause] = {}
    known = dict(found_by_probes(target, failed))
    broad = {result.check.needs for result in failed if vague(result) and not result.check.id.endswith(".state")}
    for result in sorted(failed, key=lambda r: vague(r, r.check.needs in broad)):
        functions, wide = result.check.needs, result.check.needs in broad
        found = next((known[name] for name in functions if name in known), None)
        if family(result) != "numbers" or not found:
            like = next((c for c in causes.values() if vague(result, wide) and same_numbers(c, functions)), None)
            found = (like.title, like.hint) if like else circumstances(result, wide)
        causes.setdefault(found[0], Cause(*found)).failures.append(result)
    order = {id(result): place for place, result in enumerate(failed)}
    for cause in causes.values():
        cause.failures.sort(key=lambda result: order[id(result)])
    return sorted(causes.values(), key=lambda cause: order[id(cause.failures[0])])


def vague(result: Result, broad: bool = False) -> bool:
    """Whether a failure tells nothing about the circumstances: wrong numbers, in a check that has no setting."""
    told = circumstances(result, broad)[0]
    return family(result) == "numbers" and told.endswith((": wrong numbers", "depends on other calls"))


def same_numbers(cause: Cause, functions: tuple[str, ...]) -> bool:
    """Whether a cause is one of wrong numbers of these functions."""
    first = cause.failures[0]
    return family(first) == "numbers" and set(functions) == set(first.check.needs)


def found_by_probes(target: Subject, failed: list[Result]) -> Iterator[tuple[str, tuple[str, str]]]:
    """For a function with failures: the first wrong definition that it agrees with."""
    functions = {name for result in failed if family(result) == "numbers" for name in result.check.needs}
    last, seen = target.last, set()
    for probe in PROBES:
        try:
            for title, hint, function in probe(target):
                if function in functions and function not in seen:
                    seen.add(function)
                    yield function, (title, hint)
        except (Broken, Lacking, Crash, RuntimeError, ValueError, TypeError, IndexError):
            continue  # a target so wrong that it cannot be asked
    target.last = last


STATE = ("as they were", "first call", "to stay as it was")


def family(result: Result) -> str:
    """What kind of rule was broken: one of numbers, of refusals, or of state."""
    told = result.broken.expected if result.broken else ""
    if "because of" in told:
        return "refusals"
    return "state" if any(words in told for words in STATE) else "numbers"


def circumstances(result: Result, broad: bool) -> tuple[str, str]:
    """A title from the function, the kind of check and what it takes to fail; and what is usually wrong then.

    The hint of a special check misleads where plain ones fail too (`broad`).
    """
    functions = " and ".join(result.check.needs)
    kind = family(result)
    if kind == "refusals":
        return f"{functions}: something is taken that must be refused", "check shapes, dtypes and ranges of all of it"
    if kind == "state":
        assert result.broken is not None
        if "as they were" in result.broken.expected:
            return f"{functions}: an argument is written into", "work on a copy, or write to an output of your own"
        return f"{functions}: the result depends on other calls", "a buffer or a cache that outlives the call"
    if result.check.id.endswith(".state"):
        return f"{functions}: the result depends on other calls", "a buffer or a cache that outlives the call"
    for part, hint in HINTS.items():
        if part in result.check.id and not broad:
            return f"{functions}: {part.strip('.')}", hint
    setting = result.broken.setting if result.broken else {}
    views = [name for name, level in setting.items() if level in (*cases.LAYOUTS, "repeated")]
    if views and len(views) == len(setting):
        return f"{functions}: views are read wrongly", "strides and offsets count; or call contiguous() first"
    if setting:
        where = ", ".join(f"{name} {level}" for name, level in setting.items())
        return f"{functions}: wrong with {where}", "everything else at its simplest passes: look at what this changes"
    return f"{functions}: wrong numbers", ""


HINTS = {
    ".wrong-dtypes": "an argument of another dtype is read as if it had the right one: refuse it, or convert it",
    ".strides": "strides and offsets count; or call contiguous() first",
    ".half-scale": "round the scale up to float16, not to nearest, and code with the stored scale",
    ".one-signed": "the range of a group includes zero: min(w, 0) to max(w, 0)",
    ".constant": "the range of a group includes zero: min(w, 0) to max(w, 0)",
    ".combinations-of-groups": "groups of one sign, of zeros and of tiny weights: the range includes zero, no floor",
    ".subnormals": "numbers below 2**-14 are flushed: no flush-to-zero, no shortcut for exponent 0",
    ".result-rounding": "add product and bias in float32 and round once, ties to even",
    ".long-sums": "the sum is kept in half precision: accumulate in float32",
    ".accumulator-range": "the sum is kept in half precision: accumulate in float32",
    ".ranges": "x, bias or result pass through a narrower format (float16 for bfloat16 or float32)",
    ".float32-bits": "float32 inputs are cut to TF32 or 16 bits: ask for full precision",
    ".special": "NaN and infinity: no nan_to_num, no skipping of zeros, no mixing of rows",
    ".silent-channels": "a channel that is always 0 gives 0 / 0 or a factor of 0: clamp the statistics from below",
    ".helps": "the search finds nothing: are the candidates compared by the output's error, with x in it?",
    ".never-worse": "plain rounding (all ones, nothing clipped) must be among the candidates",
    ".token-order": "all tokens count alike: no first token, no batch, no order",
    ".any-order": "all tokens count alike: no first token, no batch, no order",
}
