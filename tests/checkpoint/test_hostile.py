"""Hostile directories: each ends in a MiniawqError of three lines, or loads and computes numbers; never anything else.

The cases of the fuzz tests are enumerated. Every STRIDE-th is run, the same ones each time, and in `make test` every
tenth of these. `MINIAWQ_STRIDE=1` in the environment runs them all.
"""

import copy
import json
import math
import os
import random
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from miniawq.__main__ import main
from miniawq.checkpoint import hub, strict
from miniawq.checkpoint.config import CONFIG, FOREIGN_KEYS, ROPE
from miniawq.checkpoint.loading import load_model
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.commands.evaluate import evaluate
from miniawq.errors import InvalidInput, MiniawqError, NotFound, UnsupportedCheckpoint
from miniawq.generate import generate
from tests.helpers import ROOT
from tests.helpers import tiny_checkpoints as tiny
from tests.helpers.marks import each_once
from tests.helpers.verbs import ARGUMENTS, command
from tests.reliability.directories import use

STRIDE = int(os.environ.get("MINIAWQ_STRIDE", "9"))
STRIDES = [pytest.param(STRIDE, marks=pytest.mark.thorough), 10 * STRIDE]
SECONDS, BYTES = 3.0, 256 << 20  # that one hostile directory may take
Q = "model.layers.0.self_attn.q_proj"


def outcome(directory: Path) -> str:
    """ "loads", or the error of a directory, which comes soon and takes little memory."""
    memory, started = psutil.Process().memory_info().rss, time.monotonic()
    try:
        use(directory)
        said = "loads"
    except MiniawqError as error:
        said = str(error)
        assert 2 <= len(said.splitlines()) <= 3, said
        assert len(said) < 5000, said
    assert time.monotonic() - started < SECONDS
    assert psutil.Process().memory_info().rss - memory < BYTES
    return said


def sampled(cases: Iterator[Any], stride: int) -> list[Any]:
    return [case for number, case in enumerate(cases) if number % stride == 0]


VALUES = (
    None, True, False, "false", "", "x" * 5000, [], [None], [[]], ["x"], {}, {"x": {}}, {"type": 1}, 0, 1, 2, -1,
    -0.5, 0.5, 1e-300, 1e300, 4096, 20_000, 2**31, 2**63, 10**400,
)  # fmt: skip
QUANTIZATION = [(key,) for key in (*tiny.AWQ_BLOCK, "w_bit", "sym", "dynamic", "desc_act", "format", "config_groups")]
COMPRESSED = [
    *((key,) for key in (*tiny.CT_BLOCK, "sparsity_config", "transform_config")),
    ("config_groups", "group_0"),
    *(("config_groups", "group_0", key) for key in ("weights", "format", "input_activations")),
    *(("config_groups", "group_0", "weights", key) for key in (*tiny.CT_WEIGHTS, "actorder", "dynamic")),
]
KEYS = {
    "awq": [
        *((key,) for key in (*CONFIG, *FOREIGN_KEYS, "quantization", "compression_config", "text_config")),
        *(("rope_scaling", key) for key in ROPE),
        ("quantization_config",),
        *(("quantization_config", *path) for path in QUANTIZATION),
    ],
    "compressed-tensors": [("quantization_config", *path) for path in COMPRESSED],
}
ROPES = [
    {"rope_type": kind, "factor": 2.0, "original_max_position_embeddings": 32}
    for kind in ("linear", "dynamic", "llama3", "yarn")
]


def configs(config: dict[str, Any], paths: list[tuple[str, ...]]) -> Iterator[tuple[tuple[str, ...], Any, str]]:
    for path in paths:
        for rope in ROPES if path[0] == "rope_scaling" else ROPES[:1]:
            for value in VALUES:
                changed = copy.deepcopy(config | ({"rope_scaling": rope} if path[0] == "rope_scaling" else {}))
                place = changed
                for key in path[:-1]:
                    place = place[key]
                place[path[-1]] = value
                yield path, value, json.dumps(changed)
    for whole in VALUES:
        yield (), whole, json.dumps(whole)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("layout", KEYS)
def test_every_key_of_a_config_may_have_any_value(layout, stride, tmp_path):
    directory, _ = tiny.make(tmp_path / "it", layout=layout)
    config = json.loads((directory / "config.json").read_text())
    for path, value, text in sampled(configs(config, KEYS[layout]), stride):
        (directory / "config.json").write_text(text)
        said = outcome(directory)
        assert said == "loads" or "config" in said or "tensor" in said, (path, value, said)


def headers(content: bytes) -> Iterator[bytes]:
    length = int.from_bytes(content[:8], "little")
    picked = random.Random(0)
    for place in range(8 + length):
        yield content[:place] + bytes([picked.choice(b'\x00\xff"[]{}:,0123456789-eU')]) + content[place + 1 :]
    for cut in range(0, 8 + length, 16):
        yield content[:cut]
        yield content[:cut] + content[cut + 16 :]
    header, values = json.loads(content[8 : 8 + length]), content[8 + length :]
    for name in header:
        for key in ("dtype", "shape", "data_offsets"):
            for value in (*VALUES, [0], [0, 1], [1, 0], [-1, 4], [0, 2**63], ["0", "4"], "F8_E4M3", "BOOL", "I64"):
                yield file_of(json.dumps({**header, name: {**header[name], key: value}}).encode(), values)
    yield file_of(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", values)


def file_of(header: bytes, values: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + values


@pytest.mark.parametrize("stride", STRIDES)
def test_every_byte_of_a_header_may_be_another_one(stride, tmp_path):
    directory, _ = tiny.make(tmp_path, changes={"num_hidden_layers": 1})
    file = directory / "model.safetensors"
    for content in sampled(headers(file.read_bytes()), stride):
        file.write_bytes(content)
        outcome(directory)


def four_bytes_at(*starts: int) -> bytes:
    entries = {f"x{start}": {"dtype": "U8", "shape": [4], "data_offsets": [start, start + 4]} for start in starts}
    return json.dumps(entries).encode()


HEADERS = {
    "short-offsets": b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[4]}}',
    "no-offsets": b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[]}}',
    "backwards": b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
    "overlapping": four_bytes_at(0, 2),
    "holes": four_bytes_at(0, 6),
    "overlapping-to-the-end": (
        b'{"x":{"dtype":"U8","shape":[40],"data_offsets":[0,40]},"y":{"dtype":"U8","shape":[40],"data_offsets":[24,64]}}'
    ),
    "not-all-of-the-file": four_bytes_at(0, 4),
    "no-name-of-a-dtype": b'{"x":{"dtype":[],"shape":[64],"data_offsets":[0,64]}}',
    "beyond-the-file": four_bytes_at(2**53),
    "huge-shape": b'{"x":{"dtype":"U8","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,4]}}',
    "deep": b'{"x":' + b"[" * 10**6,
    "deep-metadata": b'{"__metadata__":' + b'{"a":' * 10**5 + b"1" + b"}" * 10**5 + b"}",
    "null": b"null",
    "list": b"[[[]]]",
    "not-utf-8": b'{"\xff\xfe":1}',
}


@pytest.mark.parametrize("size", [2**63, 2**49])
def test_a_dimension_that_no_tensor_has_is_refused(size, tmp_path):
    """Beside a 0 it takes no bytes, and so every header may state it."""
    directory, _ = tiny.make(tmp_path)
    entry = {"dtype": "F32", "shape": [0, size], "data_offsets": [0, 0]}
    (directory / "model.safetensors").write_bytes(file_of(json.dumps({"model.norm.weight": entry}).encode()))
    assert f"has the shape [0, {size}]" in outcome(directory)


@pytest.mark.parametrize(("dtype", "size"), [("U64", 8), ("C64", 8), ("F8_E8M0", 1), ("U16", 2)])
def test_dtypes_that_no_checkpoint_has_are_refused(dtype, size, tmp_path):
    directory, _ = tiny.make(tmp_path)
    entry = {"dtype": dtype, "shape": [1], "data_offsets": [0, size]}
    header = json.dumps({"model.norm.weight": entry}).encode()
    (directory / "model.safetensors").write_bytes(file_of(header, bytes(size)))
    assert f"this checkpoint is in {dtype} form" in outcome(directory)


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_make_no_sense_are_refused(kind, tmp_path):
    directory, _ = tiny.make(tmp_path)
    (directory / "model.safetensors").write_bytes(file_of(HEADERS[kind], bytes(64)))
    assert "model.safetensors is damaged" in outcome(directory)


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_of_files_that_cannot_be_mapped_have_to_make_sense_too(kind, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(HEADERS[kind], bytes(64)))
    with pytest.raises(UnsupportedCheckpoint, match=r"model\.safetensors is damaged"):
        strict.header_unmapped(path)


@pytest.mark.parametrize("stride", STRIDES)
def test_what_the_library_reads_is_read_alike_where_a_file_cannot_be_mapped(stride, tmp_path):
    directory, _ = tiny.make(tmp_path, changes={"num_hidden_layers": 1})
    file = directory / "model.safetensors"
    for content in sampled(headers(file.read_bytes()), stride):
        file.write_bytes(content)
        try:
            expected = hub.LocalFiles(directory).header(file.name)
        except MiniawqError:
            continue
        assert strict.header_unmapped(file) == expected


def test_an_index_may_hold_anything(tmp_path):
    directory, _ = tiny.make(tmp_path, shards=2)
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    name = next(iter(index["weight_map"]))
    changed = [*VALUES, *({"weight_map": value} for value in VALUES)]
    changed += [{"weight_map": index["weight_map"] | {name: value}} for value in (*VALUES, "..", "\x00.safetensors")]
    for value in changed:
        file.write_text(json.dumps(value))
        assert outcome(directory) != "loads"


# name: changes to config.json, words of the message
NONSENSE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "infinite-base": ({"rope_theta": 1e300}, ["rope_theta = 1e+300", "a number from 1.01 to 1e+15"]),
    "negative-factor": ({"rope_scaling": {"type": "linear", "factor": -2.0}}, ["rope_scaling: factor = -2.0"]),
    "scaling-without-type": ({"rope_scaling": {"factor": 2.0}}, ["rope_scaling.rope_type", "factor say nothing"]),
    "type-beside-nested": ({"rope_scaling": {"type": "linear", "factor": 2.0, "x": {}}}, ["different rotary"]),
    "llama3-equal-bounds": (
        {"rope_scaling": {"type": "llama3", "factor": 2.0, "low_freq_factor": 4.0}},
        ["rope_scaling.low_freq_factor = 4.0", "high_freq_factor is 4.0"],
    ),
    "yarn-bounds": (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_slow": 64.0}},
        ["rope_scaling.beta_slow = 64.0", "beta_fast is 32.0"],
    ),
    "no-window": ({"sliding_window": 0}, ["sliding_window = 0", "positive integer"]),
    "negative-window": ({"sliding_window": -8}, ["sliding_window = -8"]),
    "part-of-a-window": ({"sliding_window": 8.5}, ["sliding_window = 8.5"]),
    "tied-in-words": ({"tie_word_embeddings": "false"}, ["tie_word_embeddings = 'false'", "true or false"]),
    "quantization-list": ({"quantization_config": [4]}, ["quantization_config = [4]", "an object"]),
    "quantization-text": ({"quantization_config": "awq"}, ["quantization_config = 'awq'"]),
    "dtype-number": ({"dtype": 16}, ["dtype = 16", "a text"]),
    "epsilon": ({"rms_norm_eps": 0}, ["rms_norm_eps = 0"]),
    "keys-by-case": ({"quantization_config": {**tiny.AWQ_BLOCK, "BITS": 8}}, ["differ only in their case"]),
    "20000-layers": ({"num_hidden_layers": 20_000}, ["num_hidden_layers = 20000", "up to 1024"]),
    "1000-layers": ({"num_hidden_layers": 1000}, ["num_hidden_layers = 1000", "tensors of 2"]),
    "2^31-layers": ({"num_hidden_layers": 2**31}, ["num_hidden_layers = 2147483648"]),
    "half-of-the-layers": ({"num_hidden_layers": 1}, ["tensors", "layers.1."]),
    "vocabulary": ({"vocab_size": 49}, ["model.embed_tokens.weight [48, 128] for [49, 128]"]),
    "2^31-words": ({"vocab_size": 2**31}, ["vocab_size = 2147483648"]),
    "biases-denied": ({"architectures": ["Qwen2ForCausalLM"]}, ["missing", "q_proj.bias"]),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_values_that_make_no_sense_are_refused(kind, tmp_path):
    changes, words = NONSENSE[kind]
    directory, _ = tiny.make(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    architectures = ["MistralForCausalLM"] if "sliding_window" in changes else config["architectures"]
    (directory / "config.json").write_text(json.dumps(config | {"architectures": architectures} | changes))
    said = outcome(directory)
    assert all(word in said for word in words), said


@pytest.mark.parametrize("text", ['{"rope_theta": 1e400}', '{"x": Infinity}', '{"x": -Infinity}', '{"x": NaN}'])
def test_numbers_that_are_not_finite_are_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnsupportedCheckpoint, match="no finite JSON number"):
        strict.parse_json(tmp_path / "config.json")


@pytest.mark.parametrize("content", [rb'{"bos_token": "\ud800"}', b'{"bos_token": "\xed\xa0\x80"}'])
def test_half_of_a_surrogate_pair_is_no_text(content, tmp_path):
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(UnsupportedCheckpoint, match="surrogates not allowed"):
        strict.parse_json(tmp_path / "tokenizer_config.json")
    (tmp_path / "tokenizer_config.json").write_bytes(rb'{"x": "\ud83d\udc4b"}')
    assert strict.parse_json(tmp_path / "tokenizer_config.json") == {"x": "\U0001f44b"}


@pytest.mark.parametrize("text", ["[" * 100 + "]" * 100, '{"a":' * 100 + "1" + "}" * 100, "[" * 10**6])
def test_deep_json_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnsupportedCheckpoint, match=r"config\.json cannot be read"):
        strict.parse_json(tmp_path / "config.json")


def test_a_key_that_is_there_twice_among_many_is_found_soon(tmp_path):
    names = [f'"{number}": 0' for number in range(200_000)]
    (tmp_path / "config.json").write_text("{" + ",".join([*names, names[-1]]) + "}")
    started = time.monotonic()
    with pytest.raises(UnsupportedCheckpoint, match="'199999' is there twice"):
        strict.parse_json(tmp_path / "config.json")
    assert time.monotonic() - started < SECONDS


def test_the_limits_are_those_of_the_guide():
    guide = (ROOT / "docs" / "checkpoints.md").read_text()
    rows = [line for line in guide.splitlines() if line.endswith(" MiB |")]
    for pattern, limit in [
        *((f"`{name}`", limit) for name, limit in strict.LIMITS.items()),
        ("only", strict.COPIED_LIMIT),
    ]:
        assert [row for row in rows if pattern in row and row.endswith(f"| {limit >> 20} MiB |")], pattern


LARGE = ("config.json", "model.safetensors.index.json", "quant_config.json")


@pytest.mark.parametrize("name", LARGE)
def test_large_files_are_refused_before_they_are_read(name, tmp_path):
    directory, _ = tiny.make(tmp_path, shards=2)
    with open(directory / name, "ab") as file:
        file.truncate(3 << 30)  # sparse: it takes no room on the disk
    said = outcome(directory)
    assert f"{name} is too large" in said
    assert str(3 << 30) in said


def test_a_header_longer_than_the_limit_is_refused_before_it_is_read(tmp_path):
    directory, _ = tiny.make(tmp_path)
    with open(directory / "model.safetensors", "r+b") as file:
        file.write(struct.pack("<Q", 3 << 30))
        file.truncate(4 << 30)
    assert "the header of model.safetensors is too large" in outcome(directory)


def test_what_may_not_be_read_is_said(tmp_path, monkeypatch):
    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    directory, _ = tiny.make(tmp_path)
    monkeypatch.setattr("builtins.open", forbidden)
    with pytest.raises(NotFound, match="Permission denied"):
        open_checkpoint(directory)


def edited(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(directory / "model.safetensors")), directory / "model.safetensors")


def cast(name: str, dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: tensors | {name: tensors[name].to(dtype)}


NO_NUMBERS = (torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)
SMALL = ("model.norm.weight", "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize(("name", "dtype"), each_once((*SMALL, f"{Q}.scales", f"{Q}.bias"), NO_NUMBERS))
def test_dtypes_that_hold_no_weights_are_refused(name, dtype, tmp_path):
    directory, _ = tiny.make(tmp_path, family="llama-biased")
    edited(directory, cast(name, dtype))
    assert name.rpartition(".")[0] in outcome(directory)


@pytest.mark.parametrize("part", ["weight_scale", "weight_shape"])
def test_dtypes_of_compressed_tensors_are_checked(part, tmp_path):
    directory, _ = tiny.make(tmp_path, layout="compressed-tensors")
    edited(directory, cast(f"{Q}.{part}", torch.int16 if part == "weight_scale" else torch.float32))
    assert Q in outcome(directory)


@pytest.mark.parametrize("values", [[0, 0], [-128, -128], [2**62, 2], [128, 127], [256, 64]])
def test_odd_values_of_weight_shape_are_refused(values, tmp_path):
    directory, _ = tiny.make(tmp_path, layout="compressed-tensors")
    edited(directory, lambda tensors: tensors | {f"{Q}.weight_shape": torch.tensor(values)})
    assert f"{Q}.weight_shape" in outcome(directory)


@pytest.mark.parametrize("groups", [3, 5, 200])
def test_groups_that_do_not_divide_the_inputs_are_refused(groups, tmp_path):
    directory, _ = tiny.make(tmp_path, layout="compressed-tensors-symmetric", block={}, grid="symmetric")
    edited(directory, lambda tensors: tensors | {f"{Q}.weight_scale": torch.ones(128, groups)})
    assert Q in outcome(directory)


def spoilt(value: float, name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name].view(-1)[-1] = value
        return tensors

    return change


NAMES = (*SMALL, f"{Q}.scales", f"{Q}.bias")


@pytest.mark.parametrize(("name", "value"), each_once(NAMES, (math.nan, math.inf, -math.inf)))
def test_values_that_are_not_finite_name_their_tensor(value, name, tmp_path):
    directory, _ = tiny.make(tmp_path, family="llama-biased")
    edited(directory, spoilt(value, name))
    checkpoint = open_checkpoint(directory)
    for run in (load_model, lambda opened: evaluate(opened, tiny.TOKENS)):
        with pytest.raises(UnsupportedCheckpoint, match=rf"{name} has values that are not finite"):
            run(checkpoint)


def test_values_that_float16_does_not_hold_are_not_loaded_in_it(tmp_path):
    directory, _ = tiny.make_dense(tmp_path)
    edited(directory, spoilt(70_000.0, SMALL[0]))
    checkpoint = open_checkpoint(directory)
    assert load_model(checkpoint, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(InvalidInput, match=r"model\.norm\.weight has a value beyond 65504"):
        load_model(checkpoint, dtype=torch.float16)


def test_ids_beyond_the_vocabulary_are_the_tokenizers_fault(tmp_path):
    checkpoint = open_checkpoint(tiny.make(tmp_path)[0])
    tokens_BL = tiny.TOKENS + 45
    with pytest.raises(InvalidInput, match="the tokenizer belongs to another model"):
        evaluate(checkpoint, tokens_BL)
    with pytest.raises(InvalidInput, match="use the tokenizer of this model"):
        list(generate(load_model(checkpoint), tokens_BL, max_tokens=1))


def with_tokenizer(directory: Path, fairytales: Path, change: Callable[[Path], None] = lambda path: None) -> Path:
    """A copy of the dense demo model, changed."""
    shutil.copytree(fairytales, directory)
    change(directory)
    return directory


def without(name: str) -> Callable[[Path], None]:
    return lambda path: edited(path, lambda tensors: {key: t for key, t in tensors.items() if key != name})


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))

    return change


NORM = "model.layers.1.post_attention_layernorm.weight"
# name: what is done to a good directory, words of the message
DOOR: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "nan": (lambda path: edited(path, spoilt(math.nan, NORM)), [NORM, "not finite"]),
    "integers": (lambda path: edited(path, cast(NORM, torch.int32)), [NORM, "I32"]),
    "missing-norm": (without(NORM), ["missing", NORM]),
    "missing-projection": (without("model.layers.1.mlp.up_proj.weight"), ["missing", "up_proj"]),
    "biases": (lambda path: edited(path, lambda t: t | {f"{Q}.bias": torch.ones(256)}), ["unexpected", f"{Q}.bias"]),
    "half-of-the-layers": (configured(num_hidden_layers=3), ["config.json", "layers.3."]),
    "more-layers": (configured(num_hidden_layers=7), ["num_hidden_layers = 7"]),
    "vocabulary": (configured(vocab_size=2047), ["model.embed_tokens.weight"]),
    "config-null": (lambda path: (path / "config.json").write_text("null"), ["config.json", "expected an object"]),
    "config-list": (lambda path: (path / "config.json").write_text("[1]"), ["config.json", "expected an object"]),
}


@pytest.mark.parametrize("kind", DOOR)
@pytest.mark.parametrize("verb", ARGUMENTS)
def test_what_one_verb_refuses_all_refuse(verb, kind, fairytales, tmp_path, capsys):
    change, words = DOOR[kind]
    directory = with_tokenizer(tmp_path / "it", fairytales, change)
    if verb == "plan" and kind == "nan":
        pytest.skip("plan reads no values")
    if verb == "convert":  # it takes packed ones
        shutil.rmtree(directory)
        shutil.copytree(hub.DEMO, directory)
        change(directory)
        words = [word for word in words if word not in ("I32", "unexpected")]
        if kind == "missing-projection":
            pytest.skip("a packed layer that is missing is in test_refusals.py")
    assert main([*command(verb, directory, tmp_path), *(["--num-samples", "1"] if verb == "quantize" else [])]) == 3
    told = capsys.readouterr()
    assert all(word in told.err for word in words), told.err
    assert not (tmp_path / "out").exists() or not (tmp_path / "out" / "config.json").exists()


def test_a_file_that_is_replaced_while_it_is_in_use_is_an_error(tmp_path):
    directory, _ = tiny.make(tmp_path)
    checkpoint = open_checkpoint(directory)
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(UnsupportedCheckpoint, match=r"model\.safetensors was changed while it was in use"):
        evaluate(checkpoint, tiny.TOKENS)


def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    """Nothing is mapped while a checkpoint is streamed: the system would end a process that reads what was cut off."""
    directory, _ = tiny.make(tmp_path)
    checkpoint = open_checkpoint(directory)
    monkeypatch.setattr("miniawq.checkpoint.reading.map_tensor", None)
    assert math.isfinite(evaluate(checkpoint, tiny.TOKENS).perplexity)
    monkeypatch.setattr(checkpoint.files, "unchanged", lambda name: None)
    os.truncate(directory / "model.safetensors", 20_000)
    with pytest.raises(UnsupportedCheckpoint, match=r"ends within|was changed while"):
        evaluate(checkpoint, tiny.TOKENS)


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-that-name/x/y", "a/" * 3000])
def test_names_that_no_system_has_are_not_found(name):
    with pytest.raises(NotFound):
        open_checkpoint(name)
