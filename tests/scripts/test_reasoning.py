"""The generation benchmark: right items, right statistics, and a run over two models."""

import itertools
import math
import sys

import pytest

from tests.scripts import script

reasoning = script("reasoning")


def test_answers_are_right_and_the_same_each_time() -> None:
    items = reasoning.items_of(5)
    assert items == reasoning.items_of(5)
    assert items[:2] == reasoning.items_of(2)[:2], "fewer items are the first of more"
    for item in items:
        *shots, question = item.prompt.split("\n\n")
        assert len(shots) == reasoning.SHOTS
        for text in (*shots, f"{question} {item.answer}"):
            assert is_right(item.task, text)


def is_right(task: str, text: str) -> bool:
    (_, given), (_, answer) = (line.split(": ") for line in text.split("\n"))
    if task == "sum":
        values = list(itertools.accumulate(map(int, given.replace("+ ", "+").replace("- ", "-").split())))
        steps = [step.split(" = ") for step in answer.split(", ")]
        assert [int(left.split()[0]) for left, _ in steps] == values[:-1]
        assert all(eval(left) == int(right) for left, right in steps)
        return int(steps[-1][1]) == values[-1] and min(values) >= 0
    return answer.split() == given.split()[:: -1 if task == "backwards" else 1]


def test_lists_and_chains_have_their_length() -> None:
    for item in reasoning.items_of(1):
        words = item.answer.split(", ") if item.task == "sum" else item.answer.split()
        assert len(words) == item.length


@pytest.mark.parametrize(
    ("right", "count", "low", "high"), [(0, 10, 0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1)]
)
def test_wilson(right, count, low, high) -> None:
    """Figures of Newcombe 1998 and of any table."""
    assert reasoning.wilson(right, count) == pytest.approx((low, high), abs=1e-4)


def test_mcnemar_is_the_binomial_test() -> None:
    assert reasoning.mcnemar(0, 0) == 1
    assert reasoning.mcnemar(3, 3) == 1
    assert reasoning.mcnemar(0, 5) == reasoning.mcnemar(5, 0) == pytest.approx(2 / 2**5)
    assert reasoning.mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)


def test_tables_of_known_answers() -> None:
    items = [reasoning.Item("sum", length, "", "") for length in (1, 1, 2, 2)]
    found = {"dense": [True, True, True, False], "int4": [True, False, False, True]}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in reasoning.shares(items, found)[2:]]
    assert [row[:2] for row in rows] == [["sum", "1"], ["sum", "2"]]
    assert rows[0][2].startswith("100.0% (")
    assert rows[0][3] == rows[1][3] == "50.0% (9% to 91%)"
    assert reasoning.differences(items, found)[3].startswith("| sum | int4 | 50.0% | 2 | 1 | -25.0% +-")
    half = reasoning.Z * math.sqrt((3 / 4 - 1 / 16) / 4)
    assert reasoning.differences(items, found)[-1] == f"| all | int4 | 50.0% | 2 | 1 | -25.0% +- {half:.1%} | 1 |"


def test_models_answer_one_after_the_other(fairytales, monkeypatch, capsys) -> None:
    """The demo knows no sums; what stands after the task's answer is not the answer."""
    monkeypatch.setattr(reasoning, "TASKS", {"sum": (reasoning.chain, (1,))})
    monkeypatch.setattr(sys, "argv", ["reasoning", str(fairytales), str(fairytales), "--items", "2", "--device", "cpu"])
    reasoning.main()
    printed = capsys.readouterr().out
    assert printed.count("2 items in") == 2
    assert f"| sum | {fairytales} | 0.0% | 0 | 0 | +0.0% +- 0.0% | 1 |" in printed


def test_an_answer_is_the_whole_line(fairytales, monkeypatch) -> None:
    """A model that continues with what it should, and one that adds something."""

    def answers(words: list[str]) -> int:
        path = words[words.index("--output") + 1]
        with open(path, "w") as file:
            file.write('{"text": " 42"}\n{"text": " 42 apples"}\n')
        return 0

    monkeypatch.setattr(reasoning, "miniawq", answers)
    items = [reasoning.Item("sum", 1, "40 + 2 =", "42")] * 2
    assert reasoning.solved(str(fairytales), items, []) == [True, False]
