"""The oracle on miniawq itself, on every device present, and on its own second definition."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

from miniawq.oracle import conformance_tests, run_conformance, target, truth
from miniawq.oracle.__main__ import main
from miniawq.oracle.contract import FLAGS, FUNCTIONS, LEVELS
from miniawq.oracle.door import CHECKS, conformance
from miniawq.oracle.planted import reference
from miniawq.oracle.report import as_text
from tests.helpers import ROOT
from tests.helpers.checks import marked


@pytest.mark.thorough
@pytest.mark.parametrize("check", marked(CHECKS))
def test_the_second_definition_conforms(check):
    conformance_tests(reference())(check)


@pytest.mark.parametrize("check", marked(CHECKS, every=3))
def test_miniawq_conforms(check, device):
    report = conformance(target, [check], device=str(device))
    assert report.ok, as_text(report)


def test_ids_are_unique_and_say_their_level_and_rule():
    assert len({check.id for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        assert check.level in LEVELS
        assert check.rule.endswith(".")
        assert set(check.needs) <= set(FUNCTIONS)
        assert check.needs
        assert set(check.flags) <= set(FLAGS)


def test_every_level_and_every_function_is_checked():
    assert {check.level for check in CHECKS} == set(LEVELS)
    assert {function for check in CHECKS for function in check.needs} == set(FUNCTIONS)


def needs_of(name):
    """The modules of miniawq that a module of it names in an import."""
    path = ROOT.joinpath(*name.split("."))
    found = set()
    for node in ast.walk(ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())):
        found |= {node.module} if isinstance(node, ast.ImportFrom) else set()
        found |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
    return {module for module in found if module.startswith("miniawq")}


def test_the_truth_names_no_code_of_miniawq():
    seen, left = set(), {"miniawq.oracle.truth", "miniawq.oracle.loader"}
    while left:
        seen.add(name := left.pop())
        left |= needs_of(name) - seen
    assert {name for name in seen if not name.startswith("miniawq.oracle")} <= {"miniawq.errors"}


@pytest.mark.thorough
def test_the_truth_shares_no_code_with_miniawq():
    code = "import sys, miniawq.oracle.truth, miniawq.oracle.loader; print(*(m for m in sys.modules if 'miniawq' in m))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = {name for name in printed.split() if not name.startswith("miniawq.oracle")}
    assert loaded == {"miniawq", "miniawq.errors"}


def test_imports_inside_the_oracle_point_one_way():
    """The package imports its doors; nothing in it imports the package, and no two modules need each other."""
    room = ROOT / "miniawq" / "oracle"
    needs = {}
    for path in room.rglob("*.py"):
        name = ".".join(["miniawq", *path.relative_to(room.parent).with_suffix("").parts]).removesuffix(".__init__")
        needs[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [node.module] if isinstance(node, ast.ImportFrom) else []
            needs[name] |= {module for module in found if module.startswith("miniawq.oracle")}
    assert not [name for name, modules in needs.items() if "miniawq.oracle" in modules]
    assert list(TopologicalSorter(needs).static_order())


def test_run_conformance_tells_every_failure_at_once(monkeypatch):
    monkeypatch.setattr("miniawq.oracle.door.CHECKS", [check for check in CHECKS if "known-words" in check.id])
    with pytest.raises(AssertionError, match=r"(?s)L0\.pack\.known-words.*L0\.unpack\.known-words"):
        run_conformance(
            type("Zeros", (), {"pack": lambda c: 0 * truth.pack(c), "unpack": lambda w: 0 * truth.unpack(w)})
        )


def test_a_run_on_miniawq_is_the_default(capsys):
    assert main(["--levels", "L0,L1", "--only", "random", "--badge"]) == 0
    assert capsys.readouterr().out == "L0 ok, L1 ok\n"
