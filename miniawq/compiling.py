"""Functions that are compiled, and what of them outlives a process.

Inductor finds in its directory what it compiled before (`artifacts.py`), but tracing a function, to find out what to
look for, takes longer than that. `aot_compile` of torch keeps both, traced and compiled, in a file.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Choose = Callable[..., dict[str, int]]
Arguments = tuple[Any, ...]


class Compiled:
    """`function`, compiled for the shapes it meets with Inductor's `options`, and tiles by `choose` if it is given.

    `traced` makes of the arguments those that are traced, which may be marked (`any_length`).
    """

    def __init__(
        self,
        function: Callable[..., Any],
        options: dict[str, Any],
        choose: Choose | None = None,
        traced: Callable[..., Arguments] | None = None,
    ) -> None:
        self.options = options
        # Before torch 2.13 only what is compiled under this option can be kept.
        with torch._dynamo.config.patch(enable_aot_compile=True):
            self.lowered: Any = torch.compile(function, fullgraph=True, dynamic=False, options=options)
        self.choose, self.traced = choose, traced or (lambda *arguments: arguments)

    def __call__(self, *arguments: Any) -> Any:
        """As the function."""
        with self._tiles():
            return self.lowered(*self.traced(*arguments))

    def ahead(self, *arguments: Any) -> Any:
        """What computes the function for arguments like these, and can be saved."""
        with self._tiles():
            return self.lowered.aot_compile((self.traced(*arguments), {}))

    def _tiles(self) -> AbstractContextManager[Any]:
        if self.choose is None:
            return nullcontext()
        # Importing Inductor takes seconds, which those who do not compile need not wait.
        inductor = import_module("miniawq.inductor")
        return inductor.V.set_choices_handler(inductor.BlockSizes(self.choose))


def any_length(x: Tensor, dim: int = 0) -> Tensor:
    """x under another name, of which one size is not compiled in. x itself stays without a mark: a kept function, whose
    guards do not know marks, would refuse it.
    """
    alias = x.detach()
    torch._dynamo.mark_dynamic(alias, dim)
    return alias


class Kept:
    """A compiled function as an earlier process has left it at `path`, or compiled at its first call and left there.

    Arguments for which it was not made, and a torch that cannot keep it, go to the function compiled as usual.
    """

    def __init__(self, function: Compiled, path: Path) -> None:
        self.function, self.path = function, path
        self.is_new = True
        self.kept: Any = None

    def __call__(self, *arguments: Any) -> Any:
        """As the function."""
        if self.is_new:
            self.is_new = False
            self.kept = self._found(arguments) or self._made(arguments)
        if self.kept is not None and self.kept.guard_check(*arguments):
            return self.kept.fn(*arguments)
        return self.function(*arguments)

    def _found(self, arguments: Arguments) -> Any:
        try:
            # What is kept is C++, with the options that wrote it, but not with those that a C++ compiler needs.
            settings = import_module("torch._inductor.config")
            with self.path.open("rb") as file, settings.patch(self.function.options):
                kept: Any = torch.compiler.load_compiled_function(file)
            return kept if kept.guard_check(*arguments) else None
        except FileNotFoundError:
            return None
        except Exception as problem:
            log.debug("%s: %s", self.path, problem)
            return None

    def _made(self, arguments: Arguments) -> Any:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.function.ahead(*arguments).save_compiled_function(str(self.path))
        except Exception as problem:
            # Compiled as usual, it says what is wrong with the function itself.
            log.debug("%s is traced by every process: %s", self.path.stem, problem)
            return None
        return self._found(arguments)
