"""`--prompts FILE`: many prompts at once, and one JSON object a line for each, in the order of the file."""

import json
import logging
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from miniawq.checkpoint.opening import Checkpoint
from miniawq.commands import prompts
from miniawq.commands.figures import Writing
from miniawq.commands.records import Name, OrderedRecords
from miniawq.engine.batch import Batch, Request
from miniawq.engine.memory import fitting_rows
from miniawq.engine.rows import CompiledRows, PlainRows, RowsStep
from miniawq.engine.sampling import SEEDS
from miniawq.errors import InvalidInput, MiniawqError
from miniawq.text.plain import read_text

log = logging.getLogger(__name__)

FIX = 'write {"id": 1, "prompt": "..."} or {"id": 1, "messages": [...]}'
# Of all that `Completion.record` says: what is true of one text of many, where rates are not.
SAID = ("text", "prompt_tokens", "generation_tokens", "finish_reason", "stop_reason")


class Entry(NamedTuple):
    """One prompt of the file: its name, and its ids or why it has none."""

    name: Name
    ids: list[int]
    error: MiniawqError | None = None


class Reading:
    """Makes entries of lines: each is a prompt, or an object that holds one if the first line is an object."""

    def __init__(self, run: Writing) -> None:
        self.run, self.arguments = run, run.arguments

    def entries(self) -> Iterator[Entry]:
        """Those of the file; empty lines count, and are left out."""
        lines = read_text(self.arguments.prompts).splitlines()
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        is_json = bool(numbered) and numbered[0][1].lstrip().startswith("{")
        return (self._entry(number, line, is_json) for number, line in numbered)

    def _entry(self, number: int, line: str, is_json: bool) -> Entry:
        name: Name = number
        try:
            given = json.loads(line) if is_json else {"prompt": line}
            name = name_in(given, number)
            ids = self.run.encode(self._prompt_in(given), prompts.is_chat(self.arguments, self.run.tokenizer))
            self.run.context.room(len(ids))
            return Entry(name, ids)
        except MiniawqError as error:
            return Entry(name, [], error)
        except (TypeError, KeyError, ValueError, RecursionError) as error:
            why = f"{self.arguments.prompts}, line {number}: {type(error).__name__}: {error}"
            return Entry(name, [], InvalidInput("the prompt cannot be read", why, FIX))

    def _prompt_in(self, given: dict[str, Any]) -> str:
        """The text that the model continues."""
        if "messages" in given:
            return prompts.as_turn(self.arguments, self.run.tokenizer, *prompts.messages_in(given))
        if not isinstance(given["prompt"], str):
            raise TypeError("prompt is not a text")
        return prompts.as_prompt(self.arguments, self.run.tokenizer, given["prompt"])


def name_in(given: Any, number: int) -> Name:
    """The id of an object; the number of its line if it has none."""
    if not isinstance(given, dict):
        raise TypeError("it is not an object")
    name = given.get("id", number)
    if not isinstance(name, str | int):
        raise TypeError("id is neither a text nor a whole number")
    return name


class ManyPrompts:
    """The prompts of a file, answered with the settings of a run."""

    def __init__(self, run: Writing) -> None:
        self.run, self.arguments, self.rows = run, run.arguments, 1
        self.entries = list(Reading(run).entries())
        if not self.entries:
            raise InvalidInput(f"{self.arguments.prompts} has no prompts", "all its lines are empty")
        names = [entry.name for entry in self.entries]
        self.records = OrderedRecords(self.arguments.output, self.arguments.resume, names)
        # An interrupted run goes on with its seeds.
        if self.arguments.seed is None and self.records.earlier:
            run.next_seed = int(self.records.earlier[0].get("seed", run.next_seed))

    @property
    def positions(self) -> int:
        """Of the longest text, prompt and answer together."""
        lengths = [len(entry.ids) for entry in self.entries if entry.error is None]
        return max(map(self.run.context.wanted, lengths), default=1)

    def fit(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> int:
        """Choose how many rows there are."""
        most = len(self.entries) - self.records.written
        if self.arguments.batch_size:
            self.rows = max(1, min(self.arguments.batch_size, most))
            return self.rows
        self.rows = fitting_rows(checkpoint, device, dtype, most=most, max_seq_len=self.positions)
        if self.run.decoders.compiles:
            self.rows = 1 << (self.rows.bit_length() - 1)  # so that few steps are ever compiled
        return self.rows

    def write(self) -> None:
        """Answer all that have no record yet. MiniawqError at the end if there is none for some."""
        todo = range(self.records.written, len(self.entries))
        asked = [number for number in todo if self.entries[number].error is None]
        batch, started = self._batch(asked), time.perf_counter()
        failed: dict[Name, MiniawqError] = {}
        bar = tqdm(total=len(self.entries), initial=todo.start, unit="prompt", disable=self.arguments.quiet or None)
        try:
            with self.records, bar:
                for number, record, error in self._answers(batch, asked, todo):
                    if error is not None:
                        failed[self.entries[number].name] = error
                    self.records.put(number, record)
                    bar.update()
        finally:
            if self.arguments.output and self.records.written < len(self.entries):
                log.info("%d of %d are written; --resume goes on", self.records.written, len(self.entries))
        seconds = time.perf_counter() - started
        told = "%d prompts, %d tokens in %.1f s: %.1f tokens-per-sec, %d rows at once"
        log.info(told, len(todo), batch.tokens, seconds, batch.tokens / seconds, self.rows)
        if batch.shared.kept:
            log.info("their first %d tokens are the same and were read once", batch.shared.kept)
        if failed:
            name, error = next(iter(failed.items()))
            what = f"{len(failed)} of {len(todo)} prompts have no answer"
            raise MiniawqError(what, f"the first is {name}: {error.what}", "see the key error of their records")

    def _answers(
        self, batch: Batch, asked: list[int], todo: range
    ) -> Iterator[tuple[int, dict[str, Any], MiniawqError | None]]:
        """Numbers of entries, their records, and what went wrong, as they come."""
        for number in todo:
            if (error := self.entries[number].error) is not None:
                yield number, {"id": self.entries[number].name, "error": str(error)}, error
        for ending in batch:
            number = asked[ending.number]
            entry, seed = self.entries[number], batch.requests[ending.number].seed
            if ending.completion is None:
                yield number, {"id": entry.name, "error": str(ending.error), "seed": seed}, ending.error
            else:
                record = ending.completion.record()
                yield number, {"id": entry.name} | {key: record[key] for key in SAID} | {"seed": seed}, None

    def _batch(self, asked: list[int]) -> Batch:
        run = self.run
        entries = [(number, self.entries[number].ids) for number in asked]
        return Batch(
            run.tokenizer,
            self._step(),
            [Request(ids, run.context.room(len(ids)), (run.next_seed + number) % SEEDS) for number, ids in entries],
            sampling=run.sampling,
            stop=self.arguments.stop,
            stop_ids=run.ends(prompts.is_chat(self.arguments, run.tokenizer)),
        )

    def _step(self) -> RowsStep:
        if not self.run.decoders.compiles:
            return PlainRows(self.run.model, self.rows, self.positions)
        step = CompiledRows(self.run.model, self.rows, self.positions)
        step.make_ready()
        return step
