"""The third blind set in products, L3."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import miniawq.oracle.truth as truth
from miniawq.oracle.planted.blind_second import cut
from miniawq.oracle.planted.blind_third import after, parts_of, refuse, reread, weight_of
from miniawq.oracle.planted.grammar import Bred, bred

Product = Callable[..., Tensor]

BLIND_THIRD_PRODUCTS: list[Bred] = []


def lay(function: str, kind: str, wrong: Product) -> None:
    """Keep a wrong function under what is wrong with it."""
    BLIND_THIRD_PRODUCTS.append(bred(function, kind, "", "", wrong))


def lay_kept(function: str, kind: str, make: Callable[[], Product]) -> None:
    """As `lay`, for a function that keeps something between calls."""
    BLIND_THIRD_PRODUCTS.append(Bred(function, kind, "", "", make))


def rows_of(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def weighed(when: Callable[..., bool], change: Callable[[SimpleNamespace], Any]) -> Product:
    """A change of the parts of a weight, in place, for some x."""

    def wrong(x: Tensor, w: Tensor, z: Tensor, s: Tensor, g: int, b: Tensor | None = None) -> Tensor:
        y = truth.matmul(x, w, z, s, g, b)
        if not when(x, g):
            return y
        parts = parts_of(w, z, s, g)
        change(parts)
        y = x.double() @ weight_of(parts).half().double()
        return (y if b is None else y + b.double()).to(x.dtype)

    return wrong


def with_x(change: Callable[[Tensor], Tensor]) -> Product:
    """The product of another x."""
    return lambda x, *a: truth.matmul(change(x), *a)


def with_rows(change: Callable[[Tensor], Tensor]) -> Product:
    """A change of the rows [T, N] of a result that has some."""
    return after("matmul", lambda y, *a: change(y.reshape(-1, y.shape[-1])).reshape(y.shape) if y.numel() else y)


def first_group(p: SimpleNamespace) -> None:
    if p.size > 32:
        p.scales[:], p.zeros[:] = p.scales[:1].clone(), p.zeros[:1].clone()


def lost(weight: Tensor, first: int) -> None:
    weight[first:] = 0


def sums_of_parts(y: Tensor, x: Tensor, w: Tensor, z: Tensor, s: Tensor, g: int, b: Tensor | None = None) -> Tensor:
    if x.dtype != torch.bfloat16 or rows_of(x) > 16 or len(w) < 256:
        return y
    weight = truth.dequantize(w, z, s, g).double()
    cuts = zip(x.double().tensor_split(4, -1), weight.tensor_split(4), strict=True)
    total = torch.stack([(part @ rows).bfloat16() for part, rows in cuts]).double().sum(0).bfloat16()
    return total if b is None else total + b


def racing() -> Product:
    calls = [0]

    def wrong(x: Tensor, w: Tensor, z: Tensor, s: Tensor, g: int, b: Tensor | None = None) -> Tensor:
        y = truth.matmul(x, w, z, s, g, b)
        calls[0] += len(w) >= 512 and rows_of(x) > 1
        if len(w) < 512 or rows_of(x) < 2 or calls[0] % 7:
            return y
        weight = truth.dequantize(w, z, s, g)[:, :64].double()
        y[..., :64] -= (x[..., -128:].double() @ weight[-128:]).to(y.dtype)
        return y

    return wrong


def dirty_after_refusal() -> Product:
    dirty = [False]

    def wrong(*arguments: Any) -> Tensor:
        was, dirty[0] = dirty[0], True
        y = truth.matmul(*arguments)
        dirty[0] = False
        if was:
            y[..., :8] = 0
        return y

    return wrong


def bias_twice(y: Tensor, x: Tensor, w: Tensor, z: Tensor, s: Tensor, g: int, b: Tensor | None = None) -> Tensor:
    return y if b is None or rows_of(x) > 16 or len(w) < 2048 else y + b


def bias_of_stride_0(x: Tensor, w: Tensor, z: Tensor, s: Tensor, g: int, b: Tensor | None = None) -> Tensor:
    return truth.matmul(x, w, z, s, g, b if b is None or b.dim() != 1 else reread(b, (1,)) if b.stride(0) == 0 else b)


def order_of_memory(y: Tensor, x: Tensor, *rest: Any) -> Tensor:
    """Rows as they lie in memory, under the shape of x."""
    if x.dim() != 3 or x.stride(0) >= x.stride(1) or not x.transpose(0, 1).is_contiguous():
        return y
    return y.transpose(0, 1).reshape(y.shape)


def one_row_stride(x: Tensor) -> Tensor:
    """Rows of a view of three dimensions, all as far apart as two positions are."""
    if x.dim() != 3 or x.is_contiguous() or x.stride(-1) != 1 or x.stride(0) < x.stride(1):
        return x
    return reread(x, (x.shape[1] * x.stride(1), x.stride(1), 1))


def aligned_rows(x: Tensor) -> Tensor:
    """Rows that do not begin at 16 bytes begin there all the same."""
    if x.dim() != 2 or x.stride(1) != 1 or x.dtype == torch.float32 or not x.numel():
        return x
    starts = torch.arange(len(x)) * x.stride(0) + x.storage_offset()
    flat = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return flat[(starts // 8 * 8)[:, None] + torch.arange(x.shape[1])]


def zeros_apart(y: Tensor, x: Tensor, w: Tensor, z: Tensor, s: Tensor, g: int, b: Tensor | None = None) -> Tensor:
    """x @ codes less the sum of x times the zeros: infinity less infinity."""
    return torch.where(x.isinf().any(-1, keepdim=True), torch.nan, y)


def bias_skipped(y: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return torch.where((x == 0).all(-1, keepdim=True), 0, y)


def unmasked(y_TN: Tensor) -> Tensor:
    """A store past the last column writes the first columns of the next row."""
    padding, n = -y_TN.shape[1] % 64, y_TN.shape[1]
    if not padding or n < 64:
        return y_TN
    return torch.cat([y_TN[:1], torch.cat([y_TN[:-1, :padding], y_TN[1:, padding:]], 1)])


def swizzled(y_TN: Tensor) -> Tensor:
    """Tiles of 16 rows in eights: of the last eight, if not whole, the first columns alone are written."""
    tiles = -(-len(y_TN) // 16)
    if tiles <= 8 or tiles % 8 == 0:
        return y_TN
    y_TN[tiles // 8 * 128 :, 64:] = 0
    return y_TN


def in_pairs(x: Tensor) -> Tensor:
    """Few rows two at a time: the odd one out is the one before it."""
    if x.dim() != 2 or len(x) not in (3, 5, 7):
        return x
    return torch.cat([x[:-1], x[-2:-1]])


def bias_by_address() -> Product:
    kept: dict[Any, Tensor] = {}

    def wrong(x: Tensor, w: Tensor, z: Tensor, s: Tensor, g: int, b: Tensor | None = None) -> Tensor:
        if b is not None:
            b = kept.setdefault((b.data_ptr(), b.shape, b.dtype), b.clone())
        return truth.matmul(x, w, z, s, g, b)

    return wrong


def first_dtype() -> Product:
    kept: dict[Any, torch.dtype] = {}

    def wrong(x: Tensor, w: Tensor, *rest: Any) -> Tensor:
        y = truth.matmul(x, w, *rest)
        return y.to(kept.setdefault((x.shape, w.shape), x.dtype))

    return wrong


def buffer_of_one_row() -> Product:
    kept: dict[Any, Tensor] = {}

    def wrong(*arguments: Any) -> Tensor:
        y = truth.matmul(*arguments)
        return kept.setdefault((y.shape, y.dtype), y).copy_(y) if y.numel() == y.shape[-1] else y

    return wrong


def one_row(x: Tensor, g: int) -> bool:
    return rows_of(x) == 1


lay("matmul", "one row: the group of a tile of 32 is 32 // size of the first tile", weighed(one_row, first_group))
lay("matmul", "up to 8 rows: inputs past the last whole 512 lost",
    weighed(lambda x, g: rows_of(x) <= 8 and x.shape[-1] > 1024,
            lambda p: lost(p.scales, len(p.scales) // 512 * 512)))  # fmt: skip
lay("matmul", "up to 16 rows: sums of four parts of bfloat16", after("matmul", sums_of_parts))
lay_kept("matmul", "a race: one call in seven loses a part of K in the first tile", racing)
lay_kept("matmul", "a refused call leaves locks behind: the next has a tile of zeros", dirty_after_refusal)
lay("matmul", "rows past 1024 are the first again", with_rows(lambda y: y[torch.arange(len(y)) % 1024]))
lay("matmul", "the bias added by both parts of K", after("matmul", bias_twice))
lay("matmul", "a bias that is one number repeated is read past its end", bias_of_stride_0)
lay("matmul", "batch and positions exchanged: rows as they lie in memory", after("matmul", order_of_memory))
lay("matmul", "the rows of x[:, 1:] all one stride apart", with_x(one_row_stride))
lay("matmul", "four dimensions give three",
    after("matmul", lambda y, x, *a: y.flatten(0, 1) if x.dim() == 4 else y))  # fmt: skip
lay("matmul", "float32 cut to bfloat16", with_x(lambda x: x.bfloat16().float() if x.dtype == torch.float32 else x))
lay("matmul", "bfloat16 by way of float16",
    with_x(lambda x: x.half().bfloat16() if x.dtype == torch.bfloat16 else x))  # fmt: skip
lay("matmul", "the result of bfloat16 by way of float16",
    after("matmul", lambda y, *a: y.half().to(y.dtype) if y.dtype == torch.bfloat16 else y))  # fmt: skip
lay("matmul", "the result of float32 by way of float16",
    after("matmul", lambda y, *a: y.half().to(y.dtype) if y.dtype == torch.float32 else y))  # fmt: skip
lay("matmul", "zeros times the sum of x: infinity gives NaN", after("matmul", zeros_apart))
lay("matmul", "a row of zeros has no bias", after("matmul", bias_skipped))
lay("matmul", "infinite sums of float16 cut to the largest number",
    after("matmul", lambda y, *a: y.clamp(-65504, 65504) if y.dtype == torch.float16 else y))  # fmt: skip
lay("matmul", "more than 64 rows: those past the last whole 16 left zero",
    with_rows(lambda y: cut(y, rows=len(y) // 16 * 16) if len(y) > 64 else y))  # fmt: skip
lay("matmul", "tiles in eights: the last eight not whole", with_rows(swizzled))
lay("matmul", "stores past the last column go to the next row", with_rows(unmasked))
lay("matmul", "inputs past the last whole 16 lost",
    weighed(lambda x, g: True, lambda p: lost(p.scales, len(p.scales) // 16 * 16)))  # fmt: skip
lay("matmul", "one row and group_size -1: inputs past 128 lost",
    weighed(lambda x, g: g == -1 and rows_of(x) == 1, lambda p: lost(p.scales, 128)))  # fmt: skip
lay_kept("matmul", "the bias kept by its address", bias_by_address)
lay_kept("matmul", "the dtype of the first call of a shape", first_dtype)
lay_kept("matmul", "one row is written in the row of the last call", buffer_of_one_row)
lay("matmul", "no batch of three rows is an error",
    lambda x, *a: truth.matmul(x, *a) if x.dim() != 3 or len(x) or not x.shape[1] else refuse("no rows"))  # fmt: skip
lay("matmul", "columns counted in 16 bits",
    after("matmul", lambda y, *a: y[..., torch.arange(y.shape[-1]) % 65536]))  # fmt: skip
lay("matmul", "rows of x begin at 16 bytes", with_x(aligned_rows))
lay("matmul", "NaN in x taken for zero", with_x(lambda x: torch.where(x.isnan(), 0, x)))
lay("matmul", "1024 rows and more forget the bias",
    lambda *a: truth.matmul(*a[:5]) if len(a) == 6 and rows_of(a[0]) >= 1024 else truth.matmul(*a))  # fmt: skip
lay("matmul", "three, five and seven rows in pairs", with_x(in_pairs))
lay("matmul", "one row: inputs past 24576 lost", weighed(one_row, lambda p: lost(p.scales, 24576)))
