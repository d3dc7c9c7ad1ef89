"""JSON lines in the order of a list, whatever order they come in; in a file, a run that was interrupted goes on."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from miniawq.checkpoint.shards import disk_errors
from miniawq.errors import UsageError
from miniawq.text.plain import read_text

Name = str | int


class OrderedRecords:
    """Use it in a `with` block. A record is written when all before it are; `written` of them are there.

    Without a path they go to stdout. `resumes` keeps what an earlier run has written, whose records must have the first
    of `names` as their ids, and seeds. `earlier` is what it kept.
    """

    def __init__(self, path: Path | None, resumes: bool, names: Sequence[Name]) -> None:
        self.path, self.total = path, len(names)
        self.earlier: list[dict[str, Any]] = []
        self._waiting: dict[int, dict[str, Any]] = {}
        if path is not None and path.exists() and path.stat().st_size:
            if not resumes:
                why = f"{path} has {path.stat().st_size} bytes"
                raise UsageError("the output is there already", why, "go on with it (--resume), or name another file")
            self.earlier = records_of(path, names)
        self.written = len(self.earlier)
        self._file: TextIO = sys.stdout

    def __enter__(self) -> "OrderedRecords":
        if self.path is not None:
            with disk_errors(self.path):
                # What a killed run left of its last line goes.
                kept = "".join(f"{line}\n" for line in lines_of(self.path)[: self.written]) if self.written else ""
                self._file = open(self.path, "r+" if self.written else "w", encoding="utf-8", newline="\n")
                self._file.seek(len(kept.encode()))
                self._file.truncate()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.path is not None:
            self._file.close()

    def put(self, number: int, record: dict[str, Any]) -> None:
        """Write the record of this number, or keep it until those before it have come."""
        self._waiting[number] = record
        while self.written in self._waiting:
            line = json.dumps(self._waiting.pop(self.written), ensure_ascii=False)
            if self.path is None:
                print(line, flush=True)
            else:
                with disk_errors(self.path):
                    print(line, file=self._file, flush=True)
            self.written += 1


def lines_of(path: Path) -> list[str]:
    """The lines of a file that have been ended."""
    return read_text(path).split("\n")[:-1]


def records_of(path: Path, names: Sequence[Name]) -> list[dict[str, Any]]:
    """What an earlier run has written there; UsageError if it was about other prompts."""
    found = []
    for number, line in enumerate(lines_of(path)):
        try:
            record = json.loads(line)
            is_ours = number < len(names) and record["id"] == names[number] and type(record["seed"]) is int
        except (ValueError, TypeError, KeyError, RecursionError):
            is_ours = False
        if not is_ours:
            why = f"{path}, line {number + 1} is no record of the prompt in that place"
            raise UsageError("the output is that of other prompts", why, "name another file (--output)")
        found.append(record)
    return found
