"""The Llama family as one decoder: Llama 1 to 3.3, Mistral, Qwen2, Qwen2.5 and dense Qwen3.

The families differ in five switches, all read from `config.json`: biases, norms of queries and keys, head size, sliding
window, and the kind of rotary embedding. Module names are Hugging Face's, so a checkpoint loads with no renaming.
The linear layers are made by a function that is passed in; this file knows no quantizer.

Shapes: B batch, L positions in this call, M positions in the cache, D model width, F feed-forward width, V vocabulary,
H query heads, J key/value heads, R query heads that share a key/value head (H = J R), E size of one head.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from miniawq.rope import Rope, RopeConfig, apply_rope, integer, refuse, rope_tables

LinearFactory = Callable[[str, int, int, bool], nn.Module]

HALVES = (torch.float16, torch.bfloat16)
WEIGHTS_PER_SLICE = 1 << 20


class Family(NamedTuple):
    """What an architecture has that its config.json does not say."""

    qkv_bias: bool = False
    reads_attention_bias: bool = False
    qk_norm: bool = False
    sliding_window: Literal["ignored", "always", "switched"] = "ignored"


FAMILIES = {
    "LlamaForCausalLM": Family(reads_attention_bias=True),
    "MistralForCausalLM": Family(sliding_window="always"),
    "Qwen2ForCausalLM": Family(qkv_bias=True, sliding_window="switched"),
    "Qwen3ForCausalLM": Family(reads_attention_bias=True, qk_norm=True, sliding_window="switched"),
}


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The part of a Hugging Face `config.json` that decides what the decoder computes."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    layer_windows: tuple[int | None, ...]
    rope: RopeConfig

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Read a parsed `config.json`; UnsupportedCheckpoint names the key that cannot be honoured."""
        architectures = config.get("architectures") or ["missing"]
        if architectures[0] not in FAMILIES:
            refuse("architectures", architectures, "supported: " + ", ".join(FAMILIES))
        if (activation := config.get("hidden_act", "silu")) != "silu":
            refuse("hidden_act", activation, "supported: silu")
        family = FAMILIES[architectures[0]]
        heads, hidden = integer(config, "num_attention_heads"), integer(config, "hidden_size")
        kv_heads = integer(config, "num_key_value_heads", heads)
        head_dim = integer(config, "head_dim", hidden // heads)
        if heads % kv_heads:
            refuse("num_key_value_heads", kv_heads, f"{heads} query heads do not divide among them")
        if head_dim % 2:
            refuse("head_dim", head_dim, "the rotary embedding turns pairs of channels")
        attention_bias = family.reads_attention_bias and bool(config.get("attention_bias", False))
        return cls(
            architecture=architectures[0],
            vocab_size=integer(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=integer(config, "intermediate_size"),
            num_hidden_layers=integer(config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=integer(config, "max_position_embeddings", config.get("max_sequence_length", 2048)),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family.qkv_bias or attention_bias,
            o_bias=attention_bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=family.qk_norm,
            layer_windows=_layer_windows(config, family),
            rope=RopeConfig.from_dict(config, head_dim),
        )


def _layer_windows(config: Mapping[str, Any], family: Family) -> tuple[int | None, ...]:
    """The sliding window of each layer, None for full attention.

    Qwen configs state a `sliding_window` that holds only with `use_sliding_window`, from layer `max_window_layers` on;
    transformers 5 writes `layer_types` instead.
    """
    layers, window = integer(config, "num_hidden_layers"), config.get("sliding_window")
    switched_on = family.sliding_window == "always" or config.get("use_sliding_window", False)
    if window is None or family.sliding_window == "ignored" or not switched_on:
        return (None,) * layers
    if types := config.get("layer_types"):
        if len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}:
            refuse("layer_types", types, "supported: one of full_attention and sliding_attention for each layer")
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    first = config.get("max_window_layers", layers) if family.sliding_window == "switched" else 0
    return tuple(window if layer >= first else None for layer in range(layers))


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
        """Positions there is room for."""
        return self.keys_NBMJE.shape[2]

    def append(self, layer: int, k_BJLE: Tensor, v_BJLE: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values; return all of them up to now, [B, J, M, E]."""
        end = self.length + k_BJLE.shape[2]
        assert end <= self.max_seq_len, f"{end} positions in a cache of {self.max_seq_len}"
        keys_BJME = self.keys_NBMJE[layer, :, :end].transpose(1, 2)
        values_BJME = self.values_NBMJE[layer, :, :end].transpose(1, 2)
        keys_BJME[:, :, self.length :], values_BJME[:, :, self.length :] = k_BJLE, v_BJLE
        return keys_BJME, values_BJME


def attention_mask(
    past: int, new: int, window: int | None, padding_B: Tensor | None, device: torch.device
) -> Tensor | None:
    """Which of the past + new positions each new one may see, bool [B or 1, 1, L, M].

    None where the plain causal rule says it: a new position sees itself and all before it.
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
    """Grouped-query attention [B, H, L, E] that reads each key once for the query heads that share it."""
    (batch, heads, new, size), shared = q_BHLE.shape, k_BJME.shape[1]
    if mask is None and new > 1:
        return scaled_dot_product_attention(q_BHLE, k_BJME, v_BJME, is_causal=True, enable_gqa=heads != shared)
    # The R query heads of one key head stand as R times L queries of one head.
    q_BJTE = q_BHLE.reshape(batch, shared, heads // shared * new, size)
    rows = None if mask is None else mask.repeat(1, 1, heads // shared, 1)
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
        """Normalise the last dimension."""
        return rms_norm(x, self.weight, self.eps)


def outputs_of(layers: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """What layers make of the same input. A class of layers that can do it faster for all at once has `together`."""
    together = getattr(layers[0], "together", None)
    return [layer(x) for layer in layers] if together is None else together(x, layers)


def loaded_dtype(stored: torch.dtype, dimensions: int, dtype: torch.dtype) -> torch.dtype:
    """What a dense tensor becomes in a model that computes in `dtype`: matrices of 16 bits do not become wider."""
    return stored if dimensions == 2 and stored in HALVES and dtype.itemsize > stored.itemsize else dtype


def dense_product(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """`linear`, of a weight that may be narrower than x [..., I]: then a slice at a time takes the dtype of x."""
    if weight_OI.dtype == x.dtype:
        return linear(x, weight_OI, bias_O)
    outputs, inputs = weight_OI.shape
    step = min(outputs, max(1, WEIGHTS_PER_SLICE // inputs))
    y, slice_OI = x.new_empty(*x.shape[:-1], outputs), x.new_empty(step, inputs)
    for first in range(0, outputs, step):
        narrow_OI = weight_OI[first : first + step]
        y[..., first : first + step] = linear(x, slice_OI[: len(narrow_OI)].copy_(narrow_OI))
    return y if bias_O is None else y + bias_O


class DenseLinear(nn.Linear):
    """`nn.Linear` by `dense_product`."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] to [..., O] in the dtype of x."""
        return dense_product(x, self.weight, self.bias)


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
        """Attend to the positions of this call and to those in the cache."""
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
        """Each position on its own."""
        gate_BLF, up_BLF = outputs_of((self.gate_proj, self.up_proj), x_BLD)
        return self.down_proj(silu(gate_BLF) * up_BLF)


class DecoderBlock(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual path."""

    def __init__(self, config: LlamaConfig, layer: int, linear: LinearFactory) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, linear)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, layer, linear)

    def forward(self, h_BLD: Tensor, rope: Rope, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """One block of the residual stream."""
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
        """What all blocks share in one call: rotary tables, and the mask of each sliding window."""
        # Padding shifts a row's positions, which changes nothing: rotary attention sees only differences of positions.
        positions_L = torch.arange(past, past + new, device=like.device)
        rope = rope_tables(self.config.rope, positions_L, past + new, like.dtype)
        windows = set(self.config.layer_windows)
        return rope, {window: attention_mask(past, new, window, padding_B, like.device) for window in windows}


def dense(name: str, in_features: int, out_features: int, bias: bool) -> nn.Module:
    """The linear factory of an unquantized model."""
    return DenseLinear(in_features, out_features, bias=bias)


class Llama(nn.Module):
    """A decoder-only language model of the Llama family.

    It computes in the dtype of its norms; matrices may be narrower (`dense_product`).
    """

    def __init__(self, config: LlamaConfig, linear: LinearFactory = dense) -> None:
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
        """Where it is."""
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """That of activations and of the kv cache."""
        return self.model.norm.weight.dtype

    def hidden(self, tokens_BL: Tensor, cache: KVCache | None = None) -> Tensor:
        """hidden_BLD after the final norm, for callers that need the logits of few positions."""
        return self.model(tokens_BL, cache)

    def forward(self, tokens_BL: Tensor, cache: KVCache | None = None) -> Tensor:
        """logits_BLV of every position."""
        return self.lm_head(self.hidden(tokens_BL, cache))
