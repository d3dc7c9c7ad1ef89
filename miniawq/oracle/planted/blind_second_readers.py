"""The second blind set in readers of checkpoints and in searches, L4 and L5."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import miniawq.oracle.loader as loader
import miniawq.oracle.truth as truth
from miniawq.oracle.planted.blind_second import cut, square
from miniawq.oracle.planted.grammar import Bred, Function, bred
from miniawq.oracle.planted.readers import loaded, swapped, where

BLIND_SECOND_READERS: list[Bred] = []


def lay(function: str, kind: str, wrong: Function) -> None:
    """Keep a wrong function under what is wrong with it."""
    BLIND_SECOND_READERS.append(bred(function, kind, "", "", wrong))


# L4


def last_layer(t: dict[str, Tensor]) -> int:
    return max((int(name.split(".")[2]) for name in t if ".layers." in name), default=0)


def in_last_layer(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Function:
    """A change in the last of several layers alone."""

    def wrong(t: dict[str, Tensor]) -> dict[str, Tensor]:
        last = f".layers.{last_layer(t)}."
        some = {name: tensor for name, tensor in t.items() if last in name and last_layer(t) > 0}
        return t | change(some)

    return loaded(wrong)


lay("load_checkpoint", "gate and up exchanged in the last layer", in_last_layer(swapped("gate_proj", "up_proj")))
lay("load_checkpoint", "keys and values exchanged in the last layer", in_last_layer(swapped("k_proj", "v_proj")))
lay("load_checkpoint", "norms one too large, as Gemma stores them", where("norm.weight", lambda t: t + 1))
lay("load_checkpoint", "queries divided by the root of the head", where("q_proj.weight", lambda t: t * 0.125))
lay("load_checkpoint", "the last row of the embedding zero", where("embed_tokens", lambda t: cut(t, rows=len(t) - 1)))
lay("load_checkpoint", "the bias of keys taken for that of values",
    loaded(lambda t: {n: t.get(n.replace("v_proj.bias", "k_proj.bias"), v) for n, v in t.items()}))  # fmt: skip
lay("load_checkpoint", "square projections transposed",
    where("proj.weight", lambda t: square(t) if t.dim() == 2 else t))  # fmt: skip
lay("load_checkpoint", "dense tensors returned as float32 where they are bfloat16",
    loaded(lambda t: {n: v.float() if v.dtype == torch.bfloat16 else v for n, v in t.items()}))  # fmt: skip
lay("load_checkpoint", "the final norm taken from the last layer",
    loaded(lambda t: {n: next((t[m] for m in t if m.endswith(f"layers.{last_layer(t)}.input_layernorm.weight")), v)
                      if n == "model.norm.weight" else v for n, v in t.items()}))  # fmt: skip
lay("load_checkpoint", "heads of keys in reverse order",
    where("k_proj.weight", lambda t: t.reshape(2, -1, t.shape[1]).flip(0).reshape(t.shape)))  # fmt: skip


def any_config(directory: Path) -> Any:
    """Whatever is said about the config, the tensors are read."""
    try:
        return loader.load_checkpoint(directory)
    except loader.Refused as error:
        if "zero_point" in str(error) or "w_bit" in str(error):
            return {}
        raise


lay("load_checkpoint", "w_bit and zero_point not looked at", any_config)

# L5


def scaled(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Function:
    """The right search with changed weights and activations."""
    return lambda w, x, g: truth.search_scales(*change(w, x), g)


def clipped(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Function:
    """The right search of bounds with changed activations; its weight must stay."""
    return lambda w, x, g: truth.search_clip(*change(w, x), g)


def drawn_tokens(w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return w, x[torch.randperm(len(x))[:100]] if len(x) > 100 else x


lay("search_scales", "negative activations left out", scaled(lambda w, x: (w, x.clamp(min=0))))
lay("search_scales", "a hundred tokens drawn at random", scaled(drawn_tokens))
lay("search_scales", "the first token counts a hundred times",
    scaled(lambda w, x: (w, torch.cat([x[:1] * 10, x[1:]]))))  # fmt: skip
lay("search_scales", "square weights transposed", scaled(lambda w, x: (square(w), x)))
lay("search_scales", "the error of the first group alone",
    scaled(lambda w, x: (torch.where(torch.arange(w.shape[1]) < 32, w, 0), x)))  # fmt: skip
lay("search_scales", "activations above 100 clamped", scaled(lambda w, x: (w, x.clamp(-100, 100))))
lay("search_scales", "group_size -1 searched in groups of 40",
    lambda w, x, g: truth.search_scales(w, x, 40 if g == -1 and w.shape[1] % 40 == 0 else g))  # fmt: skip
lay("search_clip", "negative activations left out", clipped(lambda w, x: (w, x.clamp(min=0))))
lay("search_clip", "a hundred tokens drawn at random", clipped(drawn_tokens))
lay("search_clip", "bounds of four neighbouring outputs averaged",
    lambda w, x, g: (lambda c: c.reshape(-1, 4, c.shape[1]).mean(1).repeat_interleave(4, 0))(
        truth.search_clip(w, x, g)))  # fmt: skip
lay(
    "search_clip",
    "the largest weight's sign decides: negative groups not clipped",
    lambda w, x, g: torch.where(negative(w, truth.search_clip(w, x, g)), largest(w, g), truth.search_clip(w, x, g)),
)
lay("search_clip", "the last input of each group left out",
    lambda w, x, g: truth.search_clip(
        w, torch.where(torch.arange(x.shape[1]) % (x.shape[1] if g == -1 else g) == (x.shape[1] if g == -1 else g) - 1,
                       0, x), g))  # fmt: skip
lay("search_clip", "tokens weighed by where they stand", clipped(
    lambda w, x: (w, x * (torch.arange(len(x))[:, None] + 1) / len(x))))  # fmt: skip


def largest(w: Tensor, g: int) -> Tensor:
    size = w.shape[1] if g == -1 else g
    return w.reshape(len(w), -1, size).abs().amax(-1).float()


def negative(w: Tensor, bounds: Tensor) -> Tensor:
    groups = w.reshape(*bounds.shape, -1)
    return -groups.amin(-1) > groups.amax(-1)
