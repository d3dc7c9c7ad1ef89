"""Limits of ordinary use: many prompts in one process, every plane of Unicode, a full context, deterministic torch."""

import json
import sys
from collections.abc import Iterator

import psutil
import pytest
import torch

from miniawq.__main__ import main
from miniawq.engine.start import PlainStep
from miniawq.errors import InvalidInput
from miniawq.generate import complete, generate, load
from miniawq.text.tokenizer import Tokenizer
from tests.helpers import tiny_checkpoints, tiny_tokenizers
from tests.helpers.verbs import command

CONTEXT = 24
PROMPTS, WARMING = 1500, 300
GROWTH = 4 << 20  # bytes that the later prompts may add


@pytest.fixture
def model_directory(tmp_path):
    directory = tmp_path / "model"
    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 420, "num_hidden_layers": 1}
    tiny_checkpoints.make_dense(directory, max_position_embeddings=CONTEXT, **sizes)
    chat = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages[0].content }}"}
    return tiny_tokenizers.write(directory, tiny_tokenizers.byte_level(), tokenizer_config=chat)


@pytest.mark.thorough
def test_memory_stays_flat_over_many_prompts(model_directory):
    model, tokenizer = load(model_directory, device="cpu")
    seen = []
    for number in range(PROMPTS):
        ids = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": f"{number}"}]))
        assert complete(model, tokenizer, ids, max_tokens=2, seed=number).text is not None
        if number >= WARMING:
            seen.append(psutil.Process().memory_info().rss)
    assert max(seen) - seen[0] < GROWTH


# Unicode.


def planes() -> Iterator[str]:
    """Of each plane a thousand characters: assigned, private, unassigned, and those that are no characters."""
    for plane in range(17):
        codes = [*range(0, 0x10000, 61), *range(0xFFF0, 0x10000), 0xD7FF, 0xE000, 0xFDD0]
        yield "".join(chr((plane << 16) + code) for code in codes if plane or not 0xD800 <= code < 0xE000)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_every_plane_of_unicode_comes_back(tmp_path, kind):
    tokenizer = Tokenizer(tiny_tokenizers.write(tmp_path, getattr(tiny_tokenizers, kind)()))
    for text in planes():
        text = text.removeprefix("\0") if kind == "byte_fallback" else text
        ids = tokenizer.encode(text, add_special_tokens=False)
        # SentencePiece writes a space as U+2581, which is then one too.
        assert tokenizer.decode(ids) == (text.replace("\u2581", " ") if kind == "byte_fallback" else text)
        stream = tokenizer.stream()
        assert "".join([*map(stream.push, ids[:400]), stream.finish()]) == tokenizer.decode(ids[:400])


# The context.


def prompt_of(length: int) -> torch.Tensor:
    return torch.arange(length).unsqueeze(0) % 48


def test_a_context_may_be_filled_to_its_last_token(model_directory):
    model, _ = load(model_directory, device="cpu")
    for length in (1, CONTEXT // 2, CONTEXT - 1):
        assert len(list(generate(model, prompt_of(length), max_tokens=CONTEXT - length))) == CONTEXT - length
        with pytest.raises(InvalidInput, match=f"max_position_embeddings = {CONTEXT}"):
            list(generate(model, prompt_of(length), max_tokens=CONTEXT - length + 1))
    with pytest.raises(InvalidInput, match="do not fit into the context"):
        list(generate(model, prompt_of(CONTEXT), max_tokens=1))


def test_the_last_token_of_a_context_is_that_of_the_whole_text(model_directory):
    """The last step reads the last place of the cache."""
    model, _ = load(model_directory, device="cpu")
    prompt_BL = prompt_of(CONTEXT - 3)
    ids = torch.tensor(list(generate(model, prompt_BL, max_tokens=3))).T
    assert ids[0, -1] == model(torch.cat((prompt_BL, ids[:, :-1]), 1))[0, -1].argmax()


@pytest.mark.parametrize(("spare", "code"), [(1, 0), (0, 1), (-1, 1)])
def test_a_prompt_that_fills_the_context(spare, code, model_directory, capsys):
    text = "!" * (CONTEXT - spare)
    assert main(["generate", str(model_directory), "-p", text, "--raw", "-n", "-1", "--json", "--ignore-eos"]) == code
    told = capsys.readouterr()
    if code:
        assert f"it has {CONTEXT - spare} tokens" in told.err
    else:
        assert json.loads(told.out)["prompt"] == text


def test_a_cache_has_no_place_beyond_the_context(model_directory):
    model, _ = load(model_directory, device="cpu")
    decoder = PlainStep(model, 1, CONTEXT, sampling=None)
    assert decoder.cache.max_seq_len == CONTEXT


# Deterministic algorithms.


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


DETERMINISTIC = {
    "generate": ["-n", "5", "--seed", "1", "--temperature", "0.9"],
    "quantize": ["--num-samples", "1", "--sequence-length", "4", "--group-size", "64"],
    "evaluate": ["--sequence-length", "4", "--json"],
    "convert": [],
}


def written_by(verb, model_directory, folder, capsys):
    """The weights that a verb writes, or the text."""
    folder.mkdir()
    source = tiny_checkpoints.make(folder / "int4")[0] if verb == "convert" else model_directory
    assert main(command(verb, source, folder, *DETERMINISTIC[verb])) == 0
    told = capsys.readouterr().out
    if verb in ("quantize", "convert"):
        return (folder / "out" / "model.safetensors").read_bytes()
    return {k: v for k, v in json.loads(told).items() if "second" not in k} if "--json" in DETERMINISTIC[verb] else told


@pytest.mark.parametrize("verb", DETERMINISTIC)
def test_deterministic_algorithms_change_nothing(verb, model_directory, tmp_path, capsys, request, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # the picture of a report takes longer than all the rest
    plain = written_by(verb, model_directory, tmp_path / "plain", capsys)
    request.getfixturevalue("deterministic")
    assert written_by(verb, model_directory, tmp_path / "again", capsys) == plain
