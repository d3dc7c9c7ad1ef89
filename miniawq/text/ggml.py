"""The vocabulary of a tokenizer.json as the files of llama.cpp hold it: tokens by id, their kinds, scores and merges.

llama.cpp has the ways to cut a text into words built in, by name, and no normalizer but a space for SentencePiece's
`▁`. So a tokenizer.json is translated where llama.cpp is known to give the same ids, and refused where it is not.
Read in llama.cpp as of llama-cpp-python 0.3.36: `src/llama-vocab.cpp`, and `conversion/base.py` for the table of names.
"""

from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import Any, NamedTuple

from miniawq.errors import UnsupportedCheckpoint


class TokenKind(IntEnum):
    """`enum llama_token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Vocabulary(NamedTuple):
    """What llama.cpp makes a tokenizer from; scores belong to SentencePiece's kind, merges to the byte-level one."""

    model: str
    pre_tokenizer: str
    tokens: list[str]
    kinds: list[TokenKind]
    scores: list[float]
    merges: list[str]
    leading_space: bool


BYTE_LEVEL = "ByteLevel"  # GPT-2's expression, which is part of that step
DIGITS = r"\p{N}"
END = r"(?!\S)|\s+"
CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORD = r"[^\r\n\p{L}\p{N}]?"
# Expressions that cut a text into words, in order, and whether a whole word is looked up before it is merged.
WORDS = {
    ((BYTE_LEVEL,), False): "gpt-2",
    ((DIGITS, BYTE_LEVEL), False): "smollm",
    ((rf"{CASELESS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+{END}",), True): "llama-bpe",
    ((rf"{CASELESS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+{END}",), False): "qwen2",
    (
        (
            rf"{WORD}{UPPER}*{LOWER}+|{WORD}{UPPER}+{LOWER}*|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+{END}",
        ),
        True,
    ): "tekken",
}
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


def vocabulary(description: Mapping[str, Any], rows: int) -> Vocabulary:
    """The vocabulary of a parsed tokenizer.json for an embedding of so many rows; those without a token are unused.

    UnsupportedCheckpoint where llama.cpp would cut texts in another way.
    """
    model = description["model"]
    if model.get("type", "BPE") != "BPE":
        raise _refusal(f"its model is {model['type']}", "only BPE is translated")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    tokens, kinds = _tokens(description, rows)
    if model.get("byte_fallback"):
        ranks = _ranks([token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenKind.NORMAL], merges)
        scores = [float(-ranks.get(token, len(merges))) for token in tokens]
        return Vocabulary("llama", "default", tokens, kinds, scores, [], _leading_space(description))
    if (kind := (description.get("normalizer") or {}).get("type", "NFC")) != "NFC":
        raise _refusal(f"its normalizer is {kind}", "llama.cpp has none")
    words = WORDS.get((tuple(_cuts(description["pre_tokenizer"])), bool(model.get("ignore_merges"))))
    if words is None:
        known = ", ".join(WORDS.values())
        raise _refusal("its pre_tokenizer is none of those that have a name in llama.cpp", f"known here: {known}")
    return Vocabulary("gpt2", words, tokens, kinds, [], [" ".join(merge) for merge in merges], False)


def _tokens(description: Mapping[str, Any], rows: int) -> tuple[list[str], list[TokenKind]]:
    """The text and the kind of each id."""
    model, kinds = description["model"], [TokenKind.UNUSED] * rows
    tokens = [f"[PAD{token_id}]" for token_id in range(rows)]
    for token, token_id in model["vocab"].items():
        is_byte = model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
        tokens[token_id], kinds[token_id] = token, TokenKind.BYTE if is_byte else TokenKind.NORMAL
    for added in description["added_tokens"]:
        kind = TokenKind.CONTROL if added["special"] else TokenKind.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], kind
    if (unknown := model.get("unk_token")) in model["vocab"]:
        kinds[model["vocab"][unknown]] = TokenKind.UNKNOWN
    return tokens, kinds


def _cuts(step: Mapping[str, Any] | None) -> Iterator[str]:
    """The expressions by which a pre_tokenizer cuts a text, in order; a step that is not known, by its description."""
    match step:
        case {"type": "Sequence", "pretokenizers": steps}:
            for inner in steps:
                yield from _cuts(inner)
        case {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}:
            yield expression
        case {"type": "Digits", "individual_digits": True}:
            yield DIGITS
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
            return
        case {"type": "ByteLevel", "add_prefix_space": False}:
            yield BYTE_LEVEL
        case _:
            yield repr(step)


def _ranks(tokens: list[str], merges: list[tuple[str, ...]]) -> dict[str, int]:
    """The rank of each token that two others make.

    SentencePiece joins those two neighbours that make the best token, BPE those that come first in a list of pairs. It
    is the same if every pair that makes a token is in the list, and pairs that make the same one follow each other.
    """
    ranks: dict[str, int] = {}
    last, known, pairs = "", set(tokens), set(merges)
    for rank, pair in enumerate(merges):
        token = "".join(pair)
        if token != last and ranks.setdefault(token, rank) != rank:
            raise _refusal(f"its merges make {token!r} at two places", "SentencePiece has one score for a token")
        last = token
    for token in tokens:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if known.issuperset(pair) and pair not in pairs:
                raise _refusal(f"its merges lack {pair[0]!r} with {pair[1]!r}", "SentencePiece joins them")
    return ranks


def _leading_space(description: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text."""
    match description.get("normalizer"), description.get("pre_tokenizer"):
        case {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, steps]}, None if steps == SPACES:
            return True
        case steps, None if steps == SPACES:
            return False
        case None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}:
            return scheme != "never"
    raise _refusal("its normalizer is not SentencePiece's", "llama.cpp writes ▁ for spaces and nothing else")


def _refusal(what: str, why: str) -> UnsupportedCheckpoint:
    return UnsupportedCheckpoint(
        "this tokenizer cannot be written for llama.cpp",
        f"tokenizer.json: {what}; {why}",
        "convert the model with llama.cpp's convert_hf_to_gguf.py, from --format dense",
    )
