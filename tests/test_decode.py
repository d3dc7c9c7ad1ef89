"""The decode step against the model it abbreviates, compiled and not, and what it must never do: compile again."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from miniawq import arrange, attend, decode, products
from miniawq.attend import block_attention, blocks_of, first_seen, mask_of, spans_of
from miniawq.checkpoint import load_model, open_checkpoint
from miniawq.completion import EagerStart, generate, last_logits
from miniawq.decode import DecodeStep
from miniawq.errors import InvalidInput
from miniawq.kernel import QuantLinear
from miniawq.layer import most_probable
from miniawq.model import DenseLinear, KVCache, Llama, LlamaConfig, attention, dense
from miniawq.packing import quantize
from miniawq.products import multiply, prepare, prepare_normed, products_of
from miniawq.sampling import NOT_A_NUMBER, Sampling, sample

GOLDEN = Path(__file__).parent / "golden" / "models"
NAMES = sorted(path.name for path in GOLDEN.iterdir())
PROMPT, NEW = 9, 12


def load(name: str, device: torch.device) -> Llama:
    return load_model(open_checkpoint(GOLDEN / name), device, torch.float32)


def int4_model(device: torch.device, group_size: int = 32) -> Llama:
    """Random codes in every layer but the head: two layers, four heads on two, qk-norm, biases."""
    config = json.loads((GOLDEN / "qwen3" / "config.json").read_text()) | {"attention_bias": True, "hidden_size": 64}
    config |= {"intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}

    def linear(name: str, inputs: int, outputs: int, bias: bool) -> nn.Module:
        if name == "lm_head":
            return dense(name, inputs, outputs, bias)
        weight_OI, bias_O = torch.randn(outputs, inputs) * inputs**-0.5, torch.randn(outputs) if bias else None
        return QuantLinear.from_quantized(quantize(weight_OI, group_size), bias_O)

    torch.manual_seed(1)
    return Llama(LlamaConfig.from_dict(config), linear).to(device).requires_grad_(False)


def random_prompt(model: Llama, batch: int, length: int = PROMPT) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (batch, length), device=model.lm_head.weight.device)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_the_step_gives_the_tokens_and_logits_of_the_model(name, batch, device):
    model = load(name, device)
    tokens_BL, exact = random_prompt(model, batch), load(name, device)
    room = min(PROMPT + NEW, model.config.max_position_embeddings)
    step, cache = DecodeStep(model, batch, room, compile_=False), KVCache(exact.config, batch, 32, device=device)
    step.begin(tokens_BL)
    with torch.no_grad():
        ids_B = last_logits(model, tokens_BL, step.cache).argmax(-1)
        last_logits(exact, tokens_BL, cache)
        # Beyond the trained length, where no text may end, NTK scaling turns old keys by their own time's frequencies.
        for _ in range(min(NEW, model.config.max_position_embeddings - PROMPT)):
            expected_BV = last_logits(exact, ids_B[:, None], cache)
            ids_B = step.step(ids_B)
            torch.testing.assert_close(step.logits_BV, expected_BV, rtol=0, atol=2e-5 * float(expected_BV.abs().max()))
            assert torch.equal(ids_B, expected_BV.argmax(-1))


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-window"])
def test_padded_rows_and_any_split_of_the_prompt_give_the_same(name, device):
    model = load(name, device)
    tokens_BL, padding_B = random_prompt(model, 3), torch.tensor([0, 4, 8], device=device)
    options = {"max_tokens": NEW, "padding_B": padding_B}
    expected = list(generate(model, tokens_BL, **options))
    for chunk in (1, 5, 100):
        step = DecodeStep(model, 3, PROMPT + NEW, compile_=False)
        assert list(generate(model, tokens_BL, decoder=step, prefill_chunk=chunk, **options)) == expected


@pytest.mark.parametrize("look", [None, blocks_of])
def test_the_compiled_step_gives_the_same_and_never_compiles_again(look, device, monkeypatch, tmp_path):
    """Compiled by a thread while the model writes, taken over in the middle of a text, used by this thread since."""
    monkeypatch.setenv("MINIAWQ_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    if look:
        monkeypatch.setattr(decode, "looking_on", lambda *_: look)
    model = int4_model(device)
    first, second = EagerStart(model, DecodeStep(model, 2, 32)), DecodeStep(model, 2, 64)
    graphs = None
    for step, length in [(first, 5), (first, 1), (second, 50), (first, 20), (second, 1)]:
        tokens_BL = random_prompt(model, 2, length)
        expected = list(generate(model, tokens_BL, max_tokens=NEW))
        found = []
        for number, ids in enumerate(generate(model, tokens_BL, max_tokens=NEW, decoder=step)):
            found.append(ids)
            if number == NEW // 2 and first.is_compiling:
                first.wait()
        assert found == expected
        assert first.compiled.is_ready
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        graphs = graphs or compiled
        assert compiled == graphs, f"compiled again at a prompt of {length}"
    assert first.ahead == 0


@pytest.mark.parametrize("sampling", [
    Sampling(temperature=0.8, top_p=0.9),
    Sampling(temperature=1.2, top_k=7, repetition_penalty=1.3),
    Sampling(presence_penalty=2.0, frequency_penalty=0.5),
])  # fmt: skip
def test_a_seed_gives_the_same_text_as_without_the_step(sampling, device):
    model = load("llama", device)
    tokens_BL = random_prompt(model, 2)
    options = {"max_tokens": NEW, "sampling": sampling, "seed": 3}
    step = DecodeStep(model, 2, PROMPT + NEW, sampling, compile_=False)
    expected = list(generate(model, tokens_BL, **options))
    for _ in range(2):
        assert list(generate(model, tokens_BL, decoder=step, **options)) == expected
    if sampling.temperature:
        assert list(generate(model, tokens_BL, decoder=step, **options | {"seed": 4})) != expected


def test_the_last_position_is_used_and_the_next_refused(device):
    model = load("llama", device)
    step = DecodeStep(model, 1, 4, compile_=False)
    ids_B = torch.tensor([1], device=device)
    step.begin(ids_B[:, None])
    for _ in range(4):
        ids_B = step.step(ids_B)
    with pytest.raises(InvalidInput, match="room for 4 positions"):
        step.step(ids_B)


def test_a_row_that_is_not_a_number_leaves_the_others_alone(device):
    model = load("llama", device)
    tokens_BL = random_prompt(model, 2)
    step = DecodeStep(model, 2, PROMPT + 2, compile_=False)

    def two_steps(first: float, ids_B: torch.Tensor) -> torch.Tensor:
        step.begin(tokens_BL)
        last_logits(model, tokens_BL, step.cache)
        step.cache.values_NBMJE[:, 0, 0] = first
        return step.step(step.step(ids_B))

    ids_B = torch.tensor([NOT_A_NUMBER, 3], device=device)
    with torch.no_grad():
        broken_B, whole_B = two_steps(torch.nan, ids_B), two_steps(0.0, ids_B)
    assert broken_B.tolist() == [NOT_A_NUMBER, int(whole_B[1])]


@pytest.mark.parametrize("vocab_size", [7, 96, 1024])
def test_the_greedy_choice_in_two_steps_is_that_of_sampling(vocab_size, device):
    # Few different values, so that the largest is there several times.
    logits_BV = torch.randint(6, (16, vocab_size), device=device).float()
    logits_BV[0] = -torch.inf
    logits_BV[1, vocab_size // 2] = torch.nan
    logits_BV[2, -1] = torch.inf
    assert torch.equal(most_probable(logits_BV), sample(logits_BV, Sampling()))


@pytest.mark.parametrize(("rows", "groups", "form"), [
    (2, 112, "REDUCE"), (3, 112, "DOT"), (3, 64, "REDUCE"), (4, 32, "DOT"), (256, 32, "DOT"), (257, 32, "EXPAND"),
])  # fmt: skip
def test_the_form_on_cuda_goes_by_rows_and_groups(rows, groups, form):
    assert products._form_for(torch.device("cuda"), rows, groups) is getattr(products, form)


@pytest.mark.parametrize(("programs", "parts"), [(8, 16), (16, 8), (64, 8), (128, 4), (256, 2), (4096, 2)])
def test_keys_are_read_in_as_many_parts_as_keep_a_gpu_busy(programs, parts):
    assert attend.parts_for(programs) == parts


def test_a_library_matmul_is_never_compiled_with_the_options_of_the_forms():
    """With them Inductor would write it itself, by the tiles of `dot_planes`."""
    for form in (products.EXPAND, products.MANY_ROWS, products.LINEAR, products.sliced(32)):
        options = products.lower(torch.neg, [form]).options
        assert "triton.native_matmul" not in options
        assert options.keys() >= (arrange.EXPAND_IN_TILES.keys() if form is products.EXPAND else set())
    for form in (products.REDUCE, products.DOT, products.WORDS, products.ROWS, products.SUMMED, products.TILED):
        assert products.lower(torch.neg, [form, products.LINEAR]).options["triton.native_matmul"]


@pytest.mark.parametrize(("form", "rows"), [
    ("SUMMED", 1), ("TILED", 1), ("TILED", 5), ("TILED", 17), ("LINEAR", 1), ("LINEAR", 5), ("ROWS", 1), ("ROWS", 5),
])  # fmt: skip
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dense_forms_are_the_library_s_product(stored, form, rows, bias, monkeypatch, device):
    monkeypatch.setattr(products, "_dense_form_for", lambda *_: getattr(products, form))
    layer, x_TI = DenseLinear(64, 24, bias, device=device), torch.randn(rows, 64, device=device)
    layer.weight.data = layer.weight.data.to(stored)
    with torch.no_grad():
        expected, found = layer(x_TI), products_of([layer], rows)
        torch.testing.assert_close(multiply(found, prepare(found, x_TI)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("device", "outputs", "dtype", "rows", "form"), [
    ("cuda", 8, torch.float32, 1, "SUMMED"),
    ("cuda", 32768, torch.bfloat16, 2, "TILED"),
    ("cuda", 32768, torch.float16, 64, "TILED"),
    ("cuda", 32768, torch.bfloat16, 65, "LINEAR"),
    ("cuda", 32768, torch.float32, 2, "LINEAR"),
    ("cuda", 16384, torch.bfloat16, 2, "LINEAR"),
    ("cpu", 8, torch.bfloat16, 1, "ROWS"),
    ("cpu", 32768, torch.float32, 32, "ROWS"),
    ("cpu", 32768, torch.bfloat16, 33, "LINEAR"),
])  # fmt: skip
def test_the_dense_form_goes_by_device_rows_and_outputs(device, outputs, dtype, rows, form):
    assert products._dense_form_for(torch.device(device), outputs, dtype, rows) is getattr(products, form)


def test_matrices_of_one_input_lie_together_and_exist_once(device):
    model = load("qwen2", device)
    tokens_BL = random_prompt(model, 1)
    with torch.no_grad():
        before = model(tokens_BL)
        steps = [DecodeStep(model, batch, 16, compile_=False) for batch in (1, 2)]
        assert torch.equal(model(tokens_BL), before)
    attn, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    for linears in ((attn.q_proj, attn.k_proj, attn.v_proj), (mlp.gate_proj, mlp.up_proj)):
        assert len({linear.weight.untyped_storage().data_ptr() for linear in linears}) == 1
    (one, two) = (step.layers[0].qkv[0].tensors[0] for step in steps)
    assert one.data_ptr() == two.data_ptr() == attn.q_proj.weight.data_ptr()


@pytest.mark.parametrize("window", [None, 3])
def test_spans_blocks_and_masks_say_the_same(window, monkeypatch):
    monkeypatch.setattr(attend, "BLOCK", 4)
    padding_B, room = torch.tensor([0, 2, 6]), 10
    for position in range(6, room):
        position_1 = torch.tensor([position])
        first_B = first_seen(position_1, padding_B, window)
        spans, blocks = spans_of(position_1, first_B, room), blocks_of(position_1, first_B, room)
        slot_T = torch.arange(3 * room)
        for row, mask_M in enumerate(mask_of(position_1, first_B, room)[:, 0, 0]):
            seen_M = torch.arange(room)[mask_M]
            assert seen_M.tolist() == list(range(max(padding_B[row], position + 1 - (window or room)), position + 1))
            start = spans.starts_B1[row]
            seen_T = (slot_T >= start) & (slot_T < start + spans.used_B[row])
            assert torch.equal(slot_T[seen_T], seen_M + row * room)
            table_N = blocks.index_B11N[row, 0, 0, : blocks.count_B11[row]]
            assert table_N.tolist() == sorted({int(place) // 4 for place in seen_M})


@pytest.mark.parametrize("heads", [4, 8])
def test_attention_by_blocks_is_attention(heads):
    rows, room, position_1 = 2, 150, torch.tensor([140])
    first_B = torch.tensor([3, 129])
    q_BHE = torch.randn(rows, heads, 16)
    keys_BMJE, values_BMJE = torch.randn(2, rows, room, 4, 16)
    expected = attention(
        q_BHE.unsqueeze(2), keys_BMJE.transpose(1, 2), values_BMJE.transpose(1, 2), mask_of(position_1, first_B, room)
    )
    attended = block_attention(q_BHE, keys_BMJE, values_BMJE, blocks_of(position_1, first_B, room))
    torch.testing.assert_close(attended, expected.squeeze(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("form", "rows"), [("WORDS", 1), ("WORDS", 5), ("REDUCE", 1), ("REDUCE", 3), ("DOT", 20)])
@pytest.mark.parametrize("bias", [False, True])
def test_forms_compute_the_layers_behind_the_norm(form, rows, bias, monkeypatch):
    monkeypatch.setattr(products, "_form_for", lambda *_: getattr(products, form))
    monkeypatch.setattr(arrange, "wants_planes", lambda _: form != "WORDS")
    layers = [
        QuantLinear.from_quantized(quantize(torch.randn(outputs, 256), 128), torch.randn(outputs) if bias else None)
        for outputs in (48, 16)
    ]
    h_TI, norm_I, eps = torch.randn(rows, 256) * 3, torch.rand(256) + 0.5, 0.5
    x_TI = nn.functional.rms_norm(h_TI, (256,), norm_I, eps)
    expected = torch.cat([layer(x_TI) for layer in layers], -1)
    (product,) = found = products_of(layers, rows)
    assert product.form is getattr(products, form)
    limit = 1e-5 * float(expected.abs().max())
    for prepared in (prepare_normed(found, h_TI, norm_I, eps), prepare(found, x_TI)):
        torch.testing.assert_close(multiply(found, prepared), expected, rtol=0, atol=limit)


@pytest.mark.parametrize(("form", "is_late"), [("DOT", False), ("REDUCE", True)])
def test_a_norm_behind_a_product_does_not_overflow_in_float16(form, is_late, monkeypatch):
    """Products of a large residual stream with the norm's weight, which the norm itself makes small."""
    monkeypatch.setattr(products, "_form_for", lambda *_: getattr(products, form))
    monkeypatch.setattr(arrange, "wants_planes", lambda _: True)
    found = products_of([QuantLinear.from_quantized(quantize(torch.randn(32, 256), 128))], 3)
    h_TI, norm_I = torch.full((3, 256), 3e4).half(), torch.full((256,), 4.0).half()
    prepared = prepare_normed(found, h_TI, norm_I, 1e-5)
    assert (prepared.means_TC is not None) == is_late
    assert multiply(found, prepared).isfinite().all()


def assert_multiplied_one_by_one(layers):
    x_TI = torch.randn(2, 64)
    found = products_of(layers, 2)
    assert len(found) == 2
    expected = torch.cat([layer(x_TI) for layer in layers], -1)
    limit = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(multiply(found, prepare(found, x_TI)), expected, rtol=0, atol=limit)


def test_layers_in_blocks_of_different_sizes_are_multiplied_one_by_one(monkeypatch):
    monkeypatch.setattr(arrange, "lanes_for", lambda outputs: 16 if outputs % 16 == 0 else 8)
    assert_multiplied_one_by_one(
        [QuantLinear.from_quantized(quantize(torch.randn(outputs, 64), 32)) for outputs in (32, 24)]
    )


def test_mixed_layers_are_multiplied_one_by_one():
    dense_, half = DenseLinear(64, 16), DenseLinear(64, 16)
    half.weight.data = half.weight.data.half()
    with torch.no_grad():
        for other in (half, QuantLinear.from_quantized(quantize(torch.randn(24, 64), 32))):
            assert_multiplied_one_by_one([dense_, other])
