"""Many texts at once: a prompt waits for a row, and a row whose text has ended takes the next prompt.

The last rows move into those that are free, so that steps leave out what has no text.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from miniawq.engine.cached_text import CachedText, common_length
from miniawq.engine.completion import Completion, StopStrings, Written
from miniawq.engine.fitting import check_prompt
from miniawq.engine.memory import PREFILL_CHUNK
from miniawq.engine.rows import RowsStep, clear, move, prefill, share
from miniawq.engine.sampling import (
    NOT_A_NUMBER,
    History,
    Sampling,
    TokenLogprobs,
    fold_seed,
    logprobs_of,
    not_a_number,
    sample,
)
from miniawq.errors import InvalidInput, MiniawqError
from miniawq.text.tokenizer import Tokenizer

# Prompts stop all rows while they run. On a GPU one takes nearly as long as several, so they wait until one row in so
# many is free.
ROWS_FOR_ONE_FREE = 8


class Request(NamedTuple):
    """A prompt, the most tokens that may follow it, and the seed of what is drawn (None: any)."""

    prompt_ids: Sequence[int]
    max_tokens: int
    seed: int | None = None


class Ending(NamedTuple):
    """What became of the request with this number: its text, to be taken in pieces, or why there is none."""

    number: int
    completion: Completion | None
    error: MiniawqError | None = None


class RowText:
    """A text that is being written."""

    def __init__(self, number: int, request: Request, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.number, self.request = number, request
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.times = [time.perf_counter()]  # of its beginning, and of each id
        # Only stop strings need the text while it comes, and making it takes as long as a step.
        self._stream, self._stops = tokenizer.stream(request.prompt_ids) if stop else None, StopStrings(stop)

    def take(self, token_id: int, stop_ids: frozenset[int]) -> bool:
        """Note the next id; whether the text ends with it."""
        self.ids.append(token_id)
        self.times.append(time.perf_counter())
        if self._stream is not None:
            self._stops.push(self._stream.push(token_id))
        is_full = len(self.ids) == self.request.max_tokens
        return is_full or token_id in stop_ids or self._stops.found is not None

    @property
    def length(self) -> int:
        """Positions of the cache that it has: the last id is not there yet."""
        return len(self.request.prompt_ids) + len(self.ids) - 1


class Chooser:
    """Chooses ids as `sample` would for each text alone: every row has its random numbers and its history."""

    def __init__(self, sampling: Sampling, rows: int, vocab_size: int, device: torch.device) -> None:
        self.sampling, self.vocab_size, self.device = sampling, vocab_size, device
        self.generators = [torch.Generator(device) for _ in range(rows)]
        nothing_BL = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.history = History.of_prompt(nothing_BL, vocab_size) if sampling.has_penalties else None

    def begin(self, row: int, request: Request) -> None:
        """Forget what was in this row."""
        seed = fold_seed(request.seed)
        self.generators[row].manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
        if self.history is not None:
            tokens_BL = torch.tensor([list(request.prompt_ids)], device=self.device)
            for kept, new in zip(self.history, History.of_prompt(tokens_BL, self.vocab_size), strict=True):
                kept[row] = new[0]

    def move(self, row: int, into: int) -> None:
        """Let the text of a row go on in another one."""
        self.generators[into], self.generators[row] = self.generators[row], self.generators[into]
        for part_BV in self.history or ():
            part_BV[into] = part_BV[row]

    def choose(self, logits_BV: Tensor, first: int) -> list[int]:
        """The next ids of neighbouring rows from `first` on."""
        rows = slice(first, first + len(logits_BV))
        history = None if self.history is None else History(*(part_BV[rows] for part_BV in self.history))
        ids_B = sample(logits_BV, self.sampling, history, self.generators[rows])
        if history is not None:
            history.add(ids_B.clamp_min(0))
        return ids_B.tolist()


class Batch:
    """Iterate to get the endings in the order in which they come. `tokens` counts what has been written.

    `stop_ids` and `stop` end every text. `step` has the rows, and room for each text. With `logprobs` the texts
    have the log-probabilities of their tokens, and of so many of the best in each place.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        step: RowsStep,
        requests: Sequence[Request],
        *,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        stop_ids: frozenset[int] | None = None,
        logprobs: int | None = None,
    ) -> None:
        self.logprobs = logprobs
        self.tokenizer, self.step, self.requests, self.stop = tokenizer, step, requests, stop
        self.stop_ids = tokenizer.eos_ids if stop_ids is None else stop_ids
        count, vocab_size = step.cache.keys_NBMJE.shape[1], step.model.config.vocab_size
        self.chooser = Chooser(sampling or Sampling(), count, vocab_size, step.model.device)
        self.rows: list[RowText | None] = [None] * count
        self.rows_for_one_free = ROWS_FOR_ONE_FREE if step.model.device.type == "cuda" else count
        self.shared = CachedText()
        self.tokens = 0

    def __iter__(self) -> Iterator[Ending]:
        waiting: deque[int] = deque()
        for number, request in enumerate(self.requests):
            try:
                self._check(request)
                waiting.append(number)
            except MiniawqError as error:
                yield Ending(number, None, error)
        self._share([list(self.requests[number].prompt_ids) for number in waiting])
        endings: list[Ending] = []
        while waiting or any(self.rows):
            self._close_ranks()
            if self.rows.count(None) * self.rows_for_one_free >= len(self.rows):
                endings += self._begin_some(waiting)
            try:
                logits_BV = self._next_logits()
            finally:
                # The caller makes texts of them while a GPU computes; an interrupted step loses none.
                yield from endings
            endings = [] if logits_BV is None else self._take(0, logits_BV)
        yield from endings

    def _check(self, request: Request) -> None:
        positions, room = len(request.prompt_ids) + request.max_tokens, self.step.cache.max_seq_len
        check_prompt(self.step.model, torch.tensor([list(request.prompt_ids)]), request.max_tokens)
        if positions > room:
            raise InvalidInput("prompt and answer do not fit into a row", f"wanted: {positions} positions of {room}")

    @torch.inference_mode()
    def _share(self, prompts: list[list[int]]) -> None:
        """Run what all prompts begin with; the last token of each is left, because its logits are wanted."""
        if len(prompts) > 1:
            # What the first and the last of a sorted list have in common, all have.
            common = common_length(min(prompts), max(prompts))
            self.shared.kept = min(common, *(len(ids) - 1 for ids in prompts))
            share(self.step, prompts[0][: self.shared.kept])

    @torch.inference_mode()
    def _begin_some(self, waiting: deque[int]) -> list[Ending]:
        """Give free rows to waiting prompts, and run these, until no prompt waits or all rows go on."""
        endings: list[Ending] = []
        while waiting and None in self.rows:
            first = self.rows.index(None)
            endings += self._begin(first, self._fitting_together(waiting, len(self.rows) - first))
            self._close_ranks()
        return endings

    def _fitting_together(self, waiting: deque[int], most: int) -> list[int]:
        """Take the next of the waiting, one or as many as fill a piece together."""
        numbers, longest = [waiting.popleft()], 0
        while waiting and len(numbers) < most:
            lengths = [len(self.requests[number].prompt_ids) for number in (*numbers, waiting[0])]
            longest = max(lengths) - self.shared.kept
            if longest * len(lengths) > PREFILL_CHUNK:
                break
            numbers.append(waiting.popleft())
        return numbers

    def _begin(self, first: int, numbers: list[int]) -> list[Ending]:
        """Run prompts into neighbouring rows, and choose their first ids."""
        past = self.shared.kept
        rows = [RowText(number, self.requests[number], self.tokenizer, self.stop) for number in numbers]
        self.rows[first : first + len(rows)] = rows
        logits_BV = prefill(self.step, first, [row.request.prompt_ids[past:] for row in rows], past)
        for place, row in enumerate(rows, first):
            self.chooser.begin(place, row.request)
        return self._take(first, logits_BV)

    @torch.inference_mode()
    def _close_ranks(self) -> None:
        """Let the last texts take the places that are free before them."""
        for place in range(len(self.rows) - self.rows.count(None)):
            if self.rows[place] is None:
                last = max(number for number, row in enumerate(self.rows) if row is not None)
                self.rows[place], self.rows[last] = self.rows[last], None
                move(self.step, last, place)
                self.chooser.move(last, place)

    @torch.inference_mode()
    def _next_logits(self) -> Tensor | None:
        """Of all texts, if there are any."""
        texts = [row for row in self.rows if row is not None]
        if not texts:
            return None
        ids_B = torch.tensor([row.ids[-1] for row in texts], device=self.step.model.device)
        return self.step.next_logits(ids_B, [row.length for row in texts])

    @torch.inference_mode()
    def _take(self, first: int, logits_BV: Tensor) -> list[Ending]:
        """Give the rows from `first` on the ids that follow; what ends with them."""
        endings: list[Ending] = []
        ids = self.chooser.choose(logits_BV, first)
        told = [] if self.logprobs is None else logprobs_of(logits_BV, ids, self.logprobs)
        for place, token_id in enumerate(ids, first):
            row = self.rows[place]
            assert row is not None
            if token_id == NOT_A_NUMBER:
                clear(self.step, place, self.shared.kept)
                error = not_a_number(self.step.model, logits_BV.dtype)
                endings.append(Ending(row.number, None, error))
                self.rows[place] = None
                continue
            self.tokens += 1
            row.logprobs += told[place - first : place - first + 1]
            if row.take(token_id, self.stop_ids):
                endings.append(Ending(row.number, self._completed(row)))
                self.rows[place] = None
        return endings

    def _completed(self, row: RowText) -> Written:
        """The text of a row that has ended, with the times at which it came."""
        return Written(
            self.tokenizer,
            row.request.prompt_ids,
            row.ids,
            stop_ids=self.stop_ids,
            stop=self.stop,
            cached=self.shared,
            logprobs=row.logprobs,
            clock=iter(row.times).__next__,
        )
