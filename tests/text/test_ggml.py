"""Vocabularies for llama.cpp: which tokenizers have a name there, and SentencePiece's way of joining characters."""

import json
import random
from itertools import pairwise
from typing import Any

import pytest
from tokenizers import Tokenizer

from miniawq.errors import UnsupportedCheckpoint
from miniawq.text.ggml import CASELESS, END, SPACES, TokenKind, Vocabulary, vocabulary
from tests.helpers import tiny_tokenizers

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = {"type": "Digits", "individual_digits": True}
WHOLE = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def split(expression: str) -> dict[str, Any]:
    """The pre_tokenizer of Llama 3, Qwen and Mistral."""
    cut = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, WHOLE | {"use_regex": False}]}


def described(pre_tokenizer: dict[str, Any], **model: Any) -> dict[str, Any]:
    description = json.loads(tiny_tokenizers.byte_level())
    description["pre_tokenizer"] = pre_tokenizer
    description["model"] |= model
    return description


@pytest.mark.parametrize(
    ("description", "name"),
    [
        (described(WHOLE), "gpt-2"),
        (described({"type": "Sequence", "pretokenizers": [DIGITS, WHOLE]}), "smollm"),
        (described(split(LLAMA_3), ignore_merges=True), "llama-bpe"),
        (described(split(LLAMA_3.replace("{1,3}", ""))), "qwen2"),
        (described(split(LLAMA_3.replace("{1,3}", ""))) | {"normalizer": {"type": "NFC"}}, "qwen2"),
        (described(split(TEKKEN), ignore_merges=True), "tekken"),
    ],
)
def test_ways_of_cutting_have_their_names(description, name):
    found = vocabulary(description, 500)
    assert (found.model, found.pre_tokenizer, found.scores) == ("gpt2", name, [])
    assert found.merges == [" ".join(merge) for merge in description["model"]["merges"]]
    for token, token_id in description["model"]["vocab"].items():
        assert found.tokens[token_id] == token
    assert found.kinds[0] == TokenKind.CONTROL
    assert (found.tokens[499], found.kinds[499]) == ("[PAD499]", TokenKind.UNUSED)
    assert len(found.tokens) == len(found.kinds) == 500


@pytest.mark.parametrize(
    "description",
    [
        described(split(LLAMA_3)),  # llama.cpp would look a whole word up before it merges
        described(split(LLAMA_3.replace("{1,3}", "")), ignore_merges=True),
        described(split(LLAMA_3.replace("{1,3}", "{1,2}"))),
        described(split(rf"{CASELESS}|\s+{END}")),
        described(WHOLE | {"add_prefix_space": True}),
        described({"type": "Sequence", "pretokenizers": [DIGITS | {"individual_digits": False}, WHOLE]}),
        described({"type": "Whitespace"}),
        described(WHOLE) | {"normalizer": {"type": "Lowercase"}},
        described(WHOLE, type="Unigram"),
    ],
)
def test_a_tokenizer_without_a_name_is_refused(description):
    with pytest.raises(UnsupportedCheckpoint, match="cannot be written for llama"):
        vocabulary(description, 500)


def sentencepiece(leading: bool = True) -> dict[str, Any]:
    """A tokenizer.json with all pairs that make a token, in the order of its tokens, as converters of SentencePiece
    models write it.
    """
    description = json.loads(tiny_tokenizers.byte_fallback())
    ids = description["model"]["vocab"]
    made = list(dict.fromkeys("".join(merge) for merge in description["model"]["merges"]))
    description["model"]["merges"] = [
        [token[:cut], token[cut:]]
        for token in made
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    if not leading:
        description["normalizer"] = SPACES
    return description


def joined(text: str, found: Vocabulary) -> list[int]:
    """The ids of a text by llama.cpp's rule: the neighbours that make the token of the highest score, the first."""
    ids = {token: token_id for token_id, token in enumerate(found.tokens)}
    parts = list("▁" * found.leading_space + text.replace(" ", "▁"))
    while True:
        pairs = [(-found.scores[ids[a + b]], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not pairs:
            break
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    bytes_of = lambda part: [ids[f"<0x{byte:02X}>"] for byte in part.encode()]  # noqa: E731
    return [token_id for part in parts for token_id in ([ids[part]] if part in ids else bytes_of(part))]


@pytest.mark.parametrize("leading", [True, False])
def test_sentencepiece_joins_as_the_tokenizer_does(leading):
    description = sentencepiece(leading)
    found, tokenizer = vocabulary(description, 600), Tokenizer.from_str(json.dumps(description))
    assert (found.model, found.pre_tokenizer, found.leading_space) == ("llama", "default", leading)
    random.seed(0)
    words = [*" ".join(tiny_tokenizers.CORPUS).split(), "zwölf", "kingking", "☃"]
    texts = [" ".join(random.choices(words, k=8)) for _ in range(100)]
    for text in [*texts, "  two  spaces ", "ononon thethe"]:
        assert joined(text, found) == tokenizer.encode(text, add_special_tokens=False).ids


def test_kinds_of_sentencepiece_tokens():
    found = vocabulary(sentencepiece(), 600)
    kinds = dict(zip(found.tokens, found.kinds, strict=True))
    assert kinds["<unk>"] == TokenKind.UNKNOWN
    assert kinds["<s>"] == kinds["<|im_end|>"] == TokenKind.CONTROL
    assert kinds["<0x0A>"] == TokenKind.BYTE
    assert kinds["▁"] == TokenKind.NORMAL
    assert kinds["[PAD599]"] == TokenKind.UNUSED


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_metaspace_says_whether_a_space_is_put_before_a_text(scheme):
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    description = sentencepiece() | {"normalizer": None, "pre_tokenizer": metaspace}
    assert vocabulary(description, 600).leading_space == (scheme != "never")


def test_merges_that_are_not_those_of_sentencepiece_are_refused():
    """A pair that is missing would be joined there; two places for one token would need two scores."""
    complete = sentencepiece()
    merges = complete["model"]["merges"]
    for changed in (merges[1:], [*merges, merges[0]]):
        description = complete | {"model": complete["model"] | {"merges": changed}}
        with pytest.raises(UnsupportedCheckpoint, match="its merges"):
            vocabulary(description, 600)


def test_another_normalizer_is_refused():
    for changed in ({"normalizer": {"type": "NFKC"}}, {"pre_tokenizer": {"type": "Whitespace"}}):
        with pytest.raises(UnsupportedCheckpoint, match="normalizer"):
            vocabulary(sentencepiece() | changed, 600)
