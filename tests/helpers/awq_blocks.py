"""A decoder block with text in front of it, and layers with inputs, for tests of the searches."""

import torch
from torch import Tensor

from miniawq import awq
from miniawq.awq import FactorSearch, Fold, QuantizedLayer, Statistics, llama_folds
from miniawq.model import DecoderBlock, LlamaConfig
from miniawq.quantize.recipes import Recipe
from tests.helpers.tiny_checkpoints import config_of, dense_model


class Block:
    """A decoder block with some text in front of it."""

    def __init__(self, family: str = "llama", dtype: torch.dtype = torch.float32, rows: int = 3) -> None:
        model = dense_model(config_of(family)).to(dtype)
        self.config: LlamaConfig = model.config
        self.block: DecoderBlock = model.model.layers[0]
        self.folds = llama_folds(model.config)
        self.hidden_BLD = torch.randn(rows, 7, model.config.hidden_size, dtype=dtype) * channel_spread(128).to(dtype)
        ropes, masks = model.model.positions(0, 7, 7, None)
        self.rope = ropes[model.config.layer_ropes[0]]
        self.mask = masks[model.config.layer_windows[0]]

    def run(self) -> Tensor:
        return self.block(self.hidden_BLD, self.rope, self.mask)

    def observed(self, kind: type[Statistics] = Statistics) -> dict[Fold, Statistics]:
        with awq.observe(self.block, self.folds, kind=kind) as statistics:
            for row_1LD in self.hidden_BLD.split(1):
                self.block(row_1LD, self.rope, self.mask)
        return statistics

    def quantized(self, recipe: Recipe) -> tuple[list[FactorSearch], dict[str, QuantizedLayer]]:
        return awq.quantize_block(self.block, self.observed(), recipe.rounding, recipe.method, torch.float16)


def channel_spread(channels: int) -> Tensor:
    """Magnitudes with a few large ones, as in trained models."""
    spread = torch.rand(channels, generator=torch.Generator().manual_seed(1)) + 0.1
    spread[:3] *= 20
    return spread


def layer_and_inputs(seed: int, outputs: int = 24, inputs: int = 64, tokens: int = 50) -> tuple[Tensor, Tensor]:
    """A weight [O, I] and correlated inputs [T, I]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) * 0.3 + torch.eye(inputs)
    x_TI = torch.randn(tokens, inputs, generator=generator) @ mix * channel_spread(inputs)
    weight_OI = torch.randn(outputs, inputs, generator=generator) ** 3 / 10
    return weight_OI, x_TI


def statistics_of(x_TI: Tensor, kind: type[Statistics] = Statistics) -> Statistics:
    statistics = kind(x_TI.shape[1])
    statistics.add(x_TI)
    statistics.finish()
    return statistics
