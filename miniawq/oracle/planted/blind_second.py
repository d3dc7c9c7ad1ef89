"""A second blind set: faults of kinds that the first has not, written after the checks were frozen and scored once.

Square layers, sizes of real models that no thin slice reaches, invalid group sizes, shortcuts that look at the data,
ties broken at random, negative codes, what is kept by a weak key, and readers that look at one layer only.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import miniawq.oracle.truth as truth
from miniawq.oracle.planted.grammar import Bred, Function, bred

BLIND_SECOND: list[Bred] = []


def lay(function: str, kind: str, wrong: Function) -> None:
    """Keep a wrong function under what is wrong with it."""
    BLIND_SECOND.append(bred(function, kind, "", "", wrong))


def lay_kept(function: str, kind: str, make: Callable[[], Function]) -> None:
    """As `lay`, for a function that keeps something between calls."""
    BLIND_SECOND.append(Bred(function, kind, "", "", make))


def cut(t: Tensor, rows: int = 1 << 40, columns: int = 1 << 40) -> Tensor:
    """Zero past a row or a column."""
    inside = (torch.arange(t.shape[-2])[:, None] < rows) & (torch.arange(t.shape[-1]) < columns)
    return torch.where(inside, t, torch.zeros((), dtype=t.dtype))


def kept_by(function: str, key: Callable[..., Any]) -> Callable[[], Function]:
    """The first result for each key."""

    def make() -> Function:
        kept: dict[Any, Any] = {}

        def wrong(*arguments: Any) -> Any:
            result = getattr(truth, function)(*arguments)
            return kept.setdefault(key(*arguments), result)

        return wrong

    return make


# L0

lay("pack", "rows past 4096 zero", lambda c: cut(truth.pack(c), rows=4096))
lay("pack", "codes of 64 bits wrap at 2**32", lambda c: truth.pack(c % 2**32 if c.dtype == torch.int64 else c))
lay("pack", "-1 taken for 15", lambda c: truth.pack(c & 15 if bool((c < 0).any()) else c))
lay("pack", "the first 65536 codes looked at alone",
    lambda c: truth.pack(torch.where(torch.arange(c.numel()).reshape(c.shape) < 65536, c, c & 15)))  # fmt: skip
lay("pack", "no rows is an error", lambda c: truth.pack(c) if len(c) else refuse("no rows"))
lay("pack", "rows of one repeated code written as zeros where the code is 8",
    lambda c: torch.where((c == 8).all(1, keepdim=True), 0, truth.pack(c)))  # fmt: skip
lay("unpack", "rows past 4096 zero", lambda w: cut(truth.unpack(w), rows=4096))
lay("unpack", "words past 2**15 in a row left out", lambda w: cut(truth.unpack(w), columns=8 * 2**15))
lay_kept("unpack", "kept by shape and first word",
         kept_by("unpack", lambda w: (w.shape, str(w.reshape(-1)[:1]))))  # fmt: skip
lay_kept("pack", "kept by shape and sum", kept_by("pack", lambda c: (c.shape, int(c.sum()))))


def refuse(why: str) -> Any:
    raise ValueError(why)


# L1


def square(t: Tensor) -> Tensor:
    """Transposed where it is square."""
    return t.t().contiguous() if t.shape[0] == t.shape[1] else t


def decoded(change: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Function:
    """Dequantization from changed codes, zeros and scales."""

    def wrong(w: Tensor, z: Tensor, s: Tensor, g: int) -> Tensor:
        truth.dequantize(w, z, s, g)
        codes, zeros, scales = change(truth.unpack(w), truth.unpack(z), s)
        return truth.real_weight(codes, zeros, scales, g).to(torch.float16)

    return wrong


lay("dequantize", "square weights transposed", lambda *a: square(truth.dequantize(*a)))
lay("dequantize", "any negative group_size taken for -1",
    lambda w, z, s, g: truth.dequantize(w, z, s, -1 if g < 0 else g))  # fmt: skip
lay("dequantize", "a group_size of 0 taken for -1", lambda w, z, s, g: truth.dequantize(w, z, s, g or -1))
lay("dequantize", "a group_size beyond K taken for -1",
    lambda w, z, s, g: truth.dequantize(w, z, s, -1 if g > len(w) else g))  # fmt: skip
lay("dequantize", "inputs past 16384 zero", lambda *a: cut(truth.dequantize(*a), rows=16384))
lay("dequantize", "outputs past 32768 zero", lambda *a: cut(truth.dequantize(*a), columns=32768))
lay("dequantize", "scales above 1024 clamped", decoded(lambda q, z, s: (q, z, s.clamp(max=1024))))
lay("dequantize", "the last zero of an odd number of words 0",
    decoded(lambda q, z, s: (q, torch.cat([z[:, :-1], 0 * z[:, -1:]], 1) if z.shape[1] % 16 else z, s)))  # fmt: skip
lay("dequantize", "zeros taken for 8 where most are",
    decoded(lambda q, z, s: (q, torch.full_like(z, 8) if float((z == 8).double().mean()) > 0.9 else z, s)))  # fmt: skip
lay("dequantize", "columns whose first scale is a power of two keep it in all groups",
    decoded(lambda q, z, s: (q, z, torch.where(s[:1].view(torch.int16) & 1023 == 0, s[:1], s))))  # fmt: skip


def late_scale(w: Tensor, z: Tensor, s: Tensor, g: int) -> Tensor:
    right = truth.dequantize(w, z, s, g)
    if g != 128 or len(s) < 2:
        return right
    steps = truth.unpack(w).double() - truth.unpack(z).double().repeat_interleave(128, 0)
    before = (steps * s.roll(1, 0).double().repeat_interleave(128, 0)).half()
    return torch.where(torch.arange(len(w))[:, None] % 128 == 127, before, right)


lay("dequantize", "the scale of the group before in the last row of each group of 128", late_scale)

# L2

lay("quantize", "square codes transposed",
    lambda w, g: (square(truth.quantize(w, g)[0]), *truth.quantize(w, g)[1:]))  # fmt: skip
lay("quantize", "any negative group_size taken for -1", lambda w, g: truth.quantize(w, -1 if g < 0 else g))
lay("quantize", "a group_size of 0 taken for -1", lambda w, g: truth.quantize(w, g or -1))
lay("quantize", "a group_size beyond K taken for -1",
    lambda w, g: truth.quantize(w, -1 if g > w.shape[1] else g))  # fmt: skip


def random_ties(w: Tensor, g: int) -> Any:
    codes, zeros, scales = truth.quantize(w, g)
    size = len(codes) // len(scales)
    steps = w.t().double() / scales.double().repeat_interleave(size, 0)
    tie = (steps - steps.floor()) == 0.5
    other = (steps.floor() + torch.randint(0, 2, steps.shape) + zeros.double().repeat_interleave(size, 0)).clamp(0, 15)
    return torch.where(tie, other.to(torch.uint8), codes), zeros, scales


def signed_groups(w: Tensor, g: int) -> Any:
    codes, zeros, scales = truth.quantize(w, g)
    return codes, torch.cat([zeros[:127], zeros[127:].flip(0)]), scales


def loud_row(w: Tensor, g: int) -> Any:
    codes, zeros, scales = truth.quantize(w, g)
    rows = w.double().abs().amax(1) > 1000 * w.double().abs().median()
    return torch.where(rows & (w.shape[0] > 8), torch.full_like(codes, 8), codes), zeros, scales


def saturated_zero(w: Tensor, g: int) -> Any:
    """Groups below zero whose zero is 15 get 14."""
    codes, zeros, scales = truth.quantize(w, g)
    whole = (zeros == 15).repeat_interleave(len(codes) // len(zeros), 0)
    return torch.where(whole, codes.clamp(max=14), codes), zeros.clamp(max=14), scales


lay("quantize", "ties broken at random", random_ties)
lay("quantize", "zeros past the 127th group in reverse order", signed_groups)
lay("quantize", "outputs far louder than the rest lose their codes", loud_row)
lay("quantize", "a zero of 15 becomes 14", saturated_zero)
lay("quantize", "inputs past 8192 have the last code",
    lambda w, g: (torch.where(torch.arange(w.shape[1])[:, None] < 8192, truth.quantize(w, g)[0], 15),
                  *truth.quantize(w, g)[1:]))  # fmt: skip
lay("quantize", "negative zero taken for a small negative number",
    lambda w, g: truth.quantize(torch.where((w == 0) & w.signbit(), -w.abs().amax() / 100, w), g))  # fmt: skip
lay_kept("quantize", "kept by shape and largest weight",
         kept_by("quantize", lambda w, g: (w.shape, g, w.dtype, float(w.abs().amax()), w.is_contiguous())))  # fmt: skip

# L3


def multiplied(change: Callable[..., Any]) -> Function:
    """The right product, changed; called with it and the arguments."""
    return lambda x, w, z, s, g, b=None: change(truth.matmul(x, w, z, s, g, b), x, w, z, s, g, b)


def given(change: Callable[..., tuple[Any, ...]]) -> Function:
    """The right product of changed arguments."""
    return lambda x, w, z, s, g, b=None: truth.matmul(*change(x, w, z, s, g, b))


def past_rows(y: Tensor, first: int) -> Tensor:
    flat = y.reshape(-1, y.shape[-1])
    return cut(flat, rows=first).reshape(y.shape)


lay("matmul", "square weights transposed", lambda x, w, z, s, g, b=None: square_product(x, w, z, s, g, b))
lay("matmul", "rows past 1024 zero", multiplied(lambda y, *a: past_rows(y, 1024) if y.dim() > 1 else y))
lay("matmul", "inputs past 16384 left out",
    given(lambda x, w, z, s, g, b: (torch.cat([x[..., :16384], 0 * x[..., 16384:]], -1), w, z, s, g, b)))  # fmt: skip
lay("matmul", "outputs past 32768 zero", multiplied(lambda y, *a: torch.where(torch.arange(y.shape[-1]) < 32768, y, 0)))
lay("matmul", "negative scales read as positive", given(lambda x, w, z, s, g, b: (x, w, z, s.abs(), g, b)))
lay("matmul", "any negative group_size taken for -1",
    given(lambda x, w, z, s, g, b: (x, w, z, s, -1 if g < 0 else g, b)))  # fmt: skip
lay("matmul", "a group_size beyond K taken for -1",
    given(lambda x, w, z, s, g, b: (x, w, z, s, -1 if g > len(w) else g, b)))  # fmt: skip
lay("matmul", "a bias of one number for all outputs taken",
    given(lambda x, w, z, s, g, b: (
        x, w, z, s, g, b if b is None or len(b) > 1 else b.expand(s.shape[1]))))  # fmt: skip
lay("matmul", "a bias of two dimensions taken",
    lambda x, w, z, s, g, b=None: truth.matmul(x, w, z, s, g, b if b is None or b.dim() == 1 else b[0]))  # fmt: skip
lay("matmul", "rows that are all NaN give 0",
    multiplied(lambda y, x, *a: torch.where(x.isnan().all(-1, keepdim=True), 0, y)))  # fmt: skip
lay("matmul", "one infinite input among zeros saturates",
    multiplied(lambda y, x, *a: torch.where(
        (x.isinf().sum(-1, keepdim=True) == 1) & ((x != 0).sum(-1, keepdim=True) == 1) & y.isinf(),
        torch.finfo(y.dtype).max, y)))  # fmt: skip
lay("matmul", "small activations beside a large one lost",
    given(lambda x, w, z, s, g, b: (torch.where(
        x.abs() < x.abs().amax(-1, keepdim=True).nan_to_num(0, 0, 0) * 2.0**-16, 0, x) if x.numel() else x,
        w, z, s, g, b)))  # fmt: skip
lay("matmul", "a bias of the largest magnitude clamped",
    given(lambda x, w, z, s, g, b: (x, w, z, s, g, None if b is None else b.clamp(-1e4, 1e4))))  # fmt: skip
lay("matmul", "rows that are equal in their first half computed once", lambda *a: halves_equal(*a))
lay("matmul", "eight outputs of a word exchanged where the scale is subnormal",
    multiplied(lambda y, x, w, z, s, g, b: y.flip(-1) if bool((s.abs() < 2.0**-14).all()) else y))  # fmt: skip
lay("matmul", "sums of 33 and more rows in bfloat16 for bfloat16",
    multiplied(lambda y, x, w, z, s, g, b: split_halves(x, w, z, s, g, b)
               if x.dtype == torch.bfloat16 and 32 < x[..., 0].numel() < 64 else y))  # fmt: skip
lay("matmul", "float32 with bias in TF32 at 17 to 64 rows",
    given(lambda x, w, z, s, g, b: ((x.view(torch.int32) & -8192).view(torch.float32)
          if x.dtype == torch.float32 and b is not None and 16 < x[..., 0].numel() < 65 and x.is_contiguous() else x,
          w, z, s, g, b)))  # fmt: skip
lay("matmul", "five dimensions flattened to two",
    multiplied(lambda y, *a: y.reshape(-1, y.shape[-1]) if y.dim() > 4 else y))  # fmt: skip
lay("matmul", "six dimensions is an error", multiplied(lambda y, *a: refuse("too many") if y.dim() > 5 else y))
lay_kept("matmul", "kept by x and the first word", lambda: kept_product())
lay("matmul", "groups of one sign of zero (all 0) read as symmetric",
    given(lambda x, w, z, s, g, b: (x, w, torch.where((z == 0).all(), z + -2004318072, z), s, g, b)))  # fmt: skip


def square_product(x: Tensor, w: Tensor, z: Tensor, s: Tensor, g: int, b: Tensor | None) -> Tensor:
    right = truth.matmul(x, w, z, s, g, b)
    if len(w) != s.shape[1]:
        return right
    y = x.double() @ truth.dequantize(w, z, s, g).double().t()
    return (y if b is None else y + b.double()).to(x.dtype)


def halves_equal(x: Tensor, w: Tensor, z: Tensor, s: Tensor, g: int, b: Tensor | None = None) -> Tensor:
    y = truth.matmul(x, w, z, s, g, b)
    flat, out = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]).clone()
    for row in range(1, min(len(flat), 64)):
        if torch.equal(flat[row, : x.shape[-1] // 2], flat[row - 1, : x.shape[-1] // 2]):
            out[row] = out[row - 1]
    return out.reshape(y.shape)


def split_halves(x: Tensor, w: Tensor, z: Tensor, s: Tensor, g: int, b: Tensor | None) -> Tensor:
    weight, half = truth.dequantize(w, z, s, g).double(), len(w) // 2
    parts = (x[..., :half].double() @ weight[:half]).to(x.dtype), (x[..., half:].double() @ weight[half:]).to(x.dtype)
    y = parts[0].double() + parts[1].double()
    return (y if b is None else y + b.double()).to(x.dtype)


def kept_product() -> Function:
    kept: dict[Any, Tensor] = {}

    def wrong(x: Tensor, w: Tensor, z: Tensor, s: Tensor, g: int, b: Tensor | None = None) -> Tensor:
        y = truth.matmul(x, w, z, s, g, b)
        key = (x.shape, x.dtype, x.double().sum().item(), w.shape, str(w.reshape(-1)[:1]), b is None)
        return kept.setdefault(key, y) if y.shape == kept.get(key, y).shape else y

    return wrong
