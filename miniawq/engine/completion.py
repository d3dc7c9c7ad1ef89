"""One text as it comes: ids become pieces of text, cut at stop strings, with the times at which they came."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

from miniawq.engine.cached_text import CachedText
from miniawq.engine.sampling import TokenLogprobs
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


class Piece(NamedTuple):
    """Text that has come, the ids since the piece before it, and their log-probabilities if they were asked for.

    Only the last piece has a finish reason. It may have no text (an end id has none), and no ids.
    """

    text: str
    ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: str | None


class Completion:
    """One text being generated. Iterate over it for the text as it comes, or over `pieces` to know more; either once.

    All else is true of the part that has come. `finish_reason` is None until the text ends, then "stop" (an end id, or
    a stop string: see `stop_reason`) or "length". `logprobs` are those of the ids, if they were asked for.
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
        logprobs: Sequence[TokenLogprobs] = (),
        clock: Clock = time.perf_counter,
    ) -> None:
        self.prompt_ids = list(prompt_ids)
        self.ids: list[int] = []
        self.text = ""
        self.logprobs = logprobs
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self._tokenizer, self._new_ids, self._clock = tokenizer, new_ids, clock
        self._stop_ids, self._stop, self._cached = stop_ids, stop, cached
        self._started = 0.0
        self._times: list[float] = []
        self._told = 0  # ids

    def __iter__(self) -> Iterator[str]:
        with closing(self.pieces()) as pieces:
            yield from (piece.text for piece in pieces if piece.text)

    def pieces(self) -> Generator[Piece, None, None]:
        """The text as it comes, with all that is known of it. Close it where the rest is not wanted."""
        stream, stops = self._tokenizer.stream(self.prompt_ids), StopStrings(self._stop)
        self._started = self._clock()
        try:
            for token_id in self._new_ids:
                if self._is_end(token_id):
                    break
                if text := stops.push(stream.push(token_id)):
                    yield self._piece(text)
                if stops.found is not None:
                    break
        finally:
            # What computes the ids holds a cache: it ends with the text, or where this is closed.
            if isinstance(self._new_ids, Generator):
                self._new_ids.close()
        yield self._ended(stops.push(stream.finish()) + stops.finish(), stops)

    def _is_end(self, token_id: int) -> bool:
        """Note an id that has come; whether it ends the text."""
        self._times.append(self._clock())
        self.ids.append(token_id)
        if token_id in self._stop_ids:
            self.stop_reason = token_id
        return self.stop_reason is not None

    def _ended(self, text: str, stops: StopStrings) -> Piece:
        """The last piece."""
        self.stop_reason = stops.found if stops.found is not None else self.stop_reason
        self.finish_reason = "length" if self.stop_reason is None else "stop"
        return self._piece(text)

    def _piece(self, text: str) -> Piece:
        self.text += text
        first, self._told = self._told, len(self.ids)
        new = slice(first, self._told)
        return Piece(text, self.ids[new], list(self.logprobs[new]), self.finish_reason)

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


class Written(Completion):
    """A text of which all ids are there, as one piece."""

    def pieces(self) -> Generator[Piece, None, None]:
        """One."""
        stream, stops = self._tokenizer.stream(self.prompt_ids), StopStrings(self._stop)
        self._started = self._clock()
        stream.hold_back([token_id for token_id in self._new_ids if not self._is_end(token_id)])
        yield self._ended(stops.push(stream.finish()) + stops.finish(), stops)


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count > 0 and seconds > 0 else 0.0
