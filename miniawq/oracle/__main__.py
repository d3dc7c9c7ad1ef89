"""`python -m miniawq.oracle [pkg.module[:object]]`: check an implementation of AWQ INT4 and report what it breaks."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from miniawq import cli
from miniawq.errors import UsageError
from miniawq.oracle.check import PROFILES, Check, Profile
from miniawq.oracle.contract import FLAGS, LEVELS
from miniawq.oracle.door import chosen, conformance, load_target
from miniawq.oracle.paste import save_arguments
from miniawq.oracle.report import ConformanceReport, as_json, as_junit, as_text, badge, read_expected_failures
from miniawq.oracle.stdio import Program

DEFAULT_TARGET = "miniawq.oracle.target"
EXAMPLES = (
    "miniawq oracle my_package.my_adapter",
    "miniawq oracle my_package.my_adapter:kernels --levels L0,L1 --verbose",
    "miniawq oracle --command ./my_program --examples failures",
)


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(
        "oracle",
        "Check an implementation of AWQ INT4 and report what it breaks. Exit code 0: no\n"
        "failure; 1: a failure, an unexpected pass, or nothing that passed; 2: usage.",
        usage="[PACKAGE.MODULE[:OBJECT] | --command PROGRAM] [flags]",
        examples=EXAMPLES,
        page="docs/oracle.md",
    )
    parser.add_argument("target", nargs="?", default=DEFAULT_TARGET, help="pkg.module or pkg.module:object (miniawq)")
    parser.add_argument(
        "--command", metavar="PROGRAM", help="check a program that speaks the stdio protocol instead (docs/oracle.md)"
    )
    parser.add_argument(
        "--levels", default="", metavar="L0,L1", help=f"some of {','.join(LEVELS)}, separated by commas"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only checks whose id contains this")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="where the arguments lie (cpu, cuda)")
    parser.add_argument("--xfails", type=Path, metavar="FILE", help="expected failures, lines `id  # reason`; strict")
    parser.add_argument(
        "--profile",
        choices=sorted(PROFILES),
        default="default",
        metavar="NAME",
        help="deep: 2000 random examples a check",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="another random stream; the default profile is derandomised"
    )
    parser.add_argument("--json", action="store_true", help="the report as JSON on stdout")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="also write JUnit XML")
    parser.add_argument("--badge", action="store_true", help="one line on stdout")
    parser.add_argument(
        "--examples", type=Path, metavar="DIR", help="write the arguments of each failure as safetensors"
    )
    parser.add_argument("--verbose", "-v", action="store_true", help="also list what passed and what was skipped")
    parser.add_argument("--list", action="store_true", help="list the checks and their rules, and run nothing")
    parser.add_argument("--flags", action="store_true", help="explain the legal differences that have a name")
    return parser


def body(arguments: argparse.Namespace) -> int:
    """Run what was asked for; the exit code."""
    levels = [level for level in arguments.levels.upper().split(",") if level]
    unknown = [level for level in levels if level not in LEVELS]
    if unknown:
        raise UsageError(f"there is no level {unknown[0]}", f"the levels are {', '.join(LEVELS)}")
    checks = chosen(levels, arguments.only)
    if not checks:
        raise UsageError(f"no check has an id with {arguments.only!r}", "", "see --list")
    if arguments.flags:
        print("\n".join(f"{flag}\n  {text}" for flag, text in FLAGS.items()))
        return 0
    if arguments.list:
        print("\n".join(f"{check.id:28} {check.rule}" for check in checks))
        return 0
    report = run_on(arguments, checks)
    if arguments.examples:
        save_examples(report, arguments.examples)
    if arguments.junit:
        arguments.junit.write_text(as_junit(report))
    if arguments.json:
        print(as_json(report))
    elif arguments.badge:
        print(badge(report))
    else:
        print(as_text(report, arguments.verbose))
    return 0 if report.ok else 1


def run_on(arguments: argparse.Namespace, checks: Sequence[Check]) -> ConformanceReport:
    """The report on a module, object or program."""
    profile: Profile = PROFILES[arguments.profile]
    if arguments.seed is not None:
        profile = replace(profile, seed=arguments.seed)
    expected = read_expected_failures(arguments.xfails, chosen()) if arguments.xfails else {}
    if arguments.command:
        with Program(arguments.command) as program:
            line = f"from miniawq.oracle.stdio import Program; target = Program({arguments.command!r})"
            return conformance(program, checks, import_line=line, profile=profile, expected=expected)
    sys.path.insert(0, "")  # `python -m` has the working directory on the path, the console script has not
    target, line = load_target(arguments.target)
    name = str(getattr(target, "name", arguments.target))
    return conformance(
        target, checks, name=name, import_line=line, device=arguments.device, profile=profile, expected=expected
    )


def save_examples(report: ConformanceReport, directory: Path) -> None:
    """The arguments of each failing call as `<check id>.safetensors`."""
    directory.mkdir(parents=True, exist_ok=True)
    for result in report.results:
        if result.broken and result.broken.call:
            save_arguments(result.broken.call, directory / f"{result.check.id}.safetensors")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(body, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
