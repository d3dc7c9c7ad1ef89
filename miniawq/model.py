"""Chapter 4: the Llama family as one decoder: Llama 1 to 3.3, Mistral, Qwen2, Qwen2.5 and dense Qwen3.

The families differ in five switches of `LlamaConfig`: biases, norms of queries and keys, head size, sliding windows,
and the kind of rotary embedding. `checkpoint/config.py` reads them from `config.json`. Modules have Hugging Face's
names, so a checkpoint loads with no renaming. The linear layers are made by a function that is passed in; this file
knows no quantizer.

Shapes: B batch, L positions in this call, M positions in the cache, D model width, F feed-forward width, V vocabulary,
H query heads, J key/value heads, E size of one head, N layers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu


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


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """What decides the decoder's computation, under the names of `config.json`; the last seven are the switches."""

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
    qk_norm: bool
    head_dim: int
    layer_windows: tuple[int | None, ...]
    rope: RopeConfig


# Rotary position embedding (RoFormer, arXiv 2104.09864): each pair of channels (e, e + E/2) of a query or key is turned
# by position * frequency_e. The types differ in how they lower the frequencies for texts longer than the training
# texts.


def plain_frequencies(rope: RopeConfig, theta: float) -> Tensor:
    """theta^(-2 i / E) for pair i, float32 [E/2]."""
    return theta ** -(torch.arange(0, rope.head_dim, 2, dtype=torch.float32) / rope.head_dim)


def default_frequencies(rope: RopeConfig, length: int) -> Tensor:
    """As trained."""
    return plain_frequencies(rope, rope.rope_theta)


def linear_frequencies(rope: RopeConfig, length: int) -> Tensor:
    """Position interpolation (arXiv 2306.15595): all frequencies divided by `factor`."""
    return plain_frequencies(rope, rope.rope_theta) / rope.factor


def dynamic_frequencies(rope: RopeConfig, length: int) -> Tensor:
    """NTK scaling: theta grows once the text is longer than the training texts."""
    ratio = max(length, rope.max_position_embeddings) / rope.max_position_embeddings
    growth = rope.factor * ratio - (rope.factor - 1)
    return plain_frequencies(rope, rope.rope_theta * growth ** (rope.head_dim / (rope.head_dim - 2)))


def llama3_frequencies(rope: RopeConfig, length: int) -> Tensor:
    """Llama 3.1: low frequencies are divided by `factor`, high ones are kept, those between are interpolated."""
    plain = plain_frequencies(rope, rope.rope_theta)
    turns = rope.original_max_position_embeddings * plain / (2 * math.pi)
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return keep * plain + (1 - keep) * plain / rope.factor


def yarn_frequencies(rope: RopeConfig, length: int) -> Tensor:
    """YaRN (arXiv 2309.00071): channels that turn less than `beta_slow` times in the trained length are interpolated,
    those that turn more than `beta_fast` times are kept.
    """

    def channel(turns: float) -> float:
        wave = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return rope.head_dim * math.log(wave) / (2 * math.log(rope.rope_theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.head_dim - 1)
    ramp = (torch.arange(rope.head_dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)
    plain, stretch = plain_frequencies(rope, rope.rope_theta), ramp.clamp(0, 1)
    return plain * (1 - stretch) + plain / rope.factor * stretch


INVERSE_FREQUENCIES: dict[str, Callable[[RopeConfig, int], Tensor]] = {
    "default": default_frequencies,
    "linear": linear_frequencies,
    "dynamic": dynamic_frequencies,
    "llama3": llama3_frequencies,
    "yarn": yarn_frequencies,
}

Rope = tuple[Tensor, Tensor]


def rope_tables(rope: RopeConfig, positions_L: Tensor, length: int, dtype: torch.dtype) -> Rope:
    """cos_LE and sin_LE of the angles at each position; `length` counts all positions of the text so far."""
    frequencies = INVERSE_FREQUENCIES[rope.rope_type](rope, length).to(positions_L.device)
    angles_LE = torch.outer(positions_L.float(), frequencies).repeat(1, 2)
    factor = rope.attention_factor
    return (angles_LE.cos() * factor).to(dtype), (angles_LE.sin() * factor).to(dtype)


def apply_rope(x_BHLE: Tensor, rope: Rope) -> Tensor:
    """Turn each pair of channels (e, e + E/2) by its angle, of tables [L, E] for all rows, or [B, 1, L, E]."""
    cos, sin = rope
    first, second = x_BHLE.chunk(2, dim=-1)
    return x_BHLE * cos + torch.cat((-second, first), dim=-1) * sin


class KVCache:
    """Keys and values of all positions so far, in buffers of a fixed size, the heads of one position side by side.

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
        shape = (config.num_hidden_layers, batch, max_seq_len, config.num_key_value_heads, config.head_dim)
        self.keys_NBMJE = torch.zeros(shape, device=device, dtype=dtype)
        self.values_NBMJE = torch.zeros(shape, device=device, dtype=dtype)
        self.padding_B = padding_B
        self.length = 0

    @property
    def max_seq_len(self) -> int:
        """How many positions have room."""
        return self.keys_NBMJE.shape[2]

    def append(self, layer: int, k_BJLE: Tensor, v_BJLE: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values; return all of them so far, [B, J, M, E]."""
        end = self.length + k_BJLE.shape[2]
        assert end <= self.max_seq_len, f"{end} positions in a cache of {self.max_seq_len}"
        keys_BJME = self.keys_NBMJE[layer, :, :end].transpose(1, 2)
        values_BJME = self.values_NBMJE[layer, :, :end].transpose(1, 2)
        keys_BJME[:, :, self.length :], values_BJME[:, :, self.length :] = k_BJLE, v_BJLE
        return keys_BJME, values_BJME


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


def attention(q_BHLE: Tensor, k_BJME: Tensor, v_BJME: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention [B, H, L, E]: H / J query heads share each key head."""
    (batch, heads, new, size), kv_heads = q_BHLE.shape, k_BJME.shape[1]
    if mask is None and new > 1:
        return scaled_dot_product_attention(q_BHLE, k_BJME, v_BJME, is_causal=True, enable_gqa=heads != kv_heads)
    # The query heads that share a key head stand as further queries of one head, so each key is read once.
    q_BJTE = q_BHLE.reshape(batch, kv_heads, heads // kv_heads * new, size)
    rows = None if mask is None else mask.repeat(1, 1, heads // kv_heads, 1)
    return scaled_dot_product_attention(q_BJTE, k_BJME, v_BJME, attn_mask=rows).reshape(batch, heads, new, size)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight along the last dimension, in float32 and rounded once."""
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


class RMSNorm(nn.Module):
    """`rms_norm` with a weight of its own."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def outputs_of(layers: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """[layer(x) for layer in layers]. A class of layers that can do all by one product has a method `together`."""
    together = getattr(layers[0], "together", None)
    return [layer(x) for layer in layers] if together is None else together(x, layers)


class LinearFactory(Protocol):
    """Makes the linear layer of this full name, such as `model.layers.0.mlp.up_proj`."""

    def __call__(self, name: str, in_features: int, out_features: int, bias: bool) -> nn.Module: ...


def dense_linear(name: str, in_features: int, out_features: int, bias: bool) -> nn.Module:
    """The factory of an unquantized model."""
    return nn.Linear(in_features, out_features, bias=bias)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: LlamaConfig, layer: int, linear: LinearFactory) -> None:
        super().__init__()
        name, size = f"model.layers.{layer}.self_attn", config.head_dim
        width, kv_width = config.num_attention_heads * size, config.num_key_value_heads * size
        self.layer, self.head_dim = layer, size
        self.q_proj = linear(f"{name}.q_proj", config.hidden_size, width, config.qkv_bias)
        self.k_proj = linear(f"{name}.k_proj", config.hidden_size, kv_width, config.qkv_bias)
        self.v_proj = linear(f"{name}.v_proj", config.hidden_size, kv_width, config.qkv_bias)
        self.o_proj = linear(f"{name}.o_proj", width, config.hidden_size, config.o_bias)
        self.q_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_BLD: Tensor, rope: Rope, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        projected = outputs_of((self.q_proj, self.k_proj, self.v_proj), x_BLD)
        q_BLHE, k_BLJE, v_BLJE = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)
        q_BHLE = apply_rope(self.q_norm(q_BLHE).transpose(1, 2), rope)
        k_BJLE = apply_rope(self.k_norm(k_BLJE).transpose(1, 2), rope)
        v_BJLE = v_BLJE.transpose(1, 2)
        k_BJME, v_BJME = (k_BJLE, v_BJLE) if cache is None else cache.append(self.layer, k_BJLE, v_BJLE)
        return self.o_proj(attention(q_BHLE, k_BJME, v_BJME, mask).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig, layer: int, linear: LinearFactory) -> None:
        super().__init__()
        name, width, inner = f"model.layers.{layer}.mlp", config.hidden_size, config.intermediate_size
        self.gate_proj = linear(f"{name}.gate_proj", width, inner, config.mlp_bias)
        self.up_proj = linear(f"{name}.up_proj", width, inner, config.mlp_bias)
        self.down_proj = linear(f"{name}.down_proj", inner, width, config.mlp_bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        gate_BLF, up_BLF = outputs_of((self.gate_proj, self.up_proj), x_BLD)
        return self.down_proj(silu(gate_BLF) * up_BLF)


class DecoderBlock(nn.Module):
    """Attention and MLP, each after a norm, each added to the residual stream."""

    def __init__(self, config: LlamaConfig, layer: int, linear: LinearFactory) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, linear)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, layer, linear)

    def forward(self, h_BLD: Tensor, rope: Rope, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        h_BLD = h_BLD + self.self_attn(self.input_layernorm(h_BLD), rope, mask, cache)
        return h_BLD + self.mlp(self.post_attention_layernorm(h_BLD))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: what Hugging Face calls `model`."""

    def __init__(self, config: LlamaConfig, linear: LinearFactory) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderBlock(config, layer, linear) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens_BL: Tensor, cache: KVCache | None = None) -> Tensor:
        """hidden_BLD after the final norm; the cache, if any, moves on by L positions."""
        h_BLD = self.embed_tokens(tokens_BL).to(self.norm.weight.dtype)
        past, padding_B = (0, None) if cache is None else (cache.length, cache.padding_B)
        rope, masks = self.positions(past, tokens_BL.shape[1], padding_B, h_BLD)
        for block, window in zip(self.layers, self.config.layer_windows, strict=True):
            h_BLD = block(h_BLD, rope, masks[window], cache)
        if cache is not None:
            cache.length += tokens_BL.shape[1]
        return self.norm(h_BLD)

    def positions(
        self, past: int, new: int, padding_B: Tensor | None, like: Tensor
    ) -> tuple[Rope, dict[int | None, Tensor | None]]:
        """What all blocks of one call share: rotary tables, and the mask of each sliding window."""
        # Padding shifts a row's positions, which changes nothing: rotary attention sees only differences of positions.
        positions_L = torch.arange(past, past + new, device=like.device)
        rope = rope_tables(self.config.rope, positions_L, past + new, like.dtype)
        windows = set(self.config.layer_windows)
        return rope, {window: attention_mask(past, new, window, padding_B, like.device) for window in windows}


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
        """The dtype of activations and of the kv cache."""
        return self.model.norm.weight.dtype

    def hidden(self, tokens_BL: Tensor, cache: KVCache | None = None) -> Tensor:
        """hidden_BLD after the final norm, for callers that need the logits of few positions."""
        return self.model(tokens_BL, cache)

    def last_logits(self, tokens_BL: Tensor, cache: KVCache | None = None) -> Tensor:
        """logits_BV of the last of these positions; no other position is projected to the vocabulary."""
        return self.lm_head(self.hidden(tokens_BL, cache)[:, -1])

    def forward(self, tokens_BL: Tensor, cache: KVCache | None = None) -> Tensor:
        """logits_BLV of every position."""
        return self.lm_head(self.hidden(tokens_BL, cache))
