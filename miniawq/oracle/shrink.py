"""A failing example made small enough to print: entries that do not matter get a plain value, one half after the other.

Hypothesis shrinks what it draws, `covering.simplified` the sizes and layouts of a case; this shrinks the contents.
"""

import inspect
import time
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from miniawq.oracle.subject import Broken, Crash, Lacking, Subject, memory, twin

EIGHTS = -2004318072  # a word of eight codes of 8
NINES = -1717986919  # and of 9: under zeros of 8 and scales of 1, a weight of 1
PLAIN = {"codes": 8, "zeros": 8, "words": EIGHTS, "qweight": EIGHTS, "qzeros": EIGHTS, "scales": 1}  # others: 0
CONSTANT = {"codes": 9, "words": NINES, "qweight": NINES}  # where plain values do not fail; others: 1
RUNS = 1000  # of the target, for one example
SECONDS = 10.0  # for one example: what takes long is made less small


class Shrinker:
    """One rule with the arguments that break it; `broken` is the failure of the smallest ones found so far."""

    def __init__(self, subject: Subject, broken: Broken) -> None:
        assert broken.again is not None
        self.subject, self.broken, self.runs, self.until = subject, broken, 0, 0
        self.rule, self.arguments = broken.again
        tensors = [a for a in (broken.call.arguments if broken.call else {}).values() if isinstance(a, Tensor)]
        self.share, self.end = RUNS // max(1, len(tensors)), time.monotonic() + SECONDS

    def run(self) -> Broken:
        """Make every tensor plainer while the rule stays broken."""
        for index, name in enumerate(list(inspect.signature(self.rule).parameters)[1 : len(self.arguments) + 1]):
            argument = self.arguments[index]
            if isinstance(argument, Tensor):
                self.tensor(argument, name, partial(self.put, index))
            elif is_dataclass(argument):
                for field in fields(argument):
                    part = getattr(self.arguments[index], field.name)
                    if isinstance(part, Tensor):
                        put = self.putter(index, field.name)
                        self.tensor(part, field.name, put)
        return self.broken

    def put(self, index: int, value: Any) -> tuple[Any, ...]:
        """The arguments with another one in its place."""
        return (*self.arguments[:index], value, *self.arguments[index + 1 :])

    def putter(self, index: int, field: str) -> Callable[[Tensor], tuple[Any, ...]]:
        """As `put`, for one field of an argument."""
        return lambda value: self.put(index, replace(self.arguments[index], **{field: value}))

    def tensor(self, tensor: Tensor, name: str, put: Callable[[Tensor], tuple[Any, ...]]) -> None:
        """Set columns, rows and then elements to the plain value, in ever smaller stretches; round what is left."""
        plain, length = PLAIN.get(name, 0), parts(tensor, FLAT).shape[0]
        best = self.tried(tensor, partial(fill, FLAT, 0, length, plain), put)
        if best is tensor and not bool((tensor == plain).all()):
            best = self.tried(tensor, partial(fill, FLAT, 0, length, CONSTANT.get(name, 1)), put)
        self.until += self.share  # what the tensors before did not use is left to this one
        for dim in (*reversed(range(tensor.dim())), FLAT):
            stretches = [(0, parts(tensor, dim).shape[0])]
            while stretches and self.runs < self.until and time.monotonic() < self.end:
                start, size = stretches.pop(0)
                if bool((parts(best, dim)[start : start + size] == plain).all()):
                    continue
                before, best = best, self.tried(best, partial(fill, dim, start, size, plain), put)
                if best is before and size > 1:
                    stretches += [(start, size // 2), (start + size // 2, size - size // 2)]
        if tensor.is_floating_point():
            for steps in (1, 8, 64):
                best = self.tried(best, partial(round_to, steps), put)

    def tried(
        self, best: Tensor, change: Callable[[Tensor], object], put: Callable[[Tensor], tuple[Any, ...]]
    ) -> Tensor:
        """The changed tensor if it still breaks the rule, else the one before."""
        other = twin(best)
        change(other)
        if torch.equal(memory(other).nan_to_num(), memory(best).nan_to_num()):
            return best
        self.runs += 1
        arguments = put(other)
        broken = breaks(self.subject, self.rule, arguments)
        if broken is None:
            return best
        broken.setting = self.broken.setting
        self.broken, self.arguments = broken, arguments
        return other


FLAT = -1  # in place of a dimension: all elements in a row


def parts(tensor: Tensor, dim: int) -> Tensor:
    """The tensor with this dimension first; what it repeats is there once."""
    if dim == FLAT:
        return memory(tensor)
    for repeated, stride in enumerate(tensor.stride()):
        tensor = tensor.narrow(repeated, 0, 1) if stride == 0 and tensor.shape[repeated] else tensor
    return tensor.movedim(dim, 0)


def fill(dim: int, start: int, size: int, plain: float, tensor: Tensor) -> None:
    """A stretch set to the plain value."""
    parts(tensor, dim)[start : start + size].fill_(plain)


def round_to(steps: int, tensor: Tensor) -> None:
    """Everything rounded to 1 / steps."""
    memory(tensor).copy_((memory(tensor).double() * steps).round() / steps)


def breaks(subject: Subject, rule: Callable[..., object], arguments: tuple[Any, ...]) -> Broken | None:
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
