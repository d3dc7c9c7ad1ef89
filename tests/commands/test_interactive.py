"""A conversation: its commands with a stub that answers, and once at a terminal."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

import pytest

from miniawq.commands.interactive import ALIASES, COMMANDS, Conversation, help_text
from miniawq.commands.talking import read_setting
from miniawq.errors import InvalidInput
from tests.helpers.chat_models import make_chat_model

SYSTEM = {"role": "system", "content": "Be brief."}


class Echo:
    """Answers with the number of messages, and remembers what it was asked."""

    def __init__(self):
        self.asked, self.changed, self.begins_in_thought = [], [], False

    def fit(self, messages):
        return messages

    def answer(self, messages):
        self.asked.append(messages)
        if messages[-1]["content"] == "too much":
            raise InvalidInput("the prompt does not fit into the context")
        yield from ["answer ", str(len(self.asked))]
        if messages[-1]["content"] == "stop me":
            raise KeyboardInterrupt

    def change(self, name, value):
        self.changed.append((name, value))

    def told(self):
        return "fast"


@pytest.fixture
def talk():
    return Conversation(Echo(), [SYSTEM])


def contents(conversation):
    return [message["content"] for message in conversation.messages]


def test_questions_and_answers_are_remembered(talk, capsys):
    for line in ("one", "", "  ", "two"):
        talk.take(line)
    assert contents(talk) == ["Be brief.", "one", "answer 1", "two", "answer 2"]
    assert talk.speaker.asked[1] == talk.messages[:4]
    assert capsys.readouterr().out == "answer 1\nanswer 2\n"


def test_what_cannot_be_answered_is_forgotten_and_what_is_stopped_is_kept(talk, capsys):
    for line in ("one", "too much", "stop me"):
        talk.take(line)
    assert contents(talk)[1:] == ["one", "answer 1", "stop me", "answer 3"]
    out, err = capsys.readouterr()
    assert "does not fit" in err
    assert "[stopped]" in err
    assert out.endswith("answer 3\n")


def test_the_last_question_can_be_taken_back_or_asked_again(talk, capsys):
    for line in ("one", "two", "/regen"):
        talk.take(line)
    assert contents(talk)[1:] == ["one", "answer 1", "two", "answer 3"]
    assert talk.speaker.asked[2] == talk.speaker.asked[1]
    talk.take("/undo")
    assert contents(talk)[1:] == ["one", "answer 1"]
    for line in ("/undo", "/undo", "/regen"):
        talk.take(line)
    assert talk.messages == [SYSTEM]
    assert capsys.readouterr().err.count("there is nothing to take back") == 2


def test_a_conversation_begins_again_with_its_system_message_or_another_one(talk):
    talk.take("one")
    talk.take("/clear")
    assert talk.messages == [SYSTEM]
    talk.take("/system Speak like a 'pirate")
    talk.take("one")
    talk.take("/reset")
    assert talk.messages == [{"role": "system", "content": "Speak like a 'pirate"}]


def test_what_is_saved_can_be_loaded(talk, tmp_path, capsys):
    path = tmp_path / "two words.json"
    talk.take("grüße")
    talk.take(f"/save '{path}'")
    assert json.loads(path.read_text(encoding="utf-8")) == talk.messages
    saved = list(talk.messages)
    talk.take("/clear")
    talk.take(f"/load '{path}'")
    assert talk.messages == saved
    for line in ("/load nowhere.json", f"/save '{tmp_path}'", "/load 'open"):
        talk.take(line)
    assert talk.messages == saved
    err = capsys.readouterr().err
    assert "nowhere.json" in err
    assert "close the quotes" in err


def test_settings_and_figures_are_the_speakers(talk, capsys):
    talk.take("/set temperature 0.7")
    talk.take("/stats")
    assert talk.speaker.changed == [("temperature", "0.7")]
    assert capsys.readouterr().err == "fast\n"


@pytest.mark.parametrize(
    "line", ["/set", "/set temperature", "/set a b c", "/save", "/clear now", "/system", "/exit now"]
)
def test_a_command_with_other_words_says_how_it_is_written(talk, line, capsys):
    talk.take("one")
    talk.take(line)
    assert len(talk.messages) == 3
    assert talk.goes_on
    name = line.split()[0]
    assert f"write {name} {COMMANDS[name].words}".rstrip() in capsys.readouterr().err


def test_help_names_every_command_and_other_names_lead_to_one(talk, capsys):
    talk.take("/what")
    talk.take("/help")
    err = capsys.readouterr().err
    assert "there is no /what" in err
    assert err.count(help_text()) == 2
    assert all(line.startswith("/") and len(line) < 80 for line in help_text().splitlines())
    assert set(ALIASES.values()) <= COMMANDS.keys()
    talk.take("/bye")
    assert not talk.goes_on


@pytest.mark.parametrize(("name", "value", "found"), [
    ("temperature", "0.5", ("temperature", 0.5)), ("--top-k", "40", ("top_k", 40)), ("top_p", ".9", ("top_p", 0.9)),
    ("max-tokens", "-1", ("max_tokens", -1)), ("seed", "7", ("seed", 7)),
])  # fmt: skip
def test_settings_have_the_names_of_the_flags(name, value, found):
    assert read_setting(name, value) == found


@pytest.mark.parametrize(("name", "value", "why"), [
    ("colour", "1", "there is no setting colour"), ("top_k", "many", "must be a number"), ("top_k", "1.5", "a number"),
    ("seed", "-1", "from 0 to"), ("max_tokens", "0", "not 0"), ("max_tokens", "-2", "from -1"),
])  # fmt: skip
def test_settings_that_make_no_sense(name, value, why):
    with pytest.raises(InvalidInput, match=why):
        read_setting(name, value)


class Terminal:
    """A program whose stdin and stderr are a terminal, and whose stdout is a pipe."""

    def __init__(self, *command, **environment):
        self.ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 80))
        options = {"stdin": theirs, "stderr": theirs, "stdout": subprocess.PIPE, "start_new_session": True}
        self.process = subprocess.Popen(command, env=os.environ | environment, **options)
        os.close(theirs)
        self.shown, self.out = "", ""

    def until(self, done, seconds=60):
        """Read both streams until done() is true."""
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, (self.shown[-500:], self.out[-500:])
            for stream in select.select([self.ours, self.process.stdout], [], [], 1)[0]:
                if stream == self.ours:
                    read = os.read(self.ours, 4096).decode(errors="replace")
                    if "\x1b[6n" in read:
                        os.write(self.ours, b"\x1b[1;1R")  # where the cursor is, as a terminal says when it is asked
                    self.shown += re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", read)
                else:
                    self.out += os.read(self.process.stdout.fileno(), 4096).decode(errors="replace")

    def type(self, text):
        os.write(self.ours, text.encode())


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_two_turns_an_interrupt_and_a_command_at_a_terminal(tmp_path):
    model = make_chat_model(tmp_path / "model", context=4096)
    flags = ["-i", "-n", "3900", "--greedy", "--ignore-eos", "--device", "cpu"]
    environment = {"XDG_STATE_HOME": str(tmp_path / "state"), "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    terminal = Terminal(sys.executable, "-m", "miniawq.generate", model, *flags, **environment)
    try:
        terminal.until(lambda: ">" in terminal.shown)
        assert "/help lists the commands; Alt-Enter" in terminal.shown
        for turn, question in enumerate(["one\x1b\rtwo\r", "again\r"], start=1):  # the first has two lines
            written = len(terminal.out)
            terminal.type(question)
            terminal.until(lambda written=written: len(terminal.out) > written + 20)
            os.kill(terminal.process.pid, signal.SIGINT)
            terminal.until(lambda turn=turn: terminal.shown.count("[stopped]") == turn)
        terminal.type("/set max_tokens 5\r/stats\r")
        terminal.until(lambda: "of them kept" in terminal.shown)
        written = terminal.out.count("\n")
        terminal.type("third\r")
        terminal.until(lambda: terminal.out.count("\n") > written)
        terminal.type("/exit\r")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.ours)
    history = tmp_path / "state" / "miniawq" / "history"
    assert "+one\n+two\n" in history.read_text()
    assert history.stat().st_mode & 0o77 == 0
