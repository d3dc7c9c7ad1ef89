"""Rotary position embedding: what config.json says about it, and the angles that follow.

Each pair of channels (e, e + E/2) of a query or key is turned by position * frequency_e. The types differ in how they
lower the frequencies for texts longer than the model was trained on.

Shapes: B batch, L positions, H heads, E size of one head, P pairs of its channels (E / 2).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from miniawq.errors import UnsupportedCheckpoint


def refuse(key: str, value: object, why: str) -> NoReturn:
    """Raise the UnsupportedCheckpoint of a config.json that asks for what is not implemented."""
    raise UnsupportedCheckpoint(
        "this model's config.json asks for something that is not implemented",
        f"config.json: {key} = {value!r}; {why}",
        "ignoring it would give wrong text; use another model, or an engine that supports this one",
    )


def integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer of config.json; null counts as missing, and missing without a default is refused."""
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        refuse(key, None, "the key is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        refuse(key, value, "expected a positive integer")
    return value


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: `rope_scaling` (transformers 4) or `rope_parameters` (5), all defaults filled in."""

    rope_type: str
    rope_theta: float
    head_dim: int
    max_position_embeddings: int
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], head_dim: int) -> "RopeConfig":
        """Read both spellings; UnsupportedCheckpoint on an unknown type, which would give wrong text."""
        key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
        given = dict(config.get(key) or {})
        if nested := [value for value in given.values() if isinstance(value, dict)]:
            if any(value != nested[0] for value in nested):
                refuse(key, given, "layers with different rotary embeddings")
            given = nested[0]
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in INVERSE_FREQUENCIES:
            refuse(f"{key}.rope_type", kind, "supported: " + ", ".join(INVERSE_FREQUENCIES))
        if (partial := given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) != 1.0:
            refuse("partial_rotary_factor", partial, "only whole heads are rotated")
        if kind != "default" and not isinstance(given.get("factor"), int | float):
            refuse(f"{key}.factor", given.get("factor"), f"rope_type {kind} needs it")
        longest = integer(config, "max_position_embeddings", config.get("max_sequence_length", 2048))
        original = given.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
        numbers = {
            name: float(given[name])
            for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
            if given.get(name) is not None
        }
        return cls(
            rope_type=kind,
            rope_theta=float(given.get("rope_theta", config.get("rope_theta") or 10000.0)),
            head_dim=head_dim,
            max_position_embeddings=longest,
            original_max_position_embeddings=original or longest,
            truncate=given.get("truncate", True),
            attention_factor=_yarn_attention_factor(given) if kind == "yarn" else 1.0,
            **numbers,
        )


def _yarn_attention_factor(given: Mapping[str, Any]) -> float:
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(given["factor"]) + 1.0 if given["factor"] > 1 else 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return mscale(given["mscale"]) / mscale(given["mscale_all_dim"])
    return mscale(1.0)


def _plain_frequencies(rope: RopeConfig, theta: float) -> Tensor:
    return theta ** -(torch.arange(0, rope.head_dim, 2, dtype=torch.float32) / rope.head_dim)


def _default(rope: RopeConfig, length: int) -> Tensor:
    return _plain_frequencies(rope, rope.rope_theta)


def _linear(rope: RopeConfig, length: int) -> Tensor:
    return _plain_frequencies(rope, rope.rope_theta) / rope.factor


def _dynamic(rope: RopeConfig, length: int) -> Tensor:
    """NTK scaling: the base grows once the text is longer than the model was trained for."""
    ratio = max(length, rope.max_position_embeddings) / rope.max_position_embeddings
    growth = rope.factor * ratio - (rope.factor - 1)
    return _plain_frequencies(rope, rope.rope_theta * growth ** (rope.head_dim / (rope.head_dim - 2)))


def _llama3(rope: RopeConfig, length: int) -> Tensor:
    """Long waves are stretched by `factor`, short ones kept, those between interpolated."""
    plain = _plain_frequencies(rope, rope.rope_theta)
    turns = rope.original_max_position_embeddings * plain / (2 * math.pi)
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return keep * plain + (1 - keep) * plain / rope.factor


def _yarn(rope: RopeConfig, length: int) -> Tensor:
    """YaRN (arXiv 2309.00071): interpolate the channels that turn less than `beta_slow` times in the trained length."""

    def channel(turns: float) -> float:
        wave = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return rope.head_dim * math.log(wave) / (2 * math.log(rope.rope_theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.head_dim - 1)
    ramp = (torch.arange(rope.head_dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)
    plain, stretch = _plain_frequencies(rope, rope.rope_theta), ramp.clamp(0, 1)
    return plain * (1 - stretch) + plain / rope.factor * stretch


INVERSE_FREQUENCIES: dict[str, Callable[[RopeConfig, int], Tensor]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}

Rope = tuple[Tensor, Tensor]


def rope_tables(rope: RopeConfig, positions_L: Tensor, length: int, dtype: torch.dtype) -> Rope:
    """cos_LE and sin_LE of the angles at each position; `length` is that of the whole text so far."""
    frequencies_P = INVERSE_FREQUENCIES[rope.rope_type](rope, length).to(positions_L.device)
    angles_LE = torch.outer(positions_L.float(), frequencies_P).repeat(1, 2)
    factor = rope.attention_factor
    return (angles_LE.cos() * factor).to(dtype), (angles_LE.sin() * factor).to(dtype)


def apply_rope(x_BHLE: Tensor, rope: Rope) -> Tensor:
    """Turn each pair (channel e, channel e + E/2) by its angle."""
    cos_LE, sin_LE = rope
    first, second = x_BHLE.chunk(2, dim=-1)
    return x_BHLE * cos_LE + torch.cat((-second, first), dim=-1) * sin_LE
