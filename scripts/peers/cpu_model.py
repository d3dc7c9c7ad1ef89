"""One token after another by transformers on this machine's processor, beside `scripts/bench.py` on the same shape.

    pip install torch==2.13.0 transformers          # in an environment of its own
    OMP_NUM_THREADS=1 python scripts/peers/cpu_model.py

TinyLlama-1.1B's shapes with random weights in bfloat16, one row, 64 positions of context, transformers' own cache.
"""

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@torch.inference_mode()
def main() -> None:
    """Print the median time of a token."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=64, help="positions before the first timed token (64)")
    parser.add_argument("--new-tokens", type=int, default=24, help="tokens to time (24)")
    arguments = parser.parse_args()
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        dtype=torch.bfloat16,
    )
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config).eval()
    output = model(torch.randint(32000, (1, arguments.context)), use_cache=True)
    seconds = []
    for _ in range(arguments.new_tokens):
        start = time.perf_counter()
        ids_B1 = output.logits[:, -1:].argmax(-1)
        output = model(ids_B1, past_key_values=output.past_key_values, use_cache=True)
        seconds.append(time.perf_counter() - start)
    middle = statistics.median(seconds)
    print(f"{torch.get_num_threads()} threads: {middle * 1e3:.1f} ms a token, {1 / middle:.2f} tokens/s")


if __name__ == "__main__":
    main()
