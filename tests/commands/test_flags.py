"""One table of flags: --help, --help-all and docs/generate.md say the same, and a screen holds the first."""

import argparse
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import threading

import pytest
import torch

from miniawq.__main__ import VERBS, main
from miniawq.cli import COMMON
from miniawq.commands import prompts
from miniawq.commands.flags import build_parser
from miniawq.commands.telling import write_pieces
from miniawq.engine.batch import Batch
from miniawq.engine.completion import Piece
from miniawq.engine.sampling import Sampling
from miniawq.generate import load
from miniawq.generate import main as generate
from miniawq.hardware import DeviceMemory
from tests.helpers import ROOT
from tests.helpers.chat_models import make_chat_model

PAGE = ROOT / "docs" / "generate.md"


def row(action):
    """A flag as the page has it: its names, what it takes, what it means."""
    value = f" {action.metavar or action.dest.upper()}" if action.nargs != 0 and action.option_strings else ""
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar}`"
    return f"| {names}{value} | {action.help.removesuffix(' (default: %(default)s)')} |"


def rows_of_parser():
    return [row(action) for action in build_parser()._actions]


def test_the_page_has_every_flag_as_the_parser_has_it():
    told = [line for line in PAGE.read_text().splitlines() if line.startswith(("| `-", "| `MODEL"))]
    assert told == rows_of_parser()


def helped(capsys, flag):
    with pytest.raises(SystemExit) as left:
        generate([flag])
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_a_screen_and_shows_three_examples(capsys, verb):
    build = importlib.import_module(VERBS[verb].module).build_parser
    lines = build().format_help().splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    examples = [line.strip() for line in lines if line.startswith(f"  miniawq {verb} ")]
    assert examples == list(build().examples)
    assert len(examples) == 3
    for example in examples:
        build().parse_args(shlex.split(example)[2:])
    assert (ROOT / build().page).is_file()
    assert build().page in lines[-1]


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_every_flag_that_is_essential_or_not_common(verb):
    parser = importlib.import_module(VERBS[verb].module).build_parser()
    shown = " ".join(parser.format_help().split())
    wanted = set(parser.essential) or {action.dest for action in parser._actions} - COMMON
    told = {action.dest for action in parser._actions if " ".join(str(action.help).split()) in shown}
    assert wanted <= told
    assert not told & COMMON


def test_the_whole_help_has_every_flag(capsys):
    shown = helped(capsys, "--help-all")
    for action in build_parser()._actions:
        assert all(name in shown for name in action.option_strings)
        assert action.help is not argparse.SUPPRESS


@pytest.mark.parametrize(("verb", "typed", "meant"), [
    ("generate", "--temprature", "--temperature"), ("generate", "--max-new-token=5", "--max-new-tokens"),
    ("generate", "--promts", "--prompts"), ("plan", "--max-seqlen", "--max-seq-len"),
    ("quantize", "--group-sise", "--group-size"), ("evaluate", "--txt", "--text"), ("convert", "--fromat", "--format"),
])  # fmt: skip
def test_a_mistyped_flag_is_told_which_one_is_meant(capsys, verb, typed, meant):
    needed = {
        "quantize": ["a", "b", "--calib", "c"],
        "convert": ["a", "b", "--format", "awq"],
        "evaluate": ["a", "--text", "t"],
    }
    with pytest.raises(SystemExit) as left:
        main([verb, *needed.get(verb, []), typed])
    assert left.value.code == 2
    assert f"did you mean {meant}?" in capsys.readouterr().err


def test_a_flag_that_is_like_no_other_is_just_unknown(capsys):
    with pytest.raises(SystemExit):
        generate(["--xyzzy"])
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_a_mistyped_verb_is_told_which_one_is_meant(capsys, verb):
    assert main([verb[:-1] + "x"]) == 2
    assert f"did you mean {verb!r}?" in capsys.readouterr().err


def test_devices_are_listed(capsys, monkeypatch):
    memory = {"cpu": ("cpu", 8 << 30, 6 << 30), "cuda": ("cuda:1 (NVIDIA H200)", 140 << 30, 139 << 30)}
    monkeypatch.setattr("miniawq.commands.flags.devices", lambda: [torch.device("cuda", 1), torch.device("cpu")])
    monkeypatch.setattr("miniawq.commands.flags.device_memory", lambda device: DeviceMemory(*memory[device.type]))
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["generate", "no-such-model", "--list-devices"])
    told = ["cuda:1 (NVIDIA H200): 139.00 GiB of 140.00 GiB are free", "cpu: 6.00 GiB of 8.00 GiB are free"]
    assert capsys.readouterr().out.splitlines() == told


def test_keys_of_generation_config_that_are_not_known_are_told(caplog):
    with caplog.at_level("INFO", "miniawq"):
        Sampling.choose({"do_sample": True, "temperature": 0.5, "num_beams": 1, "eos_token_id": [1], "typical_p": None})
        assert not caplog.text
        Sampling.choose({"no_repeat_ngram_size": 3, "num_beams": 4, "temperature": 0.5})
    assert "generation_config.json: no_repeat_ngram_size, num_beams: not used here" in caplog.text


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return make_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def piped(chat_model, monkeypatch, capsys):
    """Exit code and stderr of the command line with something in the pipe that is its stdin."""

    def run_piped(given, *flags):
        reading, writing = os.pipe()
        with open(writing, "w") as pipe:
            pipe.write(given)
        with open(reading) as pipe:
            monkeypatch.setattr(sys, "stdin", pipe)
            code = generate([chat_model, *flags, "-n", "2", "--greedy", "--show-prompt", "-q"])
        return code, capsys.readouterr().err

    return run_piped


def test_text_file_and_pipe_follow_each_other(piped, tmp_path):
    file = tmp_path / "file.txt"
    file.write_text("file")
    for flags, given, prompt in [
        ((), "pipe", "pipe"), (("-p", "text"), "pipe", "text\n\npipe"), (("-p", "text"), "", "text"),
        (("-p", "text", "--file", str(file)), "pipe", "text\n\nfile\n\npipe"), (("--file", str(file)), "", "file"),
        (("-p", "-"), "pipe", "pipe"),
    ]:  # fmt: skip
        code, told = piped(given, *flags)
        assert code == 0, told
        assert f"user\n{prompt}<|im_end|>" in told
    code, told = piped("")
    assert code == 2
    assert "there is no prompt\n  the pipe was empty" in told


def test_a_pipe_and_a_file_are_read_and_nothing_else_is(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("text")
    reading, writing = os.pipe()
    with open(reading) as pipe, open(tmp_path / "file") as file, open(os.devnull) as nothing:
        for stream, is_read in ((pipe, True), (file, True), (nothing, False), (None, False)):
            monkeypatch.setattr(sys, "stdin", stream)
            assert prompts.is_piped() == is_read
    os.close(writing)


def test_a_pipe_that_stays_open_is_told(monkeypatch):
    said = threading.Event()
    monkeypatch.setattr(prompts, "PATIENCE", 0.0)
    monkeypatch.setattr(prompts.log, "info", lambda *_: said.set())
    monkeypatch.setattr(prompts, "read_text", lambda _: "text" if said.wait(60) else "not told")
    assert prompts.read_stdin() == "text"


@pytest.mark.thorough
@pytest.mark.parametrize("flags", [["--json"], ["--output-format", "jsonl"], ["--prompts", "-"]])
def test_another_program_reads_what_comes_through_a_pipe(flags, fairytales):
    """As `miniawq ... | jq` does; nothing but JSON is on stdout, whatever is said meanwhile."""
    reader = "import json, sys; print(sum('text' in json.loads(line) for line in sys.stdin))"
    given, prompt = ("Once\nThere\n", []) if "--prompts" in flags else (None, ["-p", "Once"])
    words = [sys.executable, "-m", "miniawq.generate", str(fairytales), *prompt, *flags, "-n", "5", "--greedy"]
    command = f"{shlex.join(words)} | {shlex.join([sys.executable, '-c', reader])}"
    options = {"input": given} if given else {"stdin": subprocess.DEVNULL}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120, check=True, **options)
    assert int(done.stdout) == {"--json": 1, "--prompts": 2}.get(flags[0], 5)
    assert "tokens-per-sec" in done.stderr


def run(capsys, *flags):
    code = generate([str(flag) for flag in flags])
    out, err = capsys.readouterr()
    return code, out, err


def test_json_lines_come_piece_by_piece(capsys, fairytales):
    flags = [fairytales, "-p", "Once upon a time", "-n", 9, "--greedy", "-q"]
    whole = json.loads(run(capsys, *flags, "--json")[1])
    *pieces, end = [json.loads(line) for line in run(capsys, *flags, "--output-format", "jsonl")[1].splitlines()]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert [token for piece in pieces for token in piece["tokens"]] == whole["tokens"]
    assert len(pieces) > 5
    assert end.keys() == whole.keys() - {"text", "tokens"}
    assert end["finish_reason"] == "length"


def written(monkeypatch, *flags):
    """What is written to stdout, one text for each time that it is flushed."""
    out, texts = io.StringIO(), []

    def flush():
        texts.append(out.getvalue()[sum(map(len, texts)) :])

    out.flush = flush
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert generate([*flags, "-n", "9", "--greedy", "-q"]) == 0
    return [text for text in texts if text]


@pytest.mark.parametrize("prompt", [["-p", "Once upon a time"], []])
def test_a_text_is_written_as_it_comes_or_at_once(monkeypatch, prompt):
    pieces = written(monkeypatch, *prompt)
    assert len(pieces) > 5
    assert written(monkeypatch, *prompt, "--stream") == pieces
    assert written(monkeypatch, *prompt, "--no-stream") == ["".join(pieces)]


@pytest.mark.parametrize(("last", "told"), [([0], [{"text": "", "tokens": [0]}]), ([], [])])
def test_ids_without_a_text_are_told_too(capsys, last, told):
    class Ended:
        def pieces(self):
            yield Piece("word", [5, 6, 2], [], None)
            yield Piece("", last, [], "stop")

    write_pieces(Ended(), None)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found == [{"text": "word", "tokens": [5, 6, 2]}, *told]


def test_samples_are_those_of_their_seeds_and_in_their_order(capsys, monkeypatch, chat_model):
    flags = [chat_model, "-p", "Once", "-n", 9, "--temperature", 2, "-q"]
    together = run(capsys, *flags, "--num-samples", 3, "--seed", 7)[1]
    assert together == "\n".join(run(capsys, *flags, "--seed", seed)[1] for seed in (7, 8, 9))
    endings = Batch.__iter__
    with monkeypatch.context() as patch:
        patch.setattr(Batch, "__iter__", lambda batch: reversed(list(endings(batch))))
        assert run(capsys, *flags, "--num-samples", 3, "--seed", 7)[1] == together
    _code, out, err = run(capsys, *flags[:-1], "--num-samples", 2, "--seed", 7, "--json")
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["seed"] for record in records] == [7, 8]
    assert len(re.findall(r"Generation: \d+ tokens, [1-9][\d.]* tokens-per-sec", err)) == 2


def test_log_probabilities_are_those_of_the_model(capsys, chat_model):
    flags = [chat_model, "--raw", "-p", "Once upon", "-n", 4, "--temperature", 1.5, "--seed", 1, "-q"]
    code, out, _ = run(capsys, *flags, "--logprobs", 3, "--json")
    record = json.loads(out)
    assert code == 0
    assert record["text"] == json.loads(run(capsys, *flags, "--json")[1])["text"]
    model, tokenizer = load(chat_model, device="cpu")
    ids = [*tokenizer.encode("Once upon"), *record["tokens"]]
    with torch.no_grad():
        logprobs_LV = model(torch.tensor([ids]))[0].log_softmax(-1)[-len(record["tokens"]) - 1 :]
    assert [place["token"] for place in record["logprobs"]] == record["tokens"]
    for place, logprobs_V in zip(record["logprobs"], logprobs_LV, strict=False):
        assert place["logprob"] == pytest.approx(float(logprobs_V[place["token"]]), abs=1e-4)
        best, ids = logprobs_V.topk(3)
        assert [top["token"] for top in place["top"]] == ids.tolist()
        assert [top["logprob"] for top in place["top"]] == pytest.approx(best.tolist(), abs=1e-4)
        assert place["text"] == tokenizer.decode([place["token"]], False)
    *pieces, end = run(capsys, *flags, "--logprobs", 3, "--output-format", "jsonl")[1].splitlines()
    assert [place for piece in pieces for place in json.loads(piece)["logprobs"]] == record["logprobs"]
    assert "logprobs" not in json.loads(end)


@pytest.mark.parametrize(("flags", "message"), [
    (["--logprobs", "3"], "--logprobs is for JSON"), (["--json", "--logprobs", "-1"], "--logprobs -1 is out of range"),
    (["-p", "a", "--messages", "f"], "--prompt or --file and --messages do not go together"),
    (["-i", "--no-stream"], "--no-stream is for plain texts"),
    (["--prompts", "f", "--no-stream"], "--no-stream is for plain texts"),
    (["--output-format", "jsonl", "--no-stream"], "--no-stream is for plain texts"),
    (["-i", "--prompts", "f"], "--prompts and --interactive do not go together"),
])  # fmt: skip
def test_flags_that_do_not_go_together(capsys, flags, message):
    code, _, err = run(capsys, *flags)
    assert code == 2
    assert message in err
