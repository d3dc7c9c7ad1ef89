"""`config.json` becomes a `LlamaConfig`, or is refused because it asks for something that is not implemented."""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from miniawq.checkpoint.values import Key, checked_values, refuse, shown
from miniawq.errors import UnsupportedCheckpoint
from miniawq.model import INVERSE_FREQUENCIES, LlamaConfig, RopeConfig


class Family(NamedTuple):
    """What an architecture has although its config.json does not say so."""

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

# Keys of config.json that change the mathematics, with what they ask for.
FOREIGN_KEYS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), "mixture of experts"),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), "multi-head latent attention"),
    **dict.fromkeys(("linear_num_key_heads", "mamba_d_state", "mamba_d_ssm", "ssm_cfg"), "hybrid layers"),
    **dict.fromkeys(("vision_config", "audio_config", "thinker_config"), "pictures or sound as input"),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping"), "Gemma's soft-capping"),
    **dict.fromkeys(("alibi", "position_embedding_type"), "positions other than rotary ones"),
    **dict.fromkeys(
        ("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), "scaled residuals"
    ),
    "add_bias_to_lm_head": "a bias on the head",
}
ATTENTION_TYPES = {"full_attention", "sliding_attention"}

# What config.json may say. The ranges have room for every published model: what is beyond them is an attack or a typo.
MOST_POSITIONS = 1 << 31
CONFIG = {
    "architectures": Key("texts", "the class of the model"),
    "hidden_act": Key("text", "the activation of the feed-forward layers", default="silu"),
    "vocab_size": Key("integer", "rows of the embedding", high=1 << 24),
    "hidden_size": Key("integer", "width of the model", high=1 << 18),
    "intermediate_size": Key("integer", "width of the feed-forward layers", high=1 << 20),
    "num_hidden_layers": Key("integer", "decoder layers", high=1 << 10),
    "num_attention_heads": Key("integer", "query heads", high=1 << 12),
    "num_key_value_heads": Key("integer", "key/value heads", high=1 << 12),
    "head_dim": Key("integer", "channels of a head", high=1 << 12),
    "rms_norm_eps": Key("number", "what is added in the norms", 1e-20, 1, default=1e-6),
    "max_position_embeddings": Key("integer", "the longest context", high=MOST_POSITIONS),
    "max_sequence_length": Key("integer", "the longest context", high=MOST_POSITIONS, default=2048),
    "original_max_position_embeddings": Key("integer", "the context before it was extended", high=MOST_POSITIONS),
    "tie_word_embeddings": Key("flag", "whether the head is the embedding", default=False),
    "attention_bias": Key("flag", "biases in the attention", default=False),
    "mlp_bias": Key("flag", "biases in the feed-forward layers", default=False),
    "sliding_window": Key("integer", "positions that a layer sees", high=MOST_POSITIONS),
    "use_sliding_window": Key("flag", "whether sliding_window holds", default=False),
    "max_window_layers": Key("integer", "the first layer with a window", low=0, high=MOST_POSITIONS),
    "layer_types": Key("texts", "the attention of each layer"),
    "rope_theta": Key("number", "the base of the rotary embedding", 1.01, 1e15),
    "rope_scaling": Key("object", "the rotary embedding"),
    "rope_parameters": Key("object", "the rotary embedding"),
    "partial_rotary_factor": Key("number", "the part of a head that is turned", 0, 1, default=1.0),
    "dtype": Key("text", "the dtype to compute in"),
    "torch_dtype": Key("text", "the dtype to compute in"),
}
ROPE = {
    "rope_type": Key("text", "the kind of rotary embedding"),
    "type": Key("text", "the kind of rotary embedding"),
    "rope_theta": CONFIG["rope_theta"],
    "partial_rotary_factor": CONFIG["partial_rotary_factor"]._replace(default=None),
    "original_max_position_embeddings": CONFIG["original_max_position_embeddings"],
    "factor": Key("number", "how much longer the context became", 1e-3, 1e6),
    "low_freq_factor": Key("number", "turns below which a channel is interpolated", 1e-6, 1e6),
    "high_freq_factor": Key("number", "turns above which a channel is kept", 1e-6, 1e6),
    "beta_fast": Key("number", "turns above which a channel is kept", 1e-6, 1e6),
    "beta_slow": Key("number", "turns below which a channel is interpolated", 1e-6, 1e6),
    "attention_factor": Key("number", "the factor of the rotary tables", 1e-3, 1e3),
    "mscale": Key("number", "the weight of the attention factor", 0, 1e3),
    "mscale_all_dim": Key("number", "the weight that it is divided by", 0, 1e3),
    "truncate": Key("flag", "whether bounds are rounded to channels", default=True),
}
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")


def llama_config(config: Mapping[str, Any]) -> LlamaConfig:
    """The decoder that a parsed `config.json` describes; UnsupportedCheckpoint names a key that cannot be honoured."""
    config = checked_values("config.json", config, CONFIG)
    architectures = config["architectures"] or ["missing"]
    if architectures[0] not in FAMILIES:
        refuse("architectures", architectures, "supported: " + ", ".join(FAMILIES))
    if config["hidden_act"] != "silu":
        refuse("hidden_act", config["hidden_act"], "supported: silu")
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if config[key] is None:
            refuse(key, None, "the key is missing")
    family = FAMILIES[architectures[0]]
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    kv_heads, head_dim = config["num_key_value_heads"] or heads, config["head_dim"] or hidden // heads
    if heads % kv_heads:
        refuse("num_key_value_heads", kv_heads, f"{heads} query heads do not divide among them")
    if head_dim % 2 or not head_dim:
        refuse("head_dim", head_dim, "the rotary embedding turns pairs of channels")
    attention_bias = family.reads_attention_bias and config["attention_bias"]
    return LlamaConfig(
        architecture=architectures[0],
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=config["rms_norm_eps"],
        max_position_embeddings=config["max_position_embeddings"] or config["max_sequence_length"],
        tie_word_embeddings=config["tie_word_embeddings"],
        qkv_bias=family.qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=config["mlp_bias"],
        qk_norm=family.qk_norm,
        layer_windows=_layer_windows(config, family),
        rope=rope_config(config, head_dim),
    )


def _layer_windows(config: Mapping[str, Any], family: Family) -> tuple[int | None, ...]:
    """The sliding window of each layer, None for full attention.

    Qwen configs state a `sliding_window` that holds only with `use_sliding_window`, from layer `max_window_layers` on;
    transformers 5 writes `layer_types` instead.
    """
    layers, window = config["num_hidden_layers"], config["sliding_window"]
    switched_on = family.sliding_window == "always" or config.get("use_sliding_window", False)
    if window is None or family.sliding_window == "ignored" or not switched_on:
        return (None,) * layers
    if types := config["layer_types"]:
        if len(types) != layers or not set(types) <= ATTENTION_TYPES:
            refuse("layer_types", types, "supported: one of full_attention and sliding_attention for each layer")
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    first = 0 if family.sliding_window == "always" else config["max_window_layers"]
    first = layers if first is None else first
    return tuple(window if layer >= first else None for layer in range(layers))


def rope_config(config: Mapping[str, Any], head_dim: int) -> RopeConfig:
    """The rotary embedding, from `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
    config = checked_values("config.json", config, CONFIG)
    key = "rope_parameters" if config["rope_parameters"] else "rope_scaling"
    given = _rope_values(key, config[key] or {})
    kind = given["rope_type"] or given["type"] or "default"
    if kind not in INVERSE_FREQUENCIES:
        refuse(f"{key}.rope_type", kind, "supported: " + ", ".join(INVERSE_FREQUENCIES))
    partial = given["partial_rotary_factor"]
    if (partial := config["partial_rotary_factor"] if partial is None else partial) != 1.0:
        refuse("partial_rotary_factor", partial, "only whole heads are rotated")
    if kind != "default" and given["factor"] is None:
        refuse(f"{key}.factor", None, f"rope_type {kind} needs it")
    longest = config["max_position_embeddings"] or config["max_sequence_length"]
    original = given["original_max_position_embeddings"] or config["original_max_position_embeddings"]
    rope = RopeConfig(
        rope_type=kind,
        rope_theta=given["rope_theta"] or config["rope_theta"] or 10000.0,
        head_dim=head_dim,
        max_position_embeddings=longest,
        original_max_position_embeddings=original or longest,
        truncate=given["truncate"],
        attention_factor=_yarn_attention_factor(given) if kind == "yarn" else 1.0,
        **{name: given[name] for name in SCALING if given[name] is not None},
    )
    if kind == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        refuse(f"{key}.low_freq_factor", rope.low_freq_factor, f"high_freq_factor is {rope.high_freq_factor}")
    if kind == "yarn" and rope.beta_slow > rope.beta_fast:
        refuse(f"{key}.beta_slow", rope.beta_slow, f"beta_fast is {rope.beta_fast}")
    if kind == "dynamic" and head_dim == 2:
        refuse("head_dim", head_dim, "rope_type dynamic needs more channels")
    return rope


def _rope_values(key: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The checked values of one rotary embedding; transformers 5 may state one for each kind of layer."""
    if nested := [value for value in given.values() if isinstance(value, Mapping)]:
        if any(value != nested[0] for value in given.values()):
            refuse(key, given, "layers with different rotary embeddings")
        given = nested[0]
    values = checked_values(f"config.json: {key}", given, ROPE)
    typed = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if values["rope_type"] is values["type"] is None and (more := sorted(given.keys() - typed)):
        refuse(f"{key}.rope_type", None, f"{', '.join(more[:5])} say nothing without it")
    return values


def _yarn_attention_factor(given: Mapping[str, Any]) -> float:
    if given["attention_factor"] is not None:
        return float(given["attention_factor"])

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(given["factor"]) + 1.0 if given["factor"] > 1 else 1.0

    if given["mscale"] and given["mscale_all_dim"]:
        return mscale(given["mscale"]) / mscale(given["mscale_all_dim"])
    return mscale(1.0)


def refuse_architecture(config: object) -> None:
    """UnsupportedCheckpoint if a key of config.json asks for other mathematics than the Llama family's."""
    config = checked_values("config.json", config, CONFIG)
    for key, meaning in FOREIGN_KEYS.items():
        if value := config.get(key):
            said = f"{key} = {shown(value)}" if isinstance(value, int | float | str) else key
            raise UnsupportedCheckpoint(
                f"{(config['architectures'] or ['this model'])[0][:100]} is not implemented",
                f"config.json: {said} asks for {meaning}",
                "use a dense Llama, Mistral, Qwen2 or Qwen3 model, or an engine that supports this one",
            )
    if other := sorted(set(config["layer_types"] or ()) - ATTENTION_TYPES):
        raise UnsupportedCheckpoint(
            "layers of this kind are not implemented",
            f"config.json: layer_types has {shown(other)}",
            "use a model with attention in all layers, or an engine that supports this one",
        )
