"""A short, seeded part of `make faults`; and that what judges there can see what it judges."""

import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from tests.reliability.processes import Ended

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, limits and mounts as Linux does")


SHORT = ("kill -9", "two runs into one destination", "closed streams")  # the others are in test_publishing.py, too


@LINUX
@pytest.mark.thorough
def test_disturbed_runs_lose_nothing():
    """In a process of its own, as one that forks must have no threads."""
    command = [sys.executable, "scripts/faults.py", "--rounds", "1", "--seed", "1", "--only", *SHORT]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert all(f"| {name} |" in run.stdout for name in SHORT)


ERROR = "miniawq convert: no\n  why\n  what to do\n"


@pytest.mark.parametrize(
    ("ended", "escaped"),
    [
        (Ended(0, ""), ""),
        (Ended(0, "a notice\n"), ""),
        (Ended(3, "a notice\n" + ERROR), ""),
        (Ended(-9, ""), ""),
        (Ended(130, "\n"), ""),
        (Ended(3, ""), "an error of 0 lines"),
        (Ended(3, ERROR + "more\n"), "an error of 4 lines"),
        (Ended(1, "Traceback (most recent call last):\n"), "a traceback"),
        (Ended(0, "thread panicked at\n" + ERROR), "a traceback"),
        (Ended(7, ERROR), "exit code 7"),
        (Ended(0, "", hung=True), "it hung"),
    ],
)
def test_ends_that_must_not_be_are_seen(ended, escaped):
    assert ended.escaped == escaped
