"""What running a model takes in memory, known from headers: weights, kv cache, prefill, overhead.

All in bytes. `require_memory` is called before a weight is read, so that what cannot run is told at once, with what
would.
"""

import dataclasses
import logging
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from miniawq.checkpoint.loading import FEWEST_OUTPUTS_PACKED, loaded_dtype
from miniawq.checkpoint.opening import Checkpoint
from miniawq.compiled import CODES_PER_EXPANDED_SLICE, arranged_bytes
from miniawq.errors import DoesNotFit
from miniawq.hardware import DeviceMemory, device_memory, peak_memory, size
from miniawq.kernel import QuantLinear
from miniawq.model import Llama, LlamaConfig

log = logging.getLogger(__name__)

# Tokens of a prompt that run at once, of all rows together.
PREFILL_CHUNK = 2048
# Outside torch's own counters: CUDA context, allocator, graphs; on a CPU the interpreter and the libraries.
OVERHEAD = {"cuda": 1 << 30, "cpu": 1 << 29}
# Where packed weights are not expanded by a kernel, a slice of a layer makes temporaries: its codes as integers and in
# float32, so many bytes a code, and at most so many.
SLICE_BYTES_PER_CODE, SLICE_BYTES = 16, 64 << 20
SMALLEST_CACHE = 1024  # positions of the cache of a compiled step
# Rows of a batch beyond which a step takes about as much longer as it writes more (docs/performance.md).
MOST_ROWS = {"cuda": 64, "cpu": 32}
TIGHT = 0.9  # of what is free


@dataclass(frozen=True)
class Footprint:
    """Bytes needed to run `batch` sequences of `max_seq_len` tokens on a kind of device, "cuda" or "cpu"."""

    device: str
    batch: int
    max_seq_len: int
    weights: int
    kv_cache: int
    prefill: int
    overhead: int

    @property
    def total(self) -> int:
        """Everything at once."""
        return self.weights + self.kv_cache + self.prefill + self.overhead


def footprint(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    *,
    device: str,
    batch: int = 1,
    max_seq_len: int,
    overhead: int | None = None,
) -> Footprint:
    """The memory of a checkpoint as `load_model` and `generate` use it, activations in `dtype`.

    `device` is "cuda" or "cpu": packed words are arranged for it. `overhead` defaults to the device's in OVERHEAD.
    """
    device = "cuda" if device == "cuda" else "cpu"
    model = checkpoint.skeleton
    return Footprint(
        device=device,
        batch=batch,
        max_seq_len=max_seq_len,
        weights=weight_bytes(model, dtype, device),
        kv_cache=batch * max_seq_len * kv_bytes_per_token(model.config, dtype),
        prefill=prefill_bytes(model, dtype, device, batch, max_seq_len),
        overhead=OVERHEAD[device] if overhead is None else overhead,
    )


def weight_bytes(model: Llama, dtype: torch.dtype, device: str) -> int:
    """Bytes of the weights of a model as stored (a `skeleton`), once it is loaded to compute in `dtype`."""
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    packed = {id(tensor) for layer in layers for tensor in (layer.qweight, layer.qzeros, layer.scales)}
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    dense = [
        tensor.numel() * loaded_dtype(tensor.dtype, tensor.dim(), dtype).itemsize
        for key, tensor in tensors.items()
        if key not in packed
    ]
    dense.append(head_copy_bytes(model, dtype, device))
    return sum(dense) + sum(packed_bytes(layer, device) for layer in layers)


def head_copy_bytes(model: Llama, dtype: torch.dtype, device: str) -> int:
    """Bytes of the second copy that a plain step makes of a large head on a CPU (`DenseLinear.prepare`)."""
    weight_OI = getattr(model.lm_head, "weight", None)
    if device == "cuda" or weight_OI is None or len(weight_OI) < FEWEST_OUTPUTS_PACKED:
        return 0
    return weight_OI.nbytes if loaded_dtype(weight_OI.dtype, 2, dtype) != dtype else 0


def packed_bytes(layer: QuantLinear, device: str) -> int:
    """Bytes of one packed layer of a skeleton; on CUDA float32 scales are left as they are in the file."""
    assert layer.qweight is not None
    assert layer.qzeros is not None
    assert layer.scales is not None
    if device == "cuda" and layer.scales.dtype.itemsize != 2:
        return layer.qweight.nbytes + layer.qzeros.nbytes + layer.scales.nbytes
    return arranged_bytes(layer.out_features, layer.in_features, layer.group_size, device)


def cache_room(positions: int, limit: int, serves_more: bool) -> int:
    """Positions of the cache made for a text: a power of two, if longer texts are to find room in it too."""
    return min(limit, max(SMALLEST_CACHE, 1 << (positions - 1).bit_length())) if serves_more else positions


def kv_bytes_per_token(config: LlamaConfig, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers, of activations in `dtype`."""
    itemsize = (config.kv_cache_dtype or dtype).itemsize
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize


def prefill_bytes(model: Llama, dtype: torch.dtype, device: str, batch: int, max_seq_len: int) -> int:
    """The most that is alive beside weights and cache while a piece of the prompts runs, its logits included.

    That is in attention, in what gate and up make together, or at the end of the MLP. A prompt longer than its piece
    needs a mask, and so do rows of different lengths, which begin with padding and have rotary tables of their own.
    """
    config = model.config
    is_packed = any(isinstance(module, QuantLinear) for module in model.modules())
    is_expanded = is_packed and device == "cuda" and dtype.itemsize == 2
    # Where it is not expanded, a packed weight is multiplied in float32.
    itemsize = torch.float32.itemsize if is_packed and not is_expanded else dtype.itemsize
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    tokens = min(PREFILL_CHUNK, batch * max_seq_len)
    has_mask = batch > 1 or max_seq_len > PREFILL_CHUNK
    seen = tokens * max_seq_len if has_mask else 0
    masks = (1 + dtype.itemsize) * (heads // config.num_key_value_heads) * seen
    # Attention reads keys and values of a layer in the dtype of activations.
    is_widened = config.kv_cache_dtype not in (None, dtype)
    widened = 2 * config.num_key_value_heads * config.head_dim * batch * max_seq_len * dtype.itemsize * is_widened
    attention = (2 * width + 4 * (heads + config.num_key_value_heads) * config.head_dim) * tokens * itemsize
    attention += masks + widened
    gate_up = (3 * width + 2 * inner) * tokens * itemsize
    gated = 4 * (width + inner) * tokens * itemsize
    down = (4 * width + 3 * inner) * tokens * itemsize
    if is_packed:
        temporaries = expanded_bytes if is_expanded else sliced_bytes
        gate_up += temporaries(2 * width * inner, dtype)
        down += temporaries(width * inner, dtype)
    logits = 2 * 4 * batch * config.vocab_size
    tables = 2 * len(set(config.layer_ropes)) * config.head_dim * tokens * dtype.itemsize
    return max(attention, gate_up, gated, down) + seen + logits + tables


def expanded_bytes(codes: int, dtype: torch.dtype) -> int:
    """What packed weights take while many rows are multiplied with them: a slice."""
    return min(codes, CODES_PER_EXPANDED_SLICE) * dtype.itemsize


def sliced_bytes(codes: int, _dtype: torch.dtype) -> int:
    """What packed weights take while they are multiplied in float32: a slice."""
    return min(SLICE_BYTES, SLICE_BYTES_PER_CODE * codes)


def largest_max_seq_len(needed: Footprint, checkpoint: Checkpoint, dtype: torch.dtype, free: int) -> int:
    """The longest context that fits beside the same weights and batch, the model's own or one in steps of 64 tokens;
    0 if none does.
    """
    model, batch, longest = checkpoint.skeleton, needed.batch, checkpoint.model_config.max_position_embeddings

    def fits(length: int) -> bool:
        cache = batch * length * kv_bytes_per_token(model.config, dtype)
        prefill = prefill_bytes(model, dtype, needed.device, batch, length)
        return needed.weights + cache + prefill + needed.overhead <= free

    if fits(longest):
        return longest
    return 64 * bisect_left(range(1, longest // 64 + 1), True, key=lambda blocks: not fits(64 * blocks))


def fitting_rows(
    checkpoint: Checkpoint,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    most: int,
    max_seq_len: int,
    overhead: int | None = None,
) -> int:
    """Rows of a batch: as many as there are texts, as fit into what is free, and as MOST_ROWS says; 1 at least."""
    kind, free = torch.device(device).type, device_memory(device).free

    def fits(rows: int) -> bool:
        needed = footprint(checkpoint, dtype, device=kind, batch=rows, max_seq_len=max_seq_len, overhead=overhead)
        return needed.total <= free

    return next((rows for rows in range(min(most, MOST_ROWS.get(kind, 1)), 1, -1) if fits(rows)), 1)


def fitting_context(
    checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype, *, overhead: int | None = None
) -> int:
    """The longest context of one row that fits into what is free now; 0 if none does."""
    needed = footprint(checkpoint, dtype, device=torch.device(device).type, max_seq_len=1, overhead=overhead)
    return largest_max_seq_len(needed, checkpoint, dtype, device_memory(device).free)


def require_memory(needed: Footprint, checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype) -> None:
    """For callers about to load: DoesNotFit when a device has not that much free, which is told where it is tight."""
    memory = device_memory(device)
    check_fit(needed, memory, checkpoint, dtype)
    if needed.total > TIGHT * memory.free:
        log.info(
            "memory is tight: %s of %s that are free (%s)", size(needed.total), size(memory.free), told_parts(needed)
        )


def check_fit(needed: Footprint, memory: DeviceMemory, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """DoesNotFit with the need, the supply, who holds the rest, and what would fit."""
    if needed.total <= memory.free:
        return
    supply = f"{size(memory.free)} of {size(memory.total)} are free"
    if memory.free < memory.total:
        supply += f", other processes hold {size(memory.total - memory.free)}"
    longest = largest_max_seq_len(needed, checkpoint, dtype, memory.free)
    if longest:
        fix = f"--max-seq-len {longest} fits"
    elif needed.overhead >= memory.free:
        fix = "give a smaller --memory-margin, or free memory on this device"
    elif needed.batch > 1:
        fix = "ask for fewer rows"
    else:
        fix = "use a smaller model, or free memory on this device"
    raise DoesNotFit(
        f"this model does not fit on {memory.name}",
        f"it needs {size(needed.total)} ({told_parts(needed)}); {supply}",
        fix,
    )


@contextmanager
def against_plan(needed: Footprint) -> Iterator[None]:
    """DoesNotFit with the plan beside what was measured, if memory ends in the `with` block."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        why = str(error).partition("\n")[0] or "Python could not get more"
        why += f"; planned {size(needed.total)}, measured {size(peak_memory(needed.device))}"
        fix = "give a smaller --max-seq-len or --batch-size, or end what else uses the device"
        raise DoesNotFit("the memory of the device is full", why, fix) from error


def parts_of(needed: Footprint) -> dict[str, int]:
    """The bytes by name, in the order they are told."""
    names = ("weights", "kv_cache", "prefill", "overhead")
    return {name.replace("_", " "): value for name, value in dataclasses.asdict(needed).items() if name in names}


def bytes_per_step(model: Llama, rows: int, positions: int) -> int:
    """Bytes that one step reads: the weights, and the cache of so many positions in each row."""
    return bytes_per_token(model) + rows * positions * kv_bytes_per_token(model.config, model.dtype)


def told_parts(needed: Footprint) -> str:
    """The same in one line."""
    return ", ".join(f"{field} {size(value)}" for field, value in parts_of(needed).items())


def bytes_per_token(model: Llama) -> int:
    """Bytes of weights that one step of one row reads: all but the rows of the embedding that it does not look up."""
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    packed = [tensor for layer in layers if layer.prepacked for tensor in (layer.prepacked.words, layer.prepacked.grid)]
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *packed)}
    unread = 0 if model.config.tie_word_embeddings else model.model.embed_tokens.weight.nbytes
    return sum(tensors.values()) - unread
