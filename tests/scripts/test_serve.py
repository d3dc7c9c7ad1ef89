"""What the programs that compare us with other engines make of their answers, without any engine."""

import sys

import pytest
import torch

from miniawq.checkpoint.opening import open_checkpoint
from miniawq.checkpoint.shards import plan_shards
from miniawq.commands.plan import tensors_from_config
from tests.scripts import script


def table(monkeypatch, capsys, answers) -> list[str]:
    """The cells of the demo's row, if an engine answers so."""
    serve = script("peers/serve")
    monkeypatch.setattr(serve, "by_actor", answers)
    monkeypatch.setattr(sys, "argv", ["serve", "--engine", "transformers", "--python", sys.executable,
                                      "--layouts", "awq", "--new-tokens", "3"])  # fmt: skip
    serve.main()
    return [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].split("|")[1:-1]]


def test_an_engine_like_ours_differs_in_nothing(monkeypatch, capsys):
    serve = script("peers/serve")
    row = table(monkeypatch, capsys, lambda arguments, path, question: serve.by_miniawq(path, question))
    assert row == ["fairytales-awq", "awq", "0.0e+00, 0.0e+00", "86 of 86", "9 of 9", ""]


def test_another_engine_differs_as_it_does(monkeypatch, capsys):
    serve = script("peers/serve")

    def answers(arguments, path, question):
        found = serve.by_miniawq(path, question)
        found["logprobs"][3] += 0.86
        found["best"][0] += 1
        found["greedy"][1][1] += 1
        return found | {"kernels": ["FastKernel"]}

    row = table(monkeypatch, capsys, answers)
    assert row[2:] == ["1.0e-02, 8.6e-01", "85 of 86", "7 of 9", "FastKernel"]


def test_an_engine_that_fails_is_told(monkeypatch, capsys):
    def answers(arguments, path, question):
        raise RuntimeError("no such layout")

    assert table(monkeypatch, capsys, answers)[2] == "not loaded: no such layout"


def test_kernels_and_reasons_are_found_in_logs():
    serve = script("peers/serve")
    log = """INFO 11-29 [awq.py:451] Using CPUWNA16LinearKernel for AutoAWQMarlinLinearMethod
(pid=1) WARNING 11-29 Found ulimit: OSError: too many files
  Value error, torch.float32 is not supported for quantization method awq."""
    assert [found[1] for found in serve.KERNELS.finditer(log)] == ["CPUWNA16LinearKernel"]
    assert serve.reason(log) == "torch.float32 is not supported for quantization method awq."
    assert serve.reason("nothing") == "no answer: nothing"


@pytest.mark.parametrize("name", ["Llama-2-7B", "Llama-3.1-8B"])
def test_headers_without_values_make_a_plan(tmp_path, name):
    memory = script("memory_table")
    nbytes = memory.write_headers(tmp_path / name, memory.config_of(name))
    assert nbytes == sum(
        shard.nbytes for shard in plan_shards(tensors_from_config(memory.config_of(name), torch.bfloat16))
    )
    told = memory.planned(tmp_path / name, 8, 1000)
    assert told["stored_bytes"] == sum(info.nbytes for info in open_checkpoint(tmp_path / name).tensors.values())
    assert told["memory"]["kv_cache"] == 8 * 1000 * told["kv_bytes_per_token"]
    assert sum(file.stat().st_blocks for file in (tmp_path / name).iterdir()) * 512 < 1 << 20
