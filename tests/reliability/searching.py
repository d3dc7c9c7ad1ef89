"""Damaged directories by Hypothesis, until time is over, in a process of its own: scripts/fuzz.py starts it.

    python -m tests.reliability.searching SEED TALLY FOUND SECONDS

It runs rounds of EXAMPLES, each with a seed of its own.
"""

import json
import logging
import sys
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from miniawq.text import library, worker
from tests.reliability.directories import Files, damaged, lay, meaning, valid
from tests.reliability.outcomes import Judge, Tally

worker.SECONDS, library.SECONDS, library.CHARACTERS_PER_SECOND = 0.5, 1.0, 200_000
settings.register_profile("fuzz", database=None, deadline=None)
settings.load_profile("fuzz")
EXAMPLES = 500


def search(bases: dict[str, Files], judge: Judge, scratch: Path, number: int, examples: int) -> None:
    """One round: every example is judged, and none ends it."""

    @seed(number)
    @settings(max_examples=examples, phases=[Phase.generate], suppress_health_check=[*HealthCheck])
    @given(damaged(bases))
    def round_of(files: Files) -> None:
        directory = lay(files, scratch / "it")
        judge.judge(lambda: meaning(directory), lambda: json.dumps({k: v.hex() for k, v in files.items()}).encode())

    round_of()


def main() -> None:
    number, tally, found, seconds = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])
    logging.disable(logging.CRITICAL)
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        bases = valid(scratch / "valid")
        judge = Judge(Tally(tally), found)
        judge.known = {repr(meaning(scratch / "valid" / name)) for name in bases}
        while time.monotonic() < until:
            search(bases, judge, scratch, number, EXAMPLES)
            number += 1


if __name__ == "__main__":
    main()
