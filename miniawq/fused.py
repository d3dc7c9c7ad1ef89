"""Chains of operations that a GPU does in one kernel. By itself each operation would pass over memory once."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("miniawq.fused")


class Fused:
    """A function of tensors, compiled where the first is on a GPU, for any sizes but those of their last dimensions.

    On a CPU it runs as it stands, and so it does, with a warning, where there is no working compiler. To give the same
    bits everywhere it must not divide: Triton's quotients in float32 are not the nearest numbers.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, *tensors: Tensor) -> Any:
        """What the function gives."""
        if not tensors[0].is_cuda:
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
        # Looking for a compiler takes seconds, which those who do not search need not wait.
        self.compiled = self.compiled or torch.compile(self.function, fullgraph=True, dynamic=True)
        for tensor in tensors:
            torch._dynamo.mark_static(tensor, -1)
        return self.compiled(*tensors)
