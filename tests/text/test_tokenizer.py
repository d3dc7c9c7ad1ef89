"""The tokenizer: whole characters in a stream, nothing lost, the right BOS and ends, clear refusals."""

import json
import os
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from miniawq.errors import InvalidInput, NotFound, UnsupportedCheckpoint
from miniawq.text.tokenizer import Tokenizer
from tests.helpers import tiny_tokenizers

KINDS = ["byte_level", "byte_fallback"]
CHARACTERS = st.characters(codec="utf-8")
SENTENCES = st.lists(st.sampled_from(["a", "king", "", "\N{PARTY POPPER}"]), max_size=8).map(" ".join)
TEXTS = st.one_of(st.text(CHARACTERS, max_size=30), SENTENCES)


@cache
def make(kind: str) -> Tokenizer:
    with TemporaryDirectory() as directory:
        return Tokenizer(tiny_tokenizers.write(Path(directory), getattr(tiny_tokenizers, kind)()))


def streamed(tokenizer: Tokenizer, prompt_ids: list[int], ids: list[int]) -> list[str]:
    stream = tokenizer.stream(prompt_ids)
    return [*map(stream.push, ids), stream.finish()]


def behind(prompt: str, whole: str) -> str:
    return whole[len(os.path.commonprefix([prompt, whole])) :]  # noqa: RUF071


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS, data=st.data())
def test_stream_of_text_joins_to_the_text_for_every_split(kind, text, data):
    tokenizer = make(kind)
    ids = tokenizer.encode(text)
    split = data.draw(st.integers(0, len(ids)))
    prompt, pieces = tokenizer.decode(ids[:split]), streamed(tokenizer, ids[:split], ids[split:])
    assert "".join(pieces) == behind(prompt, tokenizer.decode(ids))
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_stream_of_any_ids_joins_to_their_decoding(kind, data):
    tokenizer = make(kind)
    size = 420 if kind == "byte_level" else 520  # some ids lie beyond the vocabulary
    bytes_first = st.one_of(st.integers(0, 262), st.integers(0, size))
    ids = data.draw(st.lists(bytes_first, max_size=12))
    split = data.draw(st.integers(0, len(ids)))
    joined = "".join(streamed(tokenizer, ids[:split], ids[split:]))
    assert joined == behind(tokenizer.decode(ids[:split]), tokenizer.decode(ids))
    stream, held = tokenizer.stream(ids[:split]), data.draw(st.integers(split, len(ids)))
    pushed = [stream.push(token_id) for token_id in ids[split:held]]
    stream.hold_back(ids[held:])
    assert "".join(pushed) + stream.finish() == joined


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(text=TEXTS)
def test_text_survives_encoding(kind, text):
    tokenizer = make(kind)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_stream_shows_a_word_at_once_with_the_space_before_it(kind):
    tokenizer = make(kind)
    ids = tokenizer.encode("there was a king")
    assert (
        "".join(streamed(tokenizer, ids[:-1], ids[-1:])[:-1])
        == tokenizer.decode(ids)[len(tokenizer.decode(ids[:-1])) :]
    )
    pieces = streamed(tokenizer, tokenizer.encode("Once"), tokenizer.encode(" upon a time", add_special_tokens=False))
    assert all(pieces[:-1]), "every token of plain words is shown as it comes"
    assert "".join(pieces).split() == ["upon", "a", "time"]


@pytest.mark.parametrize("kind", KINDS)
def test_stream_holds_a_character_until_its_last_byte_and_flushes_a_cut_one(kind):
    tokenizer = make(kind)
    ids = [tokenizer.encode("\N{PARTY POPPER}", add_special_tokens=False)[place] for place in (-3, -2, -1)]
    start = tokenizer.encode("x\N{PARTY POPPER}", add_special_tokens=False)[: -len(ids)]
    *held, last, tail = streamed(tokenizer, start, ids)
    assert held == ["", ""]
    assert last + tail == "\N{PARTY POPPER}"
    *held, tail = streamed(tokenizer, start, ids[:2])
    assert held == ["", ""]
    assert set(tail) == {"\ufffd"}


def test_stream_finishes_a_character_that_the_prompt_began():
    tokenizer = make("byte_level")
    ids = tokenizer.encode("h\N{PARTY POPPER}!")
    assert "".join(streamed(tokenizer, ids[:3], ids[3:])) == "\N{PARTY POPPER}!"


def test_special_and_unknown_ids_have_no_text():
    tokenizer = make("byte_level")
    king = tokenizer.encode("king")
    ends = tokenizer.encode("<|im_end|>")
    assert len(ends) == 1
    assert tokenizer.decode([*king, *ends, 10**6]) == "king"
    assert tokenizer.decode([*king, *ends], skip_special_tokens=False) == "king<|im_end|>"
    assert "".join(streamed(tokenizer, [], [*ends, *king, 10**6, *ends])) == "king"


@pytest.mark.parametrize(("kind", "named", "text"), [("byte_level", "Ġa", " a"), ("byte_fallback", "▁had", "▁had")])
def test_a_token_is_known_by_its_id_its_name_and_its_text(kind, named, text):
    tokenizer = make(kind)
    token_id = tokenizer.id_of(named)
    assert tokenizer.id_of(str(token_id)) == tokenizer.id_of(text) == token_id
    assert tokenizer.encode("<|im_end|>", False) == [tokenizer.id_of("<|im_end|>")]
    for unknown in ("a king", "", "999999", "9" * 5000):
        with pytest.raises(InvalidInput, match=r"is no single token|there is no token with the id 999999"):
            tokenizer.id_of(unknown)


def test_what_stands_for_unknown_words_is_no_token_of_theirs(tmp_path):
    words = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "king": 1}, unk_token="[UNK]"))
    tokenizer = Tokenizer(tiny_tokenizers.write(tmp_path, words.to_str()))
    assert tokenizer.id_of("king") == 1
    with pytest.raises(InvalidInput, match="'queen' is no single token"):
        tokenizer.id_of("queen")


def test_bos_is_put_once(tmp_path):
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    tokenizer = Tokenizer(tiny_tokenizers.write(tmp_path, tiny_tokenizers.byte_fallback(), tokenizer_config=config))
    bos = tokenizer.bos_id
    assert tokenizer.encode("king")[0] == bos
    assert tokenizer.encode("<s>king").count(bos) == 1
    assert tokenizer.encode("king", add_special_tokens=False).count(bos) == 0
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("kind", "flags", "begins", "ends"),
    [
        ("byte_fallback", {}, True, False),
        ("byte_fallback", {"add_bos_token": False}, False, False),
        ("byte_fallback", {"add_bos_token": True, "add_eos_token": True}, True, True),
        ("byte_level", {}, False, False),
        ("byte_level", {"add_bos_token": True}, True, False),
        ("byte_level", {"add_eos_token": True}, False, True),
        ("byte_level", {"add_bos_token": None, "add_eos_token": False}, False, False),
    ],
)
def test_flags_of_tokenizer_config_override_the_post_processor(tmp_path, kind, flags, begins, ends):
    config = {"bos_token": "<s>", "eos_token": "</s>", **flags}
    description = getattr(tiny_tokenizers, kind)()
    tokenizer = Tokenizer(tiny_tokenizers.write(tmp_path, description, tokenizer_config=config))
    ids = tokenizer.encode("king")
    bos, eos = tokenizer.encode("<s>", False)[-1], tokenizer.encode("</s>", False)[-1]
    assert (ids[0] == bos, ids[-1] == eos) == (begins, ends)
    assert ids.count(bos) == begins
    assert ids.count(eos) == ends


@pytest.mark.parametrize(
    ("tokenizer_config", "config", "generation_config", "bos"),
    [
        ({"bos_token": None}, {"bos_token_id": 3}, {}, None),  # Qwen
        ({"bos_token": {"content": "<s>"}}, {"bos_token_id": 3}, {}, 0),
        ({}, {"bos_token_id": 3}, {"bos_token_id": 2}, 2),
        ({}, {"bos_token_id": 3}, {}, 3),
        ({}, {}, {}, None),
        ({"bos_token": "<not in the vocabulary>"}, {}, {}, None),
    ],
)
def test_bos_comes_from_the_tokenizer_before_the_configs(tmp_path, tokenizer_config, config, generation_config, bos):
    assert tokenizer_with(tmp_path, tokenizer_config, config, generation_config).bos_id == bos


def tokenizer_with(directory, tokenizer_config, config, generation_config):
    configs = {"tokenizer_config": tokenizer_config, "config": config, "generation_config": generation_config}
    return Tokenizer(tiny_tokenizers.write(directory, tiny_tokenizers.byte_level(), **configs))


@pytest.mark.parametrize(
    ("tokenizer_config", "config", "generation_config", "ends"),
    [
        ({"eos_token": "</s>"}, {"eos_token_id": 7}, {"eos_token_id": [3, 7]}, {1, 3, 7}),
        ({"eos_token": {"content": "</s>"}}, {}, {"eos_token_id": 3}, {1, 3}),
        ({"eos_token": None}, {"eos_token_id": None}, {}, set()),
        ({}, {"eos_token_id": [0, 3]}, {"_from_model_config": True}, {0, 3}),
    ],
)
def test_ends_are_those_of_all_files_together(tmp_path, tokenizer_config, config, generation_config, ends):
    assert tokenizer_with(tmp_path, tokenizer_config, config, generation_config).eos_ids == ends


def test_old_checkpoints_name_their_special_tokens_in_special_tokens_map(tmp_path):
    tiny_tokenizers.write(tmp_path, tiny_tokenizers.byte_level(), special_tokens_map={"eos_token": {"content": "</s>"}})
    assert Tokenizer(tmp_path).eos_ids == {1}


def test_limits_inside_tokenizer_json_are_lifted(tmp_path):
    description = json.loads(tiny_tokenizers.byte_level())
    description["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    description["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>",
    }  # fmt: skip
    tokenizer = Tokenizer(tiny_tokenizers.write(tmp_path, json.dumps(description)))
    assert tokenizer.decode(tokenizer.encode("a long sentence of words")) == "a long sentence of words"
    assert tokenizer.encode("king") == make("byte_level").encode("king")


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json", "qwen.tiktoken", "vocab.json"])
def test_other_tokenizers_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UnsupportedCheckpoint, match=name.split(".")[-1]) as caught:
        Tokenizer(tmp_path)
    assert "save_pretrained" in str(caught.value)
    assert caught.value.exit_code == 3


def test_missing_tokenizer_is_not_found(tmp_path):
    with pytest.raises(NotFound, match=r"no tokenizer\.json in"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", r"cannot read .*tokenizer\.json"),
        ("tokenizer.json", '{"model": 1}', r"cannot read .*tokenizer\.json"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json cannot be read"),
        ("generation_config.json", "[]", r"generation_config\.json holds a list"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    tiny_tokenizers.write(tmp_path, tiny_tokenizers.byte_level())
    (tmp_path / name).write_text(content)
    with pytest.raises(UnsupportedCheckpoint, match=message):
        Tokenizer(tmp_path)


def test_text_that_is_not_unicode_is_refused():
    with pytest.raises(InvalidInput, match="not valid Unicode"):
        make("byte_level").encode("\ud800")
