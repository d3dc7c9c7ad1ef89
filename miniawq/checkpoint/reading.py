"""A tensor of a safetensors file, brought to a GPU at the speed of the file.

A copy from the mapped file is slow: each page is first faulted in and then copied by the driver, one after the other.
Here two pinned buffers take turns: the device copies one while the file fills the other.
"""

import ctypes
import json
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from miniawq.errors import UnsupportedCheckpoint

CHUNK_BYTES = 16 << 20  # of a buffer


def read_tensor(path: Path, key: str, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The tensor `key` on the device; its dtype and shape come from the header, which is checked already."""
    start, end = _places(path, path.stat().st_mtime_ns)[key]
    values = torch.empty(end - start, dtype=torch.uint8, device=device)
    with open(path, "rb") as file:
        file.seek(start)
        for part in values.split(CHUNK_BYTES):
            buffer = staging(device).next()
            if file.readinto((ctypes.c_char * len(part)).from_address(buffer.data_ptr())) != len(part):
                fix = "the file is damaged: download it again"
                raise UnsupportedCheckpoint(f"{path.name} ends within {key}", str(path), fix)
            part.copy_(buffer[: len(part)], non_blocking=True)
            staging(device).taken()
    return values.view(dtype).reshape(shape)


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


@lru_cache(maxsize=64)
def _places(path: Path, changed: int) -> dict[str, tuple[int, int]]:
    """Where the bytes of each tensor begin and end; `changed`, the time of the file, is for the cache."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    places = {key: entry["data_offsets"] for key, entry in header.items() if key != "__metadata__"}
    return {key: (8 + length + start, 8 + length + end) for key, (start, end) in places.items()}
