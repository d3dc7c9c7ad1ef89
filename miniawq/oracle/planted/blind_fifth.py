"""A fifth blind set of 125 faults: L0 9, L1 17, L2 16, L3 38, L4 25, L5 20, as a reviewer's hidden list had them.

The rule of the draw. The kinds are those that the review of the oracle named: sizes, combinations (views, biases, two
factors at once), ranges, refusals, state, and for checkpoints and searches its list of their mistakes. Each level has
its share of every kind. A kind is written once as a mistake that authors of kernels and loaders make; which size, tile,
place, argument, dtype or mechanism it meets is drawn by `Sowing.draw` from lists of what kernels have, and stands in
the name. Nothing was drawn twice, and nothing was chosen for what a check might miss: the author had read the contract,
the definitions and the formats, but no check, of which the specification's lists of ids were all that was seen. Each
fault was seen to differ from the definition on an input made for it.

Here words, dequantization and rounding, and what the other files share.
"""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import miniawq.oracle.truth as truth
from miniawq.oracle.planted.grammar import Bred, Function, bred

TILES = (16, 32, 48, 64, 96, 128, 192, 256, 512)
ROWS = (2, 3, 6, 8, 12, 24, 48, 64, 96, 128, 200, 256, 512, 1000, 2048)
OUTPUTS = (8, 24, 64, 128, 320, 512, 1024, 2560, 4096, 5120, 11008)
INPUTS = (64, 128, 320, 1024, 2048, 4096, 5120, 8192, 11008)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def spread(size: int, group_size: int, inputs: int) -> Tensor:
    """The group of each of `inputs` inputs."""
    return torch.arange(inputs) // (size if group_size == -1 else group_size)


def read_at(t: Tensor, strides: tuple[int, ...], offset: Any) -> Tensor:
    """What lies in the memory of a tensor at other strides and another offset; past its end it begins again."""
    memory = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    place = torch.full(t.shape, offset)
    for dimension, (length, stride) in enumerate(zip(t.shape, strides, strict=True)):
        place = place + (torch.arange(length) * stride).reshape(-1, *[1] * (t.dim() - dimension - 1))
    return memory[place % max(1, len(memory))]


def dense_strides(t: Tensor) -> tuple[int, ...]:
    return torch.empty(t.shape, device="meta").stride()


# Mistakes with views: what a kernel makes of strides and an offset.
MISREADINGS: dict[str, Function] = {
    "its rows as if they lay close together": lambda t: read_at(
        t, (*dense_strides(t)[:-1], t.stride(-1)), t.storage_offset()
    ),
    "its columns with stride 1": lambda t: read_at(t, (*t.stride()[:-1], 1), t.storage_offset()),
    "from the start of its memory": lambda t: read_at(t, t.stride(), 0),
    "from an address that is a multiple of 8 elements": lambda t: read_at(
        t, t.stride(), t.storage_offset() // 8 * 8
    ),
    "as if it were contiguous": lambda t: read_at(t, dense_strides(t), t.storage_offset()),
}  # fmt: skip


# Mistakes with what is kept between calls.


def ring(function: str) -> Callable[[], Function]:
    def make() -> Function:
        kept: dict[Any, Tensor] = {}

        def reused(place: int, result: Tensor) -> Tensor:
            key = (place, result.shape, result.dtype)
            kept[key] = kept[key].copy_(result) if key in kept else result
            return kept[key]

        def wrong(*arguments: Any) -> Any:
            result = getattr(truth, function)(*arguments)
            whole = isinstance(result, Tensor)
            return reused(0, result) if whole else tuple(reused(place, part) for place, part in enumerate(result))

        return wrong

    return make


def by_address(function: str) -> Callable[[], Function]:
    """A result is kept for as long as the addresses and shapes of the arguments stay what they were."""

    def make() -> Function:
        last: list[Any] = [None, None]

        def wrong(*arguments: Any) -> Any:
            key = [(a.data_ptr(), a.shape) if isinstance(a, Tensor) else a for a in arguments]
            if last[0] != key:
                last[:] = [key, getattr(truth, function)(*arguments)]
            result = last[1]
            return result.clone() if isinstance(result, Tensor) else tuple(part.clone() for part in result)

        return wrong

    return make


def now_and_then(function: str, calls: int) -> Callable[[], Function]:
    """One call in so many has its last element next to the right one."""

    def make() -> Function:
        count = [0]

        def wrong(*arguments: Any) -> Any:
            result = getattr(truth, function)(*arguments)
            count[0] += 1
            first = result if isinstance(result, Tensor) else result[0]
            if count[0] % calls == 0 and first.numel():
                first.view(-1)[-1] = 0 if first.reshape(-1)[-1] != 0 else 1
            return result

        return wrong

    return make


def by_shape(function: str) -> Callable[[], Function]:
    """What was worked out for other contents of the same shape, whose first element is the same, is given again."""

    def make() -> Function:
        kept: dict[Any, Any] = {}

        def wrong(*arguments: Any) -> Any:
            tensors = [a for a in arguments if isinstance(a, Tensor)]
            rest = [a for a in arguments if not isinstance(a, Tensor)]
            key = (str([(t.shape, t.dtype, t.reshape(-1)[:1].tolist()) for t in tensors]), str(rest))
            if key not in kept:
                kept[key] = getattr(truth, function)(*arguments)
            result = kept[key]
            return result.clone() if isinstance(result, Tensor) else tuple(part.clone() for part in result)

        return wrong

    return make


def in_place(function: str, place: int, change: Callable[[Tensor], Any]) -> Callable[[], Function]:
    """An argument is changed after the result was worked out."""

    def make() -> Function:
        def wrong(*arguments: Any) -> Any:
            result = getattr(truth, function)(*arguments)
            for argument in arguments[place : place + 1]:
                change(argument)
            return result

        return wrong

    return make


CALLS = (20, 40, 60, 100, 150, 200)


class Sowing(list[Bred]):
    """The faults of a file, with the draw that chose them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.draw = random.Random(seed)

    def sow(self, function: str, kind: str, wrong: Function) -> None:
        self.append(bred(function, kind, "", "", wrong))

    def misread(self, function: str, argument: str, place: int) -> None:
        """One argument that is a view is misread in a way that is drawn; a bias has no rows."""
        how = self.draw.choice(list(MISREADINGS)[argument == "biases" :])

        def wrong(*arguments: Any) -> Any:
            changed = list(arguments)
            changed[place : place + 1] = [a if a is None else MISREADINGS[how](a) for a in changed[place : place + 1]]
            return getattr(truth, function)(*changed)

        self.sow(function, f"{argument} that are a view are read {how}", wrong)

    def forgetful(self, function: str, *also: tuple[str, Callable[[], Function]], count: int) -> None:
        """Mistakes of state, drawn without repetition from those of every function and those of this one."""
        calls = self.draw.choice(CALLS)
        choices = [
            ("the result lies in one buffer for each shape", ring(function)),
            ("the result is kept while addresses and shapes stay", by_address(function)),
            ("the result is kept for shapes and first elements", by_shape(function)),
            (f"one element is wrong once in {calls} calls", now_and_then(function, calls)),
            *also,
        ]
        for kind, make in self.draw.sample(choices, count):
            self.append(Bred(function, kind, "", "", make))


BLIND_FIFTH = Sowing(5)
DRAW, sow, misread, forgetful = BLIND_FIFTH.draw, BLIND_FIFTH.sow, BLIND_FIFTH.misread, BLIND_FIFTH.forgetful


def where(mask: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(mask, one.to(other.dtype), other)


# L0

NIBBLE_MISTAKES: dict[str, Function] = {
    "are 0": torch.zeros_like,
    "are those of the row before": lambda t: t.roll(1, 0),
    "have their bytes exchanged": lambda t: (t.to(torch.int64) << 16 & 0xFFFF0000 | t.to(torch.int64) >> 16 & 0xFFFF)
    .to(torch.int32) if t.dtype == torch.int32 else t.flip(-1),
}  # fmt: skip


def storage_sizes() -> None:
    rows, tile = DRAW.choice((200, 1000, 3000, 10000, 65535)), DRAW.choice((2, 4, 8, 16, 32))
    how = DRAW.choice(list(NIBBLE_MISTAKES))

    def past_rows(codes: Tensor) -> Tensor:
        words = truth.pack(codes)
        return where((torch.arange(len(words)) >= rows)[:, None], NIBBLE_MISTAKES[how](words), words)

    sow("pack", f"words past {rows} rows {how}", past_rows)
    other = DRAW.choice(list(NIBBLE_MISTAKES))

    def tail(words: Tensor) -> Tensor:
        codes = truth.unpack(words)
        whole = words.shape[1] // tile * tile * 8
        last = (torch.arange(codes.shape[1]) >= whole) & torch.tensor(words.shape[1] > tile)
        return where(last[None], NIBBLE_MISTAKES[other](codes), codes)

    sow("unpack", f"codes past the last whole {tile} words of a row {other}, where a row has more", tail)
    least_rows, least_words = DRAW.choice(ROWS), DRAW.choice((2, 8, 40, 128))

    def both(words: Tensor) -> Tensor:
        codes = truth.unpack(words)
        swapped = codes.unflatten(1, (-1, 2)).flip(-1).flatten(1) if codes.numel() else codes
        return swapped if len(words) > least_rows and words.shape[1] > least_words else codes

    sow("unpack", f"neighbours are exchanged past {least_rows} rows and {least_words} words together", both)


def storage_refusals() -> None:
    column, row = DRAW.randrange(8), DRAW.choice(ROWS)

    def masked(codes: Tensor) -> Tensor:
        seen = codes.clone()
        seen[row:, column::8] &= 15
        return truth.pack(seen)

    sow("pack", f"codes above 15 are cut to 4 bits in column {column} of a word past {row} rows", masked)
    rest = DRAW.choice((1, 2, 3, 4, 5, 6, 7))

    def filled(codes: Tensor) -> Tensor:
        short_by = -codes.shape[1] % 8
        return truth.pack(torch.nn.functional.pad(codes, (0, short_by)) if codes.shape[1] % 8 == rest else codes)

    sow("pack", f"a last word of {rest} codes is taken and filled with zeros", filled)


storage_sizes()
misread("pack", "codes", 0)
misread("unpack", "words", 0)
storage_refusals()
forgetful("pack", ("codes are made even in place", in_place("pack", 0, lambda t: t.bitwise_and_(14))), count=1)
forgetful("unpack", ("words are halved in place", in_place("unpack", 0, lambda t: t.bitwise_right_shift_(1))), count=1)


# L1


def dequantization_sizes() -> None:
    bits, tile = DRAW.choice((3, 4, 5, 6, 7)), DRAW.choice(TILES)

    def few_bits(qweight: Tensor, qzeros: Tensor, scales: Tensor, size: int) -> Tensor:
        right = truth.dequantize(qweight, qzeros, scales, size)
        group = torch.arange(len(scales)) % 2**bits
        return truth.dequantize(qweight, qzeros, scales[group], size) if right.numel() else right

    sow("dequantize", f"the number of a group has {bits} bits when scales are read", few_bits)

    def tail(qweight: Tensor, qzeros: Tensor, scales: Tensor, size: int) -> Tensor:
        right = truth.dequantize(qweight, qzeros, scales, size)
        n = scales.shape[1]
        other = truth.dequantize(qweight, qzeros.roll(1, 1), scales, size)
        return where((torch.arange(n) >= n // tile * tile)[None], other, right)

    sow("dequantize", f"zeros of outputs past the last whole tile of {tile} are those of 8 outputs before", tail)

    def odd(qweight: Tensor, qzeros: Tensor, scales: Tensor, size: int) -> Tensor:
        right = truth.dequantize(qweight, qzeros, scales, size)
        if len(scales) % 2 == 0 or len(scales) == 1:
            return right
        seen = qzeros.clone()
        seen[-1] = seen[-2]
        return truth.dequantize(qweight, seen, scales, size)

    sow("dequantize", "the last of an odd number of groups has the zeros of the one before", odd)
    size_of_group, outputs = DRAW.choice((32, 64, 128, -1)), DRAW.choice(OUTPUTS)

    def pair(qweight: Tensor, qzeros: Tensor, scales: Tensor, size: int) -> Tensor:
        right = truth.dequantize(qweight, qzeros, scales, size)
        if size != size_of_group:
            return right
        other = truth.dequantize(qweight, qzeros, scales.roll(1, 1), size)
        return where((torch.arange(right.shape[1]) >= outputs)[None], other, right)

    name = f"outputs past {outputs} in groups of {size_of_group} have the scales of the output before"
    sow("dequantize", name, pair)
    inputs = DRAW.choice(INPUTS)

    def wrapped(qweight: Tensor, qzeros: Tensor, scales: Tensor, size: int) -> Tensor:
        right = truth.dequantize(qweight, qzeros, scales, size)
        return right if size != -1 or len(right) <= inputs else right[torch.arange(len(right)) % inputs]

    sow("dequantize", f"rows past {inputs} of one group of all inputs are the first ones again", wrapped)


def dequantization_views() -> None:
    misread("dequantize", "scales", 2)
    misread("dequantize", "qzeros", 1)

    def shared(qweight: Tensor, qzeros: Tensor, scales: Tensor, size: int) -> Tensor:
        truth.dequantize(qweight, qzeros, scales, size)
        return truth.dequantize(qweight, read_at(qzeros, qweight.stride(), qzeros.storage_offset()), scales, size)

    sow("dequantize", "zeros are read with the strides of qweight", shared)


def dequantization_ranges() -> None:
    magnitude, place = DRAW.choice((256.0, 1024.0, 8192.0)), DRAW.randrange(2)

    def exact(qweight: Tensor, qzeros: Tensor, scales: Tensor, size: int) -> tuple[Tensor, Tensor]:
        right = truth.dequantize(qweight, qzeros, scales, size)
        return right, truth.real_weight(truth.unpack(qweight), truth.unpack(qzeros), scales, size)

    def toward_zero(*arguments: Any) -> Tensor:
        right, real = exact(*arguments)
        smaller = (right.view(torch.int16) - 1).view(torch.float16)
        too_far = right.double().abs() > real.abs()
        return where(too_far & (real.abs() > magnitude) & right.isfinite(), smaller, right)

    sow("dequantize", f"weights past {magnitude:g} are rounded toward zero", toward_zero)

    def ties_away(*arguments: Any) -> Tensor:
        right, real = exact(*arguments)
        larger = (right.view(torch.int16) + 1).view(torch.float16)
        is_tie = (larger.double() - real).abs() == (right.double() - real).abs()
        columns = torch.arange(right.shape[1]) % 2 == place
        return where(is_tie & columns & (right.double().abs() < real.abs()), larger, right)

    sow("dequantize", f"ties go away from zero in {('even', 'odd')[place]} outputs", ties_away)

    def flushed(*arguments: Any) -> Tensor:
        right, real = exact(*arguments)
        return where((real < 0) & (real.abs() < 2.0**-14), torch.zeros_like(right), right)

    sow("dequantize", "negative weights below 2**-14 are flushed to zero", flushed)

    def saturated(*arguments: Any) -> Tensor:
        right, real = exact(*arguments)
        return where(right.isinf() & real.isfinite(), right.clamp(-65504, 65504), right)

    sow("dequantize", "weights that overflow are the largest finite number", saturated)


def dequantization_refusals() -> None:
    longer, wider = DRAW.sample(("qzeros", "scales"), 2)

    def cut_rows(qweight: Tensor, qzeros: Tensor, scales: Tensor, size: int) -> Tensor:
        groups = 1 if size == -1 else len(qweight) // max(1, size)
        return truth.dequantize(
            qweight,
            qzeros[:groups] if longer == "qzeros" else qzeros,
            scales[:groups] if longer == "scales" else scales,
            size,
        )

    sow("dequantize", f"{longer} with more groups than the weight has are accepted", cut_rows)

    def cut_columns(qweight: Tensor, qzeros: Tensor, scales: Tensor, size: int) -> Tensor:
        words = qweight.shape[1]
        return truth.dequantize(
            qweight,
            qzeros[:, :words] if wider == "qzeros" else qzeros,
            scales[:, : 8 * words] if wider == "scales" else scales,
            size,
        )

    sow("dequantize", f"{wider} with more outputs than the weight has are accepted", cut_columns)

    def rest(qweight: Tensor, qzeros: Tensor, scales: Tensor, size: int) -> Tensor:
        if size < 1 or len(qweight) % size == 0 or len(scales) != -(-len(qweight) // size):
            return truth.dequantize(qweight, qzeros, scales, size)
        missing = -len(qweight) % size
        filled = torch.nn.functional.pad(qweight, (0, 0, 0, missing))
        return truth.dequantize(filled, qzeros, scales, size)[: len(qweight)]

    sow("dequantize", "a last group that is not whole is accepted, where scales have a row for it", rest)


dequantization_sizes()
dequantization_views()
dequantization_ranges()
dequantization_refusals()
forgetful(
    "dequantize",
    ("scales are halved in place and not restored", in_place("dequantize", 2, lambda t: t.mul_(0.5))),
    count=2,
)
