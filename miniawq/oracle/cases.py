"""What the checks feed a target: reproducible tensors, and Hypothesis strategies that shrink towards small plain ones.

Contents come from Python's `random.Random(seed)`, whose stream is the same on every platform, and are built from exact
operations only, so a seed means the same tensors everywhere. Drawn layers shrink to fewer groups, fewer columns and
fewer entries that are not the default one, which is what makes a failure small enough to paste.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from random import Random

import torch
from hypothesis import strategies as st
from torch import Tensor

import miniawq.oracle.truth as truth
from miniawq.oracle.contract import Limits

LARGEST_HALF_BITS = 0x7BFF  # float16 65504
ONE_BITS = 0x3C00  # float16 1.0
EVERYWHERE = 1 << 30  # more places than any case has


def codes(random: Random, *shape: int) -> Tensor:
    """Uniform codes 0..15, uint8."""
    return raw(random, shape, torch.uint8) & 15


def half_scales(random: Random, *shape: int) -> Tensor:
    """Positive float16 numbers, uniform over all bit patterns: every exponent is as likely, subnormals included."""
    bits = raw(random, shape, torch.int16).to(torch.int32) & 0xFFFF
    return ((bits + ONE_BITS - 1) % LARGEST_HALF_BITS + 1).to(torch.int16).view(torch.float16)


def usual_scales(random: Random, *shape: int) -> Tensor:
    """Scales as real checkpoints hold them: 2**-10 to 2**-6, every mantissa."""
    mantissa = raw(random, shape, torch.int16).to(torch.int32) & 0x0FFF
    return (mantissa + (5 << 10)).to(torch.int16).view(torch.float16)


def normal(random: Random, *shape: int) -> Tensor:
    """About standard normal float32 numbers: the sum of four uniform 16-bit integers, scaled exactly."""
    summed = sum(raw(random, shape, torch.int16).to(torch.float32) for _ in range(4))
    assert isinstance(summed, Tensor)
    return summed / 2**15 * 0.875


def raw(random: Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uniform bits as an integer tensor."""
    size = torch.Size(shape).numel()
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(random.randbytes(size * dtype.itemsize)), dtype=dtype).reshape(shape).clone()


def sparsely(random: Random, values: Tensor, count: int, default: Tensor) -> Tensor:
    """`values` at `count` random places, `default` elsewhere."""
    if count >= values.numel():
        return values
    result = default.expand_as(values).clone()
    for _ in range(count):
        place = random.randrange(values.numel())
        result.view(-1)[place] = values.reshape(-1)[place]
    return result


@dataclass(frozen=True)
class PackedCase:
    """A quantized layer, unpacked; the packed form follows from it."""

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    group_size: int

    @property
    def packed(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """The first arguments of `dequantize` and the last of `matmul`: qweight, qzeros, scales, group_size."""
        return truth.pack(self.codes), truth.pack(self.zeros), self.scales, self.group_size

    @cached_property
    def weight(self) -> Tensor:
        """The exact weight [K, N], float64."""
        return truth.real_weight(self.codes, self.zeros, self.scales, self.group_size)


LAYOUTS = ("contiguous", "transposed", "every second row", "every second column", "inside a wider one",
           "after an offset")  # fmt: skip


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values, lying in memory in another way; the gaps hold others. "repeated" repeats the first row."""
    gap = tensor + 1 if tensor.is_floating_point() else tensor ^ 5
    if layout == "repeated" and tensor.dim() > 1:
        return tensor[:1].expand_as(tensor)
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "every second row" and tensor.dim() > 1:
        return torch.stack([tensor, gap], -2).flatten(-3, -2)[..., ::2, :]
    if layout in ("every second row", "every second column", "transposed"):
        return torch.stack([tensor, gap], -1)[..., 0]
    if layout == "inside a wider one":
        return torch.cat([gap, tensor, gap[..., :1]], -1)[..., tensor.shape[-1] : 2 * tensor.shape[-1]]
    if layout == "after an offset":
        return torch.cat([gap.reshape(-1)[:1], tensor.reshape(-1)])[1:].view(tensor.shape)
    return tensor.contiguous()


def special(value: float | str, dtype: torch.dtype) -> Tensor:
    """A value that is not finite; "another NaN" and "a negative NaN" have bits that no arithmetic of a CPU makes."""
    if not isinstance(value, str):
        return torch.tensor(value, dtype=dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    bits = torch.tensor(float("nan"), dtype=dtype).view(integer)
    return (bits ^ 1 if value == "another NaN" else bits | -(2 ** (8 * dtype.itemsize - 1))).view(dtype)


def groups_of(k: int, group_size: int) -> int:
    """How many groups k input features make."""
    return 1 if group_size == -1 else k // group_size


def random_layer(
    seed: int, k: int, n: int, group_size: int, scales: Callable[..., Tensor] = usual_scales, count: int = EVERYWHERE
) -> PackedCase:
    """A layer with `count` random weights; the others have code and zero 8, so they are zero."""
    random = Random(seed)
    groups = groups_of(k, group_size)
    eight, one = torch.tensor(8, dtype=torch.uint8), torch.tensor(1.0, dtype=torch.float16)
    return PackedCase(
        sparsely(random, codes(random, k, n), count, eight),
        sparsely(random, codes(random, groups, n), count, eight),
        sparsely(random, scales(random, groups, n), count, one),
        group_size,
    )


def shapes(limits: Limits) -> st.SearchStrategy[tuple[int, int, int]]:
    """K, N and group_size that the target takes: up to three groups, up to three words."""
    sizes = st.sampled_from(sorted(limits.group_sizes, key=lambda size: 1 << 20 if size == -1 else size))
    return st.builds(shape, sizes, st.integers(1, 3), st.integers(1, 3), st.just(limits))


def shape(group_size: int, groups: int, columns: int, limits: Limits) -> tuple[int, int, int]:
    """The shape of so many groups and multiples of N, K rounded up to what the target takes."""
    wanted = groups * (32 if group_size == -1 else group_size)
    step = limits.multiple_of_k
    while wanted % step or (group_size != -1 and wanted % group_size):
        wanted += 1
    return wanted, columns * limits.multiple_of_n, group_size


def rounded_up(number: int, step: int) -> int:
    """The next multiple of a step, or the number itself."""
    return -(-number // step) * step


def smallest(limits: Limits, groups: int = 1, columns: int = 1) -> tuple[int, int, int]:
    """The shape of so many of the smallest groups that the target takes."""
    group_size = min((size for size in limits.group_sizes if size != -1), default=-1)
    return shape(group_size, groups, columns, limits)


def layers(scales: Callable[..., Tensor]) -> Callable[[Limits], st.SearchStrategy[PackedCase]]:
    """Random layers with scales of one kind."""

    def strategy(limits: Limits) -> st.SearchStrategy[PackedCase]:
        def build(seed: int, shape: tuple[int, int, int], count: int) -> PackedCase:
            return random_layer(seed, *shape, scales=scales, count=count)

        return st.builds(build, st.integers(0, 2**16), shapes(limits), st.sampled_from([1, 4, EVERYWHERE]))

    return strategy


def code_matrices(limits: Limits) -> st.SearchStrategy[Tensor]:
    """Codes uint8 [R, C], element by element."""

    size = 16 * limits.multiple_of_n

    def build(rows: int, multiples: int, data: bytes) -> Tensor:
        codes = torch.frombuffer(bytearray(data), dtype=torch.uint8)[: rows * multiples * limits.multiple_of_n]
        return codes.reshape(rows, -1) & 15

    return st.builds(build, st.integers(1, 4), st.integers(1, 4), st.binary(min_size=size, max_size=size))


def word_matrices(limits: Limits) -> st.SearchStrategy[Tensor]:
    """Words int32 [R, W] of any bits."""

    step = limits.multiple_of_n // 8

    def build(rows: int, words: list[int]) -> Tensor:
        return torch.tensor(words[: len(words) // step * step] * rows, dtype=torch.int32).reshape(rows, -1)

    word = st.integers(-(2**31), 2**31 - 1)
    return st.builds(build, st.integers(1, 3), st.lists(word, min_size=step, max_size=4 * step))


WEIGHT_KINDS = ("plain", "outliers", "on a grid", "tiny offset")


def random_weight(seed: int, n: int, k: int, kind: str = "plain", spread: int = 0) -> Tensor:
    """A weight float32 [N, K] times 2**spread."""
    random = Random(seed)
    weight = normal(random, n, k)
    if kind == "outliers":
        weight = torch.where(codes(random, n, k) == 0, weight * 32, weight)
    elif kind == "on a grid":
        weight = (weight * 4).round() / 4
    elif kind == "tiny offset":
        weight = weight / 16 + 1 / 64
    return weight * 2.0**spread


def weights(limits: Limits) -> st.SearchStrategy[tuple[Tensor, int]]:
    """A weight float32 [N, K] in which every group holds both signs, and a group size."""

    def build(shape: tuple[int, int, int], seed: int, kind: str, spread: int) -> tuple[Tensor, int]:
        k, n, group_size = shape
        weight = random_weight(seed, n, k, kind, spread)
        size = k if group_size == -1 else group_size
        # One weight of each sign makes the range of every group hold zero.
        weight[:, ::size] = weight[:, ::size].abs()
        weight[:, 1::size] = -weight[:, 1::size].abs()
        return weight, group_size

    return st.builds(
        build, shapes(limits), st.integers(0, 2**16), st.sampled_from(WEIGHT_KINDS), st.sampled_from([0, -6, -3, 4])
    )


def exact_scales(random: Random, *shape: int) -> Tensor:
    """Two adjacent powers of two."""
    return torch.where(codes(random, *shape) % 2 == 0, 2.0**-6, 2.0**-5).to(torch.float16)


def exact_rows(random: Random, rows: int, k: int, dtype: torch.dtype) -> Tensor:
    """Activations [rows, K], zeros but for a few +1 and -1: so few that every partial sum is representable.

    With scales of `exact_scales` a product is a whole number of units, at most 30. 64 of them stay below 2048, where
    float16 holds every integer; 8 stay below 256, where bfloat16 does. Any order and any format of the sum, scales
    before or after it, give the same bits.
    """
    x = torch.zeros(rows, k, dtype=dtype)
    for row in range(rows):
        for column in random.sample(range(k), min(k, 8 if dtype == torch.bfloat16 else 64)):
            x[row, column] = random.choice((-1.0, 1.0))
    return x
