"""What answers in a conversation, and the settings that may change meanwhile (`/set NAME VALUE`)."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from miniawq import cli
from miniawq.commands.figures import Writing, in_full
from miniawq.commands.flags import DEFAULT_MAX_TOKENS, FILTERS
from miniawq.commands.prompts import rendered
from miniawq.commands.thoughts import begins_in_thought
from miniawq.engine.completion import Completion
from miniawq.engine.sampling import SEEDS
from miniawq.errors import InvalidInput
from miniawq.text.chat import Message

log = logging.getLogger(__name__)

KINDS: dict[str, type] = {"temperature": float} | {name: kind for name, (kind, _) in FILTERS.items()}
SHARE_OF_ANSWER = 4  # an answer gets one part in so many of the context, or as much as it may have
RANGES = {"max_tokens": (-1, 1 << 40), "seed": (0, SEEDS - 1)}


def read_setting(name: str, value: str) -> tuple[str, int | float]:
    """The setting's own name, `top_k` for --top-k, and its number. InvalidInput names those that there are."""
    known = name.lstrip("-").replace("-", "_")
    kind = KINDS.get(known) or (int if known in RANGES else None)
    if kind is None:
        names = ", ".join([*KINDS, *RANGES])
        raise InvalidInput(
            f"there is no setting {name}", f"there are {names}", f"write /set max_tokens {DEFAULT_MAX_TOKENS}"
        )
    try:
        number = kind(value)
    except ValueError as error:
        raise InvalidInput(f"{known} = {value} makes no sense", f"it must be a number ({kind.__name__})") from error
    lowest, highest = RANGES.get(known, (number, number))
    if not lowest <= number <= highest or (known, number) == ("max_tokens", 0):
        raise InvalidInput(f"{known} = {value} makes no sense", f"it must be from {lowest} to {highest}, and not 0")
    return known, number


def without_oldest_turn(messages: list[Message]) -> list[Message]:
    """Without the first question and what came after it, up to the next; empty if there is no next."""
    asked = [place for place, message in enumerate(messages) if message["role"] == "user"]
    return messages[: asked[0]] + messages[asked[1] :] if len(asked) > 1 else []


class Talker:
    """Answers with the model and the settings of a run: what `interactive.converse` talks with."""

    def __init__(self, run: Writing) -> None:
        self.run = run
        self.last: tuple[Completion, int] | None = None
        self.begins_in_thought = False

    def fit(self, messages: list[Message]) -> list[Message]:
        """The messages; if they fill the context, without the oldest turns, so that half of it is free.

        With --no-context-shift all of them, and the answer is as long as there is room.
        """
        limit, kept = self.run.context.limit, messages
        least = min(self.run.context.room(0), limit // SHARE_OF_ANSWER)
        if not self.run.arguments.context_shift or self._length(messages) + least <= limit:
            return messages
        while self._length(kept) > limit // 2 and (fewer := without_oldest_turn(kept)):
            kept = fewer
        if len(kept) == len(messages) or self._length(kept) >= limit:
            return messages  # There is nothing to leave out, or it would not help: the question itself is too long.
        log.info("the context is full: the oldest %d messages are forgotten", len(messages) - len(kept))
        return kept

    def _length(self, messages: list[Message]) -> int:
        return len(self.run.encode(self._prompt(messages), True))

    def _prompt(self, messages: list[Message]) -> str:
        return rendered(self.run.arguments, self.run.tokenizer, messages)

    def answer(self, messages: list[Message]) -> Iterator[str]:
        """The next message in pieces."""
        run, prompt = self.run, self._prompt(messages)
        self.begins_in_thought = begins_in_thought(prompt)
        self.last = completion, seed = run.begin(prompt, is_chat=True)
        return self._pieces(completion, seed)

    def _pieces(self, completion: Completion, seed: int) -> Iterator[str]:
        run = self.run
        try:
            yield run.arguments.prefill_response or ""
            yield from completion
        finally:
            if run.arguments.stats:
                cli.say("")
                run.report(completion, seed)

    def change(self, name: str, value: str) -> None:
        """Another setting from the next answer on."""
        setting, number = read_setting(name, value)
        if setting == "seed":
            self.run.next_seed = int(number)
        elif setting == "max_tokens":
            self.run.arguments.max_tokens = number
        else:
            changed: dict[str, Any] = {setting: number}
            self.run.sampling = replace(self.run.sampling, **changed)
            self.run.decoders.sample(self.run.sampling)

    def told(self) -> str:
        """How fast the last answer came, and with which settings."""
        return in_full(self.run, *self.last) if self.last and self.last[0].ids else "nothing has been answered"
