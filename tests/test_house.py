"""The rules of CONTRIBUTING.md that a machine can check."""

import ast
import functools
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from graphlib import TopologicalSorter
from pathlib import Path
from types import FrameType

import pytest
import torch

from miniawq import compiled
from miniawq.__main__ import VERBS, main, with_its_verb
from miniawq.checkpoint.layouts import LAYOUTS
from miniawq.compiled import products, proof
from miniawq.engine.batch import Batch, Request
from miniawq.engine.rows import PlainRows
from miniawq.engine.sampling import Sampling
from miniawq.engine.step import DecodeStep
from miniawq.generate import generate, load
from miniawq.oracle.contract import FUNCTIONS
from miniawq.packing import quantize
from miniawq.quantize.grids import symmetric_grid
from tests.helpers import ROOT
from tests.helpers.quantizing import make_source
from tests.planted import stale

PACKAGE = ROOT / "miniawq"
FILES = sorted(PACKAGE.rglob("*.py"))

# The one table of imports: a room, or a file of the top folder, imports from those to its left and from nothing else.
TABLE = """
    errors cli hardware packing
    model compiled kernel awq
    checkpoint text
    engine quantize
    commands generate oracle
""".split()
BLIND = {"engine", "quantize"}  # to each other
CHAPTERS = {"packing": 215, "awq": 400, "kernel": 225, "model": 510, "generate": 300}  # lines at most


def room_of(path: Path) -> str:
    """The room of a file of the package, or the name of a file of the top folder."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def nodes_of(path: Path) -> list[ast.AST]:
    """The module of a file, and everything in it."""
    return list(ast.walk(ast.parse(path.read_text())))


@functools.cache
def imported(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it, also by `import_module`."""
    found = set()
    for node in nodes_of(path):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and "import_module" in (
            getattr(node.func, "attr", ""),
            getattr(node.func, "id", ""),
        ):
            assert isinstance(node.args[0], ast.Constant | ast.Attribute | ast.Name), ast.unparse(node)
            if isinstance(node.args[0], ast.Constant):
                found.add(node.args[0].value)
    return found


def rooms_imported(path: Path) -> set[str]:
    """The rooms whose names a file imports."""
    known = {*TABLE, "__main__"}
    return {name.split(".")[1] for name in imported(path) if name.startswith("miniawq.")} & known


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in nodes_of(path) if isinstance(node, ast.FunctionDef)]


def allowed(room: str) -> set[str]:
    """The rooms from which a room may import."""
    if room in ("__init__", "__main__"):
        return {"errors", "cli"}
    return {*TABLE[: TABLE.index(room)], room} - (BLIND - {room} if room in BLIND else set())


def test_imports_point_to_the_left_in_the_table():
    assert not {path: wrong for path in FILES if (wrong := rooms_imported(path) - allowed(room_of(path)))}


@pytest.mark.parametrize("room", ["compiled", "checkpoint", "text", "engine", "quantize", "commands", "oracle"])
def test_inside_a_room_files_do_not_go_round_in_circles(room):
    files = {path.stem: path for path in (PACKAGE / room).glob("*.py") if path.stem != "__init__"}
    graph = {
        stem: {name.split(".")[2] for name in imported(path) if name.startswith(f"miniawq.{room}.")} & files.keys()
        for stem, path in files.items()
    }
    list(TopologicalSorter(graph).static_order())


def test_the_rooms_are_those_of_the_table():
    found = {room_of(path) for path in FILES} - {"__init__", "__main__"}
    assert found == set(TABLE)
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{room}/`" in readme or f"`{room}.py`" in readme for room in TABLE)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_is_short(chapter):
    assert (PACKAGE / f"{chapter}.py").read_text().count("\n") <= CHAPTERS[chapter]


PRIVATE = re.compile(r"\btorch\._(?!_)|\btorch\.ops\.aten\._|\b_(?:inductor|dynamo)\b|torch\.compile\b|torch\.utils\._")
OUTSIDE = [path for path in FILES if room_of(path) != "compiled"]


def test_only_the_room_of_the_compiler_touches_private_torch():
    """Others do not even name it."""
    assert not {path: names for path in OUTSIDE if (names := PRIVATE.findall(path.read_text()))}


def test_the_compiler_is_used_through_its_door():
    """Other rooms import the names that `compiled/__init__.py` lists, and none of its files."""
    listed = {*compiled.__all__} - {file.stem for file in (PACKAGE / "compiled").glob("*.py")}
    for path in OUTSIDE:
        used = {name.split(".")[2] for name in imported(path) if name.startswith("miniawq.compiled.")}
        assert used <= listed, path


CONTRACT = {*FUNCTIONS, "main", "build_parser"}


def test_no_two_things_have_one_name():
    """Classes and functions of the package, but for the functions that every target of the oracle must have."""
    seen: dict[str, str] = {}
    for path in FILES:
        if "planted" in path.parts:
            continue
        for node in ast.iter_child_nodes(nodes_of(path)[0]):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in CONTRACT and node.name != "_":
                where = str(path.relative_to(PACKAGE))
                assert node.name not in seen, f"{node.name} is in {seen[node.name]} and in {where}"
                seen[node.name] = where


def test_files_and_functions_hold_one_idea():
    for path in FILES:
        assert path.read_text().count("\n") <= max(450, CHAPTERS.get(room_of(path), 0)), path
        long = [function.name for function in functions(path) if function.end_lineno - function.lineno > 70]
        assert not long, path


def imported_inside(function: ast.FunctionDef) -> set[str]:
    """The packages that a function imports when it runs."""
    return {
        alias.name.split(".")[0]
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in ([ast.alias(node.module or "")] if isinstance(node, ast.ImportFrom) else node.names)
    }


def test_nothing_is_imported_inside_a_function_but_optional_extras():
    for path in FILES:
        for function in functions(path):
            assert imported_inside(function) <= {"gguf", "matplotlib", "pytest"}, path


def suffix(name: str) -> str:
    """The dimensions that a name ends in: codes_OI -> OI."""
    found = re.fullmatch(r"[a-z0-9_]*[a-z0-9]_((?:[A-Z]|\d)+)", name)
    return found.group(1) if found and not found.group(1).isdigit() else ""


def misnamed(frame: FrameType) -> list[str]:
    """Tensors of a returning function whose names tell another shape than they have."""
    wrong, sizes = [], {}
    for name, value in frame.f_locals.items():
        dimensions = suffix(name)
        if not dimensions or not isinstance(value, torch.Tensor):
            continue
        where = f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}: {name} has shape {tuple(value.shape)}"
        if len(dimensions) != value.dim():
            wrong.append(where)
            continue
        for letter, size in zip(dimensions, value.shape, strict=True):
            expected = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
            if size != expected and size != 1:
                wrong.append(f"{where}, but {letter} is {expected}")
    return wrong


def test_the_shape_checker_sees_a_wrong_name():
    def bad():
        y_OI = torch.zeros(2)
        return sys._getframe(), y_OI

    def mixed():
        a_OI, b_IO = torch.zeros(2, 3), torch.zeros(2, 3)
        return sys._getframe(), a_OI, b_IO

    assert "y_OI has shape (2,)" in misnamed(bad()[0])[0]
    assert "I is 3" in misnamed(mixed()[0])[0]


def watched(work: Callable[[], object]) -> set[str]:
    """What is misnamed in functions of the package while something runs."""
    wrong: set[str] = set()

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event == "return" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            wrong.update(misnamed(frame))

    sys.setprofile(watch)
    try:
        work()
    finally:
        sys.setprofile(None)
    return wrong


def write_text() -> None:
    model, tokenizer = load(None, device="cpu")
    prompt_BL = torch.tensor([tokenizer.encode("Once upon a time")] * 2)
    list(generate(model, prompt_BL, max_tokens=3))
    sampling = Sampling(temperature=1.0, top_k=5, presence_penalty=0.5)
    requests = [Request(tokenizer.encode(text), 3) for text in ("Once", "Once upon a time", "A wolf")]
    list(Batch(tokenizer, PlainRows(model, 2, 16), requests, sampling=sampling, logprobs=2))
    for encode, decode in LAYOUTS.values():
        decode(encode(quantize(torch.randn(24, 64), 32, symmetric_grid)), 32)


def step_through_text() -> None:
    """The functions of a compiled step, uncompiled, and the forms of a GPU on a CPU."""
    model, _ = load(None, device="cpu")
    step = DecodeStep(model, 2, 32, compiles=False)
    list(generate(model, torch.ones(2, 4, dtype=torch.long), max_tokens=3, decoder=step))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("miniawq.compiled.proof.compile_with_forms", lambda function, forms: function)
        patch.setattr("miniawq.compiled.prepacked.wants_rows", lambda _: True)
        for form in (products.REDUCE, products.DOT, products.WEIGHTS, products.EXPAND):
            assert not proof.problem_of(form, torch.device("cpu"), torch.float16, None)


def quantize_by(recipe: str, directory: Path) -> None:
    source = make_source(directory / "dense", num_hidden_layers=1)
    text = directory / "text.txt"
    text.write_text("Once upon a time there was a king who had three sons. " * 20)
    flags = ["--calib", text, "--num-samples", 2, "--sequence-length", 48, "--group-size", 64, "--recipe", recipe]
    assert main(["quantize", *map(str, (source, directory / recipe, *flags))]) == 0


@pytest.mark.parametrize("work", ["text", "step", "default", pytest.param("paper", marks=pytest.mark.thorough)])
def test_names_of_tensors_tell_their_shapes(work, tmp_path):
    run = {"text": write_text, "step": step_through_text}.get(work, lambda: quantize_by(work, tmp_path))
    wrong = watched(run)
    assert not wrong, "\n".join(sorted(wrong))


def documented_commands() -> list[str]:
    """The miniawq command lines in code blocks of the README and the guides."""
    found = set()
    docs = ROOT / "docs"
    for path in (ROOT / "README.md", *sorted(docs.glob("*.md")), *sorted((docs / "guides").glob("*.md"))):
        fenced = False
        for line in path.read_text().splitlines():
            fenced ^= line.lstrip().startswith("```")
            command = re.split("[#|]", line)[0].strip()
            if (fenced or line.startswith("    ")) and re.match(r"(miniawq|python -m miniawq\.)\s?[a-z]+ ?", command):
                found.add(command)
    return sorted(found)


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_have_the_flags_they_use(command):
    words = shlex.split(command.replace("python -m miniawq.", "miniawq ").split(">")[0])
    verb, *arguments = with_its_verb(words[1:])
    importlib.import_module(VERBS[verb].module).build_parser().parse_args(arguments)


def test_planted_faults_are_planted():
    """A fault whose text is gone would be planted nowhere, and pass for caught by nobody."""
    assert not stale()


def test_every_verb_answers_help(capsys):
    for verb in VERBS:
        with pytest.raises(SystemExit) as exit_:
            main([verb, "--help"])
        assert exit_.value.code == 0
        assert "usage: " in capsys.readouterr().out


def test_running_needs_no_more_than_the_dependencies(tmp_path):
    """What only tests and extras install must not be imported on the way of a user."""
    text, source = tmp_path / "text.txt", make_source(tmp_path / "dense")
    text.write_text("Once upon a time there was a king who had three sons. " * 40)
    program = f"""
import sys
for name in ("numpy", "pytest", "hypothesis", "matplotlib", "gguf", "transformers"):
    sys.modules[name] = None
from miniawq.__main__ import main
for line in (
    "quantize {source} {tmp_path}/awq --calib {text} --num-samples 2 --sequence-length 64 --group-size 64",
    "convert {tmp_path}/awq {tmp_path}/ct --format compressed-tensors",
    "evaluate {tmp_path}/ct --text {text} --sequence-length 64",
    "plan {tmp_path}/awq",
    "generate {tmp_path}/ct --prompt Once -n 2",
):
    assert main(line.split()) == 0, line
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_an_unknown_verb_is_a_usage_error(capsys):
    assert main(["quantise"]) == 2
    assert "there is no verb 'quantise'" in capsys.readouterr().err
    assert main([]) == 2
