"""A conversation at the terminal: one line, one answer, and Ctrl-C stops the answer without leaving."""

import sys
from collections.abc import Callable, Iterator, Sequence

from miniawq.chat import Message
from miniawq.errors import MiniawqError

HELP = "/clear begins again, /bye or Ctrl-D leaves, Ctrl-C stops an answer"


def converse(answer: Callable[[list[Message]], Iterator[str]], opening: Sequence[Message] = ()) -> None:
    """Read lines from stdin and write answers to stdout until the user leaves.

    `answer` gets all messages so far and gives the text of the next one in pieces. What went wrong in a turn is said on
    stderr, and the turn forgotten.
    """
    messages = list(opening)
    print(HELP, file=sys.stderr)
    while (line := _read_line()) is not None:
        match line.strip():
            case "":
                continue
            case "/bye" | "/exit" | "/quit":
                return
            case "/clear":
                messages = list(opening)
            case command if command.startswith("/"):
                print(HELP, file=sys.stderr)
            case _:
                question: Message = {"role": "user", "content": line}
                try:
                    text = _write_answer(answer([*messages, question]))
                except MiniawqError as error:
                    print(error, file=sys.stderr)
                else:
                    messages += [question, {"role": "assistant", "content": text}]


def _read_line() -> str | None:
    """None when the user leaves, by Ctrl-C too: nothing is under way that it could stop."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


def _write_answer(pieces: Iterator[str]) -> str:
    written: list[str] = []
    try:
        for piece in pieces:
            written.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="", file=sys.stderr)
    print(flush=True)
    return "".join(written)
