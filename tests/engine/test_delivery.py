"""Ids that are read one step late: the same ids, nothing that waits, nothing computed after the last token."""

from collections.abc import Iterator
from itertools import islice

import pytest
import torch

from miniawq.checkpoint.loading import load_model
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.engine.delivery import delivered, on_their_way
from miniawq.engine.sampling import NOT_A_NUMBER, Sampling
from miniawq.engine.start import EagerStart, PlainStep
from miniawq.engine.step import DecodeStep
from miniawq.errors import MiniawqError
from miniawq.generate import generate
from miniawq.model import Llama
from tests.helpers import MODELS
from tests.helpers.early_steps import EarlyStep

PROMPT, NEW = 9, 12


@pytest.fixture
def model(device: torch.device) -> Llama:
    return load_model(open_checkpoint(MODELS / "llama"), device, torch.float32)


class Counting:
    """A step that adds one to every id, and notes what is asked of it."""

    def __init__(self, returns_early: bool) -> None:
        self.returns_early, self.calls = returns_early, 0

    def step(self, ids_B: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return ids_B + 1


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("early", [False, True])
def test_each_step_is_launched_before_the_ids_of_the_last_one_are_read_where_that_pays(early, count, device):
    step = Counting(early)
    found: Iterator[list[int]] = delivered(step, torch.tensor([3, 7], device=device), count)
    for number in range(count):
        assert next(found) == [3 + number, 7 + number]
        assert step.calls == min(number + early, count - 1)
    assert next(found, None) is None
    assert step.calls == count - 1


def test_who_stops_reading_stops_the_steps(device):
    step = Counting(returns_early=True)
    assert list(islice(delivered(step, torch.tensor([0], device=device), 100), 3)) == [[0], [1], [2]]
    assert step.calls == 3


def test_a_copy_has_the_ids_of_its_time(device):
    ids_B = torch.tensor([1, 2], device=device)
    arrive = on_their_way(ids_B)
    later_B = ids_B + 1
    assert (arrive(), on_their_way(later_B)()) == ([1, 2], [2, 3])


@pytest.mark.parametrize("sampling", [
    Sampling(), Sampling(temperature=0.9, top_k=20), Sampling(temperature=0.7, repetition_penalty=1.3),
])  # fmt: skip
def test_text_and_seeds_are_the_same_and_the_next_text_begins_afresh(model, sampling, device):
    tokens_BL = torch.randint(model.config.vocab_size, (3, PROMPT), device=device)
    padding_B = torch.tensor([0, 2, 5], device=device)
    options = {"max_tokens": NEW, "sampling": sampling, "seed": 5, "padding_B": padding_B}
    expected = list(generate(model, tokens_BL, **options))
    # An id of each row, so that rows end at different steps and the step after the last end is thrown away.
    stop_ids = frozenset(ids[row] for row, ids in enumerate(expected[4:7]))
    stopped = list(generate(model, tokens_BL, stop_ids=stop_ids, **options))
    early = EarlyStep(model, 3, PROMPT + NEW, sampling, compiles=False)
    for _ in range(2):
        assert list(generate(model, tokens_BL, stop_ids=stop_ids, decoder=early, **options)) == stopped
        assert list(generate(model, tokens_BL, decoder=early, **options)) == expected


@pytest.mark.parametrize("history", [False, True])
def test_a_number_that_is_none_is_still_an_error(model, history, device):
    sampling = Sampling(presence_penalty=1.0) if history else Sampling()
    tokens_BL = torch.randint(model.config.vocab_size, (1, PROMPT), device=device)
    early = EarlyStep(model, 1, PROMPT + NEW, sampling, compiles=False)
    texts = generate(model, tokens_BL, max_tokens=NEW, sampling=sampling, decoder=early)
    assert next(texts) != [NOT_A_NUMBER]
    early.cache.values_NBMJE.fill_(torch.nan)
    with pytest.raises(MiniawqError, match="something that is not a number"):
        list(texts)


def test_no_token_waits_for_the_compiler_because_of_it(model, device):
    """Before the first token has been shown nothing is launched that compiles or records."""
    compiled = DecodeStep(model, 1, PROMPT + NEW, compiles=False)
    start = EagerStart(model, compiled)
    assert not PlainStep(model, 1, PROMPT + NEW, Sampling()).returns_early
    assert not compiled.returns_early
    assert not start.returns_early
    if device.type == "cuda":
        compiled.begin(torch.zeros(1, 1, dtype=torch.long, device=device))
        compiled.step(compiled.ids_B)
        assert compiled.returns_early
        assert start.returns_early
