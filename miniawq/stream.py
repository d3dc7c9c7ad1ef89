"""A model one decoder block at a time: what quantizing and evaluating a model larger than the memory have in common."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from miniawq.checkpoint import Checkpoint
from miniawq.errors import InvalidInput
from miniawq.model import DecoderBlock, RMSNorm, attention_mask, dense
from miniawq.packing import Quantized, dequantize
from miniawq.rope import rope_tables

TOKENS_PER_BATCH = 4096


class BlockStream:
    """Reads the blocks of a checkpoint and runs hidden states through them, in float32.

    The linears of an INT4 checkpoint come as the dense weights that their codes stand for. Hidden states stay where the
    caller keeps them; micro-batches of about `TOKENS_PER_BATCH` tokens go to the device.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "cpu") -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.model_config
        self.device = torch.device(device)

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
            hidden_BLD[rows] = embedding_VD[tokens_BL[rows]].to(hidden_BLD.dtype)

    def block(self, layer: int) -> DecoderBlock:
        """One decoder block with its weights, on the device."""
        with torch.device("meta"):
            block = DecoderBlock(self.config, layer, dense)
        for name, module in block.named_modules():
            for leaf in [leaf for leaf, _ in module.named_parameters(recurse=False)]:
                weight = self._read(f"model.layers.{layer}.{name}", leaf)
                setattr(module, leaf, nn.Parameter(weight, requires_grad=False))
        return block

    def _read(self, module: str, leaf: str) -> Tensor:
        if leaf != "weight" or module not in self.checkpoint.quantized:
            return self.checkpoint.read(f"{module}.{leaf}", self.device).float()
        weight = self.checkpoint.read_linear(module, self.device)
        return dequantize(weight, torch.float32) if isinstance(weight, Quantized) else weight.float()

    def run(self, block: DecoderBlock, layer: int, hidden_BLD: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Pairs of rows and the block's outputs for them, on the device."""
        batch, length, _ = hidden_BLD.shape
        positions_L = torch.arange(length, device=self.device)
        rope = rope_tables(self.config.rope, positions_L, length, torch.float32)
        mask = attention_mask(0, length, self.config.layer_windows[layer], None, self.device)
        for rows in micro_batches(batch, length):
            yield rows, block(hidden_BLD[rows].to(self.device, torch.float32), rope, mask)

    def head(self) -> "Head":
        """The final norm and the output matrix."""
        norm = RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        norm.weight = nn.Parameter(self.checkpoint.read("model.norm.weight", self.device).float(), requires_grad=False)
        stored = "lm_head.weight" in self.checkpoint.tensors or "lm_head" in self.checkpoint.quantized
        module, leaf = ("lm_head", "weight") if stored else ("model.embed_tokens", "weight")
        return Head(norm, self._read(module, leaf))


class Head:
    """From hidden states to logits."""

    def __init__(self, norm: nn.Module, weight_VD: Tensor) -> None:
        self.norm, self.weight_VD = norm, weight_VD

    def __call__(self, hidden_TD: Tensor) -> Tensor:
        """logits_TV in float32."""
        return linear(self.norm(hidden_TD.to(self.weight_VD.device, torch.float32)), self.weight_VD)


def micro_batches(batch: int, length: int) -> Iterator[slice]:
    """Slices of rows of about `TOKENS_PER_BATCH` tokens, at least one row each."""
    step = max(1, TOKENS_PER_BATCH // length)
    return (slice(start, min(start + step, batch)) for start in range(0, batch, step))
