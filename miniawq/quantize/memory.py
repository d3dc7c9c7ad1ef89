"""How much memory quantizing takes, planned before it starts. All sizes are bytes.

The hidden states are there all the time, beside them either the embedding or one block with what its search needs, and
the next block as it is stored. None of this depends on the number of blocks.
"""

import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from miniawq.awq import Fold
from miniawq.checkpoint.blocks import TOKENS_PER_BATCH
from miniawq.checkpoint.opening import Checkpoint
from miniawq.checkpoint.shards import disk_errors
from miniawq.errors import DoesNotFit
from miniawq.hardware import device_memory, resident_memory, roomiest
from miniawq.quantize.ranges import CANDIDATE_ELEMENTS

FLOAT, TOKEN = 4, 8  # bytes of a float32, and of a token's id
SAMPLED_ROWS = 32  # windows of text that a model writes at once: more take memory for keys and values
STREAMS = 3  # of hidden states, for learned codes: before the dense block, after it, after the quantized block
LAYER_COPIES = 4  # of the largest layer in float32, while it is rounded, compared and packed
LEARNED_COPIES = 9  # the same, while its codes are learned
HEAD_COPIES = 2  # of a packed head in float32: as stored, in float32, and its codes, while it is verified
CANDIDATE_COPIES = 2  # of the candidates' elements: the errors, and their product with the moments


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose, on the host and on the device (empty where the host is the device).

    `remedy` is what a user can do where this does not fit.
    """

    host: dict[str, int]
    device: dict[str, int]
    remedy: str = "try --offload-directory DIR, a smaller --num-samples or a shorter --sequence-length"

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
        """Whether the hidden states are kept on the device."""
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
                    self.remedy,
                )


def plan_memory(
    checkpoint: Checkpoint,
    folds: list[Fold],
    samples: int,
    length: int,
    compared_tokens: int,
    device: torch.device,
    offload: bool,
    learns: bool = False,
    packs_head: bool = False,
) -> MemoryPlan:
    """Plan for a calibration text of `samples` windows of `length` tokens, and a recipe that learns codes or does not.

    The hidden states stay on the device where that leaves half of its free memory alone: fetching and returning them
    took longer than running a block (docs/log).
    """
    config = checkpoint.model_config
    shapes = [shape for name, shape in checkpoint.linears.items() if name.startswith("model.layers.0.")]
    block = sum(inputs * outputs for inputs, outputs in shapes) * FLOAT
    stored = sum(info.nbytes for name, info in checkpoint.tensors.items() if name.startswith("model.layers.0."))
    largest = max(inputs * outputs for inputs, outputs in shapes) * FLOAT
    hidden = samples * length * config.hidden_size * FLOAT * (STREAMS if learns else 1)
    batch = max(length, min(TOKENS_PER_BATCH, samples * length))
    embedding = checkpoint.tensors["model.embed_tokens.weight"].nbytes
    readers = {fold: checkpoint.linears[f"model.layers.0.{fold.balance_layers[0]}"][0] for fold in folds}
    modules = sum(fold.smooth_layer is not None and not fold.compares_one_layer for fold in folds)
    text = batch * (3 * config.intermediate_size + 2 * config.hidden_size) * FLOAT
    # At one time: a module with rounded weights on a batch of text, one layer being rounded, or one group's candidates.
    rounded = max(
        sum(math.prod(checkpoint.linears[f"model.layers.0.{name}"]) for name in f.balance_layers) for f in folds
    )
    candidates = CANDIDATE_COPIES * CANDIDATE_ELEMENTS.get(device.type, CANDIDATE_ELEMENTS["cpu"]) * FLOAT
    search = {
        "one block": block,
        "second moments": sum(inputs**2 for inputs in readers.values()) * FLOAT,
        "recorded calls": modules * 2 * max(batch, min(compared_tokens, samples * length)) * config.hidden_size * FLOAT,
        "one search": max(rounded * FLOAT + text, LAYER_COPIES * largest, largest + candidates),
    }
    if learns:
        outputs = {
            fold: sum(checkpoint.linears[f"model.layers.0.{name}"][1] for name in fold.balance_layers) for fold in folds
        }
        search["one block"] *= 2  # and the dense one
        search["aims"] = max(inputs * (inputs + outputs[fold]) for fold, inputs in readers.items()) * FLOAT
        shrunk = max(inputs**2 for inputs in readers.values()) * FLOAT
        search["one search"] = max(search["one search"], LEARNED_COPIES * largest + shrunk)
    process = {"process": resident_memory()}
    kept = {} if offload else {"hidden states": hidden}
    # Embedding and head are there before and after all searches.
    head = HEAD_COPIES * math.prod(checkpoint.linears["lm_head"]) * FLOAT if packs_head else 0
    if device.type == "cpu":
        coming = {"the next block": stored if config.num_hidden_layers > 1 else 0}
        ends = {"embedding or head": max(0, max(2 * embedding, head) - sum(search.values()))}
        return MemoryPlan(process | kept | search | coming | ends, {})
    search |= {"head": max(0, head - sum(search.values()))} if packs_head else {}
    transfer = {"embedding, or blocks on their way": max(2 * embedding, 3 * stored)}
    if kept and roomiest(hidden + sum(search.values()), device) == device:
        return MemoryPlan(process | transfer, kept | search)
    return MemoryPlan(process | kept | transfer, search)


def plan_sampling(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, samples: int, length: int
) -> MemoryPlan:
    """Plan for a model that writes its own calibration text, for which all of it has to be in memory."""
    config = checkpoint.model_config
    weights = sum(parameter.numel() for parameter in checkpoint.skeleton.parameters()) * dtype.itemsize
    rows = min(samples, SAMPLED_ROWS)
    keys = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    parts = {"model": weights, "keys and values": rows * length * keys, "logits": 2 * rows * config.vocab_size * FLOAT}
    parts["text"] = samples * length * TOKEN
    process = {"process": resident_memory()}
    remedy = "give a text with --calib FILE, without --own-windows: then one block is in memory at a time"
    if device.type == "cpu":
        return MemoryPlan(process | parts, {}, remedy)
    return MemoryPlan(process, parts, remedy)


def hidden_states(shape: tuple[int, int, int], device: torch.device, offload_directory: Path | None) -> Tensor:
    """An empty float32 tensor in memory, or in a file of a directory, which the system writes out as it needs to.

    MiniawqError when the directory cannot hold the file.
    """
    if offload_directory is None:
        return torch.empty(shape, device=device)
    with disk_errors(offload_directory):
        offload_directory.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix="hidden-states-", suffix=".bin", dir=offload_directory)
        try:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and ends the process at a mapped page
                os.posix_fallocate(descriptor, 0, math.prod(shape) * FLOAT)
            tensor = torch.from_file(name, shared=True, size=math.prod(shape))
        finally:
            os.close(descriptor)
            # The mapping keeps the file alive; without a name it goes when the process ends.
            os.unlink(name)
    return tensor.view(shape)
