"""Command lines of miniawq in processes of their own, forked from this one, which has imported torch already.

A process that forks must have no threads: whoever uses this runs no model itself.
"""

import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from miniawq.__main__ import VERBS, main

SECONDS = 60.0  # after which a run has hung
EXIT_CODES = {0, 1, 2, 3, 4, 5, 130}
POLL_SECONDS = 0.002


def ready() -> None:
    """Import what the verbs need, once for all that are forked."""
    torch.set_num_threads(1)
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # its pictures take longer than all the rest
    for verb in VERBS.values():
        importlib.import_module(verb.module)


class Ended(NamedTuple):
    """Exit code (minus the number of a signal), what came on stderr, and whether it had to be ended."""

    code: int
    err: str
    hung: bool = False

    @property
    def escaped(self) -> str:
        """What is wrong with this end, signals sent to it aside; empty if nothing is."""
        if self.hung:
            return "it hung"
        if "Traceback" in self.err or "panicked" in self.err or "Fatal" in self.err:
            return "a traceback"
        if self.code >= 0 and self.code not in EXIT_CODES:
            return f"exit code {self.code}"
        if self.code in EXIT_CODES - {0, 130} and not 1 <= len(self.told) <= 3:
            return f"an error of {len(self.told)} lines"
        return ""

    @property
    def told(self) -> list[str]:
        """The lines of the error."""
        lines = self.err.splitlines()
        first = next((place for place, line in enumerate(lines) if line.startswith("miniawq ")), len(lines))
        return lines[first:]


class Run:
    """A command line that runs. `setup` is called in its process before it begins."""

    def __init__(self, arguments: Sequence[str | Path], log: Path, setup: Callable[[], None] = lambda: None) -> None:
        self.log, self.started = log, time.monotonic()
        log.touch()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the child has begun
        self.pid = os.fork()
        if not self.pid:
            _child([str(word) for word in arguments], log, setup)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def send(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def poll(self) -> int | None:
        """The status of the process, None while it runs."""
        if not hasattr(self, "_status"):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if not pid:
                return None
            self._status = status
        return self._status

    def wait(self) -> Ended:
        """Wait until it ends; a run that hangs is killed."""
        while (status := self.poll()) is None:
            if time.monotonic() - self.started > SECONDS:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return Ended(-9, self.log.read_text(errors="replace"), hung=True)
            time.sleep(POLL_SECONDS)
        return Ended(os.waitstatus_to_exitcode(status), self.log.read_text(errors="replace"))


def _child(arguments: list[str], log: Path, setup: Callable[[], None]) -> None:
    code = 1
    try:
        os.setsid()
        for number, path in enumerate((os.devnull, log.with_suffix(".out"), log)):
            opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, number)
            os.close(opened)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)  # here too, before there are threads: torch forgets its pool in a fork
        setup()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        code = main(arguments)
    except KeyboardInterrupt:  # before it has begun
        code = 130
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def mount(place: Path, *options: str) -> bool:
    """Mount a file system of memory, or change the mounted one; False where that is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(place)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def unmount(place: Path) -> None:
    """Take it away at once; open files stay readable until they are closed."""
    subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)
