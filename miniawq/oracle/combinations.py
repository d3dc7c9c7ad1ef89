"""Sizes, views and kinds of content in all pairs: L0, L1 and L3 over covering arrays, compared bit for bit.

Every table lists the simplest level first. Sizes are below, at and past the tiles of kernels, group counts powers of
two and not; large ones come in thin slices, so that a case stays within `MOST` multiplications.
"""

from collections.abc import Callable
from random import Random
from zlib import crc32

import torch
from torch import Tensor

import miniawq.oracle.cases as cases
import miniawq.oracle.truth as truth
from miniawq.oracle.cases import LAYOUTS, PackedCase, laid_out
from miniawq.oracle.check import rule
from miniawq.oracle.contract import Limits
from miniawq.oracle.covering import Factors, Setting
from miniawq.oracle.multiplication import error_bound, product
from miniawq.oracle.storage import expect_packed, expect_unpacked
from miniawq.oracle.subject import Subject, expect_equal, expect_tensor, expect_within

MOST = 1 << 18  # multiplications of a case: a second for an implementation in pure Python
ROWS = (1, 2, 5, 17, 64, 65, 129, 257, 1000)
GROUPS = (1, 2, 3, 5, 9, 16, 112)
OUTPUTS = (8, 24, 72, 264, 1032, 28672)
INPUTS_OF_ALL = 40  # inputs for each of GROUPS where one group holds all: no multiple of 16


def seed_of(setting: Setting) -> Random:
    """A stream of random numbers of a setting's own."""
    return Random(crc32(repr(sorted(setting.items())).encode()))


def outputs(limits: Limits) -> tuple[int, ...]:
    """Numbers of outputs that the target takes."""
    step = limits.multiple_of_n
    return tuple(dict.fromkeys(cases.rounded_up(n, step) for n in OUTPUTS))


def sizes_taken(limits: Limits) -> tuple[int, ...]:
    """The target's group sizes, the smallest first, one group of all inputs last."""
    return tuple(sorted(limits.group_sizes, key=lambda size: 1 << 20 if size == -1 else size))


def inputs_of(setting: Setting, limits: Limits) -> int:
    """K of a setting: so many groups, rounded up to what the target takes."""
    size = setting["group size"]
    k = setting["groups"] * (INPUTS_OF_ALL if size == -1 else size)
    while k % limits.multiple_of_k:
        k += 1 if size == -1 else size
    return k


def weights_in(setting: Setting) -> int:
    """About how many weights a setting has."""
    size = setting["group size"]
    return setting["groups"] * (INPUTS_OF_ALL if size == -1 else size) * setting["outputs"]


def few_weights(setting: Setting) -> bool:
    """Whether a layer stays small; the widest ones may have one group of the smallest size."""
    most = 40 * OUTPUTS[-1] if setting["groups"] == 1 else MOST
    return weights_in(setting) <= most


def few_weights_alone(setting: Setting) -> bool:
    """As `few_weights`, with the room that a product does not leave."""
    return few_weights(setting) or weights_in(setting) <= 8 * MOST


def few_products(setting: Setting) -> bool:
    """Whether a product stays within `MOST`; the widest layer is asked for with one row."""
    fits = setting["rows"] <= 1 or setting["rows"] * weights_in(setting) <= MOST
    return fits and few_weights(setting) and (setting["form"] != "[K]" or setting["rows"] == 1)


# L0


def tables(limits: Limits) -> Factors:
    """Factors of a matrix of codes or words."""
    widths = tuple(dict.fromkeys(n // 8 for n in (*outputs(limits), *(limits.multiple_of_n * m for m in (2, 17, 321)))))
    return {
        "content": ("random", "top"),
        "rows": (*ROWS, 2000),
        "words": tuple(sorted(widths)),
        "layout": (*LAYOUTS, "repeated"),
    }


def small_table(setting: Setting) -> bool:
    return setting["rows"] * setting["words"] <= 1 << 18


def codes_of(setting: Setting) -> Tensor:
    """Codes [R, C] of a setting."""
    random, shape = seed_of(setting), (setting["rows"], setting["words"] * 8)
    codes = torch.full(shape, 15, dtype=torch.uint8) if setting["content"] == "top" else cases.codes(random, *shape)
    return laid_out(codes, setting["layout"])


@rule("L0.pack.combinations", "pack", over=tables, allowed=small_table, arrays=3)
def pack_combinations(target: Subject, setting: Setting) -> None:
    """Matrices of every size class, as views of every kind, are packed like the definition, and not written into."""
    target.judge(expect_packed, codes_of(setting))


@rule("L0.unpack.combinations", "unpack", over=tables, allowed=small_table, arrays=3)
def unpack_combinations(target: Subject, setting: Setting) -> None:
    """Words of every size class, as views of every kind, are unpacked like the definition, and not written into."""
    shape = (setting["rows"], setting["words"])
    top, random = torch.full(shape, -1, dtype=torch.int32), cases.raw(seed_of(setting), shape, torch.int32)
    target.judge(expect_unpacked, laid_out(top if setting["content"] == "top" else random, setting["layout"]))


# L1

KINDS = ("random", "all 0", "all 15")


def short_scales(random: Random, *shape: int) -> Tensor:
    """8 to 15 times 2**-9: no power of two, and a step of up to 15 times one has 8 bits, which every dtype holds."""
    return ((cases.codes(random, *shape) | 8).to(torch.float16)) * 2.0**-9


SCALES = {"ones": lambda random, *shape: torch.ones(shape, dtype=torch.float16), "powers": cases.exact_scales}
FINE_SCALES = {"usual": cases.usual_scales, "any": cases.half_scales}
SPECIAL_SCALES = (-1.0, -(2.0**-24), -65504.0, 0.0, -0.0, float("inf"), float("-inf"), float("nan"))


def special_scales(random: Random, *shape: int) -> Tensor:
    """Usual scales among which stand all of `SPECIAL_SCALES`."""
    scales = cases.usual_scales(random, *shape)
    for scale in SPECIAL_SCALES:
        scales.view(-1)[random.randrange(scales.numel())] = scale
    return scales


EVERY_KIND_OF_SCALES = SCALES | FINE_SCALES | {"special": special_scales, "short": short_scales}


def layers_over(scales: tuple[str, ...]) -> Callable[[Limits], Factors]:
    """A function from limits to the factors of a packed layer with scales of these kinds."""

    def over(limits: Limits) -> Factors:
        return {
            "codes": KINDS,
            "zeros": ("random", "all 8", "all 0", "all 15"),
            "scales": scales,
            "groups": (*GROUPS, 17, 33),
            "outputs": outputs(limits),
            "group size": sizes_taken(limits),
            "layout of qweight": LAYOUTS,
            "layout of qzeros": (*LAYOUTS, "repeated"),
            "layout of scales": (*LAYOUTS, "repeated"),
        }

    return over


def content(random: Random, kind: str, *shape: int) -> Tensor:
    """Codes or zeros of a kind."""
    if kind.startswith("all"):
        return torch.full(shape, int(kind[4:]), dtype=torch.uint8)
    return cases.codes(random, *shape)


def layer_of(setting: Setting, limits: Limits) -> PackedCase:
    """The unpacked layer of a setting."""
    random, k, n = seed_of(setting), inputs_of(setting, limits), setting["outputs"]
    groups = cases.groups_of(k, setting["group size"])
    return PackedCase(
        content(random, setting["codes"], k, n),
        content(random, setting["zeros"], groups, n),
        EVERY_KIND_OF_SCALES[setting["scales"]](random, groups, n),
        setting["group size"],
    )


def words_of_setting(setting: Setting, limits: Limits) -> tuple[Tensor, Tensor, Tensor, int]:
    """qweight, qzeros, scales and group_size, lying as the setting says."""
    qweight, qzeros, scales, group_size = layer_of(setting, limits).packed
    parts = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
    views = [laid_out(part, setting[f"layout of {name}"]) for name, part in parts.items()]
    return views[0], views[1], views[2], group_size


def expect_decoded(target: Subject, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> None:
    """The weight of the definition, from arguments that stay as they are."""
    expected = truth.dequantize(qweight, qzeros, scales, group_size)
    got = target.pure("dequantize", qweight, qzeros, scales, group_size)
    expect_equal(expect_tensor(got, torch.float16, tuple(expected.shape)), expected, "weight")


@rule("L1.combinations", "dequantize", over=layers_over(tuple(SCALES)), allowed=few_weights_alone)
def layer_combinations(target: Subject, setting: Setting) -> None:
    """Layers of every size class, as views of every kind, decode like the definition, and are not written into."""
    target.judge(expect_decoded, *words_of_setting(setting, target.limits))


@rule("L1.combinations-of-scales", "dequantize", flags=("TwoRoundings", "FlushedSubnormals"),
      over=layers_over(tuple(FINE_SCALES)), allowed=few_weights)  # fmt: skip
def scale_combinations(target: Subject, setting: Setting) -> None:
    """The same with scales of every mantissa and every exponent."""
    target.judge(expect_decoded, *words_of_setting(setting, target.limits))


@rule("L1.corners", "dequantize")
def layer_corners(target: Subject) -> None:
    """More than 256 outputs and more than 4096 inputs together."""
    size, step = sizes_taken(target.limits)[-2:][0], target.limits.multiple_of_n
    k = inputs_of({"group size": size, "groups": 112 if size == -1 else 4224 // size}, target.limits)
    layer = cases.random_layer(38, k, cases.rounded_up(264, step), size)
    target.judge(expect_decoded, *layer.packed)


# L3

FORMS = {
    "[T, K]": lambda rows, k: (rows, k),
    "[K]": lambda rows, k: (k,),
    "[1, T, K]": lambda rows, k: (1, rows, k),
    "[T, 1, K]": lambda rows, k: (rows, 1, k),
    "[T / n, n, K]": lambda rows, k: (rows // divisor(rows), divisor(rows), k),
    "[1, T / n, 1, n, K]": lambda rows, k: (1, rows // divisor(rows), 1, divisor(rows), k),
}
BIASES = ("none", "contiguous", "every second column", "after an offset", "repeated")


def divisor(rows: int) -> int:
    """A divisor of a number of rows, not 1 if there is one."""
    return next((n for n in (2, 3, 5, 17, 43, 257) if rows and rows % n == 0), 1)


def products(limits: Limits) -> Factors:
    """Factors of a product."""
    return {
        "rows": tuple(rows for rows in (*ROWS, 0) if rows <= limits.max_rows),
        "form": tuple(FORMS),
        "bias": BIASES,
        "dtype": limits.dtypes,
        "groups": GROUPS,
        "outputs": outputs(limits),
        "group size": sizes_taken(limits),
        "x": (*LAYOUTS, "repeated"),
        "layout of qweight": LAYOUTS,
        "layout of scales": LAYOUTS,
    }


def sums(limits: Limits) -> Factors:
    """Factors of a product with dense activations."""
    return {"scales": ("powers", "short", "usual"), **products(limits)}


Product = tuple[Tensor, Tensor, Tensor, Tensor, int, Tensor | None]


def product_of(setting: Setting, limits: Limits, dense: bool) -> Product:
    """The arguments of `matmul` under a setting, with dense activations or with those of exact products."""
    random, dtype = seed_of(setting), getattr(torch, setting["dtype"])
    setting = setting | {"codes": "random", "zeros": "random", "scales": setting.get("scales", "powers")}
    setting["layout of qzeros"] = setting["layout of scales"]
    words = words_of_setting(setting, limits)
    k, rows = words[0].shape[0], setting["rows"]
    if dense:
        x = cases.normal(random, rows, k).to(dtype)
    else:
        x = exact_activations(random, rows, k, setting["group size"], dtype)
    x = laid_out(x.reshape(FORMS[setting["form"]](rows, k)), setting["x"] if rows else "contiguous")
    return (x, *words, bias_of(setting["bias"], setting["outputs"], dtype))


def exact_activations(random: Random, rows: int, k: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """As `cases.exact_rows`, with the first and the last input and both sides of a boundary of groups never 0."""
    size, most = k if group_size == -1 else group_size, 8 if dtype == torch.bfloat16 else 64
    filled: dict[int, float] = {}
    for row in range(rows):
        first = random.randrange(0, k, size)
        always = {0, k - 1, first, first + size - 1}
        for place in [*always, *random.sample(range(k), min(k, most - len(always)))]:
            filled[row * k + place] = random.choice((-1.0, 1.0))
    x = torch.zeros(rows, k, dtype=dtype)
    x.view(-1)[list(filled)] = torch.tensor(list(filled.values()), dtype=dtype)
    return x


def bias_of(kind: str, n: int, dtype: torch.dtype) -> Tensor | None:
    """A bias whose sum with an exact product is exact."""
    if kind == "none":
        return None
    values = ((torch.arange(n) * 5 % 13 - 6) / 64).to(dtype)
    return values[5:6].expand(n) if kind == "repeated" else laid_out(values, kind)


def unpacked(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> PackedCase:
    """The layer that these words are."""
    return PackedCase(truth.unpack(qweight), truth.unpack(qzeros), scales, group_size)


def multiplied(target: Subject, x: Tensor, words: tuple[Tensor, Tensor, Tensor, int], bias: Tensor | None) -> Tensor:
    """The target's product, of the right dtype and shape, its arguments as they were."""
    arguments = (x, *words) if bias is None else (x, *words, bias)
    return expect_tensor(target.pure("matmul", *arguments), x.dtype, (*x.shape[:-1], words[2].shape[1]))


def expect_product(target: Subject, x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int,
                   bias: Tensor | None = None) -> None:  # fmt: skip
    """The real product, rounded once."""
    words = (qweight, qzeros, scales, group_size)
    expect_equal(multiplied(target, x, words, bias), product(x, unpacked(*words), bias).to(x.dtype), "y")


def expect_near_product(target: Subject, x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int,
                        bias: Tensor | None = None) -> None:  # fmt: skip
    """The product within the bound of `multiplication`; weights that need no rounding are given none."""
    words = (qweight, qzeros, scales, group_size)
    layer = unpacked(*words)
    got = multiplied(target, x, words, bias)
    held = all(torch.equal(layer.weight, layer.weight.to(dtype)) for dtype in (torch.float16, x.dtype))
    expect_within(got, product(x, layer, bias), error_bound(x, layer, bias, rounded=not held), "y")


@rule("L3.combinations", "matmul", over=products, allowed=few_products, arrays=2)
def product_combinations(target: Subject, setting: Setting) -> None:
    """Every size class, form of x, kind of bias, dtype and view together: exact products, no argument written into."""
    target.judge(expect_product, *product_of(setting, target.limits, dense=False))


@rule("L3.combinations-of-sums", "matmul", flags=("HalfAccumulation", "TwoRoundings", "TensorFloat32"),
      over=sums, allowed=few_products)  # fmt: skip
def sum_combinations(target: Subject, setting: Setting) -> None:
    """The same with dense activations, within the bound for float32 sums and one rounding of each weight.

    Scales of few bits make weights that every dtype holds, so nothing is allowed for their rounding.
    """
    target.judge(expect_near_product, *product_of(setting, target.limits, dense=True))


CORNERS = (
    (65, 8, 33),
    (5, 264, 33),
    (129, 1032, 1),
    (65, 264, 3),
    (1000, 264, 1),
    (67, 4480, 1),
)  # rows, outputs, groups


def corners_of(limits: Limits) -> Factors:
    """Products that are larger than a tile in two directions."""
    step = limits.multiple_of_n
    taken = tuple((rows, cases.rounded_up(n, step), groups) for rows, n, groups in CORNERS if rows <= limits.max_rows)
    return {
        "corner": taken,
        "x": ("contiguous", "repeated"),
        "bias": ("none", "contiguous"),
        "dtype": limits.dtypes[:2],
    }


@rule("L3.corners", "matmul", over=corners_of)
def product_corners(target: Subject, setting: Setting) -> None:
    """Many rows and many inputs, many outputs and many inputs, many rows and many outputs: exact products."""
    rows, n, groups = setting["corner"]
    size = sizes_taken(target.limits)[-1 if groups == 1 else -2 :][0]
    whole = {"rows": rows, "outputs": n, "groups": groups, "group size": size, "form": "[T, K]"}
    whole |= {"layout of qweight": "contiguous", "layout of scales": "contiguous"}
    target.judge(expect_product, *product_of(whole | setting, target.limits, dense=False))
