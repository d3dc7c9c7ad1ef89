"""Tiny models of the families that are written for llama.cpp, there and here: how far the logits are apart.

    python3 -m venv /tmp/venv-llama; /tmp/venv-llama/bin/pip install llama-cpp-python==0.3.36
    python scripts/peers/gguf_families.py --llama-cpp /tmp/venv-llama/bin/python --work /tmp/peers/gguf

Run it with miniawq's own Python. Queries and keys are large, so that attention is far from uniform and a wrong rotary
embedding shows. Groups of 16 fill no block of llama.cpp: weights are exact in float16 there, and products round to it.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from miniawq.commands.convert import convert_checkpoint
from miniawq.model import KVCache, Llama
from tests.helpers import tiny_checkpoints, tiny_tokenizers

IDS = [5 + 7 * place % 300 for place in range(40)]
ROOM = 256  # llama.cpp takes no smaller context
LARGE = ("q_proj.weight", "k_proj.weight", "qkv_proj.weight", "q_norm.weight", "k_norm.weight", "y_layernorm.weight")
LONG = {
    "rope_type": "longrope",
    "partial_rotary_factor": 0.75,
    "short_factor": [1 + place / 20 for place in range(12)],
    "long_factor": [1.5 + place / 2 for place in range(12)],
}
SCALED = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.3, "logits_scaling": 4.0}
ALPHA = {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0}
# The nearest config of tests/helpers/tiny_checkpoints.py, the class, and other keys.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", {}),
    "ministral": ("mistral", "Ministral", {}),
    "qwen2": ("qwen2", "Qwen2", {}),
    "qwen3": ("qwen3", "Qwen3", {}),
    "granite": ("llama", "Granite", SCALED),
    "granite-biases": ("llama-biased", "Granite", SCALED),
    "seed-oss": ("llama", "SeedOss", {}),
    "hunyuan": ("qwen3", "HunYuanDenseV1", {"rope_parameters": ALPHA}),
    "smollm3": ("llama", "SmolLM3", {"num_hidden_layers": 5}),
    "exaone4": ("olmo2", "Exaone4", {"head_dim": 32}),
    "olmo2": ("olmo2", "Olmo2", {}),
    "ernie": ("llama", "Ernie4_5", {}),
    "phi": ("phi3", "Phi3", {}),
    "phi-long": ("phi3", "Phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 32}),
    "phi-short": ("phi3", "Phi3", {"rope_parameters": LONG, "original_max_position_embeddings": ROOM}),
    "glm": ("glm4", "Glm", {}),
    "glm4": ("glm4", "Glm4", {}),
}
READ = f"""
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx={ROOM}, n_batch=64, n_threads=1, logits_all=True, verbose=False)
model.eval({IDS})
print(json.dumps(model.scores[:{len(IDS)}].tolist()))
"""


def made(directory: Path, family: str, architecture: str, changes: dict[str, Any]) -> Llama:
    """The model of an INT4 checkpoint with a tokenizer."""
    config = tiny_checkpoints.config_of(family, vocab_size=512, max_position_embeddings=2 * ROOM, **changes)
    config |= {"architectures": [f"{architecture}ForCausalLM"]}
    model = tiny_checkpoints.dense_model(config)
    for name, parameter in model.named_parameters():
        if name.endswith(LARGE):
            parameter.mul_(4)
    tensors = tiny_checkpoints.pack_model(model, group_size=16)
    block = {"quantization_config": tiny_checkpoints.AWQ_BLOCK | {"group_size": 16}}
    tiny_tokenizers.write(tiny_checkpoints.write(directory, config | block, tensors), tiny_tokenizers.byte_level())
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--llama-cpp", required=True, help="the Python that has llama-cpp-python")
    parser.add_argument("--work", type=Path, required=True, help="a directory for the files, which does not exist yet")
    arguments = parser.parse_args()
    for name, description in MODELS.items():
        directory, file = arguments.work / name, arguments.work / f"{name}.gguf"
        model = made(directory, *description)
        convert_checkpoint(directory, file, "gguf")
        with torch.no_grad():
            ours_LV = model(torch.tensor([IDS]), KVCache(model.config, 1, ROOM))[0]
        command = [arguments.llama_cpp, "-c", READ, str(file)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        theirs_LV = torch.tensor(json.loads(run.stdout))
        print(f"{name}: logits off by {float((theirs_LV - ours_LV).norm() / ours_LV.norm()):.1e} of their norm")


if __name__ == "__main__":
    main()
