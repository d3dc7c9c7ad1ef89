"""Faults of L0, storage, and L1, dequantization."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import miniawq.oracle.truth as truth
from miniawq.oracle.planted import Fault

INVERSE_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def pack_as(order: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Packing with another nibble order."""
    return lambda codes: truth.pack(reordered(codes, order))


def reordered(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """Codes such that packing them by the definition puts column order[i] into nibble i."""
    result = codes.clone()
    for nibble, column in enumerate(order):
        result[:, truth.NIBBLE_HOLDS_COLUMN[nibble] :: 8] = codes[:, column::8]
    return result


def both(order: tuple[int, ...]) -> dict[str, Callable[[Tensor], Tensor]]:
    """An order that agrees with itself, so that a round trip finds nothing."""

    def unpack(words: Tensor) -> Tensor:
        codes = truth.unpack(words)
        result = codes.clone()
        for nibble, column in enumerate(order):
            result[:, column::8] = codes[:, truth.NIBBLE_HOLDS_COLUMN[nibble] :: 8]
        return result

    return {"pack": pack_as(order), "unpack": unpack}


def unpack_signed(words: Tensor) -> Tensor:
    """An arithmetic shift without a mask: the top nibble keeps its sign."""
    codes = truth.unpack(words).to(torch.int16)
    codes[:, 7::8] = (words >> 28).to(torch.int16)
    return codes.to(torch.uint8)


def pack_smeared(codes: Tensor) -> Tensor:
    """Codes added at their place, whatever they are."""
    high = codes >> 4
    carried = (codes & 15) + torch.where(torch.arange(codes.shape[1]) % 8 > 0, high.roll(1, 1), 0)
    return truth.pack((carried & 15).to(torch.uint8))


def as_memory(tensor: Tensor) -> Tensor:
    """What a kernel reads that takes the pointer and forgets the strides."""
    return torch.as_strided(tensor, tensor.shape, torch.empty(tensor.shape).stride())


def with_storage(codes: Tensor) -> Tensor:
    """As `as_memory`, but within what the tensor's storage holds."""
    return as_memory(tensor=codes) if codes.untyped_storage().nbytes() >= codes.nbytes else codes


def overwrite(tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The right result, and a 1 left in the argument."""
    result = function(tensor)
    tensor.fill_(1)
    return result


def to_signed_saturating(codes: Tensor) -> Tensor:
    """Words made as floats and converted, which saturates at 2**31 - 1."""
    words = truth.pack(codes).to(torch.int64) % 2**32
    return words.clamp(max=2**31 - 1).to(torch.int32)


STORAGE = [
    Fault("nibbles in the order 0..7", "L0.pack.known-words", both(tuple(range(8)))),
    Fault("the inverse nibble order", "L0.pack.known-words", both(INVERSE_ORDER)),
    Fault("nibbles from the top down", "L0.pack.known-words", both(truth.NIBBLE_HOLDS_COLUMN[::-1])),
    Fault("the inverse order in unpack alone", "L0.round-trip.codes", {"unpack": both(INVERSE_ORDER)["unpack"]}),
    Fault("top nibble extended by its sign", "L0.unpack.every-slot", {"unpack": unpack_signed}),
    Fault("words saturate at 2**31 - 1", "L0.pack.every-slot", {"pack": to_signed_saturating}),
    Fault("top code lost in pack", "L0.pack.every-slot", {"pack": lambda c: truth.pack(c.clamp(max=14))}),
    Fault("top code lost in unpack", "L0.unpack.every-slot", {"unpack": lambda w: truth.unpack(w).clamp(max=14)}),
    Fault("codes above 15 smeared over the neighbour", "L0.pack.refuses-large-codes", {"pack": pack_smeared}),
    Fault("codes above 15 masked", "L0.pack.refuses-large-codes", {"pack": lambda c: truth.pack(c & 15)}),
    Fault("codes above 15 saturated", "L0.pack.refuses-large-codes", {"pack": lambda c: truth.pack(c.clamp(max=15))}),
    Fault("part words padded", "L0.pack.refuses-part-words",
          {"pack": lambda c: truth.pack(torch.nn.functional.pad(c, (0, -c.shape[1] % 8)))}),
    Fault("part words dropped", "L0.pack.refuses-part-words",
          {"pack": lambda c: truth.pack(c[:, : c.shape[1] // 8 * 8])}),
    Fault("strides ignored by pack", "L0.strides", {"pack": lambda c: truth.pack(with_storage(c))}),
    Fault("strides ignored by unpack", "L0.strides", {"unpack": lambda w: truth.unpack(with_storage(w))}),
    Fault("the first row repeated", "L0.pack.random", {"pack": lambda c: truth.pack(c[:1].expand_as(c))}),
    Fault("columns past 4096 zero", "L0.pack.wide",
          {"pack": lambda c: truth.pack(torch.where(torch.arange(c.shape[1]) < 4096, c, 0))}),
    Fault("rows past 256 zero", "L0.pack.wide",
          {"unpack": lambda w: torch.where(torch.arange(len(w))[:, None] < 256, truth.unpack(w), 0)}),
    Fault("the argument of pack overwritten", "L0.inputs-unchanged", {"pack": lambda c: overwrite(c, truth.pack)}),
    Fault("codes returned as int32", "L0.unpack.known-words", {"unpack": lambda w: truth.unpack(w).to(torch.int32)}),
    Fault("words returned as int64", "L0.pack.known-words", {"pack": lambda c: truth.pack(c).to(torch.int64)}),
]  # fmt: skip


def decoding(
    zeros: Callable[[Tensor], Tensor] = lambda z: z,
    scales: Callable[[Tensor], Tensor] = lambda s: s,
    steps: Callable[[Tensor, Tensor], Tensor] = lambda q, z: q - z,
    product: Callable[[Tensor, Tensor], Tensor] = lambda d, s: (d * s).half(),
    group_of_row: Callable[[int, int, int], Tensor] = lambda k, size, groups: torch.arange(k) // size,
) -> Callable[..., Tensor]:
    """Dequantization with one step replaced."""

    def dequantize(qweight: Tensor, qzeros: Tensor, scale: Tensor, group_size: int) -> Tensor:
        truth.dequantize(qweight, qzeros, scale, group_size)  # refuses what does not fit
        k = qweight.shape[0]
        size = k if group_size == -1 else group_size
        group = group_of_row(k, size, scale.shape[0]).clamp(max=scale.shape[0] - 1)
        codes, zero = truth.unpack(qweight).float(), zeros(truth.unpack(qzeros).float())
        return product(steps(codes, zero[group]), scales(scale)[group].float())

    return dequantize


def dequantize(**wrong: Any) -> dict[str, Callable[..., Tensor]]:
    """The wrong function under its name."""
    return {"dequantize": decoding(**wrong)}


def separate_products(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """code * scale - zero * scale, each in float16."""
    size = qweight.shape[0] if group_size == -1 else group_size
    scale, zero = scales.repeat_interleave(size, 0), truth.unpack(qzeros).repeat_interleave(size, 0)
    return truth.unpack(qweight).half() * scale - zero.half() * scale


def towards_zero(steps: Tensor, scales: Tensor) -> Tensor:
    """The product cut off instead of rounded."""
    exact = steps.double() * scales.double()
    half = exact.half()
    too_large = half.double().abs() > exact.abs()
    bits = half.view(torch.int16)
    return torch.where(too_large & half.isfinite(), bits - 1, bits).view(torch.float16)


def flushed(steps: Tensor, scales: Tensor) -> Tensor:
    """Subnormal scales and products become zero."""
    kept = torch.where(scales < 2.0**-14, 0.0, scales)
    weight = (steps * kept).half()
    return torch.where(weight.abs() < 2.0**-14, 0.0, weight)


def short_scales(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Missing groups filled by broadcasting."""
    groups = 1 if group_size == -1 else qweight.shape[0] // group_size
    n = scales.shape[1]
    fill = [t.expand(groups, -1) if len(t) == 1 else t for t in (qzeros, scales)]
    return truth.dequantize(qweight, fill[0], fill[1], group_size)[:, :n]


def first_64_rows(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """One group of all inputs taken for a group of 64."""
    weight = truth.dequantize(qweight, qzeros, scales, group_size)
    return weight if group_size != -1 else torch.cat([weight[:64], torch.zeros_like(weight[64:])])


def changed_scales(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """The right result, with the scales doubled in place."""
    result = truth.dequantize(qweight, qzeros, scales, group_size)
    scales.mul_(2)
    return result


DEQUANTIZATION = [
    Fault("zero plus one (GPTQ version 1)", "L1.all-pairs", dequantize(zeros=lambda z: z + 1)),
    Fault("zero minus one", "L1.all-pairs", dequantize(zeros=lambda z: z - 1)),
    Fault("zero not subtracted", "L1.all-pairs", dequantize(zeros=lambda z: z * 0)),
    Fault("zero fixed at 8", "L1.all-pairs", dequantize(zeros=lambda z: z * 0 + 8)),
    Fault("zeros in the order 0..7", "L1.all-pairs",
          {"dequantize": lambda w, z, s, g: truth.dequantize(w, truth.pack(both(tuple(range(8)))["unpack"](z)), s, g)}),
    Fault("difference wraps in uint8", "L1.all-pairs", dequantize(steps=lambda q, z: (q - z) % 256)),
    Fault("difference wraps at 4 bits", "L1.all-pairs", dequantize(steps=lambda q, z: (q - z + 8) % 16 - 8)),
    Fault("zeros and codes exchanged", "L1.all-pairs", dequantize(steps=lambda q, z: z - q)),
    Fault("scales of the first group only", "L1.group-boundaries",
          dequantize(group_of_row=lambda k, size, groups: torch.zeros(k, dtype=torch.int64))),
    Fault("scales tiled instead of interleaved", "L1.group-boundaries",
          dequantize(group_of_row=lambda k, size, groups: torch.arange(k) % groups)),
    Fault("scales shifted by a row", "L1.group-boundaries",
          dequantize(group_of_row=lambda k, size, groups: (torch.arange(k) + 1) // size)),
    Fault("scales of the next group", "L1.group-boundaries", dequantize(scales=lambda s: s.roll(1, 0))),
    Fault("scales read as [N, G]", "L1.group-boundaries",
          dequantize(scales=lambda s: s.t().contiguous().reshape(s.shape))),
    Fault("tail group dropped", "L1.group-boundaries",
          dequantize(scales=lambda s: torch.cat([s[:-1], torch.zeros_like(s[-1:])]) if len(s) > 1 else s)),
    Fault("columns past 128 zero", "L1.every-column",
          dequantize(product=lambda d, s: torch.where(torch.arange(d.shape[1]) < 128, (d * s).half(), 0.0))),
    Fault("code * scale - zero * scale", "L1.random", {"dequantize": separate_products}),
    Fault("a detour through bfloat16", "L1.all-scales", dequantize(product=lambda d, s: (d * s).bfloat16().half())),
    Fault("scales rounded to bfloat16", "L1.random", dequantize(product=lambda d, s: (d * s.bfloat16()).half())),
    Fault("products cut off, not rounded", "L1.all-scales", dequantize(product=towards_zero)),
    Fault("subnormals flushed to zero", "L1.subnormals", dequantize(product=flushed)),
    Fault("overflow saturates", "L1.overflow", dequantize(product=lambda d, s: (d * s).clamp(-65504, 65504).half())),
    Fault("group_size -1 taken for 64", "L1.one-group", {"dequantize": first_64_rows}),
    Fault("float32 returned", "L1.shape-and-dtype", dequantize(product=lambda d, s: (d * s).half().float())),
    Fault("[N, K] returned", "L1.shape-and-dtype", dequantize(product=lambda d, s: (d * s).half().t())),
    Fault("strides of the scales ignored", "L1.strides",
          {"dequantize": lambda w, z, s, g: truth.dequantize(w, z, as_memory(s), g)}),
    Fault("missing groups filled by broadcasting", "L1.refuses-wrong-shapes", {"dequantize": short_scales}),
    Fault("scales doubled in place", "L1.inputs-unchanged", {"dequantize": changed_scales}),
]  # fmt: skip
