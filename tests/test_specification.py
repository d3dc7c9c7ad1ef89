"""docs/specification.md: each clause names what is it and what holds it, no check of the oracle is left out, and the
worked example is right by a second definition too.
"""

import importlib
import re
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load

from miniawq.oracle import truth
from miniawq.oracle.door import CHECKS
from miniawq.packing import decode_awq, quantize
from tests.helpers import ROOT
from tests.scripts import script
from tests.test_docs import TESTS_THERE

TEXT = (ROOT / "docs" / "specification.md").read_text()
IDS = {check.id for check in CHECKS}
CLAUSE = re.compile(r"^\*\*(\d+\.\d+) (.*?)\n\n(?=\*\*\d+\.\d+ |## )", re.MULTILINE | re.DOTALL)
ENDING = re.compile(r"\n\nIs (`.*`)\. Held\s+by\s+(`.*`)\.$", re.DOTALL)


class Clause(NamedTuple):
    """The number of a clause, the functions that are it, and the tests and checks that hold it."""

    number: str
    functions: list[str]
    holders: list[str]


def clauses(text: str) -> list[Clause]:
    """Every clause of a text; ValueError names one that does not end as it must."""
    found = []
    for number, body in CLAUSE.findall(text):
        ending = ENDING.search(body)
        if ending is None:
            raise ValueError(f"clause {number} does not say what is it and what holds it")
        found.append(Clause(number, *(re.findall(r"`([^`]+)`", names) for names in ending.groups())))
    return found


def is_function(name: str) -> bool:
    """Whether a dotted name leads from the package to something."""
    words = name.split(".")
    for length in range(len(words), 0, -1):
        try:
            found = importlib.import_module(".".join(["miniawq", *words[:length]]))
        except ModuleNotFoundError:
            continue
        for word in words[length:]:
            found = getattr(found, word, None)
        return found is not None
    return False


def is_holder(name: str) -> bool:
    """Whether a test is there, or a check of the oracle that the pattern means."""
    return name in TESTS_THERE or any(fnmatchcase(check, name) for check in IDS)


def nowhere(found: list[Clause]) -> list[str]:
    """What clauses name and nothing is."""
    return [name for clause in found for name in clause.functions if not is_function(name)] + [
        name for clause in found for name in clause.holders if not is_holder(name)
    ]


def homes(check: str, found: list[Clause]) -> list[str]:
    """The clauses that a check of the oracle holds."""
    return [clause.number for clause in found if any(fnmatchcase(check, name) for name in clause.holders)]


def test_clauses_are_numbered_without_gaps():
    numbers = [tuple(map(int, clause.number.split("."))) for clause in clauses(TEXT)]
    assert len(numbers) == len(re.findall(r"^\*\*\d", TEXT, re.MULTILINE))
    for before, after in pairwise(numbers):
        assert after in ((before[0], before[1] + 1), (before[0] + 1, 1))


def test_everything_that_a_clause_names_is_there():
    assert nowhere(clauses(TEXT)) == []


def test_every_check_of_the_oracle_has_one_clause():
    found = clauses(TEXT)
    assert {check: numbers for check in IDS if len(numbers := homes(check, found)) != 1} == {}


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("packing.grouped", "packing.no_such_function"),
        ("L2.step", "L2.no-such-check"),
        ("test_golden_awq_words", "test_nothing"),
    ],
)
def test_a_name_that_is_nowhere_is_seen(name, other):
    assert nowhere(clauses(TEXT.replace(f"`{name}`", f"`{other}`"))) == [other] * TEXT.count(f"`{name}`")


def test_a_check_without_a_clause_is_seen():
    without = clauses(TEXT.replace("`L2.step`, ", ""))
    assert [check for check in IDS if not homes(check, without)] == ["L2.step"]


def test_a_clause_that_names_nothing_is_seen():
    with pytest.raises(ValueError, match="1\\.4"):
        clauses(TEXT.replace("Is `packing.asymmetric_grid`. Held by `L2.zero-stays-zero`", "It is something"))


def test_the_example_and_the_picture_are_those_of_the_program():
    program = script("worked_example")
    assert program.page() == TEXT
    assert program.PICTURE.read_text() == program.picture()


def test_the_example_by_the_second_definition():
    """The numbers that the page tells, read from it, against `oracle.truth`."""
    told = TEXT.partition("<!-- WORKED -->")[2]

    def table(title: str) -> list[list[str]]:
        lines = told.partition(f"\n{title}")[2].partition("\n\n")[0].splitlines()[1:]
        return [re.sub(r"^  \w+ \d+", "", line).split() for line in lines]

    weight_OI = torch.tensor([[float(value) for value in row] for row in table("W, ")])
    codes_IO, zeros_GO, scales_GO = truth.quantize(weight_OI, 8)
    assert torch.tensor([[int(code) for code in row] for row in table("codes")]).t().tolist() == codes_IO.tolist()
    assert torch.tensor([[int(zero) for zero in row] for row in table("zeros")]).t().tolist() == zeros_GO.tolist()
    bits_OG = [[int(bits, 16) for bits in row] for row in table("the bits")]
    assert torch.tensor(bits_OG).t().tolist() == scales_GO.view(torch.int16).tolist()
    back_OI = truth.real_weight(codes_IO, zeros_GO, scales_GO, 8).t()
    assert table("back") == [[f"{value:.4f}" for value in row] for row in back_OI.tolist()]
    worst_OG = ((back_OI - weight_OI).abs().unflatten(1, (2, 8)).amax(-1) / scales_GO.t()).tolist()
    assert table("largest") == [[f"{value:.4f}" for value in row] for row in worst_OG]
    for title, matrix in (("qweight", codes_IO), ("qzeros", zeros_GO)):
        words = [[f"{word & 0xFFFFFFFF:#010x}" for word in row] for row in truth.pack(matrix).tolist()]
        assert table(f"{title}, ") == words


def test_the_bytes_of_the_example_are_a_file_that_holds_the_weight():
    program = script("worked_example")
    told = TEXT.partition("its values, from byte")[2].partition("```")[0]
    values = bytes.fromhex("".join(line[8:] for line in told.splitlines()[1:]))
    content = program.file_of(quantize(program.weight(), program.GROUP_SIZE))
    assert content.endswith(values)
    assert content[8 : -len(values)].decode().strip() == "".join(
        line.strip() for line in TEXT.partition("hold the header\n\n")[2].partition("\n\n")[0].splitlines()
    )
    tensors = {name.removeprefix("proj."): tensor for name, tensor in load(content).items()}
    read = decode_awq(tensors)
    assert all(torch.equal(a, b) for a, b in zip(read, quantize(program.weight(), 8), strict=True))
