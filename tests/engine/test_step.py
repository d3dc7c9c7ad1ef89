"""The decode step against the model it abbreviates, compiled and not, and what it must never do: compile again."""

import json
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from miniawq.checkpoint.config import llama_config
from miniawq.checkpoint.loading import DenseLinear, load_model
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.compiled import Product, multiply, prepacked, prepare, products, shared_step
from miniawq.compiled.gpu_forms import in_whole_tiles, whole_rows
from miniawq.compiled.tables import reads_tables
from miniawq.engine import attend
from miniawq.engine.attend import block_attention, blocks_of, first_seen, mask_of
from miniawq.engine.layer import finish, most_probable
from miniawq.engine.sampling import NOT_A_NUMBER, Sampling, sample
from miniawq.engine.start import EagerStart, PlainStep, ready_for_steps
from miniawq.engine.step import DecodeStep
from miniawq.engine.weights import Weights
from miniawq.errors import InvalidInput, MiniawqError
from miniawq.generate import generate
from miniawq.hardware import threads
from miniawq.kernel import QuantLinear
from miniawq.model import KVCache, Llama, attention, dense_linear
from miniawq.packing import quantize
from tests.helpers import MODELS
from tests.helpers.golden_models import ONE_OF_EACH_FOLD
from tests.helpers.marks import thorough_but

PROMPT, NEW = 9, 12
PADDED = ("llama", "mistral-window", "qwen2-window", "hunyuan", "glm4", "exaone4", "phi3-long")


def load(name: str, device: torch.device) -> Llama:
    return load_model(open_checkpoint(MODELS / name), device, torch.float32)


def int4_model(device: torch.device, group_size: int = 32) -> Llama:
    """Random codes in every layer but the head: two layers, four heads on two, qk-norm, biases.

    Sums have more than eight terms where they can: Inductor writes shorter ones out, one inside the other, and takes
    minutes for them.
    """
    config = json.loads((MODELS / "qwen3" / "config.json").read_text()) | {"attention_bias": True, "hidden_size": 512}
    config |= {"intermediate_size": 768, "head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 2}

    def linear(name: str, inputs: int, outputs: int, bias: bool) -> nn.Module:
        if name == "lm_head":
            return dense_linear(name, inputs, outputs, bias)
        weight_OI, bias_O = torch.randn(outputs, inputs) * inputs**-0.5, torch.randn(outputs) if bias else None
        return QuantLinear.from_quantized(quantize(weight_OI, group_size), bias_O)

    torch.manual_seed(1)
    return Llama(llama_config(config), linear).to(device).requires_grad_(False)


def random_prompt(model: Llama, batch: int, length: int = PROMPT) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (batch, length), device=model.lm_head.weight.device)


@pytest.mark.parametrize("batch", thorough_but([3], [1, 3]))
@pytest.mark.parametrize("name", ONE_OF_EACH_FOLD)
def test_the_step_gives_the_tokens_and_logits_of_the_model(name, batch, device):
    model = load(name, device)
    tokens_BL, exact = random_prompt(model, batch), load(name, device)
    step = DecodeStep(model, batch, PROMPT + NEW, compiles=False)
    cache = KVCache(exact.config, batch, PROMPT + NEW, device=device)
    step.begin(tokens_BL)
    with torch.no_grad():
        ids_B = model.last_logits(tokens_BL, step.cache).argmax(-1)
        exact.last_logits(tokens_BL, cache)
        for _ in range(NEW):
            expected_BV = exact.last_logits(ids_B[:, None], cache)
            ids_B = step.step(ids_B)
            torch.testing.assert_close(step.logits_BV, expected_BV, rtol=0, atol=2e-5 * float(expected_BV.abs().max()))
            assert torch.equal(ids_B, expected_BV.argmax(-1))


@pytest.mark.parametrize("name", thorough_but(["mistral-window", "glm4", "exaone4"], PADDED))
def test_padded_rows_and_any_split_of_the_prompt_give_the_same(name, device):
    model = load(name, device)
    tokens_BL, padding_B = random_prompt(model, 3), torch.tensor([0, 4, 8], device=device)
    options = {"max_tokens": NEW, "padding_B": padding_B}
    expected = list(generate(model, tokens_BL, **options))
    for chunk in (1, 5, 100):
        step = DecodeStep(model, 3, PROMPT + NEW, compiles=False)
        assert list(generate(model, tokens_BL, decoder=step, prefill_chunk=chunk, **options)) == expected


NARROW = [torch.bfloat16, torch.float16, torch.float8_e4m3fn]


@pytest.mark.parametrize("name", thorough_but(["exaone4"], PADDED))
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_narrower_kv_cache_is_the_same_for_the_step_and_the_model(dtype, name, device):
    """Both round the same keys and values. Where their sums differ, one may be rounded to the number beside, so what is
    compared is how far they are from each other and from a model that rounds nothing.
    """
    model, dense = kept_in(name, dtype, device), load(name, device)
    tokens_BL = random_prompt(model, 3)
    step = DecodeStep(model, 3, PROMPT + NEW, compiles=False)
    cache = KVCache(model.config, 3, PROMPT + NEW, device=device)
    unrounded = KVCache(dense.config, 3, PROMPT + NEW, device=device)
    assert step.cache.keys_NBMJE.dtype == cache.keys_NBMJE.dtype == dtype
    step.begin(tokens_BL)
    with torch.no_grad():
        for each, kept in ((model, step.cache), (model, cache), (dense, unrounded)):
            ids_B = each.last_logits(tokens_BL, kept).argmax(-1)
        for _ in range(NEW):
            expected_BV = model.last_logits(ids_B[:, None], cache)
            exact_BV = dense.last_logits(ids_B[:, None], unrounded)
            ids_B = step.step(ids_B)
            rounding = float((expected_BV - exact_BV).norm())
            assert float((step.logits_BV - expected_BV).norm()) < rounding / 2
            assert 0 < rounding < 8 * torch.finfo(dtype).eps * float(exact_BV.norm())


def kept_in(name: str, dtype: torch.dtype, device: torch.device) -> Llama:
    return load_model(open_checkpoint(MODELS / name).with_kv_cache(dtype), device, torch.float32)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_step_with_a_narrower_kv_cache_passes_the_check_of_compiled_steps(dtype, device):
    step = DecodeStep(kept_in("qwen3", dtype, device), 2, PROMPT + NEW, compiles=False)
    step.step(torch.zeros(2, dtype=torch.long, device=device))
    with torch.inference_mode():
        step._compare_with_model()
        step.logits_BV *= 2
        with pytest.raises(MiniawqError, match="what was compiled is wrong"):
            step._compare_with_model()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_what_is_too_large_for_a_narrower_kv_cache_becomes_its_largest_number(dtype, device):
    model, largest = kept_in("llama", dtype, device), torch.finfo(dtype).max
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.v_proj.weight.mul_(4 * largest)
            block.self_attn.o_proj.weight.div_(4 * largest)
    tokens_BL = random_prompt(model, 2)
    step = DecodeStep(model, 2, PROMPT + NEW, compiles=False)
    step.begin(tokens_BL)
    with torch.no_grad():
        step.step(model.last_logits(tokens_BL, step.cache).argmax(-1))
    assert step.logits_BV.isfinite().all()
    assert step.cache.values_NBMJE.float().abs().max() == largest


@pytest.mark.parametrize("rows", [3, 8, 9])
def test_a_form_that_multiplies_whole_tiles_of_rows_gives_the_same_for_those_there_are(rows, device, monkeypatch):
    def dotted(weight, bias_O, rows, _dtype, _accepts) -> Product:
        return Product(form, products.int4_tensors(form, weight, bias_O))

    in_tiles = lambda x_TI, *_: in_whole_tiles(x_TI)  # noqa: E731
    form = products.PLAIN._replace(name="in tiles", prepare=in_tiles, whole_rows=whole_rows)
    monkeypatch.setattr(prepacked, "wants_rows", lambda _: True)
    monkeypatch.setattr("miniawq.engine.weights.int4_product", dotted)
    model = int4_model(device)
    tokens_BL = random_prompt(model, rows)
    step, cache = DecodeStep(model, rows, PROMPT + NEW, compiles=False), KVCache(model.config, rows, 32, device=device)
    step.begin(tokens_BL)
    with torch.no_grad():
        ids_B = model.last_logits(tokens_BL, step.cache).argmax(-1)
        model.last_logits(tokens_BL, cache)
        expected_BV = model.last_logits(ids_B[:, None], cache)
        assert torch.equal(step.step(ids_B), expected_BV.argmax(-1))
    assert step.logits_BV.shape == expected_BV.shape
    torch.testing.assert_close(step.logits_BV, expected_BV, rtol=0, atol=2e-5 * float(expected_BV.abs().max()))


def test_plain_steps_of_tables_take_one_thread_and_share(monkeypatch):
    """And the others what there is: so do products that were rearranged for a compiled step."""
    if not reads_tables("cpu"):
        pytest.skip("this torch has no FBGEMM")
    model, seen = int4_model(torch.device("cpu")), []
    last_logits = model.last_logits
    monkeypatch.setattr(model, "last_logits", lambda *both: seen.append(torch.get_num_threads()) or last_logits(*both))
    with threads(2), torch.inference_mode():
        PlainStep(model, 1, 8, Sampling()).step(torch.ones(1, dtype=torch.long))
        assert torch.get_num_threads() == 2
        DecodeStep(model, 1, 8, compiles=False)
        PlainStep(model, 1, 8, Sampling()).step(torch.ones(1, dtype=torch.long))
    assert seen == [1, 2]


def test_plain_steps_of_narrow_dense_weights_share():
    """Weights in the dtype of the activations are left to the library."""
    model = load_model(open_checkpoint(MODELS / "qwen3"), "cpu", torch.float32)
    assert ready_for_steps(model) is shared_step
    assert ready_for_steps(model.float()) is nullcontext
    assert ready_for_steps(load_model(open_checkpoint(MODELS / "qwen3"), "cpu", torch.bfloat16)) is nullcontext


@pytest.mark.compiles
@pytest.mark.parametrize("by_blocks", [False, True])
def test_the_compiled_step_gives_the_same_and_never_compiles_again(by_blocks, device, monkeypatch, tmp_path):
    """Compiled by a thread while the model writes, taken over in the middle of a text, used by this thread since."""
    if by_blocks and device.type == "cpu":
        pytest.skip("steps are compiled by blocks on a GPU only, and Inductor's code for a CPU takes many minutes")
    monkeypatch.setenv("MINIAWQ_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    model = int4_model(device)
    steps = DecodeStep(model, 2, 32), DecodeStep(model, 2, 64)
    for step in steps:
        step.by_blocks = by_blocks
    first, second = EagerStart(model, steps[0]), steps[1]
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


def uncompiled(function, *_):
    return function


def shifted_logits(function, *_):
    """In place of the compiler: `finish` gives every logit to its neighbour."""

    def wrong(*arguments):
        logits_BV, ids_B = function(*arguments)
        return logits_BV.roll(1, -1), ids_B

    return wrong if function is finish else function


@pytest.mark.parametrize(("compiler", "is_right"), [(uncompiled, True), (shifted_logits, False)])
def test_a_compiled_step_that_is_not_the_model_is_refused(compiler, is_right, monkeypatch, device):
    """Whatever made it wrong: a compiler, a cache, a function that an earlier process kept."""
    monkeypatch.setattr("miniawq.engine.step.compiled_function", compiler)
    monkeypatch.setattr("miniawq.engine.step.check", lambda *_: True)
    step = DecodeStep(load("llama", device), 2, 16)
    with nullcontext() if is_right else pytest.raises(MiniawqError, match="what was compiled is wrong"):
        step.compile()
    assert step.is_ready == is_right


def test_forms_that_are_left_out_leave_the_plain_product(monkeypatch, device):
    monkeypatch.setattr("miniawq.engine.step.compiled_function", uncompiled)
    monkeypatch.setattr("miniawq.engine.step.check", lambda *_: False)
    step = DecodeStep(int4_model(device), 1, 16)
    step.compile()
    assert {form.name for layer in step.layers for form in layer.forms} == {"plain"}
    assert step.head[0].form.name == "library"


@pytest.mark.parametrize("sampling", [
    Sampling(temperature=0.8, top_p=0.9),
    Sampling(temperature=1.2, top_k=7, repetition_penalty=1.3),
    Sampling(presence_penalty=2.0, frequency_penalty=0.5),
])  # fmt: skip
def test_a_seed_gives_the_same_text_as_without_the_step(sampling, device):
    model = load("llama", device)
    tokens_BL = random_prompt(model, 2)
    options = {"max_tokens": NEW, "sampling": sampling, "seed": 3}
    step = DecodeStep(model, 2, PROMPT + NEW, sampling, compiles=False)
    expected = list(generate(model, tokens_BL, **options))
    for _ in range(2):
        assert list(generate(model, tokens_BL, decoder=step, **options)) == expected
    if sampling.temperature:
        assert list(generate(model, tokens_BL, decoder=step, **options | {"seed": 4})) != expected


def test_the_last_position_is_used_and_the_next_refused(device):
    model = load("llama", device)
    step = DecodeStep(model, 1, 4, compiles=False)
    ids_B = torch.tensor([1], device=device)
    step.begin(ids_B[:, None])
    for _ in range(4):
        ids_B = step.step(ids_B)
    with pytest.raises(InvalidInput, match="room for 4 positions"):
        step.step(ids_B)


def test_a_row_that_is_not_a_number_leaves_the_others_alone(device):
    model = load("llama", device)
    tokens_BL = random_prompt(model, 2)
    step = DecodeStep(model, 2, PROMPT + 2, compiles=False)

    def two_steps(first: float, ids_B: torch.Tensor) -> torch.Tensor:
        step.begin(tokens_BL)
        model.last_logits(tokens_BL, step.cache)
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


@pytest.mark.parametrize(("programs", "bytes_of_a_key", "parts", "keys"), [
    (8, 512, 16, 64), (16, 512, 16, 64), (32, 512, 8, 64), (64, 512, 4, 64), (128, 512, 2, 64), (256, 512, 1, 64),
    (257, 512, 1, 32), (4096, 512, 1, 32), (128, 256, 4, 64), (512, 256, 1, 64),
])  # fmt: skip
def test_keys_are_read_in_as_many_parts_as_keep_a_gpu_busy(programs, bytes_of_a_key, parts, keys):
    options = attend.cut_keys(programs, bytes_of_a_key)
    assert (options["SPLIT_KV"], options["BLOCK_N"]) == (parts, keys)


@pytest.mark.parametrize("bytes_of_a_key", [32, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("programs", [8, 512])
def test_the_keys_that_a_program_loads_ahead_fit_the_smallest_shared_memory(programs, bytes_of_a_key):
    options = attend.cut_keys(programs, bytes_of_a_key)
    one_step, stages = options["BLOCK_N"] * bytes_of_a_key, options["num_stages"]
    assert stages == 1 or (stages - 1) * one_step < stages * one_step <= 96 * 1024
    assert stages == 4 or (stages + 1) * one_step > 96 * 1024


def test_matrices_of_one_input_lie_together_and_exist_once(device):
    model = load("qwen2", device)
    tokens_BL = random_prompt(model, 1)
    with torch.no_grad():
        before = model(tokens_BL)
        steps = [DecodeStep(model, batch, 16, compiles=False) for batch in (1, 2)]
        assert torch.equal(model(tokens_BL), before)
    attn, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    for linears in ((attn.q_proj, attn.k_proj, attn.v_proj), (mlp.gate_proj, mlp.up_proj)):
        assert len({linear.weight.untyped_storage().data_ptr() for linear in linears}) == 1
    (one, two) = (step.layers[0].qkv[0].tensors[0] for step in steps)
    assert one.data_ptr() == two.data_ptr() == attn.q_proj.weight.data_ptr()


@pytest.mark.parametrize("window", [None, 3])
def test_blocks_and_masks_say_the_same(window, monkeypatch):
    monkeypatch.setattr(attend, "BLOCK", 4)
    padding_B, room = torch.tensor([0, 2, 6]), 10
    for position in range(6, room):
        position_B = torch.tensor([position] * 3)
        first_B = first_seen(position_B, padding_B, window)
        blocks = blocks_of(position_B, first_B, room)
        for row, mask_M in enumerate(mask_of(position_B, first_B, room)[:, 0, 0]):
            seen_M = torch.arange(room)[mask_M]
            assert seen_M.tolist() == list(range(max(padding_B[row], position + 1 - (window or room)), position + 1))
            table = blocks.block_index[row, 0, 0, : blocks.block_count[row]]
            assert table.tolist() == sorted({int(place) // 4 for place in seen_M})


@pytest.mark.parametrize("heads", thorough_but([4, 28], [4, 8, 12, 28]))
def test_attention_by_blocks_is_attention(heads):
    """Also where the heads that share a key are no power of two, as in Qwen2.5-7B (seven)."""
    rows, room, position_B = 2, 150, torch.tensor([140, 131])
    first_B = torch.tensor([3, 129])
    q_BHE = torch.randn(rows, heads, 16)
    keys_BMJE, values_BMJE = torch.randn(2, rows, room, 4, 16)
    expected = attention(
        q_BHE.unsqueeze(2), keys_BMJE.transpose(1, 2), values_BMJE.transpose(1, 2), mask_of(position_B, first_B, room)
    )
    attended = block_attention(q_BHE, keys_BMJE, values_BMJE, blocks_of(position_B, first_B, room))
    torch.testing.assert_close(attended, expected.squeeze(2), rtol=0, atol=1e-5)


def test_layers_in_blocks_of_different_sizes_are_multiplied_one_by_one(monkeypatch):
    monkeypatch.setattr(prepacked, "lanes_for", lambda outputs: 16 if outputs % 16 == 0 else 8)
    layers = [QuantLinear.from_quantized(quantize(torch.randn(outputs, 64), 32)) for outputs in (32, 24)]
    assert_multiplied_one_by_one(layers)


def test_mixed_layers_are_multiplied_one_by_one():
    dense, half = DenseLinear(64, 16), DenseLinear(64, 16)
    half.weight.data = half.weight.data.half()
    with torch.no_grad():
        for other in (half, QuantLinear.from_quantized(quantize(torch.randn(24, 64), 32))):
            assert_multiplied_one_by_one([dense, other])


def assert_multiplied_one_by_one(layers):
    x_TI = torch.randn(2, 64)
    found = Weights.of(*layers).products(2, torch.float32, lambda form: True)
    assert len(found) == 2
    expected = torch.cat([layer(x_TI) for layer in layers], -1)
    limit = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(multiply(found, prepare(found, x_TI)), expected, rtol=0, atol=limit)
