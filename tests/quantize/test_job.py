"""The stream: what it writes is right, whole, resumable, and told."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from miniawq.checkpoint.loading import load_model
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.checkpoint.publishing import LOCK
from miniawq.errors import DoesNotFit, InvalidInput, MiniawqError, NotFound, UnsupportedCheckpoint, UsageError
from miniawq.packing import Quantized, dequantize
from miniawq.quantize import __main__ as command_line
from miniawq.quantize import journal, report
from miniawq.quantize.calibration import (
    Calibration,
    add_own_windows,
    read_calibration,
    sample_calibration,
    windows,
)
from miniawq.quantize.job import Quantizer, Settings, quantize_checkpoint
from miniawq.quantize.memory import plan_memory, plan_sampling
from miniawq.quantize.packable import left_dense
from miniawq.quantize.recipes import DEFAULT, PAPER
from miniawq.quantize.report import draw_report
from miniawq.quantize.verify import error_over_bound, verify
from miniawq.text.tokenizer import Tokenizer
from tests.helpers.marks import thorough_but
from tests.helpers.quantizing import Killed, contents, killed, make_source, some_text
from tests.helpers.tiny_checkpoints import FAMILIES, make, make_dense

SETTINGS = Settings(replace(DEFAULT, group_size=64, ratios=4))


@pytest.fixture(autouse=True, scope="module")
def no_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_report", lambda path, blocks: None)
        yield


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory, _ = make_dense(tmp_path_factory.mktemp("dense") / "model", num_hidden_layers=3)
    (directory / "generation_config.json").write_text('{"temperature":   0.7}')
    (directory / "chat_template.jinja").write_text("{{ messages }}\n")
    (directory / "README.md").write_text("---\nlicense: apache-2.0\ntags: [old]\n---\n# The dense one\nlicense: none\n")
    return directory


@pytest.fixture(scope="module")
def finished(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finished") / "out"
    quantize_checkpoint(dense, directory, some_text(), SETTINGS)
    return directory


@pytest.mark.parametrize("family", thorough_but(["llama-biased", "llama-tied", "qwen3"], FAMILIES))
@pytest.mark.parametrize("layout", thorough_but(["compressed-tensors"], ["awq", "compressed-tensors"]))
def test_the_written_checkpoint_is_the_model(family: str, layout: str, tmp_path: Path, device: torch.device) -> None:
    source, model = make_dense(tmp_path / "dense", family)
    report = quantize_checkpoint(source, tmp_path / "out", some_text(), replace(SETTINGS, layout=layout), device=device)
    written = open_checkpoint(tmp_path / "out")
    assert written.quantized.keys() == written.linears.keys() - {"lm_head"}
    assert report.verification["largest_error_over_bound"] <= 1
    tokens_BL = some_text().tokens_BL
    loaded = load_model(written, dtype=torch.float32)
    error = (loaded(tokens_BL) - model(tokens_BL)).norm() / model(tokens_BL).norm()
    assert error < 0.2, "INT4 noise, and no more"


def test_config_and_side_files(dense: Path, finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["torch_dtype"] == "float16"
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "zero_point": True,
        "group_size": 64,
        "bits": 4,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    for name in ("generation_config.json", "chat_template.jinja"):
        assert (finished / name).read_bytes() == (dense / name).read_bytes()
    assert not (finished / journal.NAME).exists()
    report = json.loads((finished / "quantization_report.json").read_text())
    assert report["calibration"]["tokens_used"] == 27
    assert [block["layer"] for block in report["blocks"]] == [0, 1, 2]
    assert {"formula", "ratio", "loss", "plain_loss", "trials"} <= report["blocks"][0]["folds"][0].keys()
    card = (finished / "README.md").read_text()
    assert "27 tokens, random ids" in card
    assert card.startswith("---\nlicense: apache-2.0\npipeline_tag: text-generation\ntags: [awq, int4, miniawq]\n---\n")


def test_the_picture_is_drawn(finished: Path, tmp_path: Path) -> None:
    blocks = json.loads((finished / "quantization_report.json").read_text())["blocks"]
    draw_report(tmp_path / "report.png", blocks)
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_next_block_sees_is_full_precision(dense: Path) -> None:
    checkpoint = open_checkpoint(dense)
    job = Quantizer(checkpoint, SETTINGS, torch.device("cpu"))
    tokens_BL = some_text().tokens_BL
    hidden_BLD = torch.empty(*tokens_BL.shape, 128)
    with torch.inference_mode():
        job.stream.embed(tokens_BL, hidden_BLD)
        for layer in range(3):
            job.process(layer, hidden_BLD)
        expected_BLD = load_model(checkpoint, dtype=torch.float32).model(tokens_BL)
        norm = job.stream.head().norm
        torch.testing.assert_close(norm(hidden_BLD), expected_BLD, rtol=1e-4, atol=1e-4)


def test_the_same_input_gives_the_same_bytes(dense: Path, finished: Path, tmp_path: Path) -> None:
    quantize_checkpoint(dense, tmp_path / "out", some_text(), SETTINGS, offload_directory=tmp_path / "hidden")
    assert contents(tmp_path / "out") == contents(finished)
    assert list((tmp_path / "hidden").iterdir()) == []


@pytest.fixture(scope="module")
def in_shards(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards") / "out"
    quantize_checkpoint(dense, directory, some_text(), replace(SETTINGS, shard_bytes=40_000))
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


@pytest.mark.parametrize("tensors", thorough_but([25], [0, 1, 24, 25, 47, 71]))
def test_a_killed_run_goes_on_to_the_same_bytes(tensors: int, dense: Path, in_shards: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, shard_bytes=40_000)
    text = some_text()
    with killed(lambda writer, _: writer.done == tensors):
        quantize_checkpoint(dense, tmp_path / "out", text, settings)
    assert not (tmp_path / "out" / "config.json").exists(), "half a checkpoint cannot be opened"
    with open(tmp_path / "out" / journal.NAME, "ab") as file:
        file.write(b'{"layer": 99, "half a li')
    quantize_checkpoint(dense, tmp_path / "out", text, settings)
    assert contents(tmp_path / "out") == contents(in_shards)


def test_a_run_that_goes_on_tells_the_seconds_of_the_blocks_before(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Quantizer.process

    def slow(job: Quantizer, layer: int, hidden_BLD: torch.Tensor) -> Any:
        tensors, record = process(job, layer, hidden_BLD)
        return tensors, record | {"seconds": 1e6}

    with monkeypatch.context() as patch, killed(lambda _, name: name.startswith("model.layers.1.")):
        patch.setattr(Quantizer, "process", slow)
        quantize_checkpoint(dense, tmp_path / "out", some_text(), SETTINGS)
    assert 1e6 < quantize_checkpoint(dense, tmp_path / "out", some_text(), SETTINGS).seconds < 2e6


@pytest.mark.thorough
def test_kill_9_on_the_command_line(tmp_path: Path) -> None:
    source = make_source(tmp_path / "dense", num_hidden_layers=12)
    (tmp_path / "text.txt").write_text("Once upon a time there was a king who had three sons. " * 40)
    command = [sys.executable, "-m", "miniawq.quantize", str(source), str(tmp_path / "out"), "--calib"]
    command += [str(tmp_path / "text.txt"), "--num-samples", "2", "--sequence-length", "32", "--group-size", "64"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    journal_file = tmp_path / "out" / journal.NAME
    while not journal_file.exists() or journal_file.read_bytes().count(b"\n") < 4:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert (tmp_path / "out" / LOCK).exists()
    assert command_line.main(command[3:]) == 0
    assert (
        command_line.main([part.replace(str(tmp_path / "out"), str(tmp_path / "whole")) for part in command[3:]]) == 0
    )
    first, second = (tmp_path / name / "model.safetensors" for name in ("out", "whole"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"text": some_text(rows=2)}, "text"),
        ({"settings": replace(SETTINGS, recipe=replace(SETTINGS.recipe, group_size=32))}, "recipe"),
        ({"model": True}, "model"),
    ],
)
def test_another_run_does_not_go_on(
    change: dict[str, Any], named: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Quantizer, "process", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        quantize_checkpoint(dense, tmp_path / "out", some_text(), SETTINGS)
    source = dense
    if "model" in change:
        source, _ = make_dense(tmp_path / "tuned", num_hidden_layers=3)
        tensors = load_file(source / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][0] += 0.1
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=named):
        quantize_checkpoint(source, tmp_path / "out", change.get("text", some_text()), change.get("settings", SETTINGS))


def test_a_second_run_into_one_directory_is_refused(
    dense: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Quantizer.process

    def with_a_second_run(job: Quantizer, layer: int, hidden_BLD: torch.Tensor) -> Any:
        with pytest.raises(UsageError, match="another run is writing"):
            quantize_checkpoint(dense, tmp_path / "out", some_text(), SETTINGS)
        return process(job, layer, hidden_BLD)

    monkeypatch.setattr(Quantizer, "process", with_a_second_run)
    quantize_checkpoint(dense, tmp_path / "out", some_text(), SETTINGS)
    assert contents(tmp_path / "out") == contents(finished)
    assert not (tmp_path / "out" / LOCK).exists()


def test_a_lock_file_that_nobody_holds_is_no_hindrance(dense: Path, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).touch()
    quantize_checkpoint(dense, tmp_path / "out", some_text(), SETTINGS)
    assert contents(tmp_path / "out") == contents(finished)


def test_other_files_are_left_alone(dense: Path, finished: Path) -> None:
    before = sorted(finished.iterdir())
    with pytest.raises(UsageError, match="not empty"):
        quantize_checkpoint(dense, finished, some_text(), SETTINGS)
    assert sorted(finished.iterdir()) == before, "not even a lock is left"


@pytest.mark.parametrize(("first", "is_told"), [(100.0, True), (80.0, False)])
def test_the_time_is_told_again_where_the_first_block_took_longer(
    first: float, is_told: bool, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    process = Quantizer.process

    def slow(job: Quantizer, layer: int, hidden_BLD: torch.Tensor) -> Any:
        tensors, record = process(job, layer, hidden_BLD)
        return tensors, record | {"seconds": first if layer == 0 else 60.0}

    monkeypatch.setattr(Quantizer, "process", slow)
    caplog.set_level("INFO", "miniawq")
    quantize_checkpoint(dense, tmp_path / "out", some_text(), SETTINGS)
    told = [record.getMessage() for record in caplog.records if "block took" in record.getMessage()]
    assert told[0].startswith(f"the first block took {first} s: about ")
    assert told[1:] == ["the second block took 60.0 s: about 01:00 for the other 1"] * is_told


def test_ctrl_c_stops_after_the_block_and_the_run_can_go_on(
    dense: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process = Quantizer.process

    def interrupted(job: Quantizer, layer: int, hidden_BLD: torch.Tensor) -> Any:
        if layer == 1:
            signal.raise_signal(signal.SIGINT)
        tensors, record = process(job, layer, hidden_BLD)
        return tensors, record | {"seconds": 60.0}

    monkeypatch.setattr(Quantizer, "process", interrupted)
    caplog.set_level("INFO", "miniawq")
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(dense, tmp_path / "out", some_text(), SETTINGS)
    assert "the first block took 60.0 s: about 02:00 for the other 2" in caplog.text
    assert "stopped after block 2 of 3" in caplog.text
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    quantize_checkpoint(dense, tmp_path / "out", some_text(), SETTINGS)
    assert contents(tmp_path / "out") == contents(finished)


def test_layers_that_do_not_fit_stay_dense_and_are_listed(tmp_path: Path) -> None:
    source, model = make_dense(tmp_path / "dense", intermediate_size=200)
    report = quantize_checkpoint(source, tmp_path / "out", some_text(), SETTINGS)
    expected = [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]
    assert report.dense_linears == [*expected, "lm_head"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["modules_to_not_convert"] == expected
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    stored = tensors["model.layers.1.mlp.down_proj.weight"]
    torch.testing.assert_close(stored, model.model.layers[1].mlp.down_proj.weight.half())


def test_layers_that_engines_fuse_stay_dense_together(tmp_path: Path) -> None:
    source, _ = make_dense(tmp_path / "dense", head_dim=18, num_attention_heads=4, num_key_value_heads=2)
    report = quantize_checkpoint(source, tmp_path / "out", some_text(), SETTINGS)
    assert [name.rpartition(".")[2] for name in report.dense_linears[:3]] == ["q_proj", "k_proj", "v_proj"]


@pytest.mark.parametrize(
    ("size", "told"),
    [
        (128, "6 of each block's 7 layers stay dense: .* 192 inputs and .*self_attn.q_proj; --group-size 64 packs"),
        (64, "1 of each block's 7 layers stay dense: .* 96 inputs and .*self_attn.o_proj; --group-size 32 packs"),
        (32, ""),
        (-1, ""),
    ],
)
def test_layers_that_stay_dense_are_told_with_a_size_that_packs_them(size: int, told: str, tmp_path: Path) -> None:
    shape = {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
    source, _ = make_dense(tmp_path / "dense", intermediate_size=256, **shape)
    checkpoint = open_checkpoint(source)
    found = left_dense(checkpoint.model_config, checkpoint.linears, size)
    assert re.match(told, found) if told else not found


def test_no_size_is_named_where_outputs_do_not_fit(tmp_path: Path) -> None:
    source, _ = make_dense(tmp_path / "dense", head_dim=18, num_attention_heads=4, num_key_value_heads=2)
    checkpoint = open_checkpoint(source)
    told = left_dense(checkpoint.model_config, checkpoint.linears, 64)
    assert told.startswith("4 of each block's 7 layers stay dense")
    assert "--group-size" not in told


def test_the_command_warns_of_dense_layers_before_it_reads_the_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_source(tmp_path / "dense", intermediate_size=200)
    text = ("--calib", str(tmp_path / "none.txt"), "--sequence-length", "8")
    assert command_line.main([str(source), str(tmp_path / "out"), "--group-size", "64", *text]) == NotFound.exit_code
    assert "1 of each block's 7 layers stay dense" in caplog.text


def test_a_tied_head_is_not_written(tmp_path: Path) -> None:
    source, _ = make_dense(tmp_path / "dense", "llama-tied")
    quantize_checkpoint(source, tmp_path / "out", some_text(), SETTINGS)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_a_stored_head_that_differs_from_the_embedding_is_kept(tmp_path: Path) -> None:
    source, _ = make_dense(tmp_path / "dense", tie_word_embeddings=False)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    quantize_checkpoint(source, tmp_path / "out", some_text(), SETTINGS)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False
    before, after = (load_file(path / "model.safetensors")["lm_head.weight"] for path in (source, tmp_path / "out"))
    assert torch.equal(after, before.half())
    embedding = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(after, embedding)


def test_a_stored_head_that_is_the_embedding_stays_tied(tmp_path: Path) -> None:
    source, _ = make_dense(tmp_path / "dense", "llama-tied")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    quantize_checkpoint(source, tmp_path / "out", some_text(), SETTINGS)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_the_papers_recipe(dense: Path, tmp_path: Path) -> None:
    chosen = replace(PAPER, group_size=64)
    report = quantize_checkpoint(dense, tmp_path / "out", some_text(), replace(SETTINGS, recipe=chosen))
    assert report.verification["largest_error_over_bound"] <= 1


@pytest.mark.parametrize("shape", thorough_but([(1, 1)], [(1, 1), (1, 9), (5, 1)]))
def test_little_text(shape: tuple[int, int], dense: Path, tmp_path: Path) -> None:
    report = quantize_checkpoint(dense, tmp_path / "out", some_text(*shape), SETTINGS)
    assert report.calibration["tokens_used"] == shape[0] * shape[1]


def test_verification_sees_one_wrong_code(dense: Path, finished: Path, tmp_path: Path) -> None:
    checkpoint, written = open_checkpoint(dense), open_checkpoint(finished)
    name = "model.layers.1.self_attn.o_proj"
    quantized = written.read_linear(name)
    assert isinstance(quantized, Quantized)
    weight_OI = dequantize(quantized, torch.float32)
    assert error_over_bound(weight_OI, quantized) < 1e-6
    codes_OI = quantized.codes_OI.clone()
    codes_OI[3, 70] = (codes_OI[3, 70] + 1) % 16
    assert error_over_bound(weight_OI, quantized._replace(codes_OI=codes_OI)) > 1.9
    with pytest.raises(MiniawqError, match="times the bound away"):
        verify(checkpoint, written, {"lm_head"}, lambda name, weight_OI: weight_OI)
    with pytest.raises(MiniawqError, match="neither packed nor listed"):
        verify(checkpoint, written, set(), lambda name, weight_OI: weight_OI)


def test_a_group_size_that_fits_no_layer_is_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no layer"):
        quantize_checkpoint(dense, tmp_path / "out", some_text(), Settings(replace(DEFAULT, group_size=96)))
    assert not (tmp_path / "out").exists()


def test_a_quantized_source_is_refused(tmp_path: Path) -> None:
    source, _ = make(tmp_path / "awq")
    with pytest.raises(UnsupportedCheckpoint, match="quantized already"):
        quantize_checkpoint(source, tmp_path / "out", some_text(), SETTINGS)


def test_a_weight_that_float16_cannot_hold_is_named(tmp_path: Path) -> None:
    source, _ = make_dense(tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = 1e5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidInput, match=r"lm_head\.weight does not fit"):
        quantize_checkpoint(source, tmp_path / "out", some_text(), SETTINGS)
    wide = replace(SETTINGS, dtype=torch.bfloat16, recipe=replace(SETTINGS.recipe, scale_dtype=torch.bfloat16))
    quantize_checkpoint(source, tmp_path / "wide", some_text(), wide)


def test_dead_channels_and_activations_beyond_float16_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, _ = make_dense(tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"][7] = 0
    tensors["model.embed_tokens.weight"] *= 1e6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    wide = replace(SETTINGS, dtype=torch.bfloat16)
    quantize_checkpoint(source, tmp_path / "out", some_text(), wide)
    assert "block 1, post_attention_layernorm: 1 channels are never active" in caplog.text
    assert "run the model in bfloat16" in caplog.text


def test_the_plan_does_not_grow_with_the_blocks(tmp_path: Path) -> None:
    plans = []
    for layers in (2, 4):
        source, _ = make_dense(tmp_path / str(layers), num_hidden_layers=layers)
        job = Quantizer(open_checkpoint(source), SETTINGS, torch.device("cpu"))
        plan = plan_memory(job.checkpoint, job.folds, 4, 16, 8192, torch.device("cpu"), False)
        plans.append({purpose: size for purpose, size in plan.host.items() if purpose != "process"})
    assert plans[0] == plans[1]


def test_the_plan_counts_the_block_that_is_read_ahead(tmp_path: Path) -> None:
    """On a CPU too: what is read is a copy."""
    planned = []
    for layers in (1, 2):
        source, _ = make_dense(tmp_path / f"{layers}", num_hidden_layers=layers)
        job = Quantizer(open_checkpoint(source), SETTINGS, torch.device("cpu"))
        planned.append(plan_memory(job.checkpoint, job.folds, 4, 16, 8192, torch.device("cpu"), False).host)
    next(job.stream._coming)
    stored = sum(tensor.nbytes for tensor in next(job.stream._coming)[1].values())
    assert planned[1]["the next block"] - planned[0]["the next block"] == stored


def test_a_plan_that_does_not_fit_is_refused_before_anything_is_written(dense: Path, tmp_path: Path) -> None:
    job = Quantizer(open_checkpoint(dense), SETTINGS, torch.device("cpu"))
    plan = plan_memory(job.checkpoint, job.folds, 10**9, 512, 8192, torch.device("cpu"), False)
    with pytest.raises(DoesNotFit, match="--offload-directory"):
        plan.check(torch.device("cpu"))


def test_a_model_that_writes_its_own_text_is_checked_before_it_is_loaded(
    fairytales: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(command_line, "load_model", loaded)
    monkeypatch.setattr("miniawq.quantize.memory.device_memory", lambda device: SimpleNamespace(free=10 << 20))
    assert command_line.main([str(fairytales), str(tmp_path / "out"), "--device", "cpu"]) == DoesNotFit.exit_code
    assert "give a text with --calib FILE" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_plan_of_sampling_counts_the_whole_model(fairytales: Path) -> None:
    plan = plan_sampling(open_checkpoint(fairytales), torch.float32, torch.device("cpu"), 100, 512)
    parameters = sum(tensor.numel() for tensor in load_model(open_checkpoint(fairytales)).parameters())
    assert plan.host["model"] == 4 * parameters
    config = open_checkpoint(fairytales).model_config
    assert plan.host["keys and values"] == 4 * 2 * 32 * 512 * (
        config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    )


@pytest.mark.parametrize(("free", "on_device"), [(2**40, True), (0, False)])
def test_hidden_states_stay_on_a_device_with_room(dense: Path, monkeypatch, free: int, on_device: bool) -> None:
    job = Quantizer(open_checkpoint(dense), SETTINGS, torch.device("cpu"))
    monkeypatch.setattr("miniawq.hardware.device_memory", lambda device: SimpleNamespace(free=free))
    cuda = torch.device("cuda")
    plan = plan_memory(job.checkpoint, job.folds, 4, 16, 8192, cuda, False)
    assert plan.hidden_on_device is on_device
    assert ("hidden states" in plan.host) is not on_device
    assert not plan_memory(job.checkpoint, job.folds, 4, 16, 8192, cuda, True).hidden_on_device


@given(st.integers(1, 300), st.integers(1, 20), st.integers(1, 40))
def test_windows_hold_every_token_that_there_is_room_for(count: int, samples: int, length: int) -> None:
    tokens_BL = windows(list(range(count)), samples, length)
    assert tokens_BL.shape[0] <= samples
    assert tokens_BL.shape[1] == min(length, count)
    assert all(torch.equal(row_L, torch.arange(len(row_L)) + row_L[0]) for row_L in tokens_BL)
    distinct = tokens_BL.unique().numel()
    assert distinct == min(count, samples * length)
    assert tokens_BL.min() == 0
    assert samples == 1 or tokens_BL.max() == count - 1


class TestText:
    @pytest.fixture
    def tokenizer(self, fairytales: Path) -> Tokenizer:
        return Tokenizer(fairytales)

    def test_a_text_file(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        (tmp_path / "text.txt").write_text("The king had three sons.\n\nThe youngest was a fool.")
        found = read_calibration(str(tmp_path / "text.txt"), tokenizer, 2, 8)
        assert found.tokens_BL.shape == (2, 8)
        assert found.tokens_found == len(tokenizer.encode("The king had three sons.\n\nThe youngest was a fool."))

    def test_json_lines(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        (tmp_path / "text.jsonl").write_text('{"text": "The king"}\n\n{"text": "had sons"}\n')
        found = read_calibration(str(tmp_path / "text.jsonl"), tokenizer, 1, 512)
        assert found.tokens_BL[0].tolist() == tokenizer.encode("The king") + tokenizer.encode("had sons")

    @pytest.mark.parametrize("line", ['{"prompt": "x"}', "no json", '{"text": 3}', "[1]"])
    def test_a_bad_line_is_named(self, line: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
        (tmp_path / "text.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
        with pytest.raises(InvalidInput, match="line 2"):
            read_calibration(str(tmp_path / "text.jsonl"), tokenizer, 1, 512)

    def test_no_text(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        (tmp_path / "empty.jsonl").write_text("\n")
        with pytest.raises(InvalidInput, match="no calibration text"):
            read_calibration(str(tmp_path / "empty.jsonl"), tokenizer, 1, 512)
        with pytest.raises(NotFound):
            read_calibration(str(tmp_path / "missing.txt"), tokenizer, 1, 512)

    def test_the_model_writes_its_own(
        self, tokenizer: Tokenizer, fairytales: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("miniawq.quantize.calibration.SAMPLED_ROWS", 2)
        model = load_model(open_checkpoint(fairytales), dtype=torch.float32)
        first, again = (sample_calibration(model, tokenizer, 3, 12, seed=5) for _ in range(2))
        assert first.tokens_BL.shape == (3, 12)
        assert first.sha256 == again.sha256
        assert first.sha256 != sample_calibration(model, tokenizer, 3, 12, seed=6).sha256
        assert (first.tokens_BL[:, 0] == tokenizer.bos_id).all()
        logits_BLV = model(first.tokens_BL)
        losses = torch.nn.functional.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), first.tokens_BL[:, 1:].flatten())
        assert losses < 6, "far better than the 7.6 of ids drawn evenly"
        monkeypatch.setattr(tokenizer, "bos_id", None)
        others_BL = sample_calibration(model, tokenizer, 3, 12, seed=5).tokens_BL
        assert others_BL.shape == (3, 12)
        assert len(set(others_BL[:, 0].tolist())) > 1

    def test_the_model_goes_on_from_a_text(
        self, tokenizer: Tokenizer, fairytales: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = load_model(open_checkpoint(fairytales), dtype=torch.float32)
        monkeypatch.setattr("miniawq.quantize.calibration.BEGINNING", 6)
        monkeypatch.setattr("miniawq.quantize.calibration.SAMPLED_ROWS", 2)
        length = 16
        text = Calibration(windows(tokenizer.encode("The king had three sons. " * 60), 2, length), "three sons", 400)
        more, again = (add_own_windows(text, model, 5, seed=5) for _ in range(2))
        assert more.tokens_BL.shape == (2 + 5, length)
        assert torch.equal(more.tokens_BL[:2], text.tokens_BL)
        assert more.sha256 == again.sha256
        assert more.sha256 != add_own_windows(text, model, 5, seed=6).sha256
        assert more.source == "three sons, and 5 windows sampled from the model, seed 5"
        for number, row_L in enumerate(more.tokens_BL[2:]):
            pieces = text.tokens_BL[number % 2].unfold(0, 6, 1)
            assert (pieces == row_L[:6]).all(1).any()
        monkeypatch.setattr("miniawq.quantize.calibration.TEMPERATURE", 1e-4)
        cold_BL = add_own_windows(text, model, 3).tokens_BL[2:]
        assert torch.equal(model(cold_BL)[:, 5:-1].argmax(-1), cold_BL[:, 6:])
        short_BL = text.tokens_BL[:, :8]
        (own_L,) = add_own_windows(Calibration(short_BL, "eight ids", 8), model, 1).tokens_BL[2:]
        assert any(torch.equal(own_L[:4], short_BL[0, start : start + 4]) for start in range(5))
        assert torch.equal(model(own_L[None])[0, 3:-1].argmax(-1), own_L[4:])
        one = Calibration(text.tokens_BL[:, :1], "one id", 1)
        assert add_own_windows(one, model, 1).tokens_BL.shape == (3, 1)


def test_own_windows_of_a_run(
    fairytales: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = []

    def plan(*arguments: Any) -> Any:
        planned.append(arguments[2:4])
        return plan_memory(*arguments)

    monkeypatch.setattr(command_line, "plan_memory", plan)
    (tmp_path / "text.txt").write_text("The king had three sons. " * 60)
    run = [str(fairytales), str(tmp_path / "out"), "--device", "cpu", "--own-windows", "3", "--recipe", "plain"]
    run += ["--num-samples", "2", "--sequence-length", "32"]
    assert command_line.main(run) == UsageError.exit_code
    assert "give --calib FILE" in capsys.readouterr().err
    assert command_line.main([*run, "--calib", str(tmp_path / "text.txt")]) == 0
    told = json.loads((tmp_path / "out" / "quantization_report.json").read_text())["calibration"]
    assert (told["samples"], told["tokens_used"]) == (2 + 3, 5 * 32)
    assert planned == [(2 + 3, 32)]


def test_an_id_outside_the_vocabulary_is_refused(dense: Path, tmp_path: Path) -> None:
    text = Calibration(torch.tensor([[1, 59]]), "ids", 2)
    with pytest.raises(InvalidInput, match="token id 59"):
        quantize_checkpoint(dense, tmp_path / "out", text, SETTINGS)


def test_flags_and_their_defaults() -> None:
    parsed = command_line.build_parser().parse_args(["a", "b", "--num_samples", "7"])
    assert (parsed.num_samples, parsed.sequence_length, parsed.group_size) == (7, 512, 128)
    for wrong in (["--group-size", "0"], ["--num-samples", "0"], ["--sequence-length", "x"]):
        with pytest.raises(SystemExit):
            command_line.build_parser().parse_args(["a", "b", *wrong])
