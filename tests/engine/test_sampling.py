"""Sampling, against the definitions in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miniawq.engine.sampling import NOT_A_NUMBER, RANGES, History, Sampling, candidates, draw, penalize, sample
from miniawq.errors import InvalidInput, UnsupportedCheckpoint

LOGITS = st.lists(st.integers(-40, 40).map(lambda n: n / 4), min_size=2, max_size=9, unique=True)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.25, 1.0, 2.0]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.05, 0.3, 0.77, 1.0]),
    min_p=st.sampled_from([0.0, 0.11, 0.5, 1.0]),
)


def softmax(logits):
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def distribution(logits, sampling):
    """Probability of each token by the definitions, one filter after the other."""
    ranked = sorted(range(len(logits)), key=lambda token: -logits[token])
    scaled = [logit / sampling.temperature for logit in logits]
    if sampling.top_k:
        ranked = ranked[: sampling.top_k]
    kept, mass = [], 0.0
    for token, probability in zip(ranked, softmax([scaled[token] for token in ranked]), strict=True):
        if mass < sampling.top_p:
            kept.append(token)
        mass += probability
    probabilities = softmax([scaled[token] for token in kept])
    kept = [token for token, p in zip(kept, probabilities, strict=True) if p >= sampling.min_p * probabilities[0]]
    final = dict(zip(kept, softmax([scaled[token] for token in kept]), strict=True))
    return [final.get(token, 0.0) for token in range(len(logits))]


@settings(max_examples=100, deadline=None)
@given(logits=LOGITS, sampling=SAMPLINGS)
def test_candidates_have_the_probabilities_of_the_definition(logits, sampling):
    logits_BK, ids_BK = candidates(torch.tensor([logits]), sampling)
    found = torch.zeros(len(logits)).scatter(0, ids_BK[0], logits_BK[0].softmax(-1))
    torch.testing.assert_close(found, torch.tensor(distribution(logits, sampling)), atol=2e-6, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    logits=LOGITS,
    prompt=st.lists(st.integers(0, 1), max_size=4),
    generated=st.lists(st.integers(0, 1), max_size=4),
    penalties=st.tuples(*[st.sampled_from([0.0, 0.5, 2.0])] * 2, st.sampled_from([0.8, 1.0, 1.3])),
    last=st.integers(-1, 9),
)
def test_penalties_follow_the_definition(logits, prompt, generated, penalties, last):
    presence, frequency, repetition = penalties
    sampling = Sampling(
        presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition, repeat_last_n=last
    )
    repeatable = (prompt + generated)[-last:] if last else []
    if last == -1:
        repeatable = prompt + generated
    history = History.of_prompt(torch.tensor([prompt], dtype=torch.int64), len(logits))
    for token in generated:
        history.add(torch.tensor([token]))
    expected = []
    for token, logit in enumerate(logits):
        if token in repeatable:
            logit = logit * repetition if logit < 0 else logit / repetition
        expected.append(logit - presence * (token in generated) - frequency * generated.count(token))
    torch.testing.assert_close(penalize(torch.tensor([logits]), sampling, history)[0], torch.tensor(expected))


def test_padding_is_not_history():
    history = History.of_prompt(torch.tensor([[0, 0, 3], [1, 2, 3]]), 5, padding_B=torch.tensor([2, 0]))
    never = math.inf
    assert history.ages_BV.tolist() == [[never, never, never, 1, never], [never, 3, 2, 1, never]]


def test_draw_follows_the_probabilities(device):
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf], device=device)
    generator = torch.Generator(device).manual_seed(0)
    drawn = draw(logits.expand(20_000, 4), generator).flatten().bincount(minlength=4) / 20_000
    # Four standard deviations of a share of 20 000 draws are below 0.015.
    torch.testing.assert_close(drawn.cpu(), logits.softmax(-1).cpu(), atol=0.015, rtol=0)
    assert drawn[3] == 0


def test_temperature_zero_takes_the_best_and_needs_no_generator(device):
    logits_BV = torch.tensor([[0.0, 3.0, 1.0], [5.0, 4.0, 4.5]], device=device)
    assert sample(logits_BV, Sampling()).tolist() == [1, 0]
    history = History.of_prompt(torch.tensor([[1], [0]], device=device), 3)
    assert sample(logits_BV, Sampling(repetition_penalty=9.0), history).tolist() == [2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_same_seed_draws_the_same_tokens(device, dtype):
    logits_BV = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    sampling = Sampling(temperature=1.5, top_k=40, top_p=0.95, min_p=0.01)

    def draws(seed):
        generator = torch.Generator(device).manual_seed(seed)
        return [sample(logits_BV, sampling, generator=generator).tolist() for _ in range(20)]

    torch.manual_seed(3)
    first = draws(7)
    torch.manual_seed(4)
    assert draws(7) == first
    assert draws(8) != first
    assert len({row[0] for row in first}) > 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_a_number_says_so(temperature):
    logits_BV = torch.tensor([[0.0, math.nan, 1.0], [0.0, 9.0, -math.inf]])
    assert sample(logits_BV, Sampling(temperature=temperature, top_k=1)).tolist() == [NOT_A_NUMBER, 1]


def test_the_smallest_temperature_takes_the_best():
    assert sample(torch.tensor([[2.0, 3.0, 2.5]]), Sampling(temperature=1e-300, top_p=0.9)).tolist() == [1]


def test_half_precision_logits_are_widened_before_they_are_divided():
    logits_BV = torch.tensor([[59968.0, 60000.0]], dtype=torch.float16)
    assert sample(logits_BV, Sampling(temperature=0.01)).tolist() == [1]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -0.5}, r"temperature = -0\.5 makes no sense\n  it must be a number, 0 or more"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"temperature": "hot"}, "temperature = 'hot'"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_k": 20.0}, r"top_k = 20\.0 makes no sense\n  it must be a whole number"),
        ({"top_p": 0.0}, r"top_p = 0\.0 makes no sense\n  it must be a number above 0"),
        ({"top_p": 1.5}, r"top_p = 1\.5"),
        ({"min_p": -0.1}, r"min_p = -0\.1"),
        ({"repetition_penalty": 0}, "repetition_penalty = 0"),
        ({"presence_penalty": math.nan}, "presence_penalty = nan"),
        ({"frequency_penalty": math.inf}, "frequency_penalty = inf"),
        ({"repeat_last_n": -2}, r"repeat_last_n = -2 makes no sense\n  it must be a whole number from -1"),
        ({"repeat_last_n": 0.5}, r"repeat_last_n = 0\.5"),
    ],
)
def test_senseless_settings_are_refused(setting, message):
    with pytest.raises(InvalidInput, match=message):
        Sampling(**setting)


def test_penalties_without_history_are_refused():
    with pytest.raises(InvalidInput, match="penalties need the history"):
        sample(torch.zeros(1, 2), Sampling(repetition_penalty=1.1))


QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "pad_token_id": 3}


@pytest.mark.parametrize(
    ("generation_config", "wanted", "expected"),
    [
        ({}, {}, {}),
        (QWEN, {}, {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}),
        (QWEN, {"temperature": 0.0}, {}),
        (QWEN, {"temperature": 0, "repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
        (QWEN, {"top_k": 5}, {"temperature": 0.7, "top_p": 0.8, "top_k": 5, "repetition_penalty": 1.05}),
        ({"do_sample": True}, {}, {}),
        ({"do_sample": True}, {"top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}),
        ({"do_sample": False, "temperature": 0.6}, {}, {}),
        ({"_from_model_config": True}, {"temperature": 0.4}, {"temperature": 0.4}),
        ({}, {"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"do_sample": True, "temperature": 0.6, "top_k": None}, {}, {"temperature": 0.6}),
    ],
)
def test_the_checkpoint_proposes_and_the_user_disposes(generation_config, wanted, expected):
    assert Sampling.choose(generation_config, **{"top_k": None, "min_p": None} | wanted) == Sampling(**expected)


def test_a_generation_config_that_makes_no_sense_is_named_unless_the_user_disposes():
    config = {"do_sample": True, "temperature": 0.7, "top_p": "most"}
    with pytest.raises(UnsupportedCheckpoint, match=r"generation_config\.json: top_p = 'most' .*\n.*\n.* give --top-p"):
        Sampling.choose(config)
    assert Sampling.choose(config, top_p=0.5) == Sampling(temperature=0.7, top_p=0.5)


@pytest.mark.parametrize("value", [True, "0.7", [0.7], {}, math.nan, math.inf, 10**400, -(10**400), 1e300], ids=repr)
@pytest.mark.parametrize("name", sorted(RANGES))
def test_values_of_other_types_and_ranges_are_refused(name, value):
    if value == 1e300 and name == "temperature":
        return
    config = {"do_sample": True, "temperature": 1.0, name: value}
    with pytest.raises(UnsupportedCheckpoint, match=rf"generation_config\.json: {name} = .* makes no sense"):
        Sampling.choose(config)


@pytest.mark.parametrize("value", ["true", 1, 0, [], {}, 0.5])
def test_do_sample_is_true_or_false(value):
    with pytest.raises(UnsupportedCheckpoint, match=r"do_sample = .* makes no sense\n  it must be true or false"):
        Sampling.choose({"do_sample": value, "temperature": 1.0})


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 1e308},
        {"temperature": 2**70, "presence_penalty": 2**70},
        {"temperature": 5e-324},
        {"repetition_penalty": 1e-6},
        {"repetition_penalty": 1e6},
        {"presence_penalty": 1e30, "frequency_penalty": -1e30},
        {"min_p": 5e-324},
        {"top_p": 5e-324},
        {"top_k": 10**300},
    ],
    ids=repr,
)
def test_extreme_settings_draw_a_token(extreme):
    sampling = Sampling(**{"temperature": 1.0} | extreme)
    history = History.of_prompt(torch.tensor([[0, 1, 2]]), 9)
    history.add(torch.tensor([3]))
    logits_BV = torch.linspace(-40, 40, 9)[None]
    assert 0 <= sample(logits_BV, sampling, history).item() < 9
    assert penalize(logits_BV, sampling, history).isfinite().all()
