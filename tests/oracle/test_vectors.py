"""The vectors: what their schema says, what the definitions give, and what the script makes again."""

import hashlib
import importlib.util
import json
import subprocess
import sys
import tarfile

import pytest
import torch
from safetensors.torch import load_file

from miniawq.oracle import loader, truth
from miniawq.oracle.adversarial import expect_half_scale
from miniawq.oracle.checkpoints import CASES
from miniawq.oracle.deep_checkpoints import DEEP
from miniawq.oracle.door import CHECKS
from miniawq.oracle.rounding import BOUND_IN_SCALES, BOUND_SUBNORMAL
from miniawq.oracle.subject import Subject
from tests.helpers import ROOT

VECTORS = ROOT / "miniawq" / "oracle" / "vectors"
LEVELS = ("L0", "L1", "L2", "L3", "L4")
TYPES = {"object": dict, "array": list, "string": str}


def script():
    spec = importlib.util.spec_from_file_location("make_vectors", ROOT / "scripts" / "make_vectors.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made_again(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vectors")
    script().write(directory)
    return directory


def read(level, directory=VECTORS):
    return json.loads((directory / f"{level}.json").read_text())


def all_cases():
    return [pytest.param(level, case, id=case["id"]) for level in LEVELS for case in read(level)["cases"]]


@pytest.fixture(scope="module")
def tensors():
    return {level: load_file(VECTORS / f"{level}.safetensors") for level in LEVELS}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    place = tmp_path_factory.mktemp("checkpoints")
    with tarfile.open(VECTORS / "L4.tar.xz") as archive:
        archive.extractall(place, filter="data")
    return place


def valid(value, schema):
    """The subset of JSON Schema that schema.json uses."""
    if "const" in schema:
        assert value == schema["const"]
    if "enum" in schema:
        assert value in schema["enum"]
    if "type" in schema:
        assert isinstance(value, TYPES[schema["type"]])
    for item in value if isinstance(value, list) else ():
        valid(item, schema.get("items", {}))
    if isinstance(value, dict):
        assert set(schema.get("required", ())) <= value.keys()
        rest = schema.get("additionalProperties", {})
        for key, item in value.items():
            known = schema.get("properties", {})
            assert key in known or rest is not False, key
            valid(item, known.get(key, rest if isinstance(rest, dict) else {}))


@pytest.mark.parametrize("level", LEVELS)
def test_files_are_what_their_schema_says(level, tensors):
    told = read(level)
    valid(told, json.loads((VECTORS / "schema.json").read_text()))
    assert told["sha256"] == hashlib.sha256((VECTORS / told["tensors"]).read_bytes()).hexdigest()
    ids = [case["id"] for case in told["cases"]]
    assert len(set(ids)) == len(ids)
    keys = {key for case in told["cases"] for part in ("inputs", "expected") for key in case.get(part, {}).values()}
    assert keys == tensors[level].keys()
    assert {flag for case in told["cases"] for flag in case["flags"]} == told["notes"].keys()


def test_vectors_name_checks_of_the_suite():
    known = {check.id for check in CHECKS}
    for level in LEVELS[:4]:
        assert {case["check"] for case in read(level)["cases"]} <= known | {"L0.unpack.wide"}
    directories = {case.id for case in (*CASES, *DEEP)}
    assert {case["parameters"]["directory"] for case in read("L4")["cases"]} == directories


def test_vectors_hold_valid_invalid_and_acceptable_cases_and_stay_small():
    results = {case["result"] for level in LEVELS for case in read(level)["cases"]}
    assert results == {"valid", "invalid", "acceptable"}
    assert sum(path.stat().st_size for path in VECTORS.iterdir()) < 5_000_000


@pytest.mark.thorough
@pytest.mark.parametrize("level", LEVELS)
def test_the_script_makes_the_same_vectors(level, made_again, tensors):
    old, new = read(level), read(level, made_again)
    assert old.pop("sha256")
    assert new.pop("sha256")
    assert new == old
    again = load_file(made_again / f"{level}.safetensors")
    assert again.keys() == tensors[level].keys()
    for key, tensor in again.items():
        assert torch.equal(tensor.nan_to_num(1), tensors[level][key].nan_to_num(1)), key


@pytest.mark.thorough
def test_the_script_makes_the_same_directories(made_again, directories):
    with tarfile.open(made_again / "L4.tar.xz") as archive:
        names = {member.name for member in archive.getmembers()}
        assert names == {str(path.relative_to(directories)) for path in directories.rglob("*") if path.is_file()}
        for name in names:
            assert archive.extractfile(name).read() == (directories / name).read_bytes(), name


@pytest.mark.parametrize(("level", "case"), all_cases())
def test_the_definition_passes(level, case, tensors, directories):
    module = loader if case["function"] == "load_checkpoint" else truth
    arguments = {name: tensors[level][key] for name, key in case["inputs"].items()} | case["parameters"]
    if "directory" in arguments:
        arguments["directory"] = directories / arguments["directory"]
    function = getattr(module, case["function"])
    if case["result"] == "invalid":
        with pytest.raises(ValueError) as refusal:
            function(**arguments)
        message = str(refusal.value).lower()
        assert not case.get("message") or any(word.lower() in message for word in case["message"])
        return
    expected = {name: tensors[level][key] for name, key in case["expected"].items()}
    try:
        result = function(**arguments)
    except loader.Refused:
        assert case["result"] == "acceptable"
        return
    if case["function"] == "load_checkpoint":
        assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())
    elif case["compare"] == "rounding bound":
        rounded = truth.real_weight(*result, arguments["group_size"]).t()
        size = rounded.shape[1] // len(result[2])
        bound = BOUND_IN_SCALES * result[2].double().t().repeat_interleave(size, 1) + BOUND_SUBNORMAL
        assert ((rounded - arguments["weight"]).abs() <= bound).all()
    elif case["compare"] == "half scale":
        expect_half_scale(Subject(truth), arguments["weight"], arguments["group_size"])
    elif case["compare"] == "within":
        assert ((result.double() - expected["y"]).abs() <= expected["bound"]).all()
    else:
        (tensor,) = expected.values()
        assert torch.equal(result, tensor)


def test_the_runner_without_torch_passes():
    pytest.importorskip("numpy")
    command = [sys.executable, ROOT / "examples" / "oracle" / "run_vectors.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed" in done.stdout
