"""How arguments lie in memory, all eight functions but the reader: one argument at a time, in every way, also square.

A kernel that loads 4 or 16 bytes at once wants an address and a pitch that are multiples of them, and reads the ones
before where they are not. One that takes strides from a neighbour, or that looks at the shape to tell how a tensor
lies, is right until a tensor is square.
"""

from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

import miniawq.oracle.cases as cases
import miniawq.oracle.truth as truth
from miniawq.oracle.cases import PackedCase, laid_out, random_layer, random_weight, rounded_up
from miniawq.oracle.check import rule
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
from miniawq.oracle.rounding import expect_bound
from miniawq.oracle.searches import expect_clip_searched, expect_searched
from miniawq.oracle.storage import expect_packed, expect_unpacked
from miniawq.oracle.subject import Subject

VIEWS = (
    "contiguous",
    "transposed",
    "1 element on",
    "2 elements on",
    "4 elements on",
    "rows 1 element longer",
    "rows 2 elements longer",
    "rows 4 elements longer",
    "rows 8 elements longer",
    "every second row",
    "every second column",
    "one row for all",
    "one column for all",
)
FEW = ("contiguous", "transposed", "1 element on", "rows 1 element longer", "every second column")  # for searches


def lying(tensor: Tensor, view: str) -> Tensor:
    """A matrix or a vector that lies so; the gaps hold other values. One row or column for all changes the values."""
    gap = tensor + 1 if tensor.is_floating_point() else tensor ^ 5
    if view.endswith("on"):
        return torch.cat([gap.flatten().repeat(4)[: int(view[0])], tensor.flatten()])[int(view[0]) :].view(tensor.shape)
    if view.endswith("longer"):
        longer = gap.repeat(*(1,) * (tensor.dim() - 1), 8)[..., : int(view[5])]
        return torch.cat([tensor, longer], -1)[..., : tensor.shape[-1]]
    if view == "one row for all":
        return tensor[:1].expand_as(tensor)
    if view == "one column for all":
        return tensor[..., :1].expand_as(tensor)
    return laid_out(tensor, view)


def matrices(limits: Limits) -> Factors:
    """Shapes of a matrix, and how it lies."""
    return {"view": VIEWS, "square": (False, True), "rows": (3, 8, 16, 32)}


def matrix_of(setting: Setting, step: int) -> tuple[int, int]:
    """Rows and columns, multiples of a step where it is square."""
    rows = rounded_up(setting["rows"], step) if setting["square"] else setting["rows"]
    return rows, rows if setting["square"] else 2 * step


@rule("L0.pack.views", "pack", over=matrices)
def views_of_codes(target: Subject, setting: Setting) -> None:
    """Codes at every small offset, in rows of every pitch, expanded, and square, are packed like the definition."""
    shape = matrix_of(setting, target.limits.multiple_of_n)
    target.judge(expect_packed, lying(cases.codes(seed_of(setting), *shape), setting["view"]))


@rule("L0.unpack.views", "unpack", over=matrices)
def views_of_words(target: Subject, setting: Setting) -> None:
    """Words at every small offset, in rows of every pitch, expanded, and square, are unpacked like the definition."""
    rows, columns = matrix_of(setting, target.limits.multiple_of_n // 8)
    words = truth.pack(cases.codes(seed_of(setting), rows, 8 * columns))
    target.judge(expect_unpacked, lying(words, setting["view"]))


def layer_views(*arguments: str) -> Callable[[Limits], Factors]:
    """A function from limits to the factors of a layer of which one argument lies in another way."""
    return lambda limits: {
        "lies": tuple((argument, view) for view in VIEWS for argument in arguments),
        "square": (False, True),
        "group size": sizes_taken(limits),
    }


def layer_in(setting: Setting, limits: Limits) -> PackedCase:
    """A layer in which the argument is square, where that can be."""
    step, size, argument = limits.multiple_of_n, setting["group size"], setting["lies"][0]
    groups, n = 3, 2 * step
    if setting["square"]:
        groups = {"qzeros": step // 8, "scales": step}.get(argument, 1)
    k = inputs_of({"group size": size, "groups": 1 if size == -1 else groups}, limits)
    if setting["square"]:
        n = rounded_up(8 * k, step) if argument == "qweight" else step
    return random_layer(seed_of(setting).randrange(1 << 16), k, n, size, cases.exact_scales)


def words_in(setting: Setting, limits: Limits) -> list[Tensor]:
    """qweight, qzeros and scales, one of them lying as the setting says."""
    names, parts = ("qweight", "qzeros", "scales"), layer_in(setting, limits).packed[:3]
    lies = dict([setting["lies"]])
    return [lying(part, lies.get(name, "contiguous")) for name, part in zip(names, parts, strict=True)]


@rule("L1.views", "dequantize", over=layer_views("qweight", "qzeros", "scales"))
def views_of_layers(target: Subject, setting: Setting) -> None:
    """Each part of a layer at every small offset, in rows of every pitch, expanded, and square."""
    target.judge(expect_decoded, *words_in(setting, target.limits), setting["group size"])


def weights_in_memory(limits: Limits) -> Factors:
    """How a weight lies."""
    sizes = sizes_taken(limits)
    return {"view": VIEWS, "square": (False, True), "dtype": ("float32", "float16", "bfloat16"), "group size": sizes}


@rule("L2.views", "quantize", flags=("HalfArithmetic",), over=weights_in_memory)
def views_of_weights(target: Subject, setting: Setting) -> None:
    """A weight at every small offset, in rows of every pitch, expanded, and a square one, keeps the bound."""
    k = inputs_of(setting | {"groups": 2}, target.limits)
    weight = random_weight(125, k if setting["square"] else 3 * target.limits.multiple_of_n, k)
    weight = lying(weight.to(getattr(torch, setting["dtype"])), setting["view"])
    target.judge(expect_bound, weight, setting["group size"])


def product_views(limits: Limits) -> Factors:
    """Factors of a product of which one argument lies in another way."""
    rows = tuple(rows for rows in (3, 1, 33) if rows <= limits.max_rows)
    return {"rows": rows, "dtype": limits.dtypes, **layer_views("x", "qweight", "qzeros", "scales", "bias")(limits)}


def exact_views(setting: Setting) -> bool:
    """Whether sums stay exact in half precision: not where every input of a row is the same number."""
    return bool(setting["lies"] != ("x", "one column for all"))


@rule("L3.views", "matmul", over=product_views, allowed=exact_views)
def views_of_factors(target: Subject, setting: Setting) -> None:
    """Each argument of a product at every small offset, in rows of every pitch, expanded, and square."""
    words, size, lies = words_in(setting, target.limits), setting["group size"], dict([setting["lies"]])
    (k, _), n = words[0].shape, words[2].shape[1]
    rows = k if setting["square"] and "x" in lies and k <= target.limits.max_rows else setting["rows"]
    x = exact_activations(Random(126), rows, k, size, getattr(torch, setting["dtype"]))
    bias = bias_of("contiguous", n, x.dtype)
    assert bias is not None
    x, bias = lying(x, lies.get("x", "contiguous")), lying(bias, lies.get("bias", "contiguous"))
    target.judge(expect_product, x, *words, size, bias)


def search_views(limits: Limits) -> Factors:
    """How the arguments of a search lie, and what is square: the weight, the activations, or the bounds."""
    lies = tuple((argument, view) for view in FEW for argument in ("weight", "x"))
    return {"lies": lies, "square": ("nothing", "weight", "x", "bounds")}


def search_in(setting: Setting, limits: Limits) -> tuple[Tensor, Tensor, int]:
    """A search with loud channels."""
    step, size, square = limits.multiple_of_n, sizes_taken(limits)[0], setting["square"]
    k = inputs_of({"group size": size, "groups": step if square == "bounds" else 2}, limits)
    random, n = seed_of(setting), rounded_up(k, step) if square == "weight" else step
    weight = random_weight(random.randrange(1 << 16), n, k) / 16
    x = cases.normal(random, k if square == "x" else 12, k) / 4
    x[:, random.sample(range(k), 2)] *= 32
    lies = dict([setting["lies"]])
    return lying(weight, lies.get("weight", "contiguous")), lying(x, lies.get("x", "contiguous")), size


@rule("L5.scales.views", "search_scales", flags=("HalfArithmetic",), over=search_views)
def views_of_scale_searches(target: Subject, setting: Setting) -> None:
    """Weight and activations at every small offset, in rows of every pitch, and square, are searched like any other."""
    target.judge(expect_searched, *search_in(setting, target.limits))


@rule("L5.clip.views", "search_clip", flags=("HalfArithmetic",), over=search_views)
def views_of_clip_searches(target: Subject, setting: Setting) -> None:
    """Weight and activations at every small offset, in rows of every pitch, and square, are searched like any other."""
    weight, x, group_size = search_in(setting, target.limits)
    silent = seed_of(setting).randrange(x.shape[1])  # a large weight there is to be clipped
    weight[:, silent], x[:, silent] = 2.0 * weight.abs().amax(), 0
    target.judge(expect_clip_searched, weight, x, group_size)
