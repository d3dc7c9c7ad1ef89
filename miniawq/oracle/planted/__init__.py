"""Planted faults: wrong implementations, each to be killed by a named check. `python -m miniawq.oracle.faults` runs
them.

A fault is a correct implementation (`truth` and `loader`) with some functions replaced by wrong ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import miniawq.oracle.loader as loader
import miniawq.oracle.truth as truth

CORRECT: dict[str, Callable[..., Any]] = {
    "pack": truth.pack,
    "unpack": truth.unpack,
    "dequantize": truth.dequantize,
    "quantize": truth.quantize,
    "matmul": truth.matmul,
    "load_checkpoint": loader.load_checkpoint,
    "search_scales": truth.search_scales,
    "search_clip": truth.search_clip,
}


@dataclass(frozen=True)
class Fault:
    """One planted fault, the id of the check that must find it, and the wrong functions."""

    name: str
    killer: str
    wrong: dict[str, Callable[..., Any]]

    @property
    def level(self) -> str:
        return self.killer.split(".")[0]

    def target(self) -> SimpleNamespace:
        """The implementation with the fault."""
        return SimpleNamespace(name=self.name, **CORRECT | self.wrong)


def reference() -> SimpleNamespace:
    """The implementation without a fault."""
    return SimpleNamespace(name="reference", **CORRECT)
