"""A checkpoint of random weights in the shapes of a known model, written one tensor at a time.

    python scripts/random_checkpoint.py tinyllama /tmp/tinyllama-4 --layers 4

For measurements of time and memory, which do not depend on the values. The tokenizer is that of the demo model.
"""

import argparse
import json
from pathlib import Path

import torch

from miniawq.model import Llama, LlamaConfig
from miniawq.shards import ShardWriter

TOKENIZER = Path(__file__).parents[1] / "tests" / "data" / "fairytales"
COMMON = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16"}
SHAPES = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "vocab_size": 2048,
        "max_position_embeddings": 2048,
    },
    "tinyllama": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_hidden_layers": 22,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
    "llama-3.1-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_hidden_layers": 80,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", choices=SHAPES)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", default="cpu", help="where the weights are drawn")
    arguments = parser.parse_args()
    config = COMMON | SHAPES[arguments.shapes]
    if arguments.layers:
        config["num_hidden_layers"] = arguments.layers
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_dict(config))
    specs = [(name, torch.bfloat16, tuple(tensor.shape)) for name, tensor in model.named_parameters()]
    generator = torch.Generator(arguments.device).manual_seed(0)
    with ShardWriter(arguments.destination, specs) as writer:
        for name, dtype, shape in specs:
            spread = 1.0 if len(shape) == 1 else shape[-1] ** -0.5
            values = torch.randn(shape, generator=generator, device=arguments.device, dtype=dtype) * spread
            writer.write(name, values + 1 if len(shape) == 1 else values)
        writer.finish()
    (arguments.destination / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (arguments.destination / name).write_bytes((TOKENIZER / name).read_bytes())


if __name__ == "__main__":
    main()
