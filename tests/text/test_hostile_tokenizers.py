"""Tokenizers that panic, hang, grow their text or hold values of other types: a refusal, or a notice, and soon."""

import base64
import contextlib
import copy
import json
import os
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniawq.checkpoint import strict
from miniawq.errors import DoesNotFit, InvalidInput, MiniawqError, UnsupportedCheckpoint
from miniawq.text import library
from miniawq.text.tokenizer import Tokenizer
from tests.helpers import ROOT, tiny_tokenizers

PLAIN = json.loads(tiny_tokenizers.byte_fallback())
VALUES = [None, True, -1, 2**70, 1.5, "", "x", [], [[]], {}, [None], {"type": "x"}]


def made(tmp_path, **parts):
    return Tokenizer(tiny_tokenizers.write(tmp_path, json.dumps(PLAIN | parts)))


def replace(old, new, kind="String"):
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


def chain(name, *parts):
    return {"type": "Sequence", name: list(parts)}


BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}
CHARSMAP = base64.b64encode((4).to_bytes(4, "little") + b"\0" * 4 + b"x" * 5000 + b"\0").decode()
GROWING = {
    "replacements": {"normalizer": chain("normalizers", *[replace("a", "aa")] * 40)},
    "expressions": {"normalizer": chain("normalizers", *[replace(".", "aa", "Regex")] * 40)},
    "empty matches": {"normalizer": chain("normalizers", *[replace("", "a", "Regex")] * 40)},
    "sequences in sequences": {
        "normalizer": chain("normalizers", *[chain("normalizers", *[replace("a", "aa")] * 4)] * 9)
    },
    "one long replacement": {"normalizer": replace("a", "b" * 10**5)},
    "prefixes": {"normalizer": {"type": "Prepend", "prepend": "x" * 10**5}},
    "bytes of bytes": {"pre_tokenizer": chain("pretokenizers", *[BYTES] * 40)},
    "decoded replacements": {"decoder": chain("decoders", *[replace("a", "aa")] * 40)},
    "a post-processor": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 999 + [{"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1] * 9999, "tokens": ["<s>"] * 9999}},
        }
    },
    "affixes": {"model": PLAIN["model"] | {"continuing_subword_prefix": "x" * 10**5}},
}


@pytest.mark.parametrize("kind", GROWING)
def test_a_tokenizer_that_makes_texts_grow_is_refused_before_it_does(tmp_path, kind):
    started = time.monotonic()
    with pytest.raises(UnsupportedCheckpoint, match=r"cannot read .*tokenizer\.json"):
        made(tmp_path, **GROWING[kind])
    assert time.monotonic() - started < 2


def test_growth_is_counted_along_a_chain():
    assert library._growth(chain("normalizers", replace("ab", "abcd"), replace("long", "x"), {"type": "NFKC"})) == 2
    assert library._growth({"type": "Precompiled", "precompiled_charsmap": CHARSMAP}) == 5000
    assert library._growth(PLAIN["decoder"]) == 1
    assert library.growth_of(None) == 1


def test_a_text_may_be_as_long_as_its_growth_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "MAX_CHARACTERS", 1000)
    tokenizer = made(tmp_path, normalizer=replace("a", "aaaa"))
    assert len(tokenizer.encode("a" * 250, False)) <= 1000
    with pytest.raises(InvalidInput, match=r"the text is too long for the tokenizer\n  it has 251 .* the limit is 250"):
        tokenizer.encode("a" * 251)


def test_long_tokens_are_refused_when_they_are_decoded(tmp_path):
    description = copy.deepcopy(PLAIN)
    token = {"id": 999, "content": "x" * 20000, "special": False, "single_word": False}
    description["added_tokens"].append(token | {"lstrip": False, "rstrip": False, "normalized": False})
    tokenizer = made(tmp_path, **description)
    ids = tokenizer.encode("x" * 20000, False)
    with pytest.raises(UnsupportedCheckpoint, match="its tokens have more than 16384 characters"):
        tokenizer.decode(ids)


@pytest.mark.parametrize("place", ["normalizer", "decoder"])
def test_an_expression_that_never_ends_is_left_behind(tmp_path, monkeypatch, place):
    monkeypatch.setattr(library, "SECONDS", 0.2)
    monkeypatch.setattr(library, "CHARACTERS_PER_SECOND", 1e6)
    slow = replace("(?:a|a){1,16}$", "x", "Regex")
    description = copy.deepcopy(PLAIN)
    token = {"id": 999, "content": "a" * 500 + "c", "special": False, "single_word": False}
    description["added_tokens"].append(token | {"lstrip": False, "rstrip": False, "normalized": False})
    tokenizer = made(tmp_path, **description | {place: slow})
    with pytest.raises(UnsupportedCheckpoint, match="it takes longer than 0 seconds for a text"):
        tokenizer.decode(tokenizer.encode("a" * 500 + "c" if place == "decoder" else "a" * 900 + "b", False))


def test_a_panic_of_the_library_is_a_refusal(tmp_path):
    tokenizer = made(tmp_path, normalizer=replace("(a+)+b", "x", "Regex"))
    with pytest.raises(UnsupportedCheckpoint, match="PanicException"):
        tokenizer.encode("a" * 60)


BROKEN = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}


def test_a_panic_is_told_in_our_words_alone(tmp_path, capfd):
    """The library's own are pages long."""
    with pytest.raises(UnsupportedCheckpoint, match="PanicException"):
        made(tmp_path, **BROKEN)
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


def test_stderr_comes_back_when_the_last_thread_has_left(capfd):
    with library.silence:
        with library.silence:
            os.write(2, b"lost")
        os.write(2, b"lost, too")
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


def test_a_process_without_stderr_reads_tokenizers(tmp_path):
    tiny_tokenizers.write(tmp_path, tiny_tokenizers.byte_level())
    program = (
        "import os, sys; os.close(2); from miniawq.text.tokenizer import Tokenizer;"
        "print(len(Tokenizer(sys.argv[1]).encode('king')) > 0)"
    )
    run = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, cwd=ROOT, check=False)
    assert run.stdout == b"True\n"


def test_a_dropout_left_over_from_training_is_off(tmp_path):
    texts = made(tmp_path, model=PLAIN["model"] | {"dropout": 0.9})
    whole = Tokenizer(tiny_tokenizers.write(tmp_path, json.dumps(PLAIN)))
    for _ in range(5):
        assert texts.encode("Once upon a time there was a king") == whole.encode("Once upon a time there was a king")


PREFIXES = {
    "plain": '"continuing_subword_prefix": "x"',
    "spelled in escapes": '"continuing_subword_\\u0070refix": "x"',
    "twice": '"continuing_subword_prefix": "x", "continuing_subword_prefix": null',
}


@pytest.mark.parametrize("kind", PREFIXES)
def test_a_prefix_that_cuts_a_character_is_refused(tmp_path, kind):
    """The library would end the process: half of a merge's character is no text."""
    text = json.dumps(PLAIN).replace('"continuing_subword_prefix": null', PREFIXES[kind])
    assert text != json.dumps(PLAIN)
    with pytest.raises(UnsupportedCheckpoint, match="it has a continuing_subword_prefix"):
        Tokenizer(tiny_tokenizers.write(tmp_path, text))


def test_letters_in_escapes_are_no_prefix(tmp_path):
    text = json.dumps(PLAIN).replace('"version"', '"\\u0076ersion"')
    assert Tokenizer(tiny_tokenizers.write(tmp_path, text)).encode("king", False)


@pytest.mark.parametrize("ids", [[-1], [2**40], [1.5], ["x"], [None]])
def test_numbers_that_are_no_ids_are_refused(tmp_path, ids):
    with pytest.raises(InvalidInput, match="these are not the ids of tokens"):
        made(tmp_path).decode(ids)


def test_files_that_are_too_large_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setitem(strict.LIMITS, "tokenizer.json", 10)
    with pytest.raises(UnsupportedCheckpoint, match="bytes, and a file of its kind has at most 10"):
        made(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(library, "BYTES_PER_FILE_BYTE", 1 << 40)
    with pytest.raises(DoesNotFit, match=r"tokenizer\.json takes \d+ MiB of memory while it is read"):
        made(tmp_path)


FILES = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "config.json"]


@pytest.mark.parametrize("value", ["null", "[]", '"text"', "3", "true", "NaN", "", "\x00", "[" * 9999, '{"a":' * 9999])
@pytest.mark.parametrize("file", FILES)
def test_a_file_that_holds_no_object_is_refused(tmp_path, file, value):
    tiny_tokenizers.write(tmp_path, tiny_tokenizers.byte_level())
    (tmp_path / file).write_text(value)
    with pytest.raises(UnsupportedCheckpoint, match=file.replace(".", r"\.")):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize("key", ["bos_token", "eos_token", "add_bos_token", "add_eos_token", "chat_template"])
def test_values_of_other_types_in_tokenizer_config(tmp_path, key, value):
    tiny_tokenizers.write(tmp_path, tiny_tokenizers.byte_level(), tokenizer_config={key: value})
    allowed = {"add_bos_token": bool, "add_eos_token": bool}.get(key, str)
    fine = value is None or isinstance(value, allowed) or (key == "chat_template" and value in ([], {}, {"type": "x"}))
    if fine:
        Tokenizer(tmp_path).encode("king")
    else:
        with pytest.raises(UnsupportedCheckpoint, match=rf"{key}.* makes no sense|the chat template of"):
            Tokenizer(tmp_path)


@pytest.mark.parametrize("value", [*VALUES, "2", [2, "2"], [True], 2**31, 2.0], ids=repr)
@pytest.mark.parametrize("key", ["eos_token_id", "bos_token_id"])
@pytest.mark.parametrize("file", ["generation_config", "config"])
def test_ids_of_other_types_are_refused_and_none_is_said(tmp_path, caplog, file, key, value):
    tiny_tokenizers.write(tmp_path, tiny_tokenizers.byte_level(), **{file: {key: value}})
    if value in (None, []) or value == -1:
        assert Tokenizer(tmp_path).eos_ids == frozenset()
        assert Tokenizer(tmp_path).bos_id is None
        assert ("is no id, and not used" in caplog.text) == (value == -1)
    else:
        with pytest.raises(UnsupportedCheckpoint, match=rf"{file}\.json: {key} = .* makes no sense"):
            Tokenizer(tmp_path)


def parts(value, path=()):
    """The place of every value in a description, but for the vocabulary's."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if path[-1:] not in (("vocab",), ("merges",)):
            yield from parts(inner, (*path, key))


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_value_in_a_tokenizer_may_be_of_another_type(tmp_path_factory, kind, data):
    description = json.loads(getattr(tiny_tokenizers, kind)())
    for _ in range(data.draw(st.integers(1, 2))):
        *path, last = data.draw(st.sampled_from([path for path in parts(description) if path]))
        place = description
        for key in path:
            place = place[key]
        place[last] = copy.deepcopy(data.draw(st.sampled_from(VALUES)))
    directory = tmp_path_factory.mktemp("tokenizer")
    with contextlib.suppress(MiniawqError):
        tokenizer = Tokenizer(tiny_tokenizers.write(directory, json.dumps(description)))
        tokenizer.decode(tokenizer.encode("Há a king \N{PARTY POPPER} <s>"))
