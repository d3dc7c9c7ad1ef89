"""Many texts at once: each is the text of its prompt alone, whatever stands beside it, before it and after it."""

import copy
from contextlib import nullcontext

import pytest
import torch

from miniawq.checkpoint.loading import load_model
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.engine import batch, rows
from miniawq.engine.batch import Batch, Request
from miniawq.engine.rows import CompiledRows, PlainRows, compiled_rows, prefill, share
from miniawq.engine.sampling import Sampling
from miniawq.errors import InvalidInput, MiniawqError
from miniawq.generate import complete, load
from miniawq.model import KVCache
from tests.helpers import MODELS
from tests.helpers.chat_models import make_chat_model

ROOM = 24


def uncompiled_rows(model, count, room):
    return CompiledRows(model, count, room, compiles=False)


def thorough(name):
    return pytest.param(name, marks=pytest.mark.thorough)


OTHERS = ["llama-yarn", "llama-biases", "llama-dynamic", "qwen2-window", "hunyuan", "phi3-long", "exaone4", "gemma3"]
OTHERS += ["ministral3"]
KINDS = [PlainRows, uncompiled_rows]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load(make_chat_model(tmp_path_factory.mktemp("tiny")), device="cpu")


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3", *map(thorough, OTHERS)])
def test_rows_of_any_lengths_have_the_logits_of_each_alone(name, make, device):
    """The bound is that of the decode step: sums in another order, in float32."""
    model = load_model(open_checkpoint(MODELS / name), device, torch.float32)
    prompts = [torch.randint(model.config.vocab_size, (length,)).tolist() for length in (9, 2, 5)]
    caches = [KVCache(model.config, 1, ROOM, device=device) for _ in prompts]
    step = make(model, len(prompts), ROOM)
    # The rows held longer texts before.
    step.cache.keys_NBMJE.normal_()
    step.cache.values_NBMJE.normal_()

    def compare(logits_BV, tokens):
        for row_V, ids, cache in zip(logits_BV, tokens, caches, strict=True):
            expected_BV = model.last_logits(torch.tensor([ids], device=device), cache)
            torch.testing.assert_close(row_V, expected_BV[0], rtol=0, atol=2e-5 * float(expected_BV.abs().max()))

    with torch.no_grad():
        lengths = [len(ids) for ids in prompts]
        compare(prefill(step, 0, prompts, 0), prompts)
        for _ in range(ROOM - max(lengths)):
            ids_B = torch.randint(model.config.vocab_size, (len(prompts),), device=device)
            compare(step.next_logits(ids_B, lengths), ids_B[:, None].tolist())
            lengths = [length + 1 for length in lengths]


@pytest.mark.parametrize("make", KINDS)
def test_rows_keep_what_each_keeps_alone_in_8_bits(make, device):
    """Keys that differ by a rounding may be kept as neighbouring numbers: few of them are."""
    model = load_model(open_checkpoint(MODELS / "qwen3").with_kv_cache(torch.float8_e4m3fn), device, torch.float32)
    prompts = [torch.randint(model.config.vocab_size, (length,)).tolist() for length in (9, 2)]
    caches = [KVCache(model.config, 1, ROOM, device=device) for _ in prompts]
    step = make(model, len(prompts), ROOM)
    with torch.no_grad():
        prefill(step, 0, prompts, 0)
        step.next_logits(torch.tensor([7, 8], device=device), [9, 2])
        for ids, cache in zip(prompts, caches, strict=True):
            model.last_logits(torch.tensor([ids], device=device), cache)
        for token, cache in zip((7, 8), caches, strict=True):
            model.last_logits(torch.tensor([[token]], device=device), cache)
    for row, (cache, length) in enumerate(zip(caches, (10, 3), strict=True)):
        for kept, alone in ((step.cache.keys_NBMJE, cache.keys_NBMJE), (step.cache.values_NBMJE, cache.values_NBMJE)):
            assert kept.dtype == torch.float8_e4m3fn
            differs = kept[:, row, :length].float() != alone[:, 0, :length].float()
            assert float(differs.float().mean()) < 1e-3


def some_requests(tokenizer, count=11):
    """Prompts and answers of different lengths, which begin alike."""
    words = "upon a time there was a king who had a daughter, and the wolf came to the door of the house".split()
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, len(words), (count, 2), generator=draw).tolist()
    return [
        Request(tokenizer.encode(f"Once {' '.join(words[:length])}"), tokens, seed)
        for seed, (length, tokens) in enumerate(lengths)
    ]


def outcome(completion):
    list(completion)
    return completion.ids, completion.text, completion.finish_reason, completion.stop_reason


def alone(tiny, request, **options):
    model, tokenizer = tiny
    options |= {"max_tokens": request.max_tokens, "seed": request.seed}
    completion = complete(model, tokenizer, request.prompt_ids, **options)
    return outcome(completion)


@pytest.mark.parametrize(("count", "make"), [(1, PlainRows), (3, PlainRows), (4, uncompiled_rows), (16, PlainRows)])
def test_every_text_is_that_of_its_prompt_alone(count, make, tiny):
    """Some end by a stop string, some by an id, some are full."""
    _, tokenizer = tiny
    requests = some_requests(tokenizer)
    texts = [alone(tiny, request) for request in requests]
    stop = [text[6:9] for _, text, *_ in texts if len(text) > 12][:2]
    stop_ids = frozenset({*tokenizer.eos_ids, texts[-1][0][1]})
    found = compare_with_each_alone(tiny, requests, make, count, stop=stop, stop_ids=stop_ids)
    assert len({reason for *_, reason in found.values()}) >= 3


@pytest.mark.thorough
def test_every_text_of_the_demo_is_that_of_its_prompt_alone():
    demo = load(device="cpu")
    options = {"stop": ["king", ", and the"], "stop_ids": demo[1].eos_ids}
    for count, make in ((3, PlainRows), (4, uncompiled_rows)):
        compare_with_each_alone(demo, some_requests(demo[1], 30), make, count, **options)


def compare_with_each_alone(loaded, requests, make, count, **options):
    model, tokenizer = loaded
    written = Batch(tokenizer, make(model, count, 128), requests, **options)
    found = {ending.number: outcome(ending.completion) for ending in written}
    assert found == {number: alone(loaded, request, **options) for number, request in enumerate(requests)}
    assert written.tokens == sum(len(ids) for ids, *_ in found.values())
    return found


@pytest.mark.parametrize("sampling", [
    Sampling(temperature=0.9, top_p=0.9),
    Sampling(temperature=1.2, top_k=40, repetition_penalty=1.3),
    Sampling(presence_penalty=2.0, frequency_penalty=0.5),
    Sampling(repetition_penalty=1.5, repeat_last_n=3),
])  # fmt: skip
def test_what_is_drawn_depends_on_the_seed_of_the_text_alone(sampling, tiny):
    model, tokenizer = tiny
    requests = some_requests(tokenizer, 6)
    endings = Batch(tokenizer, PlainRows(model, 2, 128), requests, sampling=sampling)
    found = {ending.number: outcome(ending.completion) for ending in endings}
    assert found == {number: alone(tiny, request, sampling=sampling) for number, request in enumerate(requests)}


def test_a_long_prompt_runs_in_pieces_and_short_ones_together(monkeypatch, tiny):
    model, tokenizer = tiny
    requests = some_requests(tokenizer, 8)
    expected = {number: alone(tiny, request) for number, request in enumerate(requests)}
    widths, forward = [], type(model.model).forward

    def spy(decoder, tokens_BL, cache):
        widths.append(tuple(tokens_BL.shape))
        return forward(decoder, tokens_BL, cache)

    monkeypatch.setattr(type(model.model), "forward", spy)
    for module in (batch, rows):
        monkeypatch.setattr(module, "PREFILL_CHUNK", 12)
    found = {e.number: outcome(e.completion) for e in Batch(tokenizer, PlainRows(model, 4, 128), requests)}
    assert found == expected
    assert all(count * width <= 12 for count, width in widths)
    assert max(count for count, _ in widths) > 1
    assert any(len(request.prompt_ids) > 14 for request in requests), "one is longer than a piece"


def test_what_all_prompts_begin_with_runs_once(monkeypatch, tiny):
    model, tokenizer = tiny
    shared = tokenizer.encode("Once upon a time there was a king")
    requests = [Request([*shared, *tokenizer.encode(word)], 3) for word in ("who", "and", "that had")]
    tokens, forward = [], type(model.model).forward

    def spy(decoder, tokens_BL, cache):
        tokens.append(tokens_BL.numel())
        return forward(decoder, tokens_BL, cache)

    monkeypatch.setattr(type(model.model), "forward", spy)
    endings = list(Batch(tokenizer, PlainRows(model, 1, 128), requests))
    assert tokens[0] >= len(shared)
    assert sum(tokens) == tokens[0] + sum(len(request.prompt_ids) - tokens[0] for request in requests)
    assert {ending.completion.cached_tokens for ending in endings} == {tokens[0]}


def test_the_same_prompt_several_times_runs_once(tiny):
    model, tokenizer = tiny
    step, ids = PlainRows(model, 3, 64), tokenizer.encode("Once upon a time")
    endings = list(Batch(tokenizer, step, [Request(ids, 4)] * 5))
    assert {outcome(ending.completion)[1] for ending in endings} == {alone(tiny, Request(ids, 4))[1]}
    assert endings[0].completion.cached_tokens == len(ids) - 1


def test_a_row_whose_text_has_ended_takes_the_next_prompt(tiny):
    """Two rows: one long text, and beside it nine short ones in turn."""
    model, tokenizer = tiny
    step, ids = PlainRows(model, 2, 128), tokenizer.encode("Once upon")
    calls, next_logits = [], step.next_logits
    step.next_logits = lambda *arguments: calls.append(0) or next_logits(*arguments)
    requests = [Request(ids, 40), *[Request(ids, 5)] * 9]
    endings = list(Batch(tokenizer, step, requests, stop_ids=frozenset()))
    assert [ending.number for ending in endings] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert len(calls) == 39


@pytest.mark.parametrize("make", KINDS)
def test_when_nothing_waits_steps_have_the_rows_that_go_on(make, tiny):
    """The last rows move into those that are free, with their random numbers and their history."""
    model, tokenizer = tiny
    sampling = Sampling(temperature=1.2, repetition_penalty=1.3)
    step, calls = make(model, 4, 64), []
    next_logits = step.next_logits
    step.next_logits = lambda ids_B, lengths: calls.append(len(lengths)) or next_logits(ids_B, lengths)
    requests = [Request(tokenizer.encode("Once upon"), tokens, seed) for seed, tokens in enumerate((3, 12, 5, 9, 7))]
    options = {"sampling": sampling, "stop_ids": frozenset()}
    found = {ending.number: outcome(ending.completion) for ending in Batch(tokenizer, step, requests, **options)}
    assert found == {number: alone(tiny, request, **options) for number, request in enumerate(requests)}
    assert calls == [4] * 4 + [3] * 4 + [1] * 3


class Noting(PlainRows):
    """Rows that note when a step begins."""

    def __init__(self, *given):
        super().__init__(*given)
        self.noted = []

    def next_logits(self, ids_B, lengths):
        self.noted.append(len(lengths))
        return super().next_logits(ids_B, lengths)


def test_endings_are_told_while_the_next_step_computes(tiny):
    model, tokenizer = tiny
    step, ids = Noting(model, 2, 64), tokenizer.encode("Once upon a time")
    endings = iter(Batch(tokenizer, step, [Request(ids, 3), Request(ids, 6)], stop_ids=frozenset()))
    assert next(endings).number == 0
    assert step.noted == [2, 2, 1]
    assert next(endings).number == 1
    assert step.noted == [2, 2, 1, 1, 1]


def test_no_text_is_made_before_it_is_asked_for(tiny, monkeypatch):
    model, tokenizer = tiny
    requests = some_requests(tokenizer, 4)
    with monkeypatch.context() as patched:
        patched.setattr(type(tokenizer), "stream", None)
        endings = list(Batch(tokenizer, PlainRows(model, 2, 128), requests))
    assert {e.number: outcome(e.completion) for e in endings} == dict(enumerate(alone(tiny, r) for r in requests))


def test_rows_that_go_on_between_free_ones_are_left_alone(tiny):
    """The first and the third of four end together, and two prompts take their places."""
    _, tokenizer = tiny
    texts = zip(("Once", "Twice", "So", "There", "A wolf", "The king"), (3, 9, 3, 9, 5, 5), strict=True)
    requests = [Request(tokenizer.encode(text), tokens) for text, tokens in texts]
    compare_with_each_alone(tiny, requests, PlainRows, 4, stop_ids=frozenset())


def test_a_prompt_begins_as_soon_as_a_row_is_free(tiny):
    """A row that is free keeps the beginning that all share."""
    model, tokenizer = tiny
    step, ids = PlainRows(model, 16, 64), tokenizer.encode("Once upon")
    begun = []

    class Spied(Batch):
        def _begin(self, first, numbers):
            begun.append(len(numbers))
            return super()._begin(first, numbers)

    lengths = [*range(2, 18), 3, 3, 3]
    requests, options = [Request(ids, length) for length in lengths], {"stop_ids": frozenset()}
    endings = list(Spied(tokenizer, step, requests, **options))
    assert begun == [16, 1, 1, 1]
    longest = alone(tiny, Request(ids, max(lengths)), **options)[0]
    for ending in endings:
        assert outcome(ending.completion)[0] == longest[: lengths[ending.number]]
    begun_NBMJE = step.cache.keys_NBMJE[:, :, : endings[0].completion.cached_tokens]
    assert begun_NBMJE.shape[2] > 0
    assert torch.equal(begun_NBMJE, begun_NBMJE[:, :1].expand_as(begun_NBMJE))


@pytest.mark.parametrize("make", KINDS)
def test_prompts_may_wait_for_each_other(make, tiny):
    """As on a GPU. Rows that are free meanwhile are left out, and keep the beginning that all share."""
    model, tokenizer = tiny
    begun, options = [], {"sampling": Sampling(temperature=1.2), "stop_ids": frozenset()}

    class Spied(Batch):
        def _begin(self, first, numbers):
            begun.append(len(numbers))
            return super()._begin(first, numbers)

    requests = [
        Request(tokenizer.encode(f"Once upon a time {word}", add_special_tokens=False), tokens, seed)
        for seed, (word, tokens) in enumerate(zip("abcdefghi", (3, 12, 5, 9, 7, 4, 8, 6, 5), strict=True))
    ]
    batch = Spied(tokenizer, make(model, 4, 64), requests, **options)
    batch.rows_for_one_free = 2
    found = {ending.number: outcome(ending.completion) for ending in batch}
    assert found == {number: alone(tiny, request, **options) for number, request in enumerate(requests)}
    assert begun == [4, 2, 2, 1]
    assert batch.shared.kept > 3


def test_a_row_that_is_not_a_number_fails_and_leaves_the_others_alone(tiny):
    """Also the text that comes into its row afterwards."""
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    broken = tokenizer.encode("q")[-1]
    good = [request for request in some_requests(tokenizer) if broken not in request.prompt_ids][:4]
    expected = [alone(tiny, request) for request in good]
    model.model.embed_tokens.weight[broken] = torch.nan
    requests = [good[0], Request([*good[0].prompt_ids, broken, 5, 6], 5), *good[1:]]
    endings = {ending.number: ending for ending in Batch(tokenizer, PlainRows(model, 2, 128), requests)}
    assert endings[1].completion is None
    assert isinstance(endings[1].error, MiniawqError)
    assert "not a number" in str(endings[1].error)
    assert [outcome(endings[number].completion) for number in (0, 2, 3, 4)] == expected


def test_what_does_not_fit_is_told_and_the_others_are_written(tiny):
    model, tokenizer = tiny
    ids = tokenizer.encode("Once")
    requests = [Request(ids, 4), Request([], 4), Request(ids, 40), Request([99999], 4), Request(ids, 4)]
    endings = {ending.number: ending for ending in Batch(tokenizer, PlainRows(model, 2, 20), requests)}
    assert [endings[number].completion is None for number in range(5)] == [False, True, True, True, False]
    assert all(isinstance(endings[number].error, InvalidInput) for number in (1, 2, 3))
    assert "do not fit into a row" in str(endings[2].error)


def test_a_beginning_is_copied_into_all_rows(device):
    model = load_model(open_checkpoint(MODELS / "llama"), device, torch.float32)
    step = PlainRows(model, 3, 8)
    with torch.no_grad():
        share(step, [1, 2, 3])
    keys_NBMJE = step.cache.keys_NBMJE
    assert keys_NBMJE[:, :, :3].abs().sum() > 0
    assert torch.equal(keys_NBMJE[:, 2], keys_NBMJE[:, 0])
    assert not keys_NBMJE[:, :, 3:].any()


def test_rows_that_cannot_be_compiled_are_plain(tiny, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(CompiledRows, "compile", fail)
    monkeypatch.setattr(rows, "are_here", lambda _: False)
    monkeypatch.setattr(rows, "kept", lambda _: nullcontext())
    assert isinstance(compiled_rows(tiny[0], 2, 16), PlainRows)
    assert "the decode step cannot be compiled, and stays slow: no compiler" in caplog.text


@pytest.mark.compiles
def test_one_compiled_step_serves_rows_of_all_lengths(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("MINIAWQ_CACHE", str(tmp_path))
    model, tokenizer = tiny
    requests, graphs = some_requests(tokenizer), []
    for room in (96, 128):
        step = compiled_rows(model, 4, room)
        assert isinstance(step, CompiledRows)
        found = {e.number: outcome(e.completion) for e in Batch(tokenizer, step, requests)}
        assert found == {number: alone(tiny, request) for number, request in enumerate(requests)}
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1], "compiled again for another room"
