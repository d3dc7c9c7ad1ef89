"""A process for the programs of strangers: chat templates run there, and it is ended if they take too much.

jinja2's sandbox bounds what a template can touch, and not what it takes: `{{ 'x' * 10**10 }}`, a list of lists of lists
that doubles forty times, a loop in a loop in a loop. No list of such operations is complete, so the whole process has a
budget: SECONDS of processor time and MEMORY bytes for one text. It starts with the first template (60 ms), serves the
following ones too (less than 1 ms) and leaves with us. It needs `sys.executable` to be a Python.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from miniawq.errors import UnsupportedCheckpoint

SECONDS = 5.0
MEMORY = 1 << 30
POLL_SECONDS = 0.02
PROGRAM = Path(__file__).with_name("template.py")
# The process finds jinja2 where we do, and nothing else that we would not find.
START = """
import json, runpy, sys
sys.path[:] = json.loads(sys.stdin.buffer.readline())
runpy.run_path(sys.argv[1], run_name="__main__")
"""
FIX = "use --raw, or repair the template"


class TemplateWorker:
    """One such process. Raises UnsupportedCheckpoint from `ask` if it had to be ended, and is of no use then."""

    def __init__(self) -> None:
        command = [sys.executable, "-I", "-S", "-c", START, str(PROGRAM), str(MEMORY)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        try:
            # A session of its own: Ctrl-C at the terminal is for us.
            self.process = subprocess.Popen(command, **pipes, start_new_session=True)
        except (OSError, ValueError) as error:
            fix = "use --raw, or allow this process to start another"
            raise UnsupportedCheckpoint("the chat template cannot be run", str(error), fix) from error
        self.owner = os.getpid()
        self._said = json.dumps([entry for entry in sys.path if entry]).encode() + b"\n"
        self._ended = ""
        atexit.register(self.stop)

    def ask(self, request: bytes) -> dict[str, str]:
        """The answer to one line of JSON."""
        assert self.process.stdin
        assert self.process.stdout
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(done,), daemon=True)
        watcher.start()
        try:
            self.process.stdin.write(self._said + request + b"\n")
            self.process.stdin.flush()
            self._said = b""
            line = self.process.stdout.readline()
        except OSError:
            line = b""
        finally:
            done.set()
            watcher.join()
        if line.endswith(b"\n"):
            return json.loads(line.decode("utf-8", "surrogatepass"))
        self.stop()
        why = self._ended or f"it ended the process that it runs in ({_how(self.process.returncode)})"
        raise UnsupportedCheckpoint("the chat template takes too much", why, FIX)

    def _watch(self, done: threading.Event) -> None:
        """End the process when it has spent its budget."""
        try:
            seen, started = psutil.Process(self.process.pid), time.monotonic()
            before = sum(seen.cpu_times()[:2])
            while not done.wait(POLL_SECONDS):
                # Processor time, as other programs may be busy; but a machine that only swaps gives none.
                spent = max(sum(seen.cpu_times()[:2]) - before, (time.monotonic() - started) / 10)
                if spent > SECONDS:
                    self._ended = f"it was ended after {SECONDS:g} seconds"
                elif seen.memory_info().rss > MEMORY:
                    self._ended = f"it was ended when it had {MEMORY >> 20} MiB of memory"
                if self._ended:
                    return self.process.kill()
        except psutil.Error:
            return None  # It has ended by itself.

    def stop(self) -> None:
        """End the process, if it is ours and not that of the process which forked us."""
        if os.getpid() == self.owner:
            self.process.kill()
            self.process.communicate()
            atexit.unregister(self.stop)


def _how(code: int) -> str:
    return signal.Signals(-code).name if -code in set(signal.Signals) else f"exit status {code}"


_lock = threading.Lock()
_current: TemplateWorker | None = None


def ask_worker(request: bytes) -> dict[str, str]:
    """The answer of this process's worker, which is started when there is none."""
    global _current
    with _lock:
        worker, _current = _current, None
        if worker is None or worker.owner != os.getpid() or worker.process.poll() is not None:
            worker = TemplateWorker()
        try:
            answer = worker.ask(request)
        except BaseException:
            worker.stop()
            raise
        _current = worker
        return answer
