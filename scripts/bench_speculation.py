"""What guessing the next tokens gains and costs: one text with `--speculate` and without, a run in turn.

    python scripts/bench_speculation.py --shape llama-3.1-8b --context 512 --new-tokens 128

The weights are random, but for a head with which every token is followed by its successor, so that no rounding changes
the text. It never repeats itself; so guesses are made to order. Medians of `--runs`.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import SHAPES, Clock, empty_model, random_model

from miniawq.checkpoint.config import llama_config
from miniawq.engine.speculation import Lookup
from miniawq.engine.verifying import MOST_GUESSES, SpeculativeStep
from miniawq.generate import generate
from miniawq.model import Llama

EMBEDDING = 3000.0  # far above what all layers add
KINDS = {
    "nothing repeats itself: no guess": None,
    "every guess is right": MOST_GUESSES + 1,
    "guesses begin right, and go on wrong": 1,
    "guesses begin wrong": 0,
}


class Told(Lookup):
    """Guesses of which the first `right` come true."""

    def __init__(self, prompt: list[int], right: int) -> None:
        self.count = right
        super().__init__(prompt)

    def guess(self, most: int) -> list[int]:
        """As `Lookup.guess`."""
        first = self.ids[-1] + 1
        return [] if self.pause else [first + place if place < self.count else 0 for place in range(most)]


def counting(model: Llama) -> Llama:
    """The model, with a head that knows only which token went in."""
    embedding_VD = model.model.embed_tokens.weight.data.mul_(EMBEDDING)
    model.lm_head.weight.data.copy_(embedding_VD.roll(1, 0) / EMBEDDING)
    return model


def seconds_of(step: SpeculativeStep, prompt: list[int], count: int, lookup: Lookup | None) -> float:
    """Time of a text after its first token."""
    clock, tokens_BL = Clock(step.device), torch.tensor([prompt], device=step.device)
    steps = generate(step.model, tokens_BL, max_tokens=count, decoder=step, lookup=lookup)
    found = [*next(steps)]
    with clock():
        found += [token_id for (token_id,) in steps]
    assert found == list(range(prompt[-1] + 1, prompt[-1] + 1 + count)), "not the text of this model"
    return clock.seconds


def compare(kind: str, step: SpeculativeStep, arguments: argparse.Namespace) -> None:
    """Runs with and without guesses in turn."""
    prompt, count = list(range(1, 1 + arguments.context)), arguments.new_tokens
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(arguments.runs):
        for guesses in times:
            lookup = Lookup(prompt) if KINDS[kind] is None else Told(prompt, KINDS[kind])
            times[guesses].append(seconds_of(step, prompt, count, lookup if guesses else None))
    without, with_guesses = (statistics.median(times[guesses]) for guesses in (False, True))
    rates = f"{(count - 1) / without:.0f} tokens/s without, {(count - 1) / with_guesses:.0f} with guesses"
    print(f"{kind}: {rates}, {without / with_guesses:.3f} times; {lookup.right} of {lookup.guessed} right", flush=True)


@torch.inference_mode()
def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", default="llama-3.1-8b", choices=SHAPES)
    add("--context", type=int, default=512)
    add("--new-tokens", type=int, default=128)
    add("--runs", type=int, default=9)
    add("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    arguments = parser.parse_args()
    dtype = torch.bfloat16 if arguments.device.type == "cuda" else torch.float32
    config, clock = llama_config(SHAPES[arguments.shape]), Clock(arguments.device)
    model = counting(random_model(empty_model(config, "int4", 128), arguments.device, dtype))
    step = SpeculativeStep(model, arguments.context + arguments.new_tokens + 2)
    with clock():
        step.compile()
    print(f"compiled in {clock.seconds:.1f} s", flush=True)
    step.begin(torch.ones(1, 1, dtype=torch.long))
    ids = [3] * (MOST_GUESSES + 1)
    for what, call in (("one token", lambda: step.step(step.ids_B)), ("eight at once", lambda: step.verify(ids))):
        call()
        with clock():
            for _ in range(20):
                call()
        step.cache.length = 0
        print(f"{what}: {clock.seconds / 20 * 1e3:.3f} ms", flush=True)
    for kind in KINDS:
        compare(kind, step, arguments)


if __name__ == "__main__":
    main()
