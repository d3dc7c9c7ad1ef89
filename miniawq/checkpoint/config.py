"""`config.json` becomes a `LlamaConfig`, or is refused because it asks for something that is not implemented."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from miniawq.checkpoint.families import FAMILIES, MULTIPLIERS, TOWERS, Bias, Family
from miniawq.checkpoint.values import Key, checked_values, refuse, shown
from miniawq.errors import UnsupportedCheckpoint
from miniawq.model import ACTIVATIONS, INVERSE_FREQUENCIES, LlamaConfig, RopeConfig

LLAMA = FAMILIES["LlamaForCausalLM"]

# Keys of config.json that change the mathematics, with what they ask for.
FOREIGN_KEYS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), "mixture of experts"),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), "multi-head latent attention"),
    **dict.fromkeys(("linear_num_key_heads", "mamba_d_state", "mamba_d_ssm", "ssm_cfg"), "hybrid layers"),
    **dict.fromkeys(("vision_config", "audio_config", "thinker_config"), "pictures or sound as input"),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping"), "Gemma's soft-capping"),
    **dict.fromkeys(("alibi", "position_embedding_type"), "positions other than rotary ones"),
    **dict.fromkeys((*MULTIPLIERS, "logit_scale"), "scaled residuals"),
    "use_bidirectional_attention": "attention to later tokens",
    "add_bias_to_lm_head": "a bias on the head",
}
# Keys of a model of text and pictures that hold for its text, whatever `text_config` says.
KEPT_OUTSIDE = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config", "compression_config")
ATTENTION_TYPES = {"full_attention", "sliding_attention", "attention"}

# What config.json may say. The ranges have room for every published model: what is beyond them is an attack or a typo.
MOST_POSITIONS = 1 << 31
BIASES = ("attention_bias", "attention_out_bias", "mlp_bias", "qkv_bias", "bias", "use_bias")
CONFIG = {
    "architectures": Key("texts", "the class of the model"),
    "hidden_act": Key("text", "the activation of the feed-forward layers"),
    "hidden_activation": Key("text", "the activation of the feed-forward layers"),
    "query_pre_attn_scalar": Key("number", "queries are divided by its root", 1e-6, 1e9),
    "rope_local_base_freq": Key("number", "the base of the rotary embedding in layers with a window", 1.01, 1e15),
    "vocab_size": Key("integer", "rows of the embedding", high=1 << 24),
    "hidden_size": Key("integer", "width of the model", high=1 << 18),
    "intermediate_size": Key("integer", "width of the feed-forward layers", high=1 << 20),
    "shared_intermediate_size": Key("integer", "width of the feed-forward layers", high=1 << 20),
    "num_hidden_layers": Key("integer", "decoder layers", high=1 << 10),
    "num_attention_heads": Key("integer", "query heads", high=1 << 12),
    "num_key_value_heads": Key("integer", "key/value heads", high=1 << 12),
    "head_dim": Key("integer", "channels of a head", high=1 << 12),
    "rms_norm_eps": Key("number", "what is added in the norms", 1e-20, 1, default=1e-6),
    "max_position_embeddings": Key("integer", "the longest context", high=MOST_POSITIONS),
    "max_sequence_length": Key("integer", "the longest context", high=MOST_POSITIONS, default=2048),
    "original_max_position_embeddings": Key("integer", "the context before it was extended", high=MOST_POSITIONS),
    "tie_word_embeddings": Key("flag", "whether the head is the embedding", default=False),
    **{key: Key("flag", "biases", default=False) for key in BIASES},
    **{key: Key("number", "a multiplier", 1e-6, 1e6) for key in MULTIPLIERS},
    "sliding_window": Key("integer", "positions that a layer sees", high=MOST_POSITIONS),
    "no_rope_layers": Key("numbers", "0 for each layer without positions", 0, 1),
    "no_rope_layer_interval": Key("integer", "every how many layers one has no positions", high=MOST_POSITIONS),
    "use_sliding_window": Key("flag", "whether sliding_window holds", default=False),
    "max_window_layers": Key("integer", "the first layer with a window", low=0, high=MOST_POSITIONS),
    "layer_types": Key("texts", "the attention of each layer"),
    "rope_theta": Key("number", "the base of the rotary embedding", 1.01, 1e15),
    "rope_scaling": Key("object", "the rotary embedding"),
    "rope_parameters": Key("object", "the rotary embedding"),
    "partial_rotary_factor": Key("number", "the part of a head that is turned", 0, 1),
    "dtype": Key("text", "the dtype to compute in"),
    "torch_dtype": Key("text", "the dtype to compute in"),
}
ROPE = {
    "rope_type": Key("text", "the kind of rotary embedding"),
    "type": Key("text", "the kind of rotary embedding"),
    "rope_theta": CONFIG["rope_theta"],
    "partial_rotary_factor": CONFIG["partial_rotary_factor"],
    "original_max_position_embeddings": CONFIG["original_max_position_embeddings"],
    "factor": Key("number", "how much longer the context became", 1e-3, 1e6),
    "low_freq_factor": Key("number", "turns below which a channel is interpolated", 1e-6, 1e6),
    "high_freq_factor": Key("number", "turns above which a channel is kept", 1e-6, 1e6),
    "beta_fast": Key("number", "turns above which a channel is kept", 1e-6, 1e6),
    "beta_slow": Key("number", "turns below which a channel is interpolated", 1e-6, 1e6),
    "attention_factor": Key("number", "the factor of the rotary tables", 1e-3, 1e3),
    "mscale": Key("number", "the weight of the attention factor", 0, 1e3),
    "mscale_all_dim": Key("number", "the weight that it is divided by", 0, 1e3),
    "alpha": Key("number", "how much the base grows", 1e-3, 1e6),
    "llama_4_scaling_beta": Key("number", "how much queries grow with their position", 0, 1e3),
    "short_factor": Key("numbers", "divisors of the frequencies", 1e-3, 1e6),
    "long_factor": Key("numbers", "divisors of the frequencies in long texts", 1e-3, 1e6),
    "truncate": Key("flag", "whether bounds are rounded to channels", default=True),
}
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "llama_4_scaling_beta")


def text_of(config: Mapping[str, Any], notices: list[str]) -> dict[str, Any]:
    """The config of the text tower as one of its own, if this is a model of text and pictures whose text alone is
    right; other configs stay. A notice about what is ignored is added to `notices`.
    """
    outer = checked_values("config.json", config, CONFIG)
    towers = TOWERS.get((outer["architectures"] or [""])[0])
    if towers is None or not isinstance(outer.get("text_config"), Mapping):
        return dict(config)
    inner = checked_values("config.json: text_config", outer["text_config"], CONFIG)
    if (kind := inner.get("model_type")) not in towers:
        refuse("model_type", kind, "supported: " + ", ".join(towers), "config.json: text_config")
    notices.append("this model reads pictures too, which miniawq does not: its text is read alone")
    kept = {key: config[key] for key in KEPT_OUTSIDE if key in config}
    return {**outer["text_config"], **kept, "architectures": [towers[str(kind)]]}


def llama_config(config: Mapping[str, Any]) -> LlamaConfig:
    """The decoder that a parsed `config.json` describes; UnsupportedCheckpoint names a key that cannot be honoured."""
    architectures = checked_values("config.json", config, CONFIG)["architectures"] or ["missing"]
    if architectures[0] not in FAMILIES:
        refuse("architectures", architectures, "supported: " + ", ".join(FAMILIES))
    family = FAMILIES[architectures[0]]
    stated = {key: value for key, value in config.items() if value is not None}
    config = checked_values("config.json", {**family.defaults, **stated}, CONFIG)
    activation = config["hidden_activation"] or config["hidden_act"] or "silu"
    if activation not in ACTIVATIONS:
        refuse("hidden_act", activation, "supported: " + ", ".join(ACTIVATIONS))
    for key in ("vocab_size", "hidden_size", family.intermediate_size, "num_hidden_layers", "num_attention_heads"):
        if config[key] is None:
            refuse(key, None, "the key is missing")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    kv_heads, head_dim = config["num_key_value_heads"] or heads, config["head_dim"] or hidden // heads
    if heads % kv_heads:
        refuse("num_key_value_heads", kv_heads, f"{heads} query heads do not divide among them")
    if head_dim % 2 or not head_dim:
        refuse("head_dim", head_dim, "the rotary embedding turns pairs of channels")
    windows, (rope, local) = _layer_windows(config, family), _ropes(config, head_dim, family)
    return LlamaConfig(
        architecture=architectures[0],
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        intermediate_size=config[family.intermediate_size],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=config["rms_norm_eps"],
        max_position_embeddings=_longest(config),
        tie_word_embeddings=config["tie_word_embeddings"],
        qkv_bias=_has_bias(config, family.qkv_bias),
        o_bias=_has_bias(config, family.o_bias),
        mlp_bias=_has_bias(config, family.mlp_bias),
        qk_norm=family.qk_norm,
        layer_windows=windows,
        rope=rope,
        layer_ropes=_layer_ropes(config, family, rope, local, windows),
        names=family.names,
        hidden_act=activation,
        norm_offset=float(family.is_gemma),
        **_multipliers(config, family),
    )


def _multipliers(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    if family.is_gemma:
        scale = config["query_pre_attn_scalar"] ** -0.5
        return {"embedding_multiplier": config["hidden_size"] ** 0.5, "attention_multiplier": scale}
    return {key: config[key] for key in MULTIPLIERS if key in family.honours and config[key] is not None}


def _has_bias(config: Mapping[str, Any], bias: Bias) -> bool:
    return bias if isinstance(bias, bool) else any(config[key] for key in bias)


def _longest(config: Mapping[str, Any]) -> int:
    return int(config["max_position_embeddings"] or config["max_sequence_length"])


def _layer_windows(config: Mapping[str, Any], family: Family) -> tuple[int | None, ...]:
    """The sliding window of each layer, None for full attention.

    `layer_types` of transformers 5 says it for each layer. Without it Qwen configs state a `sliding_window` that holds
    only with `use_sliding_window`, from layer `max_window_layers` on, and others the layers from one without a window
    to the next.
    """
    layers, window = config["num_hidden_layers"], config["sliding_window"]
    if window is None or family.window == "never":
        return (None,) * layers
    if family.window == "switched" and not config.get("use_sliding_window", False):
        return (None,) * layers
    if types := config["layer_types"]:
        if len(types) != layers or not set(types) <= ATTENTION_TYPES:
            refuse("layer_types", types, "supported: one of full_attention and sliding_attention for each layer")
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    if family.no_rope == "listed":
        refuse("layer_types", None, "with a sliding_window it is needed")
    if family.window == "pattern":
        period = config.get("sliding_window_pattern")
        if not isinstance(period, int) or period < 1:
            refuse("sliding_window_pattern", period, "expected a number of layers, or layer_types")
        return tuple(window if (layer + 1) % period else None for layer in range(layers))
    first = 0 if family.window == "always" else config["max_window_layers"]
    first = layers if first is None else first
    return tuple(window if layer >= first else None for layer in range(layers))


def _layer_ropes(
    config: Mapping[str, Any],
    family: Family,
    rope: RopeConfig,
    local: RopeConfig,
    windows: tuple[int | None, ...],
) -> tuple[RopeConfig, ...]:
    """The rotary embedding of each layer, `local` in one with a window; without positions nothing is turned."""
    layers = config["num_hidden_layers"]
    turned = [True] * layers
    if family.no_rope == "unless said":
        turned = [config.get("position_embedding_type") == "rope"] * layers
    if family.no_rope == "without window" and config["sliding_window"] is not None:
        turned = [window is not None for window in windows]
    if family.no_rope == "listed":
        interval = config["no_rope_layer_interval"] or 4
        listed = config["no_rope_layers"] or [(layer + 1) % interval for layer in range(layers)]
        if len(listed) != layers:
            refuse("no_rope_layers", listed, f"expected {layers} numbers, one for each layer")
        turned = [bool(number) for number in listed]
    kinds = [rope if window is None else local for window in windows]
    return tuple(
        kind if is_turned else replace(kind, rotary_dim=0) for kind, is_turned in zip(kinds, turned, strict=True)
    )


def _ropes(config: Mapping[str, Any], head_dim: int, family: Family) -> tuple[RopeConfig, RopeConfig]:
    """The rotary embedding, and that of layers with a window."""
    if not family.is_gemma:
        rope = rope_config(config, head_dim, family)
        return rope, rope
    local = {"rope_type": "default", "rope_theta": config["rope_local_base_freq"]}
    given = config["rope_parameters"] or {}
    if not given.keys() & {"full_attention", "sliding_attention"}:
        given = {"full_attention": given}
    both = given.get("full_attention") or None, given.get("sliding_attention") or local
    scaling = config["rope_scaling"], None
    whole, windowed = (
        rope_config({**config, "rope_parameters": one, "rope_scaling": old}, head_dim, family)
        for one, old in zip(both, scaling, strict=True)
    )
    return whole, windowed


def rope_config(config: Mapping[str, Any], head_dim: int, family: Family = LLAMA) -> RopeConfig:
    """The rotary embedding that config.json describes."""
    config = checked_values("config.json", config, CONFIG)
    key = "rope_parameters" if config["rope_parameters"] else "rope_scaling"  # of transformers 5 and 4
    given = _rope_values(key, config[key] or {})
    kind = given["rope_type"] or given["type"] or "default"
    if kind not in INVERSE_FREQUENCIES:
        refuse(f"{key}.rope_type", kind, "supported: " + ", ".join(INVERSE_FREQUENCIES))
    if kind not in ("default", "longrope") and given["factor"] is None:
        refuse(f"{key}.factor", None, f"rope_type {kind} needs it")
    longest, rotary_dim = _longest(config), _rotary_dim(config, given, head_dim, family)
    original = given["original_max_position_embeddings"] or config["original_max_position_embeddings"] or longest
    theta = given["rope_theta"] or config["rope_theta"] or 10000.0
    if given["llama_4_scaling_beta"] and given["original_max_position_embeddings"] is None:
        refuse(f"{key}.original_max_position_embeddings", None, "llama_4_scaling_beta needs it")
    if kind == "dynamic" and rotary_dim == 2:
        refuse("head_dim", head_dim, "rope_type dynamic needs more channels")
    if kind == "dynamic" and given["alpha"]:  # Hunyuan: the base grows once and for all
        kind, theta = "default", theta * given["alpha"] ** (rotary_dim / (rotary_dim - 2))
    rope = RopeConfig(
        rope_type=kind,
        rope_theta=theta,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        interleaved=family.interleaved,
        max_position_embeddings=longest,
        original_max_position_embeddings=original,
        truncate=given["truncate"],
        attention_factor=ATTENTION_FACTORS.get(kind, lambda *_: 1.0)(given, longest / original, original),
        short_factor=tuple(given["short_factor"] or ()) if kind == "longrope" else (),
        long_factor=tuple(given["long_factor"] or ()) if kind == "longrope" else (),
        **{name: given[name] for name in SCALING if given[name] is not None},
    )
    if kind == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        refuse(f"{key}.low_freq_factor", rope.low_freq_factor, f"high_freq_factor is {rope.high_freq_factor}")
    if kind == "yarn" and rope.beta_slow > rope.beta_fast:
        refuse(f"{key}.beta_slow", rope.beta_slow, f"beta_fast is {rope.beta_fast}")
    for name in ("short_factor", "long_factor"):
        if kind == "longrope" and len(getattr(rope, name)) != rotary_dim // 2:
            refuse(f"{key}.{name}", given[name], f"expected {rotary_dim // 2} numbers, one for each pair of channels")
    return rope


def _rotary_dim(config: Mapping[str, Any], given: Mapping[str, Any], head_dim: int, family: Family) -> int:
    """The channels of a head that are turned."""
    partial = given["partial_rotary_factor"]
    partial = config["partial_rotary_factor"] if partial is None else partial
    partial = 1.0 if partial is None else partial
    if partial != 1.0 and not family.turns_parts:
        refuse("partial_rotary_factor", partial, "only whole heads are rotated")
    size = int(head_dim * partial)
    if size % 2 or not size:
        refuse("partial_rotary_factor", partial, f"the rotary embedding turns pairs of the {head_dim} channels")
    return size


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


def _yarn_attention_factor(given: Mapping[str, Any], _ratio: float, _original: int) -> float:
    if given["attention_factor"] is not None:
        return float(given["attention_factor"])

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(given["factor"]) + 1.0 if given["factor"] > 1 else 1.0

    if given["mscale"] and given["mscale_all_dim"]:
        return mscale(given["mscale"]) / mscale(given["mscale_all_dim"])
    return mscale(1.0)


def _long_attention_factor(given: Mapping[str, Any], ratio: float, original: int) -> float:
    if given["attention_factor"] is not None:
        return float(given["attention_factor"])
    factor = ratio if given["factor"] is None else given["factor"]
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0


ATTENTION_FACTORS = {"yarn": _yarn_attention_factor, "longrope": _long_attention_factor}


def refuse_architecture(config: object) -> None:
    """UnsupportedCheckpoint if a key of config.json asks for other mathematics than the Llama family's."""
    config = checked_values("config.json", config, CONFIG)
    architecture = (config["architectures"] or ["this model"])[0]
    honoured = FAMILIES[architecture].honours if architecture in FAMILIES else ()
    for key, meaning in FOREIGN_KEYS.items():
        if (value := config.get(key)) and key not in honoured:
            said = f"{key} = {shown(value)}" if isinstance(value, int | float | str) else key
            raise UnsupportedCheckpoint(
                f"{architecture[:100]} is not implemented",
                f"config.json: {said} asks for {meaning}",
                "use a model of a family in docs/checkpoints.md, or an engine that supports this one",
            )
    if other := sorted(set(config["layer_types"] or ()) - ATTENTION_TYPES):
        raise UnsupportedCheckpoint(
            "layers of this kind are not implemented",
            f"config.json: layer_types has {shown(other)}",
            "use a model with attention in all layers, or an engine that supports this one",
        )
