"""Disturb runs until time is over, and count what comes: `make faults`. Linux; disks are mounted where that is allowed.

    python scripts/faults.py --minutes 10
    python scripts/faults.py --minutes 1 --only "kill -9" "full disks"
    python scripts/faults.py --rounds 1                    # each once, as `make test` has it
    python scripts/faults.py --minutes 30 --page docs/reliability.md

`tests/reliability/faults.py` says what is done and what must hold afterwards. Exit code 1 if a run hung, if something
else than three lines and a documented exit code came, or if anything was lost.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.reliability import processes
from tests.reliability.faults import FAULTS, KINDS, Arena
from tests.reliability.page import table, write_table

BAD = ("hung", "escaped", "lost")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=1 << 60, help="of all faults, at most")
    parser.add_argument(
        "--only", nargs="+", choices=FAULTS, default=[*FAULTS], metavar="FAULT", help=f"of {', '.join(FAULTS)}"
    )
    parser.add_argument("--seed", type=int, default=1, help="default %(default)s")
    parser.add_argument("--page", type=Path, help="write the table into this page")
    arguments = parser.parse_args()
    processes.ready()
    rows = {name: dict.fromkeys(KINDS, 0) for name in arguments.only}
    started, seconds = time.monotonic(), 60 * arguments.minutes
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with TemporaryDirectory(dir=memory) as folder, tqdm(total=int(seconds), unit="s", disable=None) as bar:
        (whole := Path(folder) / "whole").mkdir()
        arena = Arena(whole)
        for round_ in range(arguments.rounds):
            if time.monotonic() - started > seconds:
                break
            for name in arguments.only:
                for verdict in FAULTS[name](arena, Random(f"{arguments.seed} {round_} {name}")):
                    rows[name]["tried"] += 1
                    rows[name][verdict.kind] += 1
                    if verdict.kind in BAD:
                        tqdm.write(f"{name}, round {round_}: {verdict.kind}\n{verdict.told}\n", file=sys.stderr)
            for path in whole.iterdir():
                if path.name.startswith(("at-", "log-")):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            bar.update(int(time.monotonic() - started) - bar.n)
    text = table("fault", KINDS, {name: list(row.values()) for name, row in rows.items()})
    print(text)
    if arguments.page:
        write_table(arguments.page, "faults", text)
    return 1 if any(row[kind] for row in rows.values() for kind in BAD) else 0


if __name__ == "__main__":
    sys.exit(main())
