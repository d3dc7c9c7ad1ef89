"""What may come of an input, counted where another process can see it even if this one is killed."""

import mmap
import struct
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from miniawq.errors import MiniawqError

KINDS = ("tried", "refused", "same", "changed", "hung", "escaped")
SECONDS = 10.0  # of processor time, for one input
MESSAGE_CHARACTERS = 2000


class Counts(NamedTuple):
    """Inputs by what came: refused cleanly; read with the meaning of a valid file; read with another meaning, which the
    file alone does not contradict; longer than SECONDS; anything else than a MiniawqError.
    """

    tried: int = 0
    refused: int = 0
    same: int = 0
    changed: int = 0
    hung: int = 0
    escaped: int = 0


class Tally:
    """Counts in a file."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(8 * len(KINDS)))
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)

    def add(self, kind: str) -> None:
        """One more of a kind."""
        place = 8 * KINDS.index(kind)
        (count,) = struct.unpack_from("q", self._memory, place)
        struct.pack_into("q", self._memory, place, count + 1)

    @property
    def counts(self) -> Counts:
        """The numbers so far."""
        return Counts(*struct.unpack_from(f"{len(KINDS)}q", self._memory))


class Judge:
    """Sorts what `read` does with inputs; `known` are the meanings of valid ones. What escapes is kept in `found`."""

    def __init__(self, tally: Tally, found: Path) -> None:
        self.tally, self.found = tally, found
        self.known: set[str] = set()
        self._told: set[str] = set()

    def judge(self, read: Callable[[], Any], content: Callable[[], bytes]) -> str:
        """Call `read`; returns the kind of what came. `content` is the input to keep if it escapes."""
        self.tally.add("tried")
        started = time.process_time()
        try:
            kind = "same" if repr(read()) in self.known else "changed"
        except MiniawqError as error:
            kind = "refused" if str(error).count("\n") <= 2 and len(str(error)) < MESSAGE_CHARACTERS else "escaped"
            if kind == "escaped":
                self._keep("a long message", content(), str(error))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            kind = "escaped"
            self._keep(_place_of(error), content(), traceback.format_exc())
        if kind != "escaped" and (taken := time.process_time() - started) > SECONDS:
            kind = "hung"
            self._keep("hung", content(), f"{taken:.1f} s")
        self.tally.add(kind)
        return kind

    def _keep(self, where: str, content: bytes, told: str) -> None:
        """The first input of each place, with what was raised beside it."""
        name = "".join(letter if letter.isalnum() else "-" for letter in where)
        if name not in self._told and len(self._told) < 50:
            self._told.add(name)
            (self.found / name).write_bytes(content)
            (self.found / f"{name}.txt").write_text(told)


def _place_of(error: BaseException) -> str:
    """The last line of ours that an exception has passed."""
    frames = traceback.extract_tb(error.__traceback__)
    place = next((frame for frame in reversed(frames) if "/miniawq/" in frame.filename), frames[-1])
    return f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
