"""Functions that are compiled, and what of them outlives a process.

Inductor finds in its directory what it compiled before (`artifacts.py`), but tracing a function, to find out what to
look for, takes longer than that. torch's `aot_compile` keeps both, traced and compiled, in a file.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from miniawq.compiled.workshop import WORKSHOP, first_line

Choose = Callable[..., dict[str, int]]
Arguments = tuple[Any, ...]


def inductor() -> Any:
    """The module `inductor`, imported when it is needed: importing Inductor takes seconds."""
    return import_module("miniawq.compiled.inductor")


def own_copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with a code object of its own; one without a closure.

    Dynamo keeps what it has compiled with the code object, up to a limit, and tries one after the other. A copy of the
    code has a list of its own, which other shapes do not fill.
    """
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


class Compiled:
    """`function`, compiled for the shapes it meets with Inductor's `options`, and block sizes by `choose` if given.

    `traced` turns the arguments into those that are traced, some of whose dimensions may be marked (`any_length`).
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
            self.function: Any = torch.compile(function, fullgraph=True, dynamic=False, options=options)
        self.choose, self.traced = choose, traced or (lambda *arguments: arguments)

    def __call__(self, *arguments: Any) -> Any:
        with self._block_sizes():
            return self.function(*self.traced(*arguments))

    def ahead(self, *arguments: Any) -> Any:
        """The function compiled for arguments like these, which can be saved."""
        with self._block_sizes():
            return self.function.aot_compile((self.traced(*arguments), {}))

    def _block_sizes(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.choose is None else inductor().chosen_by(self.choose)


def any_length(x: Tensor, dim: int = 0) -> Tensor:
    """An alias of x whose dimension `dim` is marked dynamic. A kept function would refuse x itself with such a mark."""
    alias = x.detach()
    torch._dynamo.mark_dynamic(alias, dim)
    return alias


class Kept:
    """A compiled function as an earlier process left it at `path`; else compiled at its first call and left there.

    Other arguments than those it was made for go to the function compiled as usual, and so does everything if a torch
    cannot keep it, which is said once.
    """

    def __init__(self, function: Compiled, path: Path) -> None:
        self.function, self.path = function, path
        self.is_new = True
        self.kept: Any = None

    def __call__(self, *arguments: Any) -> Any:
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
            WORKSHOP.warn_once(f"{self.path} cannot be read, and is made again: {first_line(problem)}")
            return None

    def _made(self, arguments: Arguments) -> Any:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.function.ahead(*arguments).save_compiled_function(str(self.path))
        except Exception as problem:
            # Compiled as usual, the function says what is wrong with itself.
            WORKSHOP.warn_once(f"compiled functions are not kept, so every start takes longer: {first_line(problem)}")
            return None
        return self._found(arguments)
