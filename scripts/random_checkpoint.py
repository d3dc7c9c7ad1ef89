"""A checkpoint of random weights in the shapes of a known model, written one tensor at a time.

    python scripts/random_checkpoint.py tinyllama /tmp/tinyllama-4 --layers 4
    python scripts/random_checkpoint.py llama-3.1-8b /tmp/8b --int4 --device cuda      # AutoAWQ GEMM, groups of 128
    python scripts/random_checkpoint.py llama-3.1-70b /tmp/70b --int4 --headers        # no values: for `miniawq plan`

For measurements of time and memory, which do not depend on the values. The tokenizer is that of the demo model.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from miniawq.checkpoint.config import llama_config
from miniawq.checkpoint.layouts import part_shapes
from miniawq.checkpoint.shards import ShardWriter, Spec, plan_shards
from miniawq.model import Llama

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


GROUP_SIZE = 128
AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP_SIZE, "zero_point": True}


def specs_of(model: Llama, is_int4: bool) -> list[Spec]:
    """Names, dtypes and shapes; packed are all linear layers but the head."""
    specs = []
    for name, module in model.named_modules():
        if is_int4 and isinstance(module, nn.Linear) and name != "lm_head":
            inputs, outputs = module.in_features, module.out_features
            parts = part_shapes("awq", inputs, outputs, inputs // GROUP_SIZE, torch.float16)
            specs += [Spec(f"{name}.{part}", dtype, shape) for part, (dtype, shape) in parts.items()]
        else:
            parameters = module.named_parameters(name, recurse=False)
            specs += [Spec(key, torch.bfloat16, tuple(tensor.shape)) for key, tensor in parameters]
    return specs


def random_values(spec: Spec, generator: torch.Generator) -> Tensor:
    """Weights that keep the size of what goes through them: any codes, zeros of 8, scales to fit."""
    name, dtype, shape = spec
    device = generator.device
    if name.endswith(".qweight"):
        return torch.randint(-(2**31), 2**31, shape, generator=generator, device=device).to(dtype)
    if name.endswith(".qzeros"):
        return torch.full(shape, 0x88888888 - 2**32, dtype=dtype, device=device)
    if name.endswith(".scales"):
        inputs = shape[0] * GROUP_SIZE
        return (torch.rand(shape, generator=generator, device=device) + 0.5).mul_(0.2 * inputs**-0.5).to(dtype)
    spread = 1.0 if len(shape) == 1 else shape[-1] ** -0.5
    values = torch.randn(shape, generator=generator, device=device, dtype=dtype) * spread
    return values + 1 if len(shape) == 1 else values


def write_values(directory: Path, specs: Sequence[Spec], generator: torch.Generator) -> None:
    """The weight files."""
    with ShardWriter(directory, specs) as writer:
        for spec in specs:
            writer.write(spec.name, random_values(spec, generator))
        writer.finish()


def write_headers(directory: Path, specs: Sequence[Spec]) -> None:
    """Weight files of the right sizes whose values are holes."""
    directory.mkdir(parents=True)
    shards = plan_shards(specs)
    for shard in shards:
        with open(directory / shard.file, "wb") as file:
            file.write(shard.header)
            file.truncate(shard.nbytes)
    places = {spec.name: shard.file for shard in shards for spec in shard.specs}
    if len(shards) > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", choices=SHAPES)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--int4", action="store_true", help="packed, as if it had been quantized")
    parser.add_argument("--headers", action="store_true", help="no values: files that take no room on the disk")
    parser.add_argument("--device", default="cpu", help="where the weights are drawn")
    arguments = parser.parse_args()
    config = COMMON | SHAPES[arguments.shapes]
    if arguments.layers:
        config["num_hidden_layers"] = arguments.layers
    with torch.device("meta"):
        model = Llama(llama_config(config))
    if arguments.int4:
        config |= {"quantization_config": AWQ}
    specs = specs_of(model, arguments.int4)
    if arguments.headers:
        write_headers(arguments.destination, specs)
    else:
        write_values(arguments.destination, specs, torch.Generator(arguments.device).manual_seed(0))
    (arguments.destination / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (arguments.destination / name).write_bytes((TOKENIZER / name).read_bytes())


if __name__ == "__main__":
    main()
