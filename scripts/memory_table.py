"""The memory that models of 7B to 405B take, from their real configurations.

    python scripts/memory_table.py --batch 1,8,16 --max-seq-len 4096

For each model it makes a directory with its config.json and weight files that have headers and no values (they take no
room on the disk), and asks `miniawq plan` of it: weights as they lie in memory, keys and values of every sequence at
its full length, what a prompt takes beside them, and 1 GiB that the GPU's runtime takes.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from miniawq.checkpoint.quant_config import awq_block
from miniawq.checkpoint.shards import plan_shards
from miniawq.commands import plan
from miniawq.commands.plan import tensors_from_config

# hidden, intermediate, layers, heads, key/value heads, vocabulary
MODELS = {
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 32000),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128256),
    "Llama-2-13B": (5120, 13824, 40, 40, 40, 32000),
    "Yi-34B": (7168, 20480, 60, 56, 8, 64000),
    "Llama-3.1-70B": (8192, 28672, 80, 64, 8, 128256),
    "Llama-3.1-405B": (16384, 53248, 126, 128, 8, 128256),
}
GROUP_SIZE = 128
GIB = 1 << 30


def config_of(name: str) -> dict[str, Any]:
    """config.json of an INT4 checkpoint in groups of 128."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = MODELS[name]
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 131072,
        "quantization_config": awq_block(GROUP_SIZE, ["lm_head"]),
    }


def write_headers(directory: Path, config: dict[str, Any]) -> int:
    """A checkpoint that opens and holds no values; returns the bytes that it would have."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    shards = plan_shards(tensors_from_config(config, torch.bfloat16))
    for shard in shards:
        with open(directory / shard.file, "wb") as file:
            file.write(shard.header)
            file.truncate(shard.nbytes)
    if len(shards) > 1:
        weight_map = {spec.name: shard.file for shard in shards for spec in shard.specs}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(shard.nbytes for shard in shards)


def planned(directory: Path, batch: int, length: int) -> dict[str, Any]:
    """What `miniawq plan --json` tells."""
    words = [directory, "--json", "--batch", batch, "--max-seq-len", length, "--dtype", "bfloat16"]
    words += ["--device", "cuda", "--device-memory", "100000GiB"]
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        assert plan.main([str(word) for word in words]) == 0
    return json.loads(told.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", default="1,8,16", help="sequences at once")
    parser.add_argument("--max-seq-len", type=int, default=4096, help="tokens of each")
    arguments = parser.parse_args()
    batches = [int(batch) for batch in arguments.batch.split(",")]
    print(f"GiB for sequences of {arguments.max_seq_len} tokens, kv cache in bfloat16, groups of {GROUP_SIZE}\n")
    heads = ["model", "INT4 on disk", "weights", "kv cache of one", *(f"total at {batch}" for batch in batches)]
    print(f"| {' | '.join(heads)} | tensor-parallel degrees in vLLM |\n|---|{'---:|' * (len(heads) - 1)}---|")
    with tempfile.TemporaryDirectory() as work:
        for name in MODELS:
            nbytes = write_headers(Path(work) / name, config_of(name))
            plans = [planned(Path(work) / name, batch, arguments.max_seq_len) for batch in batches]
            one = plans[0]["kv_bytes_per_token"] * arguments.max_seq_len
            sizes = [nbytes, plans[0]["memory"]["weights"], one, *(each["total"] for each in plans)]
            works = [degree for degree, why in plans[0]["engines"]["vLLM Marlin"].items() if not why]
            cells = [f"{size / GIB:.1f}" for size in sizes]
            print(f"| {name} | {' | '.join(cells)} | {', '.join(works)} |", flush=True)


if __name__ == "__main__":
    main()
