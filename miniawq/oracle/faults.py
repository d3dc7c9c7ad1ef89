"""`python -m miniawq.oracle.faults`: plant wrong implementations, and tell which check finds each. Exit code 1 if one
survives that no list argues for.

Sets: `named`, faults with the check that must find each; `grammar`, function x kind x place x circumstance; `blind`,
`second-blind` .. `fifth-blind`, written after the checks were frozen.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from miniawq.oracle.check import Profile, run_check
from miniawq.oracle.contract import LEVELS
from miniawq.oracle.door import CHECKS
from miniawq.oracle.planted import Fault, files, numbers, storage
from miniawq.oracle.planted.blind import BLIND
from miniawq.oracle.planted.blind_fifth import BLIND_FIFTH
from miniawq.oracle.planted.blind_fifth_products import BLIND_FIFTH_PRODUCTS
from miniawq.oracle.planted.blind_fifth_readers import BLIND_FIFTH_READERS
from miniawq.oracle.planted.blind_fifth_rounding import BLIND_FIFTH_ROUNDING
from miniawq.oracle.planted.blind_fifth_searches import BLIND_FIFTH_SEARCHES
from miniawq.oracle.planted.blind_fourth import BLIND_FOURTH
from miniawq.oracle.planted.blind_fourth_products import BLIND_FOURTH_PRODUCTS
from miniawq.oracle.planted.blind_fourth_readers import BLIND_FOURTH_READERS
from miniawq.oracle.planted.blind_fourth_searches import BLIND_FOURTH_SEARCHES
from miniawq.oracle.planted.blind_products import BLIND_PRODUCTS
from miniawq.oracle.planted.blind_readers import BLIND_READERS
from miniawq.oracle.planted.blind_second import BLIND_SECOND
from miniawq.oracle.planted.blind_second_readers import BLIND_SECOND_READERS
from miniawq.oracle.planted.blind_third import BLIND_THIRD
from miniawq.oracle.planted.blind_third_products import BLIND_THIRD_PRODUCTS
from miniawq.oracle.planted.blind_third_readers import BLIND_THIRD_READERS
from miniawq.oracle.planted.bred import grammar
from miniawq.oracle.planted.edges import EDGES
from miniawq.oracle.planted.fifth import FIFTH
from miniawq.oracle.planted.fourth import FOURTH
from miniawq.oracle.planted.paths import PATHS
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
    *EDGES,
    *PATHS,
    *FOURTH,
    *FIFTH,
]

UNSHRUNK = Profile(shrink=False)


def killed(fault: Fault, profile: Profile = UNSHRUNK) -> bool:
    """Whether the check that is named with the fault finds it."""
    check = next(check for check in CHECKS if check.id == fault.killer)
    return run_check(check, Subject(fault.target()), profile).status == "failed"


SETS: dict[str, list[Any]] = {
    "grammar": grammar(),
    "blind": [*BLIND, *BLIND_PRODUCTS, *BLIND_READERS],
    "second-blind": [*BLIND_SECOND, *BLIND_SECOND_READERS],
    "third-blind": [*BLIND_THIRD, *BLIND_THIRD_PRODUCTS, *BLIND_THIRD_READERS],
    "fourth-blind": [*BLIND_FOURTH, *BLIND_FOURTH_PRODUCTS, *BLIND_FOURTH_READERS, *BLIND_FOURTH_SEARCHES],
    "fifth-blind": [
        *BLIND_FIFTH,
        *BLIND_FIFTH_ROUNDING,
        *BLIND_FIFTH_PRODUCTS,
        *BLIND_FIFTH_READERS,
        *BLIND_FIFTH_SEARCHES,
    ],
}


def killer_of(place: tuple[str, int]) -> str:
    """The id of the first check that finds a fault of a set, or of the one named with it; empty if none does."""
    if place[0] == "named":
        return FAULTS[place[1]].killer if killed(FAULTS[place[1]]) else ""
    fault = SETS[place[0]][place[1]]
    subject = Subject(fault.target())
    checks = [check for check in CHECKS if fault.function in check.needs]
    checks.sort(key=lambda check: check.over is not None)  # covering arrays take longest
    return next((c.id for c in checks if run_check(c, subject, UNSHRUNK).status == "failed"), "")


def killers(name: str, places: Sequence[int]) -> Iterator[str]:
    """The killers of faults of a set, one process a core."""
    with multiprocessing.Pool(os.cpu_count(), torch.set_num_threads, (1,)) as pool:
        tried = pool.imap(killer_of, [(name, place) for place in places], chunksize=4)
        yield from tqdm(tried, name, len(places), disable=None)


# What kind of fault a name tells of: the first whose words stand in it.
KINDS = {
    "state": r"kept|buffer|once|every \d+th|each address|in place|overwritten|other call|remember|changed",
    "refusals": r"taken(?! for| from)|negative group_size|group_size (?:of 0|beyond)|let pass|accepted"
    r"|looked (?:at|for)|made to fit|refus|missing|padded|allowed|outside|above 15",
    "formats and ranges": r"float|TF32|ties|round|NaN|infin|subnormal|overflow|satur|scaled? (?:to|through)"
    r"|precision|clamp|flush|largest|sign|negative|unit|cut off",
    "views": r"view|offset|stride|memory|repeated|transposed|as they lie|dimension|vector|broadcast",
    "sizes": r"\d+ (?:rows|inputs|outputs|tokens|groups)|past|rows|columns|outputs|tile|group_size|square|groups",
    "meaning": r"",
}


def kind_of(name: str) -> str:
    """The kind of a fault."""
    return next(kind for kind, words in KINDS.items() if re.search(words, name))


def score_table(results: dict[str, dict[str, str]]) -> str:
    """The Markdown table of found faults by kind and level, for each set; `results` has the killer of each fault."""
    lines = [f"| Set | Kind | {' | '.join(LEVELS)} | all |", f"|---|---|{'---|' * (len(LEVELS) + 1)}"]
    for name, faults in {"named": FAULTS, **SETS}.items():
        known = [(fault, results[name][key]) for fault in faults if (key := key_of(fault)) in results.get(name, {})]
        known = [(fault, killer) for fault, killer in known if killer or fault.name not in ARGUED]
        for kind in (*KINDS, "all"):
            some = [pair for pair in known if kind in ("all", kind_of(pair[0].name))]
            cells = [found_of([killer for fault, killer in some if fault.level in (level, "all")]) for level in LEVELS]
            if some:
                lines.append(f"| {name} | {kind} | {' | '.join(cells)} | {found_of([killer for _, killer in some])} |")
    return "\n".join(lines)


def key_of(fault: Any) -> str:
    """A name that no other fault of its set has."""
    return f"{fault.level} {fault.name}" + (f" {fault.killer}" if isinstance(fault, Fault) else "")


def found_of(killed_by: Sequence[str]) -> str:
    """How many were found, of how many."""
    return f"{sum(map(bool, killed_by))} of {len(killed_by)}" if killed_by else ""


def table(faults: Sequence[Fault], found: dict[str, str]) -> str:
    """The Markdown table of named faults."""
    lines = ["| Level | Planted fault | Killed by |", "|---|---|---|"]
    for fault in faults:
        killer = f"`{fault.killer}`" if found[key_of(fault)] else f"SURVIVED `{fault.killer}`"
        lines.append(f"| {fault.level} | {fault.name} | {killer} |")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m miniawq.oracle.faults", description=__doc__)
    parser.add_argument("set", nargs="?", default="grammar", choices=("named", *SETS, "table"),
                        help="which faults (grammar), or `table`: write what --results has")  # fmt: skip
    parser.add_argument("--level", default="", help="only the faults of one level")
    parser.add_argument("--only", default="", metavar="TEXT", help="only faults whose name contains this")
    parser.add_argument("--results", type=Path, metavar="FILE", help="add what is found to a JSON file")
    parser.add_argument("--into", type=Path, metavar="FILE", help="named, table: replace the table between the marks")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    results = json.loads(arguments.results.read_text()) if arguments.results and arguments.results.exists() else {}
    if arguments.set == "table":
        print_table(score_table(results), "SCORES", arguments.into)
        return 0
    faults: list[Any] = FAULTS if arguments.set == "named" else SETS[arguments.set]
    places = [i for i, f in enumerate(faults) if f.level.startswith(arguments.level) and arguments.only in f.name]
    found = dict(zip((key_of(faults[i]) for i in places), killers(arguments.set, places), strict=True))
    if arguments.results:
        results.setdefault(arguments.set, {}).update(found)
        arguments.results.write_text(json.dumps(results, indent=0))
    survivors = [faults[i] for i in places if not found[key_of(faults[i])] and faults[i].name not in ARGUED]
    for fault in survivors:
        print(f"SURVIVED {fault.level} {fault.name}")
    if arguments.set == "named" and arguments.into:
        print_table(table(faults, found), "FAULTS", arguments.into)
    print(score_table({arguments.set: found}))
    return 1 if survivors else 0


def print_table(text: str, mark: str, file: Path | None) -> None:
    """Print a table, or put it between the marks of a file."""
    if file is None:
        print(text)
        return
    before, _, rest = file.read_text().partition(f"<!-- {mark} -->")
    end = f"<!-- END OF {mark} -->"
    file.write_text(f"{before}<!-- {mark} -->\n{text}\n{end}{rest.partition(end)[2]}")


if __name__ == "__main__":
    sys.exit(main())
