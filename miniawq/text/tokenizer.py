"""Text to ids and back: `tokenizer.json` through the `tokenizers` library, BOS and EOS from the files that know them.

`tokenizer.json` says how text is cut into tokens, but not which id begins a text or ends an answer. These are in
`tokenizer_config.json`, `generation_config.json` and `config.json`. If several of them name an id that ends a text,
each of these ids ends it: re-uploads often keep only one of two.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from miniawq.checkpoint.strict import parse_json
from miniawq.errors import InvalidInput, MiniawqError, NotFound, UnsupportedCheckpoint
from miniawq.text import chat
from miniawq.text.library import HeldTokenizer

log = logging.getLogger(__name__)

MAX_ID = 1 << 31
ID_DIGITS = 9
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
OTHER_TOKENIZERS = {
    "tekken.json": "a Tekken file of Mistral",
    "tokenizer.model": "a SentencePiece model",
    "*.tiktoken": "a tiktoken file",
    "vocab.json": "a vocabulary with merges.txt",
}


class Tokenizer:
    """The tokenizer of a checkpoint directory, with its chat template or the one that is given.

    `bos_id` is None for models without a BOS; `eos_ids` are all ids that end a text. Raises NotFound if there is no
    tokenizer, UnsupportedCheckpoint if it is damaged or of a kind that is not read here.
    """

    def __init__(self, directory: str | Path, chat_template: str | None = None) -> None:
        directory = Path(directory)
        self._tokenizer = _read_tokenizer(directory)
        added = self._tokenizer.raw.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._byte_ids = frozenset(self._id(f"<0x{byte:02X}>") for byte in range(256)) - {None}
        config, generation_config, tokenizer_config = (
            read_object(directory / name) for name in ("config.json", "generation_config.json", "tokenizer_config.json")
        )
        tokenizer_config = read_object(directory / "special_tokens_map.json") | tokenizer_config
        self.special_tokens = _special_tokens(tokenizer_config)
        of_checkpoint = {} if chat_template else chat.read_templates(directory, tokenizer_config)
        self._templates = {"default": chat_template} if chat_template else of_checkpoint
        stated = {"generation_config.json": generation_config, "config.json": config}
        self.bos_id = self._find_bos(tokenizer_config, stated)
        ends = [token_id for file in stated for token_id in _stated_ids(file, stated[file], "eos_token_id")]
        eos_id = self._id(self.special_tokens.get("eos_token"))
        self.eos_ids = frozenset(ends if eos_id is None else [*ends, eos_id])
        self._prefix, self._suffix = self._find_frame(tokenizer_config)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`; special tokens spelled in it become their ids.

        `add_special_tokens` puts BOS (and for some models EOS) around it as the checkpoint asks, but no second BOS
        before a text that has one. Use False for a rendered chat. Raises InvalidInput on text that is not Unicode.
        """
        ids = self._tokenizer.encode(text).ids
        if not add_special_tokens:
            return ids
        return ([] if ids[:1] == [self.bos_id] else self._prefix) + ids + self._suffix

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Ids beyond the vocabulary, which padded models can sample, have no text."""
        return self._tokenizer.decode(ids, skip_special_tokens)

    def id_of(self, token: str) -> int:
        """The id of one token: a number is an id, else it is its name in the vocabulary, or its text. InvalidInput if
        there is no such token.
        """
        if token.isdecimal() and len(token) <= ID_DIGITS:
            if self._tokenizer.raw.id_to_token(int(token)) is None:
                raise InvalidInput(f"there is no token with the id {token}", "it is beyond the vocabulary")
            return int(token)
        named = self._id(token)
        ids = self.encode(token, add_special_tokens=False) if named is None else [named]
        if len(ids) != 1 or (named is None and self.decode(ids, False) != token):
            pieces = ", ".join(repr(self._tokenizer.raw.id_to_token(token_id)) for token_id in ids) or "nothing"
            raise InvalidInput(f"{token!r} is no single token", f"the tokenizer makes {pieces} of it", "give its id")
        return ids[0]

    def stream(self, prompt_ids: Sequence[int] = ()) -> "TextStream":
        """A TextStream of the ids that follow `prompt_ids`."""
        return TextStream(self, prompt_ids)

    def is_silent(self, token_id: int) -> bool:
        """Whether the id has no text: it is a special token, or beyond the vocabulary."""
        return token_id in self._special_ids or self._tokenizer.raw.id_to_token(token_id) is None

    def is_byte(self, token_id: int) -> bool:
        """Whether the id is one byte of a character that a SentencePiece vocabulary lacks."""
        return token_id in self._byte_ids

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint has a chat template; base models have none."""
        return bool(self._templates)

    def template_mentions(self, variable: str) -> bool:
        """Whether a chat template uses a variable of this name."""
        return any(variable in template for template in self._templates.values())

    def render_chat(
        self,
        messages: Sequence[chat.Message],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """A conversation as the checkpoint's template writes it: see `chat.render`."""
        return chat.render(
            chat.select_template(self._templates, with_tools=bool(tools)),
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            variables=self.special_tokens | variables,
        )

    def end_of_turn_ids(self) -> frozenset[int]:
        """The special token that the chat template writes after an answer, if there is one.

        If a checkpoint's configs name only the token that ends a document, the model would go on to write the user's
        next message without it.
        """
        answer = "\N{WHITE SQUARE}"
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        try:
            rendered = self.render_chat(turns, add_generation_prompt=False)
        except MiniawqError:
            return frozenset()
        ids = self.encode(rendered.partition(answer)[2].lstrip(), add_special_tokens=False)
        return frozenset(ids[:1]) & self._special_ids

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.raw.token_to_id(token)

    def _find_bos(self, tokenizer_config: Mapping[str, Any], stated: Mapping[str, Mapping[str, Any]]) -> int | None:
        # Qwen's config.json names a bos_token_id that its tokenizer denies with `"bos_token": null`.
        if "bos_token" in tokenizer_config:
            return self._id(self.special_tokens.get("bos_token"))
        ids = (token_id for file in stated for token_id in _stated_ids(file, stated[file], "bos_token_id"))
        return next(ids, None)

    def _find_frame(self, tokenizer_config: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """The ids before and after a text: those of tokenizer.json, unless tokenizer_config.json overrides them."""
        plain = self._tokenizer.encode("a")
        framed = self._tokenizer.encode("a", add_special_tokens=True)
        start = [*framed.special_tokens_mask, 0].index(0)
        prefix, suffix = framed.ids[:start], framed.ids[start + len(plain.ids) :]
        eos_id = self._id(self.special_tokens.get("eos_token"))
        for frame, place, flag, token_id in (
            (prefix, 0, "add_bos_token", self.bos_id),
            (suffix, len(suffix), "add_eos_token", eos_id),
        ):
            wanted = tokenizer_config.get(flag)
            if not isinstance(wanted, bool | None):
                raise _nonsense("tokenizer_config.json", flag, wanted, "it must be true or false")
            if wanted is True and token_id is not None and token_id not in frame:
                frame.insert(place, token_id)
            elif wanted is False and token_id in frame:
                frame.remove(token_id)
        return prefix, suffix


class TextStream:
    """The text of ids that arrive one by one, in pieces; joined, they are what `Tokenizer.decode` gives for all ids.

    The text is decode(prompt + ids) without its common beginning with decode(prompt). So a word keeps the space before
    it, and a character whose first bytes end the prompt appears when it is complete. No piece can be changed by a later
    id: none ends in a replacement character, nor inside a run of byte tokens `<0xNN>`, because the library replaces the
    whole run if a part of it is not UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._context = [token_id for token_id in prompt_ids if not tokenizer.is_silent(token_id)]
        self._shown = tokenizer.decode(self._context)
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that `token_id` makes certain; often "", or the text of several tokens."""
        if self._tokenizer.is_silent(token_id):
            return ""
        self._pending.append(token_id)
        text = self._text()
        if not text or text.endswith(REPLACEMENT) or self._tokenizer.is_byte(token_id):
            return ""
        # The ids just shown are enough context for the next ones: a decoder strips a leading space from them instead.
        self._context, self._pending = self._pending, []
        self._shown = self._tokenizer.decode(self._context)
        return text

    def hold_back(self, ids: Sequence[int]) -> None:
        """Add ids whose text is wanted together with what comes after them: one call of the library instead of many."""
        self._pending += ids

    def finish(self) -> str:
        """The text held back until now. Push nothing after it."""
        return self._text()

    def _text(self) -> str:
        text = self._tokenizer.decode(self._context + self._pending)
        shown = self._shown
        while not text.startswith(shown):
            shown = shown[:-1]
        return text[len(shown) :]


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    found = parse_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise UnsupportedCheckpoint(
            f"{path.name} cannot be read", f"{path} holds a {type(found).__name__}, not an object"
        )
    return found


def _read_tokenizer(directory: Path) -> HeldTokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        others = [f"{name} ({what})" for name, what in OTHER_TOKENIZERS.items() if any(directory.glob(name))]
        if not others:
            raise NotFound(
                f"no tokenizer.json in {directory}", "", "copy the tokenizer files of the original model there"
            )
        raise UnsupportedCheckpoint(
            f"no tokenizer.json in {directory}",
            f"only {', '.join(others)} is there, and only tokenizer.json is read here",
            "convert it once with transformers: AutoTokenizer.from_pretrained(directory).save_pretrained(directory)",
        )
    return HeldTokenizer(path)


def _special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and the like by name; a value is a string, or an AddedToken as {"content": ...}."""
    contents = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in tokenizer_config.items()
        if key.endswith("_token")
    }
    for key in ("bos_token", "eos_token"):
        if not isinstance(contents.get(key), str) and tokenizer_config.get(key) is not None:
            raise _nonsense(
                "tokenizer_config.json (or special_tokens_map.json)",
                key,
                tokenizer_config[key],
                "it must be the text of a token",
            )
    return {key: content for key, content in contents.items() if isinstance(content, str)}


def _stated_ids(file: str, config: Mapping[str, Any], key: str) -> list[int]:
    """The ids under a key: a number, a list of them, or null. Files write -1 for none, which is said."""
    found = config.get(key)
    listed = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token_id) is int and token_id < MAX_ID for token_id in listed):
        raise _nonsense(file, key, found, f"it must be an id, or a list of ids, below {MAX_ID}")
    if any(token_id < 0 for token_id in listed):
        log.warning("%s: %s = %s is no id, and not used", file, key, found)
    return [token_id for token_id in listed if token_id >= 0]


def _nonsense(file: str, key: str, value: Any, allowed: str) -> UnsupportedCheckpoint:
    return UnsupportedCheckpoint(f"{file}: {key} = {value!r} makes no sense", allowed, "take the original model's file")
