"""What one process knows about its compiler: whether it may be used, by which thread, and for which forms."""

import logging
from collections.abc import Callable, Hashable
from threading import RLock, Thread, current_thread
from typing import Any

import torch

log = logging.getLogger(__name__)

TORCH_VERSIONS = ((2, 11), (2, 14))  # tried: from the first on, before the second


class Workshop:
    """One for a process (`WORKSHOP`): the compiler itself is one for a process."""

    def __init__(self) -> None:
        self._reserved_for: Thread | None = None
        self._verdicts: dict[Hashable, bool] = {}
        self._said: set[str] = set()
        self._lock = RLock()

    def reserve(self, thread: Thread | None) -> None:
        """Let no other thread compile, until called with None: a second one would wait for the first one's lock."""
        self._reserved_for = thread

    @property
    def may_compile(self) -> bool:
        """Whether the calling thread may, with this torch."""
        return self._reserved_for in (None, current_thread()) and self.knows_torch

    @property
    def knows_torch(self) -> bool:
        """Whether this torch is one of those that the room was tried with; says so once if it is not."""
        first, end = TORCH_VERSIONS
        found = tuple(int(part) for part in torch.__version__.split(".")[:2])
        if known := first <= found < end:
            return known
        tried = f"{first[0]}.{first[1]} to before {end[0]}.{end[1]}"
        self.warn_once(f"nothing is compiled with torch {torch.__version__}: miniawq was tried with torch {tried}")
        return False

    def accepts(self, key: tuple[Any, ...], prove: Callable[..., str]) -> bool:
        """Whether prove(*key) found nothing against what `key` names. Asked once; what is refused is said once."""
        with self._lock:
            if key not in self._verdicts:
                self._verdicts[key] = self._proven(key, prove)
            return self._verdicts[key]

    def _proven(self, key: tuple[Any, ...], prove: Callable[..., str]) -> bool:
        try:
            problem = prove(*key)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            problem = f"it cannot be built: {first_line(error)}"
            log.debug("this is why", exc_info=True)
        if problem:
            self.warn_once(f"the compiled product {key[0]!r} is left out on {key[1]}, which is slower: {problem}")
        return not problem

    def warn_once(self, text: str) -> None:
        """A warning that is given once in a process."""
        if text not in self._said:
            self._said.add(text)
            log.warning("%s", text)


WORKSHOP = Workshop()


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
