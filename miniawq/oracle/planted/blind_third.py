"""A third blind set, by an author of kernels who had read the documentation alone; scored once.

What trackers of such kernels are full of: the tail of a tile in another order of nibbles, a part of K that split-K
loses, strides taken from a neighbour, x narrowed on its way, buffers used again, a copy that was none.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import miniawq.oracle.truth as truth
from miniawq.oracle.planted.blind_second import cut, kept_by
from miniawq.oracle.planted.grammar import Bred, Function, bred

BLIND_THIRD: list[Bred] = []


def lay(function: str, kind: str, wrong: Function) -> None:
    """Keep a wrong function under what is wrong with it."""
    BLIND_THIRD.append(bred(function, kind, "", "", wrong))


def lay_kept(function: str, kind: str, make: Callable[[], Function]) -> None:
    """As `lay`, for a function that keeps something between calls."""
    BLIND_THIRD.append(Bred(function, kind, "", "", make))


def after(function: str, change: Function) -> Function:
    """A change of the right result: `change(result, *arguments)`."""
    right = getattr(truth, function)
    return lambda *a: change(right(*a), *a)


def refuse(what: str) -> Any:
    raise ValueError(what)


def reread(t: Tensor, strides: tuple[int, ...], offset: int | None = None) -> Tensor:
    """The tensor as a kernel reads it that believes in other strides; zeros past the end of the memory."""
    if not t.numel():
        return t
    start = t.storage_offset() if offset is None else offset
    flat = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    end = start + sum((size - 1) * stride for size, stride in zip(t.shape, strides, strict=True)) + 1
    return torch.cat([flat, flat.new_zeros(max(0, end - len(flat)))]).as_strided(t.shape, strides, start)


def in_plain_order(codes: Tensor) -> Tensor:
    """Codes [R, C] so arranged that nibble i of a word holds column i of its eight."""
    place = torch.tensor(truth.NIBBLE_HOLDS_COLUMN).argsort()
    return codes.unflatten(1, (-1, 8))[:, :, place].flatten(1)


# L0


def tail_in_plain_order(words: Tensor, codes: Tensor) -> Tensor:
    tail = words.shape[1] % 4
    if tail:
        words[:, -tail:] = truth.pack(in_plain_order(codes[:, -8 * tail :]))
    return words


def shifted_in_place(words: Tensor, codes: Tensor) -> Tensor:
    if codes.dtype == torch.int32:
        codes[:, 1::8] <<= 4
    return words


def top_nibble_signed(codes: Tensor, words: Tensor) -> Tensor:
    tail = words.shape[1] % 4
    if tail:
        codes[:, -8 * tail :][:, 7::8] |= (words[:, -tail:] < 0).to(torch.uint8) * 0xF0
    return codes


def two_buffers() -> Function:
    kept: dict[Any, list[Tensor]] = {}

    def wrong(words: Tensor) -> Tensor:
        codes = truth.unpack(words)
        buffers = kept.setdefault(codes.shape, [])
        buffers.append(buffers.pop(0).copy_(codes) if len(buffers) == 2 else codes)
        return buffers[-1]

    return wrong


lay("pack", "words past the last whole four in plain order", after("pack", tail_in_plain_order))
lay("pack", "bytes compared as signed: codes of 128 and more pass",
    lambda c: truth.pack(torch.where(c > 127, c & 15, c) if c.dtype == torch.uint8 else c))  # fmt: skip
lay("pack", "the stride of columns taken for 1", lambda c: truth.pack(reread(c, (c.stride(0), 1))))
lay("pack", "rows past 65535 zero", lambda c: cut(truth.pack(c), rows=65535))
lay("pack", "codes that are int32 already shifted in place", after("pack", shifted_in_place))
lay("pack", "one row loses its dimension", lambda c: truth.pack(c).squeeze(0))
lay("unpack", "the top nibble signed in words past the last whole four", after("unpack", top_nibble_signed))
lay_kept("unpack", "two buffers in turn", two_buffers)
lay("unpack", "the first word rounded down to an address of 16 bytes",
    lambda w: truth.unpack(reread(w, w.stride(), w.storage_offset() // 4 * 4) if w.is_contiguous() else w))  # fmt: skip
lay("unpack", "words past 1024 of a row left zero", lambda w: cut(truth.unpack(w), columns=8192))

# L1


def parts_of(w: Tensor, z: Tensor, s: Tensor, g: int) -> SimpleNamespace:
    """Codes, zeros and scales of each weight, float64 [K, N]; the size of a group, the argument, the groups."""
    truth.dequantize(w, z, s, g)
    size = len(w) if g == -1 else g
    each = [t.double().repeat_interleave(size, 0) for t in (truth.unpack(z), s)]
    return SimpleNamespace(codes=truth.unpack(w).double(), zeros=each[0], scales=each[1], size=size, g=g, groups=len(s))


def weight_of(parts: SimpleNamespace) -> Tensor:
    weight: Tensor = (parts.codes - parts.zeros) * parts.scales
    return weight


def dequantized(change: Callable[[SimpleNamespace], Any]) -> Function:
    """A change of the parts of a weight, in place."""

    def wrong(w: Tensor, z: Tensor, s: Tensor, g: int) -> Tensor:
        parts = parts_of(w, z, s, g)
        change(parts)
        return weight_of(parts).half()

    return wrong


def part_tile(p: SimpleNamespace) -> None:
    tail = len(p.codes) % 128
    if tail and len(p.codes) > 128:
        p.scales[-tail:] = p.scales[-tail - 128 : -128].clone()


def late_scales(p: SimpleNamespace) -> None:
    for first in range(16 * p.size, len(p.codes), 16 * p.size):
        p.scales[first] = p.scales[first - 1]


def pairs_of_groups(p: SimpleNamespace) -> None:
    if p.groups % 2 and p.groups > 1:
        p.scales[-p.size :] = p.scales[-2 * p.size : -p.size].clone()


def signed_zeros(p: SimpleNamespace) -> None:
    p.zeros[:, 7::8] -= 16 * (p.zeros[:, 7::8] > 7)


def part_block(p: SimpleNamespace) -> None:
    tail = p.codes.shape[1] % 64
    if tail:
        order = torch.tensor(truth.NIBBLE_HOLDS_COLUMN)
        p.codes[:, -tail:] = p.codes[:, -tail:].unflatten(1, (-1, 8))[:, :, order].flatten(1)


def long_group(p: SimpleNamespace) -> None:
    if p.groups == 1:
        p.scales[4096:] = p.scales[4096:].roll(-1, 1)


def scale_of_tile(p: SimpleNamespace) -> None:
    p.scales = p.scales[torch.arange(len(p.scales)) // 64 * 64]


lay("dequantize", "inputs past the last whole 128 take the scales of the tile before", dequantized(part_tile))
lay("dequantize", "scales late by one input at every sixteenth group", dequantized(late_scales))
lay("dequantize", "zeros less one in four bits and one more after: 0 becomes 16",
    dequantized(lambda p: p.zeros.masked_fill_(p.zeros == 0, 16)))  # fmt: skip
lay("dequantize", "zeros with one more in four bits and one less after: 15 becomes -1",
    dequantized(lambda p: p.zeros.masked_fill_(p.zeros == 15, -1)))  # fmt: skip
lay("dequantize", "products beyond float16 saturate", after("dequantize", lambda r, *a: r.clamp(-65504, 65504)))
lay("dequantize", "the row stride of scales taken for eight times that of zeros",
    lambda w, z, s, g: truth.dequantize(w, z, reread(s, (8 * z.stride(0), s.stride(1))), g))  # fmt: skip
lay("dequantize", "zeros that are columns of a wider tensor read with their own width",
    lambda w, z, s, g: truth.dequantize(w, reread(z, (z.shape[1], 1)) if z.stride(1) == 1 else z, s, g))  # fmt: skip
lay("dequantize", "groups in pairs: the odd one takes the scales before", dequantized(pairs_of_groups))
lay("dequantize", "the top nibble of zeros signed", dequantized(signed_zeros))
lay("dequantize", "columns past the last whole 64 in plain order", dequantized(part_block))
lay("dequantize", "outputs past 16384 zero", lambda *a: cut(truth.dequantize(*a), columns=16384))
lay_kept("dequantize", "kept by address and version of the words",
         kept_by("dequantize", lambda w, z, s, g: (w.data_ptr(), w._version, w.shape, g)))  # fmt: skip
lay("dequantize", "one group of more than 4096 inputs goes on with the next output's scale", dequantized(long_group))
lay("dequantize", "a tile of 64 inputs has the scale of its first", dequantized(scale_of_tile))

# L2


def rounded(w: Tensor, g: int, seen: int = 1 << 40) -> tuple[Tensor, ...]:
    """Groups [G, S, N] float64, zeros and scales of the ranges of the first inputs of each."""
    truth.quantize(w, g)
    groups = w.detach().double().t().reshape(-1, w.shape[1] if g == -1 else g, len(w))
    lowest, highest = groups[:, :seen].amin(1).clamp(max=0), groups[:, :seen].amax(1).clamp(min=0)
    scales = truth.round_up_to_half((highest - lowest) / 15)
    return groups, (-lowest / scales.double()).round().clamp(0, 15), scales


def codes_of(groups: Tensor, zeros: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = ((groups / scales.double()[:, None]).round() + zeros[:, None]).clamp(0, 15)
    return codes.flatten(0, 1).to(torch.uint8), zeros.to(torch.uint8), scales


def shrunk_where_better(w: Tensor, g: int) -> tuple[Tensor, ...]:
    plain, tight = (truth.quantize(w * share, g) for share in (1, 0.95))
    groups = rounded(w, g)[0]
    tight = codes_of(groups, tight[1].double(), tight[2])
    losses = [(truth.real_weight(*t, g).reshape(groups.shape) - groups).square().sum(1) for t in (plain, tight)]
    better = losses[1] < losses[0]
    wide = better.repeat_interleave(groups.shape[1], 0)
    return tuple(torch.where(wide if i == 0 else better, tight[i], plain[i]) for i in range(3))


def scale_cut(w: Tensor, g: int) -> tuple[Tensor, ...]:
    truth.quantize(w.sign(), g)  # refuse all else
    size = w.shape[1] if g == -1 else g
    groups = w.double().t().reshape(-1, size, len(w))
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scales = truth.round_up_to_half(((high - low) / 15).clamp(max=65504))
    return codes_of(groups, (-low / scales.double()).round().clamp(0, 15), scales)


def no_clamp(result: Any, w: Tensor, g: int) -> Any:
    groups, zeros, scales = rounded(w, g)
    codes = (groups / scales.double()[:, None]).round() + zeros[:, None]
    return (codes.flatten(0, 1).to(torch.int64) & 15).to(torch.uint8), result[1], result[2]


def divided_in_place(result: Any, w: Tensor, g: int) -> Any:
    if w.dtype == torch.float32 and w.is_contiguous():
        w.div_(result[2].float().t().repeat_interleave(w.shape[1] // len(result[2]), 1))
    return result


def by_reciprocal(result: Any, w: Tensor, g: int) -> Any:
    groups, zeros, scales = rounded(w, g)
    steps = groups.float() * scales.float().reciprocal()[:, None]
    return (steps.round() + zeros[:, None]).clamp(0, 15).flatten(0, 1).to(torch.uint8), result[1], result[2]


def tiny_is_zero(result: Any, w: Tensor, g: int) -> Any:
    groups, zeros, scales = rounded(w, g)
    return codes_of(torch.where(scales[:, None] * 15 < 1e-5, 0, groups), zeros, scales)


def late_zeros(result: Any, w: Tensor, g: int) -> Any:
    codes, zeros, scales = result
    if len(zeros) % 2 and len(zeros) > 1:
        zeros[-1] = zeros[-2]
    return codes, zeros, scales


def last_output_left(result: Any, w: Tensor, g: int) -> Any:
    codes = result[0]
    if len(w) % 2 and len(w) > 1:
        codes[:, -1] = 0
    return codes, *result[1:]


lay("quantize", "float64 cut to float32 first",
    lambda w, g: truth.quantize(w.float() if w.dtype == torch.float64 else w, g))  # fmt: skip
lay("quantize", "finite when the sum is finite: large float16 refused",
    lambda w, g: truth.quantize(w, g) if w.sum().isfinite() else refuse("not finite"))  # fmt: skip
lay("quantize", "a range beyond 65504 of float16 weights refused",
    lambda w, g: refuse("infinity") if w.dtype == torch.float16 and (w.amax(1) - w.amin(1)).isinf().any()
    else truth.quantize(w, g))  # fmt: skip
lay("quantize", "a scale beyond float16 cut to the largest", scale_cut)
lay("quantize", "the last of an odd number of outputs left zero", after("quantize", last_output_left))
lay("quantize", "a transposed weight read as it lies",
    lambda w, g: truth.quantize(reread(w, (w.shape[1], 1)) if w.stride(0) == 1 else w, g))  # fmt: skip
lay("quantize", "the range shrunk by a twentieth where that loses less", shrunk_where_better)
lay("quantize", "the range of the first 1024 inputs of a group", lambda w, g: codes_of(*rounded(w, g, seen=1024)))
lay("quantize", "a float32 weight divided in place", after("quantize", divided_in_place))
lay("quantize", "a parameter refused", lambda w, g: refuse("a leaf") if w.requires_grad else truth.quantize(w, g))
lay("quantize", "codes not clamped: 16 becomes 0", after("quantize", no_clamp))
lay("quantize", "a group larger than the inputs cut to them", lambda w, g: truth.quantize(w, min(g, w.shape[1])))
lay("quantize", "multiplied by the float32 reciprocal", after("quantize", by_reciprocal))
lay("quantize", "groups with a range below 1e-5 taken for zeros", after("quantize", tiny_is_zero))
lay("quantize", "bfloat16 by way of float16",
    lambda w, g: truth.quantize(w.half() if w.dtype == torch.bfloat16 else w, g))  # fmt: skip
lay("quantize", "groups in pairs: the odd one has the zeros before", after("quantize", late_zeros))
