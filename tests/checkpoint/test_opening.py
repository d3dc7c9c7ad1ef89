"""Every layout, dialect and family that loads gives the logits of the dense model with the same codes."""

import copy
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from miniawq.checkpoint import reading, strict
from miniawq.checkpoint.config import llama_config
from miniawq.checkpoint.layouts import LAYOUTS
from miniawq.checkpoint.loading import load_model
from miniawq.checkpoint.opening import meta_model, open_checkpoint
from miniawq.errors import UnsupportedCheckpoint
from miniawq.kernel import QuantLinear
from miniawq.packing import Quantized, dequantize
from tests.helpers import ROOT
from tests.helpers import tiny_checkpoints as tiny
from tests.helpers.marks import each_once
from tests.helpers.tiny_checkpoints import PACKINGS, TOKENS


def assert_loads(directory: Path, reference: torch.nn.Module, device: torch.device | str = "cpu") -> torch.nn.Module:
    model = load_model(open_checkpoint(directory), device, torch.float32)
    logits = model(TOKENS.to(device)).cpu()
    tolerance = 1e-5 if torch.device(device).type == "cpu" else 1e-3  # a GPU may multiply in TF32
    torch.testing.assert_close(logits, reference(TOKENS), rtol=tolerance, atol=tolerance)
    return model


@pytest.mark.parametrize(("packing", "family"), each_once(tuple(PACKINGS), tuple(tiny.FAMILIES)))
def test_layout_loads(tmp_path, packing, family, device):
    directory, reference = tiny.make(tmp_path, family=family, **PACKINGS[packing])
    model = assert_loads(directory, reference, device)
    names = model.config.names
    assert isinstance(model.get_submodule(f"model.layers.1.{names.mlp}.{names.down}"), QuantLinear)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_dense_loads(tmp_path, family):
    directory, reference = tiny.make_dense(tmp_path, family)
    assert_loads(directory, reference)


@pytest.mark.parametrize("family", ["llama-biased", "llama-tied", "qwen3"])
def test_matrices_of_16_bits_do_not_become_wider(tmp_path, family, device):
    checkpoint = open_checkpoint(tiny.make(tmp_path, family=family, stored=torch.float16)[0])
    model = load_model(checkpoint, device, torch.float32)
    for name, parameter in model.named_parameters():
        is_matrix, stored = parameter.dim() == 2, checkpoint.read(name)
        assert parameter.dtype == (stored.dtype if is_matrix else torch.float32), name
        assert torch.equal(parameter.cpu().float(), stored.float()), name
    assert {p.dtype for p in load_model(checkpoint, device, torch.bfloat16).parameters()} == {torch.bfloat16}


BLOCK = tiny.AWQ_BLOCK
OLD_BLOCK = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
DIALECTS = {
    "six-keys": BLOCK,
    "upper-case": BLOCK | {"version": "GEMM", "quant_method": "AWQ"},
    "transformers-4": BLOCK
    | {
        "backend": "autoawq",
        "do_fuse": False,
        "exllama_config": None,
        "fuse_max_seq_len": None,
        "modules_to_fuse": None,
    },
    "gptqmodel": {
        "bits": 4,
        "group_size": 64,
        "desc_act": False,
        "lm_head": False,
        "quant_method": "awq",
        "method": "awq",
        "format": "gemm",
        "checkpoint_format": "gemm",
        "pack_dtype": "int32",
        "sym": False,
        "meta": {"quantizer": ["gptqmodel:7.0"]},
        "dynamic": {"-:.*gate": {}},
    },
    "no-group-size": {"quant_method": "awq", "bits": 4},
    "exllama-kernel": BLOCK | {"version": "exllama"},
    "zero-point-false-but-stored": BLOCK | {"zero_point": False},
    "old-keys": {"quant_method": "awq", **OLD_BLOCK},
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_awq_dialect_loads(tmp_path, dialect):
    assert_loads(*tiny.make(tmp_path, block=DIALECTS[dialect]))


@pytest.mark.parametrize("file", ["quant_config.json", "quantize_config.json"])
def test_config_in_a_file_of_its_own_loads(tmp_path, file):
    directory, reference = tiny.make(tmp_path, block={})
    (directory / file).write_text(json.dumps(OLD_BLOCK))
    assert open_checkpoint(directory).quantization.where == file
    assert_loads(directory, reference)


@pytest.mark.parametrize("key", ["compression_config", "text_config"])
def test_config_at_another_key_loads(tmp_path, key):
    directory, reference = tiny.make(tmp_path, layout="compressed-tensors", block={})
    config = json.loads((directory / "config.json").read_text())
    config[key] = tiny.CT_BLOCK if key == "compression_config" else {"quantization_config": tiny.CT_BLOCK}
    (directory / "config.json").write_text(json.dumps(config))
    assert key in open_checkpoint(directory).quantization.where
    assert_loads(directory, reference)


@pytest.mark.parametrize("layout", ["awq", "gemv", "compressed-tensors"])
def test_no_config_at_all_loads_with_a_notice(tmp_path, layout, caplog):
    directory, reference = tiny.make(tmp_path, layout=layout, block={})
    assert_loads(directory, reference)
    assert "taken from the tensors" in caplog.text


def test_oldest_llama_config_loads(tmp_path):
    """LLaMA 1: no key/value heads, no rope_theta, a length under another name, and a dtype that is not the files'."""
    changes = {"num_key_value_heads": None, "max_sequence_length": 64, "max_position_embeddings": None}
    directory, reference = tiny.make(tmp_path, changes=changes | {"torch_dtype": "float64"})
    assert_loads(directory, reference)


def test_group_size_minus_one_is_whole_rows(tmp_path):
    directory, reference = tiny.make(tmp_path, block=BLOCK | {"group_size": -1}, group_size=-1)
    assert_loads(directory, reference)
    assert open_checkpoint(directory).quantized["model.layers.0.mlp.down_proj"].group_size == 256


def test_symmetric_without_zeros_means_eight(tmp_path):
    config = tiny.config_of() | {"quantization_config": BLOCK | {"zero_point": False}}
    reference = tiny.dense_model(config)
    tensors = tiny.pack_model(reference, grid="symmetric")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("qzeros")}
    assert_loads(tiny.write(tmp_path, config, kept), reference)


def test_padded_words_load(tmp_path):
    """An input size that is no multiple of eight: compressed-tensors fills the last word of each row."""
    changes = {"hidden_size": 84, "head_dim": 32, "intermediate_size": 92}
    directory, reference = tiny.make(tmp_path, **PACKINGS["compressed-tensors-channel"], changes=changes)
    model = assert_loads(directory, reference)
    assert isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Linear), "92 outputs do not fill words"
    assert isinstance(model.model.layers[0].self_attn.q_proj, torch.nn.Linear), "nor do groups of 84 inputs"
    assert open_checkpoint(directory).quantized["model.layers.0.mlp.down_proj"].in_features == 92


@pytest.mark.parametrize("layout", ["awq", "compressed-tensors"])
def test_quantized_head_loads(tmp_path, layout):
    directory, reference = tiny.make(tmp_path, layout=layout, also=("lm_head",))
    assert isinstance(assert_loads(directory, reference).lm_head, QuantLinear)


@pytest.mark.parametrize(
    "ignore",
    [
        ["lm_head", "model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj"],
        ["re:.*gate_proj$", "re:vision_tower.*"],
        ["language_model.lm_head", "model.language_model.layers.0.mlp.gate_proj", "re:^(?!.*language_model).*"],
        ["Embedding", "lm_head"],
        [],
        None,
    ],
    ids=["name", "re", "tower", "class", "empty", "null"],
)
def test_partly_quantized_loads(tmp_path, ignore):
    leave = ("model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj")
    block = tiny.CT_BLOCK | {"ignore": ignore}
    directory, reference = tiny.make(tmp_path, layout="compressed-tensors", block=block, leave=leave)
    model = assert_loads(directory, reference)
    assert isinstance(model.model.layers[1].mlp.gate_proj, torch.nn.Linear)


def test_groups_of_layers_with_settings_of_their_own_load(tmp_path):
    """Two recipes in one file, as llm-compressor writes them: the tensors tell which layer has which."""
    model = tiny.dense_model(tiny.config_of())
    linears = tiny.quantized_linears(model)
    mlp = tuple(name for name in linears if ".mlp." in name)
    attention = tuple(name for name in linears if ".mlp." not in name)
    first = tiny.pack_model(model, "compressed-tensors", 64, leave=mlp)
    second = tiny.pack_model(model, "compressed-tensors-symmetric", 32, grid="symmetric", leave=attention)
    tensors = {name: tensor for name, tensor in first.items() if ".mlp." not in name}
    tensors |= {name: tensor for name, tensor in second.items() if ".mlp." in name}
    weights = (tiny.CT_WEIGHTS | {"actorder": "static"}, tiny.CT_WEIGHTS | {"symmetric": True, "group_size": 32})
    targets = ["re:.*self_attn.*"], [*mlp]
    groups = {
        f"group_{number}": {"targets": names, "weights": values, "format": "pack-quantized"}
        for number, (names, values) in enumerate(zip(targets, weights, strict=True))
    }
    block = tiny.CT_BLOCK | {"config_groups": groups, "format": "mixed-precision"}
    directory = tiny.write(tmp_path / "mixed", tiny.config_of() | {"quantization_config": block}, tensors)
    assert_loads(directory, model)
    found = open_checkpoint(directory).quantized
    assert {(linear.group_size, linear.symmetric) for linear in found.values()} == {(64, False), (32, True)}


def test_shards_load(tmp_path):
    directory, reference = tiny.make(tmp_path, shards=3)
    save_file({"stale": torch.zeros(1)}, directory / "model-00004-of-00004.safetensors")
    save_file({"repeated": torch.zeros(1)}, directory / "consolidated.safetensors")
    assert_loads(directory, reference)


@pytest.mark.parametrize("name", ["awq_model_w4_g128.safetensors", "gptq_model-4bit-128g.safetensors"])
def test_file_under_another_name_loads(tmp_path, name):
    directory, reference = tiny.make(tmp_path)
    (directory / "model.safetensors").rename(directory / name)
    assert_loads(directory, reference)


def rewrite(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file(change(tensors), directory / "model.safetensors")


def test_names_without_the_prefix_load(tmp_path):
    directory, reference = tiny.make(tmp_path)
    rewrite(directory, lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    assert_loads(directory, reference)


def test_words_called_uint32_load(tmp_path):
    directory, reference = tiny.make(tmp_path)
    rewrite(directory, lambda t: {k: v.view(torch.uint32) if v.dtype == torch.int32 else v for k, v in t.items()})
    assert_loads(directory, reference)
    assert open_checkpoint(directory).read("model.layers.1.mlp.up_proj.qweight").dtype == torch.int32


def test_buffers_of_old_models_and_kv_scales_are_left_out(tmp_path, caplog):
    directory, reference = tiny.make(tmp_path)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16),
        "model.layers.0.self_attn.k_scale": torch.ones(1),
    }
    rewrite(directory, lambda tensors: tensors | extra)
    assert_loads(directory, reference)
    assert "k_scale" in caplog.text
    assert "inv_freq" not in caplog.text


def test_tied_head_stored_as_a_copy_is_shared_again(tmp_path):
    directory, reference = tiny.make(tmp_path, family="llama-tied")
    rewrite(directory, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    model = assert_loads(directory, reference)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tied_head_stored_with_other_values_is_kept(tmp_path, caplog):
    assert_loads(*tiny.make_with_its_own_head(tmp_path))
    assert "tie_word_embeddings" in caplog.text


def test_a_fetched_checkpoint_with_its_own_head_is_untied(tmp_path):
    """Whoever writes it anew takes config and tensors from here: the head must be in both."""
    checkpoint = open_checkpoint(tiny.make_with_its_own_head(tmp_path)[0])
    assert checkpoint.model_config.tie_word_embeddings
    fetched = checkpoint.fetched()
    assert fetched.config["tie_word_embeddings"] is False
    assert fetched.model_config.tie_word_embeddings is False
    assert "lm_head.weight" in dict(fetched.skeleton.named_parameters())
    tied = open_checkpoint(tiny.make(tmp_path / "tied", family="llama-tied")[0])
    assert tied.fetched() is tied


def test_a_packed_head_is_untied(tmp_path):
    """A reader that believed config.json would take the embedding instead."""
    untied, _ = tiny.make(tmp_path, also=("lm_head",))
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert open_checkpoint(untied).config["tie_word_embeddings"] is False


def test_head_that_is_nowhere_is_tied_when_the_config_does_not_say(tmp_path, caplog):
    directory, reference = tiny.make(tmp_path)
    reference.lm_head.weight = reference.model.embed_tokens.weight
    rewrite(directory, lambda t: {name: tensor for name, tensor in t.items() if name != "lm_head.weight"})
    assert_loads(directory, reference)
    assert "shares the embedding" in caplog.text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_read_linear_is_what_was_packed(tmp_path, layout):
    grid = "symmetric" if layout.endswith("symmetric") else "asymmetric"
    block = copy.deepcopy(PACKINGS["compressed-tensors-symmetric"]["block"]) if grid == "symmetric" else None
    directory, reference = tiny.make(tmp_path, layout=layout, grid=grid, block=block)
    checkpoint = open_checkpoint(directory)
    name = "model.layers.1.self_attn.k_proj"
    quantized = checkpoint.read_linear(name)
    assert isinstance(quantized, Quantized)
    assert torch.equal(dequantize(quantized, torch.float32), reference.get_submodule(name).weight)
    assert checkpoint.quantized[name].symmetric is (grid == "symmetric")
    assert torch.equal(checkpoint.read_linear("lm_head"), reference.lm_head.weight)


def test_opening_reads_no_values(tmp_path, monkeypatch):
    """Plans and refusals come before weights: only the headers are there to read."""
    directory, _ = tiny.make(tmp_path)
    monkeypatch.setattr("miniawq.checkpoint.reading.map_tensor", None)
    assert len(open_checkpoint(directory).quantized) == 14


def test_scales_that_are_not_finite_are_refused(tmp_path):
    directory, _ = tiny.make(tmp_path)
    name = "model.layers.1.mlp.up_proj.scales"
    rewrite(directory, lambda tensors: tensors | {name: tensors[name] * float("inf")})
    with pytest.raises(UnsupportedCheckpoint, match=r"up_proj\.scales has values that are not finite"):
        load_model(open_checkpoint(directory))


@pytest.mark.thorough
def test_opening_imports_no_compiler(tmp_path):
    """`torch._dynamo` takes seconds to import; nothing before the first token needs it."""
    directory, _ = tiny.make(tmp_path)
    code = (
        "import sys; from miniawq.checkpoint.opening import open_checkpoint as o; o(sys.argv[1]); print(*sys.modules)"
    )
    run = [sys.executable, "-c", code, str(directory)]
    loaded = subprocess.run(run, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert "torch._dynamo" not in loaded.stdout.split()


LOAD_AND_MEASURE = """
import sys, torch
from pathlib import Path
from miniawq.checkpoint.loading import load_model
from miniawq.checkpoint.opening import open_checkpoint

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

checkpoint = open_checkpoint(sys.argv[1])
before = memory("VmRSS")
model = load_model(checkpoint, dtype=getattr(torch, sys.argv[2]))
print(memory("VmHWM") - before, sum(tensor.nbytes for tensor in model.parameters()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux")
@pytest.mark.parametrize(("stored", "dtype", "copies"), [
    ("float32", "bfloat16", 1), ("float16", "bfloat16", 1), ("float16", "float32", 0), ("float16", "float16", 0),
])  # fmt: skip
@pytest.mark.thorough
def test_loading_holds_one_copy_of_what_changes(stored, dtype, copies, tmp_path):
    """The whole model once, and of the files no more than a tensor at a time; nothing if it is used as it is stored."""
    config = tiny.config_of(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, vocab_size=4096)
    model = meta_model(llama_config(config))
    kind = getattr(torch, stored)
    tiny.write(tmp_path, config, {name: torch.zeros(t.shape, dtype=kind) for name, t in model.state_dict().items()})
    run = [sys.executable, "-c", LOAD_AND_MEASURE, str(tmp_path), dtype]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    held, weights = map(int, done.stdout.split())
    largest = 4096 * 512 * 4
    assert 0.9 * copies * weights <= held < (weights + 2 * largest if copies else weights / 4)


@pytest.mark.parametrize("chunk", [1007, 1 << 20])
def test_tensors_read_in_chunks_are_those_of_the_file(chunk, tmp_path, monkeypatch, device):
    checkpoint = open_checkpoint(tiny.make(tmp_path)[0])
    monkeypatch.setattr(reading, "CHUNK_BYTES", chunk)
    reading.staging.cache_clear()
    for name, info in checkpoint.tensors.items():
        found = reading.read_tensor(checkpoint.files.local(info.file), info.key, info.dtype, info.shape, device)
        assert torch.equal(found, checkpoint.read(name, device))
    path = checkpoint.files.local(info.file)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UnsupportedCheckpoint, match="ends within"):
        [reading.read_tensor(path, info.key, info.dtype, info.shape, device) for info in checkpoint.tensors.values()]
    reading.staging.cache_clear()


def test_many_tensors_take_one_header_and_no_handles(tmp_path):
    """A thousand layers are thousands of tensors."""
    directory, _ = tiny.make(tmp_path, changes={"num_hidden_layers": 4})
    reading._places.cache_clear()
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    model = load_model(open_checkpoint(directory))
    assert reading._places.cache_info().misses == 1
    assert not before or len(set(os.listdir("/proc/self/fd")) - before) <= 1
    assert model(tiny.TOKENS).isfinite().all()


def test_a_file_larger_than_memory_is_read(tmp_path, monkeypatch):
    """The system refuses to map it; every tensor of it may still fit."""
    directory, _ = tiny.make(tmp_path)
    expected = load_model(open_checkpoint(directory))(tiny.TOKENS)

    def refuse(*_, **__):
        raise RuntimeError("unable to mmap 65809867288 bytes from file: Cannot allocate memory (12)")

    monkeypatch.setattr(strict, "safe_open", refuse)
    monkeypatch.setattr(torch.UntypedStorage, "from_file", refuse)
    assert torch.equal(load_model(open_checkpoint(directory))(tiny.TOKENS), expected)


def test_tensors_that_are_not_aligned_are_copied(tmp_path):
    header = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 4 + 1)
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + struct.pack("<ff", 1.5, -2.0))
    assert reading.map_tensor(path, "x", torch.float32, (2,)).tolist() == [1.5, -2.0]
