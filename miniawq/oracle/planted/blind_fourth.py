"""A fourth blind set, of what authors of vectorised kernels and of loaders do; scored once against checks unread.

Here words, dequantization and rounding: tails of tiles that are no power of two, pointers rounded down to what a vector
load wants, checks of the vectorised part alone, rings of buffers, keys of caches that leave one argument out.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import miniawq.oracle.truth as truth
from miniawq.oracle.planted.blind_second import kept_by
from miniawq.oracle.planted.blind_third import after, in_plain_order, reread
from miniawq.oracle.planted.grammar import Bred, Function, bred

BLIND_FOURTH: list[Bred] = []


def sow(function: str, kind: str, wrong: Function) -> None:
    """Keep a wrong function under what is wrong with it."""
    BLIND_FOURTH.append(bred(function, kind, "", "", wrong))


def sow_kept(function: str, kind: str, make: Callable[[], Function]) -> None:
    """As `sow`, for a function that keeps something between calls."""
    BLIND_FOURTH.append(Bred(function, kind, "", "", make))


def as_if_dense(t: Tensor) -> Tensor:
    """The tensor as a kernel reads it that takes it for contiguous."""
    return reread(t, torch.empty(t.shape, device="meta").stride())


def rounded_down(t: Tensor, elements: int) -> Tensor:
    """The tensor as loads of `elements` at once read it, from an address that is a multiple of them."""
    return reread(t, t.stride(), t.storage_offset() // elements * elements)


def ring(function: str, length: int) -> Callable[[], Function]:
    """Results lie in as many buffers as `length` for each shape, used in turn."""

    def make() -> Function:
        buffers: dict[Any, list[Tensor]] = {}

        def wrong(*arguments: Any) -> Tensor:
            result = getattr(truth, function)(*arguments)
            kept = buffers.setdefault((result.shape, result.dtype), [])
            kept.append(kept.pop(0).copy_(result) if len(kept) == length else result)
            return kept[-1]

        return wrong

    return make


# L0


def wide_tail_loses_a_nibble(words: Tensor, codes: Tensor) -> Tensor:
    width = words.shape[1]
    if width > 96 and width % 96:
        words[:, width - width % 96 :] &= 0x0FFFFFFF
    return words


def last_rows_plain(words: Tensor, codes: Tensor) -> Tensor:
    rows = len(words)
    if rows > 192 and rows % 192:
        words[rows - rows % 192 :] = truth.pack(in_plain_order(codes[rows - rows % 192 :]))
    return words


def every_second_as_dense(codes: Tensor) -> Tensor:
    if codes.shape[1] >= 64 and codes.stride(1) == 2:
        codes = as_if_dense(codes) & 15
    return truth.pack(codes)


def one_row_for_all_as_dense(codes: Tensor) -> Tensor:
    return truth.pack(as_if_dense(codes) & 15 if len(codes) > 1 and codes.stride(0) == 0 else codes)


def range_of_signed_bytes(codes: Tensor) -> Tensor:
    return truth.pack(torch.where(codes > 127, codes & 15, codes) if codes.dtype == torch.uint8 else codes)


def range_of_one_bit(codes: Tensor) -> Tensor:
    return truth.pack(torch.where((codes & 16) == 0, codes & 15, codes) if codes.dtype == torch.uint8 else codes)


def range_of_dense_codes(codes: Tensor) -> Tensor:
    return truth.pack(codes if codes.is_contiguous() or codes.is_floating_point() else codes & 15)


def index_in_float32(codes: Tensor, words: Tensor) -> Tensor:
    if codes.numel() > 2**24:
        late = torch.arange(2**24, codes.numel())
        flat = codes.flatten()
        flat[2**24 :] = flat[late.to(torch.float32).to(torch.int64).clamp(max=codes.numel() - 1)]
        return flat.view(codes.shape)
    return codes


def one_row_signed(codes: Tensor, words: Tensor) -> Tensor:
    if len(codes) == 1 and codes.shape[1] >= 128:
        codes[:, 7::8] |= (words < 0).to(torch.uint8) * 0xF0
    return codes


sow("pack", "past 96 words in a row, the tail loses its top nibble", after("pack", wide_tail_loses_a_nibble))
sow("pack", "past 192 rows, the last block is packed in plain order", after("pack", last_rows_plain))
sow("pack", "every second column is read as if dense, from 64 columns on", every_second_as_dense)
sow("pack", "one row expanded is read on", one_row_for_all_as_dense)
sow("pack", "codes above 127 are negative and pass", range_of_signed_bytes)
sow("pack", "bit 4 alone is looked at: 32 passes", range_of_one_bit)
sow("pack", "codes are checked where they lie densely", range_of_dense_codes)
sow_kept("pack", "a ring of eight buffers", ring("pack", 8))
sow("pack", "no rows: as many words as codes", lambda c: truth.pack(c) if len(c) else c.to(torch.int32))
sow("unpack", "an address is rounded down to 16 bytes, where rows are multiples of them",
    lambda w: truth.unpack(rounded_down(w, 4) if w.shape[1] % 4 == 0 else w))  # fmt: skip
sow("unpack", "a square transposed is read as if dense",
    lambda w: truth.unpack(as_if_dense(w) if w.shape[0] == w.shape[1] and w.stride(0) == 1 else w))  # fmt: skip
sow("unpack", "the index of a code is a float32", after("unpack", index_in_float32))
sow("unpack", "one row of 16 words or more: the top nibble keeps its sign", after("unpack", one_row_signed))
sow_kept("unpack", "kept by shape, first and last word",
         kept_by("unpack", lambda w: (w.shape, *w.flatten()[[0, -1]].tolist()) if w.numel() else w.shape))  # fmt: skip

# L1


def changed(which: str, change: Callable[..., Tensor], when: Callable[..., bool]) -> Function:
    """Dequantize with one argument changed, under a circumstance that all of them make."""

    def wrong(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
        held = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
        if when(qweight, qzeros, scales, group_size):
            held[which] = change(held[which])
        return truth.dequantize(**held, group_size=group_size)

    return wrong


def last_from_the_one_before(t: Tensor) -> Tensor:
    return torch.cat([t[:-1], t[-2:-1]])


def even_columns_doubled(zeros: Tensor) -> Tensor:
    codes = truth.unpack(zeros)
    codes[:, 1025::2] = codes[:, 1024::2]
    return truth.pack(codes)


def larger_group_is_k(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    return truth.dequantize(qweight, qzeros, scales, -1 if group_size > len(qweight) else group_size)


def short_last_group(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    k = len(qweight)
    if group_size > 0 and k % group_size and len(qzeros) == len(scales) == k // group_size + 1:
        padded = torch.cat([qweight, qweight.new_zeros(group_size - k % group_size, qweight.shape[1])])
        return truth.dequantize(padded, qzeros, scales, group_size)[:k]
    return truth.dequantize(qweight, qzeros, scales, group_size)


def flushed_at_64(weight: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    return torch.where(weight.abs() < 2.0**-14, weight * 0, weight) if group_size == 64 else weight


def zero_wins(weight: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    size = len(qweight) if group_size == -1 else group_size
    same = truth.unpack(qweight) == truth.unpack(qzeros).repeat_interleave(size, 0)
    return torch.where(same & scales.isinf().repeat_interleave(size, 0), 0.0, weight)


def odd(groups: Tensor) -> bool:
    return len(groups) > 1 and len(groups) % 2 == 1


sow("dequantize", "groups by twos: the last of an odd number has the scales before it, from 512 outputs on",
    changed("scales", last_from_the_one_before, lambda w, z, s, g: odd(s) and s.shape[1] >= 512))  # fmt: skip
sow("dequantize", "one group: its scales are read as if dense",
    changed("scales", as_if_dense, lambda w, z, s, g: len(s) == 1))  # fmt: skip
sow("dequantize", "zeros expanded over the groups are read on",
    changed("qzeros", as_if_dense, lambda w, z, s, g: z.stride(0) == 0))  # fmt: skip
sow("dequantize", "scales expanded over the outputs are read on",
    changed("scales", as_if_dense, lambda w, z, s, g: s.stride(1) == 0))  # fmt: skip
sow("dequantize", "group 32: the last of an odd number has the zeros before it",
    changed("qzeros", last_from_the_one_before, lambda w, z, s, g: odd(s) and g == 32))  # fmt: skip
sow("dequantize", "group 64: subnormal results are flushed", after("dequantize", flushed_at_64))
sow(
    "dequantize", "minus infinity is the lowest finite number", after("dequantize", lambda r, *a: r.clamp(min=-65504.0))
)
sow_kept("dequantize", "kept by what words and scales hold, without the zeros",
         kept_by("dequantize", lambda w, z, s, g: (w.shape, g, str(w.tolist()), str(s.tolist()))))  # fmt: skip
sow("dequantize", "a group larger than K is K", larger_group_is_k)
sow("dequantize", "K that is no multiple of the group: the last is short", short_last_group)
sow("dequantize", "an address of words is rounded down to 16 bytes, where rows are multiples of them",
    changed("qweight", lambda t: rounded_down(t, 4), lambda w, z, s, g: w.shape[1] % 4 == 0))  # fmt: skip
sow("dequantize", "an address of scales is rounded down to 4 bytes",
    changed("scales", lambda t: rounded_down(t, 2), lambda w, z, s, g: True))  # fmt: skip
sow("dequantize", "past 1024 outputs, two neighbours have one zero",
    changed("qzeros", even_columns_doubled, lambda w, z, s, g: s.shape[1] > 1024))  # fmt: skip
sow("dequantize", "scales of int16 are taken for bits",
    changed("scales", lambda t: t.view(torch.float16), lambda w, z, s, g: s.dtype == torch.int16))  # fmt: skip
sow("dequantize", "zeros in a transposed square are read as if dense",
    changed("qzeros", as_if_dense, lambda w, z, s, g: z.shape[0] == z.shape[1] and z.stride(0) == 1))  # fmt: skip
sow_kept("dequantize", "a ring of four buffers", ring("dequantize", 4))
sow("dequantize", "an infinite scale times a step of nothing is nothing", after("dequantize", zero_wins))

# L2


def on_the_grid(weight: Tensor, group_size: int, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and zeros of a weight for scales that are given."""
    n, k = weight.shape
    groups = weight.to(torch.float64).t().reshape(len(scales), -1, n)
    exact = scales.to(torch.float64)
    zeros = (-groups.amin(1).clamp(max=0) / exact).round().clamp(0, 15)
    codes = ((groups / exact[:, None]).round() + zeros[:, None]).clamp(0, 15).reshape(k, n)
    return codes.to(torch.uint8), zeros.to(torch.uint8), scales


def ranges(weight: Tensor, group_size: int) -> Tensor:
    """M - m of each group, float64 [G, N]."""
    n, k = weight.shape
    groups = weight.to(torch.float64).t().reshape(1 if group_size == -1 else k // group_size, -1, n)
    return groups.amax(1).clamp(min=0) - groups.amin(1).clamp(max=0)


def rescaled(scales_of: Callable[..., Tensor], when: Function = lambda w, g, s: True) -> Function:
    """Quantize with other scales, under a circumstance: `scales_of(weight, group_size, right scales)`."""

    def wrong(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
        right = truth.quantize(weight, group_size)
        if not when(weight, group_size, right[2]):
            return right
        return on_the_grid(weight, group_size, scales_of(weight, group_size, right[2]))

    return wrong


def times_a_fifteenth(weight: Tensor, group_size: int, scales: Tensor) -> Tensor:
    return truth.round_up_to_half((ranges(weight, group_size).float() * (1 / 15)).double())


def of_whole_blocks(weight: Tensor, group_size: int, scales: Tensor) -> Tensor:
    return truth.round_up_to_half(ranges(weight[:, : weight.shape[1] // 1024 * 1024], -1) / 15)


def shared_by_the_last_two(weight: Tensor, group_size: int, scales: Tensor) -> Tensor:
    return torch.cat([scales[:-1], scales[-2:].amax(0, keepdim=True)])


def subnormal_to_nearest(weight: Tensor, group_size: int, scales: Tensor) -> Tensor:
    nearest = (ranges(weight, group_size) / 15).to(torch.float16)
    return torch.where((scales < 2.0**-14) & (nearest > 0), nearest, scales)


def of_a_half_weight(weight: Tensor, group_size: int, scales: Tensor) -> Tensor:
    return truth.round_up_to_half(ranges(weight.to(torch.float16), -1) / 15)


def infinite_reciprocal(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    codes, zeros, scales = truth.quantize(weight, group_size)
    tiny = (scales < 2.0**-16).repeat_interleave(weight.shape[1] // len(scales), 0)
    ends = torch.where(weight.t() > 0, 15, torch.where(weight.t() < 0, 0, codes)).to(torch.uint8)
    return torch.where(tiny, ends, codes), zeros, scales


def cut_in_the_tail(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    codes, zeros, scales = truth.quantize(weight, group_size)
    n, size = weight.shape[0], weight.shape[1] // len(scales)
    if n > 96 and n % 96:
        steps = (weight.double().t() / scales.double().repeat_interleave(size, 0)).trunc()
        cut_off = (steps + zeros.repeat_interleave(size, 0)).clamp(0, 15).to(torch.uint8)
        codes[:, n - n % 96 :] = cut_off[:, n - n % 96 :]
    return codes, zeros, scales


def steps_in_bfloat16(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    codes, zeros, scales = truth.quantize(weight, group_size)
    size = weight.shape[1] // len(scales)
    if weight.dtype == torch.bfloat16 and weight.shape[1] > 512:
        steps = (weight.t() / scales.bfloat16().repeat_interleave(size, 0)).round()
        codes = (steps.float() + zeros.repeat_interleave(size, 0)).clamp(0, 15).to(torch.uint8)
    return codes, zeros, scales


def finite_sum(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    if weight.dtype == torch.float16 and not weight.sum().isfinite():
        raise ValueError("the weight holds NaN or infinity")
    return truth.quantize(weight, group_size)


def finite_in_whole_blocks(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    if weight.numel() > 1024:
        weight = weight.clone(memory_format=torch.contiguous_format)
        tail = weight.view(-1)[weight.numel() // 1024 * 1024 :]
        tail.copy_(tail.nan_to_num(0.0, 0.0, 0.0))
    return truth.quantize(weight, group_size)


def canonical_nan(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    if weight.dtype == torch.float32:
        strange = weight.isnan() & (weight.contiguous().view(torch.int32) != 0x7FC00000)
        weight = torch.where(strange, 0.0, weight)
    return truth.quantize(weight, group_size)


def centred_in_place(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    result = truth.quantize(weight, group_size)
    middle = weight.mean()
    weight.sub_(middle).add_(middle)
    return result


def one_buffer_of_zeros() -> Function:
    kept: dict[Any, Tensor] = {}

    def wrong(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
        codes, zeros, scales = truth.quantize(weight, group_size)
        return codes, kept.setdefault(zeros.shape, zeros).copy_(zeros), scales

    return wrong


def saturated_scale(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    if bool(weight.isfinite().all()) and bool((ranges(weight, group_size) / 15 > 65504).any()):
        return on_the_grid(weight, group_size, (ranges(weight, group_size) / 15).clamp(max=65504).to(torch.float16))
    return truth.quantize(weight, group_size)


def weight_as_dense(when: Callable[[Tensor], bool]) -> Function:
    return lambda w, g: truth.quantize(as_if_dense(w) if when(w) else w, g)


sow("quantize", "the range times a fifteenth in float32", rescaled(times_a_fifteenth))
sow("quantize", "one group of more than 1024: its range is that of whole blocks",
    rescaled(of_whole_blocks, lambda w, g, s: len(s) == 1 and w.shape[1] > 1024))  # fmt: skip
sow("quantize", "finite is what has a finite sum in float16", finite_sum)
sow("quantize", "NaN is looked for in whole blocks of 1024", finite_in_whole_blocks)
sow("quantize", "only the canonical NaN is one", canonical_nan)
sow("quantize", "a square transposed is read as if dense",
    weight_as_dense(lambda w: w.shape[0] == w.shape[1] and w.stride(0) == 1))  # fmt: skip
sow("quantize", "groups by twos: the last of an odd number shares its scale",
    rescaled(shared_by_the_last_two, lambda w, g, s: odd(s)))  # fmt: skip
sow_kept("quantize", "one buffer of zeros for each shape", one_buffer_of_zeros)
sow("quantize", "the weight is centred in place and put back", centred_in_place)
sow("quantize", "subnormal scales are rounded to nearest", rescaled(subnormal_to_nearest))
sow("quantize", "past 96 outputs, codes of the tail are cut off", cut_in_the_tail)
sow("quantize", "a group larger than K is K", lambda w, g: truth.quantize(w, -1 if g > w.shape[1] else g))
sow("quantize", "the reciprocal of a small scale is infinite in float16", infinite_reciprocal)
sow("quantize", "bfloat16 with more than 512 inputs: steps in bfloat16", steps_in_bfloat16)
sow("quantize", "one group: the range is that of the weight in float16",
    rescaled(of_a_half_weight, lambda w, g, s: len(s) == 1 and w.dtype == torch.float32 and s.max() < 4e3))  # fmt: skip
sow("quantize", "float16 with every second input is read as if dense",
    weight_as_dense(lambda w: w.dtype == torch.float16 and w.stride(1) == 2))  # fmt: skip
sow("quantize", "a scale that does not fit is the largest that does", saturated_scale)
