"""Faults written by hand after the checks were frozen, as authors of kernels make them; scored once, and kept.

They know nothing of the tables of the checks, and are not thinned out: what survives stays here and is told.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import miniawq.oracle.truth as truth
from miniawq.oracle.planted.grammar import Bred, Function, bred
from miniawq.oracle.planted.storage import as_memory

BLIND: list[Bred] = []


def planted(function: str, kind: str) -> Callable[[Function], Function]:
    """Keep a wrong function under what is wrong with it."""

    def keep(wrong: Function) -> Function:
        BLIND.append(bred(function, kind, "", "", wrong))
        return wrong

    return keep


def lay(name: str, kind: str, change: Callable[..., Any]) -> None:
    """A wrong function without a name of its own."""
    BLIND.append(bred(name, kind, "", "", change))


def cut_rows(t: Tensor, first: int) -> Tensor:
    """Zero from a row on."""
    return torch.where(torch.arange(len(t))[:, None] < first, t, 0)


# L0

lay(
    "pack",
    "rows past the last whole tile of 16 left out",
    lambda c: cut_rows(truth.pack(c), len(c) // 16 * 16) if len(c) > 16 else truth.pack(c),
)
lay(
    "pack",
    "square matrices of words transposed",
    lambda c: truth.pack(c).t().contiguous() if len(c) == c.shape[1] // 8 else truth.pack(c),
)
lay(
    "pack",
    "codes above 15 accepted in the last column of a word",
    lambda c: truth.pack(torch.where((torch.arange(c.shape[-1]) % 8 == 7), c & 15, c)),
)
lay("pack", "columns past 16384 zero", lambda c: torch.where(torch.arange(c.shape[1] // 8) < 2048, truth.pack(c), 0))
lay("pack", "large codes looked for in the last 64 rows", lambda c: truth.pack(torch.cat([c[:-64] & 15, c[-64:]])))
lay("pack", "large codes seen as signed bytes", lambda c: truth.pack(torch.where(c.view(torch.int8) < 0, c & 15, c)))
lay(
    "pack",
    "only multiples of 4 asked for",
    lambda c: truth.pack(c[:, : c.shape[1] // 8 * 8] if c.shape[1] % 4 == 0 else c),
)
lay(
    "unpack",
    "the most negative word taken for its own magnitude",
    lambda w: truth.unpack(torch.where(w == -(2**31), torch.zeros_like(w), w)),
)
lay("unpack", "negative words divided towards zero", lambda w: unpack_truncating(w))
lay("unpack", "int8 returned", lambda w: truth.unpack(w).to(torch.int8))
lay("unpack", "an even number of rows assumed", lambda w: cut_rows(truth.unpack(w), max(1, len(w) // 2 * 2)))
lay(
    "unpack",
    "the words of a column vector read as a row",
    lambda w: truth.unpack(as_memory(w)) if (w.shape[1] == 1 and w.stride(0) != 1) else truth.unpack(w),
)
lay(
    "unpack",
    "words of 17 and more rows and columns read in tiles",
    lambda w: truth.unpack(w).roll(1 if min(w.shape) > 16 else 0, 0),
)


@planted("pack", "made with float32 powers of 16")
def pack_in_floats(codes: Tensor) -> Tensor:
    truth.pack(codes)
    parts = [codes[:, c::8].float() * 16.0**i for i, c in enumerate(truth.NIBBLE_HOLDS_COLUMN)]
    words = torch.stack(parts).sum(0).double().long()
    return torch.where(words < 2**31, words, words - 2**32).int()


def unpack_truncating(words: Tensor) -> Tensor:
    codes = truth.unpack(words)
    odd = (words < 0) & (words % 16 != 0)
    codes[:, 4::8] = torch.where(odd, (codes[:, 4::8] + 1) & 15, codes[:, 4::8])
    return codes


# L1


def with_parts(change: Callable[..., Any]) -> Function:
    """Dequantization from changed codes, zeros, scales and the group of each row."""

    def wrong(w: Tensor, z: Tensor, s: Tensor, g: int) -> Tensor:
        truth.dequantize(w, z, s, g)
        k = len(w)
        group = torch.arange(k) // (k if g == -1 else g)
        q, zero, scale, group = change(truth.unpack(w).double(), truth.unpack(z).double(), s.double(), group)
        return ((q - zero[group]) * scale[group]).half()

    return wrong


lay("dequantize", "group numbers wrap at 64", with_parts(lambda q, z, s, g: (q, z, s, g % 64)))
lay(
    "dequantize",
    "group numbers from a float16 row number",
    with_parts(
        lambda q, z, s, g: (q, z, s, ((torch.arange(len(q)).half().long() * len(z)) // len(q)).clamp(max=len(z) - 1))
    ),
)
lay(
    "dequantize",
    "scales of the tail past a multiple of 64 columns from the block before",
    with_parts(
        lambda q, z, s, g: (
            q,
            z,
            torch.cat(
                [s[:, : s.shape[1] // 64 * 64], s[:, s.shape[1] // 64 * 64 - s.shape[1] % 64 : s.shape[1] // 64 * 64]],
                1,
            )
            if s.shape[1] > 128 and s.shape[1] % 64
            else s,
            g,
        )
    ),
)
lay("dequantize", "a zero of 15 taken for -1", with_parts(lambda q, z, s, g: (q, torch.where(z == 15, -1.0, z), s, g)))
lay("dequantize", "a zero of 0 taken for 8", with_parts(lambda q, z, s, g: (q, torch.where(z == 0, 8.0, z), s, g)))
lay("dequantize", "a scale of 0 taken for 1", with_parts(lambda q, z, s, g: (q, z, torch.where(s == 0, 1.0, s), g)))
lay("dequantize", "negative results saturate", lambda w, z, s, g: truth.dequantize(w, z, s, g).clamp(min=-65504))
lay(
    "dequantize",
    "odd groups of 64 take the zeros before",
    with_parts(lambda q, z, s, g: (q, z[torch.arange(len(z)) // 2 * 2] if len(q) // len(z) == 64 else z, s, g)),
)
lay(
    "dequantize",
    "zeros of one group too many taken",
    lambda w, z, s, g: truth.dequantize(w, z[: len(s)] if len(z) == len(s) + 1 else z, s, g),
)
lay("dequantize", "subnormal results cut off", lambda w, z, s, g: subnormals_cut(w, z, s, g))
lay(
    "dequantize",
    "group_size -1 filled up to a multiple of 32",
    with_parts(
        lambda q, z, s, g: (
            torch.where(
                (torch.arange(len(q)) >= len(q) // 32 * 32)[:, None] & (len(z) == 1) & (len(q) % 32 > 0), 0.0, q
            ),
            z,
            s,
            g,
        )
    ),
)
lay(
    "dequantize",
    "zeros at an offset read from the start of their memory",
    lambda w, z, s, g: truth.dequantize(w, torch.as_strided(z, z.shape, z.stride(), 0), s, g),
)
lay(
    "dequantize",
    "scales read as if they were rows apart",
    lambda w, z, s, g: truth.dequantize(w, z, as_memory(s) if s.stride(-1) == 1 and not s.is_contiguous() else s, g),
)
lay(
    "dequantize",
    "the product through two float16 steps past 512 columns",
    lambda w, z, s, g: truth.dequantize(w, z, s, g) if s.shape[1] <= 512 else in_halves(w, z, s, g),
)


def subnormals_cut(w: Tensor, z: Tensor, s: Tensor, g: int) -> Tensor:
    exact = truth.real_weight(truth.unpack(w), truth.unpack(z), s, g)
    right = truth.dequantize(w, z, s, g)
    return torch.where(exact.abs() < 2.0**-14, ((exact * 2**24).trunc() / 2**24).half(), right)


def in_halves(w: Tensor, z: Tensor, s: Tensor, g: int) -> Tensor:
    size = len(w) if g == -1 else g
    truth.dequantize(w, z, s, g)
    scale = s.repeat_interleave(size, 0)
    return truth.unpack(w).half() * scale - truth.unpack(z).repeat_interleave(size, 0).half() * scale


# L2


def requantized(change: Callable[..., Any]) -> Function:
    """The right codes, zeros and scales, changed."""
    return lambda w, g: change(*truth.quantize(w, g), w)


lay("quantize", "negative groups span their own range", lambda w, g: own_range(w, g))
lay(
    "quantize",
    "a float16 sum tells whether all is finite",
    lambda w, g: (
        truth.quantize(w, g)
        if bool((w.sum(dtype=torch.float16) if w.dtype == torch.float16 else w.float().sum().half()).isfinite())
        else refuse()
    ),
)
lay(
    "quantize",
    "negative infinity taken for the smallest number",
    lambda w, g: truth.quantize(torch.where(w == -torch.inf, -9, w), g),
)
lay(
    "quantize",
    "the seventeenth group takes the scale before",
    requantized(lambda q, z, s, w: (q, z, torch.cat([s[:16], s[15:16], s[17:]]) if len(s) > 16 else s)),
)
lay("quantize", "codes wrap instead of being clamped", lambda w, g: wrapping(w, g))
lay(
    "quantize",
    "outputs past 128 share scales in pairs",
    requantized(
        lambda q, z, s, w: (
            q,
            z,
            torch.cat([s[:, :128], s[:, 128:].reshape(len(s), -1, 2).amax(-1).repeat_interleave(2, 1)], 1)
            if s.shape[1] > 128
            else s,
        )
    ),
)
lay(
    "quantize",
    "bfloat16 weights through float16",
    lambda w, g: truth.quantize(w.half() if w.dtype == torch.bfloat16 and bool((w.abs() < 6e4).all()) else w, g),
)
lay(
    "quantize",
    "transposed weights read as they lie",
    lambda w, g: truth.quantize(as_memory(w) if w.dim() == 2 and w.stride(0) == 1 and w.shape[0] > 1 else w, g),
)
lay("quantize", "the weight clamped in place", lambda w, g: clamping(w, g))
lay("quantize", "scales from the largest magnitude of one-signed groups", lambda w, g: truth.quantize(w, g))
BLIND.pop()  # the right function under another name
lay(
    "quantize",
    "float64 weights beyond float32 precision cut",
    lambda w, g: truth.quantize(w.float() if w.dtype == torch.float64 else w, g),
)
lay(
    "quantize",
    "zeros of constant groups are 0",
    requantized(
        lambda q, z, s, w: (
            q,
            torch.where(
                (w.t().reshape(len(s), -1, len(w)).amax(1) == w.t().reshape(len(s), -1, len(w)).amin(1)), 0, z
            ).byte(),
            s,
        )
    ),
)
lay("quantize", "groups of 128 in two halves with the first half's scale", lambda w, g: halved(w, g))
lay("quantize", "scales to nearest where they are below 2**-10", lambda w, g: nearest_below(w, g))


def refuse() -> Any:
    raise ValueError("not finite")


def own_range(w: Tensor, g: int) -> Any:
    q, z, s = truth.quantize(w, g)
    groups = w.double().t().reshape(len(s), -1, len(w))
    low, high = groups.amin(1), groups.amax(1)
    scale = torch.where(high < 0, ((high - low) / 15).clamp(min=2.0**-20), s.double()).half()
    zeros = torch.where(high < 0, (-low / scale.double()).round().clamp(0, 15), z.double())
    codes = ((groups / scale.double()[:, None]).round() + zeros[:, None]).clamp(0, 15)
    return torch.where((high < 0)[:, None], codes, q.reshape(codes.shape)).reshape(q.shape).byte(), zeros.byte(), scale


def wrapping(w: Tensor, g: int) -> Any:
    q, z, s = truth.quantize(w, g)
    size = len(q) // len(s)
    steps = (w.t().double() / s.double().repeat_interleave(size, 0)).round() + z.repeat_interleave(size, 0)
    return (steps.long() & 15).byte(), z, s


def clamping(w: Tensor, g: int) -> Any:
    result = truth.quantize(w, g)
    if w.stride(0) != 0:
        w.clamp_(-1, 1)
    return result


def halved(w: Tensor, g: int) -> Any:
    q, z, s = truth.quantize(w, g)
    if g != 128:
        return q, z, s
    half = truth.quantize(w.reshape(len(w), -1, 128)[..., :64].reshape(len(w), -1), 64)
    steps = w.t().double() / half[2].double().repeat_interleave(128, 0)
    return (steps.round() + half[1].repeat_interleave(128, 0)).clamp(0, 15).byte(), half[1], half[2]


def nearest_below(w: Tensor, g: int) -> Any:
    q, _, s = truth.quantize(w, g)
    groups = w.double().t().reshape(len(s), -1, len(w))
    exact = (groups.amax(1).clamp(min=0) - groups.amin(1).clamp(max=0)) / 15
    scale = torch.where(exact < 2.0**-10, exact.half().clamp(min=2.0**-24), s)
    zeros = (-groups.amin(1).clamp(max=0) / scale.double()).round().clamp(0, 15)
    codes = ((groups / scale.double()[:, None]).round() + zeros[:, None]).clamp(0, 15)
    return codes.reshape(q.shape).byte(), zeros.byte(), scale
