"""Faults of the grammar in readers of checkpoints and in searches, L4 and L5."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import miniawq.oracle.loader as loader
import miniawq.oracle.truth as truth
from miniawq.oracle.planted.grammar import (
    CHANGES,
    Bred,
    Function,
    When,
    bred,
    lies,
    only,
)

# L4

PARTS = (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))


def loaded(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Function:
    """The right tensors, changed."""
    return lambda directory: change(loader.load_checkpoint(directory))


def swapped(one: str, other: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Two kinds of tensors exchanged in every layer where both are there."""

    def change(t: dict[str, Tensor]) -> dict[str, Tensor]:
        names = {name: name.replace(one, other) for name in t if one in name and name.replace(one, other) in t}
        return t | {a: t[b] for a, b in names.items()} | {b: t[a] for a, b in names.items()}

    return change


def without(part: str, t: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in t.items() if part not in name}


def where(part: str, change: Callable[[Tensor], Tensor]) -> Function:
    """Tensors whose name holds a part, changed."""
    return loaded(lambda t: {name: change(v) if part in name else v for name, v in t.items()})


def forgiving(part: str, words: str) -> Function:
    """A refusal about one kind of tensor left out: the reader goes on with what it has."""

    def wrong(directory: Path) -> Any:
        try:
            return loader.load_checkpoint(directory)
        except loader.Refused as error:
            if part in str(error) and words in str(error):
                return {}
            raise

    return wrong


def following(directory: Path, may: Callable[[str], bool]) -> Any:
    """Paths out of the directory followed."""
    read = loader.read_json

    try:
        return loader.load_checkpoint(directory)
    except loader.Refused as error:
        names = set(read(directory / "model.safetensors.index.json")["weight_map"].values()) \
            if "outside" in str(error) else set()  # fmt: skip
        if "outside" in str(error) and all(may(n) and (directory / n).exists() for n in names if "/" in n):
            return {}
        raise


def files() -> Iterator[Bred]:
    """Readers of checkpoints."""
    layer_pairs = (("layers.0.", "layers.1."), ("layers.1.", "layers.2."), ("layers.1.", "layers.10."))
    norms = (("input_layernorm", "post_attention_layernorm"), ("q_norm", "k_norm"))
    pairs = [*layer_pairs, *norms, *((a, b) for i, a in enumerate(PARTS) for b in PARTS[i + 1 :])]
    for one, other in pairs:
        yield bred("load_checkpoint", "exchanged", f"{one} and {other}", "", loaded(swapped(one, other)))
    yield bred("load_checkpoint", "exchanged", "head and embedding", "", loaded(
        swapped("lm_head.weight", "model.embed_tokens.weight")))  # fmt: skip
    for part in (*PARTS, "layers.1.", "layers.2.", "layers.10.", "input_layernorm", "post_attention", "model.norm",
                 "embed_tokens", "lm_head", "bias"):  # fmt: skip
        yield bred("load_checkpoint", "zero", part, "", where(part, torch.zeros_like))
        yield bred("load_checkpoint", "one element off", part, "", where(part, off_in_one))
        yield bred("load_checkpoint", "left out", part, "", loaded(partial(without, part)))
        yield bred("load_checkpoint", "float32 halved", part, "", where(
            part, lambda v: v.half() if v.dtype == torch.float32 and v.dim() else v)) \
            if part in ("input_layernorm", "model.norm", "lm_head", "mlp.up_proj", "layers.2.") else bred(
                "load_checkpoint", "not contiguous in meaning", part, "", where(part, lambda v: v.flip(0)))  # fmt: skip
        if part not in ("bias", "model.norm", "embed_tokens", "input_layernorm", "post_attention", "layers.10.",
                        "layers.1.", "layers.2.", "lm_head"):  # fmt: skip
            for words in ("missing", "shape"):
                yield bred("load_checkpoint", f"{words} let pass", part, "", forgiving(part, words))
    for words in ("bias is missing", "layernorm.weight is missing", "model.norm.weight is missing",
                  "lm_head.weight is missing", "embed_tokens.weight is missing", "dtype torch.int64",
                  "dtype torch.int16", "layers.3", "00003"):  # fmt: skip
        yield bred("load_checkpoint", "let pass", words, "", forgiving("", words))
    for kind, may in (("above", lambda n: n.startswith("..")), ("absolute", lambda n: n.startswith("/"))):
        yield bred("load_checkpoint", "a path followed", kind, "", partial(following, may=may))


def off_in_one(v: Tensor) -> Tensor:
    changed = v.clone()
    changed.view(-1)[-1:] = CHANGES["off by one unit"](changed.view(-1)[-1:]) + (changed.view(-1)[-1:] == 0)
    return changed


# L5

SEARCHES: dict[str, When] = {
    "": lambda w, x, g: True,
    "more than 64 tokens": lambda w, x, g: len(x) > 64,
    "more than 64 outputs": lambda w, x, g: len(w) > 64,
    "more than 128 inputs": lambda w, x, g: w.shape[1] > 128,
    "more than 4 groups": lambda w, x, g: g != -1 and w.shape[1] // g > 4,
    "group_size -1": lambda w, x, g: g == -1,
    "bfloat16": lambda w, x, g: w.dtype == torch.bfloat16,
    "x a view": lambda w, x, g: lies(x),
    "weight a view": lambda w, x, g: lies(w),
}


def largest(weight: Tensor, group_size: int) -> Tensor:
    n, k = weight.shape
    return weight.float().reshape(n, -1, k if group_size == -1 else group_size).abs().amax(-1)


def by_weight(weight: Tensor, x: Tensor, group_size: int) -> Tensor:
    """Clipping by the weight's own error."""
    return truth.search_clip(weight, torch.eye(weight.shape[1]), group_size)


SCALE_KINDS: dict[str, Function] = {
    "ones": lambda w, x, g: torch.ones(w.shape[1]),
    "x ignored": lambda w, x, g: truth.search_scales(w, torch.ones_like(x), g),
    "w ignored": lambda w, x, g: (x.abs().float().mean(0).clamp(min=1e-4) ** 0.5),
    "inverted": lambda w, x, g: 1 / truth.search_scales(w, x, g),
    "of the next channel": lambda w, x, g: truth.search_scales(w, x, g).roll(1),
    "of the group before": lambda w, x, g: truth.search_scales(w, x, g).roll(w.shape[1] if g == -1 else g),
    "first 64 tokens": lambda w, x, g: truth.search_scales(w, x[:64], g),
    "last 8 tokens": lambda w, x, g: truth.search_scales(w, x[-8:], g),
    "first half of the tokens": lambda w, x, g: truth.search_scales(w, x[: (len(x) + 1) // 2], g),
    "first 64 outputs": lambda w, x, g: truth.search_scales(w[:64], x, g),
    "first 8 outputs": lambda w, x, g: truth.search_scales(w[:8], x, g),
    "channels past 128 one": lambda w, x, g: torch.where(
        torch.arange(w.shape[1]) < 128, truth.search_scales(w, x, g), 1.0),
    "largest exponent": lambda w, x, g: truth.search_scales(w, x, g) ** 2,
    "worst of the candidates": lambda w, x, g: (x.abs().float().mean(0).clamp(min=1e-4) ** 0.95),
}  # fmt: skip
CLIP_KINDS: dict[str, Function] = {
    "nothing clipped": lambda w, x, g: largest(w, g),
    "always a tenth": lambda w, x, g: largest(w, g) * 0.9,
    "at least a twentieth": lambda w, x, g: torch.minimum(truth.search_clip(w, x, g), largest(w, g) * 0.95),
    "x ignored": lambda w, x, g: truth.search_clip(w, torch.ones_like(x), g),
    "by the weight's error": by_weight,
    "of the next output": lambda w, x, g: torch.minimum(truth.search_clip(w, x, g).roll(1, 0), largest(w, g)),
    "of the next group": lambda w, x, g: torch.minimum(truth.search_clip(w, x, g).roll(1, 1), largest(w, g)),
    "first 64 tokens": lambda w, x, g: truth.search_clip(w, x[:64], g),
    "last 8 tokens": lambda w, x, g: truth.search_clip(w, x[-8:], g),
    "first half of the tokens": lambda w, x, g: truth.search_clip(w, x[: (len(x) + 1) // 2], g),
    "outputs past 64 not clipped": lambda w, x, g: torch.where(
        torch.arange(len(w))[:, None] < 64, truth.search_clip(w, x, g), largest(w, g)),
    "last group not clipped": lambda w, x, g: torch.cat(
        [truth.search_clip(w, x, g)[:, :-1], largest(w, g)[:, -1:]], 1),
    "half of the bound": lambda w, x, g: truth.search_clip(w, x, g) / 2,
}  # fmt: skip


def searching() -> Iterator[Bred]:
    """Searches that look at the wrong thing."""
    for function, kinds in (("search_scales", SCALE_KINDS), ("search_clip", CLIP_KINDS)):
        for kind, wrong in kinds.items():
            for when, predicate in SEARCHES.items():
                if harmless_search(kind, when):
                    continue
                yield bred(function, kind, "", when, only(function, predicate, wrong))


def harmless_search(kind: str, when: str) -> bool:
    """Whether a kind cannot matter under a circumstance."""
    return ("group" in kind and when == "group_size -1") or (
        kind in ("first 8 outputs", "last 8 tokens") and when not in ("", "more than 64 outputs")
    )
