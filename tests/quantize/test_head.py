"""A packed head: written, verified, read and converted like any other layer, and the embedding stays as it is."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from miniawq import awq, packing
from miniawq.checkpoint.blocks import BlockStream
from miniawq.checkpoint.loading import load_model
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.checkpoint.quant_config import PACKED_HEADS
from miniawq.commands.convert import convert_checkpoint
from miniawq.commands.convert import main as convert
from miniawq.engine.layer import compiled_function, finish
from miniawq.engine.step import DecodeStep
from miniawq.errors import InvalidInput, MiniawqError
from miniawq.generate import generate
from miniawq.kernel import QuantLinear
from miniawq.model import KVCache
from miniawq.oracle.loader import load_checkpoint
from miniawq.packing import dequantize
from miniawq.quantize import __main__ as command_line
from miniawq.quantize import job as job_file
from miniawq.quantize import report
from miniawq.quantize.head import quantize_head
from miniawq.quantize.job import Quantizer, Settings, quantize_checkpoint
from miniawq.quantize.memory import plan_memory
from miniawq.quantize.recipes import DEFAULT, NEIGHBOURS, PLAIN_ROUNDING
from tests.helpers.allocations import Allocations
from tests.helpers.awq_blocks import statistics_of
from tests.helpers.marks import each_once
from tests.helpers.quantizing import contents, killed, make_source, some_text
from tests.helpers.tiny_checkpoints import make_dense, same

SETTINGS = Settings(replace(PLAIN_ROUNDING, group_size=64), lm_head=True)
LEARNED = replace(SETTINGS, recipe=replace(NEIGHBOURS, group_size=64, ratios=4))
CPU = torch.device("cpu")
BOTH = pytest.mark.parametrize(
    "settings", [SETTINGS, pytest.param(LEARNED, marks=pytest.mark.thorough)], ids=["plain", "neighbours"]
)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw_report", lambda path, blocks: None)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("dense") / "model", "llama-tied", num_hidden_layers=1)[0]


def greedy(directory: Path) -> list[list[int]]:
    model = load_model(open_checkpoint(directory), dtype=torch.float32)
    return list(generate(model, some_text(1).tokens_BL, max_tokens=12))


@pytest.mark.parametrize(("family", "layout"), each_once(("llama", "llama-tied"), ("compressed-tensors", "awq")))
def test_the_head_is_packed_and_the_embedding_is_not(family: str, layout: str, tmp_path: Path) -> None:
    source, model = make_dense(tmp_path / "dense", family, num_hidden_layers=1)
    made = quantize_checkpoint(source, tmp_path / "out", some_text(), replace(SETTINGS, layout=layout))
    written, tensors = open_checkpoint(tmp_path / "out"), load_file(tmp_path / "out" / "model.safetensors")
    assert written.quantized.keys() == written.linears.keys()
    assert made.dense_linears == []
    assert made.verification["packed_linears"] == 8
    assert made.verification["largest_error_over_bound"] <= 1
    assert "lm_head.weight" not in tensors
    assert torch.equal(tensors["model.embed_tokens.weight"], model.model.embed_tokens.weight.half())
    assert made.source_bytes == sum(tensor.nbytes for tensor in load_file(source / "model.safetensors").values())
    tokens_BL = some_text().tokens_BL
    loaded = load_model(written, dtype=torch.float32)
    assert isinstance(loaded.lm_head, QuantLinear)
    error = (loaded(tokens_BL) - model(tokens_BL)).norm() / model(tokens_BL).norm()
    assert error < 0.25, "INT4 noise, and no more"
    stored = loaded.lm_head.to_quantized()
    torch.testing.assert_close(BlockStream(written).head().weight_VD, dequantize(stored, torch.float32))
    assert torch.equal(load_checkpoint(tmp_path / "out")["lm_head.weight"], dequantize(stored))


@pytest.mark.parametrize("layout", ["awq", "compressed-tensors"])
def test_the_config_says_so_in_the_words_of_the_readers(layout: str, dense: Path) -> None:
    """vLLM and GPTQModel ask for `lm_head`; to vLLM and SGLang a head is no Linear, and so needs its name."""
    checkpoint = open_checkpoint(dense)
    with_head, without = (
        Quantizer(checkpoint, replace(SETTINGS, layout=layout, lm_head=lm_head), CPU).config()
        for lm_head in (True, False)
    )
    assert (with_head["tie_word_embeddings"], without["tie_word_embeddings"]) == (False, True)
    blocks = [config["quantization_config"] for config in (with_head, without)]
    if layout == "awq":
        assert [block.get("lm_head") for block in blocks] == [True, None]
        assert [block["modules_to_not_convert"] for block in blocks] == [None, None]
    else:
        assert [block["config_groups"]["group_0"]["targets"] for block in blocks] == [["Linear", "lm_head"], ["Linear"]]
        assert [block["ignore"] for block in blocks] == [[], ["lm_head"]]


@torch.inference_mode()
def test_its_parts_are_rounded_as_the_whole_on_what_the_norm_gives(tmp_path: Path) -> None:
    source, model = make_dense(tmp_path / "dense", vocab_size=600)
    hidden_BLD, recipe = torch.randn(3, 9, 128), replace(DEFAULT, group_size=64)
    found = quantize_head(BlockStream(open_checkpoint(source)), hidden_BLD, recipe)
    statistics = statistics_of(model.model.norm(hidden_BLD).flatten(0, 1))
    expected = awq.quantize_layer("lm_head", model.lm_head.weight, statistics, recipe.rounding, recipe.method)
    assert same(found.quantized, expected.quantized)
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)
    assert found.plain_loss == pytest.approx(expected.plain_loss, rel=1e-4)
    assert found.loss < found.plain_loss


@BOTH
def test_it_reads_what_the_last_block_gives_in_the_model_that_is_written(
    settings: Settings, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the dense model, as all layers do, where codes are not learned."""
    seen: list[Tensor] = []

    def watched(stream: BlockStream, hidden_BLD: Tensor, *rest: Any) -> Any:
        seen.append(hidden_BLD.clone())
        return quantize_head(stream, hidden_BLD, *rest)

    monkeypatch.setattr(job_file, "quantize_head", watched)
    quantize_checkpoint(dense, tmp_path / "out", some_text(), settings)
    stream = BlockStream(open_checkpoint(tmp_path / "out" if settings is LEARNED else dense))
    hidden_BLD = torch.empty(3, 9, 128)
    stream.embed(some_text().tokens_BL, hidden_BLD)
    ((_, hidden_BLD),) = stream.run(stream.block(0), 0, hidden_BLD)
    assert torch.equal(seen[0], hidden_BLD)


@BOTH
def test_a_run_that_is_killed_in_the_head_goes_on_to_the_same_bytes(
    settings: Settings, dense: Path, tmp_path: Path
) -> None:
    quantize_checkpoint(dense, tmp_path / "whole" / "out", some_text(), settings)
    with killed(lambda _, name: name == "lm_head.scales"):
        quantize_checkpoint(dense, tmp_path / "out", some_text(), settings)
    quantize_checkpoint(dense, tmp_path / "out", some_text(), settings)
    first, second = contents(tmp_path / "out"), contents(tmp_path / "whole" / "out")
    for told in (first, second):
        told["report"]["head"].pop("seconds")
    assert first == second


def test_ctrl_c_in_the_last_block_stops_before_the_head(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Quantizer.process

    def interrupted(job: Quantizer, layer: int, hidden_BLD: Tensor) -> Any:
        signal.raise_signal(signal.SIGINT)
        return process(job, layer, hidden_BLD)

    monkeypatch.setattr(Quantizer, "process", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(dense, tmp_path / "out", some_text(), SETTINGS)
    monkeypatch.undo()
    quantize_checkpoint(dense, tmp_path / "out", some_text(), SETTINGS)
    assert "lm_head" in open_checkpoint(tmp_path / "out").quantized


def test_a_wrong_code_of_the_head_is_not_published(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Quantizer.process_head

    def spoiled(job: Quantizer, hidden_BLD: Tensor) -> Any:
        tensors, record = process(job, hidden_BLD)
        tensors["lm_head.qweight"][70, 3] ^= 8
        return tensors, record

    monkeypatch.setattr(Quantizer, "process_head", spoiled)
    with pytest.raises(MiniawqError, match=r"wrong at lm_head\n  a weight is \S* times the bound away"):
        quantize_checkpoint(dense, tmp_path / "out", some_text(), SETTINGS)
    assert not (tmp_path / "out" / "config.json").exists()


def test_there_and_back_gives_the_same_bytes_and_the_same_text(dense: Path, tmp_path: Path) -> None:
    quantize_checkpoint(dense, tmp_path / "awq", some_text(), SETTINGS)
    convert_checkpoint(tmp_path / "awq", tmp_path / "ct", "compressed-tensors")
    convert_checkpoint(tmp_path / "ct", tmp_path / "back", "awq")
    convert_checkpoint(tmp_path / "ct", tmp_path / "dense", "dense")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "awq" / name).read_bytes()
    assert greedy(tmp_path / "awq") == greedy(tmp_path / "ct") == greedy(tmp_path / "dense")


@pytest.mark.parametrize(
    ("group_size", "vocabulary", "named"), [(64, 48, "96 inputs.*groups of 64"), (32, 44, "44 outputs.*words of 8")]
)
def test_a_head_that_cannot_be_packed_is_refused(group_size: int, vocabulary: int, named: str, tmp_path: Path) -> None:
    shape = {"hidden_size": 96, "head_dim": 32, "vocab_size": vocabulary}
    source, _ = make_dense(tmp_path / "dense", **shape)
    settings = replace(SETTINGS, recipe=replace(PLAIN_ROUNDING, group_size=group_size))
    with pytest.raises(InvalidInput, match=rf"head of \S* cannot be packed\n.*{named}.*\n  leave out --lm-head"):
        quantize_checkpoint(source, tmp_path / "out", some_text(), settings)
    assert not (tmp_path / "out").exists()


def test_who_reads_it_is_said_before_the_work_begins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, text = make_source(tmp_path / "dense", num_hidden_layers=1), tmp_path / "text.txt"
    text.write_text("Once upon a time there was a king. " * 20)
    caplog.set_level("INFO", "miniawq")
    flags = ["--group-size", "64", "--recipe", "plain", "--num-samples", "2", "--sequence-length", "32", "--lm-head"]
    assert command_line.main([str(source), str(tmp_path / "out"), "--calib", str(text), *flags]) == 0
    assert PACKED_HEADS["awq"] in caplog.text.partition("calibration:")[0]
    assert "8 layers packed, 0 dense" in caplog.text
    assert convert([str(tmp_path / "out"), str(tmp_path / "ct"), "--format", "compressed-tensors"]) == 0
    assert PACKED_HEADS["compressed-tensors"] in caplog.text
    settings = json.loads((tmp_path / "out" / "quantization_report.json").read_text())["settings"]
    assert settings["lm_head"] is True


@pytest.mark.thorough
@BOTH
def test_its_memory_is_planned(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WEIGHTS_AT_ONCE", 1 << 16)
    vocabulary = 24_576
    source, _ = make_dense(tmp_path / "dense", num_hidden_layers=1, vocab_size=vocabulary, intermediate_size=1024)
    file, text = source / "model.safetensors", some_text()
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    job, shape = Quantizer(open_checkpoint(source), settings, CPU), text.tokens_BL.shape
    plans = [
        plan_memory(job.checkpoint, job.folds, *shape, 4096, CPU, False, settings.recipe.learns, packs_head).host
        for packs_head in (False, True)
    ]
    planned = [sum(size for part, size in plan.items() if part != "process") for plan in plans]
    with Allocations() as allocations:
        quantize_checkpoint(source, tmp_path / "out", text, settings)
    assert planned[0] < allocations.peak < planned[1]


def test_an_untied_checkpoint_has_the_embedding_for_a_head(dense: Path) -> None:
    tied = open_checkpoint(dense)
    untied = tied.untied()
    assert torch.equal(untied.read("lm_head.weight"), tied.read("model.embed_tokens.weight"))
    assert untied.skeleton.lm_head.weight is not untied.skeleton.model.embed_tokens.weight
    assert untied.untied() is untied


@pytest.mark.compiles
def test_the_compiled_step_gives_the_tokens_of_the_model(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what reads the head is compiled here; `tests/engine/test_step.py` compiles the layers."""
    monkeypatch.setattr(
        "miniawq.engine.step.compiled_function",
        lambda function, *given: compiled_function(function, *given) if function is finish else function,
    )
    quantize_checkpoint(dense, tmp_path / "out", some_text(), SETTINGS)
    model, exact = (load_model(open_checkpoint(tmp_path / "out"), dtype=torch.float32) for _ in range(2))
    tokens_BL = some_text(1).tokens_BL
    step, cache = DecodeStep(model, 1, 32), KVCache(exact.config, 1, 32)
    assert isinstance(exact.lm_head, QuantLinear)
    step.begin(tokens_BL)
    with torch.no_grad():
        ids_B = model.last_logits(tokens_BL, step.cache).argmax(-1)
        exact.last_logits(tokens_BL, cache)
        for _ in range(3):
            expected_BV = exact.last_logits(ids_B[:, None], cache)
            ids_B = step.step(ids_B)
            torch.testing.assert_close(step.logits_BV, expected_BV, rtol=0, atol=1e-3 * float(expected_BV.abs().max()))
            assert torch.equal(ids_B, expected_BV.argmax(-1))
