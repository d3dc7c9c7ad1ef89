"""Shards: valid safetensors files, the same bytes after any interruption, complete under their names or not there."""

import errno
import json
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from miniawq.checkpoint import publishing
from miniawq.checkpoint.publishing import LOCK, locked, published
from miniawq.checkpoint.shards import DTYPE_NAMES, ShardWriter, Spec, plan_shards, write_bytes
from miniawq.errors import InvalidInput, MiniawqError, UsageError
from tests.helpers import ROOT

SHARD_BYTES = 300


def some_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (8, 4), "b.bias": (5,), "c": (3, 7), "d": (), "e": (0, 4), "f": (16, 8), "g": (2, 2), "h": (9,)}
    dtypes = [torch.float32, torch.float16, torch.int32, torch.int64, torch.bfloat16, torch.uint8, torch.int8]
    return {
        name: torch.randint(0, 100, shape, generator=generator).to(dtypes[position % len(dtypes)])
        for position, (name, shape) in enumerate(shapes.items())
    }


def writer_for(directory: Path, tensors: dict[str, torch.Tensor], shard_bytes: int = SHARD_BYTES) -> ShardWriter:
    return ShardWriter(directory, [(name, t.dtype, t.shape) for name, t in tensors.items()], shard_bytes)


def write_all(directory: Path, tensors: dict[str, torch.Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    with writer_for(directory, tensors, shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("shard_bytes", [1, 128, 300, 10_000])
def test_other_readers_open_the_files(tmp_path, shard_bytes):
    tensors = some_tensors()
    write_all(tmp_path, tensors, shard_bytes)
    read = {name: tensor for path in tmp_path.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)


def test_index_names_the_file_of_every_tensor(tmp_path):
    tensors = some_tensors()
    write_all(tmp_path, tensors)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert list(index["weight_map"]) == list(tensors)


def test_values_begin_at_a_multiple_of_eight(tmp_path):
    write_all(tmp_path, some_tensors())
    for path in tmp_path.glob("*.safetensors"):
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=30), shard_bytes=st.integers(1, 100))
@settings(max_examples=60, deadline=None)
def test_no_shard_is_over_size_or_needlessly_small(sizes, shard_bytes):
    specs = [Spec(str(position), torch.uint8, (size,)) for position, size in enumerate(sizes)]
    planned = plan_shards(specs, shard_bytes)
    assert [spec for shard in planned for spec in shard.specs] == specs
    totals = [sum(spec.nbytes for spec in shard.specs) for shard in planned]
    assert all(total <= shard_bytes or len(shard.specs) == 1 for total, shard in zip(totals, planned, strict=True))
    nexts = [shard.specs[0].nbytes for shard in planned[1:]]
    assert all(total + size > shard_bytes for total, size in zip(totals, nexts, strict=False))


@pytest.mark.parametrize("done", range(len(some_tensors()) + 1))
@pytest.mark.parametrize("beyond", [0, 1, 3])
def test_resumed_run_ends_in_the_same_bytes(tmp_path, done, beyond):
    """The journal said `done`; the killed run had come `beyond` tensors further."""
    tensors = some_tensors()
    write_all(tmp_path / "whole", tensors)
    with writer_for(tmp_path / "resumed", tensors) as writer:
        for name in list(tensors)[: done + beyond]:
            writer.write(name, tensors[name])
    with writer_for(tmp_path / "resumed", tensors) as writer:
        writer.resume(done)
        for name in list(tensors)[done:]:
            writer.write(name, tensors[name])
        writer.finish()
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


def test_only_whole_files_have_their_final_names(tmp_path):
    tensors = some_tensors()
    write_all(tmp_path / "whole", tensors)
    with writer_for(tmp_path / "part", tensors) as writer:
        for name in list(tensors)[:7]:
            writer.write(name, tensors[name])
        writer.flush()
        part = contents(tmp_path / "part")
    finished = {name: content for name, content in part.items() if not name.endswith(".partial")}
    assert finished
    assert len(part) == len(finished) + 1
    assert finished.items() <= contents(tmp_path / "whole").items()


@pytest.mark.thorough
def test_killed_process_leaves_only_complete_files_under_final_names(tmp_path):
    """kill -9 in the middle of the third tensor's shard: what has its final name is whole, and resume ends the same."""
    script = textwrap.dedent(f"""
        import os, signal, sys
        sys.path[:0] = {sys.path!r}
        from pathlib import Path
        from tests.checkpoint.test_shards import some_tensors, writer_for
        tensors = some_tensors()
        writer = writer_for(Path({str(tmp_path / "killed")!r}), tensors)
        for name in list(tensors)[:7]:
            writer.write(name, tensors[name])
        writer.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert subprocess.run([sys.executable, "-c", script], check=False, cwd=Path(__file__).parent).returncode == -9
    tensors = some_tensors()
    write_all(tmp_path / "whole", tensors)
    whole, killed = contents(tmp_path / "whole"), contents(tmp_path / "killed")
    finished = {name: content for name, content in killed.items() if not name.endswith(".partial")}
    assert finished
    assert len(killed) == len(finished) + 1
    assert finished.items() <= whole.items()
    with writer_for(tmp_path / "killed", tensors) as writer:
        writer.resume(7)
        writer.write("h", tensors["h"])
        writer.finish()
    assert contents(tmp_path / "killed") == whole


def test_resume_with_another_plan_is_refused(tmp_path):
    tensors = some_tensors()
    with writer_for(tmp_path, tensors) as writer:
        for name in list(tensors)[:2]:
            writer.write(name, tensors[name])
    other = {name.upper(): tensor for name, tensor in tensors.items()}
    with pytest.raises(InvalidInput, match="another plan"):
        writer_for(tmp_path, other).resume(2)
    with pytest.raises(InvalidInput, match="cannot resume"):
        writer_for(tmp_path, tensors).resume(5)


def test_tensor_out_of_plan_is_refused(tmp_path):
    tensors = some_tensors()
    with writer_for(tmp_path, tensors) as writer:
        for wrong in (("b.bias", tensors["b.bias"]), ("a", tensors["a"].double()), ("a", tensors["a"].t())):
            with pytest.raises(InvalidInput, match="out of plan"):
                writer.write(*wrong)
        writer.write("a", tensors["a"])
        with pytest.raises(InvalidInput, match=r"b\.bias is missing"):
            writer.finish()


def test_strided_tensor_is_written_by_value(tmp_path):
    tensor = torch.arange(12).reshape(3, 4).t()
    write_all(tmp_path, {"t": tensor})
    assert torch.equal(load_file(tmp_path / "model.safetensors")["t"], tensor)


def test_full_disk_is_told_and_finished_shards_stay(tmp_path, monkeypatch):
    tensors = some_tensors()
    write_all(tmp_path / "whole", tensors)
    writer = writer_for(tmp_path / "full", tensors)
    names = iter(tensors)
    for name in names:
        writer.write(name, tensors[name])
        if any(path.suffix == ".safetensors" for path in (tmp_path / "full").iterdir()):
            break

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    rest = {name: tensors[name] for name in names}
    with pytest.raises(MiniawqError, match="disk is full"):
        [writer.write(name, tensor) for name, tensor in rest.items()]
    finished = {name: content for name, content in contents(tmp_path / "full").items() if "partial" not in name}
    assert finished
    assert finished.items() <= contents(tmp_path / "whole").items()


def test_published_directory_appears_complete_or_not_at_all(tmp_path):
    destination = tmp_path / "model"

    def interrupted() -> None:
        with published(destination) as directory:
            (directory / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with published(destination) as directory:
        write_bytes(directory / "config.json", b"{}")
        assert not destination.exists()
    assert contents(destination) == {"config.json": b"{}"}
    with pytest.raises(UsageError, match="exists"), published(destination):
        pass


def test_a_directory_called_partial_is_left_alone(tmp_path):
    """It may be another run's, or the user's."""
    theirs = tmp_path / "model.partial"
    theirs.mkdir()
    (theirs / "notes.txt").write_text("mine")
    with published(tmp_path / "model") as directory:
        assert directory != theirs
        (directory / "config.json").write_text("{}")
    assert contents(theirs) == {"notes.txt": b"mine"}
    assert contents(tmp_path / "model") == {"config.json": b"{}"}


KILLED = """
import os, sys
from miniawq.checkpoint.publishing import published
with published(sys.argv[1]) as directory:
    (directory / "half").write_text("half")
    os.kill(os.getpid(), 9)
"""


@pytest.mark.thorough
def test_what_a_killed_conversion_leaves_is_removed_by_the_next(tmp_path):
    """What belongs to a run that goes on, or to the user, stays."""
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "model")], cwd=ROOT, check=False)
    abandoned, lock = sorted(tmp_path.iterdir())
    assert lock.name == abandoned.name + LOCK
    mine = tmp_path / "model.partial-0a1b2c3d"
    mine.mkdir()

    def interrupted() -> None:
        with published(tmp_path / "model"):
            assert running.exists()
            raise KeyboardInterrupt

    with published(tmp_path / "model") as running:
        assert not abandoned.exists()
        assert not lock.exists()
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    assert sorted(tmp_path.iterdir()) == [tmp_path / "model", mine]


def test_a_directory_that_cannot_be_made_leaves_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only")))
    with pytest.raises(MiniawqError, match="cannot write"), published(tmp_path / "model"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("checked", [True, False], ids=["seen", "in the same moment"])
def test_of_two_runs_into_one_directory_one_publishes(tmp_path, monkeypatch, checked):
    """Both are half done at the same time; unchecked, both find the name free and rename."""
    if not checked:
        monkeypatch.setattr(publishing, "_refuse_existing", lambda destination: None)
    together = threading.Barrier(2, timeout=30)

    def publish(run: int) -> Path:
        with published(tmp_path / "model") as directory:
            together.wait()
            for number in range(3):
                (directory / f"{number}").write_text(f"run {run}")
            together.wait()
        return directory

    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(publish, run) for run in range(2)]
    errors = [run.exception() for run in runs]
    winner = errors.index(None)
    assert isinstance(errors[1 - winner], UsageError)
    assert contents(tmp_path / "model") == {f"{number}": f"run {winner}".encode() for number in range(3)}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


HOLD = """
import sys
from miniawq.checkpoint.publishing import locked
from pathlib import Path
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_holds_a_directory(tmp_path):
    directory = tmp_path / "model"
    held = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert held.stdout.readline() == b"held\n"
    with pytest.raises(UsageError, match="another run is writing"), locked(directory):
        pass
    held.communicate()
    with locked(directory):
        pass
    assert not directory.exists()


def test_every_dtype_name_is_safetensors_own(tmp_path):
    for dtype, name in DTYPE_NAMES.items():
        write_all(tmp_path / name, {"t": torch.zeros(2, 2).to(dtype)})
        assert load_file(tmp_path / name / "model.safetensors")["t"].dtype == dtype
