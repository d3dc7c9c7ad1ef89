"""What a GPU needs to search fast: its tensor cores, and chains of operations as kernels where compiling them pays."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

# On an H100 the kernels save 0.7 s of the searches for 0.86e9 weights, and compiling them takes 12 to 25 s.
COMPILING_PAYS = 40e9

log = logging.getLogger(__name__)
_many = ContextVar("many weights are to be searched", default=False)


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Let a GPU multiply float32 matrices in TF32, which keeps as many digits as float16 and more range."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def compiled_chains(weights: int) -> Iterator[None]:
    """Let a GPU run `Fused` functions as kernels if so many weights are to be searched that compiling them pays."""
    before = _many.set(weights >= COMPILING_PAYS)
    try:
        yield
    finally:
        _many.reset(before)


class Fused:
    """A function of tensors that a GPU may run as few kernels. By itself each operation would pass over memory once.

    Compiled once for all sizes but those of last dimensions. Where there is no working compiler it runs as it stands,
    with a warning. To give the same bits either way it must not divide: Triton's quotients in float32 are not the
    nearest numbers.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, *tensors: Tensor) -> Any:
        """What the function gives."""
        if not (_many.get() and tensors[0].is_cuda):
            return self.function(*tensors)
        try:
            return self.lowered(*tensors)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            log.warning("no compiled kernels, so searches take longer: %s", str(error).strip().partition("\n")[0])
            log.debug("this is why", exc_info=True)
            self.compiled = self.function
            return self.function(*tensors)

    def lowered(self, *tensors: Tensor) -> Any:
        """What the compiled function gives."""
        # torch.compile looks for a compiler, which takes seconds that those who do not search need not wait.
        self.compiled = self.compiled or torch.compile(self.function, fullgraph=True, dynamic=True)
        for tensor in tensors:
            torch._dynamo.mark_static(tensor, -1)
        return self.compiled(*tensors)
