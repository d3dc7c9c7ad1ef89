"""Write tiny random checkpoints of every family with transformers, and the logits it computes from them.

    python tests/golden/make_models.py        (needs transformers; made with 5.23.0 and torch 2.13.0)

Each directory of tests/golden/models holds config.json and model.safetensors as transformers writes them (weights in
bfloat16), and reference.safetensors: tokens [2, 40] and the logits [2, 40, 64] computed in float32 from those weights.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

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


def rope(kind: str, **more: float) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


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
}


def main() -> None:
    for seed, (name, config) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
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
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            logits = model(tokens).logits
        save_file({"tokens": tokens, "logits": logits}, directory / "reference.safetensors")
        print(name, config.rope_parameters)


if __name__ == "__main__":
    main()
