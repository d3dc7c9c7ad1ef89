"""Models that think aloud: told to or not, their thoughts dimmed at a terminal; answers that begin with given words."""

import json

import pytest

from miniawq.commands import thoughts
from miniawq.commands.thoughts import DIM, PLAIN, dimmed, styled
from miniawq.generate import main
from tests.helpers.chat_models import CHATML, make_chat_model

THINKING = CHATML.replace("{{ prefix }}", "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}")


@pytest.mark.parametrize(("text", "in_thought", "shown"), [
    ("<think>so</think>yes", False, f"{DIM}<think>so</think>{PLAIN}yes"),
    ("so</think>yes<think>no", True, f"{DIM}so</think>{PLAIN}yes{DIM}<think>no{PLAIN}"),
    ("a < b <thin </think>", False, "a < b <thin </think>"),
    ("</think><think></think>", True, f"{DIM}</think>{PLAIN}{DIM}<think></think>{PLAIN}"),
])  # fmt: skip
def test_thoughts_are_dimmed_wherever_the_pieces_end(text, in_thought, shown):
    for size in (1, 2, 3, 5, 100):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert "".join(dimmed(pieces, in_thought)) == shown


def test_an_interrupted_thought_leaves_the_terminal_as_it_was():
    def pieces():
        yield "<think>so"
        raise KeyboardInterrupt

    shown = []
    with pytest.raises(KeyboardInterrupt):
        shown.extend(iter_noting(dimmed(pieces(), False), shown))
    assert "".join(shown).endswith(PLAIN)


def iter_noting(pieces, shown):
    for piece in pieces:
        shown.append(piece)
    return []


@pytest.mark.parametrize(("is_terminal", "environment", "dims"), [
    (True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False), (True, {"TERM": "dumb"}, False),
])  # fmt: skip
def test_only_a_terminal_that_wants_it_is_sent_marks(monkeypatch, is_terminal, environment, dims):
    monkeypatch.setattr(thoughts.sys.stdout, "isatty", lambda: is_terminal, raising=False)
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (DIM in "".join(styled(["<think>"], False))) == dims


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    model = tmp_path_factory.mktemp("thinking")
    make_chat_model(model)
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": THINKING}))
    return str(model)


def told(capsys, *flags):
    code = main([*flags, "-n", "2", "--greedy", "--ignore-eos", "--show-prompt"])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_model_is_told_to_think_or_not(capsys, thinking):
    shut = "assistant\n<think>\n\n</think>\n\n"
    assert shut not in told(capsys, thinking, "-p", "Hi", "-q")[2]
    assert shut not in told(capsys, thinking, "-p", "Hi", "-q", "--think")[2]
    assert shut in told(capsys, thinking, "-p", "Hi", "-q", "--no-think")[2]


def test_an_answer_begins_with_given_words(capsys, monkeypatch, thinking):
    code, out, err = told(capsys, thinking, "-p", "Hi", "-q", "--prefill-response", "Sure: ")
    assert code == 0
    assert err.endswith("<|im_start|>assistant\nSure: \n")
    assert out.startswith("Sure: ")
    lines = iter(["Hi", "And?", "/bye"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    code, talked, err = told(capsys, thinking, "-i", "-q", "--prefill-response", "Sure: ")
    answer = talked.splitlines()[0]
    assert answer == out.removesuffix("\n").splitlines()[0]
    assert err.count("<|im_start|>assistant\nSure: ") == 3, "it is remembered with these words"


@pytest.mark.parametrize(("flags", "message"), [
    (["--think", "-p", "x"], "this model cannot be told to think, or not to\n  its chat template never asks"),
    (["--prefill-response", "So", "-p", "x"], "this model cannot talk"),
    (["--raw", "--no-think", "-p", "x"], "--raw goes with none of"),
    (["--raw", "--prefill-response", "So", "-p", "x"], "--raw goes with none of"),
])  # fmt: skip
def test_a_base_model_does_not_think(capsys, fairytales, flags, message):
    code, out, err = told(capsys, str(fairytales), *flags)
    assert (code, out) == (2, "")
    assert message in err
