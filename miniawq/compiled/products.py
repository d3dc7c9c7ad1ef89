"""Which form multiplies which weight: linear layers as pure functions of tensors.

A compiled function is made once and is given each layer's weights in turn, so a product is a form and its tensors. The
kernel that computes activations can also prepare them for the next product, so a form works in two steps.
"""

from collections.abc import Callable, Collection, Sequence
from functools import reduce
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

import miniawq.compiled.cpu_forms as cpu_forms
import miniawq.compiled.gpu_forms as gpu_forms
import miniawq.compiled.launch as launch
from miniawq.compiled.compiler import Arguments, Compiled
from miniawq.compiled.eager import EXPAND_IN_ONE, expand, multiply_prepacked
from miniawq.compiled.gpu_forms import with_bias, with_rows, written
from miniawq.compiled.operations import product_unrounded, sum_in_loop
from miniawq.compiled.prepacked import LARGEST_GROUP, Prepacked
from miniawq.packing import CODES_PER_WORD

# From so many rows on `DOT` was the faster form on an H200, for activations of 16 bits (docs/log).
FEWEST_ROWS_DOTTED = 2
MOST_ROWS_REDUCED = 3
# Of weights in the largest groups; `WEIGHTS` does not take smaller ones.
MOST_ROWS_OF_WEIGHTS = 256
MOST_ROWS_ON_CPU = 32
# With more rows a kernel of its own for the norm is faster than a factor in each program of the product (docs/log).
MOST_ROWS_NORMED_LATE = 32
# Every reader of `DOT`'s mean squares sums so many pieces, or fewer: one for each group, if one kernel is to make both.
MOST_PIECES = 64
# Dense heads: with fewer outputs there are not enough programs.
MOST_ROWS_TILED, FEWEST_OUTPUTS_TILED = 64, 32_768

Tensors = tuple[Any, ...]


class Form(NamedTuple):
    """A way to multiply, in two steps.

    prepare(x_TI, dtype, *tensors) -> prepared; multiply(prepared, means_TC, dtype, *tensors) -> y_TO in `dtype`.

    prepare_normed(h_TI, norm_I, eps, dtype, *tensors) -> prepared, means_TC exists where a norm before the product can
    be applied after it: h is float32, and multiply divides row t of its result by the root of the sum of means_TC[t].
    `stays_float32`: nothing is rounded between the two steps. `written_by_inductor`: no library multiplies.
    `whole_rows` says how many rows it computes of so many.
    """

    name: str
    prepare: Callable[..., Any]
    multiply: Callable[..., Tensor]
    prepare_normed: Callable[..., tuple[Any, Tensor]] | None = None
    stays_float32: bool = False
    written_by_inductor: bool = True
    whole_rows: Callable[[int], int] = lambda rows: rows


class Product(NamedTuple):
    """Products of the same form and shapes differ in their tensors only."""

    form: Form
    tensors: Tensors


class Prepared(NamedTuple):
    """Rows of activations as each of several products wants them; `means_TC` where a norm is still to be applied."""

    of_products: Tensors
    means_TC: Tensor | None
    rows: int
    dtype: torch.dtype


def prepare(products: Sequence[Product], x_TI: Tensor) -> Prepared:
    """Activations for products."""
    of_products = tuple(form.prepare(x_TI, x_TI.dtype, *tensors) for form, tensors in products)
    return Prepared(of_products, None, len(x_TI), x_TI.dtype)


def prepare_normed(products: Sequence[Product], h_TI: Tensor, norm_I: Tensor, eps: float) -> Prepared:
    """The RMS norm of h for products. A norm scales a whole row, so the row's factor may come after the product.

    Then no kernel waits for the sum of a row: one kernel writes the activations and the mean squares of some pieces of
    each row, and every product sums those few. Not in float16, where h times the norm's weight might be too large.
    """
    (first, *others) = products
    fits = first.form.stays_float32 or h_TI.dtype != torch.float16
    if others or first.form.prepare_normed is None or not fits or len(h_TI) > MOST_ROWS_NORMED_LATE:
        return prepare(products, rms_norm(h_TI, norm_I.shape, norm_I, eps))
    prepared, means_TC = first.form.prepare_normed(h_TI.float(), norm_I.float(), eps, h_TI.dtype, *first.tensors)
    return Prepared((prepared,), means_TC, len(h_TI), h_TI.dtype)


def multiply(products: Sequence[Product], prepared: Prepared) -> Tensor:
    """y_TO of all products, side by side."""
    of_products, means_TC, rows, dtype = prepared
    parts = [
        form.multiply(x, means_TC, dtype, *tensors).narrow(0, 0, rows)
        for (form, tensors), x in zip(products, of_products, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def in_whole_rows(products: Sequence[Product], x_TI: Tensor) -> Tensor:
    """x with rows of zeros, as many as the products compute anyway.

    Whoever keeps them from product to product computes with tensors of one size, which fit into one kernel.
    """
    return with_rows(x_TI, max(form.whole_rows(len(x_TI)) for form, _ in products))


def mean_squares(h_TI: Tensor, pieces: int, eps: float) -> Tensor:
    """means_TC of pieces of rows: a row's sum is the mean square of h's row, plus eps."""
    return written(h_TI.unflatten(1, (pieces, -1)).square().sum(2) / h_TI.shape[1] + eps / pieces)


def prepare_reduced(
    x_TI: Tensor, _dtype: torch.dtype, words_KWGP: Tensor, _grid_KGW: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    """`gpu_forms.prescale` as one kernel."""
    _, powers_I, _ = others
    x_TNJ, sums_TG = gpu_forms.prescale(x_TI, powers_I, words_KWGP.shape[3])
    return written(x_TNJ), written(sums_TG)


def prepare_normed_reduced(
    h_TI: Tensor, norm_I: Tensor, eps: float, dtype: torch.dtype, *tensors: Any
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Both steps by one kernel."""
    prepared = prepare_reduced(h_TI * norm_I, dtype, *tensors)
    return prepared, mean_squares(h_TI, prepared[1].shape[1], eps)


def multiply_reduced(
    x: tuple[Tensor, Tensor],
    means_TG: Tensor | None,
    dtype: torch.dtype,
    words_KWGP: Tensor,
    grid_KGW: Tensor,
    scale_like: Tensor,
    _powers_I: Tensor,
    bias_O: Tensor | None,
) -> Tensor:
    """`gpu_forms.reduce_vectors`."""
    x_TNJ, sums_TG = x
    vectors = x_TNJ.shape[2] // gpu_forms.vector_words(words_KWGP.shape[3])
    parts = launch.parts_for(vectors, len(sums_TG))
    rows = gpu_forms.reduce_vectors(words_KWGP, grid_KGW, scale_like.dtype, x_TNJ, sums_TG, parts)
    if means_TG is not None:
        means_T1 = means_TG.sum(1, keepdim=True)
        if len(rows) == 1:
            # Summed for each output again, as the product sums its vectors, this is no kernel of its own.
            means_VU = gpu_forms.shared_out(means_TG, vectors).view(parts, -1)
            means_T1 = sum_in_loop(reduce(torch.add, means_VU.unbind()).expand(1, len(rows[0]), -1))
        rows = [y_O * means_1.rsqrt() for y_O, means_1 in zip(rows, means_T1.unbind(), strict=True)]
    return written(torch.stack([with_bias(y_O, bias_O, dtype) for y_O in rows]))


def prepare_dotted(x_TI: Tensor, dtype: torch.dtype, words_KWGP: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """`gpu_forms.spread`."""
    spread, sums = gpu_forms.spread(x_TI.to(dtype), words_KWGP.shape[3])
    return written(spread), written(sums)


def prepare_normed_dotted(
    h_TI: Tensor, norm_I: Tensor, eps: float, dtype: torch.dtype, words_KWGP: Tensor, *tensors: Any
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Both steps by one kernel; from here on rows fill whole tiles."""
    h_TI = gpu_forms.in_whole_tiles(h_TI)
    pieces = gcd(words_KWGP.shape[2], MOST_PIECES)
    return prepare_dotted(h_TI * norm_I, dtype, words_KWGP, *tensors), mean_squares(h_TI, pieces, eps)


def multiply_dotted(
    x: tuple[Tensor, Tensor],
    means_TC: Tensor | None,
    _dtype: torch.dtype,
    words_KWGP: Tensor,
    grid_KGW: Tensor,
    scale_like: Tensor,
    bias_O: Tensor | None,
) -> Tensor:
    """`gpu_forms.dot_groups`."""
    factors_T1 = None if means_TC is None else means_TC.sum(1, keepdim=True).rsqrt()
    return gpu_forms.dot_groups(words_KWGP, grid_KGW, scale_like.dtype, *x, bias_O, factors_T1)


def prepare_by_nibbles(x_TI: Tensor, dtype: torch.dtype, words_KWGP: Tensor, *_: Any) -> Tensor:
    """`gpu_forms.by_nibbles`."""
    return written(gpu_forms.by_nibbles(x_TI.to(dtype), words_KWGP.shape[3]))


def multiply_weights(
    x_TQH: Tensor,
    _means_TC: None,
    _dtype: torch.dtype,
    words_KWGP: Tensor,
    grid_KGW: Tensor,
    scale_like: Tensor,
    bias_O: Tensor | None,
) -> Tensor:
    """`gpu_forms.dot_weights`."""
    return gpu_forms.dot_weights(words_KWGP, grid_KGW, scale_like.dtype, x_TQH, bias_O)


def prepare_words(
    x_TI: Tensor, _dtype: torch.dtype, _words_KGPW: Tensor, grid_KG2W: Tensor, _bias_O: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`cpu_forms.prescale_words`."""
    x_CGPRN, shares_CGPR = cpu_forms.prescale_words(x_TI, grid_KG2W.shape[1])
    return written(x_CGPRN), written(shares_CGPR)


def multiply_words(
    x: tuple[Tensor, Tensor],
    _means_TC: None,
    dtype: torch.dtype,
    words_KGPW: Tensor,
    grid_KG2W: Tensor,
    bias_O: Tensor | None,
) -> Tensor:
    """`cpu_forms.reduce_words`."""
    return with_bias(cpu_forms.reduce_words(words_KGPW, grid_KG2W, *x), bias_O, dtype)


def prepare_rows(x_TI: Tensor, _dtype: torch.dtype, *_: Any) -> Tensor:
    """`cpu_forms.in_tiles`."""
    return written(cpu_forms.in_tiles(x_TI))


def multiply_rows(
    x_CRI: Tensor, _means_TC: None, dtype: torch.dtype, weight_OI: Tensor, bias_O: Tensor | None
) -> Tensor:
    """`cpu_forms.reduce_dense`."""
    return with_bias(cpu_forms.reduce_dense(weight_OI, x_CRI), bias_O, dtype)


def as_they_are(x_TI: Tensor, _dtype: torch.dtype, *_: Any) -> Tensor:
    """Activations that need no preparation."""
    return x_TI


def multiply_expanded(
    x_TI: Tensor,
    _means_TC: None,
    _dtype: torch.dtype,
    words_KWGP: Tensor,
    grid_KGW: Tensor,
    scale_like: Tensor,
    bias_O: Tensor | None,
) -> Tensor:
    """`eager.expand` and the library's matmul, of activations of 16 bits."""
    weight_OI = expand(words_KWGP, grid_KGW, scale_like.dtype, x_TI.dtype).view(x_TI.dtype)
    return linear(x_TI, weight_OI, None if bias_O is None else bias_O.to(x_TI.dtype))


def multiply_plainly(
    x_TI: Tensor,
    _means_TC: None,
    _dtype: torch.dtype,
    words: Tensor,
    grid: Tensor,
    scale_like: Tensor,
    bias_O: Tensor | None,
) -> Tensor:
    """`eager.sliced_product`."""
    group_size = words.shape[3 if grid.dtype == torch.int32 else 2] * CODES_PER_WORD
    return multiply_prepacked(x_TI, Prepacked(words, grid, group_size, scale_like.dtype), bias_O)


def multiply_by_library(
    x_TI: Tensor, _means_TC: None, dtype: torch.dtype, weight_OI: Tensor, bias_O: Tensor | None
) -> Tensor:
    """`linear` where weight and activations have one dtype; else `ROWS`: a wider copy of the weight would take room."""
    if x_TI.dtype == weight_OI.dtype:
        return linear(x_TI, weight_OI, bias_O)
    return multiply_rows(prepare_rows(x_TI, dtype), None, dtype, weight_OI, bias_O)


def multiply_summed(
    x_TI: Tensor, _means_TC: None, dtype: torch.dtype, weight_OI: Tensor, bias_O: Tensor | None
) -> Tensor:
    """A dense product of one row as a sum for each output: it reads a large weight faster than the library does."""
    y_TO = (weight_OI.float() * written(x_TI).float()).sum(1).unsqueeze(0)
    return with_bias(y_TO, bias_O, dtype)


def multiply_tiled(
    x_TI: Tensor, _means_TC: None, dtype: torch.dtype, weight_OI: Tensor, bias_O: Tensor | None
) -> Tensor:
    """A dense product of many outputs by tensor cores, of whole tiles of rows."""
    stored_TI = written(gpu_forms.in_whole_tiles(x_TI.to(weight_OI.dtype)))
    return written(with_bias(product_unrounded(weight_OI, stored_TI.t()).t(), bias_O, dtype))


REDUCE = Form("reduce", prepare_reduced, multiply_reduced, prepare_normed_reduced, stays_float32=True)
DOT = Form("dot", prepare_dotted, multiply_dotted, prepare_normed_dotted, whole_rows=gpu_forms.whole_rows)
WEIGHTS = Form("weights", prepare_by_nibbles, multiply_weights, whole_rows=gpu_forms.whole_rows)
EXPAND = Form("expand", as_they_are, multiply_expanded, written_by_inductor=False)
WORDS = Form("words", prepare_words, multiply_words)
PLAIN = Form("plain", as_they_are, multiply_plainly, written_by_inductor=False)
SUMMED = Form("summed", as_they_are, multiply_summed)
TILED = Form("tiled", as_they_are, multiply_tiled)
ROWS = Form("rows", prepare_rows, multiply_rows)
LIBRARY = Form("library", as_they_are, multiply_by_library, written_by_inductor=False)

Accepts = Callable[[Form], bool]


def int4_product(weight: Prepacked, bias_O: Tensor | None, rows: int, dtype: torch.dtype, accepts: Accepts) -> Product:
    """The product of a prepacked weight with so many rows of activations of a dtype, by the fastest accepted form."""
    wanted = (WORDS,) if rows <= MOST_ROWS_ON_CPU else ()
    if weight.in_rows:
        has_16_bits = dtype.itemsize == 2
        few = (REDUCE,) if rows <= MOST_ROWS_REDUCED else ()
        is_largest = weight.words.shape[3] * CODES_PER_WORD == LARGEST_GROUP
        most = MOST_ROWS_OF_WEIGHTS if is_largest else launch.MOST_ROWS_IN_GROUPS
        by_tensor_cores = DOT if rows <= launch.MOST_ROWS_IN_GROUPS else WEIGHTS
        some = (by_tensor_cores,) if has_16_bits and rows <= most and gpu_forms.steps_fit(weight.words) else ()
        first, second = (few, some) if rows < FEWEST_ROWS_DOTTED else (some, few)
        wanted = (*first, *second, *((EXPAND,) if has_16_bits else ()))
    form = next(filter(accepts, wanted), PLAIN)
    return Product(form, int4_tensors(form, weight, bias_O))


def int4_tensors(form: Form, weight: Prepacked, bias_O: Tensor | None) -> Tensors:
    """What a form of the INT4 product takes after the activations."""
    words, grid = weight.words, weight.grid
    if form is WORDS:
        return cpu_forms.as_loaded(words), grid, bias_O
    scale_like = torch.empty(0, dtype=weight.scale_dtype, device=words.device)
    if form is REDUCE:
        return words, grid, scale_like, gpu_forms.powers_of_places(weight.inputs, words.device), bias_O
    return words, grid, scale_like, bias_O


def dense_product(weight_OI: Tensor, bias_O: Tensor | None, rows: int, dtype: torch.dtype, accepts: Accepts) -> Product:
    """The same for a dense weight. On a GPU the library reads 2.8 TB/s of a head, our forms 3.0 to 3.2 (docs/log)."""
    wanted: tuple[Form, ...] = (ROWS,) if rows <= MOST_ROWS_ON_CPU else ()
    if weight_OI.device.type == "cuda":
        is_head = len(weight_OI) >= FEWEST_OUTPUTS_TILED and weight_OI.dtype == dtype and dtype.itemsize == 2
        wanted = (SUMMED if rows == 1 else TILED,) if is_head and rows <= MOST_ROWS_TILED else ()
    return Product(next(filter(accepts, wanted), LIBRARY), (weight_OI, bias_O))


# Options of Inductor under which it writes the products itself, each as one kernel.
ONE_KERNEL: dict[str, Any] = {
    "triton.native_matmul": True,
    # Below these thresholds Inductor would cut the long sums into several kernels.
    "realize_opcount_threshold": 100_000,
    "realize_reads_threshold": 1_000,
    "realize_acc_reads_threshold": 1_000,
    # A kernel that sums pieces of rows can also write the rows in another order.
    "triton.tiling_prevents_reduction_fusion": False,
    "cpp.enable_floating_point_contract_flag": "fast",
}


def options_of(forms: Collection[Form]) -> dict[str, Any]:
    """What only some forms need: for `REDUCE`, Inductor is to fuse by what is read, not by the order of loops."""
    return {"loop_ordering_after_fusion": False} if REDUCE in forms else {}


def compile_with_forms(
    function: Callable[..., Any],
    forms: Collection[Form],
    traced: Callable[..., Arguments] | None = None,
    **options: Any,
) -> Compiled:
    """`function`, in which these forms multiply, compiled with Inductor's `options` and those that the forms need.

    Without forms it rounds wherever torch rounds.
    """
    if any(form.written_by_inductor for form in forms):
        return Compiled(function, ONE_KERNEL | options_of(forms) | options, launch.block_sizes, traced)
    # With padding Inductor would time 2 to 7 rows padded to 8, on a second copy of the head.
    needed: dict[str, Any] = {"shape_padding": False, "emulate_precision_casts": not forms}
    return Compiled(function, needed | (EXPAND_IN_ONE if EXPAND in forms else {}) | options, traced=traced)
