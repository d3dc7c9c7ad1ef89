"""Where the user's lines come from: an editor with a history at a terminal, else stdin."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from miniawq.cli import say


class Reader:
    """Call it for the next line: None if the user leaves. Ctrl-C leaves too, because there is no answer to stop.

    At a terminal, questions may have several lines (Alt-Enter), earlier ones come back (up), `words` are completed
    (tab), and the history outlives the process.
    """

    def __init__(self, words: Sequence[str]) -> None:
        at_terminal = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))
        self.hint = "; Alt-Enter begins a new line" if at_terminal else ""
        self._read: Callable[[], str] = _session(words) if at_terminal else lambda: input("")

    def __call__(self) -> str | None:
        try:
            return self._read()
        except UnicodeDecodeError:
            say("this line is not UTF-8")
            return ""
        except (EOFError, KeyboardInterrupt, RuntimeError):  # RuntimeError: there is no stdin
            return None


def _session(words: Sequence[str]) -> Callable[[], str]:
    """That of `terminal.py`, imported when it is needed: who has no terminal does not wait for it."""
    made: Callable[[], str] = import_module("miniawq.commands.terminal").session(words)
    return made
