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
from torch.nn.functional import linear

from miniawq.awq import Fold
from miniawq.checkpoint.blocks import BlockStream, Part
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
    """What a fold's layers read in one call, and the residual stream that they add to."""

    x_TI: Tensor = field(default_factory=lambda: torch.empty(0))
    residual_TO: Tensor = field(default_factory=lambda: torch.zeros(()))


class Reached(Exception):
    """A fold's layers are next: what the block would do from here on is not looked at."""


def up_to(part: Part) -> Part:
    """A part of a block that ends where it is `Reached`."""

    def run(h_BLD: Tensor, *rest: Any) -> Tensor:
        with suppress(Reached):
            part(h_BLD, *rest)
        return h_BLD

    return run


@contextmanager
def watched(block: DecoderBlock, fold: Fold) -> Iterator[Seen]:
    """What a block shows of a fold in its latest call, which ends there."""
    seen, first, readers = Seen(), fold.balance_layers[0], residual_readers(block.config)

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.x_TI = arguments[0].flatten(0, -2)
        raise Reached

    def keep_residual(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.residual_TO = arguments[0].flatten(0, -2)

    handles = [block.get_submodule(first).register_forward_pre_hook(keep)]
    if first in readers:
        handles.append(block.get_submodule(readers[first]).register_forward_pre_hook(keep_residual))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def nothing(block: DecoderBlock, layer: int) -> None:
    """What is not written needs no rounding."""


@dataclass
class Streams:
    """The hidden states in front of a block, or between its attention and its MLP: what the dense blocks make, and what
    the quantized ones make. `settle` rounds what of a block stays dense as its file will hold it.
    """

    stream: BlockStream
    dense_BLD: Tensor
    quantized_BLD: Tensor
    settle: Callable[[DecoderBlock, int], None] = nothing
    folded: DecoderBlock | None = None  # the dense block, its factors folded
    attended: bool = False

    def begin(self, hidden_BLD: Tensor) -> None:
        """Keep the dense hidden states in front of the next block."""
        self.dense_BLD.copy_(hidden_BLD)
        self.folded = None

    def follow(self, block: DecoderBlock, layer: int) -> None:
        """Move the other hidden states on to the outputs of a block as it is written."""
        self.stream.advance(self._rest_of(block), layer, self.quantized_BLD)
        self.attended = False

    def aims(self, block: DecoderBlock, layer: int, fold: Fold) -> dict[str, Aim]:
        """What each layer of a fold is to give. The layers before it are rounded already, and itself is not."""
        if self.folded is None:
            self.folded = copy.deepcopy(block)
            self.settle(block, layer)
        first = fold.balance_layers[0]
        if not first.startswith("self_attn.") and not self.attended:
            self.stream.advance(self.folded.attend, layer, self.dense_BLD)
            self.stream.advance(block.attend, layer, self.quantized_BLD)
            self.attended = True
        weights = {name: block.get_parameter(f"{name}.weight").data for name in fold.balance_layers}
        aims = {name: Aim(weight_OI) for name, weight_OI in weights.items()}
        shared = SymmetricStatistics(weights[first].shape[1], self.stream.device)
        with watched(self.folded, fold) as dense, watched(block, fold) as ours:
            dense_runs = self.stream.run(up_to(self._rest_of(self.folded)), layer, self.dense_BLD)
            our_runs = self.stream.run(up_to(self._rest_of(block)), layer, self.quantized_BLD)
            for _ in zip(dense_runs, our_runs, strict=True):
                shared.add(ours.x_TI)
                # The weight is the same in both blocks, and so is a bias but for its rounding.
                moved_TI, lost_TO = ours.x_TI - dense.x_TI, ours.residual_TO - dense.residual_TO
                for name, aim in aims.items():
                    aim.miss(ours.x_TI, linear(moved_TI, weights[name]) + lost_TO)
        shared.finish()
        return {name: aim.over(shared) for name, aim in aims.items()}

    def _rest_of(self, block: DecoderBlock) -> Part:
        return (lambda h_BLD, *_: block.feed(h_BLD)) if self.attended else block
