"""`python -m miniawq.oracle.faults`: plant wrong implementations, and tell which check finds each. Exit code 1 if one
survives that no list argues for.

Three sets: `named`, faults with the check that must find each; `grammar`, function x kind x place x circumstance; and
`blind`, written after the checks were frozen.
"""

import argparse
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from miniawq.oracle.check import Check, Profile, run_check
from miniawq.oracle.contract import LEVELS
from miniawq.oracle.door import CHECKS
from miniawq.oracle.planted import Fault, files, numbers, storage
from miniawq.oracle.planted.blind import BLIND
from miniawq.oracle.planted.blind_products import BLIND_PRODUCTS
from miniawq.oracle.planted.blind_readers import BLIND_READERS
from miniawq.oracle.planted.blind_second import BLIND_SECOND
from miniawq.oracle.planted.bred import grammar
from miniawq.oracle.planted.second import SECOND
from miniawq.oracle.planted.survivors import ARGUED
from miniawq.oracle.subject import Subject

FAULTS: list[Fault] = [
    *storage.STORAGE,
    *storage.DEQUANTIZATION,
    *numbers.ROUNDING,
    *numbers.MULTIPLICATION,
    *files.CHECKPOINTS,
    *files.SEARCH,
    *SECOND,
]

BEGIN, END = "<!-- FAULTS -->", "<!-- END OF FAULTS -->"
UNSHRUNK = Profile(shrink=False)


def killed(fault: Fault, profile: Profile = UNSHRUNK) -> bool:
    """Whether the check that is named with the fault finds it."""
    check = next(check for check in CHECKS if check.id == fault.killer)
    return run_check(check, Subject(fault.target()), profile).status == "failed"


SETS: dict[str, list[Any]] = {
    "grammar": grammar(),
    "blind": [*BLIND, *BLIND_PRODUCTS, *BLIND_READERS],
    "second-blind": BLIND_SECOND,
}


def killer_of(place: tuple[str, int]) -> str:
    """The id of the first check that finds a fault of a set; empty if none does."""
    fault = SETS[place[0]][place[1]]
    subject = Subject(fault.target())
    checks: Iterable[Check] = (check for check in CHECKS if fault.function in check.needs)
    return next((c.id for c in checks if run_check(c, subject, UNSHRUNK).status == "failed"), "")


def killers(name: str, places: Sequence[int]) -> Iterator[str]:
    """The killers of faults of a set, one process a core."""
    with multiprocessing.Pool(os.cpu_count(), torch.set_num_threads, (1,)) as pool:
        tried = pool.imap(killer_of, [(name, place) for place in places], chunksize=4)
        yield from tqdm(tried, name, len(places), disable=None)


def scores(name: str, killed_by: Sequence[str], faults: Sequence[Any]) -> list[str]:
    """Rows of a table: how many faults of each level were found, of how many."""
    pairs = list(zip(faults, killed_by, strict=True))
    found = Counter(fault.level for fault, killer in pairs if killer)
    argued = Counter(fault.level for fault, killer in pairs if not killer and fault.name in ARGUED)
    planted = Counter(fault.level for fault in faults)
    cells = [f"{found[level]} of {planted[level] - argued[level]}" for level in LEVELS]
    total = f"{sum(found.values())} of {sum(planted.values()) - sum(argued.values())}"
    return [f"| {name} | {' | '.join(cells)} | {total} |"]


def table(faults: Sequence[Fault]) -> str:
    """The Markdown table of docs/oracle.md."""
    lines = ["| Level | Planted fault | Killed by |", "|---|---|---|"]
    for fault in tqdm(faults, "named", disable=None):
        killer = f"`{fault.killer}`" if killed(fault) else f"SURVIVED `{fault.killer}`"
        lines.append(f"| {fault.killer[:2]} | {fault.name} | {killer} |")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m miniawq.oracle.faults", description=__doc__)
    parser.add_argument("set", nargs="?", default="grammar", choices=("named", *SETS), help="which faults (grammar)")
    parser.add_argument("--level", default="", help="only the faults of one level")
    parser.add_argument("--only", default="", metavar="TEXT", help="only faults whose name contains this")
    parser.add_argument(
        "--into", type=Path, metavar="FILE", help="named: replace the table between the FAULTS marks of a file"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.set != "named":
        return score_set(arguments.set, arguments.level, arguments.only)
    text = table([fault for fault in FAULTS if fault.killer.startswith(arguments.level)])
    if arguments.into:
        before, _, rest = arguments.into.read_text().partition(BEGIN)
        arguments.into.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
    else:
        print(text)
    return 1 if "SURVIVED" in text else 0


def score_set(name: str, level: str, only: str) -> int:
    """Plant a set, print its survivors and its score."""
    places = [i for i, f in enumerate(SETS[name]) if f.level.startswith(level) and only in f.name]
    faults = [SETS[name][place] for place in places]
    killed_by, survivors = [], 0
    for fault, killer in zip(faults, killers(name, places), strict=True):
        killed_by.append(killer)
        if not killer and fault.name not in ARGUED:
            survivors += 1
            print(f"SURVIVED {fault.level} {fault.name}", flush=True)
    print(f"| Set | {' | '.join(LEVELS)} | all |\n|---|{'---|' * (len(LEVELS) + 1)}")
    print("\n".join(scores(name, killed_by, faults)))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
