"""`python -m miniawq.oracle.faults`: plant each fault, and tell which checks find it. Exit code 1 if one survives."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from miniawq.oracle.check import Profile, run_check
from miniawq.oracle.door import CHECKS
from miniawq.oracle.planted import Fault, files, numbers, storage
from miniawq.oracle.subject import Subject

FAULTS: list[Fault] = [
    *storage.STORAGE,
    *storage.DEQUANTIZATION,
    *numbers.ROUNDING,
    *numbers.MULTIPLICATION,
    *files.CHECKPOINTS,
    *files.SEARCH,
]

BEGIN, END = "<!-- FAULTS -->", "<!-- END OF FAULTS -->"
UNSHRUNK = Profile(shrink=False)


def killed(fault: Fault, profile: Profile = UNSHRUNK) -> bool:
    """Whether the check that is named with the fault finds it."""
    check = next(check for check in CHECKS if check.id == fault.killer)
    return run_check(check, Subject(fault.target()), profile).status == "failed"


def finders(fault: Fault, profile: Profile = UNSHRUNK) -> list[str]:
    """The ids of all checks of the fault's level that find it."""
    subject = Subject(fault.target())
    level = fault.killer.split(".")[0]
    return [c.id for c in CHECKS if c.level == level and run_check(c, subject, profile).status == "failed"]


def table(faults: Sequence[Fault]) -> str:
    """The Markdown table of docs/oracle.md."""
    lines = ["| Level | Planted fault | Killed by | Checks of the level that find it |", "|---|---|---|---|"]
    for fault in faults:
        found = finders(fault)
        killer = f"`{fault.killer}`" if fault.killer in found else f"SURVIVED `{fault.killer}`"
        lines.append(f"| {fault.killer[:2]} | {fault.name} | {killer} | {len(found)} |")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m miniawq.oracle.faults", description=__doc__)
    parser.add_argument("--level", default="", help="only the faults of one level")
    parser.add_argument(
        "--into", type=Path, metavar="FILE", help="replace the table between the FAULTS marks of a file"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    text = table([fault for fault in FAULTS if fault.killer.startswith(arguments.level)])
    if arguments.into:
        before, _, rest = arguments.into.read_text().partition(BEGIN)
        arguments.into.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
    else:
        print(text)
    return 1 if "SURVIVED" in text else 0


if __name__ == "__main__":
    sys.exit(main())
