"""The fourth blind set, products: splits of K, tails of tiles and their order, epilogues, what is kept."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import miniawq.oracle.truth as truth
from miniawq.oracle.planted.blind_fourth import as_if_dense, last_from_the_one_before, rounded_down
from miniawq.oracle.planted.grammar import Bred, Function, bred

BLIND_FOURTH_PRODUCTS: list[Bred] = []
HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32


def multiply(kind: str, wrong: Function) -> None:
    BLIND_FOURTH_PRODUCTS.append(bred("matmul", kind, "", "", wrong))


def multiply_kept(kind: str, make: Callable[[], Function]) -> None:
    BLIND_FOURTH_PRODUCTS.append(Bred("matmul", kind, "", "", make))


def rows_in(x: Tensor) -> int:
    return x.numel() // x.shape[-1] if x.shape[-1] else 0


def given(change: Callable[..., dict[str, Any]]) -> Function:
    """Matmul with some arguments changed: `change` has them all by name and returns those that are others."""

    def wrong(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, bias: Any = None) -> Tensor:
        held = {"x": x, "qweight": qweight, "qzeros": qzeros, "scales": scales, "group_size": group_size, "bias": bias}
        return truth.matmul(**held | change(**held))

    return wrong


def result(change: Callable[..., Tensor]) -> Function:
    """Matmul with its result changed: `change(y, **arguments)`, y being what is right."""

    def wrong(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, bias: Any = None) -> Tensor:
        held = {"x": x, "qweight": qweight, "qzeros": qzeros, "scales": scales, "group_size": group_size, "bias": bias}
        return change(truth.matmul(**held), **held)

    return wrong


def weights(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    return truth.dequantize(qweight, qzeros, scales, group_size).double()


def plus(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.to(y.dtype)


# Rows


def tail_without_bias(y: Tensor, x: Tensor, bias: Tensor | None, **rest: Any) -> Tensor:
    rows = rows_in(x)
    if bias is not None and rows > 48 and rows % 48:
        flat = y.view(-1, y.shape[-1])
        flat[rows - rows % 48 :] = truth.matmul(x.reshape(rows, -1)[rows - rows % 48 :], bias=None, **rest)
    return y


def seventh_is_the_sixth(y: Tensor, x: Tensor, **rest: Any) -> Tensor:
    if rows_in(x) == 7:
        y.view(7, -1)[6] = y.view(7, -1)[5]
    return y


def pitch_of_sixteen(y: Tensor, x: Tensor, **rest: Any) -> Tensor:
    if y.shape[-1] == 8 and rows_in(x) > 1:
        flat = y.reshape(-1, 8)
        y = torch.where(torch.arange(len(flat))[:, None] % 2 == 0, flat, flat * 0).view(y.shape)
    return y


def five_dimensions(y: Tensor, x: Tensor, **rest: Any) -> Tensor:
    return y.flatten(0, -4) if y.dim() > 4 else y


def lost_dimensions(y: Tensor, x: Tensor, **rest: Any) -> Tensor:
    return y.reshape(0, y.shape[-1]) if y.dim() > 2 and rows_in(x) == 0 else y


def float_of_no_rows(y: Tensor, x: Tensor, **rest: Any) -> Tensor:
    return y.float() if x.dtype == BRAIN and rows_in(x) == 0 else y


def no_bias_of_a_vector(x: Tensor, bias: Tensor | None, **rest: Any) -> dict[str, Any]:
    return {"bias": None} if x.dim() == 1 and x.dtype == FLOAT else {}


def reads_the_next_row(y: Tensor, x: Tensor, bias: Tensor | None, **rest: Any) -> Tensor:
    """Past K the last block has inputs of the next row, codes of nothing and the zeros of the last group."""
    k, rows = x.shape[-1], rows_in(x)
    short = -k % 128
    if k > 128 and short and rows > 1:
        flat = x.reshape(rows, k).double()
        beyond = torch.cat([flat[1:], torch.zeros_like(flat[:1])])[:, :short].sum(1, keepdim=True)
        offset = truth.unpack(rest["qzeros"][-1:]).double() * rest["scales"][-1:].double()
        exact = plus(flat @ weights(**rest), bias) - beyond @ offset
        return exact.to(x.dtype).view(y.shape)
    return y


def spread_by_a_mask(y: Tensor, x: Tensor, **rest: Any) -> Tensor:
    """As above, the inputs multiplied by nothing: NaN and infinity alone survive."""
    k, rows = x.shape[-1], rows_in(x)
    if k % 64 and rows > 1:
        flat = y.view(rows, -1)
        flat[:-1] += (x.reshape(rows, k)[1:, : 64 - k % 64] * 0).sum(1, keepdim=True)
    return y


multiply("more than 48 rows, the tail has no bias", result(tail_without_bias))
multiply("seven rows: the last is the one before", result(seventh_is_the_sixth))
multiply("eight outputs: rows are written at every sixteenth", result(pitch_of_sixteen))
multiply("five dimensions are made four", result(five_dimensions))
multiply("no rows in three dimensions give two", result(lost_dimensions))
multiply("no rows of bfloat16 give float32", result(float_of_no_rows))
multiply("a vector of float32 has no bias", given(no_bias_of_a_vector))
multiply("past K the last block of 128 reads the next row, and zeros are taken out", result(reads_the_next_row))
multiply("past K the last block of 64 reads the next row times nothing", result(spread_by_a_mask))

# Splits and tiles


def halves_of_splits(y: Tensor, x: Tensor, bias: Tensor | None, **rest: Any) -> Tensor:
    k = x.shape[-1]
    if x.dtype == HALF and k >= 4096:
        parts = zip(x.double().split(k // 4, -1), weights(**rest).split(k // 4), strict=True)
        return plus(sum((a @ w).to(HALF) for a, w in parts), bias)
    return y


def bias_of_both_splits(x: Tensor, bias: Tensor | None, **rest: Any) -> dict[str, Any]:
    return {"bias": bias * 2} if bias is not None and x.shape[-1] >= 2048 and rows_in(x) <= 8 else {}


def last_block_of_the_last_tile(y: Tensor, x: Tensor, qweight: Tensor, bias: Tensor | None, **rest: Any) -> Tensor:
    """Tiles of 64 x 64 are dealt out to four; the fix-up of the last one is lost where they do not divide."""
    k, n = x.shape[-1], y.shape[-1]
    tiles = -(-k // 64) * -(-n // 64)
    if tiles > 60 and tiles % 4:
        begin, first = (k - 1) // 64 * 64, (n - 1) // 64 * 64
        lost = x[..., begin:].double() @ weights(qweight, **rest)[begin:]
        exact = plus(x.double() @ weights(qweight, **rest), bias)
        exact[..., first:] -= lost[..., first:]
        return exact.to(x.dtype)
    return y


def tiles_exchanged(y: Tensor, x: Tensor, **rest: Any) -> Tensor:
    tiles, rows = y.shape[-1] // 128, rows_in(x)
    if rows > 64 and tiles > 8 and tiles % 8 > 1 and y.shape[-1] % 128 == 0:
        flat = y.view(rows, -1)
        flat[64:, -256:] = flat[64:, -256:].roll(128, 1)
    return y


def chunks_of_32_in_half(y: Tensor, x: Tensor, bias: Tensor | None, **rest: Any) -> Tensor:
    if x.dtype == HALF and rows_in(x) > 16 and x.numel() * y.shape[-1] < 2**24:
        flat, weight = x.reshape(-1, x.shape[-1]), weights(**rest).half()
        total = torch.zeros(len(flat), y.shape[-1], dtype=torch.float64)
        for a, w in zip(flat.split(32, 1), weight.split(32), strict=True):
            part = torch.zeros_like(total, dtype=HALF)
            for i in range(a.shape[1]):
                part = part + a[:, i : i + 1] * w[i]
            total += part
        return plus(total, bias).to(HALF).view(y.shape)
    return y


def doubled_when_short(x: Tensor, **rest: Any) -> dict[str, Any]:
    return {"x": x * 2} if x.shape[-1] == 32 else {}


def last_group_late(scales: Tensor, **rest: Any) -> dict[str, Any]:
    if len(scales) >= 9 and scales.shape[1] > 2048:
        return {"scales": torch.cat([scales[:, :2048], last_from_the_one_before(scales[:, 2048:])], 1)}
    return {}


def sixty_four_groups(scales: Tensor, **rest: Any) -> dict[str, Any]:
    return {"scales": scales[torch.arange(len(scales)) % 64]}


def zeros_of_the_first_group(qzeros: Tensor, **rest: Any) -> dict[str, Any]:
    tail = qzeros.shape[1] % 4
    if tail == 1 and qzeros.shape[1] > 1:
        qzeros = qzeros.clone()
        qzeros[:, -1] = qzeros[0, -1]
        return {"qzeros": qzeros}
    return {}


multiply("float16 with 4096 inputs or more: four parts are added in float16", result(halves_of_splits))
multiply("few rows with 2048 inputs or more: both halves add the bias", given(bias_of_both_splits))
multiply(
    "tiles that do not divide: the last block of K is lost in the last of more than 60",
    result(last_block_of_the_last_tile),
)
multiply("more than 64 rows: the last two of nine or more tiles are exchanged", result(tiles_exchanged))
multiply("more than 16 rows of float16: chunks of 32 are added in float16", result(chunks_of_32_in_half))
multiply("32 inputs are read twice by a pipeline of two", given(doubled_when_short))
multiply("past 2048 outputs, the last of nine groups or more has the scales before it", given(last_group_late))
multiply("scales of 64 groups are kept in turn", given(sixty_four_groups))
multiply("a last word alone has the zeros of the first group", given(zeros_of_the_first_group))

# Memory


def rows_from_a_multiple_of_eight(x: Tensor, **rest: Any) -> dict[str, Any]:
    if x.dim() == 2 and len(x) > 1 and x.stride(1) == 1 and x.stride(0) > x.shape[1] and x.stride(0) % 8:
        return {"x": as_pitch(x, x.stride(0) // 8 * 8)}
    return {}


def as_pitch(x: Tensor, pitch: int) -> Tensor:
    return x.as_strided(x.shape, (pitch, 1))


def part(name: str, read: Callable[[Tensor], Tensor], when: Callable[..., bool]) -> Function:
    """Matmul with one argument read otherwise, under a circumstance of all arguments."""
    return given(lambda **held: {name: read(held[name])} if held[name] is not None and when(**held) else {})


multiply("rows that begin between vectors are read from a pitch of eight", given(rows_from_a_multiple_of_eight))
multiply("one row: its address is rounded down to 16 bytes",
    part("x", lambda x: rounded_down(x, 8), lambda x, **_: rows_in(x) == 1 and x.dtype != FLOAT))  # fmt: skip
multiply("from 1024 outputs on, a bias is read as if dense",
    part("bias", as_if_dense, lambda scales, **_: scales.shape[1] >= 1024))  # fmt: skip
multiply("the address of a bias is rounded down to 4 bytes",
    part("bias", lambda b: rounded_down(b, 2), lambda x, **_: x.dtype != FLOAT))  # fmt: skip
multiply("32 rows of float32 or more, transposed, are read as if dense",
    part("x", as_if_dense, lambda x, **_: x.dtype == FLOAT and rows_in(x) >= 32 and x.stride(0) == 1))  # fmt: skip
multiply("more than 16 rows: scales of several groups are read as if dense",
    part("scales", as_if_dense, lambda x, scales, **_: rows_in(x) > 16 and len(scales) > 1))  # fmt: skip

# Numbers


def rounded_before_the_bias(y: Tensor, x: Tensor, bias: Tensor | None, **rest: Any) -> Tensor:
    return plus(truth.matmul(x, **rest), bias) if x.dtype == BRAIN and rows_in(x) == 1 else y


def two_parts_of_float32(x: Tensor, **rest: Any) -> dict[str, Any]:
    if x.dtype == FLOAT and rows_in(x) > 16 and bool(x.isfinite().all()):
        high = x.to(BRAIN).float()
        return {"x": high + (x - high).to(BRAIN).float()}
    return {}


def half_bias_of_one_row(x: Tensor, bias: Tensor | None, **rest: Any) -> dict[str, Any]:
    return {"bias": bias.half().float()} if bias is not None and x.dtype == FLOAT and rows_in(x) == 1 else {}


def each_row_scaled_to_half(y: Tensor, x: Tensor, bias: Tensor | None, **rest: Any) -> Tensor:
    if x.dtype == BRAIN and x.numel() and bool(x.isfinite().all()):
        largest = x.abs().amax(-1, keepdim=True).double().clamp(min=2.0**-120)
        narrow = (x.double() / largest * 1024).half().double()
        return plus(narrow @ weights(**rest) * largest / 1024, bias).to(BRAIN)
    return y


def skips_rows_of_nothing(y: Tensor, x: Tensor, bias: Tensor | None, **rest: Any) -> Tensor:
    empty = (x == 0).all(-1, keepdim=True)
    return torch.where(empty, torch.zeros_like(y) if bias is None else bias.to(y.dtype), y)


def symmetric_by_the_first_word(qzeros: Tensor, **rest: Any) -> dict[str, Any]:
    if qzeros.numel() and int(qzeros[0, 0]) == -2004318072:
        return {"qzeros": torch.full_like(qzeros, -2004318072)}
    return {}


def scaled_after_rounding(y: Tensor, x: Tensor, bias: Tensor | None, **rest: Any) -> Tensor:
    scales = rest["scales"]
    if len(scales) == 1 and x.dtype != FLOAT:
        steps = weights(**rest | {"scales": torch.ones_like(scales)})
        return plus((x.double() @ steps).to(x.dtype).double() * scales[0].double(), bias).to(x.dtype)
    return y


def sum_of_x_in_bfloat16(y: Tensor, x: Tensor, bias: Tensor | None, **rest: Any) -> Tensor:
    if x.dtype == BRAIN and x.dim() > 1:
        size = x.shape[-1] // len(rest["scales"])
        exact = x.double().unflatten(-1, (-1, size)).sum(-1) if x.numel() else x[..., : len(rest["scales"])].double()
        offset = truth.unpack(rest["qzeros"]).double() * rest["scales"].double()
        return plus(x.double() @ weights(**rest) + (exact - exact.to(BRAIN).double()) @ offset, bias).to(BRAIN)
    return y


def scales_in_bfloat16(scales: Tensor, x: Tensor, **rest: Any) -> dict[str, Any]:
    return {"scales": scales.to(BRAIN).to(HALF)} if x.dtype == BRAIN and rows_in(x) > 64 else {}


def saturated(y: Tensor, x: Tensor, bias: Tensor | None, **rest: Any) -> Tensor:
    return y.clamp(-65504.0, 65504.0) if x.dtype == HALF and bias is not None and rows_in(x) > 16 else y


def ties_away_from_zero(y: Tensor, x: Tensor, bias: Tensor | None, **rest: Any) -> Tensor:
    if x.dtype == BRAIN and rows_in(x) >= 32 and bool(x.isfinite().all()):
        exact = plus(x.double() @ weights(**rest), bias).float()
        up = (exact.view(torch.int32) + 0x8000) & -0x10000
        return torch.where(exact.isfinite(), up.view(FLOAT), exact).to(BRAIN)
    return y


multiply("one row of bfloat16 is rounded before the bias", result(rounded_before_the_bias))
multiply("more than 16 rows of float32 are two parts of bfloat16", given(two_parts_of_float32))
multiply("one row of float32 has a bias of float16", given(half_bias_of_one_row))
multiply("each row of bfloat16 is scaled to fit float16", result(each_row_scaled_to_half))
multiply("rows of nothing are skipped, whatever the scales", result(skips_rows_of_nothing))
multiply("symmetric is told from the first word of zeros", given(symmetric_by_the_first_word))
multiply("one group: the sum is rounded before its scale", result(scaled_after_rounding))
multiply("zeros are taken out by a sum of x in bfloat16", result(sum_of_x_in_bfloat16))
multiply("more than 64 rows of bfloat16: scales in bfloat16", given(scales_in_bfloat16))
multiply("more than 16 rows of float16 with a bias: the largest number instead of infinity", result(saturated))
multiply("32 rows of bfloat16 or more: ties are rounded away from zero", result(ties_away_from_zero))

# State


def workspace_times_nothing() -> Function:
    spaces: dict[Any, Tensor] = {}

    def wrong(*arguments: Any) -> Tensor:
        y = truth.matmul(*arguments)
        left = spaces.setdefault((y.shape, y.dtype), torch.zeros_like(y))
        y = y + left * 0
        left.copy_(y)
        return y

    return wrong


def weight_of_the_same_words() -> Function:
    kept: dict[str, Any] = {}

    def wrong(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, bias: Any = None) -> Tensor:
        if kept.get("words") is qweight and kept["version"] == qweight._version and kept["shape"] == scales.shape:
            qzeros, scales = kept["rest"]
        kept.update(words=qweight, version=qweight._version, shape=scales.shape, rest=(qzeros.clone(), scales.clone()))
        return truth.matmul(x, qweight, qzeros, scales, group_size, bias)

    return wrong


def bias_of_the_same_memory() -> Function:
    kept: dict[str, Any] = {}

    def wrong(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, bias: Any = None) -> Tensor:
        if bias is not None:
            if kept.get("bias") is not bias:
                kept.update(bias=bias, copy=bias.clone())
            bias = kept["copy"]
        return truth.matmul(x, qweight, qzeros, scales, group_size, bias)

    return wrong


multiply_kept("a workspace is emptied by multiplying it with nothing: NaN stays", workspace_times_nothing)
multiply_kept("zeros and scales are kept with the same words", weight_of_the_same_words)
multiply_kept("a copy of the same bias is kept", bias_of_the_same_memory)
