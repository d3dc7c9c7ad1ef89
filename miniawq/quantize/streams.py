"""Two streams of hidden states: what the dense blocks make of the text, and what the blocks make that are written.

The layers of a block are to give what those of the dense model give, from the inputs that the quantized model has for
them. `o_proj` and `down_proj`, which add to the residual stream, are to give back what this has lost so far too.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from miniawq.awq import Fold
from miniawq.checkpoint.blocks import BlockStream
from miniawq.model import DecoderBlock, LlamaConfig
from miniawq.quantize.moments import SymmetricStatistics


def residual_readers(config: LlamaConfig) -> dict[str, str]:
    """The layers whose outputs add to the residual stream as they are, with the norm that reads the stream before."""
    names = config.names
    if names.after_attention or names.after_mlp or config.residual_multiplier != 1:
        return {}
    assert names.before_attention
    assert names.before_mlp
    return {"self_attn.o_proj": names.before_attention, f"{names.mlp}.{names.down}": names.before_mlp}


class Aim(SymmetricStatistics):
    """What a layer sees in the quantized model, and what it is to give: d = W x' - y is its distance from that.

    pull_OI is mean(d x'^T), missed_O the mean of d^2: what the layer loses without an error of its own.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__(0, weight_OI.device)  # `over` has the moments
        self.pull_OI = torch.zeros_like(weight_OI)
        self.missed_O = weight_OI.new_zeros(len(weight_OI))

    @property
    def usable(self) -> bool:
        return super().usable and bool(self.pull_OI.isfinite().all())

    def miss(self, x_TI: Tensor, distance_TO: Tensor) -> None:
        self.pull_OI.addmm_(distance_TO.t(), x_TI)
        self.missed_O += distance_TO.square().sum(0)

    def over(self, seen: SymmetricStatistics) -> "Aim":
        """Turn sums into means over the inputs seen, which the layers of a fold share."""
        self.tokens, self.moments_II, self.magnitude_I = seen.tokens, seen.moments_II, seen.magnitude_I
        self.pull_OI /= seen.tokens
        self.missed_O /= seen.tokens
        return self

    def losses(self, error_OI: Tensor) -> Tensor:
        """The mean of (E x' + d)^2 for each output, [O]."""
        return super().losses(error_OI) + 2 * (error_OI * self.pull_OI).sum(1) + self.missed_O


@dataclass
class Seen:
    """One call of a fold's layers: their inputs, their outputs, and the residual stream that they add to."""

    x_TI: Tensor = field(default_factory=lambda: torch.empty(0))
    residual_TO: Tensor = field(default_factory=lambda: torch.zeros(()))
    outputs: dict[str, Tensor] = field(default_factory=dict)


class Reached(Exception):
    """All layers of a fold were called: what the block would do after them is not looked at."""


class UpTo(nn.Module):
    """A block that ends where it is `Reached`."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, h_BLD: Tensor, *rest: Any) -> Tensor:
        with suppress(Reached):
            self.block(h_BLD, *rest)
        return h_BLD


@contextmanager
def watched(block: DecoderBlock, fold: Fold) -> Iterator[Seen]:
    """What a block shows of a fold in its latest call, which ends there."""
    seen, handles, readers = Seen(), [], residual_readers(block.config)

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            seen.x_TI, seen.outputs[name] = arguments[0].flatten(0, -2), output.flatten(0, -2)
            if name == fold.balance_layers[-1]:
                raise Reached

        return hook

    def keep_residual(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.residual_TO = arguments[0].flatten(0, -2)

    for name in fold.balance_layers:
        handles.append(block.get_submodule(name).register_forward_hook(keep(name)))
        if name in readers:
            handles.append(block.get_submodule(readers[name]).register_forward_pre_hook(keep_residual))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Streams:
    """The hidden states in front of a block: the dense ones, which are kept, and those of the quantized blocks."""

    stream: BlockStream
    dense_BLD: Tensor
    quantized_BLD: Tensor
    folded: DecoderBlock | None = None  # the dense block, its factors folded

    def begin(self, hidden_BLD: Tensor) -> None:
        """Keep the dense hidden states in front of the next block."""
        self.dense_BLD.copy_(hidden_BLD)
        self.folded = None

    def follow(self, block: DecoderBlock, layer: int) -> None:
        """Move the other hidden states on to the outputs of a block as it is written."""
        for rows, output_BLD in self.stream.run(block, layer, self.quantized_BLD):
            self.quantized_BLD[rows] = output_BLD.to(self.quantized_BLD.device)

    def aims(self, block: DecoderBlock, layer: int, fold: Fold) -> dict[str, Aim]:
        """What each layer of a fold is to give. The layers before it are rounded already, and itself is not."""
        self.folded = self.folded or copy.deepcopy(block)
        aims = {name: Aim(block.get_parameter(f"{name}.weight").data) for name in fold.balance_layers}
        shared = SymmetricStatistics(aims[fold.balance_layers[0]].pull_OI.shape[1], self.stream.device)
        with watched(self.folded, fold) as dense, watched(block, fold) as ours:
            dense_runs = self.stream.run(UpTo(self.folded), layer, self.dense_BLD)
            for _ in zip(dense_runs, self.stream.run(UpTo(block), layer, self.quantized_BLD), strict=True):
                shared.add(ours.x_TI)
                for name, aim in aims.items():
                    wanted_TO = dense.outputs[name] + dense.residual_TO - ours.residual_TO
                    aim.miss(ours.x_TI, ours.outputs[name] - wanted_TO)
        shared.finish()
        return {name: aim.over(shared) for name, aim in aims.items()}
