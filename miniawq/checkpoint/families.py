"""The families that `model.py` computes: what each has although its config.json does not say so, a row each."""

from typing import Literal, NamedTuple

from miniawq.model import Names, QKNorm

# What a bias goes by: always there or never, or these keys of config.json, of which one says that it is there.
Bias = bool | tuple[str, ...]


class Family(NamedTuple):
    """A row of the table.

    window: whether a `sliding_window` holds: never, in all layers, with `use_sliding_window`, or by its pattern.
    no_rope: the layers without positions: those that `no_rope_layers` lists, those without a window beside others, or
    all unless `position_embedding_type` is rope.
    intermediate_size: the key of the width of the feed-forward layers.
    partial_rotary_factor: the part of a head that is turned where config.json does not say; None: always all of it.
    honours: keys that ask for other mathematics (`config.FOREIGN_KEYS`), and mean what is computed here.
    """

    qkv_bias: Bias = False
    o_bias: Bias = False
    mlp_bias: Bias = False
    qk_norm: QKNorm = "none"
    window: Literal["never", "always", "switched", "pattern"] = "never"
    no_rope: Literal["nowhere", "listed", "without window", "unless said"] = "nowhere"
    interleaved: bool = False
    partial_rotary_factor: float | None = None
    rope_theta: float = 10000.0
    names: Names = Names()
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

# Models of text and pictures: by the `model_type` of their text_config, the class that computes the text alone.
TOWERS = {
    "Mistral3ForConditionalGeneration": {"mistral": "MistralForCausalLM", "ministral3": "Ministral3ForCausalLM"},
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
    "SeedOssForCausalLM": Family(qkv_bias=ATTENTION, o_bias=("attention_out_bias",), mlp_bias=MLP),
    "SmolLM3ForCausalLM": Family(
        qkv_bias=ATTENTION, o_bias=ATTENTION, mlp_bias=MLP, window="switched", no_rope="listed", rope_theta=2e6
    ),
    "GraniteForCausalLM": Family(qkv_bias=ATTENTION, o_bias=ATTENTION, mlp_bias=MLP, honours=MULTIPLIERS),
    "GraniteMoeHybridForCausalLM": Family(  # those without experts and with attention in all layers
        qkv_bias=ATTENTION,
        o_bias=ATTENTION,
        no_rope="unless said",
        names=Names(mlp="shared_mlp", gate_up=("input_linear",), down="output_linear"),
        intermediate_size="shared_intermediate_size",
        honours=(*MULTIPLIERS, "position_embedding_type", "mamba_d_state"),
    ),
    "HunYuanDenseV1ForCausalLM": Family(
        qkv_bias=ATTENTION,
        o_bias=ATTENTION,
        qk_norm="turned heads",
        names=Names(q_norm="query_layernorm", k_norm="key_layernorm"),
    ),
    "HeliumForCausalLM": Family(qkv_bias=ATTENTION, mlp_bias=MLP, interleaved=True, rope_theta=1e5),
    "Ernie4_5ForCausalLM": Family(qkv_bias=ALL, o_bias=ALL, mlp_bias=ALL, interleaved=True, rope_theta=5e5),
    "Phi3ForCausalLM": Family(
        window="always", partial_rotary_factor=1.0, names=Names(qkv=("qkv_proj",), gate_up=GATE_UP)
    ),
    "GlmForCausalLM": Family(
        qkv_bias=ATTENTION, interleaved=True, partial_rotary_factor=0.5, names=Names(gate_up=GATE_UP)
    ),
    "Glm4ForCausalLM": Family(qkv_bias=ATTENTION, interleaved=True, partial_rotary_factor=0.5, names=NORMS_AROUND),
    "Olmo2ForCausalLM": Family(qkv_bias=ATTENTION, o_bias=ATTENTION, qk_norm="all heads", names=NORMS_AFTER),
    "Exaone4ForCausalLM": Family(qk_norm="heads", window="pattern", no_rope="without window", names=NORMS_AFTER),
}
