"""One text as it comes: ids become pieces of text, cut at stop strings, with the times at which they came."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

from miniawq.engine.cached_text import CachedText
from miniawq.text.tokenizer import Tokenizer

Clock = Callable[[], float]


class StopStrings:
    """Cuts a text that comes in pieces before the first stop string that is completed, wherever the pieces end.

    What may begin a stop string is held back until it does not. Of two that end together the longer counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """What of the text up to now can be shown and has not been; nothing after a stop string."""
        if self.found is not None:
            return ""
        text = self._held + piece
        ends = [(text.index(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if ends:
            end, _, self.found = min(ends)
            return text[: end - len(self.found)]
        kept = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """What was held back for a stop string that did not come."""
        return "" if self.found is not None else self._held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, and is not all of it."""
    longest = min(len(stop) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


class Completion:
    """One text being generated. Iterate to get it in pieces; everything else is true of the part that has come.

    `finish_reason` is None until it ends, then "stop" (an end id, or a stop string: see `stop_reason`) or "length".
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        new_ids: Iterable[int],
        *,
        stop_ids: frozenset[int] = frozenset(),
        stop: Sequence[str] = (),
        cached: CachedText | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.prompt_ids = list(prompt_ids)
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self._tokenizer, self._new_ids, self._clock = tokenizer, new_ids, clock
        self._stop_ids, self._stop, self._cached = stop_ids, stop, cached
        self._started = 0.0
        self._times: list[float] = []

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._pieces()
        finally:
            # What computes the ids holds a cache: it ends with this iterator, at its end or where it is closed.
            if isinstance(self._new_ids, Generator):
                self._new_ids.close()

    def _pieces(self) -> Iterator[str]:
        stream, stops = self._tokenizer.stream(self.prompt_ids), StopStrings(self._stop)
        self._started = self._clock()
        for token_id in self._new_ids:
            self._times.append(self._clock())
            self.ids.append(token_id)
            if token_id in self._stop_ids:
                self.stop_reason = token_id
                break
            yield from self._show(stops.push(stream.push(token_id)))
            if stops.found is not None:
                break
        yield from self._show(stops.push(stream.finish()))
        yield from self._show(stops.finish())
        self.stop_reason = stops.found if stops.found is not None else self.stop_reason
        self.finish_reason = "length" if self.stop_reason is None else "stop"

    def _show(self, piece: str) -> Iterator[str]:
        if piece:
            self.text += piece
            yield piece

    @property
    def first_token_seconds(self) -> float:
        """From the start to the first token: the time that the prompt takes."""
        return self._times[0] - self._started if self._times else 0.0

    @property
    def prompt_rate(self) -> float:
        """Tokens of the prompt per second, of those that were computed."""
        return _rate(len(self.prompt_ids) - self.cached_tokens, self.first_token_seconds)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that the cache held already."""
        return 0 if self._cached is None else self._cached.kept

    @property
    def generation_rate(self) -> float:
        """Tokens per second after the first one."""
        return self.rate_after(1)

    def rate_after(self, count: int) -> float:
        """Tokens per second after the first `count`."""
        times = self._times[count - 1 :]
        return _rate(len(times) - 1, times[-1] - times[0]) if times else 0.0

    def record(self) -> dict[str, Any]:
        """For machines, with the field names of mlx-lm where it has them."""
        return {
            "text": self.text,
            "tokens": self.ids,
            "prompt_tokens": len(self.prompt_ids),
            "cached_tokens": self.cached_tokens,
            "prompt_tps": self.prompt_rate,
            "generation_tokens": len(self.ids),
            "generation_tps": self.generation_rate,
            "first_token_s": self.first_token_seconds,
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
        }


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count > 0 and seconds > 0 else 0.0
