"""docs/reading.md: its experiments run, and the oracle says of the broken chapters what the page says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

PAGE = (ROOT / "docs" / "reading.md").read_text()
EXPERIMENTS = re.findall(r"^```sh\n(.*?)^```(?:(?:(?!^```).)*?^```text\n(.*?)^```)?", PAGE, re.MULTILINE | re.DOTALL)
COPIED, LINKED = ("miniawq", "scripts"), ("tests",)


def run(commands: str, root: Path) -> str:
    """What the commands print in a copy of the repository, whose exit codes do not matter."""
    for name in COPIED:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in LINKED:
        (root / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PATH": path}
    done = subprocess.run(
        ["bash", "-c", commands], cwd=root, capture_output=True, text=True, env=environment, check=False
    )
    return done.stdout + done.stderr


def test_the_page_has_three_experiments():
    assert len(EXPERIMENTS) == 3


@pytest.mark.thorough
@pytest.mark.parametrize("number", [0, 2], ids=["a rounding", "two nibbles"])
def test_the_oracle_reports_what_the_page_says(number, tmp_path):
    commands, told = EXPERIMENTS[number]
    printed = run(commands, tmp_path)
    assert told
    assert told in printed
    assert (tmp_path / "miniawq" / "packing.py").read_text() == (ROOT / "miniawq" / "packing.py").read_text()
    assert ("L0.round-trip" in printed, "FAILED L2.bound" in printed) == (False, number == 0)


@pytest.mark.thorough
def test_one_check_sees_a_scale_that_is_rounded_to_nearest(tmp_path):
    removed = re.search(r"remove `( \+ \(.*?\))` from `round_up`", PAGE)
    chapter = "miniawq/packing.py"
    printed = run(f"sed -i 's/{removed[1]}//' {chapter}; python -m miniawq.oracle --levels L2", tmp_path)
    assert removed[1] not in (tmp_path / chapter).read_text()
    assert ", 1 failed in" in printed
    assert "FAILED L2.half-scale" in printed


@pytest.mark.thorough
def test_scales_take_more_than_half_off_the_divergence(tmp_path):
    printed = run(EXPERIMENTS[1][0], tmp_path)
    plain, paper = map(float, re.findall(r"KL divergence mean (\S+)", printed))
    assert paper < plain / 2
    assert (tmp_path / "loud-paper" / "quantization_report.png").is_file()
