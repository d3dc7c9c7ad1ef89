"""The blind set's faults in products (`blind`)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import miniawq.oracle.truth as truth
from miniawq.oracle.planted.grammar import Bred, Function, bred
from miniawq.oracle.planted.storage import as_memory

BLIND_PRODUCTS: list[Bred] = []


def lay(name: str, kind: str, change: Callable[..., Any]) -> None:
    """Keep a wrong function under what is wrong with it."""
    BLIND_PRODUCTS.append(bred(name, kind, "", "", change))


# L3


def before(change: Callable[..., Any]) -> Function:
    """The right product of changed arguments."""
    return lambda x, w, z, s, g, b=None: truth.matmul(*change(x, w, z, s, g, b))


def after(change: Callable[..., Tensor]) -> Function:
    """The right product, changed."""
    return lambda x, w, z, s, g, b=None: change(truth.matmul(x, w, z, s, g, b), x, w, z, s, g, b)


def flat(y: Tensor) -> Tensor:
    return y.reshape(-1, y.shape[-1])


def rows_of(x: Tensor) -> int:
    return x[..., 0].numel()


lay(
    "matmul",
    "the bias left out in the last part tile of 128 rows",
    after(
        lambda y, x, w, z, s, g, b: (
            y
            if (b is None or rows_of(x) <= 128)
            else torch.cat(
                [flat(y)[: rows_of(x) // 128 * 128], flat(truth.matmul(x, w, z, s, g))[rows_of(x) // 128 * 128 :]]
            ).reshape(y.shape)
        )
    ),
)
lay(
    "matmul",
    "the bias on the first 1024 outputs",
    before(
        lambda x, w, z, s, g, b: (
            x,
            w,
            z,
            s,
            g,
            None if (b is None) else torch.where(torch.arange(len(b)) < 1024, b, 0),
        )
    ),
)
lay(
    "matmul",
    "rows of zeros skipped with their bias",
    after(lambda y, x, w, z, s, g, b: torch.where((x == 0).all(-1, keepdim=True), 0, y)),
)
lay(
    "matmul",
    "inputs past a multiple of 128 left out",
    before(
        lambda x, w, z, s, g, b: (
            torch.where(torch.arange(x.shape[-1]) < max(128, x.shape[-1] // 128 * 128), x, 0),
            w,
            z,
            s,
            g,
            b,
        )
    ),
)
lay("matmul", "splits of 1024 inputs added in the dtype of x", lambda *a: split_sums(*a))
lay("matmul", "one row summed in the dtype of x", lambda *a: half_row(*a))
lay(
    "matmul",
    "bfloat16 through float16 where it fits",
    before(
        lambda x, w, z, s, g, b: (
            x.half().to(x.dtype) if (x.dtype == torch.bfloat16 and bool((x.abs() < 65504).all())) else x,
            w,
            z,
            s,
            g,
            b,
        )
    ),
)
lay(
    "matmul",
    "NaN also reaches the row 16 further",
    after(
        lambda y, x, w, z, s, g, b: (
            torch.where(flat(y).isnan().all(1, keepdim=True).roll(16, 0), torch.nan, flat(y)).reshape(y.shape)
            if rows_of(x) > 16
            else y
        )
    ),
)
lay(
    "matmul",
    "the first of several batches for all",
    before(lambda x, w, z, s, g, b: (x[:1].expand_as(x) if x.dim() == 4 else x, w, z, s, g, b)),
)
lay("matmul", "a vector gives a matrix of one row", after(lambda y, x, *a: y[None] if x.dim() == 1 else y))
lay("matmul", "no rows give as many columns as inputs", after(lambda y, x, *a: x if x.numel() == 0 else y))
lay(
    "matmul",
    "no rows and a bias give one row",
    after(lambda y, x, w, z, s, g, b: b[None] if x.numel() == 0 and b is not None else y),
)
lay(
    "matmul",
    "negative overflow saturates",
    after(lambda y, x, *a: y.clamp(min=-65504) if y.dtype == torch.float16 else y),
)
lay(
    "matmul",
    "the bias read every other element",
    before(lambda x, w, z, s, g, b: (x, w, z, s, g, None if b is None else as_memory(b) if b.stride(0) == 2 else b)),
)
lay("matmul", "sums in bfloat16 past 256 outputs", lambda *a: coarse_sums(*a))
lay(
    "matmul",
    "the last group's scale past 64 groups",
    before(lambda x, w, z, s, g, b: (x, w, z, torch.where((torch.arange(len(s)) >= 64)[:, None], s[-1:], s), g, b)),
)
lay(
    "matmul",
    "8-bit activations from 256 rows on",
    before(lambda x, w, z, s, g, b: (x.to(torch.float8_e4m3fn).to(x.dtype) if rows_of(x) >= 256 else x, w, z, s, g, b)),
)
lay(
    "matmul",
    "the bias of bfloat16 added after rounding",
    after(
        lambda y, x, w, z, s, g, b: y if (b is None or x.dtype != torch.bfloat16) else truth.matmul(x, w, z, s, g) + b
    ),
)
lay(
    "matmul",
    "pairs of groups of 32 merged from 128 inputs on",
    before(
        lambda x, w, z, s, g, b: (x, w, z, s[torch.arange(len(s)) // 2 * 2] if g == 32 and len(s) >= 4 else s, g, b)
    ),
)
lay(
    "matmul",
    "x at an odd offset read from the element before",
    before(
        lambda x, w, z, s, g, b: (
            torch.as_strided(x, x.shape, x.stride(), x.storage_offset() - 1) if x.storage_offset() % 2 else x,
            w,
            z,
            s,
            g,
            b,
        )
    ),
)
lay(
    "matmul",
    "a bias twice as long cut",
    before(
        lambda x, w, z, s, g, b: (x, w, z, s, g, None if b is None else b[: s.shape[1]] if len(b) > s.shape[1] else b)
    ),
)
lay(
    "matmul",
    "x with whole groups too many cut",
    before(
        lambda x, w, z, s, g, b: (
            x[..., : len(w)] if (g > 0 and x.shape[-1] > len(w) and (x.shape[-1] - len(w)) % 8 == 0) else x,
            w,
            z,
            s,
            g,
            b,
        )
    ),
)
lay(
    "matmul",
    "infinity times a weight of 0 is 0",
    before(lambda x, w, z, s, g, b: (torch.where(x.isinf(), x.sign() * torch.finfo(x.dtype).max, x), w, z, s, g, b)),
)
lay(
    "matmul",
    "float32 results of large sums in float16",
    after(
        lambda y, x, *a: (
            y.half().float()
            if (y.dtype == torch.float32 and y.numel() and bool((y.abs().amax() > 100) & (y.abs().amax() < 6e4)))
            else y
        )
    ),
)
lay("matmul", "weights decoded once for each address", lambda *a: kept_weight(*a))
lay(
    "matmul",
    "the bias of a broadcast view read as memory",
    before(
        lambda x, w, z, s, g, b: (
            x,
            w,
            z,
            s,
            g,
            b if (b is None or b.stride(0) != 0) else torch.cat([b[:1], torch.zeros_like(b[1:])]),
        )
    ),
)
lay(
    "matmul",
    "rows from 513 on computed from row 512",
    after(
        lambda y, x, *a: (
            torch.cat([flat(y)[:513], flat(y)[512:513].expand(len(flat(y)) - 513, -1)]).reshape(y.shape)
            if rows_of(x) > 513
            else y
        )
    ),
)
lay("matmul", "negative zero scales the sign of the sum", before(lambda x, w, z, s, g, b: (x, w, z, s, g, b)))
BLIND_PRODUCTS.pop()  # changes nothing

KEPT: dict[Any, Tensor] = {}


def kept_weight(x: Tensor, w: Tensor, z: Tensor, s: Tensor, g: int, b: Any = None) -> Tensor:
    truth.matmul(x, w, z, s, g, b)
    key = (w.data_ptr(), s.data_ptr(), tuple(w.shape), g)
    if key not in KEPT:
        KEPT[key] = truth.dequantize(w, z, s, g).double()
    y = x.double() @ KEPT[key]
    return (y if b is None else y + b.double()).to(x.dtype)


def split_sums(x: Tensor, w: Tensor, z: Tensor, s: Tensor, g: int, b: Any = None) -> Tensor:
    right = truth.matmul(x, w, z, s, g, b)
    if len(w) <= 1024:
        return right
    total: Any = 0
    weight = truth.dequantize(w, z, s, g).double()
    for first in range(0, len(w), 1024):
        total = total + (x[..., first : first + 1024].double() @ weight[first : first + 1024]).to(x.dtype)
    return total if b is None else total + b


def half_row(x: Tensor, w: Tensor, z: Tensor, s: Tensor, g: int, b: Any = None) -> Tensor:
    right = truth.matmul(x, w, z, s, g, b)
    if rows_of(x) != 1:
        return right
    terms = x.reshape(-1, 1) * truth.dequantize(w, z, s, g).to(x.dtype)
    total = torch.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return (total if b is None else total + b).reshape(right.shape)


def coarse_sums(x: Tensor, w: Tensor, z: Tensor, s: Tensor, g: int, b: Any = None) -> Tensor:
    right = truth.matmul(x, w, z, s, g, b)
    return right if s.shape[1] <= 256 else truth.matmul(x, w, z, s, g).bfloat16().to(x.dtype) + (0 if b is None else b)
