"""What the oracle tells: reports, expected failures, exit codes, and examples that run when pasted."""

import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

from miniawq.oracle import truth
from miniawq.oracle.__main__ import main, save_examples
from miniawq.oracle.check import PROFILES, run_check
from miniawq.oracle.contract import FLAGS, FUNCTIONS, LEVELS, Limits
from miniawq.oracle.door import CHECKS, conformance
from miniawq.oracle.paste import literal, snippet
from miniawq.oracle.report import as_json, as_junit, as_text, badge, failure_lines, read_expected_failures
from miniawq.oracle.subject import Call, Subject
from tests.helpers import ROOT
from tests.helpers.checks import SHORT

GUIDE = (ROOT / "docs" / "oracle.md").read_text()

FEW = [check for check in CHECKS if "known-words" in check.id or "random" in check.id or check.id == "L3.bias"]
WRONG = """
from miniawq.oracle import truth
name, version = "wrong", "7"
pack = truth.pack

def unpack(words):
    return truth.unpack(words).clamp(max=14)
"""


AFTER = """
from miniawq.oracle import truth
refused = []

def pack(codes):
    if codes.max() > 15:
        refused.append(codes)
        raise ValueError("too large")
    return truth.pack(codes) * (not refused)
"""


@pytest.fixture
def wrong(tmp_path, monkeypatch):
    """A module that loses the top code; its name."""
    (tmp_path / "wrong_adapter.py").write_text(WRONG)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("miniawq.oracle.door.CHECKS", FEW)
    return "wrong_adapter"


def checks(text, among=CHECKS):
    return [check for check in among if text in check.id]


def test_text_names_what_is_implemented_broken_and_skipped(wrong, capsys):
    assert main([wrong, "--levels", "L0,L1"]) == 1
    text = capsys.readouterr().out
    assert "wrong 7" in text
    assert "implements  2 of 8: pack, unpack" in text
    assert "lacks       dequantize" in text
    assert "FAILED L0.unpack.known-words" in text
    assert "expected  code[0, 0] = 15" in text
    assert "got       code[0, 0] = 14" in text
    skipped = len(checks("L1.", FEW))
    assert f"L1 dequantization   {skipped} skipped" in text
    assert f"skipped {skipped}: the target has no dequantize" in text
    assert text.splitlines()[-2] == "L0 FAILED, L1 skipped"


def test_a_pasted_example_shows_the_failure(wrong):
    import_line = f"import {wrong} as target"
    target = __import__(wrong)
    result = conformance(target, checks("L0.unpack.random"), import_line=import_line).results[0]
    scope = {}
    exec(snippet(import_line, result.broken.call, result.broken), scope)
    assert not torch.equal(scope["got"], truth.unpack(scope["words"]))
    assert scope["words"].numel() == 1  # shrunk


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(12.0).reshape(3, 4),
        torch.zeros(8, 8, dtype=torch.int32).index_fill(0, torch.tensor([3]), 7),
        torch.tensor([[1.0, float("nan"), float("inf"), -float("inf")]]),
        torch.arange(12).reshape(3, 4).t(),
        torch.full((20,), float("inf"), dtype=torch.float16),
        torch.zeros(0, 4),
    ],
)
def test_literals_are_the_tensors(value):
    broken = SimpleNamespace(expected="", got="")
    scope = {}
    text = snippet(
        "target = type('T', (), {'pack': staticmethod(lambda codes: codes)})", Call("pack", {"codes": value}), broken
    )
    exec(text, scope)
    assert torch.equal(scope["codes"].nan_to_num(5), value.nan_to_num(5))
    assert scope["codes"].dtype == value.dtype
    assert scope["codes"].stride() == value.stride()


def test_a_pasted_example_holds_the_refused_call_without_which_it_does_not_fail(tmp_path, monkeypatch):
    (tmp_path / "after_adapter.py").write_text(AFTER)
    monkeypatch.syspath_prepend(tmp_path)
    target = __import__("after_adapter")
    check = next(check for check in CHECKS if check.id == "L0.pack.after-refusals")
    broken = conformance(target, [check]).results[0].broken
    target.refused.clear()
    scope = {}
    exec(snippet("import after_adapter as target", broken.call, broken), scope)
    assert str(scope["first"]) == "too large"
    assert not torch.equal(scope["got"], truth.pack(scope["codes"]))


def test_long_tensors_are_named_not_printed():
    assert "too long" in literal(torch.arange(1000))


def test_examples_are_written_as_files(wrong, tmp_path):
    main([wrong, "--only", "L0.unpack.known-words", "--examples", str(tmp_path / "out")])
    assert (tmp_path / "out" / "L0.unpack.known-words.safetensors").exists()


def test_json_and_junit(wrong, tmp_path, capsys):
    assert main([wrong, "--levels", "L0,L3", "--json", "--junit", str(tmp_path / "out.xml")]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["target"] == "wrong"
    assert told["implements"] == ["pack", "unpack"]
    assert not told["ok"]
    skipped = {"skipped": len(checks("L3.", FEW))}
    assert told["levels"]["L3"] == dict.fromkeys(("passed", "failed", "xfailed", "xpassed"), 0) | skipped
    assert sum(len(cause["checks"]) for cause in told["causes"]) == told["levels"]["L0"]["failed"]
    failure = next(f for f in told["failures"] if f["id"] == "L0.unpack.known-words")
    assert failure["call"] == "unpack(words=int32[1, 1])"
    assert "target.unpack(words)" in failure["example"]
    suites = ElementTree.parse(tmp_path / "out.xml").getroot()
    level0 = next(suite for suite in suites if suite.get("name") == "L0 storage")
    assert int(level0.get("failures")) == told["levels"]["L0"]["failed"]
    assert sum(len(case) > 0 for case in level0) == told["levels"]["L0"]["failed"]


def test_junit_holds_what_a_target_says_in_control_characters():
    def pack(codes):
        raise ValueError("\x00 \x1b[31mred")

    text = as_junit(conformance(SimpleNamespace(pack=pack), checks("L0.pack.known-words")))
    (failure,) = ElementTree.fromstring(text).iter("failure")
    assert "\\x00 \\x1b[31mred" in failure.get("message")


UNLESS_REFUSED = {"L0.pack.wrong-dtypes", "L0.pack.other-dtypes-unchanged", "L0.unpack.other-dtypes-unchanged"}


def xfail_file(path, ids, reason="HalfAccumulation: top code lost"):
    path.write_text("# a comment\n\n" + "".join(f"{id}  # {reason}\n" for id in ids))
    return str(path)


def test_expected_failures_pass_with_their_reason(wrong, tmp_path, capsys):
    ids = [check.id for check in FEW if check.id.startswith("L0.unpack")]
    file = xfail_file(tmp_path / "xfails.txt", ids)
    assert main([wrong, "--levels", "L0", "--xfails", file]) == 0
    text = capsys.readouterr().out
    assert f"{len(ids)} xfailed" in text
    assert "L0 acceptable(HalfAccumulation)" in text


def test_a_failure_that_was_not_expected_still_fails(wrong, tmp_path):
    assert main([wrong, "--only", "L0.unpack", "--xfails", xfail_file(tmp_path / "x.txt", ["L0.unpack.random"])]) == 1


def test_an_expected_failure_that_passes_fails(tmp_path, capsys):
    file = xfail_file(tmp_path / "x.txt", ["L0.pack.random"])
    assert main(["miniawq.oracle.truth", "--only", "L0.pack.random", "--xfails", file]) == 1
    assert "XPASSED L0.pack.random" in capsys.readouterr().out


def test_an_expected_failure_that_is_skipped_fails(wrong, tmp_path, capsys):
    file = xfail_file(tmp_path / "x.txt", ["L3.bias"])
    assert main([wrong, "--levels", "L3", "--xfails", file]) == 1
    assert "but it skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("L0.no-such-check  # reason", "no check has the id 'L0.no-such-check'"),
        ("L0.pack.random", "has no reason"),
        ("L0.pack.random # a\nL0.pack.random # b", "named twice"),
    ],
)
def test_a_stale_file_of_expected_failures_is_a_usage_error(tmp_path, capsys, line, message):
    (tmp_path / "x.txt").write_text(line)
    assert main(["--xfails", str(tmp_path / "x.txt")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_module"], "cannot import 'no_such_module'"),
        (["json:nope"], "has no attribute 'nope'"),
        (["--levels", "L9"], "there is no level L9"),
        (["--only", "nothing"], "no check has an id"),
        (["--xfails", "no-such-file"], "there is no file"),
        (["--command", "false"], "does not answer"),
    ],
)
def test_wrong_usage_is_told_in_lines_with_exit_code_2(capsys, arguments, message):
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


def test_nothing_implemented_is_not_ok():
    report = conformance(SimpleNamespace(), CHECKS)
    assert not report.ok
    assert report.counts()["skipped"] == len(CHECKS)


def test_not_implemented_is_skipped_aloud():
    def matmul(*_):
        raise NotImplementedError("no bfloat16 here")

    report = conformance(SimpleNamespace(matmul=matmul), checks("L3.bias"))
    assert report.counts()["skipped"] == 1
    assert "no bfloat16 here" in as_text(report)


def test_not_implemented_is_no_refusal():
    def dequantize(*_):
        raise NotImplementedError("only on Tuesdays")

    report = conformance(SimpleNamespace(dequantize=dequantize), checks("L1.refuses-wrong-shapes"))
    assert report.counts()["skipped"] == 1


def test_arguments_keep_their_strides_on_a_device_and_changes_are_seen():
    seen = []

    def unpack(words):
        seen.append(words.stride())
        result = truth.unpack(words)
        words.zero_()
        return result

    target = SimpleNamespace(unpack=unpack, pack=truth.pack)
    report = conformance(target, checks("L0.strides") + checks("L0.inputs-unchanged"), device="cpu:0")
    assert [result.status for result in report.results] == ["failed", "failed"]
    assert seen[0] == (1, 3)
    assert "unpack changed its argument" in report.results[1].broken.got


def test_any_exception_of_the_target_is_a_failure_and_the_run_goes_on():
    def unpack(words):
        raise ZeroDivisionError("boom")

    report = conformance(SimpleNamespace(unpack=unpack, pack=lambda codes: "text"), checks("L0."))
    assert {result.check.id for result in report.results if result.status == "passed"} <= UNLESS_REFUSED
    assert "ZeroDivisionError: boom" in as_text(report)


def test_the_default_profile_gives_the_same_verdict_twice():
    target = SimpleNamespace(unpack=lambda words: truth.unpack(words).clamp(max=14))
    (check,) = checks("L0.unpack.random")
    results = [run_check(check, Subject(target), PROFILES["default"]) for _ in range(2)]
    assert str(results[0].broken) == str(results[1].broken)


@pytest.mark.thorough
def test_limits_of_a_target_are_kept_to():
    seen = set()

    def dequantize(qweight, qzeros, scales, group_size):
        weight = truth.dequantize(qweight, qzeros, scales, group_size)
        seen.add((group_size, qweight.shape[0] % 128, qweight.shape[1] % 8))
        return weight

    limited = SimpleNamespace(dequantize=dequantize, group_sizes=(128,), multiple_of_k=128, multiple_of_n=64)
    report = conformance(limited, checks("L1."))
    assert report.ok
    assert seen == {(128, 0, 0)}
    assert [result.check.id for result in report.results if result.status == "skipped"] == ["L1.one-group"]
    assert json.loads(as_json(report))["limits"]["group_sizes"] == [128]
    assert ElementTree.fromstring(as_junit(report)) is not None
    assert badge(report) == "L1 ok"


def test_the_guide_shows_a_report_as_it_is():
    def dequantize(qweight, qzeros, scales, group_size):
        return truth.dequantize(qweight, truth.pack((truth.unpack(qzeros) + 1).clamp(max=15)), scales, group_size)

    target = SimpleNamespace(dequantize=dequantize)
    report = conformance(target, checks("L1.random")[:1], import_line="import gptq_zeros as target")
    lines = [line for line in failure_lines(report, report.results[0]) if not line.startswith("  legal if")]
    assert "\n".join(lines) in GUIDE


def test_the_guide_lists_every_function_flag_and_limit():
    for name in (*FUNCTIONS, *FLAGS, *Limits.__dataclass_fields__):
        assert name in GUIDE


@pytest.mark.thorough
@pytest.mark.parametrize(
    "limits",
    [
        {"group_sizes": (-1,)},
        {"group_sizes": (-1,), "multiple_of_k": 64, "multiple_of_n": 16},
        pytest.param(
            {"group_sizes": (128,), "multiple_of_k": 128, "multiple_of_n": 64, "dtypes": ("bfloat16",), "max_rows": 8},
            marks=pytest.mark.thorough,
        ),
        {"dtypes": ("float32",)},
    ],
)
def test_a_right_target_passes_under_any_limits(limits):
    functions = {name: getattr(truth, name) for name in ("pack", "unpack", "dequantize", "quantize", "matmul")}
    few = replace(PROFILES["default"], examples=5)
    asked = [check for check in SHORT if check.level in ("L0", "L1", "L2", "L3")]
    report = conformance(SimpleNamespace(**functions, **limits), asked, profile=few)
    assert report.ok, as_text(report)


PEERS = sorted((ROOT / "miniawq" / "oracle" / "peers").glob("*.txt"))


@pytest.mark.parametrize("file", PEERS, ids=lambda path: path.stem)
def test_shipped_expected_failures_name_checks_and_match_the_guide(file):
    expected = read_expected_failures(file, CHECKS)
    failing = Counter(id[:2] for id in expected)
    rows = [[cell.strip() for cell in line.split("|")] for line in GUIDE.splitlines() if line.startswith("| ")]
    (row,) = [row for row in rows if row[1].rpartition(" ")[0].lower().replace(" ", "-") == file.stem]
    for level, cell in zip(LEVELS, row[2:], strict=False):
        passed, _, ran = cell.partition("/")
        assert int(ran or 0) - int(passed or 0) == failing[level]


def test_a_pasted_checkpoint_example_makes_its_directory(tmp_path):
    target = SimpleNamespace(load_checkpoint=lambda directory: {"directory": torch.tensor(directory.is_dir())})
    report = conformance(target, checks("L4.reads.bias"), import_line="")
    (result,) = report.results
    scope = {"target": target}
    exec(snippet("", result.broken.call, result.broken), scope)
    assert scope["got"]["directory"]
    assert scope["directory"].name == "bias"
    save_examples(report, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["L4.reads.bias.safetensors"]
