"""What INT4 costs where one wrong token spoils an answer: exact match on sums and copies of growing length.

    python scripts/reasoning.py DENSE INT4 [INT4 ...] --items 200 --device cuda --no-compile

The first model is what the others are compared with, on the same items: sums such as `48 - 17 + 6` to be worked out
step by step, and lists of words to be written once more, or from the last to the first. A length is the number of steps
or words. Four solved items of its kind and length stand before each. Items are drawn from a fixed seed, texts are the
most probable ones, `miniawq generate --prompts` writes them, and flags that are not known here go there. Numbers are
in float32 unless a flag says otherwise, so that weights are compared and not arithmetic.

An interval is Wilson's, 95 % of one share. Differences are paired: of the items that only one of both models solves, p
is how probable a split at least as uneven would be if neither were better (McNemar's test, exact).
"""

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from miniawq.__main__ import main as miniawq
from miniawq.text.tokenizer import Tokenizer

SHOTS = 4
Z = 1.959964  # of a normal distribution, 95 % lie within so many standard errors
WORDS = (
    "apple bridge candle doctor engine forest garden hammer island jacket kitten ladder mirror needle orange pencil "
    "rabbit silver ticket umbrella valley window yellow zebra"
).split()
FLAGS = ("--raw", "--greedy", "--repetition-penalty", "1", "--stop", "\n", "--dtype", "float32", "--quiet")


class Item(NamedTuple):
    """A question with its one right answer."""

    task: str
    length: int
    prompt: str
    answer: str


def chain(draw: random.Random, length: int) -> tuple[str, str]:
    """Terms of one or two digits, to be added one after the other: a wrong step spoils the rest. None falls below 0."""
    asked, steps = str(value := draw.randint(20, 99)), []
    for _ in range(length):
        term = draw.randint(2, 19)
        step = f"- {term}" if value >= term and draw.random() < 0.5 else f"+ {term}"
        before, value = value, value + int(step.replace(" ", ""))
        asked += f" {step}"
        steps.append(f"{before} {step} = {value}")
    return f"Sum: {asked}\nSteps:", ", ".join(steps)


def copy(draw: random.Random, length: int) -> tuple[str, str]:
    listed = " ".join(draw.choice(WORDS) for _ in range(length))
    return f"List: {listed}\nCopy:", listed


def backwards(draw: random.Random, length: int) -> tuple[str, str]:
    listed = [draw.choice(WORDS) for _ in range(length)]
    return f"List: {' '.join(listed)}\nBackwards:", " ".join(reversed(listed))


TASKS: dict[str, tuple[Callable[[random.Random, int], tuple[str, str]], Sequence[int]]] = {
    "sum": (chain, (1, 2, 4, 8)),
    "copy": (copy, (8, 16, 32, 64)),
    "backwards": (backwards, (2, 3, 4, 5)),
}


def items_of(count: int) -> list[Item]:
    """So many of each task and length, the same on every machine."""
    found = []
    for task, (make, lengths) in TASKS.items():
        for length in lengths:
            draw = random.Random(f"{task} {length}")
            shots = "".join(" ".join(make(draw, length)) + "\n\n" for _ in range(SHOTS))
            made = [make(draw, length) for _ in range(count)]
            found += [Item(task, length, shots + question, answer) for question, answer in made]
    return found


def solved(model: str, items: Sequence[Item], flags: Sequence[str]) -> list[bool]:
    """Which items the model answers exactly."""
    tokenizer = Tokenizer(model)
    longest = max(len(tokenizer.encode(f" {item.answer}\n", False)) for item in items)
    with tempfile.TemporaryDirectory() as place:
        asked, answered = Path(place) / "asked.jsonl", Path(place) / "answered.jsonl"
        asked.write_text("\n".join(json.dumps({"prompt": item.prompt}) for item in items))
        words = ["generate", model, "--prompts", asked, "--output", answered, "--max-tokens", longest, *FLAGS, *flags]
        if code := miniawq([str(word) for word in words]):
            raise SystemExit(code)
        texts = [json.loads(line)["text"] for line in answered.read_text().splitlines()]
    return [text.strip() == item.answer for text, item in zip(texts, items, strict=True)]


def wilson(right: int, count: int) -> tuple[float, float]:
    """The interval of a share: those that lie within Z of their own standard errors of what was seen."""
    share, shrink = right / count, 1 + Z**2 / count
    middle = (share + Z**2 / (2 * count)) / shrink
    half = Z / shrink * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return middle - half, middle + half


def mcnemar(one: int, other: int) -> float:
    """The probability of a split at least as uneven as this one between two equally probable sides."""
    few, count = min(one, other), one + other
    return min(1.0, 2 * sum(math.comb(count, k) for k in range(few + 1)) / 2**count)


def shares(items: Sequence[Item], found: dict[str, list[bool]]) -> list[str]:
    """A row for each task and length, in Markdown, with the interval of each model."""
    lines = [f"| task | length | {' | '.join(found)} |", "|---" * (2 + len(found)) + "|"]
    for task, length in dict.fromkeys((item.task, item.length) for item in items):
        cells = []
        for right in found.values():
            here = [hit for hit, item in zip(right, items, strict=True) if (item.task, item.length) == (task, length)]
            low, high = wilson(sum(here), len(here))
            cells.append(f"{sum(here) / len(here):.1%} ({low:.0%} to {high:.0%})")
        lines.append(f"| {task} | {length} | {' | '.join(cells)} |")
    return lines


def differences(items: Sequence[Item], found: dict[str, list[bool]]) -> list[str]:
    """A row for each task and all of them, and each model beside the first."""
    lines = ["| task | model | solved | only the first | only this one | difference | p |", "|---" * 7 + "|"]
    (first, *_), tasks = found.values(), dict.fromkeys(item.task for item in items)
    for task in (*tasks, "all"):
        for name, right in found.items():
            pairs = [(a, b) for a, b, i in zip(first, right, items, strict=True) if task in (i.task, "all")]
            lost, won, count = pairs.count((True, False)), pairs.count((False, True)), len(pairs)
            change = (won - lost) / count
            half = Z * math.sqrt(max(0, (won + lost) / count - change**2) / count)
            cells = (f"{sum(b for _, b in pairs) / count:.1%}", lost, won, f"{change:+.1%} +- {half:.1%}")
            lines.append(f"| {task} | {name} | {' | '.join(map(str, cells))} | {mcnemar(lost, won):.3g} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="directories; the first is what the others are compared with")
    parser.add_argument("--items", type=int, default=200, help="of each task and length")
    arguments, flags = parser.parse_known_args()
    items, found = items_of(arguments.items), {}
    for model in arguments.models:
        started = time.monotonic()
        found[model] = solved(model, items, flags)
        print(f"{model}: {len(items)} items in {time.monotonic() - started:.0f} s", flush=True)
    print("", *shares(items, found), "", *differences(items, found), sep="\n")


if __name__ == "__main__":
    main()
