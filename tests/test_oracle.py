"""The oracle on miniawq itself, on every device present, and on its own second definition."""

import subprocess
import sys

import pytest

from miniawq.oracle import conformance_tests, run_conformance, target, truth
from miniawq.oracle.__main__ import main
from miniawq.oracle.contract import FLAGS, FUNCTIONS, LEVELS
from miniawq.oracle.door import CHECKS, conformance
from miniawq.oracle.planted import reference
from miniawq.oracle.report import as_text

test_the_second_definition_conforms = conformance_tests(reference())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.id)
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


def test_the_truth_shares_no_code_with_miniawq():
    code = "import sys, miniawq.oracle.truth, miniawq.oracle.loader; print(*(m for m in sys.modules if 'miniawq' in m))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = {name for name in printed.split() if not name.startswith("miniawq.oracle")}
    assert loaded == {"miniawq", "miniawq.errors"}


def test_run_conformance_tells_every_failure_at_once():
    with pytest.raises(AssertionError, match=r"(?s)L0\.pack\.known-words.*L0\.unpack\.known-words"):
        run_conformance(
            type("Zeros", (), {"pack": lambda c: 0 * truth.pack(c), "unpack": lambda w: 0 * truth.unpack(w)})
        )


def test_a_run_on_miniawq_is_the_default(capsys):
    assert main(["--levels", "L0,L1", "--badge"]) == 0
    assert capsys.readouterr().out == "L0 ok, L1 ok\n"
