"""Many prompts at once beside one by one, with the demo model: throughput, equal texts, and memory beside the plan.

    OMP_NUM_THREADS=1 python scripts/bench_batch.py

Prompts are pieces of stories that the demo tells, of 3 to 200 tokens; answers have up to 10 to 120. In each round the
whole batch runs, and a share of the prompts one by one, so that both meet the same machine. Times are those of the
processor. Every text of the batch must be that of its prompt alone. Memory is that of tensors: weights, cache, and the
most that is alive while prompts run; the plan without its overhead.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.engine.batch import Batch, Request
from miniawq.engine.memory import footprint
from miniawq.engine.rows import PlainRows
from miniawq.engine.sampling import Sampling
from miniawq.generate import complete, load
from miniawq.hardware import size
from miniawq.model import Llama
from miniawq.text.tokenizer import Tokenizer
from tests.helpers.allocations import Allocations

STORY = Sampling(temperature=0.8, top_p=0.95)


def requests_of(model: Llama, tokenizer: Tokenizer, count: int) -> list[Request]:
    """Prompts of mixed length, the same on every machine."""
    found, draw = [], random.Random(0)
    for seed in range(-(-count // 8)):
        begun = tokenizer.encode("Once upon a time")
        story = complete(model, tokenizer, begun, max_tokens=400, sampling=STORY, seed=seed, stop_ids=frozenset())
        for _ in story:
            pass
        for _ in range(8):
            length = draw.randint(3, 200)
            first = draw.randrange(400 - length)
            found.append(Request(story.ids[first : first + length], draw.randint(10, 120)))
    return found[:count]


def room_of(requests: list[Request]) -> int:
    return max(len(request.prompt_ids) + request.max_tokens for request in requests)


def at_once(model: Llama, tokenizer: Tokenizer, requests: list[Request], rows: int) -> tuple[float, dict[int, str]]:
    """Seconds of the processor, and the texts."""
    started = time.process_time()
    batch = Batch(tokenizer, PlainRows(model, rows, room_of(requests)), requests)
    texts = {ending.number: "".join(ending.completion) for ending in batch}
    return time.process_time() - started, texts


def one_by_one(model: Llama, tokenizer: Tokenizer, requests: dict[int, Request]) -> tuple[float, dict[int, str]]:
    """Seconds of the processor, and the texts."""
    started = time.process_time()
    texts = {
        number: "".join(complete(model, tokenizer, request.prompt_ids, max_tokens=request.max_tokens))
        for number, request in requests.items()
    }
    return time.process_time() - started, texts


def compare_speed(model: Llama, tokenizer: Tokenizer, requests: list[Request], rows: int, rounds: int) -> None:
    """Print both times, their ratio, and how many texts are the same."""
    whole, alone, same = [], 0.0, 0
    for share in range(rounds):
        seconds, texts = at_once(model, tokenizer, requests, rows)
        whole.append(seconds)
        part = {number: requests[number] for number in range(share, len(requests), rounds)}
        seconds, expected = one_by_one(model, tokenizer, part)
        alone += seconds
        same += sum(texts[number] == text for number, text in expected.items())
        print(f"round {share + 1}: {whole[-1]:.1f} s at once, {seconds:.1f} s for {len(part)} one by one", flush=True)
    ratio = alone / statistics.median(whole)
    told = f"{len(requests)} prompts, {rows} rows: {statistics.median(whole):.1f} s (median of {rounds})"
    print(f"{told}; one by one {alone:.1f} s; {ratio:.2f} times as fast; {same} texts are the same")


def compare_memory(tokenizer: Tokenizer, requests: list[Request], rows: int) -> None:
    """Print what a batch takes beside the plan."""
    with Allocations() as allocations:
        model, _ = load(device="cpu")
        held, allocations.peak = sum(allocations.sizes.values()), 0
        at_once(model, tokenizer, requests, rows)
    checkpoint = open_checkpoint(None)
    planned = footprint(checkpoint, torch.float32, device="cpu", batch=rows, max_seq_len=room_of(requests), overhead=0)
    taken = allocations.peak
    told = f"{rows} prompts of up to {room_of(requests)} positions: {size(taken)}, planned {size(planned.total)}"
    print(f"{told}, {taken / planned.total:.3f} of it; {size(held)} before the batch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model, tokenizer = load(device="cpu")
    requests = requests_of(model, tokenizer, arguments.prompts)
    compare_memory(tokenizer, requests[: arguments.rows], arguments.rows)
    compare_speed(model, tokenizer, requests, arguments.rows, arguments.rounds)


if __name__ == "__main__":
    main()
