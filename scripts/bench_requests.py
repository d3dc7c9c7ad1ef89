"""Whole requests of a model of random weights: tokens per second over many prompts, which are answered some at a time.

    python scripts/bench_requests.py --shape llama-3.1-8b --rows 64,128,256            # 512 prompts of 512 tokens
    python scripts/bench_requests.py --shape tiny --device cpu --prompts 6 --rows 3 --prompt-tokens 8 --new-tokens 5

Prompts and their reading are counted, compiling is not. What comes is what `generate --prompts` would write, from a
vocabulary of which the demo's tokenizer knows the beginning.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import SHAPES, Clock, empty_model, numbers, random_model

from miniawq.checkpoint.config import llama_config
from miniawq.checkpoint.hub import DEMO
from miniawq.engine.batch import Batch, Request
from miniawq.engine.rows import PlainRows, RowsStep, compiled_rows
from miniawq.hardware import peak_memory
from miniawq.model import Llama
from miniawq.text.tokenizer import Tokenizer


def answer(step: RowsStep, tokenizer: Tokenizer, arguments: argparse.Namespace, prompts: int) -> tuple[float, int]:
    """Seconds, and tokens that came."""
    draw = torch.Generator().manual_seed(0)
    known = min(step.model.config.vocab_size, 500)
    ids_BL = torch.randint(known, (prompts, arguments.prompt_tokens), generator=draw)
    requests = [Request(ids, arguments.new_tokens) for ids in ids_BL.tolist()]
    clock, tokens = Clock(arguments.device), 0
    with clock():
        for ending in Batch(tokenizer, step, requests, stop_ids=frozenset()):
            assert ending.completion is not None, ending.error
            "".join(ending.completion)
            tokens += len(ending.completion.ids)
    return clock.seconds, tokens


def measure(model: Llama, tokenizer: Tokenizer, rows: int, arguments: argparse.Namespace) -> None:
    """One line for a number of rows."""
    make = compiled_rows if arguments.compile else PlainRows
    step = make(model, rows, arguments.prompt_tokens + arguments.new_tokens)
    answer(step, tokenizer, arguments, rows)
    seconds, tokens = answer(step, tokenizer, arguments, arguments.prompts)
    told = f"{rows} rows: {arguments.prompts} prompts of {arguments.prompt_tokens} tokens in {seconds:.2f} s"
    print(f"{told}, {tokens / seconds:.0f} tokens/s, peak {peak_memory(arguments.device) / 1e9:.1f} GB", flush=True)


@torch.inference_mode()
def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="llama-3.1-8b")
    add("--rows", type=numbers, default=[64], metavar="N,N", help="texts at a time (64)")
    add("--prompts", type=int, default=512)
    add("--prompt-tokens", type=int, default=512)
    add("--new-tokens", type=int, default=128)
    add("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    add("--no-compile", dest="compile", action="store_false")
    arguments = parser.parse_args()
    dtype = torch.bfloat16 if arguments.device.type == "cuda" else torch.float32
    model = empty_model(llama_config(SHAPES[arguments.shape]), "int4", 128)
    model = random_model(model, arguments.device, dtype)
    for rows in arguments.rows:
        measure(model, Tokenizer(DEMO), rows, arguments)


if __name__ == "__main__":
    main()
