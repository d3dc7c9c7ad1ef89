"""The large products of a plain step on a CPU, shared with helper threads that wait asleep.

torch's own threads share every operation in equal parts, and each waits for the slowest, in a loop that takes its
processor from others. Beside one busy process they make a step five to thirty times slower (docs/log). Here torch has
one thread, and a helper takes one task after another of those that are left. If it gets no processor it takes none.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from queue import SimpleQueue
from threading import Lock, Thread

import torch
from torch import Tensor

from miniawq.hardware import threads

HELPERS_OF_STEP = ContextVar("HELPERS_OF_STEP", default=0)


class Helpers:
    """The helper threads of this process: as many as were ever asked for. They end with it."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Have none: those of a parent process do not live in its fork."""
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._count, self._lock = 0, Lock()

    def call(self, function: Callable[[], None], count: int) -> None:
        """Let so many of them call a function that raises nothing."""
        with self._lock:
            for _ in range(self._count, count):
                self._start()
        for _ in range(count):
            self._calls.put(function)

    def _start(self) -> None:
        ready: SimpleQueue[None] = SimpleQueue()
        Thread(target=_help, args=(self._calls, ready), daemon=True, name="miniawq helper").start()
        self._count += 1
        # While it sets its number of threads, which later threads begin with, that of this thread is the same.
        ready.get()


def _help(calls: "SimpleQueue[Callable[[], None]]", ready: "SimpleQueue[None]") -> None:
    torch.set_num_threads(1)
    ready.put(None)
    with torch.inference_mode():
        while True:
            calls.get()()


HELPERS = Helpers()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=HELPERS.forget)


@contextmanager
def shared_step() -> Iterator[None]:
    """In the block torch takes one thread, and `hand_out` has helpers for the others that it had."""
    before = HELPERS_OF_STEP.set(torch.get_num_threads() - 1)
    try:
        with threads(1):
            yield
    finally:
        HELPERS_OF_STEP.reset(before)


def hand_out(tasks: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    """What the tasks return, in their order. In a `shared_step` helpers take some of them, in inference mode.

    When all have ended, the error of one that failed is raised.
    """
    helpers = min(HELPERS_OF_STEP.get(), len(tasks) - 1)
    if helpers < 1:
        return [task() for task in tasks]
    left, ended = deque(enumerate(tasks)), SimpleQueue[tuple[int, Tensor | BaseException]]()

    def take() -> None:
        while True:
            try:
                number, task = left.popleft()
            except IndexError:
                return
            try:
                ended.put((number, task()))
            except BaseException as error:
                ended.put((number, error))

    HELPERS.call(take, helpers)
    take()
    results = dict[int, Tensor]()
    for number, result in [ended.get() for _ in tasks]:
        if isinstance(result, BaseException):
            raise result
        results[number] = result
    return [results[number] for number in range(len(tasks))]
