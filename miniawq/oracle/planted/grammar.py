"""Faults from a grammar: function x kind x place x circumstance, planted into the correct implementation.

A kind changes the result (or the arguments) of a function, a place says where, and a circumstance says under which
arguments: real kernels are wrong past a tile, in the last part of a tensor, for one dtype or one view. Every function
has tables of its own, and every entry of a table meets every entry of the others.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from miniawq.oracle.planted import CORRECT

When = Callable[..., bool]
Function = Callable[..., Any]
LEVEL_OF = {
    "pack": "L0",
    "unpack": "L0",
    "dequantize": "L1",
    "quantize": "L2",
    "matmul": "L3",
    "load_checkpoint": "L4",
    "search_scales": "L5",
    "search_clip": "L5",
}


@dataclass(frozen=True)
class Bred:
    """One fault of the grammar: the function, the kind, the place and the circumstance by name, and how it is made."""

    function: str
    kind: str
    place: str
    when: str
    make: Callable[[], Callable[..., Any]]

    @property
    def level(self) -> str:
        return LEVEL_OF[self.function]

    @property
    def name(self) -> str:
        """In words."""
        return ", ".join(part for part in (self.function, self.kind, self.place, self.when) if part)

    def target(self) -> SimpleNamespace:
        """The correct implementation with the fault."""
        return SimpleNamespace(name=self.name, **CORRECT | {self.function: self.make()})


# Places of a tensor of any shape, as masks of its last two dimensions.


def rows_of(t: Tensor) -> Tensor:
    return torch.arange(t.shape[-2] if t.dim() > 1 else 1)[:, None]


def columns_of(t: Tensor) -> Tensor:
    return torch.arange(t.shape[-1])[None]


PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "everywhere": lambda t: rows_of(t) >= 0,
    "first column": lambda t: columns_of(t) == 0,
    "last column": lambda t: columns_of(t) == t.shape[-1] - 1,
    "last row": lambda t: rows_of(t) == rows_of(t)[-1:],
    "middle element": lambda t: (rows_of(t) == len(rows_of(t)) // 2) & (columns_of(t) == t.shape[-1] // 2),
    "rows past 64": lambda t: rows_of(t) >= 64,
    "columns past 256": lambda t: columns_of(t) >= 256,
}


def next_number(t: Tensor) -> Tensor:
    """The next number of the dtype; a code or a word differs in its last bit."""
    if not t.is_floating_point():
        return t ^ 1
    bits = torch.int16 if t.element_size() == 2 else torch.int32 if t.element_size() == 4 else torch.int64
    moved = (t.contiguous().view(bits) + 1).view(t.dtype)
    return torch.where(t.isfinite() & (t != 0), moved, t)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "off by one unit": next_number,
    "its left neighbour": lambda t: t.roll(1, -1),
    "the row above": lambda t: t.roll(1, -2) if t.dim() > 1 else t.roll(1, -1),
}


def masked(t: Tensor, change: Callable[[Tensor], Tensor], place: Callable[[Tensor], Tensor]) -> Tensor:
    """The tensor changed in a place."""
    return torch.where(place(t).reshape((-1, place(t).shape[-1]) if t.dim() > 1 else (-1,)), change(t), t)


def changing(function: str, kind: str, place: str, when: When) -> Callable[[], Callable[..., Any]]:
    """A function whose result is changed in a place under a circumstance."""

    def wrong(*arguments: Any) -> Any:
        result = CORRECT[function](*arguments)
        if not when(*arguments) or not torch.as_tensor(result).numel():
            return result
        return masked(result, CHANGES[kind], PLACES[place])

    return lambda: wrong


# Circumstances.


def lies(t: Tensor) -> bool:
    return not t.is_contiguous()


def offset(t: Tensor) -> bool:
    return t.storage_offset() > 0


MATRIX: dict[str, When] = {
    "": lambda m: True,
    "more than 64 rows": lambda m: len(m) > 64,
    "more than 256 rows": lambda m: len(m) > 256,
    "one row": lambda m: len(m) == 1,
    "more than 1024 columns": lambda m: m.shape[1] > 1024,
    "an odd number of columns of words": lambda m: m.shape[1] % 2 == 1 or m.shape[1] % 16 == 8,
    "a view": lies,
    "an offset": offset,
    "a transposed view": lambda m: m.dim() == 2 and m.stride(0) == 1 and m.shape[0] > 1 and m.shape[1] > 1,
}

LAYER: dict[str, When] = {
    "": lambda w, z, s, g: True,
    "more than 4096 inputs": lambda w, z, s, g: len(w) > 4096,
    "more than 256 outputs": lambda w, z, s, g: s.shape[1] > 256,
    "more than 1024 outputs": lambda w, z, s, g: s.shape[1] > 1024,
    "8 outputs": lambda w, z, s, g: s.shape[1] == 8,
    "groups no power of two": lambda w, z, s, g: len(s) & (len(s) - 1) != 0,
    "more than 8 groups": lambda w, z, s, g: len(s) > 8,
    "one group": lambda w, z, s, g: len(s) == 1,
    "group_size -1": lambda w, z, s, g: g == -1,
    "group_size 64": lambda w, z, s, g: g == 64,
    "words a view": lambda w, z, s, g: lies(w),
    "zeros at an offset": lambda w, z, s, g: offset(z),
    "scales a view": lambda w, z, s, g: lies(s),
    "zeros all 15": lambda w, z, s, g: bool((z == -1).all()),
    "subnormal scales": lambda w, z, s, g: bool((s.abs() < 2.0**-14).any()),
}


def of_layer(when: When) -> When:
    """A circumstance of the layer of a product."""
    return lambda x, w, z, s, g, b=None: when(w, z, s, g)


PRODUCT: dict[str, When] = {
    **{name: of_layer(when) for name, when in LAYER.items() if name not in ("zeros all 15", "subnormal scales")},
    "one row": lambda x, w, z, s, g, b=None: x.numel() == x.shape[-1],
    "65 rows and more": lambda x, w, z, s, g, b=None: x[..., 0].numel() > 64,
    "129 rows and more": lambda x, w, z, s, g, b=None: x[..., 0].numel() > 128,
    "1000 rows": lambda x, w, z, s, g, b=None: x[..., 0].numel() >= 1000,
    "a vector": lambda x, w, z, s, g, b=None: x.dim() == 1,
    "three dimensions": lambda x, w, z, s, g, b=None: x.dim() == 3,
    "bfloat16": lambda x, w, z, s, g, b=None: x.dtype == torch.bfloat16,
    "float32": lambda x, w, z, s, g, b=None: x.dtype == torch.float32,
    "a bias": lambda x, w, z, s, g, b=None: b is not None,
    "a bias and one row": lambda x, w, z, s, g, b=None: b is not None and x.numel() == x.shape[-1],
    "a bias and 65 rows": lambda x, w, z, s, g, b=None: b is not None and x[..., 0].numel() > 64,
    "a bias that is a view": lambda x, w, z, s, g, b=None: b is not None and lies(b),
    "x a view": lambda x, w, z, s, g, b=None: lies(x),
    "x repeated": lambda x, w, z, s, g, b=None: x.dim() > 1 and x.stride(0) == 0,
    "x at an offset": lambda x, w, z, s, g, b=None: offset(x),
    "bfloat16 and a bias": lambda x, w, z, s, g, b=None: b is not None and x.dtype == torch.bfloat16,
    "a view and a bias": lambda x, w, z, s, g, b=None: b is not None and lies(x),
}


WEIGHTS: dict[str, When] = {
    "": lambda w, g: True,
    "more than 64 outputs": lambda w, g: len(w) > 64,
    "more than 256 outputs": lambda w, g: len(w) > 256,
    "more than 8 groups": lambda w, g: g != -1 and w.shape[1] // g > 8,
    "groups no power of two": lambda w, g: g != -1 and w.shape[1] // g & (w.shape[1] // g - 1) != 0,
    "group_size -1": lambda w, g: g == -1,
    "group_size 64": lambda w, g: g == 64,
    "float64": lambda w, g: w.dtype == torch.float64,
    "bfloat16": lambda w, g: w.dtype == torch.bfloat16,
    "a view": lambda w, g: lies(w),
    "an offset": lambda w, g: offset(w),
}


def changed_results() -> Iterator[Bred]:
    """Faults of L0, L1 and L3: a kind of change in a place of the result, under a circumstance."""
    tables = {"pack": MATRIX, "unpack": MATRIX, "dequantize": LAYER, "matmul": PRODUCT}
    for function, circumstances in tables.items():
        for when, predicate in circumstances.items():
            for number, (kind, place) in enumerate((k, p) for k in CHANGES for p in PLACES):
                if function == "matmul" and kind == "off by one unit" and place == "everywhere":
                    continue  # the next number everywhere is a rounding that the sums may have
                if number % (4 if function == "matmul" else 3) == len(when) % 3:  # every kind and every place, thinned
                    yield Bred(function, kind, place, when, changing(function, kind, place, predicate))


def bred(function: str, kind: str, place: str, when: str, wrong: Function) -> Bred:
    """A fault that keeps nothing between calls."""
    return Bred(function, kind, place, when, lambda: wrong)


def only(function: str, when: When, wrong: Function) -> Function:
    """The wrong function under a circumstance, the right one otherwise."""
    return lambda *a: wrong(*a) if when(*a) else CORRECT[function](*a)
