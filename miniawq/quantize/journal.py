"""What a long run has done so far, so that a killed one can go on: a file of one JSON object a line.

The first line names the run: the model, the text and the settings, hashed. Each further line is one finished block. A
line counts once its last byte is on the disk; half a line, which a kill leaves, does not. The last line, written once
all is verified, names the files that are being published.
"""

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from miniawq.checkpoint.publishing import LOCK, UNFINISHED
from miniawq.checkpoint.shards import disk_errors
from miniawq.errors import UsageError

log = logging.getLogger(__name__)

NAME = "quantization_journal.jsonl"
VERSION = 2  # 1 wrote shards under their final names before they were verified


class Journal:
    """The finished blocks of a run in `directory`; `blocks` are those of an earlier, interrupted run.

    `problem(block, number)` says what is wrong with a block that was read, or nothing. Until `begin` nothing is
    written. UsageError when the directory holds something else, the journal of another run, or a damaged one.
    """

    def __init__(
        self,
        directory: Path,
        run: Mapping[str, Any],
        problem: Callable[[dict[str, Any], int], str] = lambda block, number: "",
    ) -> None:
        self.path, self.run = directory / NAME, {"journal": VERSION, **run}
        self.blocks: list[dict[str, Any]] = []
        self.published: list[str] = []
        content = self._read()
        *lines, rest = content.split(b"\n")
        if lines:
            self._check(self._parse(lines[0], 1))
        elif not (json.dumps(self.run).encode()).startswith(rest):
            raise self._damaged(1, "it is not the beginning of a journal of this run")
        else:
            refuse_others(directory)
        for number, line in enumerate(lines[1:], start=2):
            self._take(self._parse(line, number), number, problem)
        self._whole = len(content) - len(rest)

    def _read(self) -> bytes:
        with disk_errors(self.path.parent):
            if self.path.is_symlink() or (self.path.exists() and not self.path.is_file()):
                raise self._damaged(1, "it is no ordinary file")
            return self.path.read_bytes() if self.path.exists() else b""

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._damaged(number, f"it is not JSON: {str(error)[:100]}") from error
        if not isinstance(record, dict):
            raise self._damaged(number, "it is no JSON object")
        return record

    def _check(self, found: Mapping[str, Any]) -> None:
        run = json.loads(json.dumps(self.run))
        if changed := sorted(key for key in found.keys() | run.keys() if found.get(key) != run.get(key)):
            raise UsageError(
                f"the unfinished run in {self.path.parent} is another one",
                "; ".join(f"{key} was {found.get(key)!r:.300} and is {run.get(key)!r:.300}" for key in changed[:5]),
                "use the same model, text and settings to go on, or name a new directory",
            )

    def _take(self, record: dict[str, Any], number: int, problem: Callable[[dict[str, Any], int], str]) -> None:
        if "published" in record:
            names = record["published"]
            if not isinstance(names, list) or not all(map(_is_published, names)):
                raise self._damaged(number, "`published` holds something that is no name of a published file")
            self.published += names
        elif why := problem(record, len(self.blocks)):
            raise self._damaged(number, why)
        else:
            self.blocks.append(record)

    def _damaged(self, number: int, why: str) -> UsageError:
        fix = "remove the directory and start again, or name a new one"
        return UsageError(f"{self.path}, line {number}, cannot be used", why, fix)

    def begin(self) -> None:
        """Start the journal on the disk, or cut off the half line that a kill has left."""
        with disk_errors(self.path.parent):
            self.path.touch()
            os.truncate(self.path, self._whole)
        if not self._whole:
            self._append(self.run)

    def add(self, block: Mapping[str, Any]) -> None:
        """Note a finished block whose tensors are on the disk."""
        self._append(block)
        self.blocks.append(dict(block))

    def publishing(self, names: Sequence[str]) -> None:
        """Note which files are going to be moved, all of them verified."""
        self._append({"published": list(names)})

    def _append(self, record: Mapping[str, Any]) -> None:
        with disk_errors(self.path.parent), open(self.path, "r+b") as file:  # which makes none where it was taken away
            file.seek(0, os.SEEK_END)
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        with disk_errors(self.path.parent):
            self.path.unlink()


def refuse_others(directory: Path) -> None:
    """UsageError when a directory without a journal holds something."""
    if directory.exists() and {path.name for path in directory.iterdir()} - {NAME, LOCK}:
        raise UsageError(
            f"{directory} is not empty",
            "it holds no unfinished run that could go on",
            "name a new directory, or remove this one",
        )


def _is_published(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and name not in ("", "..", NAME, LOCK, UNFINISHED)


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; a second Ctrl-C raises KeyboardInterrupt as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        log.warning("stopping after this block (Ctrl-C again to stop at once)")
        stop.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
