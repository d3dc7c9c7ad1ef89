"""Conversions keep every weight bit for bit, and the way back gives the same bytes."""

import errno
import itertools
import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miniawq import packing
from miniawq.checkpoint.layouts import LAYOUTS, part_shapes
from miniawq.checkpoint.loading import load_model
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.commands import convert
from miniawq.commands.convert import convert_checkpoint
from miniawq.errors import DoesNotFit, InvalidInput, MiniawqError, UsageError
from miniawq.packing import Quantized, dequantize
from miniawq.quantize.job import Settings, quantize_checkpoint
from miniawq.quantize.recipes import PLAIN_ROUNDING
from tests.helpers import tiny_checkpoints as tiny
from tests.helpers.allocations import Allocations
from tests.helpers.marks import each_once
from tests.helpers.quantizing import some_text
from tests.helpers.tiny_checkpoints import PACKINGS, TOKENS

INT4 = ("awq", "compressed-tensors")
DIRECTORIES = (*INT4, "dense")
CPU = torch.device("cpu")
SIDE = {
    "tokenizer.json": b'{"a": 1}\n\n',
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}\r\n",
    "additional_chat_templates/tools.jinja": b"x",
    "generation_config.json": b'{"eos_token_id":2}',
    "LICENSE.txt": b"licence",
    "README.md": b"card",
    "merges.txt": b"a b",
}


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def same_weights(first: Path, second: Path) -> bool:
    one, other = open_checkpoint(first), open_checkpoint(second)
    assert one.quantized.keys() == other.quantized.keys()
    return all(tiny.same(one.read_linear(name), other.read_linear(name)) for name in one.quantized)


@pytest.mark.parametrize(("packing", "format"), each_once(tuple(PACKINGS), INT4))
def test_int4_to_int4_is_lossless_and_back_to_identical_bytes(tmp_path, packing, format):
    one = {"num_hidden_layers": 1}
    source, reference = tiny.make(tmp_path / "source", family="qwen2", changes=one, **PACKINGS[packing])
    other = next(name for name in INT4 if name != format)
    report = convert_checkpoint(source, tmp_path / "there", format)
    assert same_weights(source, tmp_path / "there")
    assert report.packed_linears == 7
    convert_checkpoint(tmp_path / "there", tmp_path / "other", other)
    convert_checkpoint(tmp_path / "other", tmp_path / "back", format)
    assert contents(tmp_path / "back") == contents(tmp_path / "there")
    logits = load_model(open_checkpoint(tmp_path / "back"), dtype=torch.float32)(TOKENS)
    torch.testing.assert_close(logits, reference(TOKENS), rtol=1e-5, atol=1e-5)


def test_checkpoint_of_another_writer_comes_back_the_same(tmp_path):
    """Every tensor, and every key of config.json in its place."""
    source, _ = tiny.make(tmp_path / "source", shards=3)
    config = json.loads((source / "config.json").read_text())
    config = {"quantization_config": config.pop("quantization_config"), **config, "unknown": [1.5, None, "ä"]}
    (source / "config.json").write_text(json.dumps(config))
    convert_checkpoint(source, tmp_path / "there", "compressed-tensors")
    convert_checkpoint(tmp_path / "there", tmp_path / "back", "awq")
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "back")
    assert json.dumps(after.config) == json.dumps(config)
    assert before.tensors.keys() == after.tensors.keys()
    for name in before.tensors:
        assert torch.equal(before.read(name), after.read(name))
        assert before.tensors[name].dtype == after.tensors[name].dtype


@pytest.mark.parametrize("packing", ["awq", "gemv", "compressed-tensors", "compressed-tensors-channel"])
def test_to_dense_gives_the_weights_the_codes_stand_for(tmp_path, packing):
    source, reference = tiny.make(tmp_path / "source", **PACKINGS[packing])
    convert_checkpoint(source, tmp_path / "dense", "dense")
    dense, packed = open_checkpoint(tmp_path / "dense"), open_checkpoint(source)
    assert not dense.quantized
    assert "quantization_config" not in dense.config
    for name in packed.quantized:
        assert torch.equal(dense.read(f"{name}.weight"), dequantize(packed.read_linear(name)))
    logits = load_model(dense, dtype=torch.float32)(TOKENS)
    torch.testing.assert_close(logits, reference(TOKENS), rtol=3e-2, atol=3e-2)  # float16 weights


FUSED = {
    "phi3": {"self_attn.qkv_proj", "mlp.gate_up_proj"},
    "glm4": {"mlp.gate_up_proj"},
    "granite4": {"shared_mlp.input_linear"},
}


@pytest.mark.parametrize("family", FUSED)
def test_one_matrix_for_several_stays_one_in_every_layout_and_back(tmp_path, family):
    """Codes are cut nowhere, and the files have the names that the family's own have."""
    source, reference = tiny.make(tmp_path / "source", family=family)
    convert_checkpoint(source, tmp_path / "there", "compressed-tensors")
    convert_checkpoint(tmp_path / "there", tmp_path / "awq", "awq")
    convert_checkpoint(tmp_path / "awq", tmp_path / "back", "compressed-tensors")
    assert contents(tmp_path / "back") == contents(tmp_path / "there")
    assert same_weights(source, tmp_path / "there")
    made = open_checkpoint(tmp_path / "there")
    assert {f"model.layers.{layer}.{name}" for layer in (0, 1) for name in FUSED[family]} <= made.quantized.keys()
    convert_checkpoint(tmp_path / "there", tmp_path / "dense", "dense")
    dense = open_checkpoint(tmp_path / "dense")
    assert dense.tensors.keys() == reference.state_dict().keys()
    for name in made.quantized:
        assert torch.equal(dense.read(f"{name}.weight"), dequantize(made.read_linear(name)))
    logits = load_model(made, dtype=torch.float32)(TOKENS)
    torch.testing.assert_close(logits, reference(TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("family", FUSED)
def test_what_was_quantized_with_joined_matrices_converts_there_and_back(tmp_path, family):
    source, _ = tiny.make_dense(tmp_path / "dense", family=family)
    settings = Settings(recipe=replace(PLAIN_ROUNDING, group_size=64))
    quantize_checkpoint(source, tmp_path / "awq", some_text(), settings)
    convert_checkpoint(tmp_path / "awq", tmp_path / "ct", "compressed-tensors")
    convert_checkpoint(tmp_path / "ct", tmp_path / "back", "awq")
    before, after = open_checkpoint(tmp_path / "awq"), open_checkpoint(tmp_path / "back")
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.tensors)


def test_symmetric_codes_become_symmetric_compressed_tensors(tmp_path):
    source, _ = tiny.make(tmp_path / "source", grid="symmetric")
    convert_checkpoint(source, tmp_path / "there", "compressed-tensors")
    written = open_checkpoint(tmp_path / "there")
    assert not any(name.endswith("zero_point") for name in written.tensors)
    assert written.config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] is True
    assert same_weights(source, tmp_path / "there")


def test_one_layer_of_eights_keeps_its_zeros_beside_asymmetric_ones(tmp_path):
    """Readers expect zero points for all layers or for none."""
    source, _ = tiny.make(tmp_path / "source")
    checkpoint = open_checkpoint(source)
    tensors = {name: checkpoint.read(name).clone() for name in checkpoint.tensors}
    tensors["model.layers.1.mlp.up_proj.qzeros"].fill_(-2004318072)  # eight nibbles of 8
    tiny.write(source, checkpoint.config, tensors)
    convert_checkpoint(source, tmp_path / "there", "compressed-tensors")
    assert sum(name.endswith("zero_point") for name in open_checkpoint(tmp_path / "there").tensors) == 14


def test_config_lists_dense_layers_by_full_name(tmp_path):
    leave = ("model.layers.0.mlp.gate_proj",)
    source, _ = tiny.make(tmp_path / "source", layout="compressed-tensors", leave=leave)
    convert_checkpoint(source, tmp_path / "awq", "awq")
    convert_checkpoint(tmp_path / "awq", tmp_path / "ct", "compressed-tensors")
    blocks = [open_checkpoint(tmp_path / name).config["quantization_config"] for name in ("awq", "ct")]
    assert blocks[0] == tiny.AWQ_BLOCK | {"modules_to_not_convert": [*leave]}
    assert blocks[1]["ignore"] == [*leave, "lm_head"]


def test_layers_gemm_words_cannot_hold_become_dense(tmp_path):
    changes = {"intermediate_size": 92}
    source, _ = tiny.make(tmp_path / "source", **PACKINGS["compressed-tensors-channel"], changes=changes)
    report = convert_checkpoint(source, tmp_path / "awq", "awq")
    assert report.unpacked_linears == [f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("gate", "up")]
    written = open_checkpoint(tmp_path / "awq")
    assert written.config["quantization_config"]["modules_to_not_convert"] == [
        f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("gate", "up")
    ]
    assert written.quantized["model.layers.0.mlp.down_proj"].in_features == 92


def test_side_files_are_copied_byte_for_byte(tmp_path):
    source, _ = tiny.make(tmp_path / "source", block={}, shards=2)
    for name, content in SIDE.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(content)
    (source / "quant_config.json").write_text('{"w_bit": 4, "q_group_size": 64, "version": "GEMM"}')
    (source / "modeling.py").write_text("")
    convert_checkpoint(source, tmp_path / "there", "compressed-tensors", shard_bytes=100_000)
    written = contents(tmp_path / "there")
    assert SIDE.items() <= written.items()
    extra = {name for name in written.keys() - SIDE.keys() if not name.endswith(".safetensors")}
    assert extra == {"config.json", "model.safetensors.index.json"}


@pytest.mark.parametrize("format", DIRECTORIES)
def test_a_head_that_differs_from_the_embedding_is_kept(tmp_path, format):
    """config.json ties the two: what is written must say that they are not tied, for every reader."""
    source, reference = tiny.make_with_its_own_head(tmp_path / "source")
    convert_checkpoint(source, tmp_path / "there", format)
    written = open_checkpoint(tmp_path / "there")
    assert json.loads((tmp_path / "there" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(written.read("lm_head.weight"), reference.lm_head.weight)
    logits = load_model(written, dtype=torch.float32)(TOKENS)
    tolerance = 3e-2 if format == "dense" else 1e-5
    torch.testing.assert_close(logits, reference(TOKENS), rtol=tolerance, atol=tolerance)


def test_two_conversions_into_one_directory_do_not_meet(tmp_path, monkeypatch):
    """Both write at the same time: one is published, whole, and the other is told so; older leftovers stay."""
    source, _ = tiny.make(tmp_path / "source")
    convert_checkpoint(source, tmp_path / "alone", "compressed-tensors")
    (tmp_path / "there.partial").mkdir()
    (tmp_path / "there.partial" / "config.json").write_text("left by a killed run")
    together, write_json = threading.Barrier(2, timeout=30), convert.write_json

    def write_with_the_other(*arguments: object) -> None:
        together.wait()
        write_json(*arguments)
        together.wait()

    monkeypatch.setattr(convert, "write_json", write_with_the_other)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(convert_checkpoint, source, tmp_path / "there", "compressed-tensors") for _ in range(2)]
    errors = [run.exception() for run in runs]
    assert sorted(type(error).__name__ for error in errors) == ["NoneType", "UsageError"]
    assert contents(tmp_path / "there") == contents(tmp_path / "alone")
    assert contents(tmp_path / "there.partial") == {"config.json": b"left by a killed run"}
    assert {path.name for path in tmp_path.iterdir()} == {"source", "alone", "there", "there.partial"}


def test_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    source, _ = tiny.make(tmp_path / "source")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "there", "compressed-tensors")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("name", "error"),
    each_once(
        ("fsync", "replace", "mkdir", "rename"),
        (OSError(errno.ENOSPC, "full"), OSError(errno.EROFS, "read-only"), KeyboardInterrupt()),
    ),
)
def test_a_failure_at_any_write_leaves_nothing_or_all(tmp_path, monkeypatch, name, error):
    source, _ = tiny.make(tmp_path / "source", changes={"num_hidden_layers": 1})
    for side in ("README.md", "LICENSE"):
        (source / side).write_text(side)
    plain, failed = getattr(os, name), 0
    for number in itertools.count():
        calls = itertools.count()

        def call(*arguments, calls=calls, number=number, **keywords):
            if next(calls) == number:
                raise error
            return plain(*arguments, **keywords)

        monkeypatch.setattr(os, name, call)
        try:
            convert_checkpoint(source, tmp_path / "deep" / "there", "compressed-tensors")
        except (MiniawqError, KeyboardInterrupt) as told:
            failed += 1
            named = (
                "KeyboardInterrupt()"
                if error.args == ()
                else "disk is full"
                if error.args[1] == "full"
                else "cannot write"
            )
            assert named in f"{told!r}"  # noqa: PT017
        else:
            break
        assert [path.name for path in tmp_path.iterdir()] == ["source"] or open_checkpoint(tmp_path / "deep" / "there")
        shutil.rmtree(tmp_path / "deep", ignore_errors=True)
    assert failed
    assert contents(tmp_path / "deep" / "there").keys() > {"README.md", "LICENSE", "config.json"}


def test_a_byte_that_the_disk_changes_is_seen(tmp_path, monkeypatch):
    source, _ = tiny.make(tmp_path / "source")
    write_json = convert.write_json

    def damaging(path: Path, value: object) -> None:
        file = path.with_name("model.safetensors")
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        write_json(path, value)

    monkeypatch.setattr(convert, "write_json", damaging)
    with pytest.raises(MiniawqError, match="bytes that were written"):
        convert_checkpoint(source, tmp_path / "there", "compressed-tensors")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_full_disk_is_foreseen(tmp_path, monkeypatch):
    source, _ = tiny.make(tmp_path / "source")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(DoesNotFit, match="GB of disk"):
        convert_checkpoint(source, tmp_path / "deep" / "there", "awq")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_existing_destination_is_refused(tmp_path):
    source, _ = tiny.make(tmp_path / "source")
    with pytest.raises(UsageError, match="exists"):
        convert_checkpoint(source, source, "dense")


def test_dense_source_is_refused(tmp_path):
    source, _ = tiny.make_dense(tmp_path / "source")
    with pytest.raises(InvalidInput, match="not quantized"):
        convert_checkpoint(source, tmp_path / "there", "awq")


def test_different_group_sizes_are_refused(tmp_path):
    """compressed-tensors may hold several; the block of AutoAWQ states one."""
    config = tiny.config_of()
    model = tiny.dense_model(config)
    tensors = tiny.pack_model(model, "compressed-tensors", group_size=64, leave=("model.layers.0.mlp.up_proj",))
    others = tuple(name for name in tiny.quantized_linears(model) if name != "model.layers.0.mlp.up_proj")
    tensors |= {
        name: tensor
        for name, tensor in tiny.pack_model(model, "compressed-tensors", group_size=32, leave=others).items()
        if name.startswith("model.layers.0.mlp.up_proj")
    }
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    source = tiny.write(tmp_path / "source", config, tensors)
    with pytest.raises(InvalidInput, match="different group sizes"):
        convert_checkpoint(source, tmp_path / "there", "awq")
    assert not (tmp_path / "there").exists()


@given(
    layout=st.sampled_from(["awq", "compressed-tensors", "compressed-tensors-symmetric"]),
    inputs=st.integers(1, 40),
    words=st.integers(1, 3),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_planned_shapes_are_the_encoders(layout, inputs, words, data):
    groups = data.draw(st.sampled_from([n for n in range(1, inputs + 1) if inputs % n == 0]))
    outputs = 8 * words - (0 if layout == "awq" else data.draw(st.integers(0, 7)))
    zeros_OG = torch.full((outputs, groups), 8, dtype=torch.uint8)
    codes_OI = torch.zeros(outputs, inputs, dtype=torch.uint8)
    encoded = LAYOUTS[layout].encode(Quantized(codes_OI, torch.ones(outputs, groups, dtype=torch.bfloat16), zeros_OG))
    planned = part_shapes(layout, inputs, outputs, groups, torch.bfloat16)
    assert planned == {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in encoded.items()}
    assert list(planned) == list(encoded)


def test_command_line(tmp_path, capsys):
    source, _ = tiny.make(tmp_path / "source")
    assert convert.main([str(source), str(tmp_path / "there"), "--format", "compressed-tensors", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["source_layout"] == "awq"
    assert report["layout"] == "compressed-tensors"
    assert convert.main([str(source), str(tmp_path / "there"), "--format", "awq"]) == 2
    assert convert.main([str(tmp_path / "nowhere/x/y"), str(tmp_path / "z"), "--format", "awq"]) == 5
    assert "convert: there is no directory" in capsys.readouterr().err


@pytest.mark.parametrize(("free", "chosen"), [(1 << 30, "cuda"), (1 << 17, "cpu")])
def test_a_gpu_with_room_converts(tmp_path, monkeypatch, free, chosen):
    checkpoint = open_checkpoint(tiny.make(tmp_path / "source")[0])
    assert convert.device_for(checkpoint, None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("miniawq.hardware.device_memory", lambda device: SimpleNamespace(free=free))
    assert convert.device_for(checkpoint, None).type == chosen
    assert convert.device_for(checkpoint, "cpu").type == "cpu"


@pytest.mark.parametrize("format", DIRECTORIES)
def test_a_layer_takes_the_memory_that_the_choice_of_device_counts_on(tmp_path, monkeypatch, format):
    monkeypatch.setattr(packing, "WEIGHTS_AT_ONCE", 1 << 14)
    directory, _ = tiny.make(tmp_path / "source", changes={"hidden_size": 512, "intermediate_size": 1024})
    checkpoint = open_checkpoint(directory)
    name = "model.layers.0.mlp.down_proj"
    packed = set() if format == "dense" else {name}
    with Allocations() as allocations:
        list(convert._tensors(checkpoint, name, "packed", format, packed, CPU))
    per_weight = allocations.peak / (512 * 1024)
    assert convert.BYTES_A_WEIGHT / 2 < per_weight < convert.BYTES_A_WEIGHT
