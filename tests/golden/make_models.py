"""Write tiny random checkpoints of every family with transformers, and the logits it computes from them.

    python tests/golden/make_models.py [NAME ...]  (needs transformers; made with 5.23.0 or 5.24.0 and torch 2.13.0)

Each directory of tests/golden/models holds config.json and model.safetensors as transformers writes them (weights in
bfloat16), and reference.safetensors: tokens [2, 40] and the logits [2, 40, 64] computed in float32 from those weights.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Ernie4_5Config,
    Exaone4Config,
    Gemma3TextConfig,
    Glm4Config,
    GlmConfig,
    GraniteConfig,
    GraniteMoeHybridConfig,
    HeliumConfig,
    HunYuanDenseV1Config,
    InternLM3Config,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    Mistral3Config,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PixtralVisionConfig,
    Qwen2Config,
    Qwen3Config,
    SeedOssConfig,
    SmolLM3Config,
)

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
SMALL = {**TINY, "hidden_size": 16, "intermediate_size": 24, "pad_token_id": None}
THREE = {**SMALL, "num_hidden_layers": 3}


def rope(kind: str, **more: float) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


MINISTRAL3 = Ministral3Config(
    **SMALL,
    head_dim=8,
    **rope("yarn", factor=4.0, original_max_position_embeddings=16, llama_4_scaling_beta=0.1, mscale=1.0),
)
MODELS = {
    "llama": LlamaConfig(**TINY),
    "llama-mha-tied": LlamaConfig(**{**TINY, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-biases": LlamaConfig(**TINY, attention_bias=True, mlp_bias=True),
    "llama-head-dim": LlamaConfig(**TINY, head_dim=16),
    "llama-linear": LlamaConfig(**TINY, **rope("linear", factor=2.0)),
    "llama-dynamic": LlamaConfig(**{**TINY, "max_position_embeddings": 16}, **rope("dynamic", factor=2.0)),
    "llama3": LlamaConfig(
        **TINY,
        **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "llama-yarn": LlamaConfig(**TINY, **rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "mistral-full": MistralConfig(**TINY, sliding_window=None),
    "mistral-window": MistralConfig(**TINY, sliding_window=8),
    "qwen2": Qwen2Config(**TINY, sliding_window=8, use_sliding_window=False),
    "qwen2-window": Qwen2Config(**TINY, sliding_window=8, use_sliding_window=True, max_window_layers=1),
    "qwen3": Qwen3Config(**TINY, head_dim=16),
    "qwen3-biases-yarn": Qwen3Config(
        **{**TINY, "max_position_embeddings": 8192},
        head_dim=16,
        attention_bias=True,
        **rope("yarn", factor=4.0, original_max_position_embeddings=2048, beta_fast=24.0, beta_slow=2.0),
    ),
    "internlm3": InternLM3Config(**SMALL, head_dim=8, qkv_bias=True, bias=True, **rope("dynamic", factor=6.0)),
    "seed-oss": SeedOssConfig(**SMALL, head_dim=8),
    "seed-oss-biases": SeedOssConfig(**SMALL, head_dim=8, attention_out_bias=True, mlp_bias=True),
    "ministral": MinistralConfig(
        **SMALL, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "ministral3": MINISTRAL3,
    "smollm3": SmolLM3Config(**THREE, no_rope_layers=[1, 0, 1], **rope("default")),
    "smollm3-window": SmolLM3Config(
        **THREE, no_rope_layer_interval=2, sliding_window=8, use_sliding_window=True, **rope("default")
    ),
    "granite": GraniteConfig(
        **SMALL,
        embedding_multiplier=12.0,
        attention_multiplier=0.2,
        residual_multiplier=0.22,
        logits_scaling=6.0,
        attention_bias=True,
    ),
    "granite4": GraniteMoeHybridConfig(
        **SMALL,
        num_local_experts=0,
        shared_intermediate_size=24,
        layer_types=["full_attention"] * 2,
        position_embedding_type="rope",
        embedding_multiplier=12.0,
        attention_multiplier=0.2,
        residual_multiplier=0.22,
        logits_scaling=10.0,
        mamba_n_heads=2,
    ),
    "hunyuan": HunYuanDenseV1Config(
        **SMALL, head_dim=8, attention_bias=True, **rope("dynamic", alpha=1000.0, factor=1.0, beta_fast=32)
    ),
    "helium": HeliumConfig(**SMALL, head_dim=4, mlp_bias=True),
    "ernie": Ernie4_5Config(**SMALL, head_dim=8, use_bias=True),
    "phi3": Phi3Config(**SMALL, sliding_window=8),
    "phi3-long": Phi3Config(
        **{**SMALL, "hidden_size": 32},
        original_max_position_embeddings=16,
        **rope("longrope", partial_rotary_factor=0.75, short_factor=[1.0, 1.1, 1.3], long_factor=[1.5, 2.5, 4.0]),
    ),
    "glm": GlmConfig(**SMALL, head_dim=8, attention_bias=True),
    "glm4": Glm4Config(**SMALL, head_dim=8),
    "olmo2": Olmo2Config(**SMALL),
    "exaone4": Exaone4Config(
        **THREE, sliding_window=8, layer_types=["sliding_attention", "sliding_attention", "full_attention"]
    ),
    "exaone4-full": Exaone4Config(**SMALL, sliding_window=None, layer_types=["full_attention"] * 2),
    "gemma3": Gemma3TextConfig(
        **THREE,
        head_dim=8,
        query_pre_attn_scalar=5,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "mistral3-pictures": Mistral3Config(
        text_config=MINISTRAL3.to_dict(),
        vision_config=PixtralVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
        ),
    ),
}

# transformers computes InternLM3 by its class of Llama, and renames its keys. The published files say this.
INTERNLM3 = {"architectures": ["InternLM3ForCausalLM"], "qkv_bias": True, "bias": True}


def main() -> None:
    for seed, (name, config) in enumerate(MODELS.items()):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        torch.manual_seed(seed)
        kind = AutoModelForImageTextToText if "pictures" in name else AutoModelForCausalLM
        model = kind.from_config(config, attn_implementation="eager").eval()
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            # Large enough that attention is far from uniform and every term shows in the logits.
            parameter.data = 1 + 0.2 * noise if parameter.dim() == 1 and parameter.mean() == 1 else 0.3 * noise
        model.tie_weights()
        directory = Path(__file__).parent / "models" / name
        model.to(torch.bfloat16).save_pretrained(directory)
        (directory / "generation_config.json").unlink(missing_ok=True)
        tokens = torch.randint(TINY["vocab_size"], (2, 40))
        # Read again, because casting the model also cast its rotary frequencies.
        model = kind.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            logits = model(tokens).logits
        save_file({"tokens": tokens, "logits": logits}, directory / "reference.safetensors")
        if name == "internlm3":
            said = json.loads((directory / "config.json").read_text())
            kept = {key: value for key, value in said.items() if key not in ("attention_bias", "mlp_bias")}
            (directory / "config.json").write_text(json.dumps(kept | INTERNLM3, indent=2, sort_keys=True) + "\n")
        print(name, config.get_text_config().rope_parameters)


if __name__ == "__main__":
    main()
