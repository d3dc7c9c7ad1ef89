"""The rules of CONTRIBUTING.md that a machine can check."""

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import FrameType

import pytest
import torch

from miniawq.__main__ import VERBS, main
from miniawq.completion import generate
from miniawq.generate import load
from miniawq.packing import LAYOUTS, quantize, symmetric_grid

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "miniawq"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the foundation up: a file imports only from files of earlier lines, and from those before it in its own.
LADDER = """
    errors cli
    packing arrange operations inductor tiles compiling forms cpu_forms kernel
    rope model
    fused rounding awq
    hub quant_config shards reading layouts checkpoint footprint
    chat tokenizer
    sampling products attend layer decode artifacts completion prompts repl generate
    calibration background stream memory journal verify report quantize
    evaluate plan convert
""".split()


def imports(path: Path) -> set[str]:
    """The miniawq modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("miniawq."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "miniawq":
            found |= {alias.name for alias in node.names if alias.name != "__version__"}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("miniawq.")}
    return found


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("path", [path for path in FILES if path.parent == PACKAGE], ids=lambda path: path.stem)
def test_imports_point_down_the_ladder(path):
    if path.stem in ("__init__", "__main__"):
        assert not imports(path) - {"errors"}
        return
    below = LADDER[: LADDER.index(path.stem)]
    assert imports(path) <= set(below), f"{path.stem} imports from above itself"
    assert f"`{path.stem}.py`" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_hold_one_idea(path):
    assert path.read_text().count("\n") <= 450
    for function in functions(path):
        assert function.end_lineno - function.lineno <= 70, f"{function.name} is too long"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_imported_inside_a_function_but_optional_extras(path):
    inner = {
        alias.name.split(".")[0]
        for function in functions(path)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in ([ast.alias(node.module or "")] if isinstance(node, ast.ImportFrom) else node.names)
    }
    assert inner <= {"matplotlib", "pytest"}


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


def test_names_of_tensors_tell_their_shapes():
    wrong: set[str] = set()

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event == "return" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            wrong.update(misnamed(frame))

    sys.setprofile(watch)
    try:
        model, tokenizer = load(None, device="cpu")
        prompt_BL = torch.tensor([tokenizer.encode("Once upon a time")] * 2)
        for _ in generate(model, prompt_BL, max_tokens=3):
            pass
        for encode, decode in LAYOUTS.values():
            decode(encode(quantize(torch.randn(24, 64), 32, symmetric_grid)), 32)
    finally:
        sys.setprofile(None)
    assert not wrong, "\n".join(sorted(wrong))


def documented_commands() -> list[str]:
    """The miniawq command lines in code blocks of the README and the guides."""
    found = set()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
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
    module = "miniawq.oracle.__main__" if words[1] == "oracle" else f"miniawq.{words[1]}"
    importlib.import_module(module).build_parser().parse_args(words[2:])


def test_planted_faults_are_planted():
    """A fault whose text is gone would be planted nowhere, and pass for caught by nobody."""
    specification = importlib.util.spec_from_file_location("planted_faults", ROOT / "scripts" / "planted_faults.py")
    planted = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(planted)
    stale = [fault for fault in planted.FAULTS if (PACKAGE / fault.file).read_text().count(fault.was) != 1]
    assert not stale


def test_every_verb_answers_help(capsys):
    for verb in VERBS:
        with pytest.raises(SystemExit) as exit_:
            main([verb, "--help"])
        assert exit_.value.code == 0
        assert "usage: " in capsys.readouterr().out


def test_running_needs_no_more_than_the_dependencies(tmp_path, fairytales):
    """What only tests and extras install must not be imported on the way of a user."""
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a king who had three sons. " * 40)
    program = f"""
import sys
for name in ("numpy", "pytest", "hypothesis", "matplotlib", "transformers"):
    sys.modules[name] = None
from miniawq.__main__ import main
for line in (
    "quantize {fairytales} {tmp_path}/awq --calib {text} --num-samples 2 --sequence-length 64 --recipe paper",
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
