"""`config.json` becomes a `LlamaConfig`, or is refused because it asks for something that is not implemented."""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, NoReturn

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


def llama_config(config: Mapping[str, Any]) -> LlamaConfig:
    """The decoder that a parsed `config.json` describes; UnsupportedCheckpoint names a key that cannot be honoured."""
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
    return LlamaConfig(
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
        rope=rope_config(config, head_dim),
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


def rope_config(config: Mapping[str, Any], head_dim: int) -> RopeConfig:
    """The rotary embedding, from `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
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
    return RopeConfig(
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


def refuse_architecture(config: Mapping[str, Any]) -> None:
    """UnsupportedCheckpoint if a key of config.json asks for other mathematics than the Llama family's."""
    for key, meaning in FOREIGN_KEYS.items():
        if value := config.get(key):
            said = f"{key} = {value!r}" if isinstance(value, int | float | str) else key
            raise UnsupportedCheckpoint(
                f"{(config.get('architectures') or ['this model'])[0]} is not implemented",
                f"config.json: {said} asks for {meaning}",
                "use a dense Llama, Mistral, Qwen2 or Qwen3 model, or an engine that supports this one",
            )
    if other := sorted(set(config.get("layer_types") or ()) - ATTENTION_TYPES):
        raise UnsupportedCheckpoint(
            "layers of this kind are not implemented",
            f"config.json: layer_types has {', '.join(map(str, other))}",
            "use a model with attention in all layers, or an engine that supports this one",
        )


def refuse(key: str, value: object, why: str) -> NoReturn:
    """Raise UnsupportedCheckpoint: this key of config.json asks for something that is not implemented."""
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
