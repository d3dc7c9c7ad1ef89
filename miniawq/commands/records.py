"""JSON lines in the order of a list, whatever order they come in; in a file, a run that was interrupted goes on."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from miniawq.checkpoint.shards import disk_errors
from miniawq.errors import UsageError
from miniawq.text.plain import read_text

Name = str | int
Record = dict[str, Any]


class OrderedRecords:
    """Use it in a `with` block. A record is written when all before it are: `written` of them are, `ahead` is the rest.

    Without a path they go to stdout. Beside the file lies another one meanwhile (`.ahead`), with the records that wait
    for their turn. `resumes` keeps what an earlier run has written to both, whose records must have ids from `names`,
    each in its place, and seeds. `earlier` is what it kept of the first.
    """

    def __init__(self, path: Path | None, resumes: bool, names: Sequence[Name]) -> None:
        self.path, self.total = path, len(names)
        self.earlier: list[Record] = []
        self.ahead: dict[int, Record] = {}
        self._size = size_of(path)
        if path is not None and self._size:
            if not resumes:
                why = f"{path} has {self._size} bytes"
                raise UsageError("the output is there already", why, "go on with it (--resume), or name another file")
            self.earlier = records_of(path, names)
        self.written = len(self.earlier)
        self._file: TextIO = sys.stdout
        self._aside = None if path is None else path.with_name(path.name + ".ahead")
        if resumes and self._aside is not None and self._aside.exists():
            self.ahead = dict(records_ahead(self._aside, names, self.written))

    def __enter__(self) -> "OrderedRecords":
        if size_of(self.path) != self._size:
            why, fix = "its size has changed since this run began", "begin again with --resume, or name another file"
            raise UsageError(f"another run has written to {self.path}", why, fix)
        if self.path is not None and self._aside is not None:
            with disk_errors(self.path):
                # What a killed run left of its last lines goes.
                kept = "".join(f"{line}\n" for line in lines_of(self.path)[: self.written]) if self.written else ""
                self._file = open(self.path, "r+" if self.written else "w", encoding="utf-8", newline="\n")
                self._file.seek(len(kept.encode()))
                self._file.truncate()
                self._aside.unlink(missing_ok=True)
            for number, record in self.ahead.items():
                self._put_aside(number, record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.path is not None and self._aside is not None:
            with disk_errors(self.path):
                self._file.close()
            if self.written == self.total:
                self._aside.unlink(missing_ok=True)

    def put(self, number: int, record: Record) -> None:
        """Write the record of this number, or put it aside until those before it have come."""
        self.ahead[number] = record
        if number > self.written:
            self._put_aside(number, record)
        while self.written in self.ahead:
            line = json.dumps(self.ahead.pop(self.written), ensure_ascii=False)
            if self.path is None:
                print(line, flush=True)
            else:
                with disk_errors(self.path):
                    print(line, file=self._file, flush=True)
            self.written += 1

    def _put_aside(self, number: int, record: Record) -> None:
        if self._aside is not None:
            line = json.dumps({"number": number, "record": record}, ensure_ascii=False)
            with disk_errors(self._aside), open(self._aside, "a", encoding="utf-8", newline="\n") as file:
                file.write(line + "\n")


def size_of(path: Path | None) -> int:
    """Bytes of the file for the output, which is made: what cannot be written is refused before weights are read."""
    if path is None:
        return 0
    with disk_errors(path):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666))
        return path.stat().st_size


def lines_of(path: Path) -> list[str]:
    """The lines of a file that have been ended."""
    return read_text(path).split("\n")[:-1]


def is_record(record: Any, name: Name) -> bool:
    """Whether it is the record of the prompt with this name, as far as can be told."""
    return isinstance(record, dict) and record.get("id") == name and type(record.get("seed")) is int


def records_of(path: Path, names: Sequence[Name]) -> list[Record]:
    """What an earlier run has written there; UsageError if it was about other prompts."""
    found = []
    for number, line in enumerate(lines_of(path)):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if number >= len(names) or not is_record(record, names[number]):
            why = f"{path}, line {number + 1} is no record of the prompt in that place"
            raise UsageError("the output is that of other prompts", why, "name another file (--output)")
        found.append(record)
    return found


def records_ahead(path: Path, names: Sequence[Name], written: int) -> Iterator[tuple[int, Record]]:
    """What an earlier run has put aside and not written since; lines that make no sense are left out."""
    for line in lines_of(path):
        try:
            found = json.loads(line)
            number, record = found["number"], found["record"]
            is_ours = written < number < len(names) and is_record(record, names[number])
        except (ValueError, RecursionError, TypeError, KeyError):
            continue
        if is_ours:
            yield number, record
