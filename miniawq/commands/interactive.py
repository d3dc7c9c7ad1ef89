"""A conversation at the terminal: a question, an answer, and commands. Ctrl-C stops an answer without leaving."""

import json
import logging
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from miniawq.checkpoint.shards import disk_errors
from miniawq.cli import say
from miniawq.commands.editor import Reader
from miniawq.commands.prompts import read_messages
from miniawq.commands.thoughts import styled
from miniawq.errors import InvalidInput, MiniawqError
from miniawq.text.chat import Message

log = logging.getLogger(__name__)


class Speaker(Protocol):
    """What answers; `begins_in_thought` says whether its last answer did."""

    begins_in_thought: bool

    def fit(self, messages: list[Message]) -> list[Message]:
        """Those that fit into the context, the latest ones."""

    def answer(self, messages: list[Message]) -> Iterator[str]:
        """The next message in pieces."""

    def change(self, name: str, value: str) -> None:
        """Answer with another setting from now on; InvalidInput if there is none of that name or value."""

    def told(self) -> str:
        """How fast the last answer came, and with which settings."""


class Command(NamedTuple):
    """`act` gets the words after the name, of which there must be `words`."""

    words: str
    meaning: str
    act: Callable[["Conversation", list[str]], None]


class Conversation:
    """The messages so far. `opening` is what a conversation begins with, and begins again with."""

    def __init__(self, speaker: Speaker, opening: Sequence[Message] = ()) -> None:
        self.speaker, self.opening = speaker, list(opening)
        self.messages, self.goes_on = list(opening), True

    def take(self, line: str) -> None:
        """One line of the user: a command, or a question to be answered. What goes wrong is told, and undone."""
        before = list(self.messages)
        try:
            if line.startswith("/"):
                self._command(line)
            elif line.strip():
                self._ask(line)
        except MiniawqError as error:
            self.messages = before
            say(str(error))

    def _command(self, line: str) -> None:
        name, _, rest = line.strip().partition(" ")
        command = COMMANDS.get(ALIASES.get(name, name))
        if command is None:
            return say(f"there is no {name}\n{help_text()}")
        try:
            words = [rest] if command.words == "TEXT" else shlex.split(rest)
        except ValueError as error:
            raise InvalidInput(f"cannot read {line.strip()}", str(error), "close the quotes") from error
        if len(words) != len(command.words.split()) or "" in words:
            return say(f"write {name} {command.words}".rstrip())
        command.act(self, words)

    def _ask(self, question: str) -> None:
        self.messages = self.speaker.fit([*self.messages, {"role": "user", "content": question}])
        pieces = self.speaker.answer(list(self.messages))
        text = write_answer(pieces, self.speaker.begins_in_thought)
        self.messages.append({"role": "assistant", "content": text})

    def clear(self, _: list[str]) -> None:
        self.messages = list(self.opening)

    def system(self, words: list[str]) -> None:
        self.opening = [{"role": "system", "content": words[0]}]
        self.messages = list(self.opening)

    def change(self, words: list[str]) -> None:
        self.speaker.change(*words)

    def stats(self, _: list[str]) -> None:
        say(self.speaker.told())

    def undo(self, _: list[str]) -> None:
        self._take_back()

    def again(self, _: list[str]) -> None:
        self._ask(self._take_back())

    def _take_back(self) -> str:
        """Forget the last question and what came after it; returns the question."""
        asked = [place for place, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            raise InvalidInput("there is nothing to take back", "no question has been asked")
        question = self.messages[asked[-1]]["content"]
        del self.messages[asked[-1] :]
        return str(question)

    def save(self, words: list[str]) -> None:
        path = Path(words[0]).expanduser()
        with disk_errors(path):
            path.write_text(json.dumps(self.messages, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        log.info("wrote %d messages to %s", len(self.messages), path)

    def load(self, words: list[str]) -> None:
        self.messages, _ = read_messages(Path(words[0]).expanduser())
        log.info("read %d messages", len(self.messages))

    def help(self, _: list[str]) -> None:
        say(help_text())

    def leave(self, _: list[str]) -> None:
        self.goes_on = False


COMMANDS = {
    "/clear": Command("", "begin again", Conversation.clear),
    "/system": Command("TEXT", "begin again with this system message", Conversation.system),
    "/set": Command("NAME VALUE", "temperature, top_k, max_tokens, ... from now on", Conversation.change),
    "/regen": Command("", "answer the last question again", Conversation.again),
    "/undo": Command("", "take the last question and its answer back", Conversation.undo),
    "/save": Command("FILE", "write the messages as JSON", Conversation.save),
    "/load": Command("FILE", "go on with the messages of a file", Conversation.load),
    "/stats": Command("", "speed, memory and settings of the last answer", Conversation.stats),
    "/help": Command("", "this list", Conversation.help),
    "/exit": Command("", "leave, as Ctrl-D does; Ctrl-C stops an answer", Conversation.leave),
}
ALIASES = {"/bye": "/exit", "/quit": "/exit", "/reset": "/clear", "/?": "/help"}


def help_text() -> str:
    """A line for each command."""
    return "\n".join(f"{f'{name} {command.words}'.strip():17} {command.meaning}" for name, command in COMMANDS.items())


def converse(speaker: Speaker, opening: Sequence[Message] = ()) -> None:
    """Read lines and write answers to stdout until the user leaves."""
    conversation, read = Conversation(speaker, opening), Reader(list(COMMANDS))
    say("/help lists the commands" + read.hint)
    while conversation.goes_on and (line := read()) is not None:
        conversation.take(line)


def write_answer(pieces: Iterator[str], in_thought: bool) -> str:
    """An answer, written as it comes; what there was of it if the user stops it."""
    text: list[str] = []

    def noted() -> Iterator[str]:
        for piece in pieces:
            text.append(piece)
            yield piece

    try:
        for piece in styled(noted(), in_thought):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        say(" [stopped]", end="")
    print(flush=True)
    return "".join(text)
