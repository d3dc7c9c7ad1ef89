"""A tensor of a safetensors file, read into memory or brought to a GPU at the speed of the file.

A copy from the mapped file is slow: each page is first faulted in and then copied by the driver, one after the other.
Here two pinned buffers take turns: the device copies one while the file fills the other. And a process that reads a
page of a mapped file which another one has cut off is ended by the system; here that is an error.
"""

import ctypes
from collections.abc import Iterator
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miniawq.checkpoint.strict import check_head, damaged_file, header_entries
from miniawq.errors import UnsupportedCheckpoint

CHUNK_BYTES = 16 << 20  # of a buffer
CHECKED_BYTES = 1 << 16  # of a piece whose values are looked at, which stays in the cache


def read_tensor(path: Path, key: str, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The tensor `key` on the device; its dtype and shape come from the header, which is checked already."""
    place = _place(path, key, dtype, shape)
    values = torch.empty(place[1], dtype=torch.uint8, device=device)
    parts = values.split(CHUNK_BYTES)
    if device.type == "cpu":
        for _ in _filled(path, key, place, iter(parts)):
            pass
    else:
        stage = staging(device)
        for part, buffer in zip(parts, _filled(path, key, place, iter(stage.next, None)), strict=True):
            part.copy_(buffer, non_blocking=True)
            stage.taken()
    return values.view(dtype).reshape(shape)


def map_tensor(path: Path, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor `key` as a view of the file; a copy where its bytes are not aligned, or the file cannot be mapped.

    Each tensor has a mapping of its own: one for all would count every page ever read as our memory.
    """
    start, size = _place(path, key, dtype, shape)
    if not size or start % dtype.itemsize:
        return read_tensor(path, key, dtype, shape, torch.device("cpu"))
    try:
        storage: Any = torch.UntypedStorage.from_file(str(path), False, start + size)
    except RuntimeError:  # the system does not map a file that is larger than memory
        return read_tensor(path, key, dtype, shape, torch.device("cpu"))
    return torch.empty(0, dtype=torch.uint8).set_(storage)[start:].view(dtype).reshape(shape)


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; makes no copy of the tensor."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # each is NaN if a value is
    return bool(low.isfinite() & high.isfinite())


def is_finite_on_disk(path: Path, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of a file is finite; reads it in pieces, which a view of the file would keep in memory."""
    if not dtype.is_floating_point:
        return True
    buffers = repeat(torch.empty(CHECKED_BYTES, dtype=torch.uint8))
    return all(is_finite(buffer.view(dtype)) for buffer in _filled(path, key, _place(path, key, dtype, shape), buffers))


def _filled(path: Path, key: str, place: tuple[int, int], buffers: Iterator[Tensor]) -> Iterator[Tensor]:
    """The bytes of a tensor in pieces, each in the next of the buffers on the host."""
    start, left = place
    with open(path, "rb") as file:
        file.seek(start)
        while left:
            buffer = next(buffers)[:left]
            if file.readinto((ctypes.c_char * len(buffer)).from_address(buffer.data_ptr())) != len(buffer):
                fix = "the file is damaged: download it again"
                raise UnsupportedCheckpoint(f"{path.name} ends within {key}", str(path), fix)
            left -= len(buffer)
            yield buffer


class Staging:
    """Two buffers, and for each an event that tells when the device has copied it."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._buffers = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
        self._events = [torch.cuda.Event() for _ in self._buffers] if on_gpu else []
        self._device, self._turn = device, 0

    def next(self) -> Tensor:
        """The buffer to fill now; waits until the device has copied it."""
        self._turn = 1 - self._turn
        if self._events:
            self._events[self._turn].synchronize()
        return self._buffers[self._turn]

    def taken(self) -> None:
        """Say that the copy of this buffer is in the device's queue."""
        if self._events:
            self._events[self._turn].record(torch.cuda.current_stream(self._device))


@lru_cache(maxsize=64)
def staging(device: torch.device) -> Staging:
    """The buffers of a device."""
    return Staging(device)


def _place(path: Path, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[int, int]:
    """Where the bytes of a tensor begin, and their number; UnsupportedCheckpoint if the file is another one by now."""
    start, end = _places(path, path.stat().st_mtime_ns).get(key, (0, -1))
    if end - start != dtype.itemsize * torch.Size(shape).numel():
        why = f"{path} does not hold {key} as its header said"
        raise UnsupportedCheckpoint(f"{path.name} was changed while it was in use", why, "run the command again")
    return start, end - start


@lru_cache(maxsize=64)
def _places(path: Path, changed: int) -> dict[str, tuple[int, int]]:
    """Where the bytes of each tensor begin and end; `changed`, the time of the file, is for the cache."""
    check_head(path)
    entries, values = header_entries(path)
    try:
        places = {key: entry["data_offsets"] for key, entry in entries.items()}
        return {key: (values + start, values + end) for key, (start, end) in places.items()}
    except (ValueError, LookupError, TypeError) as error:
        raise damaged_file(path, f"its header: {error}") from error
