"""docs/reading.md and docs/guides/: commands run, and numbers are those of the pages that they are read in."""

import json
import re
import sys

import pytest

from miniawq.__main__ import main
from miniawq.oracle.door import CHECKS
from tests.helpers import ROOT
from tests.helpers.pages import in_this_process, once, repository, shell
from tests.scripts import script
from tests.test_docs import known_names

READING = (ROOT / "docs" / "reading.md").read_text()
EXPERIMENTS = re.findall(r"^```sh\n(.*?)^```(?:(?:(?!^```).)*?^```text\n(.*?)^```)?", READING, re.MULTILINE | re.DOTALL)
GUIDES = {page.stem: page for page in sorted((ROOT / "docs" / "guides").glob("*.md"))}
NOT_OURS = {"trust_remote_code"}
# Commands that show a refusal, or a report of failures, and their exit codes.
REFUSED = {'miniawq generate wrong --prompt "The king"': 3, "miniawq oracle my_kernel --levels L3": 1}
TOLD = {
    'miniawq generate wrong --prompt "The king"': "64",
    "miniawq oracle my_kernel --levels L3": "passed, 4 failed",
    "miniawq plan 8b --device cuda --device-memory 24GiB --max-seq-len 8192 --batch 8": "fits",
}


def test_reading_has_three_experiments():
    assert len(EXPERIMENTS) == 3


@pytest.mark.thorough
@pytest.mark.parametrize("number", [0, 2], ids=["a rounding", "two nibbles"])
def test_the_oracle_reports_of_a_broken_chapter_what_the_page_says(number, tmp_path):
    commands, told = EXPERIMENTS[number]
    _, printed = shell(commands, repository(tmp_path))
    assert told
    assert told in printed
    assert (tmp_path / "miniawq" / "packing.py").read_text() == (ROOT / "miniawq" / "packing.py").read_text()
    assert ("L0.round-trip" in printed, "FAILED L2.bound" in printed) == (False, number == 0)


@pytest.mark.thorough
def test_two_checks_see_a_scale_that_is_rounded_to_nearest(tmp_path):
    removed = re.search(r"remove `( \+ \(.*?\))` from `round_up`", READING)[1]
    chapter = repository(tmp_path) / "miniawq" / "packing.py"
    chapter.write_text(chapter.read_text().replace(removed, ""))
    _, printed = shell("miniawq oracle --levels L2", tmp_path)
    assert ", 2 failed in" in printed
    assert "FAILED L2.half-scale" in printed
    assert "L2.refuses-scales-to-nearest" in printed


@pytest.mark.thorough
def test_scales_take_more_than_half_off_the_divergence(tmp_path):
    root, (first, *commands) = repository(tmp_path), re.split(r"\n(?=python -m miniawq)", EXPERIMENTS[1][0].strip())
    assert len(commands) == 5
    shell(first, root)
    printed = "".join(
        in_this_process(re.sub(r"^python -m miniawq[. ]", "miniawq ", command), root)[1] for command in commands
    )
    plain, paper = map(float, re.findall(r"KL divergence mean (\S+)", printed))
    assert paper < plain / 2
    assert (tmp_path / "loud-paper" / "quantization_report.png").is_file()


@pytest.mark.thorough
@pytest.mark.parametrize("name", GUIDES)
def test_commands_of_the_guides_run(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    page, root = GUIDES[name].read_text(), repository(tmp_path)
    for file, text in re.findall(r"^```python\n# (\S+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        (root / file).write_text(text)
    commands = "".join(re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)).splitlines()
    assert commands
    for command in commands:
        code, printed = once(command, root)
        assert code == REFUSED.get(command, 0), printed
        assert TOLD.get(command, "") in printed


@pytest.mark.parametrize("text", [READING, *(page.read_text() for page in GUIDES.values())], ids=["reading", *GUIDES])
def test_checks_and_names_that_pages_speak_of_are_there(text):
    spans = set(re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)))
    ids = {span for span in spans if re.match(r"L\d\.", span)}
    assert ids <= {check.id for check in CHECKS}
    assert {span for span in spans - ids if re.fullmatch(r"[A-Za-z]+(?:_[A-Za-z]+)+", span)} <= known_names() | NOT_OURS


@pytest.mark.thorough
def test_memory_of_large_models_is_what_the_guide_says(tmp_path, monkeypatch, capsys):
    rows = re.findall(r"^\| (Llama-3.1-\d+B) \| (.*) \|$", GUIDES["gpu"].read_text(), re.MULTILINE)
    assert len(rows) == 2
    for shapes, told in rows:
        directory = str(tmp_path / shapes)
        monkeypatch.setattr(sys, "argv", ["random_checkpoint", shapes.lower(), directory, "--int4", "--headers"])
        script("random_checkpoint").main()
        plans = []
        for batch, positions in ((1, 8192), (8, 8192), (1, 131072)):
            flags = f"--device cuda --device-memory 200GiB --batch {batch} --max-seq-len {positions} --json"
            assert main(["plan", directory, *flags.split()]) == 0
            plans.append(json.loads(capsys.readouterr().out))
        weights, token = plans[0]["memory"]["weights"] / 2**30, plans[0]["kv_bytes_per_token"] / 2**20
        totals = [f"{plan['total'] / 2**30:.1f} GiB" for plan in plans]
        assert told.split(" | ") == [f"{weights:.1f} GiB", f"{token:.3f} MiB", *totals]


# What holds no measurement: code, tables that another test computes, names of models, clauses.
UNMEASURED = re.compile(
    r"^```.*?^```|^\| Llama.*?$|`[^`]*`|Llama-3\.1|\[specification\]\S*[^)]*", re.MULTILINE | re.DOTALL
)


def test_numbers_of_the_guides_are_those_of_the_pages_they_cite():
    found = 0
    for page in GUIDES.values():
        text = page.read_text()
        sources = re.findall(r"\]\((\S*(?:quality|performance)\.md)\)", text)
        known = " ".join(" ".join((page.parent / source).read_text() for source in sources).split())
        numbers = re.findall(r"(?<![\w.])\d+\.\d+|\d+(?= %)", UNMEASURED.sub("", text))
        assert not [number for number in numbers if number not in known], page
        found += len(numbers)
    assert found >= 8
