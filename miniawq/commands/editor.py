"""Where the user's lines come from: an editor with a history at a terminal, else stdin."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import platformdirs

from miniawq.cli import say

PROMPT = "> "


class Reader:
    """Call it for the next line: None if the user leaves. Ctrl-C leaves too, because there is no answer to stop.

    At a terminal, questions may have several lines (Alt-Enter), earlier ones come back (up), `words` are completed
    (tab), and the history outlives the process.
    """

    def __init__(self, words: Sequence[str]) -> None:
        at_terminal = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))
        self.hint = "; Alt-Enter begins a new line" if at_terminal else ""
        self._read: Callable[[], str] = _session(words) if at_terminal else input

    def __call__(self) -> str | None:
        try:
            return self._read()
        except UnicodeDecodeError:
            say("this line is not UTF-8")
            return ""
        except (EOFError, KeyboardInterrupt, RuntimeError):  # RuntimeError: there is no stdin
            return None


def _session(words: Sequence[str]) -> Callable[[], str]:
    """Imported here: who has no terminal does not wait for it."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        PROMPT,
        history=_history(),
        completer=WordCompleter(list(words), sentence=True),
        complete_while_typing=False,
        key_bindings=keys,
        output=create_output(stdout=sys.stderr),  # stdout is for text alone
    )
    return session.prompt


def _history() -> Any:
    """Earlier questions, in a file that only their user can read; of this process where there can be none."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = Path(platformdirs.user_state_dir("miniawq")) / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))
