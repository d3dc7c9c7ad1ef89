"""Guesses: the text without them, fewer steps where it repeats itself, and the same distribution of what is drawn."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miniawq.engine.cached_text import CachedText
from miniawq.engine.layer import after_attention, compiled_function
from miniawq.engine.sampling import History, Sampling
from miniawq.engine.speculation import CREDIT, PAUSE, PRICE, RUN, WAITING, Lookup, speculated
from miniawq.engine.start import EagerStart, PlainStep
from miniawq.engine.step import DecodeStep
from miniawq.engine.verifying import MOST_GUESSES, SpeculativeStep
from miniawq.errors import InvalidInput
from miniawq.generate import generate
from miniawq.model import Llama
from tests.engine.test_step import int4_model, load
from tests.helpers.golden_models import NAMES
from tests.helpers.marks import thorough_but

ROOM, NEW = 64, 40


class Text:
    """A step whose text is known, and that counts what it is asked."""

    def __init__(self, ids: Sequence[int], prompt: int, returns_early: bool) -> None:
        self.ids, self.returns_early, self.history = ids, returns_early, None
        self.cache, self.steps, self.verified = type("Cache", (), {"length": prompt})(), 0, []

    def step(self, ids_B: torch.Tensor) -> torch.Tensor:
        assert ids_B.tolist() == [self.ids[self.cache.length]]
        self.cache.length += 1
        self.steps += 1
        return torch.tensor([self.ids[self.cache.length]], device=ids_B.device)

    def verify(self, ids: Sequence[int]) -> torch.Tensor:
        start = self.cache.length
        assert ids[0] == self.ids[start]
        self.verified.append(len(ids))
        # What follows a wrong guess is nothing that anybody may use.
        following = [self.ids[start + 1 + place] for place in range(len(ids))]
        right = next(
            (n for n, pair in enumerate(zip(ids[1:], following, strict=False)) if len(set(pair)) > 1), len(ids)
        )
        return torch.tensor([*following[: right + 1], *[-7] * (len(ids) - right - 1)])


def written(ids: list[int], prompt: int, count: int, early: bool) -> tuple[list[int], Text, Lookup]:
    step, lookup = Text([*ids, 0], prompt, early), Lookup(ids[:prompt])
    found = speculated(step, torch.tensor([ids[prompt]]), count, lookup)
    return [token_id for (token_id,) in found], step, lookup


@given(st.lists(st.integers(0, 2), min_size=2, max_size=80), st.integers(1, 40), st.booleans())
def test_any_text_comes_out_as_it_is(ids, prompt, early):
    prompt = min(prompt, len(ids) - 1)
    found, step, lookup = written(ids, prompt, len(ids) - prompt, early)
    assert found == ids[prompt:]
    assert lookup.ids == ids
    assert step.cache.length == len(ids) - 1, "all but the last are in the cache"
    assert all(1 < fed <= MOST_GUESSES + 1 for fed in step.verified)
    assert lookup.right <= lookup.guessed == sum(step.verified) - len(step.verified)


@pytest.mark.parametrize("early", [False, True])
def test_a_text_that_goes_round_takes_an_eighth_of_the_steps(early):
    ids = [5, 6, 7, 8] * 30
    _, step, lookup = written(ids, 8, 100, early)
    assert lookup.right == lookup.guessed
    assert step.steps + len(step.verified) <= 100 / (MOST_GUESSES + 1) + 2


@pytest.mark.parametrize("early", [False, True])
def test_a_text_without_repetition_costs_no_guess(early):
    _, step, lookup = written(list(range(100)), 8, 90, early)
    assert (step.steps, step.verified, lookup.guessed) == (89, [], 0)


def test_guesses_that_never_come_true_are_rare():
    """Four ids that are always followed by another one."""
    ids = [token_id for number in range(100, 400) for token_id in (1, 2, 3, 4, number)]
    _, step, lookup = written(ids, 8, 1400, True)
    assert lookup.right == 0
    assert len(step.verified) * PRICE / 1400 < 0.03
    assert len(step.verified) >= 1400 / (PAUSE + 6), "it goes on trying"


def test_guesses_that_begin_wrong_are_rare():
    """Three ids, each time with another one behind them."""
    ids = [token_id for number in range(100, 800) for token_id in (1, 2, 3, number)]
    waited = []
    guess = Lookup.guess
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lookup, "guess", lambda *of: waited.append(guess(*of)) or waited[-1])
        _, step, _ = written(ids, 8, 2000, True)
    assert not step.verified
    assert 10 < len([guesses for guesses in waited if guesses]) < 0.03 * 2000 / WAITING / 2


def test_a_guess_is_what_followed_last():
    lookup = Lookup([1, 2, 3, 4, 1, 2, 3, 5, 6, 1, 2, 3])
    assert lookup.guess(3) == [5, 6, 1]
    assert Lookup([1, 2, 3, 4, 2, 3]).guess(3) == []
    assert Lookup([9] * (RUN + 1)).guess(4) == [9] * 4
    assert Lookup([9] * RUN).guess(4) == []
    assert (Lookup([]).guess(4), lookup.guess(0)) == ([], [])


def test_credit_is_spent_by_what_is_wrong_and_earned_by_what_is_right():
    lookup = Lookup([9] * 10)
    for _ in range(int(CREDIT / PRICE) - 1):
        lookup.learn(7, 0)
    assert lookup.guess(1)
    lookup.learn(7, 1)
    lookup.learn(7, 0)
    assert lookup.guess(1)
    lookup.learn(7, 0)
    assert not lookup.guess(1)
    for _ in range(PAUSE):
        lookup.add(9)
    assert lookup.guess(1)
    lookup.learn(7, 0)
    assert not lookup.guess(1), "one attempt after a pause"


def round_texts(model: Llama, length: int) -> torch.Tensor:
    """A prompt that goes round, so that there is much to guess."""
    return torch.arange(length, device=model.device).remainder(4)[None] + 3


def steps_of(model: Llama, sampling: Sampling) -> list[PlainStep | SpeculativeStep]:
    return [PlainStep(model, 1, ROOM, sampling), SpeculativeStep(model, ROOM, sampling, compiles=False)]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(repetition_penalty=1.02, frequency_penalty=0.03)], ids=str)
@pytest.mark.parametrize("name", thorough_but(("llama", "mistral-window"), NAMES))
def test_the_text_is_the_one_without_guesses(name, sampling, device):
    model = load(name, device)
    room = min(ROOM, model.config.max_position_embeddings)
    for length in (5, min(17, room - 4)):
        tokens_BL, new = round_texts(model, length), min(NEW, room - length)
        expected = list(generate(model, tokens_BL, max_tokens=new, sampling=sampling))
        for step in (PlainStep(model, 1, room, sampling), SpeculativeStep(model, room, sampling, compiles=False)):
            lookup = Lookup(tokens_BL[0].tolist())
            options = {"sampling": sampling, "decoder": step, "lookup": lookup}
            assert list(generate(model, tokens_BL, max_tokens=new, **options)) == expected
            assert lookup.ids[length:] == [token_id for (token_id,) in expected]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(presence_penalty=0.5)], ids=str)
def test_what_is_verified_is_what_steps_choose(sampling, device):
    """Whatever the guesses are, with other ids in the cache behind them from guesses before."""
    model = int4_model(device)
    tokens_BL = torch.randint(model.config.vocab_size, (1, 9), device=device)
    expected = [token_id for (token_id,) in generate(model, tokens_BL, max_tokens=20, sampling=sampling)]
    for step in steps_of(model, sampling):
        step.begin(tokens_BL)
        with torch.no_grad():
            model.last_logits(tokens_BL, step.cache)
        wrong = [(token_id + 1) % model.config.vocab_size for token_id in expected]
        step.verify([expected[0], *wrong[1:8]])
        assert step.cache.length == 9
        assert step.verify(expected[:8]).tolist() == expected[1:9]
        assert step.verify(expected[:3]).tolist() == expected[1:4]
        assert step.verify([expected[0], expected[1], wrong[2]]).tolist()[:2] == expected[1:3]


def test_the_end_of_the_cache_is_not_passed(device):
    model = load("llama", device)
    for step in steps_of(model, Sampling()):
        tokens_BL = round_texts(model, ROOM - NEW)
        expected = list(generate(model, tokens_BL, max_tokens=NEW))
        lookup = Lookup(tokens_BL[0].tolist())
        assert list(generate(model, tokens_BL, max_tokens=NEW, decoder=step, lookup=lookup)) == expected


def test_a_conversation_goes_on_after_guesses(device):
    model = load("llama", device)
    for step in steps_of(model, Sampling()):
        cached, ids = CachedText(), round_texts(model, 9)[0].tolist()
        for _ in range(2):
            tokens_BL = torch.tensor([ids], device=device)
            expected = [token_id for (token_id,) in generate(model, tokens_BL, max_tokens=9)]
            found = generate(model, tokens_BL, max_tokens=9, decoder=step, cached=cached, lookup=Lookup(ids))
            text = [token_id for (token_id,) in found]
            assert text == expected
            ids = [*ids, *text, 3, 4]
        assert cached.kept >= 17


@pytest.mark.thorough
def test_drawn_tokens_have_the_distribution_of_the_model(device):
    """Pairs of tokens drawn with a guess between them, against those drawn one after the other: chi-squared."""
    model, sampling = load("llama", device), Sampling(temperature=1.5, top_k=3)
    prompt = round_texts(model, 8)
    counts = []
    for guesses in (False, True):
        step, seen = PlainStep(model, 1, ROOM, sampling), {}
        for seed in range(400):
            lookup = Lookup(prompt[0].tolist()) if guesses else None
            options = {"sampling": sampling, "seed": seed, "decoder": step, "lookup": lookup}
            text = tuple(token_id for (token_id,) in generate(model, prompt, max_tokens=3, **options))
            seen[text] = seen.get(text, 0) + 1
        counts.append(seen)
    kinds = sorted(set(counts[0]) | set(counts[1]))
    both = torch.tensor([[seen.get(kind, 0) for kind in kinds] for seen in counts], dtype=torch.float64)
    expected = both.sum(0) / 2
    statistic = float(((both - expected) ** 2 / expected).sum())
    freedom = len(kinds) - 1
    assert freedom > 5
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_the_history_of_neighbours_is_that_of_one_after_the_other():
    history, ids = History.of_prompt(torch.tensor([[1, 2]]), 6), torch.tensor([3, 3, 0, 5])
    history.add(torch.tensor([4]))
    rows = history.after_each(ids)
    for place, token_id in enumerate(ids):
        history.add(token_id[None])
        assert all(torch.equal(part[place], whole[0]) for part, whole in zip(rows, history, strict=True))
    again = History.of_prompt(torch.tensor([[1, 2]]), 6)
    again.extend(torch.tensor([4, *ids]))
    assert all(map(torch.equal, again, history))


def test_what_cannot_check_guesses_says_so(device):
    model = load("llama", device)
    tokens_BL = round_texts(model, 12)
    with pytest.raises(InvalidInput, match=r"this step cannot check guesses\n.*1 rows, of 1 texts, and . ids"):
        list(generate(model, tokens_BL, max_tokens=30, decoder=DecodeStep(model, 1, ROOM, compiles=False),
                      lookup=Lookup(tokens_BL[0].tolist() * 3)))  # fmt: skip
    with pytest.raises(InvalidInput, match="a lookup guesses for one text"):
        list(generate(model, tokens_BL.expand(2, -1), max_tokens=5, lookup=Lookup([])))


class CompiledForSeveral(SpeculativeStep):
    """Whose step of one row is not compiled on a CPU: other tests compile such steps, which takes a minute."""

    def compile(self, directory=None):
        if self.device.type != "cpu":
            super().compile(directory)
            return
        self._choose_products(lambda form: True)
        self.is_ready = True
        self.several.compile(directory)


@pytest.mark.compiles
def test_a_compiled_step_takes_over_with_guesses(device, monkeypatch, tmp_path):
    """What follows attention knows nothing of texts: `test_step.py` compiles it."""
    monkeypatch.setenv("MINIAWQ_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "miniawq.engine.step.compiled_function",
        lambda function, *given: function if function is after_attention else compiled_function(function, *given),
    )
    model = int4_model(device)
    step = EagerStart(model, CompiledForSeveral(model, ROOM))
    tokens_BL = round_texts(model, 9)
    expected = list(generate(model, tokens_BL, max_tokens=NEW))
    for wait in (True, False):
        found = []
        options = {"decoder": step, "lookup": Lookup(tokens_BL[0].tolist())}
        for number, ids in enumerate(generate(model, tokens_BL, max_tokens=NEW, **options)):
            found.append(ids)
            if wait and number == NEW // 2:
                step.wait()
        assert found == expected
    assert step.compiled.several.is_ready
    assert step.ahead == 0
