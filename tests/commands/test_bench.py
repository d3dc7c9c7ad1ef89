"""`miniawq bench`: what is counted, told and refused; no test depends on how fast this machine is."""

import itertools
import json
from contextlib import nullcontext

import pytest
import torch

from miniawq.__main__ import main
from miniawq.commands import bench
from miniawq.engine.memory import bytes_per_token, kv_bytes_per_token
from miniawq.generate import load

FLAGS = ("--context", "8", "--new-tokens", "4", "--repeats", "1", "--device", "cpu")


@pytest.fixture
def clock(monkeypatch):
    """Each look at the clock is a second after the one before."""
    seconds = itertools.count()
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(seconds)))
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e9)


def test_rates_are_tokens_of_all_rows_in_the_time_that_passed(clock):
    model, _ = load(device="cpu")
    speed = bench.measure_speed(model, 3, 8, new_tokens=4, repeats=2, bandwidth=1e9, price=7.2)
    assert (speed.prompt_tokens_per_s, speed.generation_tokens_per_s, speed.ms_per_step) == (24, 12, 250)
    read = bytes_per_token(model) + 3 * 10 * kv_bytes_per_token(model.config, torch.float32)
    assert speed.share_of_bandwidth == pytest.approx(4 * read / 1e9)
    # 7.2 an hour are 2 for a thousand seconds.
    assert (speed.prompt_cost, speed.generation_cost) == pytest.approx((2e-3 / 24 * 1e6, 2e-3 / 12 * 1e6))


def test_as_many_tokens_are_computed_as_are_counted(monkeypatch):
    model, _ = load(device="cpu")
    lengths, forward = [], model.model.forward

    def counted(tokens_BL, cache=None):
        lengths.append(tuple(tokens_BL.shape))
        return forward(tokens_BL, cache)

    monkeypatch.setattr(model.model, "forward", counted)
    monkeypatch.setattr(bench, "PREFILL_CHUNK", 10)
    step = bench.make_step(model, 2, 13, None)
    bench.time_text(model, step, 2, 8, 4)
    assert lengths == [(2, 5), (2, 3), *[(2, 1)] * 4]
    assert step.cache.length == 12


@pytest.mark.parametrize(("wanted", "compiles"), [(None, False), (False, False), (True, True)])
def test_a_step_is_compiled_if_asked_for_and_kept(wanted, compiles, monkeypatch, tmp_path):
    directories = []
    monkeypatch.setattr(bench, "kept", lambda described: nullcontext(tmp_path / described["rows"]))
    monkeypatch.setattr(bench.DecodeStep, "compile", lambda step, directory: directories.append(directory))
    model, _ = load(device="cpu")
    step = bench.make_step(model, 2, 9, wanted)
    assert type(step) is (bench.DecodeStep if compiles else bench.PlainStep)
    assert directories == [tmp_path / "2"] * compiles
    assert step.cache.keys_NBMJE.shape[1:3] == (2, 9)


def test_the_table_has_a_line_for_each_combination(clock, capsys):
    assert main(["bench", *FLAGS, "--rows", "1,2", "--price", "3.6"]) == 0
    title, head, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("the demo on cpu, threads: ")
    assert [line.split()[:2] for line in lines] == [["1", "8"], ["2", "8"]]
    assert all(len(line) == len(head) for line in lines)
    # At 3.6 an hour a second costs a thousandth; 8 and 4 tokens of a row took one.
    assert lines[0].split()[-2:] == ["125.0000", "250.0000"]


def test_json_has_the_same_for_machines(clock, capsys):
    assert main(["bench", *FLAGS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (line,) = found["results"]
    assert (found["model"], found["dtype"], line["rows"], line["context"]) == ("demo", "torch.float32", 1, 8)
    assert line["generation_tokens_per_s"] == 4
    assert line["generation_cost"] is None
    assert line["peak_memory"] > 0 < line["planned_memory"]


def test_the_memory_margin_is_part_of_what_is_planned(clock, capsys):
    planned = []
    for margin in ("0", "3MiB"):
        assert main(["bench", *FLAGS, "--memory-margin", margin, "--json"]) == 0
        planned.append(json.loads(capsys.readouterr().out)["results"][0]["planned_memory"])
    assert planned[1] - planned[0] == 3 << 20


@pytest.mark.parametrize(("flags", "told"), [
    (["--context", "512"], "--context 512 is too long"), (["--rows", "1,x"], "is no list of numbers"),
    (["--rows", "0"], "0 makes no sense"), (["-n", "0"], "--new-tokens 0 makes no sense"),
    (["--price", "-1"], "--price -1.0 makes no sense"), (["--repeats", "0"], "--repeats 0 makes no sense"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(flags, told, capsys):
    with pytest.raises(SystemExit) if "--rows" in flags else pytest.MonkeyPatch.context():
        assert main(["bench", *flags]) == 2
    assert told in capsys.readouterr().err


def test_what_does_not_fit_is_left_out_and_said(clock, monkeypatch, capsys):
    require = bench.require_memory

    def little(needed, *arguments):
        if needed.batch > 1:
            raise bench.DoesNotFit("too large", "it needs more", "buy some")
        require(needed, *arguments)

    monkeypatch.setattr(bench, "require_memory", little)
    assert main(["bench", *FLAGS, "--rows", "1,2", "--json"]) == 0
    told = capsys.readouterr()
    assert told.err == "2 rows of 8 tokens are left out: it needs more\n"
    assert [line["rows"] for line in json.loads(told.out)["results"]] == [1]
    assert main(["bench", *FLAGS, "--rows", "2"]) == 4
