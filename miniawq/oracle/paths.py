"""What sends a call down a path of its own: more than 2**16 of anything, large products with a bias, batches that lie
otherwise in memory, arguments of other dtypes, a refused call before, activations whose sums half precision lacks.
"""

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

import miniawq.oracle.cases as cases
import miniawq.oracle.truth as truth
from miniawq.oracle.cases import PackedCase, random_layer, random_weight, rounded_up, smallest
from miniawq.oracle.check import Check, rule
from miniawq.oracle.combinations import (
    bias_of,
    exact_activations,
    expect_decoded,
    expect_product,
    inputs_of,
    seed_of,
    sizes_taken,
)
from miniawq.oracle.contract import Limits
from miniawq.oracle.covering import Factors, Setting
from miniawq.oracle.edges import long_layers
from miniawq.oracle.multiplication import dtypes_taken
from miniawq.oracle.rounding import expect_bound
from miniawq.oracle.search import TOKENS, expect_help, problem
from miniawq.oracle.searches import expect_clip_searched, expect_searched, search_problem
from miniawq.oracle.state import after
from miniawq.oracle.storage import expect_packed, expect_unpacked
from miniawq.oracle.subject import Broken, Subject, memory, same_bits

FAR = 65_544  # past 2**16


def tall_codes(target: Subject) -> tuple[Tensor, Tensor]:
    """Codes of that many rows, and codes of that many words in a row."""
    step = target.limits.multiple_of_n
    return cases.codes(Random(101), FAR, step), cases.codes(Random(102), 1, rounded_up(8 * FAR, step))


@rule("L0.pack.past-16-bits", "pack")
def many_codes(target: Subject) -> None:
    """More than 2**16 rows, and more than 2**16 words in a row, are packed whole."""
    for codes in tall_codes(target):
        target.judge(expect_packed, codes)


@rule("L0.unpack.past-16-bits", "unpack")
def many_words(target: Subject) -> None:
    """More than 2**16 rows, and more than 2**16 words in a row, are unpacked whole."""
    for codes in tall_codes(target):
        target.judge(expect_unpacked, truth.pack(codes))


def far_layers(target: Subject) -> list[PackedCase]:
    """A layer with more than 2**16 outputs, as heads have, and one with so many inputs."""
    step, size = target.limits.multiple_of_n, sizes_taken(target.limits)[0]
    few = inputs_of({"group size": size, "groups": 1}, target.limits)
    many = inputs_of({"group size": size, "groups": FAR // (40 if size == -1 else size) + 1}, target.limits)
    return [random_layer(103, few, rounded_up(FAR, step), size, cases.exact_scales),
            random_layer(104, many, step, size, cases.exact_scales)]  # fmt: skip


@rule("L1.past-16-bits", "dequantize")
def many_weights(target: Subject) -> None:
    """More than 2**16 outputs, and more than 2**16 inputs."""
    for layer in far_layers(target):
        target.judge(expect_decoded, *layer.packed)


@rule("L2.past-16-bits", "quantize", flags=("HalfArithmetic",))
def many_groups(target: Subject) -> None:
    """More than 2**16 outputs, and more than 2**16 inputs."""
    for layer in far_layers(target):
        k, n = layer.codes.shape
        target.judge(expect_bound, random_weight(105, n, k), layer.group_size)


@rule("L3.past-16-bits", "matmul")
def many_factors(target: Subject) -> None:
    """More than 2**16 outputs, and more than 2**16 inputs, with a bias."""
    for layer in far_layers(target):
        target.judge(expect_product, *product_with_bias(target, layer, 1, dtypes_taken(target)[0]))


def product_with_bias(target: Subject, layer: PackedCase, rows: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of an exact product."""
    k, n = layer.codes.shape
    x = exact_activations(Random(106 + rows), rows, k, layer.group_size, dtype)
    return (x, *layer.packed, bias_of("contiguous", n, dtype))


@rule("L3.long-with-bias", "matmul")
def long_factors_with_bias(target: Subject) -> None:
    """28,672 inputs, 33,024 outputs, or 1025 and 2049 rows, one row and few, with a bias, the dtypes in turn."""
    tall, wide = long_layers(target)
    few, dtypes = random_layer(107, *smallest(target.limits), cases.exact_scales), dtypes_taken(target)
    sizes = ((1, tall), (2, tall), (9, tall), (1, wide), (2, wide), (1025, few), (2049, few))
    for i, (rows, layer) in enumerate(sizes):
        if rows <= target.limits.max_rows:
            target.judge(expect_product, *product_with_bias(target, layer, rows, dtypes[i % len(dtypes)]))


BATCHES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "exchanged": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "from the second position on": lambda x: torch.cat([x[:, :1] + 1, x], 1)[:, 1:],
    "but the last position": lambda x: torch.cat([x, x[:, :1] + 1], 1)[:, :-1],
    "every second position": lambda x: torch.stack([x, x + 1], 2).flatten(1, 2)[:, ::2],
    "every second batch": lambda x: torch.stack([x, x + 1], 1).flatten(0, 1)[::2],
    "a third of wider features": lambda x: torch.cat([x + 1, x, x + 1], -1).chunk(3, -1)[1],
    "exchanged and wider": lambda x: torch.cat([x, x + 1], -1).transpose(0, 1).contiguous().transpose(0, 1)[
        ..., : x.shape[-1]],
    "one batch for all": lambda x: x[:1].expand_as(x),
    "one position for all": lambda x: x[:, :1].expand_as(x),
}  # fmt: skip
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "[B, L, K]": lambda x: x,
    "[1, B, L, K]": lambda x: x[None],
    "[B, L, 1, K]": lambda x: x[:, :, None],
    "[L, B, K]": lambda x: x.transpose(0, 1),
    "[L, K]": lambda x: x[-1],
    "[B, K]": lambda x: x[:, -1],
}


def batches(limits: Limits) -> Factors:
    """How a batch lies in memory."""
    return {
        "lies": tuple(BATCHES),
        "form": tuple(FORMS),
        "batch and positions": tuple(pair for pair in ((2, 3), (3, 1), (1, 5), (3, 33), (8, 2), (5, 17))
                                     if pair[0] * pair[1] <= limits.max_rows),
        "dtype": limits.dtypes,
        "bias": ("none", "contiguous"),
    }  # fmt: skip


@rule("L3.batches-in-memory", "matmul", over=batches)
def batches_in_memory(target: Subject, setting: Setting) -> None:
    """Batches with dimensions exchanged, positions left out, or features shared with others: no stride is assumed."""
    layer, dtype = random_layer(108, *smallest(target.limits, 2, 3), cases.exact_scales), setting["dtype"]
    (batch, positions), (k, n) = setting["batch and positions"], layer.codes.shape
    dtype = getattr(torch, dtype)
    x = exact_activations(seed_of(setting), batch * positions, k, layer.group_size, dtype)
    x = FORMS[setting["form"]](BATCHES[setting["lies"]](x.reshape(batch, positions, k)))
    target.judge(expect_product, x, *layer.packed, bias_of(setting["bias"], n, dtype))


# Arguments of other dtypes are refused or taken, but never written into.

Arguments = tuple[Any, ...]


def codes_of_dtypes(target: Subject) -> list[Arguments]:
    codes = cases.codes(Random(109), 3, 2 * target.limits.multiple_of_n)
    dtypes = (torch.int8, torch.int16, torch.int32, torch.int64, torch.float32)
    return [(codes.to(dtype),) for dtype in dtypes]


def words_of_dtypes(target: Subject) -> list[Arguments]:
    (codes, *_), dtypes = codes_of_dtypes(target)[-1], (torch.int64, torch.float64)
    return [(truth.pack(codes.to(torch.uint8)).to(dtype),) for dtype in dtypes]


def layers_of_dtypes(target: Subject) -> list[Arguments]:
    qweight, qzeros, scales, size = random_layer(110, *smallest(target.limits, 2, 2), cases.exact_scales).packed
    wider = [(qweight.to(dtype), qzeros.to(dtype), scales, size) for dtype in (torch.int64, torch.float64)]
    return [*wider, *((qweight, qzeros, scales.to(d), size) for d in (torch.bfloat16, torch.float32, torch.float64))]


def weights_of_dtypes(target: Subject) -> list[Arguments]:
    k, n, group_size = smallest(target.limits, 2)
    weight = random_weight(111, n, k)
    return [((weight * 8).to(dtype), group_size) for dtype in (torch.int8, torch.int32, torch.int64, torch.float64)]


def factors_of_dtypes(target: Subject) -> list[Arguments]:
    found: list[Arguments] = []
    for words in layers_of_dtypes(target):
        for dtype in (torch.float64, *dtypes_taken(target)):
            x = exact_activations(Random(112), 2, len(words[0]), words[3], dtype)
            found += [(x, *words, torch.ones(words[2].shape[1], dtype=d)) for d in (torch.float64, dtype)]
    return found


def expect_unwritten(target: Subject, function: str, *arguments: Any) -> None:
    """A result or a refusal, and every argument with its bits."""
    before = [memory(a).clone() if isinstance(a, Tensor) else None for a in arguments]
    target.unless_refused(function, *arguments)
    for old, new in zip(before, arguments, strict=True):
        if old is not None and not same_bits(old, memory(new)):
            raise Broken("the arguments as they were", f"{function} changed its {old.dtype} argument")


def unwritten(id: str, function: str, make: Callable[[Subject], list[Arguments]]) -> Check:
    """The check of one function."""

    def body(target: Subject) -> None:
        for arguments in make(target):
            target.judge(expect_unwritten, function, *arguments)

    body.__doc__ = f"Arguments of {function} of other dtypes are refused or taken, and never written into."
    return rule(id, function)(body)


# A refused call leaves nothing behind.


def wrong_then_right(target: Subject, function: str) -> tuple[Arguments, Arguments, Callable[..., None]]:
    """Arguments to refuse, arguments to take, and how the result is judged."""
    layer = random_layer(113, *smallest(target.limits, 2, 2), cases.exact_scales)
    words, dtype = layer.packed, dtypes_taken(target)[0]
    if function == "pack":
        return (layer.codes[:3] + 16,), (layer.codes[:3],), expect_packed
    if function == "dequantize":
        return (words[0], words[1][:-1], *words[2:]), words, expect_decoded
    if function == "quantize":
        k, n, group_size = smallest(target.limits)
        weight, broken = random_weight(114, n, k), torch.zeros(n, k)
        broken[1, 2] = float("nan")
        return (broken, group_size), (weight, group_size), expect_bound
    right = product_with_bias(target, layer, 3, dtype)
    return (right[0][:, :-1], *right[1:]), right, expect_product


def after_refusals(id: str, function: str) -> Check:
    """The check of one function."""

    def body(target: Subject) -> None:
        wrong, right, judgement = wrong_then_right(target, function)
        for _ in range(3):
            target.unless_refused(function, *wrong)
            try:
                with after(target, target.last):
                    judgement(target, *right)
            except Broken as broken:
                broken.expected += ", after a call that was refused"
                raise

    body.__doc__ = f"A call of {function} that was refused changes no result of the next one."
    return rule(id, function)(body)


# Searches


def half_problem(target: Subject, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """600 tokens of up to 30,000: what a channel sums to is beyond float16, its mean is not."""
    weight, x, group_size = problem(target.limits, seed, groups=1)
    return weight, (x * 1000).clamp(-30_000, 30_000).to(dtype).repeat(-(-600 // TOKENS), 1)[:600], group_size


@rule("L5.scales.large-sums", "search_scales")
def large_sums(target: Subject) -> None:
    """600 large activations in every dtype are searched like any other: no sum overflows."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        target.judge(expect_help, *half_problem(target, 115, dtype))


def silent_outlier(target: Subject, seed: int) -> tuple[Tensor, Tensor, int]:
    """A large weight on a channel that is nearly silent."""
    weight, x, group_size = problem(target.limits, seed, outliers=0)
    weight[:, 5] = 2.0 * weight.abs().amax()
    x[:, 5] /= 1024
    return weight, x, group_size


@rule("L5.clip.extreme-activations", "search_clip")
def extreme_activations_to_clip(target: Subject) -> None:
    """Activations of 1e-6, 1e3 and 1e6 are clipped for like any other: no loss is too small or too large to compare."""
    weight, x, group_size = silent_outlier(target, 116)
    for size in (1e-6, 1e3, 1e6):
        target.judge(expect_clip_searched, weight, x * size, group_size)


def tiles(limits: Limits) -> Factors:
    """Inputs that fill whole tiles of 128, whatever the groups."""
    return {"kind": ("on the grid", "loud channels", "silent outliers"), "groups": (4, 8),
            "group size": sizes_taken(limits)}  # fmt: skip


def tiled_problem(setting: Setting, limits: Limits) -> tuple[Tensor, Tensor, int]:
    whole = {"outputs": limits.multiple_of_n, "tokens": 12, "dtype": "float32"}
    whole |= {"layout of weight": "contiguous", "layout of x": "contiguous"}
    return search_problem(setting | whole, limits)


@rule("L5.scales.whole-tiles", "search_scales", flags=("HalfArithmetic",), over=tiles)
def tiled_scale_searches(target: Subject, setting: Setting) -> None:
    """Four and eight groups are rounded in groups of their own size, though they fill whole tiles of 128."""
    target.judge(expect_searched, *tiled_problem(setting, target.limits))


@rule("L5.clip.whole-tiles", "search_clip", flags=("HalfArithmetic",), over=tiles)
def tiled_clip_searches(target: Subject, setting: Setting) -> None:
    """Four and eight groups are rounded in groups of their own size, though they fill whole tiles of 128."""
    target.judge(expect_clip_searched, *tiled_problem(setting, target.limits))


CHECKS: list[Check] = [
    many_codes,
    many_words,
    many_weights,
    many_groups,
    many_factors,
    long_factors_with_bias,
    batches_in_memory,
    unwritten("L0.pack.other-dtypes-unchanged", "pack", codes_of_dtypes),
    unwritten("L0.unpack.other-dtypes-unchanged", "unpack", words_of_dtypes),
    unwritten("L1.other-dtypes-unchanged", "dequantize", layers_of_dtypes),
    unwritten("L2.other-dtypes-unchanged", "quantize", weights_of_dtypes),
    unwritten("L3.other-dtypes-unchanged", "matmul", factors_of_dtypes),
    after_refusals("L0.pack.after-refusals", "pack"),
    after_refusals("L1.after-refusals", "dequantize"),
    after_refusals("L2.after-refusals", "quantize"),
    after_refusals("L3.after-refusals", "matmul"),
    large_sums,
    extreme_activations_to_clip,
    tiled_scale_searches,
    tiled_clip_searches,
]
