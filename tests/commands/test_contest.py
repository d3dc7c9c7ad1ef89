"""A model in several formats: rows that are those of the files, and what does not go together."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from miniawq.__main__ import main
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.commands import contest, evaluate
from tests.helpers.quantizing import make_source
from tests.helpers.tiny_checkpoints import make, make_dense

SENTENCE = "Once upon a time there was a king who had three sons. "


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(SENTENCE * 50)
    return str(tmp_path / "text.txt")


def rows(capsys: pytest.CaptureFixture[str]) -> dict[str, dict]:
    found = json.loads(capsys.readouterr().out)["formats"]
    return {f"{row['name']} {row['group_size'] or ''}".strip(): row for row in found}


def evaluated(model: Path, text: str, *flags: str) -> int:
    window = ["--text", text, "--sequence-length", "48", "--max-windows", "2", "--device", "cpu"]
    return main(["evaluate", str(model), *window, *flags])


@pytest.mark.thorough
def test_every_format_has_a_row_and_more_bits_lose_less(fairytales, text, tmp_path, capsys) -> None:
    picture = tmp_path / "picture.png"
    flags = ["--formats", ",".join(contest.ALL), "--calib", text, "--num-samples", "1"]
    assert evaluated(fairytales, text, *flags, "--json", "--plot", str(picture)) == 0
    found = rows(capsys)
    assert len(found) == len(contest.ALL)
    kl = {name: row["scores"]["reference"]["kl_mean"] for name, row in found.items()}
    assert kl["bf16"] == 0
    assert kl["int8"] < kl["fp8"] < kl["rtn 128"]
    for name in ("awq", "neighbours", "gptq", "gptq-act-order"):  # scored on the text they have seen
        assert kl[f"{name} 128"] < kl["rtn 128"]
    assert found["rtn 128"]["bits"] == found["awq 128"]["bits"] == 4 + 20 / 128
    whole = found["bf16"]["nbytes"]
    assert whole == sum(info.nbytes for info in open_checkpoint(fairytales).tensors.values())
    assert found["rtn 128"]["nbytes"] < found["int8"]["nbytes"] < whole
    assert picture.stat().st_size > 10_000


def test_the_title_of_a_picture_names_what_loses_least() -> None:
    rtn, awq = (SimpleNamespace(name=name, group_size=size) for name, size in (("rtn", 128), ("awq", -1)))
    assert contest.least([(3.5, 0.02, rtn), (3.4, 0.01, awq)]) == "awq row"
    assert contest.least([(3.5, 0.02, rtn), (3.4, 0.03, awq)]) == "rtn 128"
    assert contest.least([]) == "none"


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "recipe"), [("rtn", "plain"), ("awq", "default"), ("neighbours", "neighbours")])
def test_a_row_is_that_of_the_file(name, recipe, text, tmp_path, capsys) -> None:
    """But for the embedding, which the file holds in float16: learned codes answer to its last bit."""
    source = make_source(tmp_path / "dense", max_position_embeddings=512)
    flags = ["--formats", name, "--calib", text, "--num-samples", "2"]
    assert evaluated(source, text, *flags, "--json") == 0
    row = rows(capsys)[f"{name} 128"]["scores"]["reference"]
    made = ["quantize", str(source), str(tmp_path / "awq"), "--calib", text, "--num-samples", "2"]
    assert main([*made, "--recipe", recipe, "--device", "cpu"]) == 0
    capsys.readouterr()
    assert evaluated(tmp_path / "awq", text, "--reference", str(source), "--json") == 0
    file = json.loads(capsys.readouterr().out)["reference"]
    assert row["kl_mean"] == pytest.approx(file["kl_mean"], rel=1e-2 if name != "neighbours" else 5e-2)


@pytest.mark.thorough
def test_formats_do_not_disturb_each_other(tmp_path, device) -> None:
    """Each has its own block, statistics and hidden states. GPTQ's text runs through its own blocks."""
    directory, _ = make_dense(tmp_path)
    checkpoint, tokens_BL = open_checkpoint(directory), torch.arange(36).view(3, 12)
    asked: list = [("rtn", 64), ("awq", 64), ("awq", 32), ("neighbours", 64), ("gptq", 64)]
    dense, together = contest.run_formats(checkpoint, tokens_BL, asked, tokens_BL, device)
    states = [entry.hidden_BLD for entry, _ in together]
    _, [(alone, _)] = contest.run_formats(checkpoint, tokens_BL, [asked[2]], tokens_BL, device)
    assert torch.equal(alone.hidden_BLD, states[2])
    for one, other in itertools.combinations([dense.hidden_BLD, *states], 2):
        assert not torch.equal(one, other)
    assert torch.equal(together[-1][0].change.hidden_BLD, states[-1])
    assert torch.equal(dense.hidden_BLD, evaluate.stream_predictor(checkpoint, tokens_BL, device).hidden_BLD.cpu())
    _, [(first, _)] = contest.run_formats(checkpoint, tokens_BL, asked[:1], None, device, blocks=1)
    assert not torch.equal(first.hidden_BLD, states[0])


def test_a_table_of_formats(fairytales, text, capsys) -> None:
    assert evaluated(fairytales, text, "--formats", "bf16,q4_0,rtn", "--group-size", "128,-1") == 0
    head, _, *lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert all(len(row) == head.count("|") + 1 for row in cells)
    assert [row[1:5] for row in cells] == [
        ["bf16", "", "16.000", "10.49"],
        ["q4_0", "", "4.500", "3.71"],
        ["rtn", "128", "4.156", "3.51"],
        ["rtn", "row", "4.065", "3.45"],
    ]


def test_formats_whose_groups_do_not_fit_are_left_out(tmp_path, caplog) -> None:
    directory, _ = make_dense(tmp_path)
    checkpoint = open_checkpoint(directory)
    assert contest.fitting(checkpoint, ["q4_k", "rtn", "int8"], [128, 96, -1]) == [
        ("rtn", 128),
        ("rtn", -1),
        ("int8", None),
    ]
    assert "q4_k is left out: groups of 256 inputs" in caplog.text
    assert "rtn is left out: groups of 96 inputs" in caplog.text


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--formats", "rtn,awq"], "awq needs a text"),
        (["--formats", "rtn", "--sequence-length", "513"], "windows of 513 tokens are longer"),
        (["--formats", "rtn", "--reference", "somewhere"], "--formats goes with no --reference"),
    ],
)
def test_flags_that_make_no_sense_are_usage_errors(flags, told, fairytales, text, capsys) -> None:
    assert evaluated(fairytales, text, *flags) == 2
    assert told in capsys.readouterr().err


def test_a_picture_of_no_kind_is_refused_before_the_work(fairytales, text, monkeypatch, capsys) -> None:
    monkeypatch.setattr(contest, "run_formats", lambda *_: pytest.fail("formats were measured"))
    assert evaluated(fairytales, text, "--formats", "rtn", "--plot", "a.foo") == 2
    assert "a.foo cannot be drawn" in capsys.readouterr().err


def test_a_picture_without_matplotlib_is_a_usage_error(fairytales, text, monkeypatch, capsys) -> None:
    """Before the work, not after it."""
    monkeypatch.setattr("miniawq.commands.evaluate.find_spec", lambda name: None)
    assert evaluated(fairytales, text, "--formats", "rtn", "--plot", "a.png") == 2
    assert "miniawq[plots]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--formats", "int3"], "there is no format 'int3'"),
        (["--formats", "rtn", "--group-size", "0"], "a group has at least one input"),
        (["--formats", "rtn", "--group-size", "many"], "--group-size"),
    ],
)
def test_values_that_make_no_sense_are_usage_errors(flags, told, fairytales, text, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        evaluated(fairytales, text, *flags)
    assert told in capsys.readouterr().err


def test_a_quantized_model_has_no_other_formats(tmp_path, fairytales, text, capsys) -> None:
    directory, _ = make(tmp_path / "int4", "awq")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((fairytales / name).read_bytes())
    assert evaluated(directory, text, "--formats", "rtn") == 3
    assert "is quantized already" in capsys.readouterr().err
