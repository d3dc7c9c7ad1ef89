"""What is kept of a compiled step: found again, given up when damaged, no reason to fail; and the text meanwhile."""

import copy
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from miniawq.checkpoint.loading import load_model
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.compiled import WORKSHOP, artifacts
from miniawq.engine.sampling import Sampling
from miniawq.engine.start import EagerStart
from miniawq.engine.step import DecodeStep
from miniawq.generate import generate
from tests.helpers import MODELS

LLAMA = MODELS / "llama"

NEW = 6
# A process that compiles: whether its ids are those of the model alone, how many functions were traced, and what
# Inductor says of its cache.
PROGRAM = f"""
import json, logging, sys
import torch
from miniawq.checkpoint.loading import load_model
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.engine.start import EagerStart
from miniawq.generate import generate
from miniawq.engine.step import DecodeStep
logging.basicConfig(level=logging.INFO, format="%(message)s")
model = load_model(open_checkpoint({str(LLAMA)!r}), sys.argv[1], torch.float32)
tokens_BL = torch.arange(1, 8, device=sys.argv[1])[None]
expected = list(generate(model, tokens_BL, max_tokens={NEW}))
decoder = EagerStart(model, DecodeStep(model, 1, 32))
found = []
for _ in range(2):
    found.append(list(generate(model, tokens_BL, max_tokens={NEW}, decoder=decoder)))
    decoder.wait()
counters = torch._dynamo.utils.counters
traced, misses = counters["stats"]["unique_graphs"], counters["inductor"]["fxgraph_cache_miss"]
print(json.dumps([found == [expected] * 2, decoder.ahead, decoder.compiled.is_ready, traced, misses]))
"""


@pytest.fixture
def model(device):
    return load_model(open_checkpoint(LLAMA), device, torch.float32)


@pytest.fixture
def step(model):
    return DecodeStep(model, 1, 32)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache directory of this test's own."""
    monkeypatch.setenv("MINIAWQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(artifacts.INDUCTOR_DIRECTORY, "unset again below")
    monkeypatch.delenv(artifacts.INDUCTOR_DIRECTORY)
    return tmp_path / "cache" / "compiled"


def process(device, **environment):
    """What PROGRAM prints, and its notices."""
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"} | environment
    environment.pop("TRITON_CACHE_DIR", None)  # Inductor sets it, if another test has compiled here
    command = [sys.executable, "-c", PROGRAM, str(device)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout), done.stderr


def files_of(directory):
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


def seal(step, directory):
    """A sealed directory of one file."""
    directory.mkdir(parents=True)
    (directory / "object").write_text("code")
    artifacts._seal(directory, step.described())


@pytest.mark.parametrize("damage", [
    lambda directory: (directory / "object").write_text("cold"),
    lambda directory: (directory / "object").unlink(),
    lambda directory: (directory / artifacts.SEAL).write_text("{"),
    lambda directory: (directory / artifacts.SEAL).write_text("[]"),
    lambda directory: (directory / artifacts.SEAL).write_text('{"decides": {}, "files": {}}'),
])  # fmt: skip
def test_what_is_damaged_or_anothers_is_given_up_with_a_notice(damage, step, caplog):
    directory = artifacts.directory_of(step.described())
    seal(step, directory)
    assert artifacts.are_here(step.described())
    damage(directory)
    assert not artifacts.are_here(step.described())
    assert "is damaged and made again" in caplog.text
    assert not list(directory.parent.iterdir())
    caplog.clear()
    assert not artifacts.are_here(step.described())
    assert not caplog.text


def test_what_decides_is_in_the_name(model, step, monkeypatch):
    def name(step):
        return artifacts.directory_of(step.described())

    names = {name(step), name(DecodeStep(model, 2, 32)), name(DecodeStep(copy.deepcopy(model).bfloat16(), 1, 32))}
    names.add(name(DecodeStep(copy.deepcopy(model).float(), 1, 32)))
    monkeypatch.setattr(torch, "__version__", "3.0")
    names.add(name(step))
    monkeypatch.setattr(artifacts, "SOURCES", LLAMA)
    names.add(name(step))
    assert len(names) == 6
    assert name(DecodeStep(model, 1, 64)) in names, "the length of the cache decides nothing"


def test_the_directory_is_the_users(monkeypatch):
    monkeypatch.delenv("MINIAWQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert artifacts.cache_directory() == Path("/xdg/miniawq")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert artifacts.cache_directory() == Path.home() / ".cache" / "miniawq"
    monkeypatch.setenv("MINIAWQ_CACHE", "~/here")
    assert artifacts.cache_directory() == Path.home() / "here"


def test_inductors_own_directory_is_left_alone_if_the_user_names_it(step, cache, monkeypatch):
    monkeypatch.setenv(artifacts.INDUCTOR_DIRECTORY, "/users")
    with artifacts.kept(step.described()):
        assert os.environ[artifacts.INDUCTOR_DIRECTORY] == "/users"
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_a_notice(step, cache, caplog):
    cache.parent.mkdir()
    cache.write_text("no directory")
    with artifacts.kept(step.described()):
        pass
    assert "what is compiled is not kept" in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="needs owners and modes")
@pytest.mark.parametrize("open_to_others", ["directory", "parent"])
def test_code_is_never_read_from_where_others_may_write(open_to_others, step, cache, caplog):
    """What is kept is run by the next process."""
    directory = artifacts.directory_of(step.described())
    seal(step, directory)
    assert artifacts.are_here(step.described())
    (directory if open_to_others == "directory" else cache).chmod(0o777)
    assert not artifacts.are_here(step.described())
    with artifacts.kept(step.described()) as kept:
        assert kept is None
    assert "can be written to by others" in caplog.text


def test_another_owners_directory_is_left_alone(step, cache, monkeypatch):
    seal(step, artifacts.directory_of(step.described()))
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert not artifacts.are_here(step.described())


def test_a_new_directory_is_private_and_the_environment_is_as_before(step):
    with artifacts.kept(step.described()) as directory:
        assert os.environ[artifacts.INDUCTOR_DIRECTORY] == str(directory)
        assert directory.stat().st_mode & 0o777 == 0o700
    assert artifacts.INDUCTOR_DIRECTORY not in os.environ


def test_old_directories_are_removed(step, cache, monkeypatch):
    monkeypatch.setattr(artifacts, "MOST_DIRECTORIES", 3)
    for number in range(4):
        seal(step, cache / f"young-{number}")
        os.utime(cache / f"young-{number}" / artifacts.SEAL, (time.time() - number,) * 2)
    seal(step, cache / "old")
    os.utime(cache / "old" / artifacts.SEAL, (time.time() - artifacts.OLDEST_SECONDS - 9,) * 2)
    (cache / "unsealed").mkdir()
    with artifacts.kept(step.described()) as directory:
        (directory / "object").write_text("code")
    names = {path.name for path in cache.iterdir()}
    assert names == {directory.name, "young-0", "young-1", "unsealed"}


def compiling(monkeypatch, act):
    """Compile nothing, but `act` in the thread that would."""

    def compile_(step, directory):
        act()
        step._choose_products(lambda form: True)
        step.is_ready = True

    monkeypatch.setattr(DecodeStep, "compile", compile_)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=2.0, repetition_penalty=1.3)])
def test_the_text_is_the_same_wherever_the_compiled_step_takes_over(sampling, model, monkeypatch, device):
    if sampling.temperature and device.type == "cuda":
        pytest.skip("a recorded step may draw other random numbers")
    tokens_BL, padding_B = torch.arange(1, 15, device=device).view(2, 7), torch.tensor([0, 3], device=device)
    options = {"max_tokens": NEW, "sampling": sampling, "seed": 3, "padding_B": padding_B}
    expected = list(generate(model, tokens_BL, **options))
    for ahead in range(1, NEW - 1):
        event = threading.Event()
        compiling(monkeypatch, event.wait)
        decoder = EagerStart(model, DecodeStep(model, 2, 7 + NEW, sampling))
        found = []
        for ids in generate(model, tokens_BL, decoder=decoder, **options):
            found.append(ids)
            if decoder.ahead == ahead and not event.is_set():
                event.set()
                decoder.wait()
        assert found == expected
        assert decoder.ahead == ahead
        assert list(generate(model, tokens_BL, decoder=decoder, **options)) == expected
        assert decoder.ahead == 0


def test_the_first_token_waits_for_nothing_and_products_meanwhile_are_not_compiled(model, monkeypatch, device):
    event, allowed = threading.Event(), []
    compiling(monkeypatch, lambda: (event.wait(), allowed.append(WORKSHOP.may_compile)))
    decoder = EagerStart(model, DecodeStep(model, 1, 32))
    ids = generate(model, torch.arange(1, 8, device=device)[None], max_tokens=NEW, decoder=decoder)
    next(ids)
    assert decoder._thread.ident is None
    assert not WORKSHOP.may_compile
    next(ids)
    assert decoder.is_compiling
    assert not WORKSHOP.may_compile
    event.set()
    decoder.wait()
    assert allowed == [True]
    assert WORKSHOP.may_compile


def test_a_text_that_must_be_the_same_again_waits(model, monkeypatch, device):
    compiling(monkeypatch, lambda: None)
    decoder = EagerStart(model, DecodeStep(model, 1, 32), streams=False)
    list(generate(model, torch.arange(1, 8, device=device)[None], max_tokens=NEW, decoder=decoder))
    assert decoder.ahead == 0


def test_kept_artifacts_are_waited_for(model, monkeypatch, device):
    compiling(monkeypatch, lambda: None)
    monkeypatch.setattr("miniawq.engine.start.are_here", lambda _: True)
    decoder = EagerStart(model, DecodeStep(model, 1, 32))
    list(generate(model, torch.arange(1, 8, device=device)[None], max_tokens=NEW, decoder=decoder))
    assert decoder.ahead == 0


def test_a_compiler_that_fails_is_a_notice(model, monkeypatch, cache, caplog, device):
    def fail():
        (cache / "x").mkdir(parents=True)
        raise RuntimeError("there is no g++\nand more")

    compiling(monkeypatch, fail)
    tokens_BL = torch.arange(1, 8, device=device)[None]
    expected = list(generate(model, tokens_BL, max_tokens=NEW))
    decoder = EagerStart(model, DecodeStep(model, 1, 32))
    assert list(generate(model, tokens_BL, max_tokens=NEW, decoder=decoder)) == expected
    decoder.wait()
    assert list(generate(model, tokens_BL, max_tokens=NEW, decoder=decoder)) == expected
    assert "cannot be compiled, and stays slow: there is no g++" in caplog.text
    assert caplog.text.count("stays slow") == 1
    assert WORKSHOP.may_compile


@pytest.mark.compiles
def test_a_second_process_finds_what_the_first_has_compiled(cache, device):
    (right, _, ready, traced, misses), notices = process(device)
    assert (right, ready) == (True, True)
    assert traced >= 4
    assert "compiling, this once" in notices
    (directory,) = cache.iterdir()
    objects = [path for path in directory.rglob("*") if path.suffix in (".so", ".cubin")]
    made = files_of(directory)
    assert objects
    (right, ahead, ready, traced, misses), notices = process(device)
    assert (right, ahead, ready, misses) == (True, 0, True, 0)
    assert traced == 0 or device.type == "cuda"
    assert "loading the compiled step" in notices
    again = files_of(directory)
    # A hit of Inductor's may still call the C++ compiler: no object may be newer.
    assert {path: again[path] for path in objects} == {path: made[path] for path in objects}
    assert again.keys() == made.keys()
