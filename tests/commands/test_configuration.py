"""`--show-config`: what is told is what runs, and where it is from."""

import json
import re
from pathlib import Path

import pytest

from miniawq.commands import plan
from miniawq.generate import main
from tests.helpers.chat_models import make_chat_model

SAMPLES = {"do_sample": True, "temperature": 0.7, "top_k": 20}


@pytest.fixture
def chat_model(tmp_path):
    return make_chat_model(tmp_path / "chat")


def shown(capsys, *flags):
    """The lines on stderr, and the text."""
    assert main([str(flag) for flag in (*flags, "-n", 3, "-q", "--show-config")]) == 0
    out, err = capsys.readouterr()
    return err.splitlines(), out


def settings(lines):
    """Where each of the settings is from, in lines that stand below each other."""
    start = next(place for place, line in enumerate(lines) if line.startswith("sampling"))
    stop = next(place for place, line in enumerate(lines) if line.startswith("ends"))
    told = [re.fullmatch(r"(.{10})(\w+ \S+) {3,}(\S+)", line) for line in lines[start:stop]]
    assert len({line.start(3) for line in told}) == 1
    return {line[2]: line[3] for line in told}


@pytest.mark.parametrize(("stated", "flags", "expected"), [
    (SAMPLES, ["--top-p", 0.9, "--seed", 7], {
        "temperature 0.7": "generation_config.json", "top_k 20": "generation_config.json", "top_p 0.9": "flag",
        "seed 7": "flag",
    }),
    (SAMPLES, ["--top-k", 20, "--greedy", "--seed", 7], {
        "temperature 0": "flag", "top_k 20": "flag", "seed 7": "flag",
    }),
    # Without do_sample the file asks for nothing; who asks for a filter asks for sampling.
    ({"temperature": 0.7}, ["--top-k", 4, "--seed", 7], {
        "temperature 1": "default", "top_k 4": "flag", "seed 7": "flag",
    }),
    ({}, ["--seed", 7], {"temperature 0": "default", "seed 7": "flag"}),
])  # fmt: skip
def test_each_setting_that_is_on_is_told_with_where_it_is_from(capsys, chat_model, stated, flags, expected):
    (Path(chat_model) / "generation_config.json").write_text(json.dumps(stated))
    assert settings(shown(capsys, chat_model, "-p", "Hi", *flags)[0]) == expected


def test_the_seed_that_is_told_gives_the_text(capsys, chat_model):
    flags = [chat_model, "-p", "Hi", "--temperature", 2]
    lines, text = shown(capsys, *flags)
    ((seed, source),) = [(told, source) for told, source in settings(lines).items() if told.startswith("seed")]
    assert source == "random"
    assert shown(capsys, *flags, "--seed", seed.split()[1])[1] == text
    assert settings(shown(capsys)[0])["seed 0"] == "default"


@pytest.mark.parametrize(("flags", "rows"), [([], 1), (["--num-samples", 2], 2)])
def test_the_model_and_its_memory_are_told_as_the_plan_tells_them(capsys, flags, rows):
    lines, _ = shown(capsys, "-p", "Once", "--device", "cpu", "--kv-dtype", "fp8", "--memory-margin", "3MiB", *flags)
    (positions,) = [int(re.search(r"\d x (\d+) tokens", line)[1]) for line in lines if line.startswith("kv cache")]
    asked = ["--device", "cpu", "--dtype", "float32", "--kv-dtype", "fp8", "--memory-margin", "3MiB"]
    assert plan.main([*asked, "--batch", str(rows), "--max-seq-len", str(positions)]) == 0
    planned = capsys.readouterr().out.splitlines()
    count = next(place for place, line in enumerate(planned) if line.startswith("total"))
    assert lines[:count] == planned[:count]
    assert lines[count].split()[:3] == planned[count].split()[:3]
    assert lines[count + 1 : count + 3] == ["computes  in float32", "context   at most 512 tokens; the model's own 512"]


@pytest.mark.parametrize(("flags", "expected"), [
    ([], '1 "</s>", 3 "<|im_end|>"'), (["--raw"], '1 "</s>"'),
    (["--raw", "--stop", "a\nb", "--extra-eos-token", "0"], '0 "<s>", 1 "</s>", "a\\nb"'),
    (["--ignore-eos"], "with the context or --max-tokens alone"),
])  # fmt: skip
def test_what_ends_an_answer_is_told(capsys, chat_model, flags, expected):
    """A chat template's end of turn too, which this checkpoint does not name."""
    config = Path(chat_model) / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token": "</s>"}))
    assert shown(capsys, chat_model, "-p", "Hi", *flags)[0][-1] == f"ends      {expected}"


def test_the_text_is_that_without_the_flag(capsys, chat_model):
    assert main([chat_model, "-p", "Hi", "-n", "3", "-q", "--greedy"]) == 0
    text = capsys.readouterr().out
    assert shown(capsys, chat_model, "-p", "Hi", "--greedy")[1] == text


def test_a_conversation_and_many_prompts_tell_it_before_they_begin(capsys, monkeypatch, chat_model, tmp_path):
    (tmp_path / "prompts").write_text("Hi\nAnd?\n")
    monkeypatch.setattr("builtins.input", lambda prompt: "/bye")
    lines, _ = shown(capsys, chat_model, "-i")
    assert lines[0] == f"model     {chat_model}"
    assert lines[-1].startswith("/help lists the commands")
    lines, _ = shown(capsys, chat_model, "--prompts", tmp_path / "prompts")
    assert any(line.startswith("kv cache") and " 2 x " in line for line in lines)
