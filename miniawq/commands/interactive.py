"""A conversation at the terminal: one line, one answer, and Ctrl-C stops the answer without leaving."""

import sys
from collections.abc import Callable, Iterator, Sequence

from miniawq.cli import say
from miniawq.errors import MiniawqError
from miniawq.text.chat import Message

HELP = "/clear begins again, /bye or Ctrl-D leaves, Ctrl-C stops an answer"


def converse(answer: Callable[[list[Message]], Iterator[str]], opening: Sequence[Message] = ()) -> None:
    """Read lines from stdin and write answers to stdout until the user leaves.

    `answer` takes all messages so far and yields the next one in pieces. An error in a turn is written to stderr, and
    the turn is forgotten.
    """
    messages = list(opening)
    say(HELP)
    while (line := _read_line()) is not None:
        match line.strip():
            case "":
                continue
            case "/bye" | "/exit" | "/quit":
                return
            case "/clear":
                messages = list(opening)
            case command if command.startswith("/"):
                say(HELP)
            case _:
                question: Message = {"role": "user", "content": line}
                try:
                    text = _write_answer(answer([*messages, question]))
                except MiniawqError as error:
                    say(str(error))
                else:
                    messages += [question, {"role": "assistant", "content": text}]


def _read_line() -> str | None:
    """The next line; None if the user leaves. Ctrl-C leaves too, because there is no answer to stop."""
    try:
        return input("> " if sys.stdin and sys.stdin.isatty() else "")
    except UnicodeDecodeError:
        say("this line is not UTF-8")
        return ""
    except (EOFError, KeyboardInterrupt, RuntimeError):  # RuntimeError: there is no stdin
        return None


def _write_answer(pieces: Iterator[str]) -> str:
    written: list[str] = []
    try:
        for piece in pieces:
            written.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        say(" [stopped]", end="")
    print(flush=True)
    return "".join(written)
