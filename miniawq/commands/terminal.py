"""The line editor of a conversation at a terminal."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import platformdirs
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent
from prompt_toolkit.output import create_output

PROMPT = "> "


def session(words: Sequence[str]) -> Callable[[], str]:
    """What asks for a line, or several, and completes `words`."""
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    made: PromptSession[str] = PromptSession(
        PROMPT,
        history=kept_lines(),
        completer=WordCompleter(list(words), sentence=True),
        complete_while_typing=False,
        key_bindings=keys,
        output=create_output(stdout=sys.stderr),  # stdout is for text alone
    )
    return made.prompt


def kept_lines() -> History:
    """Earlier lines, in a file that only their user can read; of this process alone where there can be none."""
    path = Path(platformdirs.user_state_dir("miniawq")) / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))
