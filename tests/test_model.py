"""The decoder against transformers' logits, against itself with a cache, and what it refuses."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from miniawq.checkpoint import loading
from miniawq.checkpoint.config import llama_config, text_of
from miniawq.checkpoint.loading import HALVES, DenseLinear, load_model, loaded_dtype
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.errors import UnsupportedCheckpoint
from miniawq.model import KVCache, Llama, attention, rope_tables
from miniawq.text.tokenizer import Tokenizer
from tests.helpers import MODELS
from tests.helpers.golden_models import MOST_THOROUGHLY, NAMES, ONE_OF_EACH_FOLD


def config_of(name: str) -> dict:
    return text_of(json.loads((MODELS / name / "config.json").read_text()), [])


def load(name: str, device: torch.device | str = "cpu") -> Llama:
    return load_model(open_checkpoint(MODELS / name), torch.device(device), torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name, device):
    reference = load_file(MODELS / name / "reference.safetensors")
    with torch.no_grad():
        logits_BLV = load(name, device)(reference["tokens"].to(device)).cpu()
    error = (logits_BLV - reference["logits"]).norm() / reference["logits"].norm()
    assert error < 2e-5


@pytest.mark.parametrize("name", ONE_OF_EACH_FOLD)
def test_narrower_matrices_compute_what_wide_ones_do(name, device):
    tokens_BL = torch.arange(22, device=device).view(2, 11) % 50
    narrow, wide = load(name, device), load(name, device).float()
    assert narrow.lm_head.weight.dtype == torch.bfloat16
    assert narrow.dtype == wide.lm_head.weight.dtype == torch.float32
    with torch.no_grad():
        expected, found = wide(tokens_BL), narrow(tokens_BL)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (33, 64)])
@pytest.mark.parametrize("weights", [1, 64 * 7, 1 << 20])
def test_a_narrow_weight_is_multiplied_in_slices(weights, shape, bias, monkeypatch, device):
    """Of a few rows in tasks, of more in a loop."""
    monkeypatch.setattr(loading, "WEIGHTS_PER_SLICE", weights)
    monkeypatch.setattr(loading, "WEIGHTS_PER_TASK", weights)
    layer, x = DenseLinear(64, 24, bias, device=device).requires_grad_(False), torch.randn(shape, device=device)
    layer.weight.data = layer.weight.half()
    found, expected = layer(x), torch.nn.functional.linear(x, layer.weight.float(), layer.bias)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found.shape == expected.shape


def test_a_head_is_multiplied_from_its_copy_until_it_changes(monkeypatch):
    monkeypatch.setattr(loading, "FEWEST_OUTPUTS_PACKED", 24)
    layer, x_TI = DenseLinear(64, 24).requires_grad_(False), torch.randn(2, 64)
    layer.weight.data = layer.weight.bfloat16()
    expected = torch.nn.functional.linear(x_TI, layer.weight.float(), layer.bias)
    packed = layer.prepare().packed
    torch.testing.assert_close(layer(x_TI), expected, rtol=0, atol=1e-5)
    assert layer.prepare().packed is packed
    layer.packed = packed._replace(exponent=packed.exponent + 1)
    torch.testing.assert_close(layer(x_TI) - layer.bias, (expected - layer.bias) / 2, rtol=0, atol=1e-5)
    torch.testing.assert_close(layer(x_TI.repeat(20, 1))[:2], expected, rtol=0, atol=1e-5)
    for x in (x_TI[0], torch.randn(2, 3, 64), torch.randn(64, 5).t(), torch.randn(3, 2, 64)[:, -1], torch.randn(0, 64)):
        layer.packed = packed
        expected_y = torch.nn.functional.linear(x, layer.weight.float(), layer.bias)
        torch.testing.assert_close(layer(x), expected_y, rtol=0, atol=1e-5)
    layer.load_state_dict({"weight": -layer.weight, "bias": layer.bias})
    torch.testing.assert_close(layer(x_TI) - layer.bias, layer.bias - expected, rtol=0, atol=1e-5)
    assert layer.prepare().packed is not None
    assert layer.float().packed is None
    assert layer.prepare().packed is None


def test_only_matrices_of_16_bits_are_narrower_than_the_model():
    kept = {
        (stored, dimensions, dtype)
        for stored in (*HALVES, torch.float32, torch.float64, torch.int8, torch.float8_e4m3fn)
        for dimensions in (1, 2)
        for dtype in (*HALVES, torch.float32)
        if loaded_dtype(stored, dimensions, dtype) != dtype
    }
    assert kept == {(stored, 2, torch.float32) for stored in HALVES}


@pytest.mark.parametrize("name", ONE_OF_EACH_FOLD)
def test_any_split_of_the_prompt_gives_what_no_cache_gives(name, device):
    model = load(name, device)
    tokens_BL = load_file(MODELS / name / "reference.safetensors")["tokens"].to(device)
    with torch.no_grad():
        whole = model(tokens_BL)
        for cuts in ((1, 2, 3, 40), (7, 40), (39, 40), tuple(range(1, 41))):
            cache = KVCache(model.config, 2, 40, device=device)
            parts = [model(tokens_BL[:, a:b], cache) for a, b in zip((0, *cuts), cuts, strict=False)]
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=2e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("name", MOST_THOROUGHLY)
def test_left_padded_rows_give_what_single_rows_give(name, device):
    model = load(name, device)
    tokens_BL = load_file(MODELS / name / "reference.safetensors")["tokens"].to(device)
    padding = 13
    padded_BL = tokens_BL.clone()
    padded_BL[1] = torch.cat((torch.full((padding,), 5, device=device), tokens_BL[1, :-padding]))
    cache = KVCache(model.config, 2, 40, device=device, padding_B=torch.tensor([0, padding], device=device))
    with torch.no_grad():
        together = torch.cat([model(part, cache) for part in padded_BL.split([30, 1, 9], dim=1)], 1)
        alone = model(tokens_BL)
    torch.testing.assert_close(together[0], alone[0], rtol=0, atol=2e-5 * float(alone.abs().max()))
    torch.testing.assert_close(together[1, padding:], alone[1, :-padding], rtol=0, atol=2e-5 * float(alone.abs().max()))


@given(batch=st.integers(1, 2), shared=st.integers(1, 3), readers=st.integers(1, 4), new=st.integers(1, 5))
def test_grouped_attention_is_attention_with_repeated_keys(batch, shared, readers, new):
    q, k, v = (torch.randn(batch, heads, new, 4) for heads in (shared * readers, shared, shared))
    mask = torch.rand(batch, 1, new, new) < 0.7
    mask |= torch.eye(new, dtype=torch.bool)
    k_all, v_all = k.repeat_interleave(readers, 1), v.repeat_interleave(readers, 1)
    scores = (q @ k_all.transpose(2, 3) / 2).masked_fill(~mask, -torch.inf).softmax(-1)
    torch.testing.assert_close(attention(q, k, v, mask), scores @ v_all)
    causal = torch.ones(new, new, dtype=torch.bool).tril()
    scores = (q @ k_all.transpose(2, 3) / 2).masked_fill(~causal, -torch.inf).softmax(-1)
    torch.testing.assert_close(attention(q, k, v, None), scores @ v_all)


@pytest.mark.parametrize("name", NAMES)
def test_both_spellings_of_the_rotary_embedding_are_read(name):
    new = config_of(name)
    scaling, old = dict(new["rope_parameters"]), {key: new[key] for key in new.keys() - {"rope_parameters"}}
    if local := scaling.get("sliding_attention"):
        scaling, old = dict(scaling["full_attention"]), old | {"rope_local_base_freq": local["rope_theta"]}
    old["rope_theta"] = scaling.pop("rope_theta")
    kind = scaling.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {"type": kind, **scaling}
    assert llama_config(old) == llama_config(new)


def test_a_qwen_window_holds_only_where_it_is_switched_on():
    config = config_of("qwen2-window")
    assert llama_config(config).layer_windows == (None, 8)
    del config["layer_types"]
    assert llama_config(config).layer_windows == (None, 8)
    config["use_sliding_window"] = False
    assert llama_config(config).layer_windows == (None, None)
    assert llama_config(config_of("mistral-window")).layer_windows == (8, 8)
    assert llama_config(config_of("llama") | {"sliding_window": 8}).layer_windows == (None, None)


def test_queries_grow_by_a_step_with_each_original_context():
    """Ministral 3: where it is not said how much, or after how many positions, nothing grows or the file is refused."""
    config = config_of("ministral3")
    rope = llama_config(config).rope
    *_, growth_M1 = rope_tables(rope, torch.arange(40), 40, torch.float32)
    expected_M = [1 + 0.1 * math.log(1 + position // 16) for position in range(40)]
    torch.testing.assert_close(growth_M1.flatten(), torch.tensor(expected_M))
    config["rope_parameters"]["llama_4_scaling_beta"] = 0.0
    assert len(rope_tables(llama_config(config).rope, torch.arange(40), 40, torch.float32)) == 2
    config["rope_parameters"] = {"rope_type": "default", "llama_4_scaling_beta": 0.1}
    with pytest.raises(UnsupportedCheckpoint, match="original_max_position_embeddings = None"):
        llama_config(config)


def test_of_a_model_of_text_and_pictures_the_text_is_read():
    """The outer config decides what it states: the head is there although the inner one would tie it."""
    checkpoint = open_checkpoint(MODELS / "mistral3-pictures")
    assert checkpoint.config["architectures"] == ["Ministral3ForCausalLM"]
    assert "this model reads pictures too" in checkpoint.notices[0]
    assert not [name for name in checkpoint.tensors if "vision" in name or "projector" in name]
    config = json.loads((MODELS / "mistral3-pictures" / "config.json").read_text())
    config["text_config"]["model_type"] = "gemma"
    with pytest.raises(UnsupportedCheckpoint, match="model_type = 'gemma'; supported: mistral, ministral3"):
        text_of(config, [])


def test_a_config_may_leave_out_what_is_usual_in_its_family():
    """As the one of gemma-3-4b-it, which states what differs from the class's defaults."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    text |= {"query_pre_attn_scalar": None, "rope_parameters": None}
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {"hidden_size": 8}}
    found = llama_config(text_of(outer | {"text_config": text}, []))
    assert (found.num_attention_heads, found.num_key_value_heads, found.head_dim) == (8, 4, 256)
    assert (found.vocab_size, found.tie_word_embeddings, found.hidden_act) == (262208, True, "gelu_pytorch_tanh")
    assert (found.embedding_multiplier, found.attention_multiplier, found.norm_offset) == (2560**0.5, 1 / 16, 1.0)
    assert found.layer_windows[:7] == (1024,) * 5 + (None, 1024)
    whole, local = found.layer_ropes[5], found.layer_ropes[0]
    assert (whole.rope_type, whole.factor, whole.rope_theta) == ("linear", 8.0, 1e6)
    assert (local.rope_type, local.factor, local.rope_theta) == ("default", 1.0, 1e4)


def test_attention_of_granite_is_scaled_by_one_if_nothing_is_said():
    config = {key: value for key, value in config_of("granite").items() if key != "attention_multiplier"}
    assert llama_config(config).attention_multiplier == 1.0


def test_frequencies_are_those_of_the_longest_text_that_finds_room():
    """A text that grows past the original context keeps all its keys turned by one set of frequencies."""
    model = load("phi3-long")
    tokens_BL = load_file(MODELS / "phi3-long" / "reference.safetensors")["tokens"][:, :12]
    with torch.no_grad():
        short, long = (model(tokens_BL, KVCache(model.config, 2, room)) for room in (16, 17))
        assert torch.equal(short, model(tokens_BL))
    assert not torch.allclose(short, long, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "architectures = ['GemmaForCausalLM']"),
        ({"architectures": None}, "architectures = ['missing']"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"hidden_size": None}, "hidden_size = None; the key is missing"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers = 2.5; expected a positive integer"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3; 4 query heads do not divide among them"),
        ({"head_dim": 7}, "head_dim = 7"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.short_factor = None; expected 4 numbers"),
        ({"rope_parameters": None, "rope_scaling": {"type": "su"}}, "rope_scaling.rope_type = 'su'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor = None; rope_type linear needs it"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"full": {"rope_theta": 1.0}, "sliding": {"rope_theta": 2.0}}}, "layers with different"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_key(change, said):
    with pytest.raises(UnsupportedCheckpoint) as caught:
        llama_config(config_of("llama") | change)
    assert said in str(caught.value)


def test_the_demo_model_predicts_english(fairytales):
    checkpoint = open_checkpoint(fairytales)
    model = load_model(checkpoint, torch.device("cpu"), torch.float32)
    ids = Tokenizer(fairytales).encode("Once upon a time there was a")
    tokens = torch.tensor([ids])
    with torch.no_grad():
        loss = cross_entropy(model(tokens)[0, 2:-1], tokens[0, 3:])
    assert loss < 1
