"""Tokens per second of one row on a CPU: miniawq's plain steps beside transformers, alone or beside busy processes.

    python scripts/peers/cpu_tokens.py my-awq dense --transformers /tmp/peers/bin/python --threads 1,0 --neighbours 0,1

Each engine is a process of its own that keeps its model: miniawq with the INT4 and the dense checkpoint, transformers
with the dense one in float32. They take turns, one text each, greedy, so a busy machine is so for all; medians of the
tokens after the first. 0 threads are torch's default. A neighbour is a process that does nothing. With one thread the
processor time of a token is told too (milliseconds): other processes make it longer only by what they take of caches
and memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEIGHBOUR = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
PROMPT = "def quicksort(items):\n"


def serve(engine: str, model: str, threads: int, new_tokens: int) -> None:
    """One text for each line of stdin; its tokens per second on stdout."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    write = {"transformers": by_transformers}.get(engine, by_miniawq)(model, new_tokens)
    for _ in sys.stdin:
        (wall, processor), *_, (wall_end, processor_end) = times = write()
        steps = len(times) - 1
        print(json.dumps([steps / (wall_end - wall), (processor_end - processor) / steps * 1e3]), flush=True)


def now() -> tuple[float, float]:
    """Seconds of the clock, and of this thread."""
    return time.perf_counter(), time.thread_time()


def by_miniawq(directory: str, new_tokens: int):
    sys.path.insert(0, str(ROOT))
    import torch

    from miniawq.generate import generate, load

    model, tokenizer = load(directory, device="cpu")
    prompt_BL = torch.tensor([tokenizer.encode(PROMPT)])
    return lambda: [now() for _ in generate(model, prompt_BL, max_tokens=new_tokens)]


def by_transformers(directory: str, new_tokens: int):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prompt = AutoTokenizer.from_pretrained(directory)(PROMPT, return_tensors="pt")
    times: list[tuple[float, float]] = []

    def stamp(_ids, _scores, **_options):
        times.append(now())
        return torch.zeros(1, dtype=torch.bool)

    def write():
        times.clear()
        model.generate(
            **prompt, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, stopping_criteria=[stamp]
        )
        return times

    return write


def main() -> None:
    """Print a line for each number of threads and neighbours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("int4", help="directory of an INT4 checkpoint")
    add("dense", help="directory of the dense checkpoint")
    add("--transformers", required=True, help="a Python that has transformers")
    add("--threads", default="1,0", help="numbers of threads (0: torch's default)")
    add("--neighbours", default="0,1", help="numbers of busy processes")
    add("--turns", type=int, default=7)
    add("--new-tokens", type=int, default=16)
    add("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.dense, int(arguments.threads), arguments.new_tokens)
        return
    for threads in arguments.threads.split(","):
        engines = {
            "int4": (sys.executable, arguments.int4),
            "dense": (sys.executable, arguments.dense),
            "transformers": (arguments.transformers, arguments.dense),
        }
        with ExitStack() as stack:
            flags = ["--transformers", "-", "--threads", threads, "--new-tokens", str(arguments.new_tokens)]
            processes = {
                name: started(stack, [python, __file__, model, model, "--serve", name, *flags])
                for name, (python, model) in engines.items()
            }
            for process in processes.values():
                turn(process)
            for neighbours in arguments.neighbours.split(","):
                with ExitStack() as busy:
                    for _ in range(int(neighbours)):
                        started(busy, [sys.executable, "-c", NEIGHBOUR])
                    turns = {name: [] for name in processes}
                    for _ in range(arguments.turns):
                        for name, process in processes.items():
                            turns[name].append(turn(process))
                rates = {name: statistics.median(rate for rate, _ in found) for name, found in turns.items()}
                said = {"threads": int(threads), "neighbours": int(neighbours), "load": os.getloadavg()[0]}
                said |= rates | {"ratio": rates["int4"] / rates["transformers"]}
                if threads == "1":
                    said["ms"] = {name: statistics.median(ms for _, ms in found) for name, found in turns.items()}
                print(json.dumps(said), flush=True)


def started(stack: ExitStack, command: list[str]) -> subprocess.Popen[str]:
    """A process that ends with the stack."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stack.callback(process.kill)
    return process


def turn(process: subprocess.Popen[str]) -> tuple[float, float]:
    """Tokens per second of one text, and the thread's milliseconds for one."""
    assert process.stdin
    assert process.stdout
    print(file=process.stdin, flush=True)
    return tuple(json.loads(process.stdout.readline()))


if __name__ == "__main__":
    main()
