"""The token loop and the text over it: batches, splits, ends, stop strings, figures."""

import copy
import itertools
import math
import threading
import weakref
from contextlib import closing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miniawq import generate as generate_module
from miniawq.checkpoint.loading import load_model
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.engine.completion import Completion, StopStrings
from miniawq.engine.memory import bytes_per_token, footprint
from miniawq.engine.sampling import Sampling, fold_seed
from miniawq.engine.step import DecodeStep
from miniawq.errors import InvalidInput, MiniawqError, UnsupportedCheckpoint
from miniawq.generate import complete, generate, load
from miniawq.model import Decoder, KVCache
from miniawq.text.tokenizer import Tokenizer
from tests.helpers import tiny_checkpoints, tiny_tokenizers
from tests.helpers.early_steps import EarlyStep


@pytest.fixture(scope="module")
def model(device):
    config = tiny_checkpoints.config_of(vocab_size=420, num_hidden_layers=1, max_position_embeddings=96)
    model = tiny_checkpoints.dense_model(config)
    # Random logits are nearly level; larger ones make a choice that rounding does not change.
    model.lm_head.weight.mul_(20)
    return model.to(device)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer(tiny_tokenizers.write(directory, tiny_tokenizers.byte_level()))


def tokens(count, device="cpu", rows=1, seed=0):
    return torch.randint(4, 420, (rows, count), generator=torch.Generator().manual_seed(seed)).to(device)


def continued(model, tokens_BL, count, **options):
    return list(generate(model, tokens_BL, max_tokens=count, **options))


def test_greedy_is_the_argmax_of_the_whole_text_at_every_step(model, device):
    text_BL = tokens(7, device)
    for (found,) in continued(model, text_BL, 12):
        expected = model(text_BL)[0, -1].argmax()
        assert found == expected
        text_BL = torch.cat((text_BL, expected[None, None]), dim=1)


@pytest.mark.parametrize("chunk", [1, 2, 3, 6, 7, 50])
def test_the_prompt_may_run_in_pieces(model, device, chunk):
    assert continued(model, tokens(7, device), 10, prefill_chunk=chunk) == continued(model, tokens(7, device), 10)


@pytest.mark.parametrize(("rows", "pieces"), [(1, [6, 1]), (2, [3, 3, 1]), (5, [1] * 7), (9, [1] * 7)])
def test_a_piece_is_so_many_tokens_of_all_rows_together(model, device, monkeypatch, rows, pieces):
    seen, forward = [], Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda *given: seen.append(given[1].shape) or forward(*given))
    continued(model, tokens(7, device, rows), 1, prefill_chunk=6)
    assert seen == [(rows, length) for length in pieces]


def test_text_goes_on_the_same_from_wherever_it_is_split(model, device):
    prompt_BL = tokens(5, device)
    whole = continued(model, prompt_BL, 12)
    for split in range(1, 12):
        known_BL = torch.cat((prompt_BL, torch.tensor(whole[:split], device=device).T), dim=1)
        assert continued(model, known_BL, 12 - split) == whole[split:]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(repetition_penalty=1.5)])
def test_left_padded_rows_go_on_as_they_do_alone(model, device, sampling):
    lengths = [9, 4, 1]
    rows = [tokens(length, device, seed=length) for length in lengths]
    alone = [continued(model, row, 10, sampling=sampling) for row in rows]
    # The padding is the token that comes next: whoever reads it writes something else.
    padded_BL = torch.tensor([steps[0] for steps in alone], device=device).repeat(1, 9)
    for row, length in zip(range(3), lengths, strict=True):
        padded_BL[row, 9 - length :] = rows[row]
    padding_B = torch.tensor([9 - length for length in lengths], device=device)
    together = continued(model, padded_BL, 10, padding_B=padding_B, sampling=sampling)
    assert together == [[a, b, c] for ((a,), (b,), (c,)) in zip(*alone, strict=True)]


def test_each_row_ends_at_its_own_stop_id(model, device):
    prompts_BL = tokens(4, device, rows=2)
    free = continued(model, prompts_BL, 8)
    first_end = free[2][0]
    before = [step[0] for step in free].index(first_end)
    steps = continued(model, prompts_BL, 8, stop_ids=frozenset({first_end}))
    assert steps[before][0] == first_end
    assert all(step[0] is None for step in steps[before + 1 :])
    assert [step[1] for step in steps] == [step[1] for step in free][: len(steps)]
    both = frozenset({free[0][0], free[0][1]})
    assert continued(model, prompts_BL, 8, stop_ids=both) == free[:1]


def test_the_same_seed_writes_the_same_text(model, device):
    sampling = Sampling(temperature=2.0, top_p=0.9)
    first = continued(model, tokens(5, device), 10, sampling=sampling, seed=5)
    torch.manual_seed(99)
    assert continued(model, tokens(5, device), 10, sampling=sampling, seed=5) == first
    assert continued(model, tokens(5, device), 10, sampling=sampling, seed=6) != first


def test_a_large_frequency_penalty_repeats_nothing(model, device):
    found = [ids[0] for ids in continued(model, tokens(5, device), 40, sampling=Sampling(frequency_penalty=1e9))]
    assert len(set(found)) == 40


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_a_decode_step_writes_what_the_model_writes_text_after_text(model, device, temperature, penalty):
    if temperature and device.type == "cuda":
        pytest.skip("a recorded step may draw other random numbers")
    sampling = Sampling(temperature=temperature, repetition_penalty=penalty)
    decoder = DecodeStep(model, 2, 40, sampling, compiles=device.type == "cuda")
    for seed in range(3):
        prompt_BL, padding_B = tokens(5 + seed, device, rows=2, seed=seed), torch.tensor([0, 2], device=device)
        options = {"sampling": sampling, "seed": seed, "padding_B": padding_B}
        found = continued(model, prompt_BL, 12, decoder=decoder, **options)
        assert found == continued(model, prompt_BL, 12, **options)


@pytest.mark.parametrize(
    ("rows", "room", "sampling"), [(2, 16, Sampling()), (1, 8, Sampling()), (1, 16, Sampling(temperature=1.0))]
)
def test_a_decoder_made_for_another_text_is_refused(model, device, rows, room, sampling):
    decoder = DecodeStep(model, rows, room, sampling, compiles=False)
    with pytest.raises(InvalidInput, match="made for another text\n  wanted: 1 rows, 9 positions"):
        continued(model, tokens(5, device), 4, decoder=decoder)


def test_only_the_last_position_is_projected(model, device):
    cache = KVCache(model.config, 2, 8, device=device)
    assert model.last_logits(tokens(5, device, rows=2), cache).shape == (2, 420)


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), 1, r"the prompt has no tokens"),
        (torch.tensor([[420]]), 1, r"an id that the model does not know\n  id 420; config\.json: vocab_size = 420"),
        (torch.tensor([[4, -3]]), 1, r"an id that the model does not know\n  id -3"),
        (torch.tensor([[4] * 90]), 7, r"do not fit into the context\n  90 in the prompt and 7 new; .* = 96"),
        (torch.tensor([[4]]), 0, r"do not fit into the context"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(model, device, prompt, count, message):
    with pytest.raises(InvalidInput, match=message):
        continued(model, prompt.to(device), count)


def test_the_context_may_be_filled_to_the_last_position(model, device):
    assert len(continued(model, torch.full((1, 90), 4, device=device), 6)) == 6


def test_weights_that_are_not_numbers_are_named(model, device):
    broken = copy.deepcopy(model)
    broken.lm_head.weight[7] = math.nan
    with pytest.raises(
        UnsupportedCheckpoint, match=r"not a number\n  lm_head\.weight holds values that are not finite"
    ):
        continued(broken, tokens(5, device), 4)


@pytest.mark.parametrize(("dtype", "reason"), [(torch.float32, "too large"), (torch.float16, "float16 may be too nar")])
def test_logits_that_are_not_numbers_are_an_error(model, dtype, reason):
    broken = copy.deepcopy(model).to(dtype)
    for layer in (broken.model.layers[0].mlp.up_proj, broken.model.layers[0].mlp.gate_proj):
        layer.weight.fill_(torch.finfo(dtype).max)
    with pytest.raises(MiniawqError, match=rf"not a number\n.*{reason}"):
        continued(broken, tokens(5, model.device), 4)


@pytest.mark.parametrize("padding", [[5, 0], [9, 0], [-1, 0], [0], [0, 0, 0], [0.5, 0.0], [[0, 0]]])
def test_padding_that_leaves_no_prompt_is_refused(model, padding):
    with pytest.raises(InvalidInput, match=r"padding_B does not fit the prompt\n  wanted: for each of 2 rows"):
        continued(model, tokens(5, rows=2), 2, padding_B=torch.tensor(padding))


def test_seeds_of_64_bits_give_their_own_texts(model):
    sampling, seeds = Sampling(temperature=2.0), [7, 7 + 2**32, 7 + 2**33, 7 + 2**63, 2**64 - 1]
    texts = [continued(model, tokens(5, model.device), 12, sampling=sampling, seed=seed) for seed in seeds]
    assert len({str(text) for text in texts}) == len(seeds)
    assert fold_seed(2**32 - 1) == 2**32 - 1
    for seed in (-1, 2**64):
        with pytest.raises(InvalidInput, match=r"makes no sense\n  it must be a whole number from 0 to"):
            continued(model, tokens(5), 1, seed=seed)


def cut(text, stops):
    """The text before the stop string that is complete first, the longer of two that end together."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


@given(
    text=st.text("ab", min_size=4, max_size=14),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    data=st.data(),
)
def test_stop_strings_cut_wherever_the_pieces_end(text, stops, data):
    borders = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *borders, len(text)])]
    filter = StopStrings(stops)
    shown = [filter.push(piece) for piece in pieces]
    assert ("".join(shown) + filter.finish(), filter.found) == cut(text, stops)
    for number in range(len(pieces)):
        seen, sent = "".join(pieces[: number + 1]), "".join(shown[: number + 1])
        held = seen[len(sent) :]
        assert filter.found or not held or any(stop.startswith(held) for stop in stops), "held without a reason"


class Clock:
    """Seconds 0, 1, 2, ..."""

    def __init__(self):
        self.now = itertools.count()

    def __call__(self):
        return float(next(self.now))


def test_a_stop_string_ends_the_text_across_token_borders(tokenizer):
    ids = tokenizer.encode("Once upon a time there was a king")
    assert len(tokenizer.encode("time there")) > 1
    completion = Completion(tokenizer, [], ids, stop=["time there", "never"])
    assert "".join(completion) == completion.text == "Once upon a "
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "time there")
    assert completion.ids == ids[: len(completion.ids)]
    assert len(completion.ids) < len(ids)


def test_a_stop_id_ends_the_text_and_is_not_shown(tokenizer):
    ids = tokenizer.encode("a king<|im_end|> had")
    completion = Completion(tokenizer, [], ids, stop_ids=frozenset(tokenizer.encode("<|im_end|>")))
    assert "".join(completion) == "a king"
    assert completion.finish_reason == "stop"
    assert completion.stop_reason == completion.ids[-1] == tokenizer.encode("<|im_end|>")[0]


def test_text_that_only_began_a_stop_string_is_shown_at_the_end(tokenizer):
    completion = Completion(tokenizer, [], tokenizer.encode("a king had th"), stop=["three"])
    assert "".join(completion) == "a king had th"
    assert (completion.finish_reason, completion.stop_reason) == ("length", None)


def test_figures_come_from_the_clock(tokenizer):
    completion = Completion(tokenizer, [1, 2, 3], tokenizer.encode("Once"), clock=Clock())
    assert completion.record()["generation_tps"] == 0
    list(completion)
    record = completion.record()
    assert (record["prompt_tokens"], record["prompt_tps"], record["first_token_s"]) == (3, 3.0, 1.0)
    assert record["generation_tps"] == (1.0 if len(record["tokens"]) > 1 else 0.0)
    assert record["generation_tokens"] == len(record["tokens"])


def test_an_interrupted_completion_knows_what_has_come(tokenizer):
    def ids():
        yield from tokenizer.encode("Once upon")
        raise KeyboardInterrupt

    completion = Completion(tokenizer, [], ids(), clock=Clock())
    with pytest.raises(KeyboardInterrupt):
        list(completion)
    assert completion.text == "Once upon"
    assert completion.finish_reason is None
    assert completion.record()["generation_tps"] == 1.0


def test_complete_is_generate_as_text(model, tokenizer, device):
    prompt_ids = tokenizer.encode("Once upon")
    completion = complete(model, tokenizer, prompt_ids, max_tokens=9, stop_ids=frozenset())
    text = "".join(completion)
    ids = [token for (token,) in continued(model, torch.tensor([prompt_ids], device=device), 9)]
    assert completion.ids == ids
    assert tokenizer.decode(prompt_ids + ids).endswith(text)


@pytest.mark.parametrize("make", [None, DecodeStep, EarlyStep])
@pytest.mark.parametrize("stop", [(), ["<|im"]])
def test_pieces_are_the_text_with_ids_logprobs_and_the_reason(model, tokenizer, device, make, stop):
    """Of a text whose bytes are often no character: a piece has several ids then."""
    prompt_ids = tokenizer.encode("Once upon")
    decoder = make and make(model, 1, 64, compiles=False)
    options = {"max_tokens": 20, "stop_ids": frozenset(), "decoder": decoder}
    text = "".join(complete(model, tokenizer, prompt_ids, **options))
    stop = [text[9:12]] if stop else []
    completion = complete(model, tokenizer, prompt_ids, stop=stop, logprobs=2, **options)
    *pieces, last = completion.pieces()
    assert "".join(piece.text for piece in pieces) + last.text == (text[: text.index(stop[0])] if stop else text)
    assert [piece.finish_reason for piece in pieces] == [None] * len(pieces)
    assert last.finish_reason == ("stop" if stop else "length")
    assert all(piece.text and piece.ids for piece in pieces)
    ids = [token_id for piece in [*pieces, last] for token_id in piece.ids]
    assert ids == completion.ids
    told = [place for piece in [*pieces, last] for place in piece.logprobs]
    assert [place.chosen[0] for place in told] == ids
    logprobs_LV = model(torch.tensor([[*prompt_ids, *ids]], device=device))[0, len(prompt_ids) - 1 : -1].log_softmax(-1)
    best_LK, ids_LK = logprobs_LV.topk(2)
    found = [[logprob for _, logprob in place.best] for place in told]
    torch.testing.assert_close(torch.tensor(found), best_LK.cpu(), atol=1e-4, rtol=1e-4)
    assert [[token_id for token_id, _ in place.best] for place in told] == ids_LK.tolist()


def test_a_text_is_taken_by_another_thread_and_left_there(model, tokenizer):
    """What has been begun here is closed there, and its cache is free."""
    completion = complete(model, tokenizer, tokenizer.encode("Once upon"), max_tokens=20, stop_ids=frozenset())
    expected, taken = "".join(completion), []
    left = complete(model, tokenizer, tokenizer.encode("Once upon"), max_tokens=20, stop_ids=frozenset())

    def take():
        with closing(left.pieces()) as pieces:
            taken.extend(next(pieces) for _ in range(3))

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    assert len(taken) == 3
    assert expected.startswith("".join(piece.text for piece in taken))
    assert left._new_ids.gi_frame is None


def test_bytes_read_count_shared_weights_once_and_looked_up_rows_not_at_all():
    config = tiny_checkpoints.config_of(num_hidden_layers=1)
    untied = tiny_checkpoints.dense_model(config)
    tied = tiny_checkpoints.dense_model(config | {"tie_word_embeddings": True})
    matrix = 48 * 128 * 4
    everything = sum(parameter.nbytes for parameter in untied.parameters())
    assert bytes_per_token(untied) == everything - matrix
    assert bytes_per_token(tied) == everything - matrix


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_bytes_read_count_packed_weights(tmp_path, dtype, device):
    """In the form they are loaded in: the plan of the same checkpoint says the same."""
    checkpoint = open_checkpoint(tiny_checkpoints.make(tmp_path, stored=torch.bfloat16)[0])
    needed = footprint(checkpoint, dtype, device=device.type, max_seq_len=8)
    model = load_model(checkpoint, device, dtype)
    assert bytes_per_token(model) == needed.weights - model.model.embed_tokens.weight.nbytes


@pytest.mark.parametrize("take", [iter, Completion.pieces])
@pytest.mark.parametrize("ends", ["closed", "at its end", "at a stop string"])
def test_a_text_that_has_ended_keeps_no_cache(ends, take, monkeypatch):
    model, tokenizer = load(device="cpu")
    caches, make = [], generate_module.PlainStep

    def made(*arguments):
        step = make(*arguments)
        caches.append(weakref.ref(step.cache))
        return step

    monkeypatch.setattr(generate_module, "PlainStep", made)
    stop = [" king"] if ends == "at a stop string" else []
    completion = complete(model, tokenizer, tokenizer.encode("Once upon a time"), max_tokens=8, stop=stop)
    pieces = take(completion)
    next(pieces)
    assert caches[0]() is not None
    pieces.close() if ends == "closed" else list(pieces)
    assert caches[0]() is None
    assert (completion.finish_reason is None) == (ends == "closed")
