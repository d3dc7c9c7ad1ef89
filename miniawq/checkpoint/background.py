"""Reading and writing in a second thread, so that a disk and a processor work at the same time."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items in the same order, each made in a second thread while the caller uses the one before."""
    source, thread = iter(items), ThreadPoolExecutor(1)
    try:
        coming: Future[list[T]] = thread.submit(_next, source)
        while found := coming.result():
            coming = thread.submit(_next, source)
            yield found[0]
    finally:
        # The garbage collector may end this while another thread begins, and to wait for ours would then never end.
        thread.shutdown(wait=False, cancel_futures=True)


def _next(source: Iterator[T]) -> list[T]:
    """The next item in a list, which is empty at the end: a future cannot hold a StopIteration."""
    return list(islice(source, 1))


class Background:
    """A second thread that does one task at a time, in order.

    The error of a task is raised by the next `run`, by `wait`, or at the end of the `with` block.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()

    def run(self, task: Callable[..., None], *arguments: Any) -> None:
        """Begin a task when the one before it is done."""
        self.wait()
        self._last = self._thread.submit(task, *arguments)

    def wait(self) -> None:
        """Return when the last task is done."""
        if self._last:
            self._last.result()
