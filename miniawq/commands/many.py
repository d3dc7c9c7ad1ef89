"""`--prompts FILE`: many prompts at once, and one JSON object a line for each, in the order of the file."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from miniawq.checkpoint.publishing import alone
from miniawq.commands import prompts
from miniawq.commands.figures import Writing
from miniawq.commands.records import Name, OrderedRecords
from miniawq.commands.telling import readable
from miniawq.commands.together import Together
from miniawq.engine.batch import Batch, Request
from miniawq.engine.sampling import SEEDS
from miniawq.errors import InvalidInput, MiniawqError
from miniawq.text.plain import read_text

log = logging.getLogger(__name__)

FIX = 'write {"id": 1, "prompt": "..."} or {"id": 1, "messages": [...]}'
# Of all that `Completion.record` says: what is true of one text of many, where rates are not.
SAID = ("text", "prompt_tokens", "generation_tokens", "finish_reason", "stop_reason")


class PromptLine(NamedTuple):
    """One prompt of the file: its name, and its ids or why it has none."""

    name: Name
    ids: list[int]
    error: MiniawqError | None = None


class Reading:
    """Makes entries of lines: each is a prompt, or an object that holds one if the first line is an object."""

    def __init__(self, run: Writing) -> None:
        self.run, self.arguments = run, run.arguments

    def entries(self) -> Iterator[PromptLine]:
        """Those of the file; empty lines count, and are left out."""
        # Not splitlines: a text in JSON may hold other characters that end a line.
        lines = [line.removesuffix("\r") for line in read_text(self.arguments.prompts).split("\n")]
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        is_json = bool(numbered) and numbered[0][1].lstrip().startswith("{")
        return (self._entry(number, line, is_json) for number, line in numbered)

    def _entry(self, number: int, line: str, is_json: bool) -> PromptLine:
        name: Name = number
        try:
            given = json.loads(line) if is_json else {"prompt": line}
            name = name_in(given, number)
            prompt = self._prompt_in(given)
            prompts.show(self.arguments, prompt)
            ids = self.run.encode(prompt, prompts.is_chat(self.arguments, self.run.tokenizer))
            self.run.context.room(len(ids))
            return PromptLine(name, ids)
        except MiniawqError as error:
            return PromptLine(name, [], error)
        except (TypeError, KeyError, ValueError, RecursionError) as error:
            why = f"{self.arguments.prompts}, line {number}: {type(error).__name__}: {error}"
            return PromptLine(name, [], InvalidInput("the prompt cannot be read", why, FIX))

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
        self.run, self.arguments = run, run.arguments
        self.entries = list(Reading(run).entries())
        if not self.entries:
            raise InvalidInput(f"{self.arguments.prompts} has no prompts", "all its lines are empty")
        names = [entry.name for entry in self.entries]
        self.records = OrderedRecords(self.arguments.output, self.arguments.resume, names)
        # An interrupted run goes on with its seeds.
        if self.arguments.seed is None and self.records.earlier:
            run.next_seed = self.records.earlier[0]["seed"]
        left = range(self.records.written, len(self.entries))
        self.todo = [number for number in left if number not in self.records.ahead]
        self.seeds = [(run.next_seed + number) % SEEDS for number in range(len(self.entries))]
        # Their numbers: the requests have others.
        self.asked = [number for number in self.todo if self.entries[number].error is None]
        asked = [(self.entries[number].ids, self.seeds[number]) for number in self.asked]
        requests = [Request(ids, run.context.room(len(ids)), seed) for ids, seed in asked]
        self.together = Together(run, requests, prompts.is_chat(self.arguments, run.tokenizer))

    def write(self) -> None:
        """Answer all that have no record yet. MiniawqError at the end if there is none for some."""
        batch, started, total = self.together.batch(), time.perf_counter(), len(self.entries)
        failed: list[tuple[Name, MiniawqError]] = []
        done = total - len(self.todo)
        bar = tqdm(total=total, initial=done, unit="prompt", disable=self.arguments.quiet or None)
        output: Path | None = self.arguments.output
        with alone(output) if output else nullcontext(), self.records, bar:
            try:
                for number, record, error in self._answers(batch):
                    if error is not None:
                        failed.append((self.entries[number].name, error))
                    self.records.put(number, {"id": self.entries[number].name} | record | {"seed": self.seeds[number]})
                    bar.set_postfix_str(f"{batch.tokens / (time.perf_counter() - started):.0f} tokens/s", refresh=False)
                    bar.update()
            finally:
                if output and self.records.written < total:
                    answered = self.records.written + len(self.records.ahead)
                    log.info("%d of %d are answered; --resume goes on", answered, total)
        if not self.todo:
            log.info("all %d prompts were answered before", total)
            return
        seconds = time.perf_counter() - started
        told = "%d prompts, %d tokens in %.1f s: %.1f tokens-per-sec, %d rows at once"
        log.info(told, len(self.todo), batch.tokens, seconds, batch.tokens / seconds, self.together.rows)
        if batch.shared.kept > 1:  # BOS alone is worth no word
            log.info("their first %d tokens are the same and were read once", batch.shared.kept)
        if failed:
            name, error = failed[0]
            what = f"there is no answer for {len(failed)} of {len(self.todo)} prompts"
            raise MiniawqError(what, f"the first has the id {name}: {error.what}", "see the key error of their records")

    def _answers(self, batch: Batch) -> Iterator[tuple[int, dict[str, Any], MiniawqError | None]]:
        """Numbers of entries, what is told of them, and what went wrong, as they come."""
        for number in self.todo:
            if (error := self.entries[number].error) is not None:
                yield number, {"error": str(error)}, error
        for ending in batch:
            number = self.asked[ending.number]
            if ending.completion is None:
                yield number, {"error": str(ending.error)}, ending.error
                continue
            list(ending.completion)
            record = {key: value for key, value in ending.completion.record().items() if key in SAID}
            if ending.completion.logprobs:
                record["logprobs"] = readable(ending.completion.logprobs, self.run.tokenizer)
            yield number, record, None
