"""A short, seeded part of `make fuzz`, without atheris; and that what counts there can see what it counts."""

from random import Random

import pytest
from hypothesis import given, settings

from miniawq.errors import MiniawqError, UnsupportedCheckpoint
from miniawq.text import library, worker
from tests.reliability.directories import Files, damaged, lay, meaning, valid
from tests.reliability.outcomes import Counts, Judge, Tally
from tests.reliability.page import table, write_table
from tests.reliability.readers import READERS, corpus, prepare

CHANGED = 120  # files for each reader
FEWER = {"template": 40, "tokenizer": 60, "tokenizer_config": 60}  # these are slow


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(worker, "SECONDS", 0.4)
    monkeypatch.setattr(library, "SECONDS", 1.0)


@pytest.fixture
def judge(tmp_path):
    (tmp_path / "found").mkdir()
    return Judge(Tally(tmp_path / "tally"), tmp_path / "found")


def told(judge):
    return [path.read_text() for path in judge.found.glob("*.txt")]


@pytest.mark.parametrize("name", READERS)
def test_changed_files_are_read_or_refused(name, judge, tmp_path):
    path, random, files = prepare(name, tmp_path / name), Random(0), corpus(name)
    changed = [READERS[name].change(random.choice(files), random) for _ in range(FEWER.get(name, CHANGED))]
    for content in [*files, *changed]:
        path.write_bytes(content)
        judge.judge(lambda: READERS[name].read(path), lambda: content)  # noqa: B023
    counts = judge.tally.counts
    assert not told(judge)
    assert counts.tried == counts.refused + counts.changed
    assert counts.refused > 5
    assert counts.changed > 5


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return valid(tmp_path_factory.mktemp("valid"))


def test_changed_directories_compute_numbers_or_are_refused(bases, tmp_path_factory):
    directory = tmp_path_factory.mktemp("damaged") / "it"
    kinds = set()

    @settings(max_examples=40)
    @given(damaged(bases))
    def use(files: Files) -> None:
        lay(files, directory)
        try:
            meaning(directory)
            kinds.add("read")
        except MiniawqError:
            kinds.add("refused")

    use()
    assert kinds == {"read", "refused"}


# What counts.


def refuse():
    raise UnsupportedCheckpoint("no", "why", "fix")


def escape():
    raise KeyError("a bug")


def test_every_kind_of_outcome_is_counted(judge, monkeypatch):
    judge.known = {repr("valid")}
    clock = iter([0.0, 0.1, 0.0, 0.1, 0.0, 0.1, 0.0, 0.0, 99.0])
    monkeypatch.setattr("tests.reliability.outcomes.time.process_time", lambda: next(clock))
    reads = (refuse, lambda: "valid", lambda: "other", escape, lambda: "slow")
    assert [judge.judge(read, lambda: b"it") for read in reads] == ["refused", "same", "changed", "escaped", "hung"]
    assert judge.tally.counts == Counts(tried=5, refused=1, same=1, changed=1, hung=1, escaped=1)


def test_what_escapes_is_kept_once_for_each_place(judge):
    for content in (b"first", b"second"):
        judge.judge(escape, lambda: content)  # noqa: B023
    (kept,) = (path for path in judge.found.iterdir() if path.suffix != ".txt")
    assert kept.read_bytes() == b"first"
    assert "a bug" in told(judge)[0]


def test_a_message_without_end_escapes(judge):
    def scroll():
        raise UnsupportedCheckpoint("no", "why", "fix" + "\n" * 5)

    assert judge.judge(scroll, lambda: b"it") == "refused"  # lines are joined
    scrolling = type("Scrolling", (MiniawqError,), {"__str__": lambda self: "line\n" * 9})

    def escape_in_lines():
        raise scrolling("no")

    assert judge.judge(escape_in_lines, lambda: b"it") == "escaped"


def test_counts_outlive_their_process(judge, tmp_path):
    judge.tally.add("tried")
    assert Tally(tmp_path / "tally").counts == Counts(tried=1)


@pytest.mark.parametrize("name", READERS)
def test_most_changes_change_something(name):
    random = Random(1)
    for content in corpus(name):
        changed = [READERS[name].change(content, random) for _ in range(20)]
        assert sum(other != content for other in changed) > 10


def test_a_table_is_written_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\nolder\n<!-- end of x -->\nb\n")
    text = table("what", ("n", "m"), {"one": (1, 2000), "two": (3, 4)})
    write_table(page, "x", text)
    write_table(page, "x", text)
    assert page.read_text() == f"a\n<!-- x -->\n{text}\n<!-- end of x -->\nb\n"
    assert text.splitlines()[2:] == ["| one | 1 | 2,000 |", "| two | 3 | 4 |", "| sum | 4 | 2,004 |"]
