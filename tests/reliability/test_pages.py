"""SECURITY.md and docs/reliability.md say what is so."""

import re

import pytest

from miniawq.text import worker
from tests.helpers import ROOT, TESTS
from tests.reliability.faults import FAULTS
from tests.reliability.faults import KINDS as KINDS_OF_FAULTS
from tests.reliability.outcomes import KINDS as KINDS_OF_INPUTS
from tests.reliability.readers import READERS

SECURITY, PAGE = (ROOT / "SECURITY.md").read_text(), (ROOT / "docs" / "reliability.md").read_text()
TESTS_THERE = set(re.findall(r"def (test_\w+)", "".join(path.read_text() for path in TESTS.rglob("test_*.py"))))


def promises():
    """The rows of the tables under "Promised": what is promised, and the cell of its tests."""
    section = SECURITY.partition("\n## Promised\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").rsplit(" | ", 1) for line in section.splitlines() if line.startswith("| ")]
    return [(what, tests) for what, tests in rows if tests.strip() != "Tests"]


def test_every_promise_names_its_tests():
    assert len(promises()) > 10
    for what, tests in promises():
        named = re.findall(r"`(test_\w+)`", tests)
        assert named, what
        assert not set(named) - TESTS_THERE, what


def test_every_test_that_the_page_names_is_there():
    assert not set(re.findall(r"`(test_\w+)`", SECURITY + PAGE)) - TESTS_THERE


def test_the_budget_of_templates_is_that_of_the_page():
    assert f"after {worker.SECONDS:g} seconds or at {worker.MEMORY >> 30} GiB" in SECURITY


@pytest.mark.parametrize(
    ("mark", "kinds", "rows", "bad"),
    [
        ("fuzz", KINDS_OF_INPUTS, [*READERS, "directories"], ("hung", "escaped")),
        ("faults", KINDS_OF_FAULTS, [*FAULTS], ("hung", "escaped", "lost")),
    ],
)
def test_tables_are_complete_and_nothing_hung_escaped_or_was_lost(mark, kinds, rows, bad):
    table = PAGE.partition(f"<!-- {mark} -->\n")[2].partition(f"<!-- end of {mark} -->")[0]
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    assert head[1:] == [*kinds]
    assert [line[0] for line in lines] == [*rows, "sum"]
    numbers = {
        line[0]: dict(zip(head[1:], (int(cell.replace(",", "")) for cell in line[1:]), strict=True)) for line in lines
    }
    for name, counts in numbers.items():
        assert counts["tried"] == sum(count for kind, count in counts.items() if kind != "tried"), name
        assert not any(counts[kind] for kind in bad), name
        assert counts["tried"] > 0, name
        assert (mark, name) != ("fuzz", "sum") or counts["tried"] >= 1_000_000


def test_both_pages_are_linked_where_one_looks():
    readme = (ROOT / "README.md").read_text()
    assert "(SECURITY.md)" in readme
    assert "(docs/reliability.md)" in readme
    assert "reliability.md" in (ROOT / "docs" / "checkpoints.md").read_text()
