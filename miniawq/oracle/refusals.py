"""What must be refused, L0 to L3, wherever it stands and whatever the size: what is silently taken has failed."""

from collections.abc import Callable
from math import inf, nan

import torch
from torch import Tensor

import miniawq.oracle.cases as cases
from miniawq.oracle.cases import LAYOUTS, groups_of, laid_out, random_layer, random_weight
from miniawq.oracle.check import rule
from miniawq.oracle.combinations import codes_of, inputs_of, sizes_taken
from miniawq.oracle.contract import Limits
from miniawq.oracle.covering import Factors, Setting
from miniawq.oracle.multiplication import dtypes_taken
from miniawq.oracle.ranges import place
from miniawq.oracle.refused import (
    expect_refused_codes,
    expect_refused_factors,
    expect_refused_weight,
    expect_refused_words,
)
from miniawq.oracle.rounding import expect_bound
from miniawq.oracle.subject import Subject

PLACES = (0.0, 0.5, 1.0, 0.37, 0.81)  # shares of the way through a tensor


def large_codes(limits: Limits) -> Factors:
    """A code that is too large, somewhere."""
    return {
        "code": (16, 31, 127, 128, 240, 255),
        "place": PLACES,
        "rows": (1, 2, 65, 257),
        "words": tuple(limits.multiple_of_n // 8 * m for m in (1, 3, 17, 129)),
        "layout": LAYOUTS,
        "content": ("random", "top"),
    }


@rule("L0.pack.refuses-large-codes-anywhere", "pack", flags=("NoRangeCheck",), over=large_codes, arrays=3)
def refuses_large_codes_anywhere(target: Subject, setting: Setting) -> None:
    """One code above 15 anywhere in a matrix of any size, a view included, is a ValueError."""
    codes = codes_of(setting | {"layout": "contiguous"})
    codes.view(-1)[place(setting["place"], codes.numel())] = setting["code"]
    target.judge(expect_refused_codes, laid_out(codes, setting["layout"]), f"a code of {setting['code']}")


@rule("L0.pack.refuses-part-words-anywhere", "pack", flags=("NoShapeCheck",))
def refuses_part_words_anywhere(target: Subject) -> None:
    """No number of columns but a multiple of 8 is taken, in one row or many."""
    for rows in (1, 65, 300):
        for columns in (2, 4, 6, 15, 20, 68, 129, 1001, 4100):
            codes = torch.zeros(rows, columns, dtype=torch.uint8)
            target.judge(expect_refused_codes, codes, f"{columns} columns")


def taller(tensor: Tensor, rows: int = 1) -> Tensor:
    """So many rows more, or fewer."""
    return torch.cat([tensor, tensor[:1].expand(rows, -1)]) if rows > 0 else tensor[:rows]


def wider(tensor: Tensor, columns: int) -> Tensor:
    """So many columns more, or fewer."""
    return taller(tensor.t(), columns).t()


Words = tuple[Tensor, Tensor, Tensor]
MISFITS: dict[str, Callable[[Tensor, Tensor, Tensor], Words]] = {
    "a group of scales missing": lambda w, z, s: (w, z, taller(s, -1)),
    "a group of zeros missing": lambda w, z, s: (w, taller(z, -1), s),
    "a group of both missing": lambda w, z, s: (w, taller(z, -1), taller(s, -1)),
    "a group of scales too many": lambda w, z, s: (w, z, taller(s)),
    "a group of zeros too many": lambda w, z, s: (w, taller(z), s),
    "a group of both too many": lambda w, z, s: (w, taller(z), taller(s)),
    "scales too wide": lambda w, z, s: (w, z, wider(s, 8)),
    "scales too narrow": lambda w, z, s: (w, z, wider(s, -8)),
    "zeros too wide": lambda w, z, s: (w, wider(z, 1), s),
    "zeros too narrow": lambda w, z, s: (w, wider(z, -1), s),
    "scales and zeros too wide": lambda w, z, s: (w, wider(z, 1), wider(s, 8)),
    "scales and zeros too narrow": lambda w, z, s: (w, wider(z, -1), wider(s, -8)),
    "half a group of words missing": lambda w, z, s: (taller(w, -max(1, len(w) // len(s) // 2)), z, s),
    "half a group of words too many": lambda w, z, s: (taller(w, max(1, len(w) // len(s) // 2)), z, s),
}


def misfits(limits: Limits) -> Factors:
    """Parts of a layer that do not fit together, in layers of several sizes."""
    return {
        "misfit": tuple(MISFITS),
        "group size": sizes_taken(limits),
        "groups": (2, 1, 3, 9),
        "words": tuple(limits.multiple_of_n // 8 * m for m in (2, 3, 17, 65)),
    }


def fits_after_all(setting: Setting) -> bool:
    """One group of all inputs has no size that half a group could miss."""
    return setting["group size"] == -1 and setting["misfit"].startswith("half")


def misfit(setting: Setting) -> bool:
    return not fits_after_all(setting)


def misfitting(setting: Setting, limits: Limits) -> tuple[Tensor, Tensor, Tensor, int]:
    """Words and scales that do not fit, and the group size."""
    size = setting["group size"]
    layer = random_layer(40, inputs_of(setting, limits), setting["words"] * 8, size, cases.exact_scales, count=4)
    qweight, qzeros, scales, _ = layer.packed
    return (*MISFITS[setting["misfit"]](qweight, qzeros, scales), size)


@rule("L1.refuses-misfits", "dequantize", flags=("NoShapeCheck",), over=misfits, allowed=misfit, arrays=2)
def refuses_misfits(target: Subject, setting: Setting) -> None:
    """Words, zeros and scales of which one is too short, too long, too narrow or too wide raise, for any group size."""
    target.judge(expect_refused_words, *misfitting(setting, target.limits), setting["misfit"])


@rule("L3.refuses-misfits", "matmul", flags=("NoShapeCheck",), over=misfits, allowed=misfit, arrays=2)
def refuses_misfits_of_factors(target: Subject, setting: Setting) -> None:
    """The same in a product, whose x fits the words."""
    words = misfitting(setting, target.limits)
    x = torch.zeros(2, words[0].shape[0], dtype=dtypes_taken(target)[0])
    target.judge(expect_refused_factors, x, *words, None, setting["misfit"])


def wrong_vectors(limits: Limits) -> Factors:
    """An x or a bias of a wrong length."""
    return {
        "what": ("x", "bias"),
        "more": (-1, 1, -8, 8, 1000),
        "shape": ((2,), (), (1,), (65,), (2, 3)),
        "dtype": limits.dtypes,
        "group size": sizes_taken(limits),
        "groups": (2, 1, 5),
    }


@rule("L3.refuses-wrong-lengths", "matmul", flags=("NoShapeCheck",), over=wrong_vectors, arrays=3)
def refuses_wrong_lengths(target: Subject, setting: Setting) -> None:
    """An x with features too few or too many, or a bias with outputs too few or too many, raises in every form of x."""
    k, n = inputs_of(setting, target.limits), 2 * target.limits.multiple_of_n
    layer = random_layer(41, k, n, setting["group size"], cases.exact_scales, count=2)
    lengths = {"x": k, "bias": n}
    lengths[setting["what"]] = max(2, lengths[setting["what"]] + setting["more"])
    dtype = getattr(torch, setting["dtype"])
    x, bias = torch.zeros(*setting["shape"], lengths["x"], dtype=dtype), torch.zeros(lengths["bias"], dtype=dtype)
    why = f"{setting['what']} of length {lengths[setting['what']]}"
    target.judge(expect_refused_factors, x, *layer.packed, None if setting["what"] == "x" else bias, why)


def broken_weights(limits: Limits) -> Factors:
    """A weight that is not finite, somewhere."""
    return {
        "value": (nan, inf, -inf, "another NaN", "a negative NaN"),
        "place": PLACES,
        "dtype": ("float32", "float16", "bfloat16", "float64"),
        "outputs": tuple(limits.multiple_of_n * m for m in (1, 3, 33)),
        "groups": (1, 2, 9),
        "group size": sizes_taken(limits),
        "layout": LAYOUTS,
    }


@rule("L2.refuses-nan-anywhere", "quantize", flags=("NoRangeCheck",), over=broken_weights, arrays=3)
def refuses_nan_anywhere(target: Subject, setting: Setting) -> None:
    """One weight that is NaN or infinite, anywhere, in any dtype and any view, is a ValueError."""
    weight = random_weight(42, setting["outputs"], inputs_of(setting, target.limits))
    weight = weight.to(getattr(torch, setting["dtype"]))
    weight.view(-1)[place(setting["place"], weight.numel())] = cases.special(setting["value"], weight.dtype)
    why = f"a weight that is {setting['value']}"
    target.judge(expect_refused_weight, laid_out(weight, setting["layout"]), setting["group size"], why)


def broken_groups(limits: Limits) -> Factors:
    """Numbers of inputs that do not divide into groups."""
    return {
        "share": (0.5, 1.5, 1.25, 0.25, 4.5, 16.75),
        "group size": tuple(size for size in sizes_taken(limits) if size != -1),
        "outputs": tuple(limits.multiple_of_n * m for m in (1, 9)),
        "dtype": ("float32", "float16", "bfloat16", "float64"),
    }


@rule("L2.refuses-part-groups-anywhere", "quantize", flags=("NoShapeCheck",), over=broken_groups, arrays=3)
def refuses_part_groups_anywhere(target: Subject, setting: Setting) -> None:
    """No number of inputs but a multiple of the group size is taken: fewer than a group, one and a part, many."""
    k = int(setting["share"] * setting["group size"])
    weight = random_weight(43, setting["outputs"], k).to(getattr(torch, setting["dtype"]))
    why = f"{k} inputs in groups of {setting['group size']}"
    target.judge(expect_refused_weight, weight, setting["group size"], why)


def too_large(limits: Limits) -> Factors:
    """Groups whose scale is beyond float16."""
    return {
        "lowest": (0.0, -0.5, -1.0),  # the share of the range below 0
        "range": (1.001 * 65520 * 15, 2e6, 1e20),
        "group": (0, 1, 2),
        "output": (0.0, 0.5, 1.0),
        "group size": sizes_taken(limits),
    }


@rule("L2.refuses-large-weights-anywhere", "quantize", flags=("NoRangeCheck",), over=too_large)
def refuses_large_weights_anywhere(target: Subject, setting: Setting) -> None:
    """One group whose range is above 15 times 65520, of either sign or of both, is a ValueError."""
    weight, group_size = wide_range(setting, setting["range"], target.limits)
    target.judge(expect_refused_weight, weight, group_size, f"a scale of {setting['range'] / 15:.6g}")


@rule("L2.takes-large-weights", "quantize", flags=("HalfArithmetic",), over=too_large)
def takes_large_weights(target: Subject, setting: Setting) -> None:
    """A group whose range is 15 times 65504 has the scale 65504, and is not refused."""
    weight, group_size = wide_range(setting, 15 * 65504.0, target.limits)
    target.judge(expect_bound, weight, group_size)


def wide_range(setting: Setting, size: float, limits: Limits) -> tuple[Tensor, int]:
    """A weight with one group of that range."""
    k = inputs_of({"group size": setting["group size"], "groups": 3}, limits)
    weight = random_weight(44, 2 * limits.multiple_of_n, k)
    groups = groups_of(k, setting["group size"])
    first = min(setting["group"], groups - 1) * (k // groups)
    row = weight[place(setting["output"], len(weight))]
    row[first : first + k // groups] = 0
    row[first + 1], row[first + 2] = size * setting["lowest"], size * (1 + setting["lowest"])
    return weight, setting["group size"]
