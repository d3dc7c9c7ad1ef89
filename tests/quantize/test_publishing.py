"""Nothing is lost, and nothing unfinished or wrong is ever under the final name: kills, full disks, changed files."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from miniawq.checkpoint import publishing
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.checkpoint.publishing import LOCK, UNFINISHED
from miniawq.checkpoint.shards import ShardWriter
from miniawq.commands.convert import convert_checkpoint
from miniawq.errors import InvalidInput, MiniawqError, UsageError
from miniawq.quantize import __main__ as command_line
from miniawq.quantize import job as job_file
from miniawq.quantize import journal, memory, report
from miniawq.quantize.calibration import Calibration, read_calibration, sample_calibration
from miniawq.quantize.job import Quantizer, Settings, quantize_checkpoint
from miniawq.quantize.recipes import DEFAULT, NEIGHBOURS, PAPER, PLAIN_ROUNDING
from miniawq.quantize.report import finite
from miniawq.text.tokenizer import Tokenizer
from tests.helpers.marks import thorough_but
from tests.helpers.quantizing import Killed, contents, killed, make_source, some_text
from tests.helpers.tiny_checkpoints import make, make_dense

SETTINGS = Settings(replace(PLAIN_ROUNDING, group_size=64), shard_bytes=40_000)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw_report", lambda path, blocks: None)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return make_source(tmp_path / "dense", vocab_size=256)


@pytest.fixture
def text() -> Calibration:
    return some_text()


def opens(directory: Path) -> bool:
    try:
        open_checkpoint(directory)
    except MiniawqError:
        return False
    return True


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a source, `dense`, and half of what was to be made of it, `out`."""
    directory = tmp_path_factory.mktemp("stopped")
    half_done(make_source(directory / "dense", vocab_size=256), directory / "out", some_text())
    return directory


def half_done(dense: Path, out: Path, text: Calibration, tensors: int = 40, settings: Settings = SETTINGS) -> None:
    with killed(lambda writer, _: writer.done == tensors):
        quantize_checkpoint(dense, out, text, settings)


# Published last.


def test_nothing_opens_before_it_is_verified(dense, text, tmp_path, monkeypatch):
    verify, seen = job_file.verify, []

    def watched(source: Any, written: Any, *rest: Any) -> Any:
        assert not opens(tmp_path / "out")
        assert {path.name for path in (tmp_path / "out").iterdir()} == {UNFINISHED, LOCK, journal.NAME}
        seen.append(written.directory)
        return verify(source, written, *rest)

    monkeypatch.setattr(job_file, "verify", watched)
    quantize_checkpoint(dense, tmp_path / "out", text, SETTINGS)
    assert seen == [tmp_path / "out" / UNFINISHED], "what is published is what was verified"
    assert opens(tmp_path / "out")
    assert not {UNFINISHED, LOCK, journal.NAME} & {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("seen", [True, False], ids=["another time", "the same time"])
def test_a_source_replaced_during_the_run_is_not_published(seen, dense, text, tmp_path, monkeypatch):
    process = Quantizer.process

    def replacing(job: Quantizer, layer: int, hidden_BLD: torch.Tensor) -> Any:
        made = process(job, layer, hidden_BLD)
        if layer == 1:
            file = dense / "model.safetensors"
            time = file.stat().st_mtime_ns
            tensors = {name: tensor + 0.5 for name, tensor in load_file(file).items()}
            save_file(tensors, file, metadata={"format": "pt"})
            os.utime(file, ns=(time, time + seen * 10**9))
        return made

    monkeypatch.setattr(Quantizer, "process", replacing)
    with pytest.raises(MiniawqError) as caught:
        quantize_checkpoint(dense, tmp_path / "out", text, SETTINGS)
    assert str(caught.value).count("\n") == 2
    assert not opens(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors*"))


@pytest.mark.parametrize("codes", thorough_but(["nearest"], ["nearest", "neighbours"]))
@pytest.mark.parametrize("place", [-1, -100])
def test_a_finished_shard_damaged_before_resuming_is_not_published(place, codes, dense, text, tmp_path):
    """The last bytes of the first shard are the embedding's, of which no bound of quantization knows anything."""
    settings = replace(SETTINGS, recipe=replace(SETTINGS.recipe, codes=codes))
    half_done(dense, tmp_path / "out", text, settings=settings)
    for shard in (tmp_path / "out" / UNFINISHED).glob("*.safetensors"):
        content = bytearray(shard.read_bytes())
        content[place] ^= 1
        shard.write_bytes(content)
    with pytest.raises(MiniawqError, match="does not hold the bytes that were written"):
        quantize_checkpoint(dense, tmp_path / "out", text, settings)
    assert not opens(tmp_path / "out")


def die_at_move(monkeypatch: pytest.MonkeyPatch, out: Path, into: Path, number: int) -> list[str]:
    """Let the run die at this move of a file between `out` and its unfinished part; returns the files moved."""
    plain_replace, moved = os.replace, []

    def dying_replace(source: Path, target: Path) -> None:
        if {Path(source).parent, Path(target).parent} == {out, out / UNFINISHED} and Path(target).parent == into:
            if len(moved) == number:
                raise Killed
            moved.append(Path(target).name)
        plain_replace(source, target)

    monkeypatch.setattr(os, "replace", dying_replace)
    return moved


@pytest.mark.thorough
def test_a_kill_while_publishing_leaves_nothing_half(dense, text, tmp_path):
    out, number = tmp_path / "out", 0
    quantize_checkpoint(dense, tmp_path / "whole" / "out", text, SETTINGS)
    whole = contents(tmp_path / "whole" / "out")
    while number < len(whole):
        with pytest.MonkeyPatch.context() as patch:
            moved = die_at_move(patch, out, out, number)
            with pytest.raises(Killed):
                quantize_checkpoint(dense, out, text, SETTINGS)
        assert len(moved) == number
        assert not (out / "config.json").exists()
        number += 5 if number < len(whole) - 6 else 1
    quantize_checkpoint(dense, out, text, SETTINGS)
    assert contents(out) == whole


def test_a_kill_after_publishing_is_cleaned_up(dense, text, tmp_path, monkeypatch):
    """The next run takes the files back, config.json first, and verifies and publishes them again."""
    out = tmp_path / "out"
    monkeypatch.setattr(journal.Journal, "remove", lambda _: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        quantize_checkpoint(dense, out, text, SETTINGS)
    monkeypatch.undo()
    assert opens(out)
    die_at_move(monkeypatch, out, out / UNFINISHED, 1)
    with pytest.raises(Killed):
        quantize_checkpoint(dense, out, text, SETTINGS)
    monkeypatch.undo()
    assert not (out / "config.json").exists()
    quantize_checkpoint(dense, out, text, SETTINGS)
    assert not (out / journal.NAME).exists()
    assert opens(out)


@pytest.fixture
def sigint() -> Iterator[None]:
    """Python's own handler, which a process that was started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("stage", thorough_but(["publish"], ["embed", "process", "verify", "write_report", "publish"]))
def test_ctrl_c_at_any_stage_can_go_on(stage, sigint, dense, text, tmp_path, monkeypatch):
    quantize_checkpoint(dense, tmp_path / "whole" / "out", text, SETTINGS)
    methods = {"embed": "checkpoint.blocks.BlockStream.embed", "process": "quantize.job.Quantizer.process"}

    def interrupted(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(f"miniawq.{methods.get(stage, f'quantize.job.{stage}')}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(dense, tmp_path / "out", text, SETTINGS)
    monkeypatch.undo()
    assert not opens(tmp_path / "out")
    quantize_checkpoint(dense, tmp_path / "out", text, SETTINGS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")


# Side files.


def test_a_tokenizer_replaced_during_the_run_is_not_taken(dense, text, tmp_path, monkeypatch):
    """The copy is made before the first block."""
    before, process = (dense / "tokenizer.json").read_bytes(), Quantizer.process

    def replacing(job: Quantizer, layer: int, hidden_BLD: torch.Tensor) -> Any:
        (dense / "tokenizer.json").write_text("{}")
        return process(job, layer, hidden_BLD)

    monkeypatch.setattr(Quantizer, "process", replacing)
    quantize_checkpoint(dense, tmp_path / "out", text, SETTINGS)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == before
    Tokenizer(tmp_path / "out")


@pytest.mark.parametrize("verb", ["quantize", "convert"])
def test_a_tokenizer_replaced_while_it_is_copied_is_not_published(verb, dense, text, tmp_path, monkeypatch):
    place = "miniawq.quantize.job" if verb == "quantize" else "miniawq.commands.convert"
    source = dense
    if verb == "convert":
        source, _ = make(tmp_path / "int4")
        (source / "tokenizer.json").write_bytes((dense / "tokenizer.json").read_bytes())
    copy = job_file.copy_side_files

    def replacing(*arguments: Any) -> None:
        (source / "tokenizer.json").write_text("{}")
        copy(*arguments)

    monkeypatch.setattr(f"{place}.copy_side_files", replacing)
    run = {
        "quantize": lambda: quantize_checkpoint(source, tmp_path / "out", text, SETTINGS),
        "convert": lambda: convert_checkpoint(source, tmp_path / "out", "dense"),
    }
    with pytest.raises(MiniawqError, match="changed during the run"):
        run[verb]()
    assert not opens(tmp_path / "out")


def test_a_run_does_not_go_on_with_another_tokenizer(dense, text, tmp_path):
    half_done(dense, tmp_path / "out", text)
    (dense / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UsageError, match="file tokenizer_config"):
        quantize_checkpoint(dense, tmp_path / "out", text, SETTINGS)


# Destinations.


@pytest.mark.parametrize(
    "kind", ["file", "dangling link", "link in a circle", "below a file", "name too long", "no name", "no disk", "deep"]
)
def test_a_destination_that_cannot_be(kind, dense, text, tmp_path):
    out = tmp_path / "out"
    if kind in ("file", "below a file"):
        out.write_text("mine")
    elif kind == "dangling link":
        out.symlink_to(tmp_path / "nowhere")
    elif kind == "link in a circle":
        out.symlink_to(out)
    others = {
        "below a file": out / "deep",
        "name too long": tmp_path / ("x" * 300),
        "no name": "",
        "no disk": "/proc/out",
        "deep": tmp_path / "made first" / ("x" * 300) / "out",
    }
    given = others.get(kind, out)
    source, _ = make(tmp_path / "int4")
    before = sorted(tmp_path.iterdir())
    for run in (
        lambda: quantize_checkpoint(dense, given, text, SETTINGS),
        lambda: convert_checkpoint(source, given, "dense"),
    ):
        with pytest.raises(MiniawqError) as caught:
            run()
        assert str(caught.value).count("\n") == 2
    assert sorted(tmp_path.iterdir()) == before


def test_a_link_to_an_empty_directory_is_filled(dense, text, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    quantize_checkpoint(dense, tmp_path / "out", text, SETTINGS)
    assert opens(tmp_path / "disk")
    assert (tmp_path / "out").is_symlink()


def test_a_destination_that_is_taken_away_is_not_made_anew(dense, text, tmp_path, monkeypatch):
    """Half a journal in a new directory would stand in the way of the next run."""
    process = Quantizer.process

    def taking(job: Quantizer, layer: int, hidden_BLD: torch.Tensor) -> Any:
        if layer == 1:
            os.rename(tmp_path / "out", tmp_path / "elsewhere")
        return process(job, layer, hidden_BLD)

    monkeypatch.setattr(Quantizer, "process", taking)
    with pytest.raises(MiniawqError, match="cannot write"):  # each tensor begins a file
        quantize_checkpoint(dense, tmp_path / "out", text, replace(SETTINGS, shard_bytes=1))
    assert not (tmp_path / "out").exists()


def test_a_way_through_a_directory_that_is_not_there(dense, text, tmp_path):
    source, _ = make(tmp_path / "int4")
    quantize_checkpoint(dense, tmp_path / "no" / ".." / "quantized", text, SETTINGS)
    convert_checkpoint(source, tmp_path / "none" / ".." / "converted" / "out", "dense")
    assert opens(tmp_path / "quantized")
    assert opens(tmp_path / "converted" / "out")


def test_quantize_beside_convert(dense, text, tmp_path, monkeypatch):
    """One of the two gets the name; what it has written is untouched by the other."""
    source, _ = make(tmp_path / "int4")
    process = Quantizer.process

    def with_a_conversion(job: Quantizer, layer: int, hidden_BLD: torch.Tensor) -> Any:
        with pytest.raises(UsageError, match="exists"):
            convert_checkpoint(source, tmp_path / "out", "dense")
        return process(job, layer, hidden_BLD)

    monkeypatch.setattr(Quantizer, "process", with_a_conversion)
    quantize_checkpoint(dense, tmp_path / "out", text, SETTINGS)
    assert len(open_checkpoint(tmp_path / "out").quantized) == 14
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "int4", "out"}


def test_a_conversion_that_ends_in_the_moment_quantize_begins(dense, text, tmp_path, monkeypatch):
    source, _ = make(tmp_path / "int4")
    monkeypatch.setattr(publishing, "_refuse_existing", lambda destination: None)
    (tmp_path / "out").mkdir()
    with publishing.locked(tmp_path / "out"):
        with pytest.raises(UsageError, match="exists"):
            convert_checkpoint(source, tmp_path / "out", "dense")
        assert not opens(tmp_path / "out")


def failing(monkeypatch: pytest.MonkeyPatch, name: str, number: int, code: int) -> list[int]:
    """Let the call of this number of a function of `os` fail; returns the list of calls."""
    plain, calls = getattr(os, name), []

    def call(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == number + 1:
            raise OSError(code, os.strerror(code))
        return plain(*arguments, **keywords)

    monkeypatch.setattr(os, name, call)
    return calls


def error_of(work: Callable[[], object]) -> MiniawqError | None:
    try:
        work()
    except MiniawqError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        ("truncate", errno.EROFS, "cannot write"),
        pytest.param("fsync", errno.ENOSPC, "disk is full", marks=pytest.mark.thorough),
        pytest.param("fsync", errno.EIO, "cannot write", marks=pytest.mark.thorough),
        pytest.param("replace", errno.EDQUOT, "disk is full", marks=pytest.mark.thorough),
        pytest.param("replace", errno.EROFS, "cannot write", marks=pytest.mark.thorough),
        pytest.param("mkdir", errno.EACCES, "cannot write", marks=pytest.mark.thorough),
        pytest.param("mkdir", errno.EROFS, "cannot write", marks=pytest.mark.thorough),
    ],
)
def test_a_disk_that_fails_at_any_write_loses_nothing(name, code, told, dense, text, tmp_path):
    quantize_checkpoint(dense, tmp_path / "whole" / "out", text, SETTINGS)
    whole, number = contents(tmp_path / "whole" / "out"), 0
    while True:
        out = tmp_path / str(number) / "out"
        with pytest.MonkeyPatch.context() as patch:
            calls = failing(patch, name, number, code)
            error = error_of(lambda: quantize_checkpoint(dense, out, text, SETTINGS))  # noqa: B023
        if error is None:
            assert len(calls) <= number or name == "mkdir", "the error was swallowed"
            break
        assert told in str(error)
        assert str(error).count("\n") == 2
        assert not opens(out) or {path.name for path in out.iterdir()} > whole.keys() - {"report"}
        quantize_checkpoint(dense, out, text, SETTINGS)
        assert contents(out) == whole
        shutil.rmtree(out)
        number += 1 + number // 8  # every early call, and some of the later ones
    assert number > 0


def test_bytes_that_a_full_disk_refuses_at_the_end_do_not_hide_the_error(tmp_path):
    """/dev/full takes bytes into the buffer, and refuses them when it is flushed, and again when the file is closed."""
    (tmp_path / "model.safetensors.partial").symlink_to("/dev/full")

    def write() -> None:
        with ShardWriter(tmp_path, [("a", torch.float32, (10,))]) as writer:
            writer.write("a", torch.zeros(10))

    with pytest.raises(MiniawqError, match="disk is full"):
        write()


def test_a_read_only_disk_is_not_called_full(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 0}))

    def read_only(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(MiniawqError, match="Read-only"):
        publishing.check_disk(tmp_path / "out", 1000)


@pytest.mark.parametrize("refusal", ["disk", "memory", "offload", "vocabulary", "context"])
def test_a_refusal_leaves_nothing_behind(refusal, dense, text, tmp_path, monkeypatch):
    offload = None
    if refusal == "disk":
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    elif refusal == "memory":
        monkeypatch.setattr(job_file, "hidden_states", lambda *_: (_ for _ in ()).throw(MiniawqError("can't allocate")))
    elif refusal == "offload":
        offload = tmp_path / "dense" / "config.json"
    elif refusal == "vocabulary":
        text = replace(text, tokens_BL=text.tokens_BL + 255)
    else:
        text = replace(text, tokens_BL=torch.ones(1, 65, dtype=torch.int64))
    with pytest.raises(MiniawqError):
        quantize_checkpoint(dense, tmp_path / "deep" / "out", text, SETTINGS, offload_directory=offload)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_an_offload_directory_that_is_full(tmp_path, monkeypatch):
    failing(monkeypatch, "posix_fallocate", 0, errno.ENOSPC)
    with pytest.raises(MiniawqError, match="disk is full"):
        memory.hidden_states((2, 3, 4), torch.device("cpu"), tmp_path / "hidden")
    assert list((tmp_path / "hidden").iterdir()) == []


# Journals.


def altered(content: bytes, change: str) -> bytes:
    first, *blocks = content.splitlines(keepends=True)
    record = json.loads(blocks[0])
    changes: dict[str, Callable[[], list[bytes]]] = {
        "twice": lambda: [first, blocks[0], blocks[0]],
        "missing": lambda: [first, *blocks[1:]] if len(blocks) > 1 else [first, b"{}\n"],
        "binary": lambda: [first, b"\xff\x00\xfe\n"],
        "a list": lambda: [first, b"[1]\n"],
        "deep": lambda: [first, b"[" * 100_000 + b"\n"],
        "null": lambda: [first, b"null\n"],
        "empty line": lambda: [first, b"\n", *blocks],
        "no journal": lambda: [b"\x7fELF" * 100],
        "first line a number": lambda: [b"3\n", *blocks],
    }
    if change in changes:
        return b"".join(changes[change]())
    key, value = json.loads(change)
    return first + json.dumps(record | {key: value}).encode() + b"\n"


@pytest.mark.parametrize(
    "change",
    ["twice", "missing", "binary", "a list", "deep", "null", "empty line", "no journal", "first line a number"]
    + [
        json.dumps(pair)
        for pair in [
            ("layer", "0"), ("layer", 7), ("layer", None), ("tensors", 3), ("tensors", "x"), ("tensors", -1),
            ("tensors", None), ("scales", "AAAA"), ("scales", "%%%"), ("scales", 3), ("scales", None), ("folds", 1),
            ("layers", None), ("layers", {"a": 1}), ("layers", {"a": {"loss": "x"}}), ("digests", None),
            ("digests", {}), ("digests", [1]), ("scales", ""), ("seconds", "1"),
            ("published", 3), ("published", [".."]), ("published", [journal.NAME]), ("published", ["a/b", ""]),
        ]
    ],
)  # fmt: skip
def test_garbage_in_the_journal_is_refused_by_its_line(change, stopped, text, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(stopped / "out", out)
    file = out / journal.NAME
    file.write_bytes(altered(file.read_bytes(), change))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=r"quantization_journal\.jsonl, line \d+, cannot be used") as caught:
        quantize_checkpoint(stopped / "dense", out, text, SETTINGS)
    assert str(caught.value).count("\n") == 2
    assert len(str(caught.value)) < 1000
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("kind", ["directory", "fifo", "link"])
def test_a_journal_that_is_no_file_is_refused(kind, dense, text, tmp_path):
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / journal.NAME
    {"directory": path.mkdir, "fifo": lambda: os.mkfifo(path), "link": lambda: path.symlink_to("/dev/zero")}[kind]()
    with pytest.raises(UsageError, match="no ordinary file"):
        quantize_checkpoint(dense, tmp_path / "out", text, SETTINGS)
    assert path.is_symlink() or path.exists()


def test_half_a_first_line_is_a_new_run(dense, text, tmp_path):
    half_done(dense, tmp_path / "out", text, 0)
    shutil.rmtree(tmp_path / "out" / UNFINISHED)
    file = tmp_path / "out" / journal.NAME
    file.write_bytes(file.read_bytes()[:100])
    quantize_checkpoint(dense, tmp_path / "out", text, SETTINGS)
    assert opens(tmp_path / "out")


def test_an_unfinished_run_of_an_older_kind_is_left_alone(dense, text, tmp_path):
    half_done(dense, tmp_path / "out", text)
    file = tmp_path / "out" / journal.NAME
    first, rest = file.read_bytes().split(b"\n", 1)
    older = {key: value for key, value in json.loads(first).items() if key != "journal"}
    file.write_bytes(json.dumps(older).encode() + b"\n" + rest)
    (tmp_path / "out" / "model-00001-of-00009.safetensors").write_text("shard")
    before = sorted((tmp_path / "out").rglob("*"))
    with pytest.raises(UsageError, match="journal was None and is 2"):
        quantize_checkpoint(dense, tmp_path / "out", text, SETTINGS)
    assert sorted((tmp_path / "out").rglob("*")) == before


# Reports.


def test_a_card_that_is_not_unicode_costs_no_run(dense, text, tmp_path):
    (dense / "README.md").write_bytes(b"---\nlicense: mit\n---\n\xff\xfe")
    quantize_checkpoint(dense, tmp_path / "out", text, SETTINGS)
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\nlicense: mit\n")


@pytest.mark.parametrize("zeros", ["norm", "embed_tokens", "proj"])
@pytest.mark.parametrize(
    "recipe", thorough_but([DEFAULT, PLAIN_ROUNDING], [DEFAULT, PAPER, PLAIN_ROUNDING, NEIGHBOURS])
)
def test_a_model_of_zeros_is_quantized_and_reported(zeros, recipe, text, tmp_path):
    source, _ = make_dense(tmp_path / "dense", num_hidden_layers=1)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if zeros in name:
            tensor.zero_()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    made = quantize_checkpoint(source, tmp_path / "out", text, Settings(replace(recipe, group_size=64)))
    assert ("nothing was searched" in made.summary()) == (recipe == PLAIN_ROUNDING)
    assert recipe == PLAIN_ROUNDING or "no loss" in made.summary() or "of the layers' loss" in made.summary()
    json.loads((tmp_path / "out" / "quantization_report.json").read_text(), parse_constant=pytest.fail)


def test_memory_of_another_device_is_told_beside_that_of_the_host(dense, text, tmp_path):
    made = quantize_checkpoint(dense, tmp_path / "out", text, SETTINGS)
    assert made.peak_device_bytes is None
    host = replace(made, seconds=2.0, peak_memory_bytes=3 << 29)
    assert host.summary().endswith("\n2.0 s, 1.50 GiB of memory at most")
    both = replace(host, peak_device_bytes=5 << 30)
    assert both.summary().endswith("\n2.0 s, 1.50 GiB of memory, 5.00 GiB of the device's at most")


def test_a_report_holds_no_numbers_that_are_not_json():
    assert finite({"a": [1.5, float("nan"), (float("inf"), "NaN")]}) == {"a": [1.5, None, [None, "NaN"]]}


def test_a_picture_that_fails_costs_no_run(dense, text, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw_report", lambda path, blocks: path.write_text(str(1 / 0)))
    quantize_checkpoint(dense, tmp_path / "out", text, SETTINGS)
    assert opens(tmp_path / "out")
    assert not (tmp_path / "out" / "quantization_report.png").exists()


# Flags.

HUGE = str(10**40)


@pytest.mark.parametrize("flag", ["--num-samples", "--sequence-length", "--compared-tokens", "--group-size"])
@pytest.mark.parametrize("value", ["0", "-3", "nan", "1.5", "", "²", HUGE])
def test_counts_that_make_no_sense(flag, value, capsys):
    with pytest.raises(SystemExit) as caught:
        command_line.build_parser().parse_args(["a", "b", f"{flag}={value}"])
    assert caught.value.code == 2
    assert len(capsys.readouterr().err) < 3000


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "-inf", "1e-12", "1e300", "x", "", HUGE])
def test_shards_of_no_size(value):
    with pytest.raises(SystemExit):
        command_line.build_parser().parse_args(["a", "b", f"--shard-gigabytes={value}"])


@pytest.mark.parametrize("value", ["-1", str(1 << 32), str(1 << 64), HUGE, "x", "1.0"])
def test_seeds_that_a_cpu_would_cut(value):
    with pytest.raises(SystemExit):
        command_line.build_parser().parse_args(["a", "b", f"--seed={value}"])
    assert command_line.build_parser().parse_args(["a", "b", "--seed", str((1 << 32) - 1)]).seed == (1 << 32) - 1


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--sequence-length", "513"], "longer than the model's context"),
        (["--num-samples", "1000000000"], "not enough memory"),
        (["--device", "gpu"], "cannot be used"),
        (["--group-size", "1000000000"], "no layer"),
    ],
)
def test_refusals_before_any_text_is_written(flags, told, fairytales, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command_line, "load_model", lambda *_: pytest.fail("the model was loaded"))
    assert command_line.main([str(fairytales), str(tmp_path / "out"), "--device", "cpu", *flags]) != 0
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["other files", "another run", "no directory", "full disk"])
def test_a_destination_is_refused_before_any_text_is_written(kind, fairytales, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command_line, "load_model", lambda *_: pytest.fail("the model was loaded"))
    out = tmp_path / "out"
    run = [str(fairytales), str(out), "--device", "cpu"]
    with ExitStack() as stack:
        if kind == "other files":
            out.mkdir()
            (out / "mine").touch()
        elif kind == "another run":
            stack.enter_context(publishing.locked(out))
        elif kind == "no directory":
            out.touch()
        else:
            monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        before = sorted(tmp_path.rglob("*"))
        assert command_line.main(run) != 0
        assert sorted(tmp_path.rglob("*")) == before
    told = {"other files": "not empty", "another run": "another run", "no directory": "no directory"}
    assert told.get(kind, "of disk") in capsys.readouterr().err


def test_a_run_with_text_of_the_models_own_goes_on(fairytales, tmp_path, caplog):
    run = [str(fairytales), str(tmp_path / "my out"), "--device", "cpu", "--recipe", "plain"]
    run += ["--num-samples", "2", "--sequence-length", "8"]
    with killed(lambda writer, _: writer.done == 40):
        command_line.main(run)
    assert command_line.main(run) == 0
    destination = f"'{tmp_path}/my out'"
    assert f"try it: miniawq generate {destination} --prompt TEXT" in caplog.text


@pytest.mark.parametrize("kind", ["directory", "fifo", "device", "binary", "empty", "huge"])
def test_calibration_files_that_are_no_text(kind, fairytales, tmp_path, monkeypatch):
    monkeypatch.setattr("miniawq.text.plain.MAX_TEXT_BYTES", 1 << 20)
    path = tmp_path / "text.txt"
    made: dict[str, Callable[[], object]] = {
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "binary": lambda: path.write_bytes(b"\xff\xfe\x00"),
        "empty": path.touch,
        "huge": lambda: (path.touch(), os.truncate(path, 2 << 20)),
    }
    made[kind]()
    with pytest.raises(MiniawqError):
        read_calibration(str(path), Tokenizer(fairytales), 2, 8)
    with pytest.raises(MiniawqError):
        read_calibration("x" * 300, Tokenizer(fairytales), 2, 8)


def test_lines_that_are_deep_or_hold_separators_of_lines(fairytales, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "The king\u2028had sons\x85"}\r\n' + "[" * 100_000)
    with pytest.raises(InvalidInput, match="line 2 is not JSON"):
        read_calibration(str(path), Tokenizer(fairytales), 1, 8)
    path.write_text('{"text": "half of a pair: \\ud800"}\n')
    with pytest.raises(MiniawqError):
        read_calibration(str(path), Tokenizer(fairytales), 1, 8)


def test_a_model_that_cannot_write_its_own_text(fairytales):
    class Broken:
        config = open_checkpoint(fairytales).model_config
        device, dtype = torch.device("cpu"), torch.float32

        def last_logits(self, tokens_BL: torch.Tensor, cache: object) -> torch.Tensor:
            return torch.full((len(tokens_BL), self.config.vocab_size), torch.nan)

    with pytest.raises(InvalidInput, match="cannot write calibration text"):
        sample_calibration(Broken(), Tokenizer(fairytales), 1, 8)
