"""A model read one decoder block at a time, so that one larger than the memory can be quantized and evaluated."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from miniawq.checkpoint.background import ahead
from miniawq.checkpoint.layouts import LAYOUTS
from miniawq.checkpoint.opening import Checkpoint
from miniawq.errors import InvalidInput
from miniawq.model import DecoderBlock, RMSNorm, attention_mask, dense_linear, narrowed, rope_tables, scaled
from miniawq.packing import Quantized, dequantize

TOKENS_PER_BATCH = 4096

# A tensor as a file holds it: itself, or the parts of a packed weight by name.
Stored = Tensor | dict[str, Tensor]
Part = Callable[..., Tensor]  # a block, or a part of one that takes the same


class BlockStream:
    """Reads the blocks of a checkpoint and runs hidden states through them, in float32.

    INT4 linears become the dense weights that their codes stand for. Blocks come in order, each once, and the next one
    is read while the caller works on this one. Hidden states stay where the caller keeps them; micro-batches of about
    `TOKENS_PER_BATCH` tokens go to the device.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "cpu") -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.model_config
        self.device = torch.device(device)
        self._coming = enumerate(ahead(map(self._stored_block, range(self.config.num_hidden_layers))))

    def embed(self, tokens_BL: Tensor, hidden_BLD: Tensor) -> None:
        """Write the embeddings of the tokens into `hidden_BLD`; InvalidInput on an id outside the vocabulary."""
        embedding_VD = self.checkpoint.read("model.embed_tokens.weight")
        if int(tokens_BL.max()) >= len(embedding_VD):
            raise InvalidInput(
                f"token id {int(tokens_BL.max())} is outside the model's vocabulary",
                f"model.embed_tokens.weight has {len(embedding_VD)} rows",
                "the tokenizer belongs to another model",
            )
        for rows in micro_batches(*tokens_BL.shape):
            embedded_BLD = embedding_VD[tokens_BL[rows]].to(hidden_BLD.dtype)
            hidden_BLD[rows] = scaled(embedded_BLD, self.config.embedding_multiplier)

    def block(self, layer: int) -> DecoderBlock:
        """The next decoder block with its weights, on the device."""
        number, stored = next(self._coming)
        assert number == layer, f"block {number} is next, and {layer} is asked for"
        with torch.device("meta"):
            block = DecoderBlock(self.config, layer, dense_linear)
        for name in [name for name, _ in block.named_parameters()]:
            module, _, leaf = name.rpartition(".")
            weight = self._weight(f"model.layers.{layer}.{module}", stored.pop(name))
            setattr(block.get_submodule(module), leaf, nn.Parameter(weight, requires_grad=False))
        return block

    def _stored_block(self, layer: int) -> dict[str, Stored]:
        with torch.device("meta"):
            names = [name for name, _ in DecoderBlock(self.config, layer, dense_linear).named_parameters()]
        return {name: read_stored(self.checkpoint, f"model.layers.{layer}.{name}", self.device) for name in names}

    def _weight(self, module: str, stored: Stored) -> Tensor:
        weight = place_stored(self.checkpoint, module, stored, self.device)
        return dequantize(weight, torch.float32) if isinstance(weight, Quantized) else weight.float()

    def run(self, block: Part, layer: int, hidden_BLD: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Pairs of a slice of rows and the block's outputs for these rows, on the device."""
        batch, length, _ = hidden_BLD.shape
        positions_L = torch.arange(length, device=self.device)
        rope = rope_tables(self.config.layer_ropes[layer], positions_L, length, torch.float32)
        mask = attention_mask(0, length, self.config.layer_windows[layer], None, self.device)
        cache = None if self.config.kv_cache_dtype is None else RoundingCache(self.config.kv_cache_dtype)
        for rows in micro_batches(batch, length):
            yield rows, block(hidden_BLD[rows].to(self.device, torch.float32), rope, mask, cache)

    def advance(self, block: Part, layer: int, hidden_BLD: Tensor) -> None:
        """Replace hidden states by the block's outputs."""
        for rows, output_BLD in self.run(block, layer, hidden_BLD):
            hidden_BLD[rows] = output_BLD.to(hidden_BLD.device)

    def head(self) -> "Head":
        """The function from hidden states to logits; a stored head is used even if config.json ties it."""
        stored = "lm_head.weight" in self.checkpoint.tensors or "lm_head" in self.checkpoint.quantized
        module, leaf = ("lm_head", "weight") if stored else ("model.embed_tokens", "weight")
        weight_VD = self._weight(module, read_stored(self.checkpoint, f"{module}.{leaf}", self.device))
        return Head(self.norm(), weight_VD, self.config.logits_scaling)

    def norm(self) -> RMSNorm:
        """The norm between the last block and the head."""
        norm = RMSNorm(self.config.hidden_size, self.config)
        norm.weight = nn.Parameter(self.checkpoint.read("model.norm.weight", self.device).float(), requires_grad=False)
        return norm


class RoundingCache:
    """What a kv cache of this dtype makes of the keys and values of a text that is computed at once."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def append(self, _layer: int, k_BJLE: Tensor, v_BJLE: Tensor) -> tuple[Tensor, Tensor]:
        return narrowed(k_BJLE, self.dtype).to(k_BJLE.dtype), narrowed(v_BJLE, self.dtype).to(v_BJLE.dtype)


class Head:
    """The final norm and the output matrix, from hidden states to logits."""

    def __init__(self, norm: nn.Module, weight_VD: Tensor, logits_scaling: float) -> None:
        self.norm, self.weight_VD, self.logits_scaling = norm, weight_VD, logits_scaling

    def __call__(self, hidden_TD: Tensor) -> Tensor:
        """logits_TV in float32."""
        logits_TV = linear(self.norm(hidden_TD.to(self.weight_VD.device, torch.float32)), self.weight_VD)
        return scaled(logits_TV, 1 / self.logits_scaling)


def micro_batches(batch: int, length: int) -> Iterator[slice]:
    """Slices of rows of about `TOKENS_PER_BATCH` tokens, at least one row each."""
    step = max(1, TOKENS_PER_BATCH // length)
    return (slice(start, min(start + step, batch)) for start in range(0, batch, step))


def read_stored(checkpoint: Checkpoint, name: str, device: torch.device) -> Stored:
    """A parameter as the checkpoint holds it, on the host; for a GPU in pinned memory, which it copies fast."""
    module, _, leaf = name.rpartition(".")
    if leaf == "weight" and module in checkpoint.quantized:
        return {part: _staged(tensor, device) for part, tensor in checkpoint.read_packed(module).items()}
    return _staged(checkpoint.read(name), device)


def _staged(tensor: Tensor, device: torch.device) -> Tensor:
    # A tensor on the host is a view of a file: a GPU would wait for the disk and copy it page by page.
    return tensor.pin_memory() if device.type == "cuda" else tensor


def to_host(tensor: Tensor) -> Tensor:
    """A tensor on the host. One from a GPU comes into pinned memory, which torch keeps and uses again."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor) if tensor.is_cuda else tensor


def place_stored(checkpoint: Checkpoint, module: str, stored: Stored, device: torch.device) -> Quantized | Tensor:
    """What `read_stored` gave, on the device: the tensor, or a packed weight's codes, scales and zeros."""
    if isinstance(stored, Tensor):
        return stored.to(device, non_blocking=True)
    packed = checkpoint.quantized[module]
    parts = {part: tensor.to(device, non_blocking=True) for part, tensor in stored.items()}
    return LAYOUTS[packed.layout].decode(parts, packed.group_size)
