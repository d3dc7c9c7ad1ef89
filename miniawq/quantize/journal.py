"""What a long run has done so far, so that a killed one can go on: a file of one JSON object a line.

The first line names the run: the model, the text and the settings, hashed. Each further line is one finished block. A
line counts once its last byte is on the disk; half a line, which a kill leaves, does not.
"""

import hashlib
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from miniawq.checkpoint.opening import Checkpoint
from miniawq.checkpoint.shards import LOCK
from miniawq.errors import UsageError

log = logging.getLogger(__name__)

NAME = "quantization_journal.jsonl"
PIECES, PIECE_BYTES = 1024, 4096  # of each weight file, for the fingerprint: 4 MiB of any size


class Journal:
    """The finished blocks of a run in `directory`; `blocks` are those of an earlier, interrupted run.

    UsageError when the directory holds something else, or the journal of another run.
    """

    def __init__(self, directory: Path, run: Mapping[str, Any]) -> None:
        self.path = directory / NAME
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        if lines:
            self._check(json.loads(lines[0]), run)
        elif directory.exists() and set(directory.iterdir()) - {self.path, directory / LOCK}:
            raise UsageError(
                f"{directory} is not empty",
                "it holds no unfinished run that could go on",
                "name a new directory, or remove this one",
            )
        self.blocks: list[dict[str, Any]] = [json.loads(line) for line in lines[1:]]
        directory.mkdir(parents=True, exist_ok=True)
        if lines:
            os.truncate(self.path, sum(len(line) + 1 for line in lines))
        else:
            self.path.write_bytes(b"")
            self._append(run)

    def _check(self, found: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        run = json.loads(json.dumps(run))
        if changed := sorted(key for key in found.keys() | run.keys() if found.get(key) != run.get(key)):
            raise UsageError(
                f"the unfinished run in {self.path.parent} is another one",
                "; ".join(f"{key} was {found.get(key)!r} and is {run.get(key)!r}" for key in changed),
                "use the same model, text and settings to go on, or name a new directory",
            )

    def add(self, block: Mapping[str, Any]) -> None:
        """Note a finished block whose tensors are on the disk."""
        self._append(block)
        self.blocks.append(dict(block))

    def _append(self, record: Mapping[str, Any]) -> None:
        with open(self.path, "ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        self.path.unlink()


def fingerprint(checkpoint: Checkpoint) -> str:
    """A hash of the checkpoint's config, headers and evenly spaced pieces of its weight files.

    It tells two fine-tunes of a model apart without reading all of either.
    """
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name, info in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {info}".encode())
    for name in sorted({info.file for info in checkpoint.tensors.values()}):
        path = checkpoint.files.local(name)
        size = path.stat().st_size
        with open(path, "rb") as file:
            for piece in range(PIECES):
                file.seek(max(piece * PIECE_BYTES, size * piece // PIECES))
                digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()


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
