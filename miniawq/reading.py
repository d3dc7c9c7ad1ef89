"""A tensor of a safetensors file, brought to a GPU at the speed of the file.

Copied from the mapped file, every page is first a fault of this process and then a copy of the driver's, and nothing
goes on meanwhile. Here the file is read into two pinned buffers in turn, and the device takes one while the other is
being filled.
"""

import ctypes
import json
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from miniawq.errors import UnsupportedCheckpoint

CHUNK_BYTES = 16 << 20


def read(path: Path, key: str, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The tensor `key`, whose dtype and shape are known from the header that was checked before."""
    start, end = _places(path, path.stat().st_mtime_ns)[key]
    bytes_N = torch.empty(end - start, dtype=torch.uint8, device=device)
    with open(path, "rb") as file:
        file.seek(start)
        for part_N in bytes_N.split(CHUNK_BYTES):
            buffer = staging(device).next()
            if file.readinto((ctypes.c_char * len(part_N)).from_address(buffer.data_ptr())) != len(part_N):
                fix = "the file is damaged: download it again"
                raise UnsupportedCheckpoint(f"{path.name} ends within {key}", str(path), fix)
            part_N.copy_(buffer[: len(part_N)], non_blocking=True)
            staging(device).taken()
    return bytes_N.view(dtype).reshape(shape)


class Staging:
    """Two buffers, and when the device has taken what was last in each."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._buffers = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
        self._events = [torch.cuda.Event() for _ in self._buffers] if on_gpu else []
        self._device, self._turn = device, 0

    def next(self) -> Tensor:
        """The buffer that may be filled now."""
        self._turn = 1 - self._turn
        if self._events:
            self._events[self._turn].synchronize()
        return self._buffers[self._turn]

    def taken(self) -> None:
        """The copy of this buffer has been ordered."""
        if self._events:
            self._events[self._turn].record(torch.cuda.current_stream(self._device))


@cache
def staging(device: torch.device) -> Staging:
    """One for each device."""
    return Staging(device)


@cache
def _places(path: Path, changed: int) -> dict[str, tuple[int, int]]:
    """Where the bytes of each tensor begin and end in a file (which was changed then)."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    places = {key: entry["data_offsets"] for key, entry in header.items() if key != "__metadata__"}
    return {key: (8 + length + start, 8 + length + end) for key, (start, end) in places.items()}
