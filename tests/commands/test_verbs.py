"""What holds for every verb: how it is found, its Hub flags and devices, and how its errors are told."""

import importlib
import re
import runpy
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from miniawq import cli
from miniawq.__main__ import VERBS, main
from miniawq.checkpoint.hub import hub_options
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


@pytest.mark.parametrize(("typed", "meant"), [("quantise", "quantize"), ("generat", "generate"), ("pln", "plan")])
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
    assert "miniawq plan" in fix


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
