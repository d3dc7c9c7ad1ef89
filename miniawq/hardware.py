"""The memory of devices and of this process, and the choice of a device. All sizes are bytes."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import psutil
import torch

from miniawq.errors import UsageError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

COPIED_BYTES, COPIES = (128 << 20, 1 << 30), 6  # on the host, on a GPU
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


class DeviceMemory(NamedTuple):
    """Memory of a device: what it has, and what no process uses."""

    name: str
    total: int
    free: int


def device_memory(device: torch.device | str) -> DeviceMemory:
    """The memory of a CUDA device, or of this machine, whose file cache counts as free."""
    device = torch.device(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory(f"{device} ({torch.cuda.get_device_name(device)})", total, free)
    memory = psutil.virtual_memory()
    return DeviceMemory("cpu", memory.total, memory.available)


def devices() -> list[torch.device]:
    """All that `pick_device` can give: the first is its choice where none is asked for."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return [*(torch.device("cuda", number) for number in gpus), torch.device("cpu")]


def roomiest(nbytes: int, device: torch.device) -> torch.device:
    """Where to keep `nbytes`: on the device if half of its free memory holds them, else on the host."""
    return device if 2 * nbytes <= device_memory(device).free else torch.device("cpu")


def resident_memory() -> int:
    """Memory that this process holds now."""
    return psutil.Process().memory_info().rss


def peak_memory(device: torch.device | str = "cpu") -> int:
    """The most that torch has allocated on a CUDA device, or that this process has held on the host, so far."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return psutil.Process().memory_info().peak_wset
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def copy_bandwidth(device: torch.device | str = "cpu") -> float:
    """Bytes per second that a copy of one large tensor reads and writes; the best of a few."""
    device = torch.device(device)
    source = torch.zeros(COPIED_BYTES[device.type == "cuda"], dtype=torch.uint8, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(COPIES):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(seconds)


def synchronize(device: torch.device) -> None:
    """Return when a GPU has done what was launched on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def size(nbytes: int) -> str:
    """Bytes for people, with two decimals, in GiB or MiB from a tenth of one on, else in KiB."""
    unit = next((unit for unit in ("GiB", "MiB") if nbytes >= UNITS[unit] / 10), "KiB")
    return f"{nbytes / UNITS[unit]:.2f} {unit}"


def named_device(name: torch.device | str) -> torch.device:
    """The device of this name, whether it is on this machine or not; UsageError if torch knows no such device."""
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise _unusable(name, error) from error


def pick_device(wanted: torch.device | str | None) -> torch.device:
    """The device asked for, or CUDA where there is one, else the CPU; UsageError if this machine cannot use it."""
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = named_device(wanted)
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise _unusable(wanted, error) from error
    return device


def _unusable(name: torch.device | str, error: Exception) -> UsageError:
    why = str(error).partition("\n")[0].partition(". ")[0]
    return UsageError(f"device {str(name)!r} cannot be used", why, "give cpu, cuda or cuda:1, or leave the flag out")


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` threads of the processor in the `with` block; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
