"""What is told about a run: text, JSON, JUnit and a badge; and which failures were expected."""

import json
import platform
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap
from typing import Any
from xml.etree import ElementTree

import torch

from miniawq.errors import UsageError
from miniawq.oracle.check import Check, Result
from miniawq.oracle.contract import CONTRACT, FLAGS, FUNCTIONS, LEVELS
from miniawq.oracle.diagnosis import Cause
from miniawq.oracle.paste import describe_call, snippet

STATUSES = ("passed", "failed", "skipped", "xfailed", "xpassed")


@dataclass
class ConformanceReport:
    """All results of one run."""

    target: str
    version: str
    import_line: str
    device: str
    implements: list[str]
    limits: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """No failure, no unexpected pass, and at least one check that ran and passed."""
        counts = self.counts()
        return not counts["failed"] and not counts["xpassed"] and counts["passed"] > 0

    def counts(self, level: str = "") -> Counter:
        """How many results of each status, in one level or in all."""
        return Counter(result.status for result in self.results if result.check.id.startswith(level))

    def levels(self) -> list[str]:
        """The levels that were asked for."""
        return sorted({result.check.level for result in self.results})


def read_expected_failures(path: Path, checks: list[Check]) -> dict[str, str]:
    """Check id to reason, from lines `id  # reason`; a reason may begin with a flag of the contract, `Flag: ...`.

    UsageError on an unknown id, a missing reason or a repeated id: a stale file is worse than none.
    """
    known, expected = {check.id for check in checks}, {}
    if not path.is_file():
        raise UsageError(f"there is no file {path}", "--xfails names a file of expected failures")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        id, _, reason = (part.strip() for part in line.partition("#"))
        if id not in known:
            raise UsageError(
                f"{path}:{number}: no check has the id {id!r}", "the file is stale", "see --list for the ids"
            )
        if not reason:
            raise UsageError(f"{path}:{number}: {id} has no reason", "each line is `id  # reason`")
        if id in expected:
            raise UsageError(f"{path}:{number}: {id} is named twice")
        expected[id] = reason
    return expected


def judge(results: list[Result], expected: dict[str, str]) -> list[Result]:
    """Failures that were expected become xfailed, passes that were not become xpassed; a skipped one is xpassed too."""
    judged = []
    for result in results:
        reason = expected.get(result.check.id)
        if reason is not None and result.status == "failed":
            result = Result(result.check, "xfailed", reason, result.broken, result.seconds)
        elif reason is not None:
            what = "skipped" if result.status == "skipped" else "passed"
            result = Result(
                result.check, "xpassed", f"expected to fail ({reason}), but it {what}", None, result.seconds
            )
        judged.append(result)
    return judged


def flag_of(reason: str) -> str:
    """The flag a reason begins with, or nothing."""
    word = reason.partition(":")[0]
    return word if word in FLAGS else ""


def badge(report: ConformanceReport) -> str:
    """One line: `L0 ok, L1 ok, L2 acceptable(ZeroNotInRange), L3 skipped`."""
    return ", ".join(f"{level} {verdict(report, level)}" for level in report.levels())


def verdict(report: ConformanceReport, level: str) -> str:
    """A level in a word or two."""
    counts = report.counts(level)
    if counts["failed"] or counts["xpassed"]:
        return "FAILED"
    reasons = [r.reason for r in report.results if r.check.level == level and r.status == "xfailed"]
    if not all(flag_of(reason) for reason in reasons):
        return "known failures"
    if reasons:
        return f"acceptable({', '.join(sorted({flag_of(reason) for reason in reasons}))})"
    return "ok" if counts["passed"] else "skipped"


def as_text(report: ConformanceReport, verbose: bool = False) -> str:
    """The report for people."""
    lines = [*header_lines(report), ""]
    lines += [f"{level} {LEVELS[level]:16} {tally(report.counts(level))}" for level in report.levels()]
    for number, cause in enumerate(report.causes, 1):
        lines += ["", *cause_lines(report, number, cause, verbose)]
    for result in report.results:
        if result.status in ("xpassed", "xfailed") or (verbose and result.status == "skipped"):
            lines.append(f"{result.status.upper():7} {result.check.id}: {result.reason}")
        elif verbose and result.status == "passed":
            lines.append(f"{result.status:7} {result.check.id} ({result.seconds:.2f} s)")
    if report.causes:
        lines += ["", "Mend the first cause and run again: it may hide others, or be why they fail."]
    reasons = Counter(r.reason for r in report.results if r.status == "skipped")
    lines += ["", *(f"skipped {count}: {reason}" for reason, count in reasons.items())]
    lines += [badge(report), f"{tally(report.counts()) or 'nothing ran'} in {report.seconds:.1f} s"]
    return "\n".join(lines)


def header_lines(report: ConformanceReport) -> list[str]:
    """What was run, on what, and what the target has and takes."""
    lines = [
        f"target      {report.target} {report.version}".rstrip(),
        f"contract    {CONTRACT} on {report.device}, torch {torch.__version__}, Python {platform.python_version()}",
        f"implements  {len(report.implements)} of {len(FUNCTIONS)}: {', '.join(report.implements) or 'nothing'}",
    ]
    lacking = [name for name in FUNCTIONS if name not in report.implements]
    if lacking:
        lines.append(f"lacks       {', '.join(lacking)}: their checks are skipped")
    if report.limits:
        lines.append(f"limits      {', '.join(f'{name}={value}' for name, value in report.limits.items())}")
    return lines


def tally(counts: Counter) -> str:
    """Counts in words, without the zeros."""
    return ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])


def cause_lines(report: ConformanceReport, number: int, cause: Cause, verbose: bool) -> list[str]:
    """A probable cause, its first failure in full, and the names of the others."""
    many = len(cause.failures)
    lines = [f"{number}. {cause.title} ({many} check{'s' * (many > 1)})"]
    if cause.hint:
        lines.append(f"   usually: {cause.hint}")
    shown = cause.failures if verbose else cause.failures[:1]
    for result in shown:
        lines += ["", *failure_lines(report, result)]
    others = ", ".join(result.check.id for result in cause.failures[len(shown) :])
    if others:
        text = f"and so {others}"
        lines += ["", *wrap(text, 110, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)]
    return lines


def failure_lines(report: ConformanceReport, result: Result) -> list[str]:
    """A failure: the rule, the call, both sides, what it may mean, and lines to paste."""
    broken = result.broken
    assert broken is not None
    lines = [f"FAILED {result.check.id}", f"  rule      {result.check.rule}"]
    if broken.call:
        lines.append(f"  call      {describe_call(broken.call)}")
    lines += [f"  expected  {broken.expected}", f"  got       {broken.got}"]
    if broken.setting:
        lines.append(f"  with      {', '.join(f'{name} {level}' for name, level in broken.setting.items())}")
    if result.check.flags:
        lines.append(f"  legal if  it is {' or '.join(result.check.flags)} (--flags)")
    if broken.call:
        lines += [
            "  example",
            *(f"    {line}" for line in snippet(report.import_line, broken.call, broken).splitlines()),
        ]
    return lines


def as_json(report: ConformanceReport) -> str:
    """The whole report as JSON."""
    failures = [r for r in report.results if r.status in ("failed", "xfailed")]
    return json.dumps(
        {
            "contract": CONTRACT,
            "target": report.target,
            "version": report.version,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": report.device,
            "implements": report.implements,
            "limits": report.limits,
            "ok": report.ok,
            "badge": badge(report),
            "seconds": round(report.seconds, 3),
            "levels": {level: {s: report.counts(level)[s] for s in STATUSES} for level in report.levels()},
            "causes": [
                {"title": c.title, "hint": c.hint, "checks": [r.check.id for r in c.failures]} for c in report.causes
            ],
            "results": [{"id": r.check.id, "status": r.status, "reason": r.reason} for r in report.results],
            "failures": [failure_record(report, result) for result in failures],
        },
        indent=1,
    )


def failure_record(report: ConformanceReport, result: Result) -> dict[str, Any]:
    """One failure for machines."""
    broken = result.broken
    assert broken is not None
    return {
        "id": result.check.id,
        "rule": result.check.rule,
        "flags": list(result.check.flags),
        "call": describe_call(broken.call) if broken.call else None,
        "expected": broken.expected,
        "got": broken.got,
        "example": snippet(report.import_line, broken.call, broken) if broken.call else None,
    }


def as_junit(report: ConformanceReport) -> str:
    """JUnit XML: a test suite per level, a test case per check."""
    root = ElementTree.Element("testsuites", name=printable(f"miniawq.oracle {report.target}"))
    for level in report.levels():
        counts, results = report.counts(level), [r for r in report.results if r.check.level == level]
        suite = ElementTree.SubElement(
            root, "testsuite", name=f"{level} {LEVELS[level]}", tests=str(len(results)), errors="0",
            failures=str(counts["failed"] + counts["xpassed"]), skipped=str(counts["skipped"] + counts["xfailed"]),
            time=f"{sum(result.seconds for result in results):.3f}",
        )  # fmt: skip
        for result in results:
            add_case(suite, report, result)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True)


def add_case(suite: ElementTree.Element, report: ConformanceReport, result: Result) -> None:
    """One check as a JUnit test case."""
    case = ElementTree.SubElement(
        suite, "testcase", classname=printable(report.target), name=result.check.id, time=f"{result.seconds:.3f}"
    )
    if result.status == "failed":
        failure = ElementTree.SubElement(case, "failure", message=printable(str(result.broken)))
        failure.text = printable("\n".join(failure_lines(report, result)))
    elif result.status == "xpassed":
        ElementTree.SubElement(case, "failure", message=printable(result.reason))
    elif result.status in ("skipped", "xfailed"):
        ElementTree.SubElement(case, "skipped", message=printable(f"{result.status}: {result.reason}"))


def printable(text: str) -> str:
    """What XML may hold: control characters, which a target's message can have, are written as escapes."""
    return re.sub(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", lambda c: ascii(c[0])[1:-1], text)
