"""The oracle's other doors: programs on stdio, worked examples in NumPy, C and Triton."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
import torch

from miniawq.oracle.check import PROFILES, run_check
from miniawq.oracle.door import CHECKS, conformance
from miniawq.oracle.report import as_text
from miniawq.oracle.stdio import Program
from miniawq.oracle.subject import Broken, Subject
from tests.helpers import ROOT
from tests.helpers.checks import SHORT

EXAMPLES = ROOT / "examples" / "oracle"


def check(id):
    return next(check for check in CHECKS if check.id == id)


def program(path, body):
    """A Python program whose answer to `run` is the given statement; `request` is the request."""
    path.write_text(
        "import json, os, sys, time\n"
        "for line in sys.stdin:\n"
        "    request = json.loads(line)\n"
        "    if request['cmd'] == 'stop': break\n"
        "    if request['cmd'] == 'start':\n"
        "        answer = {'name': 'bad', 'functions': ['pack', 'unpack', 'nonsense']}\n"
        f"    else:\n        {body}\n"
        "    print(json.dumps(answer), flush=True)\n"
    )
    return f"{sys.executable} {path}"


SOME = [check for check in SHORT if check.level in ("L0", "L1")]


@pytest.mark.parametrize("checks", [SOME[::3], pytest.param(CHECKS, marks=pytest.mark.thorough)], ids=["some", "all"])
def test_numpy_example_conforms(monkeypatch, checks):
    pytest.importorskip("numpy")
    monkeypatch.syspath_prepend(EXAMPLES)
    report = conformance(importlib.import_module("numpy_adapter"), checks)
    assert report.ok, as_text(report)
    assert report.implements == ["pack", "unpack", "dequantize", "quantize", "matmul"]


@pytest.mark.thorough
def test_what_a_fresh_reader_wrote_conforms(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    report = conformance(importlib.import_module("fresh_reader"), CHECKS)
    assert report.ok, as_text(report)
    assert report.implements == ["pack", "unpack", "dequantize", "quantize", "matmul", "search_scales"]


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_c_example_conforms(tmp_path):
    binary = tmp_path / "adapter"
    command = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", binary, EXAMPLES / "adapter.c", "-lm"]
    subprocess.run(command, check=True)
    with Program(str(binary)) as target:
        report = conformance(target, CHECKS)
    assert report.ok, as_text(report)
    assert report.implements == ["pack", "unpack", "dequantize", "matmul"]
    assert report.target == "C example"
    assert report.counts()["passed"] >= 42


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_example_conforms(device):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | ({} if device.type == "cuda" else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "miniawq.oracle", "examples.oracle.triton_adapter", "--device", str(device)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "L1 ok, L2 skipped, L3 ok" in done.stdout


@pytest.mark.thorough
def test_a_python_target_can_be_a_program():
    with Program(f"{sys.executable} -m miniawq.oracle.stdio miniawq.oracle.truth") as target:
        report = conformance(target, SOME)
        assert report.target == "miniawq.oracle.truth"
        assert report.counts()["passed"] == len(report.results)


@pytest.mark.thorough
def test_checkpoints_go_through_stdio(tmp_path):
    (tmp_path / "reader.py").write_text("from miniawq.oracle.loader import load_checkpoint\n")
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    with Program(f"env PYTHONPATH={path} {sys.executable} -m miniawq.oracle.stdio reader") as target:
        for id in ("L4.reads.gemm", "L4.reads.compressed-bfloat16", "L4.refuses.gptq"):
            assert passes(target, id)


def passes(target, id):
    return run_check(check(id), Subject(target), PROFILES["default"]).status == "passed"


def test_a_crash_is_recorded_and_the_run_goes_on(tmp_path):
    command = program(tmp_path / "bad.py", "os.abort()")
    with Program(command) as target:
        report = conformance(target, [check("L0.pack.known-words"), check("L0.unpack.known-words")])
    assert report.counts()["failed"] == 2
    assert "was ended by SIGABRT" in report.results[0].broken.got


def test_a_crash_is_no_refusal(tmp_path):
    with Program(program(tmp_path / "bad.py", "os.abort()")) as target:
        assert not passes(target, "L0.pack.refuses-large-codes")


def test_an_answer_that_cannot_be_read_is_no_refusal(tmp_path):
    words = torch.zeros(1, 1, dtype=torch.int32)
    command = program(tmp_path / "bad.py", "answer = {'tensors': [{'dtype': 'int32', 'shape': [1, 1]}]}")
    with Program(command) as target, pytest.raises(Broken, match="a refusal because of a test"):
        Subject(target).refuses("unpack", (words,), "a test", Exception)


def test_silence_is_recorded(tmp_path):
    with Program(program(tmp_path / "bad.py", "time.sleep(60)"), timeout=0.3) as target:
        report = conformance(target, [check("L0.pack.known-words")])
    assert "no answer in time" in report.results[0].broken.got


@pytest.mark.parametrize(
    ("answer", "status", "told"),
    [
        ("answer = {'seq': request['seq'], 'skipped': 'not today'}", "skipped", "not today"),
        ("answer = {'seq': request['seq'], 'error': 'out of memory'}", "failed", "out of memory"),
        ("answer = {'seq': request['seq']}", "failed", "without tensors"),
        ("print('hello'); answer = {}", "failed", "not JSON"),
        ("answer = ['no', 'object']", "failed", "cannot be read"),
        ("answer = {'tensors': [{'dtype': 'int31', 'shape': [1, 1]}]}", "failed", "cannot be read"),
        ("answer = {'tensors': [{'dtype': 'int32', 'shape': [1, 1]}]}", "failed", "cannot be read"),
        (
            "open(request['out'] + '.0', 'wb').write(b'12'); "
            "answer = {'seq': request['seq'], 'tensors': [{'dtype': 'int32', 'shape': [1, 1]}]}",
            "failed",
            "needs 4 bytes",
        ),
    ],
)
def test_answers_that_are_no_result(tmp_path, answer, status, told):
    with Program(program(tmp_path / "bad.py", answer)) as target:
        assert target.functions == ["pack", "unpack"]
        (result,) = conformance(target, [check("L0.pack.known-words")]).results
    assert result.status == status
    assert told in (result.reason or result.broken.got)
