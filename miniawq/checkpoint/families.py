"""The families that `model.py` computes: what each has although its config.json does not say so, a row each."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from miniawq.model import Names, QKNorm

# What a bias goes by: always there or never, or these keys of config.json, of which one says that it is there.
Bias = bool | tuple[str, ...]


class Family(NamedTuple):
    """A row of the table.

    window: whether a `sliding_window` holds: never, in all layers, with `use_sliding_window`, or by its pattern.
    no_rope: the layers without positions: those that `no_rope_layers` lists, those without a window beside others, or
    all unless `position_embedding_type` is rope.
    is_gemma: embeddings times the root of the width, 1 added to the weights of norms, queries scaled by a key of their
    own, and another rotary embedding in layers with a window.
    intermediate_size: the key of the width of the feed-forward layers.
    turns_parts: whether `partial_rotary_factor` holds; all channels of a head are turned otherwise.
    defaults: values of keys that config.json may leave out.
    honours: keys that ask for other mathematics (`config.FOREIGN_KEYS`), and mean what is computed here.
    """

    qkv_bias: Bias = False
    o_bias: Bias = False
    mlp_bias: Bias = False
    qk_norm: QKNorm = "none"
    window: Literal["never", "always", "switched", "pattern"] = "never"
    no_rope: Literal["nowhere", "listed", "without window", "unless said"] = "nowhere"
    interleaved: bool = False
    is_gemma: bool = False
    turns_parts: bool = False
    names: Names = Names()
    defaults: Mapping[str, Any] = {}
    intermediate_size: str = "intermediate_size"
    honours: tuple[str, ...] = ()


ATTENTION, MLP, ALL = ("attention_bias",), ("mlp_bias",), ("use_bias",)
MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
GATE_UP = ("gate_up_proj",)
NORMS_AFTER = Names(
    before_attention=None,
    after_attention="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
)
NORMS_AROUND = Names(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm", gate_up=GATE_UP)

BIASED = {"attention_bias": True}
UNSCALED = {"attention_multiplier": 1.0}
HALF_TURNED = {"partial_rotary_factor": 0.5}
GEMMA3 = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}

# Models of text and pictures: by the `model_type` of their text_config, the class that computes the text alone.
TOWERS = {
    "Mistral3ForConditionalGeneration": {"mistral": "MistralForCausalLM", "ministral3": "Ministral3ForCausalLM"},
    "Gemma3ForConditionalGeneration": {"gemma3_text": "Gemma3ForCausalLM"},
    "LlavaForConditionalGeneration": {
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
    },
}

FAMILIES = {
    "LlamaForCausalLM": Family(qkv_bias=ATTENTION, o_bias=ATTENTION, mlp_bias=MLP),
    "MistralForCausalLM": Family(window="always"),
    "MinistralForCausalLM": Family(window="always"),
    "Ministral3ForCausalLM": Family(window="always"),
    "Qwen2ForCausalLM": Family(qkv_bias=True, window="switched"),
    "Qwen3ForCausalLM": Family(qkv_bias=ATTENTION, o_bias=ATTENTION, qk_norm="heads", window="switched"),
    "InternLM3ForCausalLM": Family(
        qkv_bias=("qkv_bias", "attention_bias"), o_bias=("bias", "mlp_bias"), mlp_bias=("bias", "mlp_bias")
    ),
    "SeedOssForCausalLM": Family(qkv_bias=ATTENTION, o_bias=("attention_out_bias",), mlp_bias=MLP, defaults=BIASED),
    "SmolLM3ForCausalLM": Family(
        qkv_bias=ATTENTION,
        o_bias=ATTENTION,
        mlp_bias=MLP,
        window="switched",
        no_rope="listed",
        defaults={"rope_theta": 2e6},
    ),
    "GraniteForCausalLM": Family(
        qkv_bias=ATTENTION, o_bias=ATTENTION, mlp_bias=MLP, defaults=UNSCALED, honours=MULTIPLIERS
    ),
    "GraniteMoeHybridForCausalLM": Family(  # those without experts and with attention in all layers
        qkv_bias=ATTENTION,
        o_bias=ATTENTION,
        no_rope="unless said",
        names=Names(mlp="shared_mlp", gate_up=("input_linear",), down="output_linear"),
        intermediate_size="shared_intermediate_size",
        defaults=UNSCALED,
        honours=(*MULTIPLIERS, "position_embedding_type", "mamba_d_state"),
    ),
    "HunYuanDenseV1ForCausalLM": Family(
        qkv_bias=ATTENTION,
        o_bias=ATTENTION,
        qk_norm="turned heads",
        names=Names(q_norm="query_layernorm", k_norm="key_layernorm"),
    ),
    "HeliumForCausalLM": Family(qkv_bias=ATTENTION, mlp_bias=MLP, interleaved=True, defaults={"rope_theta": 1e5}),
    "Ernie4_5ForCausalLM": Family(
        qkv_bias=ALL, o_bias=ALL, mlp_bias=ALL, interleaved=True, defaults={"rope_theta": 5e5}
    ),
    "Phi3ForCausalLM": Family(
        window="always",
        turns_parts=True,
        names=Names(qkv=("qkv_proj",), gate_up=GATE_UP),
        defaults={"original_max_position_embeddings": 4096},
    ),
    "GlmForCausalLM": Family(
        qkv_bias=ATTENTION, interleaved=True, turns_parts=True, names=Names(gate_up=GATE_UP), defaults=HALF_TURNED
    ),
    "Glm4ForCausalLM": Family(
        qkv_bias=ATTENTION, interleaved=True, turns_parts=True, names=NORMS_AROUND, defaults=HALF_TURNED | BIASED
    ),
    "Olmo2ForCausalLM": Family(qkv_bias=ATTENTION, o_bias=ATTENTION, qk_norm="all heads", names=NORMS_AFTER),
    "Gemma3ForCausalLM": Family(
        qkv_bias=ATTENTION,
        o_bias=ATTENTION,
        qk_norm="heads",
        window="pattern",
        is_gemma=True,
        names=Names(
            after_attention="post_attention_layernorm",
            before_mlp="pre_feedforward_layernorm",
            after_mlp="post_feedforward_layernorm",
        ),
        defaults=GEMMA3,
    ),
    "Exaone4ForCausalLM": Family(qk_norm="heads", window="pattern", no_rope="without window", names=NORMS_AFTER),
}
