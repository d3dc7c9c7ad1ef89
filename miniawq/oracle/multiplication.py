"""L3, multiplication: exact vectors that forgive nothing, and a derived bound for random ones.

Exact vectors (`cases.exact_rows`) make every partial sum representable in the format of x, so any correct order,
split, tile and accumulator gives the same bits, a float16 accumulator included. They find wrong weights, rows, groups
and tiles.

Random vectors find wrong precision. A weight may be rounded to the dtype of x, w (1 + a) with |a| <= u_w, and by
2**-25 more where it is subnormal. Sums are in float32: at most K products, K additions and 8 more operations on their
results, of terms whose sizes add up to S' = sum |x| (code + zero) scale, because the zero may be taken out of the sum:
scale (sum code x - zero sum x). Terms of the weight itself add up to S = sum |x| |w|. The result is rounded to its
dtype, once before and once after the bias. With g = (K + 8) 2**-24 / (1 - (K + 8) 2**-24):

    E = u_w S + (1 + u_w) g S' + (1 + g) 2**-25 sum |x|        |y - y*| <= E + u_y (|y*| + E) + 2**-25, per rounding

u_y is 2**-11 for float16, 2**-8 for bfloat16 and 2**-24 for float32; u_w is 2**-11, the rounding of `dequantize`, and
for bfloat16 (1 + 2**-8) (1 + 2**-11) - 1, a second one. Adding in float16 exceeds the bound, and so do a zero off by
one and a rounding to bfloat16 on the way (`planted.numbers`). The worst case of a float16 accumulator, K / 2048,
would accept a zero off by one, so it is not offered: such kernels fail `L3.long-sums` with the flag HalfAccumulation
and are held by the exact vectors.
"""

from random import Random

import torch
from hypothesis import strategies as st
from torch import Tensor

import miniawq.oracle.cases as cases
import miniawq.oracle.truth as truth
from miniawq.oracle.cases import EVERYWHERE, PackedCase, groups_of, shape, smallest
from miniawq.oracle.check import rule
from miniawq.oracle.contract import Limits
from miniawq.oracle.refused import expect_refused_factors
from miniawq.oracle.subject import Broken, Lacking, Subject, expect_equal, expect_within, name_of

UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
WEIGHT_UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8 + 2.0**-11 + 2.0**-19, torch.float32: 2.0**-11}
SUBNORMAL = 2.0**-25  # half the distance of subnormal float16 numbers


def product_of_target(target: Subject, x: Tensor, layer: PackedCase, bias: Tensor | None = None) -> Tensor:
    """The target's product, of the right dtype and shape."""
    arguments = (x, *layer.packed) if bias is None else (x, *layer.packed, bias)
    return target.tensor("matmul", arguments, x.dtype, (*x.shape[:-1], layer.codes.shape[1]))


def product(x: Tensor, layer: PackedCase, bias: Tensor | None = None) -> Tensor:
    """The real product, float64."""
    y = x.to(torch.float64) @ layer.weight
    return y if bias is None else y + bias.to(torch.float64)


def expect_exact_product(target: Subject, x: Tensor, layer: PackedCase, bias: Tensor | None = None) -> None:
    """The target's product has the bits of the real one."""
    expect_equal(product_of_target(target, x, layer, bias), product(x, layer, bias).to(x.dtype), "y")


def error_bound(x: Tensor, layer: PackedCase, bias: Tensor | None = None, rounded: bool = True) -> Tensor:
    """The bound of this module's docstring, float64, for every output; without u_w where no weight needs rounding."""
    u, u_w, operations = UNIT[x.dtype], WEIGHT_UNIT[x.dtype] * rounded, (x.shape[-1] + 8) * 2.0**-24
    grown = operations / (1 - operations)
    size = x.to(torch.float64).abs()
    repeats = len(layer.codes) // len(layer.zeros)
    scales, zeros = (t.to(torch.float64).repeat_interleave(repeats, 0) for t in (layer.scales, layer.zeros))
    error = u_w * (size @ layer.weight.abs()) + (1 + u_w) * grown * (size @ ((layer.codes + zeros) * scales))
    error = error + (1 + grown) * SUBNORMAL * size.sum(-1, keepdim=True)
    for y in (product(x, layer),) if bias is None else (product(x, layer), product(x, layer, bias)):
        error = error + u * (y.abs() + error) + SUBNORMAL
    return error


def dtypes_taken(target: Subject) -> list[torch.dtype]:
    """The dtypes of x that the target takes."""
    return [getattr(torch, name) for name in target.limits.dtypes]


def first_dtype(target: Subject) -> torch.dtype:
    """float16 where the target takes it."""
    return dtypes_taken(target)[0]


def exact_layer(
    target: Subject,
    seed: int,
    groups: int = 2,
    columns: int = 2,
    group_size: int | None = None,
    count: int = EVERYWHERE,
) -> PackedCase:
    """A layer whose scales are two adjacent powers of two."""
    if group_size is None:
        made = smallest(target.limits, groups, columns)
    else:
        made = shape(group_size, groups, columns, target.limits)
    return cases.random_layer(seed, *made, cases.exact_scales, count)


def exact_products(limits: Limits) -> st.SearchStrategy[tuple[Tensor, PackedCase]]:
    """Rows and layers for which every correct product has the same bits."""

    def build(dtype: str, rows: int, layer: PackedCase, seed: int) -> tuple[Tensor, PackedCase]:
        return cases.exact_rows(Random(seed), rows, layer.codes.shape[0], getattr(torch, dtype)), layer

    return st.builds(
        build,
        st.sampled_from(limits.dtypes),
        st.integers(1, 5),
        cases.layers(cases.exact_scales)(limits),
        st.integers(0, 2**16),
    )


@rule("L3.shape-and-dtype", "matmul")
def shape_and_dtype_of_product(target: Subject) -> None:
    """The result is [..., N] in the dtype of x, for each of float16, bfloat16 and float32."""
    layer = exact_layer(target, 1)
    for dtype in dtypes_taken(target):
        product_of_target(target, cases.exact_rows(Random(1), 2, layer.codes.shape[0], dtype), layer)


@rule("L3.exact", "matmul", drawn=exact_products)
def exact(target: Subject, drawn: tuple[Tensor, PackedCase]) -> None:
    """Where every partial sum is representable the product is exact, in every dtype and for every group size."""
    target.judge(expect_exact_product, *drawn)


@rule("L3.one-hot", "matmul")
def one_hot(target: Subject) -> None:
    """A row with a single 1 reads one row of the weight, for every input feature."""
    layer = exact_layer(target, 2, groups=3)
    k = layer.codes.shape[0]
    for dtype in dtypes_taken(target):
        for start in range(0, k, min(target.limits.max_rows, 64)):
            rows = torch.eye(k, dtype=dtype)[start : start + min(target.limits.max_rows, 64)]
            target.judge(expect_exact_product, rows, layer)


@rule("L3.group-sizes", "matmul")
def group_sizes(target: Subject) -> None:
    """Every group size the target takes, -1 included, each group with its own scale and zero, the last one too."""
    for group_size in target.limits.group_sizes:
        layer = exact_layer(target, 3, groups=5, group_size=group_size)
        k = layer.codes.shape[0]
        x = torch.zeros(3, k, dtype=first_dtype(target))
        x[0, :4], x[1, k // 2 : k // 2 + 4], x[2, -4:] = 1, -1, 1
        target.judge(expect_exact_product, x, layer)


@rule("L3.rows", "matmul")
def rows(target: Subject) -> None:
    """1 to 64 rows: below, at and past every usual tile."""
    layer = exact_layer(target, 4)
    for count in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64):
        if count <= target.limits.max_rows:
            target.judge(
                expect_exact_product,
                cases.exact_rows(Random(count), count, layer.codes.shape[0], first_dtype(target)),
                layer,
            )


@rule("L3.no-rows", "matmul")
def no_rows(target: Subject) -> None:
    """No rows give no rows."""
    layer = exact_layer(target, 5)
    product_of_target(target, torch.zeros(0, layer.codes.shape[0], dtype=first_dtype(target)), layer)


@rule("L3.past-tiles", "matmul")
def past_tiles(target: Subject) -> None:
    """Output and input features that no power-of-two tile divides: N of 136 and 264, K of 160 and 416."""
    for groups, columns in ((5, 17), (13, 33), (1, 1)):
        layer = exact_layer(target, groups, groups=groups, columns=columns)
        target.judge(
            expect_exact_product, cases.exact_rows(Random(6), 5, layer.codes.shape[0], first_dtype(target)), layer
        )


@rule("L3.leading-dimensions", "matmul")
def leading_dimensions(target: Subject) -> None:
    """x may have no leading dimension, one, or several."""
    layer = exact_layer(target, 7)
    k = layer.codes.shape[0]
    x = cases.exact_rows(Random(7), 6, k, first_dtype(target))
    for view in (x[0], x[:1], x.reshape(2, 3, k), x.reshape(1, 6, 1, k), x.reshape(3, 1, 2, k)):
        target.judge(expect_exact_product, view, layer)


@rule("L3.strides", "matmul")
def strides_of_factors(target: Subject) -> None:
    """x, words and scales may be transposed or sliced views."""
    layer = exact_layer(target, 8)
    x = cases.exact_rows(Random(8), 6, layer.codes.shape[0], first_dtype(target))
    wide = torch.stack([x, x + 1], dim=-1)
    for view in (
        x.t().contiguous().t(),
        wide[..., 0],
        torch.cat([x, x + 1])[::2],
        torch.cat([x + 1, x], 1)[:, x.shape[1] :],
    ):
        target.judge(expect_exact_product, view, layer)
    qweight, qzeros, scales, group_size = layer.packed
    views = [t.t().contiguous().t() for t in (qweight, qzeros, scales)]
    target.judge(expect_exact_words, x, *views, group_size)


def expect_exact_words(
    target: Subject, x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int
) -> None:
    """As `expect_exact_product`, with words that lie as they are given."""
    layer = PackedCase(truth.unpack(qweight), truth.unpack(qzeros), scales, group_size)
    arguments = (x, qweight, qzeros, scales, group_size)
    got = target.tensor("matmul", arguments, x.dtype, (*x.shape[:-1], scales.shape[1]))
    expect_equal(got, product(x, layer).to(x.dtype), "y")


@rule("L3.bias", "matmul")
def bias(target: Subject) -> None:
    """The bias is added once, to every row, and to the right column."""
    layer = exact_layer(target, 9)
    k, n = layer.codes.shape
    for dtype in dtypes_taken(target):
        values = ((torch.arange(n) % 13 - 6) / 64).to(dtype)
        x = torch.zeros(3, k, dtype=dtype)
        x[1, 0], x[2, -1] = 1, -1
        target.judge(expect_exact_product, x, layer, values)


@rule("L3.inputs-unchanged", "matmul")
def factors_unchanged(target: Subject) -> None:
    """No argument is written into, and a second call gives the same bits."""
    layer = exact_layer(target, 10)
    x = cases.exact_rows(Random(10), 3, layer.codes.shape[0], first_dtype(target))
    arguments = (x, *layer.packed, torch.ones(layer.codes.shape[1], dtype=x.dtype))
    before = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    first = target.call("matmul", *arguments)
    for name, old, new in zip(("x", "qweight", "qzeros", "scales", "", "bias"), before, arguments, strict=True):
        if isinstance(old, Tensor) and isinstance(new, Tensor) and not torch.equal(old, new):
            raise Broken("the arguments as they were", f"{name} changed")
    expect_equal(target.call("matmul", *arguments), first, "y of the second call")


@rule("L3.nan-stays-in-its-row", "matmul")
def nan_stays_in_its_row(target: Subject) -> None:
    """NaN in one row makes every output of it NaN, infinity leaves none finite, and no other row changes.

    Where the zero is taken out of the sum, infinity gives NaN too.
    """
    layer = exact_layer(target, 11)
    layer.codes[0], layer.zeros[0] = 15, 3
    x = cases.exact_rows(Random(11), 4, layer.codes.shape[0], first_dtype(target))
    x[1, 0], x[2, 0] = float("nan"), float("inf")
    expected = product(x, layer).to(x.dtype)
    got = product_of_target(target, x, layer)
    if bool(got[2].isfinite().any()):
        raise Broken("no finite output in the row with an infinite input", f"y[2] = {got[2].tolist()[:8]}")
    expect_equal(torch.cat([got[:2], got[3:]]), torch.cat([expected[:2], expected[3:]]), "y without row 2: y")


@rule("L3.accumulator-range", "matmul", flags=("HalfAccumulation",))
def accumulator_range(target: Subject) -> None:
    """Partial sums may be beyond 65504 where the result is not."""
    if torch.float16 not in dtypes_taken(target):
        raise Lacking("the target does not take float16")
    target.must_take(-1)
    k, n, group_size = shape(-1, 1, 1, target.limits)
    codes = torch.full((k, n), 9, dtype=torch.uint8)
    layer = PackedCase(
        codes, torch.full((1, n), 8, dtype=torch.uint8), torch.ones(1, n, dtype=torch.float16), group_size
    )
    x = torch.zeros(1, k, dtype=torch.float16)
    x[0, : k // 2], x[0, k // 2 :] = 32768.0, -32768.0
    x[0, 0] = 32768.0 + 32
    target.judge(expect_exact_product, x, layer)


def random_products(limits: Limits) -> st.SearchStrategy[tuple[Tensor, PackedCase, Tensor | None]]:
    """Rows of normal activations with outlier channels, random layers, and a bias or none."""

    def build(
        dtype: str, rows: int, layer: PackedCase, seed: int, has_bias: bool
    ) -> tuple[Tensor, PackedCase, Tensor | None]:
        random = Random(seed)
        k, n = layer.codes.shape
        x = cases.normal(random, rows, k)
        x[:, random.randrange(k)] *= 16
        values = cases.normal(random, n).to(getattr(torch, dtype)) if has_bias else None
        return x.to(getattr(torch, dtype)), layer, values

    return st.builds(build, st.sampled_from(limits.dtypes), st.integers(1, 4),
                     cases.layers(cases.usual_scales)(limits), st.integers(0, 2**16), st.booleans())  # fmt: skip


@rule("L3.random", "matmul", flags=("HalfAccumulation", "TwoRoundings"), drawn=random_products)
def random_product(target: Subject, drawn: tuple[Tensor, PackedCase, Tensor | None]) -> None:
    """Random rows and layers keep the bound for one rounding of the weight, float32 sums and one of the result."""
    target.judge(expect_near_sum, *drawn)


@rule("L3.long-sums", "matmul", flags=("HalfAccumulation", "TwoRoundings"))
def long_sums(target: Subject) -> None:
    """4096 products of one sign keep the bound: the sum is not kept in half precision."""
    group_size = max(target.limits.group_sizes)
    k, n, _ = shape(group_size, 1 if group_size == -1 else 4096 // group_size, 1, target.limits)
    layer = cases.random_layer(12, k, n, group_size)
    layer.zeros.zero_()
    for dtype in dtypes_taken(target):
        x = (cases.normal(Random(12), 2, k).abs() / 16).to(dtype)
        target.judge(expect_near_sum, x, layer)


def expect_near_sum(target: Subject, x: Tensor, layer: PackedCase, bias: Tensor | None = None) -> None:
    """The target's product within the bound."""
    got = product_of_target(target, x, layer, bias)
    expect_within(got, product(x, layer, bias), error_bound(x, layer, bias), f"{name_of(x.dtype)} y")


@rule("L3.refuses-short-input", "matmul", flags=("NoShapeCheck",))
def refuses_short_input(target: Subject) -> None:
    """x with fewer or more features than the weight, and scales or zeros with groups missing, raise."""
    layer = exact_layer(target, 13, count=2)
    qweight, qzeros, scales, group_size = layer.packed
    k = layer.codes.shape[0]
    x = cases.exact_rows(Random(13), 2, k, first_dtype(target))
    groups = groups_of(k, group_size)
    for why, arguments in {
        "one feature missing": (x[:, :-1].contiguous(), qweight, qzeros, scales, group_size),
        "half of the features missing": (x[:, : k // 2].contiguous(), qweight, qzeros, scales, group_size),
        "features too many": (torch.cat([x, x], 1), qweight, qzeros, scales, group_size),
        "a group of scales missing": (x, qweight, qzeros, scales[: groups - 1], group_size),
        "a group of zeros missing": (x, qweight, qzeros[: groups - 1], scales, group_size),
    }.items():
        target.judge(expect_refused_factors, *arguments, None, why)
