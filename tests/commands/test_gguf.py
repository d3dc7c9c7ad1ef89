"""Files for llama.cpp: every weight within the bound of its blocks, read back by the package `gguf` alone."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from miniawq.__main__ import main
from miniawq.checkpoint.families import FAMILIES as CLASSES
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.commands import gguf_file
from miniawq.commands.convert import convert_checkpoint
from miniawq.commands.gguf_file import BLOCK_KINDS, encode_q4_1, largest_move
from miniawq.errors import InvalidInput, MiniawqError, UnsupportedCheckpoint, UsageError
from miniawq.model import apply_rope, rope_tables
from miniawq.packing import Quantized, dequantize
from tests.helpers import tiny_checkpoints as tiny
from tests.helpers import tiny_tokenizers
from tests.helpers.marks import thorough_but

ROWS = 512  # of the embedding: the small tokenizers have fewer tokens
KIND = gguf.GGMLQuantizationType


def make(directory: Path, changes: dict[str, Any] | None = None, **packing: Any) -> Path:
    """A small checkpoint with a tokenizer."""
    source, _ = tiny.make(directory, changes={"vocab_size": ROWS} | (changes or {}), **packing)
    tokenizer_config = {"eos_token": "</s>", "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    tiny_tokenizers.write(source, tiny_tokenizers.byte_level(), tokenizer_config=tokenizer_config)
    return source


def converted(source: Path, name: str = "model.gguf") -> gguf.GGUFReader:
    convert_checkpoint(source, source.parent / name, "gguf")
    return gguf.GGUFReader(source.parent / name)


def weights(reader: gguf.GGUFReader) -> dict[str, Tensor]:
    """The numbers of a file, as the package itself reads them."""
    return {
        tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).reshape(
            *tensor.shape.tolist()[::-1]
        )
        for tensor in reader.tensors
    }


def value(reader: gguf.GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def test_every_scale_and_zero_moves_its_weights_within_the_bound():
    """All zeros and codes, all fractions of a float16 scale, subnormal, and with exponents at both ends and between.

    The bound is met, and nothing moves where the product is a float16.
    """
    exponents = torch.tensor([0, 1, 2, 15, 26, 29, 30], dtype=torch.int16)
    bits = ((exponents << 10).unsqueeze(1) + torch.arange(1024, dtype=torch.int16)).flatten()[1:]
    attained = 0.0
    for zero in range(16):
        scales_O1 = bits.view(torch.float16).unsqueeze(1)
        scales_O1 = scales_O1[zero * scales_O1.double() <= 65504].unsqueeze(1)
        codes_OI = torch.arange(32, dtype=torch.uint8).fmod(16).expand(len(scales_O1), -1)
        quantized = Quantized(codes_OI, scales_O1, torch.full_like(scales_O1, zero, dtype=torch.uint8))
        stored_OI = torch.tensor(gguf.dequantize(encode_q4_1(quantized).numpy(), KIND.Q4_1)).double()
        ours_OI = (codes_OI.double() - zero) * scales_O1.double()
        moved_O = (stored_OI - ours_OI).abs().amax(1)
        product_O = zero * scales_O1.double().squeeze(1)
        assert (moved_O <= product_O * 2**-11).all()
        exact = product_O.half().double() == product_O
        assert (moved_O[exact] == 0).all()
        assert (moved_O[~exact] > 0).all()
        assert exact.all() == (zero in (0, 1, 2, 4, 8))
        attained = max(attained, float((moved_O / scales_O1.double().squeeze(1)).max()))
        assert largest_move(quantized, "Q4_1") == pytest.approx(float((moved_O / scales_O1.squeeze(1).double()).max()))
    assert 0.0072 < attained <= 15 * 2**-11


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_other_scales_are_rounded_once(scale_dtype):
    """A weight moves by at most 15 rounding errors of its scale and one of the smallest number."""
    torch.manual_seed(0)
    scales_OG = (torch.rand(300, 2) * 20 - 17).exp2().to(scale_dtype)
    quantized = Quantized(
        torch.randint(16, (300, 128), dtype=torch.uint8), scales_OG, torch.randint(16, (300, 2), dtype=torch.uint8)
    )
    stored_OI = torch.tensor(gguf.dequantize(encode_q4_1(quantized).numpy(), KIND.Q4_1)).double()
    moved_OG = (stored_OI - dequantize(quantized, torch.float64)).abs().unflatten(1, (2, 64)).amax(-1)
    steps_OG = 0 if scale_dtype == torch.bfloat16 else 15 * (scales_OG * 2**-11).clamp(min=2**-25)
    assert (moved_OG <= steps_OG + (quantized.zeros_OG * scales_OG.double() * 2**-11).clamp(min=2**-25)).all()
    assert (moved_OG / scales_OG).max() <= largest_move(quantized, "Q4_1") + 1e-12


def test_a_number_beyond_float16_is_refused():
    quantized = Quantized(
        torch.zeros(1, 32, dtype=torch.uint8), torch.tensor([[6e4]]).half(), torch.full((1, 1), 2, dtype=torch.uint8)
    )
    with pytest.raises(InvalidInput, match="does not fit"):
        encode_q4_1(quantized)


PACKINGS = {
    "awq": {},
    "bf16-scales": {"scale_dtype": torch.bfloat16, "stored": torch.bfloat16},
    "float16-rest": {"stored": torch.float16},
    "compressed-tensors": {"layout": "compressed-tensors"},
    "symmetric": {"grid": "symmetric"},
    "groups-of-32": {"group_size": 32, "block": tiny.AWQ_BLOCK | {"group_size": 32}},
    "groups-of-16": {"group_size": 16, "block": tiny.AWQ_BLOCK | {"group_size": 16}},
    "packed-head": {"also": ("lm_head",)},
    "one-group-a-row": {"group_size": -1, "block": tiny.AWQ_BLOCK | {"group_size": -1}},
}
WRITTEN = [name for name in tiny.FAMILIES if tiny.config_of(name)["architectures"][0] in gguf_file.ARCHITECTURES]
ALIKE = {
    "ministral": ("mistral", {"architectures": ["MinistralForCausalLM"]}),
    "granite": ("granite4", {"architectures": ["GraniteForCausalLM"], "logits_scaling": 8.0}),
    "seed-oss": ("llama", {"architectures": ["SeedOssForCausalLM"]}),
    "hunyuan": ("qwen3", {"architectures": ["HunYuanDenseV1ForCausalLM"]}),
    "smollm3": ("llama", {"architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 4}),
    "exaone4": ("olmo2", {"architectures": ["Exaone4ForCausalLM"], "head_dim": 32}),
    "ernie": ("llama", {"architectures": ["Ernie4_5ForCausalLM"]}),
    "glm": ("glm4", {"architectures": ["GlmForCausalLM"]}),
}
FAMILIES = {name: {"family": name} for name in WRITTEN}
SOURCES = (
    PACKINGS | FAMILIES | {name: {"family": family, "changes": changes} for name, (family, changes) in ALIKE.items()}
)


@pytest.mark.parametrize(
    "kind", thorough_but(["awq", "symmetric", "groups-of-16", "packed-head", "llama-tied", "qwen3"], SOURCES)
)
def test_a_file_holds_the_weights_of_its_checkpoint(tmp_path, kind):
    packing = SOURCES[kind]
    source = make(tmp_path / "source", **packing)
    reader, checkpoint = converted(source), open_checkpoint(source)
    found, config = weights(reader), checkpoint.model_config
    (kind,) = [kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == value(reader, "general.architecture")]
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, stored in read_all(checkpoint).items():
        module, _, leaf = name.rpartition(".")
        got = found.pop(f"{names.get_name(module)}.{leaf}")
        if kind.name in ("LLAMA", "GRANITE", "SMOLLM3") and (count := heads.get(module.rpartition(".")[2])):
            got = got.unflatten(0, (count, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        quantized = checkpoint.read_linear(module) if leaf == "weight" and module in checkpoint.quantized else None
        if isinstance(quantized, Quantized) and packing.get("group_size") == 16:
            assert torch.equal(got, dequantize(quantized).float())
        elif isinstance(quantized, Quantized) and packing.get("grid") != "symmetric":
            moved_OG = (got - stored).abs().double().unflatten(1, (-1, quantized.group_size)).amax(-1)
            assert (moved_OG <= quantized.zeros_OG * quantized.scales_OG.double() * 2**-11).all()
        else:
            assert torch.equal(got, stored.float()), name
    assert not found


def read_all(checkpoint) -> dict[str, Tensor]:
    """The weights of a checkpoint; packed ones as their codes stand for them, in float32."""
    parts = {part for linear in checkpoint.quantized.values() for part in linear.tensors.values()}
    dense = {name: checkpoint.read(name) for name in checkpoint.tensors if name not in parts}
    packed = {
        f"{name}.weight": dequantize(checkpoint.read_linear(name), torch.float32) for name in checkpoint.quantized
    }
    return dense | packed


def test_symmetric_codes_take_the_smaller_blocks(tmp_path):
    source = make(tmp_path / "source", grid="symmetric")
    report = convert_checkpoint(source, tmp_path / "model.gguf", "gguf")
    assert (report.layout, report.largest_move, report.packed_linears) == ("Q4_0", 0.0, 14)
    kinds = {tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds == {KIND.Q4_0, KIND.F32}


def test_groups_that_no_block_fits_into_become_dense(tmp_path):
    source = make(tmp_path / "source", **PACKINGS["groups-of-16"])
    report = convert_checkpoint(source, tmp_path / "model.gguf", "gguf")
    assert (report.packed_linears, len(report.unpacked_linears)) == (0, 14)
    assert {tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors} == {KIND.F16, KIND.F32}


def test_a_head_of_its_own_is_kept(tmp_path):
    """config.json ties it to the embedding, and another one is stored."""
    source, reference = tiny.make_with_its_own_head(tmp_path / "source")
    tiny_tokenizers.write(source, vocabulary_of(48))
    head = weights(converted(source))["output.weight"]
    assert torch.equal(head, reference.lm_head.weight)


def vocabulary_of(tokens: int) -> str:
    """A byte-level tokenizer.json cut to its first tokens."""
    description = json.loads(tiny_tokenizers.byte_level())
    kept = {token: token_id for token, token_id in description["model"]["vocab"].items() if token_id < tokens}
    return json.dumps(description | {"model": description["model"] | {"vocab": kept, "merges": []}})


def test_neighbours_turn_as_halves_do():
    """Queries and keys in llama.cpp's order, turned as it turns them, have the products that ours have."""
    config = open_checkpoint(None).model_config
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    torch.manual_seed(0)
    positions_L = torch.arange(5)
    cos_LE, sin_LE = rope_tables(config.rope, positions_L, 5, torch.float32)

    def neighbours(x_BHLE: Tensor) -> Tensor:
        cos, sin = cos_LE[:, size // 2 :], sin_LE[:, size // 2 :]
        first, second = x_BHLE.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)

    turned = {}
    for module, count in (("q_proj", heads), ("k_proj", kv_heads)):
        outputs = torch.randn(5, count * size)
        reordered = gguf_file._turned(config, f"x.{module}", outputs.t()).t()
        ours = apply_rope(
            outputs.unflatten(1, (count, size)).transpose(0, 1).unsqueeze(0), (cos_LE, sin_LE), config.rope
        )
        turned[module] = ours, neighbours(reordered.unflatten(1, (count, size)).transpose(0, 1).unsqueeze(0))
    for query, key in zip(turned["q_proj"], turned["k_proj"], strict=True):
        turned.setdefault("products", []).append(query[:, :kv_heads] @ key.transpose(-1, -2))
    torch.testing.assert_close(*turned["products"], rtol=1e-5, atol=1e-4)


def test_keys_of_the_model_and_its_tokenizer(tmp_path):
    changes = {"sliding_window": 40, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}
    reader = converted(make(tmp_path / "source", family="mistral", changes=changes))
    expected = {
        "general.architecture": "llama",
        "llama.context_length": 40,  # llama.cpp has no window there
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 5e5,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 2.0,
        "llama.vocab_size": ROWS,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    assert expected == {key: value(reader, key) for key in expected}
    assert len(value(reader, "tokenizer.ggml.tokens")) == ROWS


def test_llama_3_frequencies_are_a_tensor(tmp_path):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 64, "rope_theta": 1e4}
    source = make(tmp_path / "source", changes={"rope_parameters": rope})
    factors = weights(converted(source))["rope_freqs.weight"]
    assert factors.shape == (16,)
    assert (factors[0], factors[-1]) == (1, 8)
    assert ((factors >= 1) & (factors <= 8)).all()


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", {"rope_type": "dynamic", "factor": 2.0}),
        ("phi3", {"rope_type": "linear", "factor": 2.0}),
        ("qwen2", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        ("qwen2", {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0}),
        ("qwen2", {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0}),
    ],
)
def test_a_rotary_embedding_that_llama_cpp_lacks_is_refused(tmp_path, family, rope):
    rope |= {"original_max_position_embeddings": 32, "rope_theta": 1e4}
    source = make(tmp_path / "source", family=family, changes={"rope_parameters": rope})
    with pytest.raises(UnsupportedCheckpoint, match="rotary embedding"):
        converted(source)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_switches_of_granite_are_keys(tmp_path):
    switches = {"embedding_multiplier": 12.0, "attention_multiplier": 0.25, "residual_multiplier": 0.5}
    changes = {"architectures": ["GraniteForCausalLM"], "logits_scaling": 8.0, **switches}
    reader = converted(make(tmp_path / "source", changes=changes))
    keys = ("embedding_scale", "attention.scale", "residual_scale", "logit_scale")
    assert [value(reader, f"granite.{key}") for key in keys] == [12.0, 0.25, 0.5, 8.0]


def test_layers_without_positions_are_where_llama_cpp_has_them():
    """In SmolLM3 every fourth."""
    rope = open_checkpoint(None).model_config.rope
    config = replace(open_checkpoint(None).model_config, architecture="SmolLM3ForCausalLM", num_hidden_layers=4)
    places = {place: (rope,) * place + (replace(rope, rotary_dim=0),) + (rope,) * (3 - place) for place in range(4)}
    assert gguf_file.architecture_there(replace(config, layer_ropes=places.pop(3))).name == "smollm3"
    for layer_ropes in (*places.values(), (rope,) * 4):
        with pytest.raises(UnsupportedCheckpoint, match="rotary embedding"):
            gguf_file.architecture_there(replace(config, layer_ropes=layer_ropes))


def test_divisors_of_longrope_are_tensors(tmp_path):
    """For the part of each head that is turned; llama.cpp chooses by the room of the context, as we do."""
    short, long = [1.0 + place / 16 for place in range(12)], [2.0 + place for place in range(12)]
    rope = {"rope_type": "longrope", "partial_rotary_factor": 0.75, "short_factor": short, "long_factor": long}
    changes = {"rope_parameters": rope, "original_max_position_embeddings": 16}
    source = make(tmp_path / "source", family="phi3", changes=changes)
    reader, attention_factor = converted(source), open_checkpoint(source).model_config.rope.attention_factor
    found = weights(reader)
    assert found["rope_factors_short.weight"].tolist() == short
    assert found["rope_factors_long.weight"].tolist() == long
    assert value(reader, "phi3.rope.dimension_count") == 24
    assert value(reader, "phi3.rope.scaling.original_context_length") == 16
    assert value(reader, "phi3.rope.scaling.attn_factor") == pytest.approx(attention_factor) != 1.0


@pytest.mark.parametrize("architecture", sorted(CLASSES.keys() - gguf_file.ARCHITECTURES.keys()))
def test_a_family_without_a_name_there_is_refused(architecture):
    config = replace(open_checkpoint(None).model_config, architecture=architecture)
    with pytest.raises(UnsupportedCheckpoint, match=f"{architecture} is none of Llama"):
        gguf_file.architecture_there(config)


def test_a_switch_that_llama_cpp_lacks_is_refused():
    """Also one of an architecture that it knows, and one for some layers alone."""
    config = open_checkpoint(None).model_config
    assert gguf_file.architecture_there(config).name == "llama"
    other, layers = replace(config.rope, rope_theta=5.0), len(config.layer_ropes)
    ropes = replace(config.rope, interleaved=True), replace(config.rope, llama_4_scaling_beta=0.1)
    switched = [{"residual_multiplier": 0.5}, {"hidden_act": "gelu"}, {"layer_ropes": (config.rope, other)}]
    for changes in switched + [{"rope": rope, "layer_ropes": (rope,) * layers} for rope in ropes]:
        with pytest.raises(UnsupportedCheckpoint, match="cannot be written for llama"):
            gguf_file.architecture_there(replace(config, **changes))


def test_a_byte_that_the_disk_changes_is_seen(tmp_path, monkeypatch):
    source = make(tmp_path / "source")
    close = gguf.GGUFWriter.close

    def damaging(writer: gguf.GGUFWriter) -> None:
        path = writer.path
        close(writer)
        with open(path, "r+b") as file:
            file.seek(-40, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-40, os.SEEK_END)
            file.write(bytes([byte ^ 1]))

    monkeypatch.setattr(gguf.GGUFWriter, "close", damaging)
    with pytest.raises(MiniawqError, match="the written file is wrong"):
        converted(source)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_existing_file_is_left_alone(tmp_path):
    source = make(tmp_path / "source")
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        converted(source)
    assert (tmp_path / "model.gguf").read_text() == "mine"


def test_the_command_line_tells_how_far_weights_move(tmp_path, capsys):
    assert main(["convert", str(make(tmp_path / "source")), str(tmp_path / "model.gguf"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["layout"] == "Q4_1"
    assert 0 < report["largest_move"] <= 15 * 2**-11
    assert set(BLOCK_KINDS) == {"Q4_0", "Q4_1"}


def test_without_a_format_the_destination_must_say_it(tmp_path, capsys):
    assert main(["convert", str(make(tmp_path / "source")), str(tmp_path / "there")]) == 2
    assert "give --format awq|compressed-tensors|dense|gguf" in capsys.readouterr().err


def test_without_the_package_the_command_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    assert main(["convert", str(make(tmp_path / "source")), str(tmp_path / "model.gguf")]) == 2
    assert 'pip install "miniawq[gguf]"' in capsys.readouterr().err
    assert not (tmp_path / "model.gguf").exists()
