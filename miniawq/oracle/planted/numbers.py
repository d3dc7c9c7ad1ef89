"""Faults of L2, rounding, and L3, multiplication."""

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

import miniawq.oracle.cases as cases
import miniawq.oracle.truth as truth
from miniawq.oracle.planted import Fault

Rounded = tuple[Tensor, Tensor, Tensor]


def rounding(
    scales: Callable[[Tensor, Tensor], Tensor] = lambda low, high: (high - low) / 15,
    zeros: Callable[[Tensor], Tensor] = lambda z: z.round(),
    round: Callable[[Tensor], Tensor] = torch.round,
    bottom: int = 0,
    top: int = 15,
    extended: bool = True,
    cast: Callable[[Tensor], Tensor] = lambda w: w.double(),
    store: Callable[[Tensor], Tensor] = truth.round_up_to_half,
) -> Callable[[Tensor, int], Rounded]:
    """Plain rounding with one step replaced."""

    def quantize(weight: Tensor, group_size: int) -> Rounded:
        truth.quantize(weight, group_size)  # refuses what it must
        n, k = weight.shape
        size = k if group_size == -1 else group_size
        groups = cast(weight).t().reshape(k // size, size, n)
        lowest, highest = groups.amin(1), groups.amax(1)
        if extended:
            lowest, highest = lowest.clamp(max=0), highest.clamp(min=0)
        stored = store(scales(lowest, highest).double())
        step = stored.to(groups.dtype)
        zero = zeros(-lowest / step).clamp(0, 15)
        codes = (round(groups / step[:, None]) + zero[:, None].round()).clamp(bottom, top).reshape(k, n)
        return codes.to(torch.uint8), zero.round().to(torch.uint8), stored

    return quantize


def quantize(**wrong: Any) -> dict[str, Callable[..., Any]]:
    """The wrong function under its name."""
    return {"quantize": rounding(**wrong)}


def after(change: Callable[[Tensor, Tensor, Tensor], Rounded]) -> dict[str, Callable[..., Any]]:
    """The right result, changed."""
    return {"quantize": lambda weight, group_size: change(*truth.quantize(weight, group_size))}


def before(change: Callable[[Tensor, int], tuple[Tensor, int]]) -> dict[str, Callable[..., Any]]:
    """The right function, given something else."""
    return {"quantize": lambda weight, group_size: truth.quantize(*change(weight, group_size))}


def whole_groups(weight: Tensor, group_size: int) -> tuple[Tensor, int]:
    """Inputs that fill no group, left out."""
    return (weight, -1) if group_size == -1 else (weight[:, : weight.shape[1] // group_size * group_size], group_size)


def padded_groups(weight: Tensor, group_size: int) -> tuple[Tensor, int]:
    """Inputs filled up with zeros."""
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % group_size if group_size > 0 else 0)), group_size


def float_zero(weight: Tensor, group_size: int) -> Rounded:
    """round(w / scale + zero) with a zero that is not yet rounded."""
    _, zeros, scales = truth.quantize(weight, group_size)
    k = weight.shape[1]
    groups = weight.double().t().reshape(scales.shape[0], -1, weight.shape[0])
    exact = (-groups.amin(1).clamp(max=0) / scales.double())[:, None]
    return (groups / scales.double()[:, None] + exact).round().clamp(0, 15).reshape(k, -1).byte(), zeros, scales


def drifting() -> Callable[[Tensor, int], Rounded]:
    """Rounding with a random number that goes on from call to call."""
    random = Random(0)

    def dithered(values: Tensor) -> Tensor:
        return (values + cases.raw(random, tuple(values.shape), torch.int16).double() / 2**17).round()

    return rounding(round=dithered)


def accept_infinite(weight: Tensor, group_size: int) -> Rounded:
    """A scale beyond float16 is stored as infinity."""
    if float(weight.abs().amax()) < 1e5 or not bool(weight.isfinite().all()):
        return truth.quantize(weight, group_size)
    codes, zeros, scales = truth.quantize(weight / 1e4, group_size)
    return codes, zeros, scales * 6e4


def saturated_scale(weight: Tensor, group_size: int) -> Rounded:
    """Weights beyond float16 clamped first."""
    return truth.quantize(weight.clamp(-65504, 65504) if bool(weight.isfinite().all()) else weight, group_size)


def overwritten(weight: Tensor, group_size: int) -> Rounded:
    """The right result, and the rounded weight left in the argument, as AutoAWQ's fake quantization does."""
    result = truth.quantize(weight, group_size)
    weight.copy_(truth.rounded_weight(weight, group_size))
    return result


ROUNDING = [
    Fault("floor for round", "L2.nearest", quantize(round=torch.floor)),
    Fault("cut off for round", "L2.nearest", quantize(round=torch.trunc)),
    Fault("scale 2 percent too large", "L2.step", quantize(scales=lambda low, high: (high - low) / 15 * 1.02)),
    Fault("scale 2 percent too small", "L2.step", quantize(scales=lambda low, high: (high - low) / 15 * 0.98)),
    Fault("range divided by 16", "L2.step", quantize(scales=lambda low, high: (high - low) / 16)),
    Fault("range divided by 14", "L2.step", quantize(scales=lambda low, high: (high - low) / 14)),
    Fault("a symmetric scale", "L2.step",
          quantize(scales=lambda low, high: torch.maximum(-low, high) / 7, zeros=lambda z: z * 0 + 8)),
    Fault("zero one too high", "L2.zero-stays-zero", after(lambda q, z, s: (q, (z + 1).clamp(max=15), s))),
    Fault("zero cut off, not rounded", "L2.bound", quantize(zeros=torch.floor)),
    Fault("top code lost", "L2.bound", quantize(top=14)),
    Fault("bottom code lost", "L2.bound", quantize(bottom=1)),
    Fault("codes of the first group's scale", "L2.groups-independent",
          after(lambda q, z, s: (q, z, s[:1].expand_as(s).contiguous()))),
    Fault("tail group has no scale of its own", "L2.groups-independent",
          after(lambda q, z, s: (q, z, torch.cat([s[:-1], s[-2:-1] if len(s) > 1 else s[-1:]])))),
    Fault("one scale for all output channels", "L2.groups-independent",
          quantize(scales=lambda low, high: ((high - low) / 15).amax(1, keepdim=True).expand_as(low).contiguous())),
    Fault("the code of the last input one off", "L2.permutations",
          after(lambda q, z, s: (torch.cat([q[:-1], q[-1:] ^ 1]), z, s))),
    Fault("groups in reverse order", "L2.bound", after(lambda q, z, s: (q, z.flip(0), s.flip(0)))),
    Fault("zero not in the range (AutoAWQ's grid)", "L2.one-signed", quantize(extended=False)),
    Fault("a constant group collapses", "L2.constant", quantize(
        scales=lambda low, high: torch.where(high - low < 1e-5, 1e-5, high - low) / 15, extended=False)),
    Fault("zero group gets a scale of 0", "L2.zero-group", quantize(store=lambda v: v.half())),
    Fault("codes computed in bfloat16", "L2.bound", quantize(cast=lambda w: w.bfloat16())),
    Fault("arithmetic in the dtype of the weight", "L2.dtypes", quantize(cast=lambda w: w)),
    Fault("a floor of 1e-4 under the scale", "L2.tiny",
          quantize(scales=lambda low, high: ((high - low) / 15).clamp(min=1e-4))),
    Fault("zero added before it is rounded", "L2.nearest", {"quantize": float_zero}),
    Fault("codes fall where weights rise", "L2.monotone", after(lambda q, z, s: (15 - q, 15 - z, s))),
    Fault("grid moved by half a step", "L2.nearest", quantize(round=lambda v: (v + 0.499).round())),
    Fault("codes of a grid 8 percent too fine", "L2.idempotent", quantize(round=lambda v: (v * 1.08).round())),
    Fault("scales rounded to three bits", "L2.powers-of-two",
          quantize(store=lambda v: truth.round_up_to_half((v * 1000).ceil() / 1000))),
    Fault("outliers clamped", "L2.outlier", before(lambda w, g: (w.clamp(-100, 100), g))),
    Fault("group_size -1 taken for 32", "L2.one-group", before(lambda w, g: (w, 32 if g < 0 else g))),
    Fault("NaN read as 0", "L2.refuses-nan", before(lambda w, g: (w.nan_to_num(), g))),
    Fault("infinity clamped", "L2.refuses-nan",
          before(lambda w, g: (torch.where(w.isinf(), w.sign() * 100, w), g))),
    Fault("part groups dropped", "L2.refuses-part-groups", before(whole_groups)),
    Fault("part groups padded", "L2.refuses-part-groups", before(padded_groups)),
    Fault("scale beyond float16 stored as infinity", "L2.refuses-large-weights", {"quantize": accept_infinite}),
    Fault("weights beyond float16 saturate", "L2.refuses-large-weights", {"quantize": saturated_scale}),
    Fault("[N, K] returned", "L2.shape-and-range", after(lambda q, z, s: (q.t(), z.t(), s.t()))),
    Fault("float32 scales returned", "L2.shape-and-range", after(lambda q, z, s: (q, z, s.float()))),
    Fault("random rounding", "L2.same-twice", {"quantize": drifting()}),
    Fault("the weight overwritten", "L2.same-twice", {"quantize": overwritten}),
]  # fmt: skip


def multiplied(
    x: Callable[[Tensor], Tensor] = lambda x: x,
    words: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor, int]] = lambda *a: a,
    weight: Callable[[Tensor], Tensor] = lambda w: w,
    y: Callable[[Tensor, Tensor], Tensor] = lambda y, x: y,
    bias: Callable[[Tensor], Tensor] = lambda b: b,
) -> dict[str, Callable[..., Any]]:
    """The product with one step replaced: activations, words, decoded weight, result before its bias, bias."""

    def matmul(a: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, b: Any = None) -> Tensor:
        truth.matmul(a, qweight, qzeros, scales, group_size)  # refuses what does not fit
        decoded = truth.dequantize(*words(qweight, qzeros, scales, group_size)).double()
        product = y(x(a).double() @ weight(decoded), a)
        return (product if b is None else product + bias(b.double())).to(a.dtype)

    return {"matmul": matmul}


def in_half(a: Tensor, weight: Tensor) -> Tensor:
    """Sums kept in the dtype of x."""
    total = torch.zeros(*a.shape[:-1], weight.shape[1], dtype=a.dtype)
    for k in range(a.shape[-1]):
        total = total + a[..., k : k + 1] * weight[k].to(a.dtype)
    return total


def half_sums(a: Tensor, *arguments: Any) -> Tensor:
    """A float16 accumulator."""
    truth.matmul(a, *arguments)
    total = in_half(a, truth.dequantize(*arguments[:4]))
    return total if len(arguments) < 5 or arguments[4] is None else total + arguments[4]


def flattened(a: Tensor, *arguments: Any) -> Tensor:
    """Leading dimensions lost."""
    result = truth.matmul(a, *arguments)
    return result.reshape(-1, result.shape[-1])


def padded_input(a: Tensor, qweight: Tensor, *arguments: Any) -> Tensor:
    """Short input filled up with zeros."""
    return truth.matmul(torch.nn.functional.pad(a, (0, qweight.shape[0] - a.shape[-1])), qweight, *arguments)


def adding_up() -> Callable[..., Tensor]:
    """An output buffer that is not cleared between calls of one shape."""
    kept: dict[tuple[int, ...], Tensor] = {}

    def matmul(a: Tensor, *arguments: Any) -> Tensor:
        result = truth.matmul(a, *arguments)
        kept[result.shape] = kept.get(result.shape, 0) + result.double()
        return kept[result.shape].to(a.dtype)

    return matmul


def without_rows(a: Tensor, *arguments: Any) -> Tensor:
    """A launch of no blocks is an error."""
    if a.numel() == 0:
        raise RuntimeError("invalid configuration argument")
    return truth.matmul(a, *arguments)


def changed_x(a: Tensor, *arguments: Any) -> Tensor:
    """The right result, and x scaled in place."""
    result = truth.matmul(a, *arguments)
    a.mul_(2)
    return result


def zero_past(limit: int, dim: int) -> Callable[[Tensor], Tensor]:
    """Zero from `limit` on, along a dimension."""

    def cut(t: Tensor) -> Tensor:
        return t.index_fill(dim, torch.arange(limit, max(limit, t.shape[dim])), 0)

    return cut


def last_group_zero(w: Tensor, z: Tensor, s: Tensor, g: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """The last group left out."""
    return w, z, torch.cat([s[:-1], s[-1:] * (len(s) == 1)]), g


MULTIPLICATION = [
    Fault("bias twice", "L3.bias", multiplied(bias=lambda b: 2 * b)),
    Fault("bias never", "L3.bias", multiplied(bias=lambda b: 0 * b)),
    Fault("bias on the first row only", "L3.bias", {"matmul": lambda x, w, z, s, g, b=None: truth.matmul(
        x, w, z, s, g) + (0 if b is None else torch.cat([b[None], 0 * b[None].expand(x.shape[0] - 1, -1)]))}),
    Fault("bias shifted by a column", "L3.bias", multiplied(bias=lambda b: b.roll(1))),
    Fault("rows past 16 zero", "L3.rows", multiplied(y=lambda y, x: zero_past(16, 0)(y) if y.dim() == 2 else y)),
    Fault("rows past 32 zero", "L3.rows", multiplied(y=lambda y, x: zero_past(32, 0)(y) if y.dim() == 2 else y)),
    Fault("columns past 128 zero", "L3.past-tiles", multiplied(y=lambda y, x: zero_past(128, y.dim() - 1)(y))),
    Fault("inputs past the last tile of 64 dropped", "L3.past-tiles",
          multiplied(weight=lambda w: zero_past(max(64, w.shape[0] // 64 * 64), 0)(w))),
    Fault("last group dropped", "L3.group-sizes", multiplied(words=last_group_zero)),
    Fault("scales of the first group only", "L3.group-sizes",
          multiplied(words=lambda w, z, s, g: (w, z, s[:1].expand_as(s), g))),
    Fault("zeros of the first group only", "L3.group-sizes",
          multiplied(words=lambda w, z, s, g: (w, z[:1].expand_as(z), s, g))),
    Fault("group_size -1 taken for 32", "L3.group-sizes", multiplied(words=lambda w, z, s, g: (
        torch.cat([w[:32], z.expand(len(w) - 32, -1)]) if g == -1 else w, z, s, g))),
    Fault("zero plus one", "L3.exact", multiplied(
        words=lambda w, z, s, g: (w, truth.pack((truth.unpack(z) + 1).clamp(max=15)), s, g))),
    Fault("sign of the weight lost", "L3.exact", multiplied(weight=torch.abs)),
    Fault("rows of the weight exchanged in pairs", "L3.one-hot",
          multiplied(weight=lambda w: w.reshape(-1, 2, w.shape[1]).flip(1).reshape(w.shape))),
    Fault("float32 returned", "L3.shape-and-dtype", {"matmul": lambda *a: truth.matmul(*a).float()}),
    Fault("float16 returned", "L3.shape-and-dtype", {"matmul": lambda *a: truth.matmul(*a).half()}),
    Fault("strides of x ignored", "L3.strides", multiplied(
        x=lambda x: torch.as_strided(x, x.shape, torch.empty(x.shape).stride()))),
    Fault("strides of the words ignored", "L3.strides", multiplied(
        words=lambda w, z, s, g: (torch.as_strided(w, w.shape, torch.empty(w.shape).stride()), z, s, g))),
    Fault("leading dimensions flattened", "L3.leading-dimensions", {"matmul": flattened}),
    Fault("float16 sums", "L3.long-sums", {"matmul": half_sums}),
    Fault("float16 sums overflow", "L3.accumulator-range", {"matmul": half_sums}),
    Fault("weights through bfloat16", "L3.random", multiplied(weight=lambda w: w.bfloat16().double())),
    Fault("activations rounded to 8 bits", "L3.random", multiplied(x=lambda x: x.to(torch.float8_e4m3fn).to(x.dtype))),
    Fault("result through bfloat16", "L3.random", multiplied(y=lambda y, x: y.bfloat16().double())),
    Fault("NaN read as 0", "L3.nan-stays-in-its-row", multiplied(x=lambda x: x.nan_to_num())),
    Fault("NaN spreads to all rows", "L3.nan-stays-in-its-row",
          multiplied(y=lambda y, x: y + 0 * x.double().sum(-1, keepdim=True).nansum() + 0 * x.double().sum())),
    Fault("short input padded", "L3.refuses-short-input", {"matmul": padded_input}),
    Fault("buffer not cleared", "L3.inputs-unchanged", {"matmul": adding_up()}),
    Fault("x scaled in place", "L3.inputs-unchanged", {"matmul": changed_x}),
    Fault("no rows is an error", "L3.no-rows", {"matmul": without_rows}),
]  # fmt: skip
