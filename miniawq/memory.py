"""What quantizing takes in memory, told before it starts. All in bytes.

At any time there are the hidden states, and beside them either the embedding or one block with what its search needs.
Neither depends on the number of blocks.
"""

import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from miniawq.awq import Fold
from miniawq.checkpoint import Checkpoint
from miniawq.errors import DoesNotFit
from miniawq.footprint import device_memory
from miniawq.rounding import CANDIDATE_ELEMENTS
from miniawq.stream import TOKENS_PER_BATCH

FLOAT = 4
# Copies of the largest layer in float32 while it is rounded, compared and packed, and of a candidate's elements.
LAYER_COPIES, CANDIDATE_COPIES = 4, 2


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose, on the host and on the device (empty where the host is the device)."""

    host: dict[str, int]
    device: dict[str, int]

    def describe(self) -> str:
        """The plan in one line for each place."""
        lines = []
        for place, parts in (("host", self.host), ("device", self.device)):
            if parts:
                told = " + ".join(f"{size / 2**20:.0f} MiB {purpose}" for purpose, size in parts.items())
                lines.append(f"memory on the {place}: {sum(parts.values()) / 2**30:.2f} GiB ({told})")
        return "\n".join(lines)

    @property
    def hidden_on_device(self) -> bool:
        """Where the hidden states are kept."""
        return "hidden states" in self.device

    def check(self, device: torch.device) -> None:
        """DoesNotFit, with the flags that would help, where less is free than planned."""
        places = [("this machine", self.host, torch.device("cpu"))]
        if self.device:
            places.append((str(device), self.device, device))
        for place, parts, where in places:
            free = device_memory(where).free
            needed = sum(parts.values()) - (parts.get("process", 0))
            if needed > free:
                raise DoesNotFit(
                    f"{place} has not enough memory for this",
                    f"{needed / 2**30:.2f} GiB are needed and {free / 2**30:.2f} GiB are free",
                    "try --offload-directory DIR, a smaller --num-samples or a shorter --sequence-length",
                )


def plan_memory(
    checkpoint: Checkpoint,
    folds: list[Fold],
    samples: int,
    length: int,
    compared_tokens: int,
    device: torch.device,
    offload: bool,
) -> MemoryPlan:
    """Plan for a calibration text of `samples` windows of `length` tokens.

    The hidden states stay on the device where that leaves half of its free memory alone: fetching and returning them
    took longer than running a block (`docs/log.md`).
    """
    config = checkpoint.model_config
    shapes = [shape for name, shape in checkpoint.linears.items() if name.startswith("model.layers.0.")]
    block = sum(inputs * outputs for inputs, outputs in shapes) * FLOAT
    stored = sum(info.nbytes for name, info in checkpoint.tensors.items() if name.startswith("model.layers.0."))
    largest = max(inputs * outputs for inputs, outputs in shapes) * FLOAT
    hidden = samples * length * config.hidden_size * FLOAT
    batch = max(length, min(TOKENS_PER_BATCH, samples * length))
    embedding = checkpoint.tensors["model.embed_tokens.weight"].nbytes
    readers = {fold: checkpoint.linears[f"model.layers.0.{fold.linears[0]}"][0] for fold in folds}
    modules = sum(fold.linears != (fold.compared,) for fold in folds)
    text = batch * (3 * config.intermediate_size + 2 * config.hidden_size) * FLOAT
    # At one time: a module with rounded weights on a batch of text, one layer being rounded, or one group's candidates.
    rounded = max(sum(math.prod(checkpoint.linears[f"model.layers.0.{name}"]) for name in f.linears) for f in folds)
    candidates = CANDIDATE_COPIES * CANDIDATE_ELEMENTS[device.type] * FLOAT
    search = {
        "one block": block,
        "second moments": sum(inputs**2 for inputs in readers.values()) * FLOAT,
        "recorded calls": modules * 2 * max(batch, min(compared_tokens, samples * length)) * config.hidden_size * FLOAT,
        "one search": max(rounded * FLOAT + text, LAYER_COPIES * largest, largest + candidates),
    }
    process = {"process": resident_memory()}
    kept = {} if offload else {"hidden states": hidden}
    if device.type == "cpu":
        return MemoryPlan(process | kept | search | {"embedding": max(0, 2 * embedding - sum(search.values()))}, {})
    transfer = {"embedding, or blocks on their way": max(2 * embedding, 3 * stored)}
    if kept and home(hidden + sum(search.values()), device) == device:
        return MemoryPlan(process | transfer, kept | search)
    return MemoryPlan(process | kept | transfer, search)


def home(nbytes: int, device: torch.device) -> torch.device:
    """Where to keep so much: on the device if that leaves half of its free memory alone, else on the host."""
    return device if 2 * nbytes <= device_memory(device).free else torch.device("cpu")


def resident_memory() -> int:
    """Bytes of memory this process holds now; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


def peak_memory() -> int:
    """The most bytes of memory this process has held so far; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)


def hidden_states(shape: tuple[int, int, int], device: torch.device, offload_directory: Path | None) -> Tensor:
    """An empty float32 tensor in memory, or in a file of a directory, which the system writes out as it needs to."""
    if offload_directory is None:
        return torch.empty(shape, device=device)
    offload_directory.mkdir(parents=True, exist_ok=True)
    path = offload_directory / f"hidden-states-{os.getpid()}.bin"
    tensor = torch.from_file(str(path), shared=True, size=shape[0] * shape[1] * shape[2])
    # The mapping keeps the file; without a name it cannot be left behind.
    path.unlink()
    return tensor.view(shape)
