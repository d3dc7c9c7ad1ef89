"""Chapter 4: Llama and the families that are Llama with a few switches, as one decoder.

A family is a row of the table in `checkpoint/families.py`, and `checkpoint/config.py` reads its switches from
`config.json` into a `LlamaConfig`. Modules have the names that the family gives them (`Names`), so a checkpoint loads
with no renaming. The linear layers are made by a function that is passed in; this file knows no quantizer.

Shapes: B batch, L positions in this call, M positions in the cache, D model width, F feed-forward width, V vocabulary,
H query heads, J key/value heads, E size of one head, N layers.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad, rms_norm, scaled_dot_product_attention, silu


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, all defaults filled in; the first `rotary_dim` channels of a head are turned."""

    rope_type: str
    rope_theta: float
    head_dim: int
    rotary_dim: int
    max_position_embeddings: int
    interleaved: bool = False
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    llama_4_scaling_beta: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Names:
    """What a family calls the layers of a block. Norms before and after attention and MLP are None where it has none.

    One name for several linear layers is one matrix that makes the outputs of all, in this order.
    """

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    q_norm: str = "q_norm"
    k_norm: str = "k_norm"
    mlp: str = "mlp"
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"


# Norms of queries and keys: of each head, before or after it is turned, or of all heads of a position together.
QKNorm = Literal["none", "heads", "turned heads", "all heads"]


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """What decides the decoder's computation, mostly under the names of `config.json`; from `qkv_bias` on switches."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: QKNorm
    head_dim: int
    layer_windows: tuple[int | None, ...]
    rope: RopeConfig
    layer_ropes: tuple[RopeConfig, ...]
    names: Names = Names()
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    hidden_act: str = "silu"
    norm_offset: float = 0.0
    kv_cache_dtype: torch.dtype | None = None  # chosen by the caller; None is that of activations


# Rotary position embedding (RoFormer, arXiv 2104.09864): pair i of the channels of a query or key, (i, i + R/2) or
# (2 i, 2 i + 1) of the first R, is turned by position * frequency_i. The types differ in how they lower the frequencies
# for texts longer than the training texts.


def default_frequencies(rope: RopeConfig, length: int) -> Tensor:
    """As trained: theta^(-2 i / R) for pair i, float32 [R/2]."""
    return rope.rope_theta ** -(torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim)


def linear_frequencies(rope: RopeConfig, length: int) -> Tensor:
    """Position interpolation (arXiv 2306.15595): all frequencies divided by `factor`."""
    return default_frequencies(rope, length) / rope.factor


def dynamic_frequencies(rope: RopeConfig, length: int) -> Tensor:
    """NTK scaling: theta grows once the text is longer than the training texts."""
    ratio = max(length, rope.max_position_embeddings) / rope.max_position_embeddings
    growth = rope.factor * ratio - (rope.factor - 1)
    theta = rope.rope_theta * growth ** (rope.rotary_dim / (rope.rotary_dim - 2))
    return default_frequencies(replace(rope, rope_theta=theta), length)


def llama3_frequencies(rope: RopeConfig, length: int) -> Tensor:
    """Llama 3.1: low frequencies are divided by `factor`, high ones are kept, those between are interpolated."""
    plain = default_frequencies(rope, length)
    turns = rope.original_max_position_embeddings * plain / (2 * math.pi)
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return keep * plain + (1 - keep) * plain / rope.factor


def yarn_frequencies(rope: RopeConfig, length: int) -> Tensor:
    """YaRN (arXiv 2309.00071): channels that turn less than `beta_slow` times in the trained length are interpolated,
    those that turn more than `beta_fast` times are kept.
    """

    def channel(turns: float) -> float:
        wave = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return rope.rotary_dim * math.log(wave) / (2 * math.log(rope.rope_theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    ramp = (torch.arange(rope.rotary_dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)
    plain, stretch = default_frequencies(rope, length), ramp.clamp(0, 1)
    return plain * (1 - stretch) + plain / rope.factor * stretch


def long_frequencies(rope: RopeConfig, length: int) -> Tensor:
    """LongRoPE (arXiv 2402.13753): each frequency has a divisor of its own, and another one in long texts."""
    divisors = rope.long_factor if length > rope.original_max_position_embeddings else rope.short_factor
    return default_frequencies(rope, length) / torch.tensor(divisors)


INVERSE_FREQUENCIES: dict[str, Callable[[RopeConfig, int], Tensor]] = {
    "default": default_frequencies,
    "linear": linear_frequencies,
    "dynamic": dynamic_frequencies,
    "llama3": llama3_frequencies,
    "yarn": yarn_frequencies,
    "longrope": long_frequencies,
}

Rope = tuple[Tensor, ...]  # cos, sin, and by what queries are multiplied where they grow with their position
Ropes = Mapping[RopeConfig, Rope]
Masks = Mapping[int | None, Tensor | None]


def rope_tables(rope: RopeConfig, positions: Tensor, length: int, dtype: torch.dtype) -> Rope:
    """cos and sin [..., E] of the angles at positions [...]; `length` counts all positions that there may be.

    The sine of a pair's first channel is negated: both channels are turned by x cos + partner sin. Where queries grow
    (Llama 4, Ministral 3), also 1 + beta log(1 + position // original context), [..., 1].
    """
    frequencies = INVERSE_FREQUENCIES[rope.rope_type](rope, length).to(positions.device)
    angles = positions.float().unsqueeze(-1) * frequencies
    cos, sin = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
    place, kept = -1 if rope.interleaved else -2, (0, rope.head_dim - rope.rotary_dim)
    cos = pad(torch.stack((cos, cos), place).flatten(-2), kept, value=1.0)
    sin = pad(torch.stack((-sin, sin), place).flatten(-2), kept)
    if not rope.llama_4_scaling_beta:
        return cos.to(dtype), sin.to(dtype)
    contexts = positions.unsqueeze(-1) // rope.original_max_position_embeddings
    return cos.to(dtype), sin.to(dtype), (1 + rope.llama_4_scaling_beta * contexts.log1p()).to(dtype)


def partners(x: Tensor, rope: RopeConfig) -> Tensor:
    """In the place of each channel of x [..., E] the other one of its pair; those that are not turned stay."""
    pairs = (rope.rotary_dim // 2, 2) if rope.interleaved else (2, rope.rotary_dim // 2)
    swapped = x[..., : rope.rotary_dim].unflatten(-1, pairs).flip(-1 if rope.interleaved else -2).flatten(-2)
    return swapped if rope.rotary_dim == rope.head_dim else torch.cat((swapped, x[..., rope.rotary_dim :]), dim=-1)


def apply_rope(x_BHLE: Tensor, rope: Rope, pairs: RopeConfig) -> Tensor:
    """Turn each pair of channels by its angle, of tables [L, E] for all rows, or [B, 1, L, E]; let queries grow."""
    cos, sin, *growth = rope
    turned_BHLE = x_BHLE * cos + partners(x_BHLE, pairs) * sin
    return turned_BHLE * growth[0] if growth else turned_BHLE


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a dtype that may be narrower: what is beyond its range becomes its largest number."""
    return x if x.dtype == dtype else x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)


class KVCache:
    """Keys and values of all positions so far, in buffers of a fixed size, in which each head's positions lie together.

    `padding_B` counts the unused positions at the start of each row, so that rows of different lengths end together.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch: int,
        max_seq_len: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        padding_B: Tensor | None = None,
    ) -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, max_seq_len, config.head_dim)
        self.keys_NBMJE = torch.zeros(shape, device=device, dtype=config.kv_cache_dtype or dtype).transpose(2, 3)
        self.values_NBMJE = torch.zeros_like(self.keys_NBMJE)
        self.padding_B, self.length = padding_B, 0

    @property
    def max_seq_len(self) -> int:
        """How many positions have room."""
        return self.keys_NBMJE.shape[2]

    def append(self, layer: int, k_BJLE: Tensor, v_BJLE: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values; return all of them so far in the dtype of the new, [B, J, M, E]."""
        end = self.length + k_BJLE.shape[2]
        assert end <= self.max_seq_len, f"{end} positions in a cache of {self.max_seq_len}"
        kept = [part[layer, :, :end].transpose(1, 2) for part in (self.keys_NBMJE, self.values_NBMJE)]
        for part_BJME, new_BJLE in zip(kept, (k_BJLE, v_BJLE), strict=True):
            part_BJME[:, :, self.length :] = narrowed(new_BJLE, part_BJME.dtype)
        return kept[0].to(k_BJLE.dtype), kept[1].to(v_BJLE.dtype)


def attention_mask(
    past: int, new: int, window: int | None, padding_B: Tensor | None, device: torch.device
) -> Tensor | None:
    """Which of the past + new positions each new one sees, bool [B or 1, 1, L, M].

    None where the plain causal rule is enough: a new position sees itself and all before it.
    """
    total = past + new
    windowed = window is not None and total > window
    if padding_B is None and not windowed and (past == 0 or new == 1):
        return None
    query_L1 = torch.arange(past, total, device=device)[:, None]
    key_M = torch.arange(total, device=device)
    seen_BLM = ((key_M <= query_L1) & (key_M > query_L1 - (window or total)))[None]
    if padding_B is not None:
        # A padding position sees itself: a row that sees nothing would be NaN in the softmax.
        seen_BLM = seen_BLM & ((key_M >= padding_B[:, None, None]) | (key_M == query_L1))
    return seen_BLM[:, None]


def attention(
    q_BHLE: Tensor, k_BJME: Tensor, v_BJME: Tensor, mask: Tensor | None, scale: float | None = None
) -> Tensor:
    """Grouped-query attention [B, H, L, E]: H / J query heads share each key head. `scale` defaults to 1 / sqrt(E)."""
    (batch, heads, new, size), kv_heads = q_BHLE.shape, k_BJME.shape[1]
    if mask is None and new > 1:
        is_grouped = heads != kv_heads
        return scaled_dot_product_attention(q_BHLE, k_BJME, v_BJME, is_causal=True, scale=scale, enable_gqa=is_grouped)
    # The query heads that share a key head stand as further queries of one head, so each key is read once.
    q_BJTE = q_BHLE.reshape(batch, kv_heads, heads // kv_heads * new, size)
    rows = None if mask is None else mask.repeat(1, 1, heads // kv_heads, 1)
    y_BJTE = scaled_dot_product_attention(q_BJTE, k_BJME, v_BJME, attn_mask=rows, scale=scale)
    return y_BJTE.reshape(batch, heads, new, size)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (weight + offset) along the last dimension, in float32 and rounded once."""

    def __init__(self, size: int, config: LlamaConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.offset = config.rms_norm_eps, config.norm_offset

    @property
    def gain(self) -> Tensor:
        return self.weight + self.offset if self.offset else self.weight

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.shape, self.gain, self.eps)


class AllHeadsNorm(RMSNorm):
    """A norm of all heads of a position together."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(-2)).view_as(x)


NO_NORM = nn.Identity()  # where a family has none


def scaled(x: Tensor, factor: float) -> Tensor:
    """x * factor; x itself where there is nothing to multiply."""
    return x if factor == 1.0 else x * factor


def outputs_of(layers: Sequence[nn.Module], x: Tensor, widths: Sequence[int]) -> Sequence[Tensor]:
    """What layers make of x, cut into `widths`. A class of layers that do all at once has a method `together`."""
    together = getattr(layers[0], "together", None)
    outputs = [layer(x) for layer in layers] if together is None else together(x, layers)
    return outputs if len(outputs) == len(widths) else outputs[0].split(widths, dim=-1)


# Makes the linear layer of a full name, such as `model.layers.0.mlp.up_proj`, with so many inputs, outputs, and a bias.
LinearFactory = Callable[[str, int, int, bool], nn.Module]


def dense_linear(name: str, in_features: int, out_features: int, bias: bool) -> nn.Module:
    """The factory of an unquantized model."""
    return nn.Linear(in_features, out_features, bias=bias)


def sizes_of(names: Sequence[str], widths: Sequence[int]) -> Iterator[tuple[str, int]]:
    """The outputs of each linear layer: one of the widths, or all where one matrix makes all."""
    return zip(names, widths if len(names) == len(widths) else [sum(widths)], strict=True)


def norm_and_turn(norm: nn.Module, x_BLHE: Tensor, rope: Rope, pairs: RopeConfig) -> Tensor:
    """Queries or keys as attention takes them, [B, H, L, E]."""
    return apply_rope(norm(x_BLHE).transpose(1, 2), rope, pairs)


def turn_and_norm(norm: nn.Module, x_BLHE: Tensor, rope: Rope, pairs: RopeConfig) -> Tensor:
    """The same in the other order."""
    return norm(apply_rope(x_BLHE.transpose(1, 2), rope, pairs))


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: LlamaConfig, layer: int, linear: LinearFactory) -> None:
        super().__init__()
        path, size, names = f"model.layers.{layer}.self_attn", config.head_dim, config.names
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.config, self.layer = config, layer
        self.widths = [heads * size, kv_heads * size, kv_heads * size]
        for name, width in sizes_of(names.qkv, self.widths):
            self.add_module(name, linear(f"{path}.{name}", config.hidden_size, width, config.qkv_bias))
        self.o_proj = linear(f"{path}.o_proj", heads * size, config.hidden_size, config.o_bias)
        for name, count in ((names.q_norm, heads), (names.k_norm, kv_heads)):
            self.add_module(name, self.norm_of(count))
        self.place = turn_and_norm if config.qk_norm == "turned heads" else norm_and_turn

    def norm_of(self, heads: int) -> nn.Module:
        """The norm of so many heads of queries or keys."""
        if self.config.qk_norm == "none":
            return NO_NORM
        if self.config.qk_norm == "all heads":
            return AllHeadsNorm(heads * self.config.head_dim, self.config)
        return RMSNorm(self.config.head_dim, self.config)

    def forward(self, x_BLD: Tensor, rope: Rope, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        config, names = self.config, self.config.names
        projected = outputs_of([getattr(self, name) for name in names.qkv], x_BLD, self.widths)
        q_BLHE, k_BLJE, v_BLJE = (y.unflatten(-1, (-1, config.head_dim)) for y in projected)
        q_BHLE = self.place(getattr(self, names.q_norm), q_BLHE, rope, config.rope)
        k_BJLE = self.place(getattr(self, names.k_norm), k_BLJE, rope[:2], config.rope)
        v_BJLE = v_BLJE.transpose(1, 2)
        k_BJME, v_BJME = (k_BJLE, v_BJLE) if cache is None else cache.append(self.layer, k_BJLE, v_BJLE)
        y_BHLE = attention(q_BHLE, k_BJME, v_BJME, mask, config.attention_multiplier)
        return self.o_proj(y_BHLE.transpose(1, 2).flatten(2))


ACTIVATIONS: dict[str, Callable[..., Tensor]] = {"silu": silu, "gelu_pytorch_tanh": partial(gelu, approximate="tanh")}


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), or the same with another activation."""

    def __init__(self, config: LlamaConfig, layer: int, linear: LinearFactory) -> None:
        super().__init__()
        names, width, inner = config.names, config.hidden_size, config.intermediate_size
        path = f"model.layers.{layer}.{names.mlp}"
        self.names, self.widths, self.activation = names, [inner, inner], ACTIVATIONS[config.hidden_act]
        for name, size in sizes_of(names.gate_up, self.widths):
            self.add_module(name, linear(f"{path}.{name}", width, size, config.mlp_bias))
        self.add_module(names.down, linear(f"{path}.{names.down}", inner, width, config.mlp_bias))

    def forward(self, x_BLD: Tensor) -> Tensor:
        gate_BLF, up_BLF = outputs_of([getattr(self, name) for name in self.names.gate_up], x_BLD, self.widths)
        return getattr(self, self.names.down)(self.activation(gate_BLF) * up_BLF)


class DecoderBlock(nn.Module):
    """Attention and MLP, each between the norms that the family has, each added to the residual stream."""

    def __init__(self, config: LlamaConfig, layer: int, linear: LinearFactory) -> None:
        super().__init__()
        self.config, names = config, config.names
        self.self_attn = Attention(config, layer, linear)
        self.add_module(names.mlp, MLP(config, layer, linear))
        for name in (names.before_attention, names.after_attention, names.before_mlp, names.after_mlp):
            if name is not None:
                self.add_module(name, RMSNorm(config.hidden_size, config))

    def named(self, name: str | None) -> Any:
        """The layer of this name; None is a layer that changes nothing."""
        return NO_NORM if name is None else getattr(self, name)

    def forward(self, h_BLD: Tensor, rope: Rope, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        return self.feed(self.attend(h_BLD, rope, mask, cache))

    def attend(self, h_BLD: Tensor, rope: Rope, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """The residual stream after the attention."""
        names = self.config.names
        y_BLD = self.self_attn(self.named(names.before_attention)(h_BLD), rope, mask, cache)
        return h_BLD.add(self.named(names.after_attention)(y_BLD), alpha=self.config.residual_multiplier)

    def feed(self, h_BLD: Tensor) -> Tensor:
        """The residual stream after the MLP."""
        names = self.config.names
        y_BLD = self.named(names.mlp)(self.named(names.before_mlp)(h_BLD))
        return h_BLD.add(self.named(names.after_mlp)(y_BLD), alpha=self.config.residual_multiplier)


class Decoder(nn.Module):
    """Embedding, blocks and final norm: what Hugging Face calls `model`."""

    def __init__(self, config: LlamaConfig, linear: LinearFactory) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderBlock(config, layer, linear) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config)

    def forward(self, tokens_BL: Tensor, cache: KVCache | None = None) -> Tensor:
        """hidden_BLD after the final norm; the cache, if any, moves on by L positions."""
        new = tokens_BL.shape[1]
        past, room, padding_B = (0, new, None) if cache is None else (cache.length, cache.max_seq_len, cache.padding_B)
        h_BLD = self.run(self.embed(tokens_BL), *self.positions(past, new, room, padding_B), cache)
        if cache is not None:
            cache.length += new
        return h_BLD

    def embed(self, tokens_BL: Tensor) -> Tensor:
        """The residual stream in front of the first block, in the dtype of the norms."""
        return scaled(self.embed_tokens(tokens_BL).to(self.norm.weight.dtype), self.config.embedding_multiplier)

    def positions(self, past: int, new: int, room: int, padding_B: Tensor | None) -> tuple[Ropes, Masks]:
        """What all blocks of one call share: tables of each rotary embedding, and the mask of each sliding window."""
        positions = torch.arange(past, past + new, device=self.norm.weight.device)
        if padding_B is not None:
            positions = (positions - padding_B[:, None, None]).clamp(min=0)
        windows = set(self.config.layer_windows)
        masks = {window: attention_mask(past, new, window, padding_B, positions.device) for window in windows}
        return self.ropes(positions, room), masks

    def ropes(self, positions: Tensor, room: int) -> Ropes:
        """The tables of each rotary embedding; all keys of a text with `room` are turned by the same frequencies."""
        kinds, dtype = dict.fromkeys(self.config.layer_ropes), self.norm.weight.dtype
        return {rope: rope_tables(rope, positions, room, dtype) for rope in kinds}

    def run(self, h_BLD: Tensor, ropes: Ropes, masks: Masks, cache: KVCache | None) -> Tensor:
        """The residual stream through all blocks and the final norm."""
        for block, rope, window in zip(self.layers, self.config.layer_ropes, self.config.layer_windows, strict=True):
            h_BLD = block(h_BLD, ropes[rope], masks[window], cache)
        return self.norm(h_BLD)


class Llama(nn.Module):
    """A decoder-only language model of the Llama family.

    It computes in the dtype of its norms; matrices may be narrower (`checkpoint/loading.py`).
    """

    def __init__(self, config: LlamaConfig, linear: LinearFactory = dense_linear) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, linear)
        self.lm_head = linear("lm_head", config.hidden_size, config.vocab_size, False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the head share the embedding's matrix where the config says so; call again after replacing either."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] to logits [..., V]."""
        return scaled(self.lm_head(hidden), 1 / self.config.logits_scaling)

    def last_logits(self, tokens_BL: Tensor, cache: KVCache | None = None) -> Tensor:
        """logits_BV of the last of these positions; no other position is projected to the vocabulary."""
        return self.logits(self.model(tokens_BL, cache)[:, -1])

    def forward(self, tokens_BL: Tensor, cache: KVCache | None = None) -> Tensor:
        """logits_BLV of every position."""
        return self.logits(self.model(tokens_BL, cache))
