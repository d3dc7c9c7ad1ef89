"""The fifth blind set, products: tiles and split sums, biases and views of every argument, narrow steps on the way.

The rule of the draw stands in `blind_fifth`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import miniawq.oracle.truth as truth
from miniawq.oracle.planted.blind_fifth import (
    DTYPES,
    INPUTS,
    OUTPUTS,
    ROWS,
    TILES,
    Sowing,
    dense_strides,
    in_place,
    read_at,
    short,
    where,
)

BLIND_FIFTH_PRODUCTS = Sowing(7)
DRAW, sow, misread, forgetful = (
    BLIND_FIFTH_PRODUCTS.draw,
    BLIND_FIFTH_PRODUCTS.sow,
    BLIND_FIFTH_PRODUCTS.misread,
    BLIND_FIFTH_PRODUCTS.forgetful,
)
HALVES = DTYPES[:2]


def flat(y: Tensor) -> Tensor:
    """The result as rows."""
    return y.reshape(-1, y.shape[-1])


def altered(change: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The right result, after `change(y [T, N], x [T, K], weight [K, N], size, bias)`."""

    def wrong(x: Tensor, qw: Tensor, qz: Tensor, scales: Tensor, size: int, bias: Tensor | None = None) -> Tensor:
        right = truth.matmul(x, qw, qz, scales, size, bias)
        weight = truth.dequantize(qw, qz, scales, size)
        return change(flat(right), x.reshape(-1, x.shape[-1]), weight, size, bias).to(x.dtype).reshape(right.shape)

    return wrong


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double() @ weight.double()
    return y if bias is None else y + bias.double()


def product_outputs() -> None:
    most, tile = DRAW.choice(ROWS), DRAW.choice(TILES)
    sow(
        "matmul",
        f"rows past {most} are those of the rows {most} before",
        altered(lambda y, x, w, g, b: y[torch.arange(len(y)) % most]),
    )

    def one_more(y: Tensor, x: Tensor, *_: Any) -> Tensor:
        return torch.cat([y[:-1], y[-2:-1]]) if len(y) > tile and len(y) % tile == 1 else y

    sow("matmul", f"one row after whole tiles of {tile} rows is that of the row before", altered(one_more))
    outputs, remainder = DRAW.choice(OUTPUTS), DRAW.choice(TILES)

    def far(y: Tensor, *_: Any) -> Tensor:
        return where((torch.arange(y.shape[1]) >= outputs)[None], torch.zeros_like(y), y)

    sow("matmul", f"outputs past {outputs} are 0", altered(far))

    def tail(y: Tensor, x: Tensor, w: Tensor, g: int, b: Tensor | None) -> Tensor:
        n, k = y.shape[1], len(w)
        last = torch.arange(n) >= n // remainder * remainder
        return where(last[None], product(x[:, : k - k % 64 or k], w[: k - k % 64 or k], b), y)

    name = f"outputs past the last whole tile of {remainder} leave out inputs past the last whole 64"
    sow("matmul", name, altered(tail))


def product_inputs() -> None:
    part = DRAW.choice((512, 768, 1024, 1536, 2048))

    def split(y: Tensor, x: Tensor, w: Tensor, g: int, b: Tensor | None) -> Tensor:
        k = len(w)
        return y if k <= part else product(x[:, : k // part * part], w[: k // part * part], b)

    sow("matmul", f"inputs past the last whole {part} are left out, where there are more than {part}", altered(split))
    stages = DRAW.choice((2, 3, 4, 5))

    def pipeline(y: Tensor, x: Tensor, w: Tensor, g: int, b: Tensor | None) -> Tensor:
        size = len(w) if g == -1 else g
        groups = len(w) // size
        whole = groups // stages * stages * size
        return y if groups <= stages or whole == len(w) else product(x[:, : len(w) - size], w[: len(w) - size], b)

    name = f"the last group is left out where their number is no multiple of {stages} and greater"
    sow("matmul", name, altered(pipeline))


def product_kernels() -> None:
    few, wide = DRAW.choice((1, 2, 3, 4, 6, 8, 12, 16)), DRAW.choice(OUTPUTS)

    def specialised(y: Tensor, *_: Any) -> Tensor:
        return where((torch.arange(y.shape[1]) >= y.shape[1] - 8)[None], y.roll(8, 1), y) if fits(y) else y

    def fits(y: Tensor) -> bool:
        return len(y) == few and y.shape[1] > wide

    sow("matmul", f"with {few} rows and more than {wide} outputs, the last 8 are those before", altered(specialised))
    rows = DRAW.choice(ROWS)

    def whole_rows(x: Tensor, qw: Tensor, qz: Tensor, scales: Tensor, size: int, bias: Tensor | None = None) -> Tensor:
        right = truth.matmul(x, qw, qz, scales, size, bias)
        if size != -1 or x[..., 0].numel() <= rows:
            return right
        return truth.matmul(x, qw, qz.roll(1, 1), scales, size, bias)

    sow("matmul", f"with one group of all inputs and more than {rows} rows, zeros are those of 8 outputs before",
        whole_rows)  # fmt: skip
    low, block = DRAW.choice(ROWS), DRAW.choice((64, 128, 256))
    high = 4 * low

    def middle(x: Tensor, qw: Tensor, qz: Tensor, scales: Tensor, size: int, bias: Tensor | None = None) -> Tensor:
        right = truth.matmul(x, qw, qz, scales, size, bias)
        k, number = len(qw), x[..., 0].numel()
        if not low <= number <= high or k % block == 0 or len(scales) < 2:
            return right
        seen = scales.clone()
        seen[-1] = seen[-2]
        return truth.matmul(x, qw, qz, seen, size, bias)

    name = f"with {low} to {high} rows and inputs that are no multiple of {block}, the last group has the scales before"
    sow("matmul", name, middle)
    bits = DRAW.choice((16, 18, 20, 22))

    def narrow_index(y: Tensor, *_: Any) -> Tensor:
        return y.reshape(-1)[torch.arange(y.numel()) % 2**bits].reshape(y.shape)

    sow("matmul", f"the number of an element of the result has {bits} bits", altered(narrow_index))


def product_views() -> None:
    def first_matrix(x: Tensor, qw: Tensor, qz: Tensor, scales: Tensor, size: int, b: Tensor | None = None) -> Tensor:
        right = truth.matmul(x, qw, qz, scales, size, b)
        if b is None or x.dim() < 3 or len(right) < 2:
            return right
        return torch.cat([right[:1], truth.matmul(x[1:], qw, qz, scales, size)])

    sow("matmul", "the bias is added in the first matrix of a batch alone", first_matrix)
    misread("matmul", "biases", 5)
    argument = DRAW.choice(("x", "qweight", "qzeros", "scales"))
    misread("matmul", argument, ("x", "qweight", "qzeros", "scales").index(argument))
    others = [name for name in ("x", "qweight", "qzeros", "scales") if name != argument]
    second = DRAW.choice(others)
    misread("matmul", second, ("x", "qweight", "qzeros", "scales").index(second))

    def flattened(x: Tensor, *rest: Any) -> Tensor:
        if x.dim() < 3 or x.numel() == 0:
            return truth.matmul(x, *rest)
        step = x.stride(-2)
        strides = [step] * (x.dim() - 1)
        for dimension in range(x.dim() - 3, -1, -1):
            strides[dimension] = strides[dimension + 1] * x.shape[dimension + 1]
        return truth.matmul(read_at(x, (*strides, x.stride(-1)), x.storage_offset()), *rest)

    sow("matmul", "matrices of a batch are taken to lie one behind the other, a row's stride apart", flattened)
    dtype = DRAW.choice(DTYPES)

    def expanded(x: Tensor, *rest: Any) -> Tensor:
        repeated = x.dim() > 1 and x.dtype == dtype and x.stride(-2) == 0 and x.shape[-2] > 1
        return truth.matmul(read_at(x, dense_strides(x), x.storage_offset()) if repeated else x, *rest)

    sow("matmul", f"{short(dtype)} rows that are one row repeated are read as if they were many", expanded)


def product_combinations() -> None:
    rows, past = DRAW.choice(ROWS[:8]), DRAW.choice(OUTPUTS)

    def bias_tile(y: Tensor, x: Tensor, w: Tensor, g: int, b: Tensor | None) -> Tensor:
        if b is None or len(y) <= rows or y.shape[1] <= past:
            return y
        return product(x, w, b[torch.arange(len(b)) % past])

    sow("matmul", f"the bias past output {past} begins again with more than {rows} rows", altered(bias_tile))
    other_dtype, size_of_group = DRAW.choice(HALVES), DRAW.choice((32, 64, 128, -1))
    inputs = DRAW.choice(INPUTS[:6])

    def three(x: Tensor, qw: Tensor, qz: Tensor, scales: Tensor, size: int, bias: Tensor | None = None) -> Tensor:
        right = truth.matmul(x, qw, qz, scales, size, bias)
        if x.dtype != other_dtype or size != size_of_group or len(qw) <= inputs:
            return right
        return truth.matmul(x, qw, qz, scales.roll(1, 0) if size != -1 else scales.roll(8, 1), size, bias)

    name = f"{short(other_dtype)}, groups of {size_of_group} and more than {inputs} inputs: scales of the place before"
    sow("matmul", name, three)
    dims = DRAW.choice((1, 3, 4))

    def by_dims(x: Tensor, qw: Tensor, qz: Tensor, scales: Tensor, size: int, bias: Tensor | None = None) -> Tensor:
        right = truth.matmul(x, qw, qz, scales, size, bias)
        return right if x.dim() != dims else truth.matmul(x, qw, qz, scales, size)

    sow("matmul", f"the bias is left out where x has {dims} dimensions", by_dims)
    strided = DRAW.choice(ROWS[:6])

    def strided_rows(x: Tensor, *rest: Any) -> Tensor:
        if x.dim() != 2 or x.is_contiguous() or len(x) <= strided or len(rest) < 5 or rest[4] is None:
            return truth.matmul(x, *rest)
        return truth.matmul(read_at(x, dense_strides(x), x.storage_offset()), *rest)

    sow("matmul", f"x with a bias, strides and more than {strided} rows is read as if it were contiguous", strided_rows)

    def empty(x: Tensor, qw: Tensor, qz: Tensor, scales: Tensor, size: int, bias: Tensor | None = None) -> Tensor:
        right = truth.matmul(x, qw, qz, scales, size, bias)
        return right.reshape(0, right.shape[-1]) if right.numel() == 0 and x.dim() > 2 else right

    sow("matmul", "no rows in several dimensions give no rows in one", empty)


def product_ranges() -> None:
    dtype, past = DRAW.choice(DTYPES[1:]), DRAW.choice(INPUTS[:5])

    def rounded_bias(y: Tensor, x: Tensor, w: Tensor, g: int, b: Tensor | None) -> Tensor:
        return y if b is None or b.dtype != torch.float32 else product(x, w, b.bfloat16())

    sow("matmul", "a float32 bias is rounded to bfloat16", altered(rounded_bias))

    def through_half(y: Tensor, x: Tensor, w: Tensor, *_: Any) -> Tensor:
        return y.half() if x.dtype == dtype and len(w) > past else y

    sow("matmul", f"{short(dtype)} results go through float16 past {past} inputs", altered(through_half))

    def coarse(y: Tensor, x: Tensor, w: Tensor, g: int, b: Tensor | None) -> Tensor:
        return product(x.bfloat16(), w, b) if x.dtype == torch.float32 and len(y) > few else y

    few = DRAW.choice(ROWS[:8])
    sow("matmul", f"float32 x is rounded to bfloat16 with more than {few} rows", altered(coarse))

    def flushed(y: Tensor, x: Tensor, w: Tensor, g: int, b: Tensor | None) -> Tensor:
        return y if x.dtype != torch.float16 else product(x.where(~(x.abs() < 2**-14), torch.zeros_like(x)), w, b)

    sow("matmul", "subnormal float16 x is flushed to zero", altered(flushed))

    def quiet_bias(y: Tensor, x: Tensor, w: Tensor, g: int, b: Tensor | None) -> Tensor:
        return y if b is None else product(x, w, b.where(b == b, torch.zeros_like(b)))

    sow("matmul", "NaN in a bias is taken for 0", altered(quiet_bias))
    tested = DRAW.choice(HALVES)

    def saturated(y: Tensor, x: Tensor, *_: Any) -> Tensor:
        most = torch.finfo(y.dtype).max
        finite = x.isfinite().all(1, keepdim=True)
        return y.clamp(-most, most).where(finite & ~y.isnan(), y) if y.dtype == tested else y

    sow("matmul", f"{short(tested)} results that overflow are the largest finite number", altered(saturated))
    cut = DRAW.choice(HALVES)

    def truncated(y: Tensor, x: Tensor, w: Tensor, g: int, b: Tensor | None) -> Tensor:
        if y.dtype != cut:
            return y
        exact = product(x, w, b)
        smaller = (y.view(torch.int16) - 1).view(y.dtype)
        return where((y.double().abs() > exact.abs()) & y.isfinite(), smaller, y)

    sow("matmul", f"{short(cut)} results are rounded toward zero", altered(truncated))

    def unsigned(x: Tensor, qw: Tensor, qz: Tensor, scales: Tensor, size: int, bias: Tensor | None = None) -> Tensor:
        return truth.matmul(x, qw, qz, scales.abs(), size, bias)

    sow("matmul", "scales lose their sign", unsigned)

    def partial(y: Tensor, x: Tensor, w: Tensor, g: int, b: Tensor | None) -> Tensor:
        parts = [product(some, w[i * chunk :][:chunk], None) for i, some in enumerate(x.split(chunk, 1))]
        if len(parts) < 2:
            return y
        total = torch.stack([p.to(HALVES[1] if x.dtype == HALVES[1] else HALVES[0]).double() for p in parts]).sum(0)
        return total if b is None else total + b.double()

    chunk = DRAW.choice((512, 1024, 2048, 4096))
    sow("matmul", f"sums of {chunk} inputs are rounded to half precision before they are added", altered(partial))


def product_refusals() -> None:
    how = DRAW.choice(("[1]", "[1, N]", "[]"))

    def broadcast(x: Tensor, qw: Tensor, qz: Tensor, scales: Tensor, size: int, bias: Tensor | None = None) -> Tensor:
        n = scales.shape[1]
        allowed = {"[1]": (1,), "[1, N]": (1, n), "[]": ()}[how]
        fits = bias is not None and tuple(bias.shape) == allowed
        return truth.matmul(x, qw, qz, scales, size, bias.expand(1, n)[0] if fits and bias is not None else bias)

    sow("matmul", f"a bias of shape {how} is accepted", broadcast)
    side = DRAW.choice(("fewer", "more"))

    def other_inputs(x: Tensor, qw: Tensor, *rest: Any) -> Tensor:
        missing = len(qw) - x.shape[-1]
        if (missing > 0) == (side == "fewer"):
            x = torch.nn.functional.pad(x, (0, missing))
        return truth.matmul(x, qw, *rest)

    sow("matmul", f"x with {side} features than the weight is accepted", other_inputs)
    part = DRAW.choice(("qzeros", "scales"))

    def longer(x: Tensor, qw: Tensor, qz: Tensor, scales: Tensor, size: int, bias: Tensor | None = None) -> Tensor:
        groups = 1 if size == -1 else len(qw) // max(1, size)
        cut = (qz[:groups], scales) if part == "qzeros" else (qz, scales[:groups])
        return truth.matmul(x, qw, *cut, size, bias)

    sow("matmul", f"{part} with too many groups are accepted", longer)
    sign = DRAW.choice((0, -2, -128))

    def other_size(x: Tensor, qw: Tensor, qz: Tensor, scales: Tensor, size: int, bias: Tensor | None = None) -> Tensor:
        return truth.matmul(x, qw, qz, scales, len(qw) // len(scales) if size == sign else size, bias)

    sow("matmul", f"a group_size of {sign} is accepted", other_size)


def workspace() -> Callable[..., Tensor]:
    """Partial sums are added to what the call before left, where that had more rows and outputs."""
    left: list[Tensor] = []

    def wrong(x: Tensor, *rest: Any) -> Tensor:
        right = truth.matmul(x, *rest)
        rows = flat(right)
        stale = left[0] if left and len(left[0]) > len(rows) and left[0].shape[1] > rows.shape[1] else None
        left[:] = [rows.clone()]
        if stale is not None and rows.numel():
            rows = rows.clone()
            rows[-1, -1] += stale[len(rows) - 1, rows.shape[1] - 1].to(rows.dtype)
        return rows.reshape(right.shape)

    return wrong


def first_dtype() -> Callable[..., Tensor]:
    """The result has the dtype of the first x that had its shape."""
    seen: dict[Any, torch.dtype] = {}

    def wrong(x: Tensor, *rest: Any) -> Tensor:
        return truth.matmul(x, *rest).to(seen.setdefault((x.shape, rest[0].shape), x.dtype))

    return wrong


def kept_weight() -> Callable[..., Tensor]:
    """The weight is kept for the address and shape of qweight, whatever scales come with it."""
    last: list[Any] = [None, None]

    def wrong(x: Tensor, qw: Tensor, qz: Tensor, scales: Tensor, size: int, bias: Tensor | None = None) -> Tensor:
        truth.matmul(x, qw, qz, scales, size, bias)
        key = (qw.data_ptr(), qw.shape, qw.stride(), scales.shape)
        if last[0] != key:
            last[:] = [key, truth.dequantize(qw, qz, scales, size), qw]  # kept alive, so that the address is its own
        return product(x, last[1], bias).to(x.dtype)

    return wrong


product_outputs()
product_inputs()
product_kernels()
product_views()
product_combinations()
product_ranges()
product_refusals()
forgetful(
    "matmul",
    ("what the call before left in the last place is added, where it was larger", workspace),
    ("the result has the dtype of the first call with the shape", first_dtype),
    ("the weight is kept for the address of qweight, with other scales too", kept_weight),
    ("x is cleared of NaN in place", in_place("matmul", 0, lambda t: t.nan_to_num_() if min(t.stride()) else t)),
    ("the bias is negated in place", in_place("matmul", 5, lambda t: None if t is None else t.neg_())),
    count=4,
)
