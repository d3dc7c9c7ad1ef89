"""A text that begins like the last one: the same text, and no position that both share is computed twice."""

import gc
import weakref

import pytest
import torch

from miniawq.checkpoint.loading import load_model
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.compiled import WORKSHOP
from miniawq.engine.cached_text import CachedText
from miniawq.engine.sampling import Sampling
from miniawq.engine.start import Decoders, PlainStep
from miniawq.errors import InvalidInput, MiniawqError
from miniawq.generate import generate
from miniawq.model import Llama
from tests.helpers import MODELS
from tests.helpers.early_steps import EarlyStep
from tests.helpers.marks import each_once, thorough_but

ROOM, NEW = 64, 5


def plain(model: Llama, rows: int) -> PlainStep:
    return PlainStep(model, rows, ROOM, Sampling())


def early(model: Llama, rows: int) -> EarlyStep:
    return EarlyStep(model, rows, ROOM, compiles=False)


@pytest.fixture(params=["llama", "mistral-window", "qwen2-window"])
def model(request, device) -> Llama:
    return load_model(open_checkpoint(MODELS / request.param), device, torch.float32)


def computed(model: Llama, monkeypatch) -> list[int]:
    """Lengths of the pieces that the model computes from now on."""
    lengths, forward = [], model.model.forward

    def counted(tokens_BL, cache=None):
        lengths.append(tokens_BL.shape[1])
        return forward(tokens_BL, cache)

    monkeypatch.setattr(model.model, "forward", counted)
    return lengths


@pytest.mark.parametrize(("rows", "make"), each_once((1, 3), (plain, early)))
def test_a_conversation_goes_on_with_the_same_text(model, rows, make, device):
    step, cached = make(model, rows), CachedText()
    text_BL = torch.randint(model.config.vocab_size, (rows, 9), device=device)
    # How much of the last text and answer is kept: all and a question more, all but its end, half a prompt, nothing.
    for keeps, question in [(9, 0), (14, 4), (16, 3), (5, 2), (0, 12), (17, 1)]:
        fresh_BL = torch.randint(model.config.vocab_size, (rows, question), device=device)
        text_BL = torch.cat([text_BL[:, :keeps], fresh_BL], 1)
        expected = list(generate(model, text_BL, max_tokens=NEW))
        assert list(generate(model, text_BL, max_tokens=NEW, decoder=step, cached=cached)) == expected
        assert cached.kept <= text_BL.shape[1] - 1
        text_BL = torch.cat([text_BL, torch.tensor(expected, device=device).T], 1)


@pytest.mark.parametrize("make", [plain, early])
def test_only_what_is_new_is_computed(model, make, device, monkeypatch):
    step, cached = make(model, 1), CachedText()
    prompt_BL = torch.randint(model.config.vocab_size, (1, 9), device=device)
    ids = [ids[0] for ids in generate(model, prompt_BL, max_tokens=NEW, decoder=step, cached=cached)]
    next_BL = torch.cat([prompt_BL, torch.tensor([[*ids, 3, 4, 5]], device=device)], 1)
    lengths = computed(model, monkeypatch)
    next(generate(model, next_BL, max_tokens=NEW, decoder=step, cached=cached))
    # The last id of the answer was chosen and not fed to the model.
    assert (cached.kept, lengths[0]) == (9 + NEW - 1, 4)
    next(generate(model, next_BL, max_tokens=NEW, decoder=step, cached=cached))
    assert (cached.kept, lengths[-1]) == (next_BL.shape[1] - 1, 1)


@pytest.mark.parametrize("make", [plain, early])
def test_an_answer_that_was_left_counts_as_far_as_it_was_read(model, make, device):
    step, cached = make(model, 1), CachedText()
    prompt_BL = torch.randint(model.config.vocab_size, (1, 9), device=device)
    left = generate(model, prompt_BL, max_tokens=NEW, decoder=step, cached=cached)
    ids = [next(left)[0], next(left)[0]]
    left.close()
    next_BL = torch.cat([prompt_BL, torch.tensor([[*ids, 1, 2, 3]], device=device)], 1)
    expected = list(generate(model, next_BL, max_tokens=NEW))
    assert list(generate(model, next_BL, max_tokens=NEW, decoder=step, cached=cached)) == expected
    assert cached.kept in (10, 11)


def test_nothing_is_kept_after_a_number_that_is_none(model, device):
    step, cached = early(model, 1), CachedText()
    prompt_BL = torch.randint(model.config.vocab_size, (1, 9), device=device)
    texts = generate(model, prompt_BL, max_tokens=NEW, decoder=step, cached=cached)
    next(texts)
    step.cache.values_NBMJE.fill_(torch.nan)
    with pytest.raises(MiniawqError, match="not a number"):
        list(texts)
    # Also after the end of a text: on a GPU steps read further than that.
    assert all(kept_NBMJE.isfinite().all() for kept_NBMJE in (step.cache.keys_NBMJE, step.cache.values_NBMJE))
    expected = list(generate(model, prompt_BL, max_tokens=NEW))
    assert list(generate(model, prompt_BL, max_tokens=NEW, decoder=step, cached=cached)) == expected
    assert cached.kept == 0


@pytest.mark.parametrize("compiles", thorough_but([True], [False, True]))
def test_a_cache_is_kept_for_texts_that_fit_and_freed_before_another_one_is_made(model, compiles, device, monkeypatch):
    make = Decoders._made
    decoders = Decoders(Sampling(), 4096, device, wanted=compiles, streams=True, converses=True)
    decoders.use(model)
    first, cached = decoders.for_text(10), decoders.cached
    assert decoders.for_text(decoders.room(10)) is first
    assert decoders.cached is cached
    WORKSHOP.reserve(None)  # as when it has compiled
    left = weakref.ref(first.cache.keys_NBMJE)
    freed, first = [], None

    def making(self, room):
        gc.collect()  # a thread that was never started holds its step in a circle
        freed.append(left() is None)
        return make(self, room)

    monkeypatch.setattr(Decoders, "_made", making)
    decoders.for_text(decoders.room(10) + 1)
    assert freed == [True]
    assert decoders.cached is not cached
    WORKSHOP.reserve(None)


def test_other_rows_share_nothing_and_padding_is_refused(model, device):
    cached = CachedText()
    tokens_BL = torch.zeros(2, 6, dtype=torch.long, device=device)
    assert [cached.begin(tokens_BL, 9), cached.begin(tokens_BL, 9), cached.begin(tokens_BL, 3)] == [0, 5, 3]
    assert cached.begin(tokens_BL[:1], 9) == 0
    with pytest.raises(InvalidInput, match="no padding"):
        next(generate(model, tokens_BL, max_tokens=1, padding_B=tokens_BL[:, 0], cached=cached))
