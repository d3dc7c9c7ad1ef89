"""The blind set's faults in readers of checkpoints and in searches (`blind`)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import miniawq.oracle.loader as loader
import miniawq.oracle.truth as truth
from miniawq.oracle.planted.grammar import Bred, Function, bred

BLIND_READERS: list[Bred] = []


def lay(name: str, kind: str, change: Callable[..., Any]) -> None:
    """Keep a wrong function under what is wrong with it."""
    BLIND_READERS.append(bred(name, kind, "", "", change))


# L4


def changed(change: Callable[[dict[str, Tensor]], Any]) -> Function:
    """The right tensors, changed."""

    def wrong(directory: Path) -> dict[str, Tensor]:
        loaded = loader.load_checkpoint(directory)
        return change(dict(loaded)) or loaded

    return wrong


def lenient(words: str) -> Function:
    """A refusal in which these words stand, left out."""

    def wrong(directory: Path) -> dict[str, Tensor]:
        try:
            return loader.load_checkpoint(directory)
        except loader.Refused as error:
            if words in str(error):
                return {}
            raise

    return wrong


def renumbered(t: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layers numbered in the order of their names as text."""
    numbers = {name.split(".")[2] for name in t if name.startswith("model.layers.")}
    places = dict(zip(sorted(numbers), sorted(numbers, key=int), strict=True))

    def name_of(name: str) -> str:
        parts = name.split(".")
        return ".".join([*parts[:2], places[parts[2]], *parts[3:]]) if name.startswith("model.layers.") else name

    return {name_of(name): tensor for name, tensor in t.items()}


lay("load_checkpoint", "layers in the order of their names as text", changed(renumbered))
lay(
    "load_checkpoint",
    "biases in float32",
    changed(lambda t: {n: v.float() if n.endswith("bias") else v for n, v in t.items()}),
)
lay(
    "load_checkpoint",
    "the embedding as head",
    changed(lambda t: t | ({"lm_head.weight": t["model.embed_tokens.weight"]} if "lm_head.weight" in t else {})),
)
lay("load_checkpoint", "missing biases let pass", lenient("bias is missing"))
lay("load_checkpoint", "missing norms let pass in later layers", lenient("1.input_layernorm.weight is missing"))
lay("load_checkpoint", "missing zeros let pass in later layers", lenient("layers.1.mlp.up_proj.qzeros is missing"))
lay("load_checkpoint", "another group size let pass in the last layer", lenient("layers.2.mlp.down_proj"))
lay("load_checkpoint", "a truncated third shard let pass", lenient("00003"))
lay(
    "load_checkpoint",
    "norms of queries and keys exchanged",
    changed(
        lambda t: (
            t
            | {
                n: t[n.replace("q_norm", "zz").replace("k_norm", "q_norm").replace("zz", "k_norm")]
                for n in t
                if "q_norm" in n or "k_norm" in n
            }
        )
    ),
)
lay(
    "load_checkpoint",
    "bfloat16 embeddings in float16",
    changed(lambda t: {n: v.half() if "embed" in n else v for n, v in t.items()}),
)
lay(
    "load_checkpoint",
    "float32 norms in bfloat16",
    changed(lambda t: {n: v.bfloat16() if v.dtype == torch.float32 and "norm" in n else v for n, v in t.items()}),
)
lay(
    "load_checkpoint",
    "the last eight outputs of up_proj zero",
    changed(lambda t: {n: torch.cat([v[:-8], 0 * v[-8:]]) if "up_proj.weight" in n else v for n, v in t.items()}),
)
lay(
    "load_checkpoint",
    "layers past the ninth from the ninth",
    changed(lambda t: {n: t.get(n.replace("layers.10.", "layers.9."), v) for n, v in t.items()}),
)
lay(
    "load_checkpoint",
    "a dense projection transposed where it lies among packed ones",
    changed(
        lambda t: {
            n: v.t() if n == "model.layers.2.self_attn.o_proj.weight" and v.shape == (96, 64) else v
            for n, v in t.items()
        }
    ),
)
lay("load_checkpoint", "every wrong dtype let pass", lenient("dtype"))
lay(
    "load_checkpoint",
    "tensors of the third shard zero",
    changed(lambda t: {n: 0 * v if n == sorted(t)[-1] else v for n, v in t.items()}),
)

# L5

lay("search_scales", "every second token", lambda w, x, g: truth.search_scales(w, x[::2], g))
lay("search_scales", "every second output", lambda w, x, g: truth.search_scales(w[::2], x, g))
lay("search_scales", "factors of at most 4", lambda w, x, g: truth.search_scales(w, x, g).clamp(max=4))
lay(
    "search_scales",
    "an exponent of a half up to 128 tokens",
    lambda w, x, g: truth.search_scales(w, x, g) if (len(x) > 128) else x.float().abs().mean(0).clamp(min=1e-4) ** 0.5,
)
lay("search_scales", "candidates compared by the weight's error", lambda w, x, g: by_weights(w, x, g))
lay(
    "search_scales",
    "a running mean that forgets old tokens",
    lambda w, x, g: truth.search_scales(w, x * (0.9 ** torch.arange(len(x)).flip(0))[:, None].to(x.dtype), g),
)
lay(
    "search_scales",
    "statistics of the largest token",
    lambda w, x, g: truth.search_scales(w, x[x.float().abs().sum(1).argmax()][None], g),
)
lay(
    "search_scales",
    "the last channel left out",
    lambda w, x, g: torch.cat([truth.search_scales(w, x, g)[:-1], torch.ones(1)]),
)
lay("search_scales", "outputs past 128 left out", lambda w, x, g: truth.search_scales(w[:128], x, g))
lay("search_scales", "half-precision statistics", lambda w, x, g: truth.search_scales(w, (x.half() ** 2).sqrt(), g))
lay("search_clip", "the first 32 tokens", lambda w, x, g: truth.search_clip(w, x[:32], g))
lay(
    "search_clip",
    "one bound for all groups of an output",
    lambda w, x, g: torch.minimum(truth.search_clip(w, x, g).amax(1, keepdim=True), magnitudes(w, g)),
)
lay(
    "search_clip",
    "clipped in the first group alone",
    lambda w, x, g: torch.cat([truth.search_clip(w, x, g)[:, :1], magnitudes(w, g)[:, 1:]], 1),
)
lay(
    "search_clip",
    "never below nine tenths",
    lambda w, x, g: torch.maximum(truth.search_clip(w, x, g), 0.9 * magnitudes(w, g)),
)
lay(
    "search_clip",
    "the mean of the outputs' errors",
    lambda w, x, g: truth.search_clip(w, x.float().mean(0, keepdim=True), g),
)
lay("search_clip", "a step too far", lambda w, x, g: truth.search_clip(w, x, g) * 0.95)
lay(
    "search_clip",
    "activations of the group before",
    lambda w, x, g: truth.search_clip(w, x.roll(g if g > 0 else 1, 1), g),
)
lay("search_clip", "every second token", lambda w, x, g: truth.search_clip(w, x[::2], g))
lay("search_clip", "signs of activations lost", lambda w, x, g: truth.search_clip(w, x.abs(), g))


def by_weights(w: Tensor, x: Tensor, g: int) -> Tensor:
    """The candidates are right, their loss is that of the weight."""
    size = x.double().abs().mean(0).clamp(min=1e-4)
    candidates = [size ** (i / 20) for i in range(20)]
    losses = [truth.scaled_loss(w, torch.eye(len(size)), c, g) for c in candidates]
    return candidates[losses.index(min(losses))].float()


def magnitudes(w: Tensor, g: int) -> Tensor:
    n, k = w.shape
    return w.float().reshape(n, -1, k if g == -1 else g).abs().amax(-1)
