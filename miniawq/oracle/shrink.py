"""A failing example made small enough to print: entries that do not matter get a plain value, one half after the other.

Hypothesis shrinks what it draws, `covering.simplified` the sizes and layouts of a case; this shrinks the contents.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from miniawq.oracle.subject import Broken, Crash, Lacking, Subject, memory, twin

EIGHTS = -2004318072  # a word of eight codes of 8
PLAIN = {"codes": 8, "zeros": 8, "words": EIGHTS, "qweight": EIGHTS, "qzeros": EIGHTS, "scales": 1}  # others: 0
RUNS = 400  # of the target, for one example
ELEMENTS = 10_000_000  # of all runs together: a large example is given fewer


class Shrinker:
    """One rule with the arguments that break it; `broken` is the failure of the smallest ones found so far."""

    def __init__(self, subject: Subject, broken: Broken) -> None:
        assert broken.again is not None
        self.subject, self.broken, self.runs = subject, broken, 0
        self.rule, self.arguments = broken.again
        sizes = [a.numel() for a in (broken.call.arguments if broken.call else {}).values() if isinstance(a, Tensor)]
        self.most = max(12, min(RUNS, ELEMENTS // max(1, sum(sizes))))

    def run(self) -> Broken:
        """Make every tensor plainer while the rule stays broken."""
        for index, name in enumerate(list(inspect.signature(self.rule).parameters)[1 : len(self.arguments) + 1]):
            argument = self.arguments[index]
            if isinstance(argument, Tensor):
                self.tensor(argument, PLAIN.get(name, 0), partial(self.put, index))
            elif is_dataclass(argument):
                for field in fields(argument):
                    part = getattr(self.arguments[index], field.name)
                    if isinstance(part, Tensor):
                        put = self.putter(index, field.name)
                        self.tensor(part, PLAIN.get(field.name, 0), put)
        return self.broken

    def put(self, index: int, value: Any) -> tuple[Any, ...]:
        """The arguments with another one in its place."""
        return (*self.arguments[:index], value, *self.arguments[index + 1 :])

    def putter(self, index: int, field: str) -> Callable[[Tensor], tuple[Any, ...]]:
        """As `put`, for one field of an argument."""
        return lambda value: self.put(index, replace(self.arguments[index], **{field: value}))

    def tensor(self, tensor: Tensor, plain: float, put: Callable[[Tensor], tuple[Any, ...]]) -> None:
        """Set ever smaller stretches of a tensor to its plain value, then round what is left."""
        best, length = tensor, memory(tensor).numel()
        size = length
        while size and self.runs < self.most:
            for start in range(0, min(length, size * self.most), size):
                best = self.tried(best, partial(fill, start, size, plain), put)
            size //= 2
        if tensor.is_floating_point():
            for steps in (1, 8, 64):
                best = self.tried(best, partial(round_to, steps), put)

    def tried(
        self, best: Tensor, change: Callable[[Tensor], object], put: Callable[[Tensor], tuple[Any, ...]]
    ) -> Tensor:
        """The changed tensor if it still breaks the rule, else the one before."""
        if self.runs >= self.most:
            return best
        self.runs += 1
        other = twin(best)
        change(memory(other))
        if torch.equal(memory(other).nan_to_num(), memory(best).nan_to_num()):
            return best
        arguments = put(other)
        broken = breaks(self.subject, self.rule, arguments)
        if broken is None:
            return best
        broken.setting = self.broken.setting
        self.broken, self.arguments = broken, arguments
        return other


def fill(start: int, size: int, plain: float, flat: Tensor) -> None:
    """A stretch set to the plain value."""
    flat[start : start + size].fill_(plain)


def round_to(steps: int, flat: Tensor) -> None:
    """Everything rounded to 1 / steps."""
    flat.copy_((flat.double() * steps).round() / steps)


def breaks(subject: Subject, rule: Callable[..., None], arguments: tuple[Any, ...]) -> Broken | None:
    """The failure of a rule with these arguments, if it fails; an example that the rule cannot judge is none."""
    try:
        rule(subject, *arguments)
    except Broken as broken:
        broken.call = subject.last
        return broken
    except (Lacking, Crash, ArithmeticError, ValueError, RuntimeError, IndexError):
        return None
    return None


def made_small(subject: Subject, broken: Broken) -> Broken:
    """The same failure with a smaller example, where the check has said how to judge one."""
    return Shrinker(subject, broken).run() if broken.again else broken
