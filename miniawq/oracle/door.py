"""The doors to the checks from Python: the list of all checks, a run over them, and one test each for pytest."""

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

import miniawq.oracle.adversarial as adversarial
import miniawq.oracle.checkpoints as checkpoints
import miniawq.oracle.combinations as combinations
import miniawq.oracle.crowds as crowds
import miniawq.oracle.deep_checkpoints as deep_checkpoints
import miniawq.oracle.dequantization as dequantization
import miniawq.oracle.dialects as dialects
import miniawq.oracle.dtypes as dtypes
import miniawq.oracle.edges as edges
import miniawq.oracle.large as large
import miniawq.oracle.multiplication as multiplication
import miniawq.oracle.paths as paths
import miniawq.oracle.ranges as ranges
import miniawq.oracle.refusals as refusals
import miniawq.oracle.rounding as rounding
import miniawq.oracle.search as search
import miniawq.oracle.searches as searches
import miniawq.oracle.sizes as sizes
import miniawq.oracle.state as state
import miniawq.oracle.storage as storage
import miniawq.oracle.sums as sums
import miniawq.oracle.views as views
from miniawq.errors import UsageError
from miniawq.oracle.check import PROFILES, Check, Profile, Result, run_check
from miniawq.oracle.contract import FUNCTIONS, Limits
from miniawq.oracle.diagnosis import diagnose
from miniawq.oracle.report import ConformanceReport, failure_lines, judge
from miniawq.oracle.shrink import made_small
from miniawq.oracle.subject import Subject


def checks_in(module: ModuleType) -> list[Check]:
    """The checks a module defines, in its order."""
    return [value for value in vars(module).values() if isinstance(value, Check)]


CHECKS: list[Check] = sorted(
    [
        *(check for module in (storage, dequantization, rounding, multiplication) for check in checks_in(module)),
        *checkpoints.CHECKS,
        *deep_checkpoints.CHECKS,
        *dialects.CHECKS,
        *checks_in(search),
        *checks_in(combinations),
        *checks_in(adversarial),
        *checks_in(searches),
        *checks_in(ranges),
        *state.CHECKS,
        *checks_in(refusals),
        *checks_in(dtypes),
        *checks_in(edges),
        *paths.CHECKS,
        *checks_in(sizes),
        *checks_in(views),
        *checks_in(sums),
        *checks_in(crowds),
        *checks_in(large),
    ],
    key=lambda check: check.level,
)


def chosen(levels: Sequence[str] = (), only: str = "") -> list[Check]:
    """The checks of these levels (all, if none is named) whose id contains `only`."""
    return [check for check in CHECKS if (not levels or check.level in levels) and only in check.id]


def load_target(path: str) -> tuple[Any, str]:
    """What `pkg.module` or `pkg.module:object` names, and the line that imports it; UsageError if nothing."""
    module_name, _, attribute = path.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
    except ImportError as error:
        fix = "give pkg.module or pkg.module:object, importable from here"
        raise UsageError(f"cannot import {module_name!r}", str(error), fix) from error
    for name in attribute.split(".") if attribute else ():
        if not hasattr(target, name):
            raise UsageError(f"{path!r}: {getattr(target, '__name__', target)} has no attribute {name!r}")
        target = getattr(target, name)
    if not attribute:
        return target, f"import {module_name} as target"
    return target, f"from {module_name} import {attribute.split('.')[0]}; target = {attribute}"


def conformance(
    target: Any,
    checks: Sequence[Check],
    *,
    name: str = "",
    import_line: str = "target = ...  # yours",
    device: str = "cpu",
    profile: Profile = PROFILES["default"],
    expected: Mapping[str, str] | None = None,
    told: Callable[[Result], None] = lambda result: None,
) -> ConformanceReport:
    """Run `checks` on a target; `expected` maps ids of expected failures to reasons, `told` hears of each result."""
    subject = Subject(target, device)
    limits = {key: value for key, value in asdict(Limits.of(target)).items() if value != getattr(Limits, key)}
    report = ConformanceReport(
        target=name or str(getattr(target, "name", "") or getattr(target, "__name__", type(target).__name__)),
        version=str(getattr(target, "version", getattr(target, "__version__", ""))),
        import_line=import_line,
        device=device,
        implements=[function for function in FUNCTIONS if subject.has(function)],
        limits=limits,
    )
    started = time.perf_counter()
    for check in checks:
        result = judge([run_check(check, subject, profile)], dict(expected or {}))[0]
        told(result)
        report.results.append(result)
    report.causes = diagnose(subject, [result for result in report.results if result.status == "failed"])
    for cause in report.causes if profile.shrink else ():
        cause.failures.sort(key=partial(is_large, cause.failures[0].check.level))
        first = cause.failures[0]
        assert first.broken is not None
        first.broken = made_small(subject, first.broken)
    report.seconds = time.perf_counter() - started
    return report


LARGE = 1000  # elements: such an example takes long to shrink, and may not print then


def is_large(level: str, result: Result) -> bool:
    """Whether a failure should not be the first that is shown: its example is large, or its level a higher one."""
    call = result.broken.call if result.broken else None
    sizes = [value.numel() for value in (call.arguments if call else {}).values() if isinstance(value, Tensor)]
    return sum(sizes) > LARGE or result.check.level != level


def run_conformance(
    target: Any, levels: Sequence[str] = (), xfails: Mapping[str, str] | None = None, device: str = "cpu"
) -> ConformanceReport:
    """Run the checks of these levels and raise AssertionError with every failure; else return the report."""
    report = conformance(target, chosen(levels), expected=xfails, device=device)
    bad = [r for r in report.results if r.status in ("failed", "xpassed")]
    lines = [line for r in bad for line in (failure_lines(report, r) if r.broken else [f"{r.check.id}: {r.reason}"])]
    if lines:
        raise AssertionError("\n".join(lines))
    return report


def conformance_tests(
    target: Any, levels: Sequence[str] = (), xfails: Mapping[str, str] | None = None, device: str = "cpu"
) -> Callable[..., None]:
    """A pytest test function with one case per check: `test_conformance = conformance_tests(my_adapter)`.

    Skips what the target lacks, fails on what it breaks and on expected failures that pass.
    """
    expected = xfails or {}

    @pytest.mark.parametrize("check", [pytest.param(check, id=check.id) for check in chosen(levels)])
    def test_conformance(check: Check) -> None:
        report = conformance(target, [check], expected=expected, device=device)
        result = report.results[0]
        if result.status == "skipped":
            pytest.skip(result.reason)
        if result.status == "xfailed":
            pytest.xfail(result.reason)
        if result.status == "failed":
            pytest.fail("\n".join(failure_lines(report, result)), pytrace=False)
        if result.status == "xpassed":
            pytest.fail(result.reason, pytrace=False)

    return test_conformance
