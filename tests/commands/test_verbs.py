"""What holds for every verb: how it is found, its Hub flags and devices, and how its errors are told."""

import importlib
import logging
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from miniawq import cli
from miniawq.__main__ import VERBS, main
from miniawq.checkpoint.hub import hub_options
from miniawq.commands import about
from miniawq.errors import MiniawqError, clean
from tests.helpers import ROOT
from tests.helpers import tiny_checkpoints as tiny
from tests.helpers.verbs import ARGUMENTS, command


def module_of(verb: str):
    return importlib.import_module(VERBS[verb].module)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_has_a_parser_and_a_main(verb):
    assert module_of(verb).build_parser().prog == f"miniawq {verb}"
    assert callable(module_of(verb).main)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("module", ["miniawq", "miniawq.generate", "miniawq.quantize", "miniawq.oracle"])
def test_modules_that_python_runs(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--version"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module(module, run_name="__main__")
    assert not left.value.code
    assert capsys.readouterr().out.startswith("miniawq ")


def test_the_version_tells_torch_device_and_compiler(capsys, monkeypatch):
    monkeypatch.setenv("CXX", sys.executable)
    assert main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["miniawq", "Python", "torch", "device", "compiler"]
    assert torch.__version__ in lines[2]
    assert lines[4].endswith(sys.executable)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not [path for path in about.compilers() if "Triton" not in path]


def test_a_missing_extra_is_told_in_three_lines():
    program = (
        "import sys; sys.modules['hypothesis'] = None; from miniawq.__main__ import main; sys.exit(main(['oracle']))"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 5
    assert run.stderr.splitlines() == [
        "miniawq oracle: the oracle needs hypothesis",
        "  it is not installed",
        "  pip install 'miniawq[oracle]'",
    ]


def test_ctrl_c_while_torch_is_loaded_is_told_in_one_line(monkeypatch, capsys):
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    assert main(["generate"]) == 130
    assert capsys.readouterr().err == "miniawq generate: interrupted\n"


def test_chat_is_short_for_a_conversation(capsys, monkeypatch):
    taken = []
    monkeypatch.setattr("miniawq.generate.main", lambda arguments: taken.append(arguments) or 0)
    assert main(["chat", "some-model", "-q"]) == 0
    assert taken == [["--interactive", "some-model", "-q"]]
    assert main(["--help"]) == 0
    assert "  chat       generate --interactive\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "meant"), [("quantise", "quantize"), ("generat", "generate"), ("pln", "plan"), ("chatt", "chat")]
)
def test_a_mistyped_verb_is_answered_with_the_nearest(typed, meant, capsys):
    assert main([typed]) == 2
    assert f"there is no verb {typed!r}\n  did you mean {meant!r}?\n" in capsys.readouterr().err


def test_a_word_like_no_verb_is_answered_with_the_list(capsys):
    assert main(["xyzzy"]) == 2
    told = capsys.readouterr().err
    assert "did you mean" not in told
    assert all(verb in told for verb in VERBS)


@pytest.mark.parametrize("offline", ["--local-files-only", "--offline"])
@pytest.mark.parametrize("verb", ARGUMENTS)
def test_hub_flags_are_the_same_everywhere(verb, offline, tmp_path):
    _, *words = command(verb, "owner/name", tmp_path)
    flags = ["--revision", "v1", "--token", "secret", "--cache-dir", "cache", offline]
    found = hub_options(module_of(verb).build_parser().parse_args([*words, *flags]))
    assert found == {"revision": "v1", "token": "secret", "cache_dir": "cache", "local_files_only": True}


@pytest.mark.parametrize("device", ["warp", "cuda:99", "meta"])
@pytest.mark.parametrize("verb", ARGUMENTS)
def test_an_unknown_device_is_a_usage_error(verb, device, fairytales, tmp_path, capsys):
    model = tiny.make(tmp_path / "int4")[0] if verb == "convert" else fairytales
    assert main(command(verb, model, tmp_path, "--device", device)) == 2
    what, why, fix = capsys.readouterr().err.splitlines()
    assert what == f"miniawq {verb}: device {device!r} cannot be used"
    assert re.match(r"  \S", why)
    assert re.match(r"  give cpu", fix)
    assert not (tmp_path / "out").exists()


FULL = {
    "a GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nand more"),
    "Python": MemoryError(),
    "the system": OSError(12, "Cannot allocate memory"),
    "a thread": RuntimeError("can't start new thread"),
    "C++": RuntimeError("std::bad_alloc"),
    "the host": RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
}


@pytest.mark.parametrize("full", FULL)
@pytest.mark.parametrize("verb", ARGUMENTS)
def test_full_memory_is_told_in_three_lines(verb, full, fairytales, tmp_path, monkeypatch, capsys):
    def open_checkpoint(*_: object, **__: object) -> None:
        raise FULL[full]

    monkeypatch.setattr(module_of(verb), "open_checkpoint", open_checkpoint)
    assert main(command(verb, fairytales, tmp_path)) == 4
    what, why, fix = capsys.readouterr().err.splitlines()
    assert what == f"miniawq {verb}: the memory of the device is full"
    assert why.strip() == str(FULL[full]).partition("\n")[0] or "Python" in why
    assert fix.strip() == "ask for less, or end what else uses the device"


@pytest.mark.parametrize("verb", ARGUMENTS)
def test_a_process_needs_room_to_begin(verb, fairytales, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "LEAST_BYTES", 1 << 60)
    assert main(command(verb, fairytales, tmp_path)) == 4
    what, why, fix = capsys.readouterr().err.splitlines()
    assert what == f"miniawq {verb}: there is not enough memory to begin"
    assert "Cannot allocate memory" in why
    assert "ulimit" in fix


def test_a_bug_keeps_its_traceback(capsys):
    def body(_: object) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        cli.run(body, cli.parser("test", ""), [])
    assert capsys.readouterr().err == ""


def test_debug_adds_the_traceback(tmp_path, capsys):
    argv = [str(tmp_path / "nowhere")]
    assert main(["plan", *argv]) == 5
    assert "Traceback" not in capsys.readouterr().err
    assert main(["plan", *argv, "--debug"]) == 5
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert "miniawq plan: there is no directory" in told


@pytest.mark.parametrize("verb", ARGUMENTS)
def test_a_tied_head_of_another_shape_is_refused(verb, tmp_path, capsys):
    if verb == "convert":
        directory, _ = tiny.make(tmp_path / "model", family="llama-tied")
    else:
        directory, _ = tiny.make_dense(tmp_path / "model", "llama-tied")
    file = directory / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.ones(40, 128)}, file)
    assert main(command(verb, directory, tmp_path)) == 3
    assert "lm_head.weight [40, 128] for [48, 128]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


HOSTILE = "\x1b[2J\x07\r\x9b\u202e\u2066\u061c\u2028\x00\ud800\U000e0041"


def test_words_of_strangers_are_cleaned():
    assert clean(f"a{HOSTILE}b\tc\nd") == (
        r"a\x1b[2J\x07\r\x9b\u202e\u2066\u061c\u2028\x00\ud800\U000e0041b" + "\tc\nd"
    )
    assert clean("Há \u05d0 \N{PARTY POPPER}\u200d") == "Há \u05d0 \N{PARTY POPPER}\u200d"
    long = clean("a" * 10**7 + "\x1b" * 999)
    assert len(long) <= 2000
    assert long.startswith("aaa")
    assert long.endswith(r"\x1b")


def test_an_error_is_three_short_clean_lines():
    told = str(MiniawqError("what\nfake" + HOSTILE, "why" * 10**6, "fix\n\n"))
    assert len(told.split("\n")) == 3
    assert len(told) <= 2000
    assert clean(told) == told


def test_errors_notices_and_usage_are_written_clean(capsys, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])

    def body(_: object) -> None:
        logging.getLogger("miniawq.test").warning("notice %s", HOSTILE + "x" * 10**5)
        raise MiniawqError(HOSTILE, HOSTILE)

    assert cli.run(body, cli.parser("test", ""), []) == 1
    with pytest.raises(SystemExit) as left:
        cli.run(body, cli.parser("test", ""), ["--no" + HOSTILE + "x" * 10**5])
    assert left.value.code == 2
    told = capsys.readouterr().err
    assert not set(HOSTILE) & set(told) - set("[2J")
    assert len(told) < 5000


def test_a_quiet_run_leaves_the_logger_as_it_was():
    log = logging.getLogger("miniawq")
    before = log.level
    assert cli.run(lambda _: log.setLevel(logging.ERROR), cli.parser("test", ""), []) == 0
    assert log.level == before


def test_a_panic_of_a_library_is_told(capsys):
    class PanicException(BaseException):
        """What pyo3 raises."""

    def body(_: object) -> None:
        raise PanicException("index out of bounds")

    assert cli.run(body, cli.parser("test", ""), []) == 1
    assert capsys.readouterr().err.startswith("miniawq test: a library has failed\n  index out of bounds\n")


posix = pytest.mark.skipif(os.name != "posix", reason="needs a shell")
PYTHON = f"OMP_NUM_THREADS=1 {sys.executable} -m miniawq"
BODY = f"""{sys.executable} -c '
import sys
from miniawq import cli
from miniawq.errors import UnsupportedCheckpoint
def body(_):
    print("text")
    sys.stdin.read()
    cli.say("said")
    if sys.argv[1:] == ["fail"]:
        raise UnsupportedCheckpoint("damaged")
sys.exit(cli.run(body, cli.parser("test", ""), []))' """


def shell(line: str) -> tuple[int, str, str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    options = {"stdin": subprocess.DEVNULL, "env": env, "timeout": 60}
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, **options)
    return done.returncode, done.stdout, done.stderr


def thorough(*case: object) -> object:
    return pytest.param(*case, marks=pytest.mark.thorough)


@posix
@pytest.mark.parametrize(
    ("line", "code", "out", "err"),
    [
        thorough(BODY + "fail <&- >&- 2>&-", 3, "", ""),
        thorough(BODY + ">&-", 0, "", "said\n"),
        thorough(BODY + "2>&-", 0, "text\n", ""),
        thorough(BODY + "<&-", 0, "text\n", "said\n"),
        thorough(BODY + "fail 2>&-", 3, "text\n", ""),
        thorough(BODY + "fail 2>/dev/full", 3, "text\n", ""),
        thorough(BODY + "2>/dev/full", 0, "text\n", ""),
        thorough(BODY + "fail 2> >(true)", 3, "text\n", ""),
        thorough(BODY + "> >(true)", 0, "", "said\n"),
        thorough(BODY + "fail >/dev/full", 3, "", "said\nminiawq test: damaged\n"),
        (BODY + ">/dev/full", 1, "", r"said\nminiawq test: the system cannot read or wri.*\n.*No space left.*\n.*\n"),
    ],
)  # fmt: skip
def test_closed_and_full_streams(line, code, out, err):
    """The exit code is that of the work; what cannot be said is not said elsewhere."""
    if "/dev/full" in line and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    found = shell(line)
    assert found[:2] == (code, out)
    assert re.fullmatch(err, found[2])


@posix
@pytest.mark.parametrize(("line", "code"), [("2>&-", 2), ("no-such-verb 2>&-", 2), thorough("plan --no-such 2>&-", 2)])
def test_usage_is_never_on_stdout(line, code):
    assert shell(f"{PYTHON} {line}") == (code, "", "")
