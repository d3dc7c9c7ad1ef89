"""README, CONTRIBUTING and the guides say what is so: code runs, names exist, counts and walks are those of today."""

import ast
import functools
import importlib
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

import pytest
import torch

from miniawq.__main__ import VERBS, with_its_verb
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.checkpoint.shards import ShardWriter
from miniawq.generate import generate, load
from miniawq.oracle.faults import FAULTS
from miniawq.quantize.job import Quantizer, Settings
from miniawq.quantize.recipes import DEFAULT, PAPER, Recipe
from tests.helpers import MODELS, ROOT, TESTS
from tests.helpers.marks import thorough_but
from tests.test_house import CHAPTERS, FILES, PACKAGE, TABLE, nodes_of, room_of, suffix

README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PYTHON, EXTENDING = ROOT / "docs" / "python.md", ROOT / "docs" / "extending.md"
PAGES = {page.name: page for page in (README, CONTRIBUTING, PYTHON, EXTENDING)}
EVERY_PAGE = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SHARED = {"errors", "cli", "hardware"}  # files that all rooms use, left out of walks
# Words in backticks that are not ours, or that a page makes up.
FOREIGN = {"transformers", "pip", "install", "assert", "True", "False", "None", "my"}


@pytest.mark.parametrize(("page", "most"), [(README, 130), (CONTRIBUTING, 70)], ids=["README", "CONTRIBUTING"])
def test_pages_stay_short(page: Path, most: int) -> None:
    assert page.read_text().count("\n") <= most


# Code that runs.


def blocks_of(page: Path) -> Iterator[str]:
    """The Python blocks of a page, with empty lines before them, so that errors tell the line of the page."""
    text = page.read_text()
    for found in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield "\n" * text[: found.start(1)].count("\n") + found[1]


def run_blocks(page: Path) -> dict[int, str]:
    """Run the blocks in order in one namespace; what each line that calls `print` has printed."""
    printed: dict[int, str] = {}

    def record(*values: object, **_: object) -> None:
        line = sys._getframe(1).f_lineno
        printed[line] = printed.get(line, "") + " ".join(map(str, values))

    names = {"__name__": "page", "print": record}
    for block in blocks_of(page):
        exec(compile(block, str(page), "exec"), names)
    return printed


@pytest.mark.parametrize("name", thorough_but(["README.md"], ["python.md", "README.md"]))
def test_code_runs_in_order_and_prints_what_stands_beside_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests").symlink_to(TESTS)
    monkeypatch.chdir(tmp_path)
    printed = run_blocks(PAGES[name])
    lines = enumerate(PAGES[name].read_text().splitlines(), 1)
    told = {number: found[1] for number, line in lines if (found := re.search(r"^ *print\(.*\)  # ?(.*)$", line))}
    assert {number: printed[number].strip() for number in told} == {n: text.strip() for n, text in told.items()}
    assert len(told) >= (15 if name == "python.md" else 0)


# Counts and numbers.


def rows_of(page: Path, title: str) -> list[list[str]]:
    """The rows of the table under a heading, each as its cells."""
    section = page.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def test_chapters_are_as_long_as_the_readme_says() -> None:
    told = {cells[0].strip("`"): int(cells[1]) for cells in rows_of(README, "The book")}
    assert told == {f"{name}.py": (PACKAGE / f"{name}.py").read_text().count("\n") for name in CHAPTERS}


def test_rooms_stand_in_the_order_of_the_table_of_imports() -> None:
    told = [re.sub(r"\.py|/|`", "", cells[0]) for cells in rows_of(README, "The rooms")]
    assert told == [room for room in TABLE if room not in CHAPTERS]


def test_the_table_of_imports_is_that_of_the_test() -> None:
    lines = re.findall(r"^    (\s*(?:errors|<-).*)$", CONTRIBUTING.read_text(), re.MULTILINE)
    told = re.findall(r"\w+", re.sub(r"\(.*?\)", "", " ".join(lines)))
    assert told == TABLE


def test_measured_numbers_are_those_of_the_page_they_are_read_in() -> None:
    rows = [cells for cells in rows_of(README, "What was measured") if cells[0] != "the oracle"]
    assert len(rows) >= 5
    for what, measured, command, source in rows:
        page = " ".join((ROOT / re.search(r"\((.*)\)", source)[1]).read_text().split())
        named = r"\w+-[\d.]+-?\w*|bfloat16|H100"  # models and devices, whose digits are no measurement
        numbers = re.findall(r"\d[\d,.]*\d|\d", re.sub(named, "", measured))
        assert numbers
        assert not [number for number in numbers if number not in page], what
        for program in re.findall(r"`(scripts/\S+ --[^`]*)`", command):
            assert program in page, what


def test_the_oracle_finds_as_many_faults_as_the_readme_says() -> None:
    (told,) = (cells[1] for cells in rows_of(README, "What was measured") if cells[0] == "the oracle")
    assert int(told.split()[0]) == len(FAULTS)


# Names that exist.


def names_in(paths: list[Path]) -> set[str]:
    """Everything that has a name in these files: functions, classes, variables, arguments, attributes, modules."""
    found = {path.stem for path in paths} | {path.parent.name for path in paths}
    for path in paths:
        for node in nodes_of(path):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name) | ast.Name(id=name):
                    found.add(name)
                case ast.Attribute(attr=name) | ast.keyword(arg=str(name)) | ast.alias(name=name):
                    found.add(name)
    return found


@functools.cache
def known_names() -> set[str]:
    return names_in([*FILES, *TESTS.rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]) | FOREIGN


SOURCES = "".join(path.read_text() for path in FILES)
TESTS_THERE = set(re.findall(r"def (test_\w+)", "".join(path.read_text() for path in TESTS.rglob("test_*.py"))))


def is_there(span: str) -> bool:
    """Whether what stands in backticks exists: a file, a test, a command, a flag, or all names of an expression."""
    first, *others = span.split()
    if span.startswith("test_"):
        return span in TESTS_THERE
    if first == "make":
        return all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in others)
    if first == "miniawq" and others:
        importlib.import_module(VERBS[with_its_verb(others)[0]].module).build_parser()
        return True
    if span.startswith("python -m "):
        return find_spec(others[1]) is not None
    if first == "python":
        return (ROOT / others[0]).is_file()
    if first.startswith("--"):
        return f'"{first}"' in SOURCES + (TESTS / "conftest.py").read_text()
    if re.fullmatch(r"[\w./-]+(?:/|\.(?:py|md|json|toml))|\.?\w+/[\w/.]+", first):
        made = re.findall(r"^BIN = (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return first in made or any((folder / first).exists() for folder in (ROOT, PACKAGE))
    names = re.findall(r"[A-Za-z_]\w+", re.sub(r"\"[^\"]*\"", "", span))
    return all(name in known_names() for name in names)


def spans_of(page: Path) -> list[str]:
    """What stands in backticks outside blocks of code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE) if page != EXTENDING else text
    return sorted({" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)})


@pytest.mark.parametrize("name", PAGES)
def test_every_name_in_backticks_is_there(name: str) -> None:
    spans = spans_of(PAGES[name])
    assert len(spans) > 10
    assert not [span for span in spans if not is_there(span)]


@pytest.mark.parametrize(
    "span",
    ["test_that_is_nowhere", "no_such_function", "awq.no_such_table", "compiled/no_such_file.py", "make coffee",
     "--no-such-flag", "scripts/no_such_program.py --rows 1", "python -m miniawq.nowhere"],
)  # fmt: skip
def test_a_name_that_is_nowhere_is_seen(span: str) -> None:
    assert not is_there(span)


def test_commands_in_the_readme_can_be_parsed() -> None:
    commands = [span for span in spans_of(README) if span.startswith("miniawq ") and len(span.split()) > 2]
    assert len(commands) >= 6
    for command in commands:
        verb, *arguments = with_its_verb(shlex.split(command)[1:])
        importlib.import_module(VERBS[verb].module).build_parser().parse_args(arguments)


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def letters_in(path: Path) -> set[str]:
    """The dimension letters that names of variables and arguments of a file end in."""
    nodes = [node for node in nodes_of(path) if isinstance(node, ast.Name | ast.arg)]
    names = {node.id if isinstance(node, ast.Name) else node.arg for node in nodes}
    return {letter for name in names if not name.isupper() for letter in suffix(name) if letter.isalpha()}


def test_the_key_of_dimensions_is_complete() -> None:
    key = CONTRIBUTING.read_text().partition("## The key of dimensions")[2].partition("## ")[0]
    table = "\n".join(line for line in key.splitlines() if line.startswith("    "))
    told = set(re.findall(r"(?<![\w(])[A-Z](?=,| [a-z])", table))
    used = {path: letters_in(path) for path in FILES if room_of(path) != "compiled"}
    assert not {path.name: letters - told for path, letters in used.items() if letters - told}
    assert told == set().union(*used.values())


# Walks.


def walk(work: Callable[[], object]) -> list[str]:
    """The rooms that a call enters, in order, with what repeats at once written once.

    A room is entered by a call of one of its functions while none of its functions is running.
    """
    entered: list[str] = []
    running: dict[FrameType, str] = {}

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event == "return":
            running.pop(frame, None)
        elif event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            room = room_of(Path(frame.f_code.co_filename))
            if room not in SHARED and room not in running.values():
                entered.append(room)
            running[frame] = room

    sys.setprofile(watch)
    try:
        work()
    finally:
        sys.setprofile(None)
    return folded(entered)


def folded(steps: list[str]) -> list[str]:
    """The same without immediate repeats, of one step or of several."""
    for length in range(1, len(steps) // 2 + 1):
        kept: list[str] = []
        for step in steps:
            kept.append(step)
            if len(kept) >= 2 * length and kept[-length:] == kept[-2 * length : -length]:
                del kept[-length:]
        if len(kept) < len(steps):
            return folded(kept)
    return steps


def test_repeats_are_folded() -> None:
    assert folded([*"abcbcbcdabcd"]) == [*"abcd"]
    assert folded([*"abcab"]) == [*"abcab"]


def weight_walk(recipe: Recipe, directory: Path) -> list[str]:
    job = Quantizer(open_checkpoint(MODELS / "llama"), Settings(replace(recipe, group_size=16)), torch.device("cpu"))
    hidden_BLD = torch.randn(2, 16, job.checkpoint.model_config.hidden_size)
    job.process(0, hidden_BLD)  # where folds are checked, once for all blocks
    specs = [spec for spec in job.specs() if spec.name.startswith("model.layers.1.")]
    with ShardWriter(directory, specs) as writer:

        def work() -> None:
            for name, tensor in job.process(1, hidden_BLD)[0].items():
                writer.write(name, tensor)

        return walk(work)


def prompt_walk() -> list[str]:
    model, tokenizer = load(device="cpu")

    def work() -> None:
        for _ in generate(model, torch.tensor([tokenizer.encode("Once upon a time")]), max_tokens=3):
            pass

    return walk(work)


def told_walks() -> list[list[str]]:
    section = EXTENDING.read_text().partition("## Three walks")[2]
    return [re.findall(r"\w+", lines) for lines in re.findall(r"\n\n((?: {6}\S.*\n)+)", section)]


def test_the_walks_are_those_of_the_page(tmp_path: Path) -> None:
    weight, prompt, directory = told_walks()
    assert weight_walk(PAPER, tmp_path) == weight_walk(DEFAULT, tmp_path / "again") == weight
    assert prompt_walk() == prompt
    assert walk(lambda: load(device="cpu")) == directory
