"""What probably happened: failures grouped by a cause, each cause with one line on what is usually wrong.

A cause is found by `probes`, which compare the target with wrong definitions that people have written. What no question
explains is grouped by function and kind of check, and told by the circumstances without which it does not fail.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import miniawq.oracle.cases as cases
from miniawq.oracle.check import Result
from miniawq.oracle.probes import PROBES
from miniawq.oracle.subject import Broken, Crash, Lacking, Subject


@dataclass
class Cause:
    """A probable cause: what happened, what is usually wrong, and the failures it explains, the lowest level first."""

    title: str
    hint: str = ""
    failures: list[Result] = field(default_factory=list)


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


VIEWS = {*cases.LAYOUTS, "repeated"} - {"contiguous"}
STATE = ("as they were", "first call", "to stay as it was")


def family(result: Result) -> str:
    """What kind of rule was broken: one of numbers, of refusals, or of state; or there was an exception."""
    told = result.broken.expected if result.broken else ""
    if "because of" in told:
        return "refusals"
    if told == "a result":
        return "exceptions"
    return "state" if any(words in told for words in STATE) else "numbers"


def circumstances(result: Result, broad: bool) -> tuple[str, str]:
    """A title from the function, the kind of check and what it takes to fail; and what is usually wrong then.

    The hint of a special check misleads where plain ones fail too (`broad`).
    """
    functions = " and ".join(result.check.needs)
    kind = family(result)
    if kind == "refusals":
        return f"{functions}: something is taken that must be refused", "check shapes, dtypes and ranges of all of it"
    assert result.broken is not None
    if kind == "exceptions":
        hint = "the call is legal; what an adapter does not take it can declare as a limit (docs/oracle.md)"
        return f"{functions} raises {result.broken.got[:100]}", hint
    if kind == "state":
        if "as they were" in result.broken.expected:
            return f"{functions}: an argument is written into", "work on a copy, or write to an output of your own"
        return f"{functions}: the result depends on other calls", "a buffer or a cache that outlives the call"
    if result.check.id.endswith(".state"):
        return f"{functions}: the result depends on other calls", "a buffer or a cache that outlives the call"
    setting = result.broken.setting
    # What is left of a setting is needed to fail.
    if any(level in VIEWS for level in setting.values()) or (result.check.id.endswith(".strides") and not broad):
        return f"{functions}: views are read wrongly", "strides and offsets count; or call contiguous() first"
    for part, hint in HINTS.items():
        if part in result.check.id and not broad:
            return f"{functions}: {part.strip('.')}", hint
    if setting:
        where = ", ".join(f"{name} {level}" for name, level in setting.items())
        return f"{functions}: wrong with {where}", "everything else at its simplest passes: look at what this changes"
    return f"{functions}: wrong numbers", ""


HINTS = {
    ".wrong-dtypes": "an argument of another dtype is read as if it had the right one: refuse it, or convert it",
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
    ".square": "as many inputs as outputs: something is transposed, and no shape tells",
    ".long": "an index of 16 bits, or a grid that ends too early",
    ".silent-channels": "a channel that is always 0 gives 0 / 0 or a factor of 0: clamp the statistics from below",
    ".helps": "the search finds nothing: are the candidates compared by the output's error, with x in it?",
    ".never-worse": "plain rounding (all ones, nothing clipped) must be among the candidates",
    ".token-order": "all tokens count alike: no first token, no batch, no order",
    ".any-order": "all tokens count alike: no first token, no batch, no order",
}
