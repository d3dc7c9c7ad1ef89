"""`miniawq generate` with flags, files, streams and limits that make no sense: three lines and an exit code."""

import json
import os
import subprocess
import sys

import pytest

from miniawq.commands.interactive import converse
from miniawq.generate import main
from tests.helpers import tiny_checkpoints, tiny_tokenizers

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{{ self_name }}"


@pytest.fixture
def chat_model(tmp_path):
    """A directory that a test may damage: random weights, a chat template."""
    directory = tmp_path / "chat"
    directory.mkdir()
    tiny_checkpoints.make_dense(directory, vocab_size=420, num_hidden_layers=1, max_position_embeddings=128)
    tokenizer_config = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": CHATML}
    return tiny_tokenizers.write(directory, tiny_tokenizers.byte_level(), tokenizer_config=tokenizer_config)


def told(capsys, *flags):
    """Exit code, and stderr in lines; text on stdout is for 0 alone."""
    try:
        code = main([str(flag) for flag in flags])
    except SystemExit as left:
        code = left.code
    out, err = capsys.readouterr()
    assert (out == "") == (code != 0)
    assert "Traceback" not in err
    assert len(err) < 5000
    return code, err.splitlines()


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--seed", -1], 2),
        (["--seed", 2**64], 2),
        (["--seed", 10**30], 2),
        (["--seed", 2**64 - 1, "--num-samples", 2], 0),
        (["--max-seq-len", 0], 2),
        (["--max-seq-len", 10**30], 2),
        (["-n", -2], 2),
        (["-n", "9" * 5000], 2),
        (["-n", "nan"], 2),
        (["--num-samples", -1], 2),
        (["--temperature", "nan"], 1),
        (["--temperature", "inf"], 1),
        (["--temperature", "-1"], 1),
        (["--temperature", "1e-320"], 0),
        (["--top-p", "nan"], 1),
        (["--top-k", -1], 1),
        (["--top-k", 10**30], 0),
        (["--min-p", 2], 1),
        (["--repetition-penalty", 0], 1),
        (["--repetition-penalty", "1e300"], 1),
        (["--presence-penalty", "nan"], 1),
        (["--frequency-penalty=-inf"], 1),
        (["--device", ""], 2),
        (["--device", "cpu:99999999999999999999"], 2),
        (["--device", "cuda:-1"], 2),
        (["--stop", ""], 0),
        (["--chat-template-kwargs", "[[1, 2]]"], 2),
        (["--chat-template-kwargs", '{"a":' * 5000 + "1" + "}" * 5000], 2),
        (["--chat-template-kwargs", "[" * 99999], 2),
        (["-p", "half \ud800"], 1),
        (["--file", os.devnull], 0),
        (["--file", "."], 5),
        (["--file", "nul\0byte"], 5),
        (["--messages", "nul\0byte"], 5),
    ],
)
def test_flags_that_make_no_sense(capsys, flags, code):
    flags = [*flags, "-n", 1] if "-n" not in flags else flags
    found, lines = told(capsys, *flags)
    assert found == code
    if code in (1, 5):
        assert 2 <= len(lines) <= 3


@pytest.mark.parametrize(
    "messages",
    [
        "[" * 99999,
        '[{"role": ' * 5000,
        '{"messages": ' + "[" * 400 + "]" * 400 + "}",
        '[{"role": "user", "content": ' + "[" * 900 + "]" * 900 + "}]",
        '{"messages": "text"}',
        '{"messages": {}}',
        '{"messages": null}',
        '{"messages": [null]}',
        '{"messages": [[["role", "user"]]]}',
        '{"messages": [{"role": "user"}], "tools": "text"}',
        '{"messages": [{"role": "user"}], "tools": [1]}',
        "null",
        "NaN",
        "[]",
        "",
    ],
)
def test_messages_that_make_no_sense(capsys, tmp_path, chat_model, messages):
    (tmp_path / "messages.json").write_text(messages)
    code, lines = told(capsys, chat_model, "--messages", tmp_path / "messages.json", "-n", 1, "-q")
    assert code == 1 or "content" in messages
    assert len(lines) <= 3


def test_template_variables_may_have_any_name(capsys, chat_model):
    variables = json.dumps({"self": 1, "": 2, "a b": 3, "loop": [], "self_name": "named", "template": 5})
    code, lines = told(
        capsys, chat_model, "-p", "x", "--chat-template-kwargs", variables, "-n", 1, "--show-prompt", "-q"
    )
    assert (code, lines[-1]) == (0, "named")


def test_a_prompt_without_tokens_is_refused_in_three_lines(capsys, chat_model):
    code, lines = told(capsys, chat_model, "-p", "", "--raw", "-n", 1, "--json")
    assert (code, lines[0]) == (1, "miniawq generate: the prompt has no tokens")
    assert len(lines) == 3


def test_words_of_a_checkpoint_reach_no_terminal_as_they_are(capsys, chat_model):
    """Errors, notices and --show-prompt; text on stdout is the model's, and stays."""
    hostile = "\x1b]0;title\x07\u202e\nminiawq generate: all is well"
    config = json.loads((chat_model / "tokenizer_config.json").read_text())
    for template in ("{{ raise_exception(" + json.dumps(hostile) + ") }}", "{{ " + json.dumps(hostile) + " | nope }}"):
        (chat_model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        code, lines = told(capsys, chat_model, "-p", "x", "-n", 1)
        assert code in (2, 3)
        assert len(lines) <= 3
        assert not {"\x1b", "\x07", "\u202e"} & set("".join(lines))
    (chat_model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": hostile}))
    code, lines = told(capsys, chat_model, "-p", "x", "-n", 1, "--show-prompt", "-q")
    assert code == 0
    assert lines == [r"\x1b]0;title\x07\u202e", "miniawq generate: all is well"]


class Echo:
    begins_in_thought = False

    def fit(self, messages):
        return messages

    def answer(self, messages):
        return iter([messages[-1]["content"].upper()])


def test_a_conversation_without_stdin_or_in_another_encoding_goes_on(capsys, monkeypatch):
    lines = iter([UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), "hello", RuntimeError("lost sys.stdin")])

    def read(_):
        line = next(lines)
        if isinstance(line, Exception):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", None)
    converse(Echo())
    out, err = capsys.readouterr()
    assert out == "HELLO\n"
    assert "this line is not UTF-8" in err


# Imports once; a child for each limit, in MiB, whose exit code and words on stderr are printed.
LIMITED = """
import json, os, resource, sys, tempfile, traceback, psutil
from miniawq import generate

def limited(mebibytes):
    limit = psutil.Process().memory_info().vms + (mebibytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        return generate.main(["-p", "Once", "-n", "4"])
    except BaseException:
        traceback.print_exc()
        return 1

for mebibytes in map(int, sys.argv[1:]):
    with tempfile.TemporaryFile("w+") as told:
        child = os.fork()
        if not child:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(told.fileno(), 2)
            os._exit(limited(mebibytes))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        told.seek(0)
        print(json.dumps([mebibytes, code, told.read()]), flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit of the address space")
@pytest.mark.thorough
def test_too_little_memory_is_told():
    """As under `ulimit -v`, wherever the memory ends."""
    limits = [0, 1, 4, 10, 20, 200]
    command = [sys.executable, "-c", LIMITED, *map(str, limits)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "RUST_BACKTRACE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [mebibytes for mebibytes, *_ in found] == limits
    for mebibytes, code, told in found:
        assert code in ((4,) if mebibytes < 4 else (0, 4)), told
        assert "Traceback" not in told
        if code:
            assert len(told.splitlines()) == 3, told
