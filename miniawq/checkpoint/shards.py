"""Writing safetensors shard by shard: streamed, resumable, and complete under their final names or not there at all.

A safetensors file is eight bytes of header length, a JSON header with the dtype, shape and place of every tensor, and
the tensors end to end (https://huggingface.co/docs/safetensors). Names, dtypes and shapes are known before the first
value is, so the header is written first and the tensors follow one by one.
"""

import ctypes
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from miniawq.errors import InvalidInput, MiniawqError

SHARD_BYTES = 5_000_000_000
PARTIAL = ".partial"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Spec(NamedTuple):
    """A tensor that is going to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values on disk."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Shard(NamedTuple):
    """A file to write: its name, its tensors in order, and the header before them."""

    file: str
    specs: list[Spec]
    header: bytes

    @property
    def nbytes(self) -> int:
        """Size of the finished file."""
        return len(self.header) + sum(spec.nbytes for spec in self.specs)


def plan_shards(specs: Sequence[Spec], shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Cut the tensors, in order, into files with at most `shard_bytes` of values (a larger tensor gets its own)."""
    parts: list[list[Spec]] = [[]]
    room = shard_bytes
    for spec in specs:
        if parts[-1] and spec.nbytes > room:
            parts.append([])
            room = shard_bytes
        parts[-1].append(spec)
        room -= spec.nbytes
    if len(parts) == 1:
        files = ["model.safetensors"]
    else:
        files = [f"model-{number:05}-of-{len(parts):05}.safetensors" for number in range(1, len(parts) + 1)]
    return [Shard(file, part, _header(part)) for file, part in zip(files, parts, strict=True)]


def _header(specs: Sequence[Spec]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in specs:
        end = offset + Spec(name, dtype, shape).nbytes
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks that values begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text


def serialize(tensors: Mapping[str, Tensor]) -> bytes:
    """A whole safetensors file in memory. The library's own `save` needs NumPy, which miniawq does not."""
    specs = [Spec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    values = [tensor.detach().cpu().contiguous() for tensor in tensors.values()]
    return _header(specs) + b"".join(ctypes.string_at(value.data_ptr(), value.nbytes) for value in values)


class ShardWriter:
    """Writes the tensors of `specs`, in that order, into the shards of a checkpoint directory.

    A shard is called `<name>.partial` until its last tensor is on the disk. Its bytes depend only on the specs, the
    values and `shard_bytes`, even if a run was killed and resumed. `digests` holds the SHA-256 of each tensor's bytes.
    """

    def __init__(
        self,
        directory: str | Path,
        specs: Sequence[tuple[str, torch.dtype, Sequence[int]]],
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.directory = Path(directory)
        self.specs = [Spec(name, dtype, tuple(shape)) for name, dtype, shape in specs]
        self.shards = plan_shards(self.specs, shard_bytes)
        self.done = 0
        self.digests: dict[str, str] = {}
        self._file: BinaryIO | None = None
        self._starts = [0]
        for shard in self.shards:
            self._starts.append(self._starts[-1] + len(shard.specs))

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            # Only a run that fails ends within a file. What a full disk does not take now is written again by the next.
            with suppress(OSError):
                self._file.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor. InvalidInput when its name, dtype or shape is not the planned one.

        MiniawqError when the disk does not take it: complete shards stay, and `resume` goes on from the last one.
        """
        if self.done == len(self.specs):
            raise InvalidInput(f"tensor {name} was not planned", "all planned tensors are written")
        planned, given = self.specs[self.done], Spec(name, tensor.dtype, tuple(tensor.shape))
        if given != planned:
            raise InvalidInput(f"tensor {name} is out of plan", f"the plan says {planned}, and {given} came")
        shard = self.shards[self._shard_of(self.done)]
        with disk_errors(self.directory):
            if self._file is None:
                self.directory.mkdir(exist_ok=True)  # not those around it, which somebody may have taken away
                self._file = self._partial(shard).open("wb")
                self._file.write(shard.header)
            values = tensor.detach().cpu().contiguous()
            content = (ctypes.c_char * planned.nbytes).from_address(values.data_ptr())
            self._file.write(content)
            self.digests[name] = hashlib.sha256(content).hexdigest()
            self.done += 1
            if self.done in self._starts:
                self._complete(shard)

    def written(self, prefix: str) -> dict[str, Tensor]:
        """The tensors already on the disk whose names begin so, as a resumed run finds them."""
        found = {}
        for shard in self.shards:
            path, offset = self.directory / shard.file, len(shard.header)
            with disk_errors(self.directory):
                for name, dtype, shape in shard.specs:
                    nbytes = Spec(name, dtype, shape).nbytes
                    if name.startswith(prefix):
                        with open(path if path.exists() else self._partial(shard), "rb") as file:
                            file.seek(offset)
                            content = bytearray(file.read(nbytes))
                        found[name] = torch.frombuffer(content, dtype=dtype).reshape(shape)
                    offset += nbytes
        return found

    def flush(self) -> None:
        """Put everything written so far on the disk, so that a journal may say so."""
        if self._file:
            with disk_errors(self.directory):
                self._file.flush()
                os.fsync(self._file.fileno())

    def resume(self, done: int) -> None:
        """Go on after the first `done` tensors of an earlier writer with the same specs; later bytes are overwritten.

        InvalidInput when the files there do not hold those tensors.
        """
        with disk_errors(self.directory):
            self._resume(done)
        self.done = done

    def _resume(self, done: int) -> None:
        index = self._shard_of(done)
        for shard in self.shards[:index]:
            self._check(self.directory / shard.file, shard, shard.nbytes)
        if done > self._starts[index]:
            shard = self.shards[index]
            size = len(shard.header) + sum(spec.nbytes for spec in shard.specs[: done - self._starts[index]])
            if (self.directory / shard.file).exists():
                os.replace(self.directory / shard.file, self._partial(shard))
            self._check(self._partial(shard), shard, size)
            self._file = self._partial(shard).open("r+b")
            self._file.seek(size)

    def finish(self) -> None:
        """Write the index (for more than one shard) once all tensors are written."""
        if self.done < len(self.specs):
            raise InvalidInput("the checkpoint is not complete", f"tensor {self.specs[self.done].name} is missing")
        if len(self.shards) > 1:
            index = {
                "metadata": {"total_size": sum(spec.nbytes for spec in self.specs)},
                "weight_map": {spec.name: shard.file for shard in self.shards for spec in shard.specs},
            }
            write_json(self.directory / "model.safetensors.index.json", index)

    def _shard_of(self, done: int) -> int:
        return next(index for index, end in enumerate([*self._starts[1:], len(self.specs) + 1]) if done < end)

    def _partial(self, shard: Shard) -> Path:
        return self.directory / (shard.file + PARTIAL)

    def _complete(self, shard: Shard) -> None:
        assert self._file is not None
        self.flush()
        self._file.close()
        self._file = None
        os.replace(self._partial(shard), self.directory / shard.file)
        sync_directory(self.directory)

    def _check(self, path: Path, shard: Shard, size: int) -> None:
        found = path.stat().st_size if path.exists() else 0
        same = False
        if found >= size:
            with open(path, "rb") as file:
                same = file.read(len(shard.header)) == shard.header
        if not same:
            raise InvalidInput(
                f"cannot resume in {self.directory}",
                f"{path.name} has {found} bytes of the {size} expected, or was written with another plan",
                "start again in an empty directory",
            )


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that appears complete or not at all."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file that appears complete or not at all."""
    partial = path.with_name(path.name + PARTIAL)
    with disk_errors(path.parent):
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


def sync_directory(directory: Path) -> None:
    """Put renames on the disk, which they are only once their directory is."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot, and need not
            raise
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Tell what the system says to a write in `directory` as a MiniawqError."""
    try:
        yield
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        what, fix = f"cannot write to {directory}", "check the disk and its permissions, or name another directory"
        if error.errno in FULL:
            what = f"the disk is full while writing to {directory}"
            fix = "free some space and run the same command again"
        raise MiniawqError(what, why, fix) from error
