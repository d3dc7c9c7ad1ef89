"""Linear layers as pure functions of tensors, for code that is compiled once and given each layer's weights in turn.

Shapes: T rows, I input features, O output features, G groups along I, P words of a group, N nibbles of a word (8).
"""

from collections.abc import Callable, Collection, Sequence
from functools import cache
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from miniawq import cpu_forms, forms, tiles
from miniawq.arrange import EXPAND_IN_TILES, Arranged, expand, lay_together, magic_exponents
from miniawq.compiling import Arguments, Compiled
from miniawq.forms import with_bias, written
from miniawq.kernel import QuantLinear, arranged_product, fuse, joined_bias, matmul
from miniawq.model import rms_norm
from miniawq.operations import sum_of_products
from miniawq.packing import CODES_PER_WORD

# Up to these rows `REDUCE` was the faster form on an H200, for few and for many groups (docs/log.md).
MOST_ROWS_REDUCED, MOST_ROWS_REDUCED_MANY_GROUPS, MANY_GROUPS = 3, 2, 64
MOST_ROWS_DOTTED = 256
MOST_ROWS_ON_CPU = 32
# With more rows a kernel that norms is faster than what each program of the product does instead (docs/log.md).
MOST_ROWS_NORMED_LATE = 32
# Every reader of `DOT`'s means sums so many, or fewer.
MOST_PIECES = 8
# Heads: of fewer outputs there are not enough programs.
MOST_ROWS_TILED, FEWEST_OUTPUTS_TILED = 64, 32_768

Tensors = tuple[Any, ...]


class Form(NamedTuple):
    """A way to multiply, in two steps, so that activations can be prepared by the kernel that computes them.

    prepare(x_TI, dtype, *tensors) makes of activations what multiply(that, means_TC, dtype, *tensors) makes y_TO of, in
    `dtype`. prepare_normed(h_TI, norm_I, eps, dtype, *tensors), where there is one, makes both, of rows in float32 that
    are to be normed: then multiply divides its results by the root of the sum of a row's means. `stays_float32` says
    that nothing is rounded between.
    """

    prepare: Callable[..., Any]
    multiply: Callable[..., Tensor]
    prepare_normed: Callable[..., tuple[Any, Tensor]] | None = None
    stays_float32: bool = False


def in_one_step(function: Any) -> Form:
    """Of function(x_TI, *tensors)."""
    return Form(lambda x_TI, dtype, *tensors: x_TI, lambda x_TI, means_TC, dtype, *tensors: function(x_TI, *tensors))


class Product(NamedTuple):
    """Products of the same form and shapes differ in their tensors only."""

    form: Form
    tensors: Tensors


class Prepared(NamedTuple):
    """Rows of activations as each of several products wants them.

    Where there are means, they come before a norm: those of a row's pieces make up its mean square and the norm's eps.
    """

    of_products: Tensors
    means_TC: Tensor | None
    rows: int
    dtype: torch.dtype


def products_of(layers: Sequence[nn.Module], rows: int) -> tuple[Product, ...]:
    """Layers that read the same input, as one product of all their outputs where their weights can lie together.

    `rows` is the number of rows that the product will get.
    """
    dense = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if len(dense) == len(layers) and len({layer.weight.dtype for layer in dense}) == 1:
        return (_join_dense(dense, rows),)
    packed = [layer for layer in layers if isinstance(layer, QuantLinear) and layer.prepare().arranged]
    blocks = {layer.arranged.outputs_of_a_block for layer in packed if layer.arranged}
    alike = len(blocks) == 1 and len({(layer.group_size, layer.scale_dtype) for layer in packed}) == 1
    if len(packed) == len(layers) and alike:
        return (_join_int4(packed, rows),)
    return tuple(_alone(layer, rows) for layer in layers)


def prepare(products: Sequence[Product], x_TI: Tensor) -> Prepared:
    """Activations for products."""
    of_products = tuple(form.prepare(x_TI, x_TI.dtype, *tensors) for form, tensors in products)
    return Prepared(of_products, None, len(x_TI), x_TI.dtype)


def prepare_normed(products: Sequence[Product], h_TI: Tensor, norm_I: Tensor, eps: float) -> Prepared:
    """`rms_norm` of h for products. A norm scales a whole row, so the scale may as well come after the product.

    Then no kernel waits for the sum of a row: one writes its activations and the squares of some pieces of each row,
    and every product sums those few. Not in float16, in which h times the norm's weight might be too large.
    """
    (first, *others) = products
    fits = first.form.stays_float32 or h_TI.dtype != torch.float16
    if others or first.form.prepare_normed is None or not fits or len(h_TI) > MOST_ROWS_NORMED_LATE:
        return prepare(products, rms_norm(h_TI, norm_I, eps))
    prepared, means_TC = first.form.prepare_normed(h_TI.float(), norm_I.float(), eps, h_TI.dtype, *first.tensors)
    return Prepared((prepared,), means_TC, len(h_TI), h_TI.dtype)


def mean_squares(h_TI: Tensor, pieces: int, eps: float) -> Tensor:
    """means_TC of pieces of rows: their sums are the mean squares of h's rows, and eps."""
    return written(h_TI.unflatten(1, (pieces, -1)).square().sum(2) / h_TI.shape[1] + eps / pieces)


def multiply(products: Sequence[Product], prepared: Prepared) -> Tensor:
    """y_TO of all products, side by side."""
    of_products, means_TC, rows, dtype = prepared
    parts = [
        form.multiply(x, means_TC, dtype, *tensors).narrow(0, 0, rows)
        for (form, tensors), x in zip(products, of_products, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def prepare_reduced(
    x_TI: Tensor, _dtype: torch.dtype, planes_OVG: Sequence[Tensor], grid_OG: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    """`forms.prescale` as one kernel: the powers of two are a tensor, so one expression covers all nibbles.

    Only what all parts of a group take away together matters, so the sums are those of groups, sums_TG. Inductor fuses
    a sum with the scaling only if both run along the same pieces of memory: a group is one piece, a part is not.
    """
    _, places_N, _ = others
    x_TGQVN = x_TI.float().unflatten(-1, (grid_OG.shape[1], len(planes_OVG), planes_OVG[0].shape[1], CODES_PER_WORD))
    x_QNTVG = written((x_TGQVN * places_N).permute(2, 4, 0, 3, 1))
    return x_QNTVG, written(x_TGQVN.sum((2, 3, 4)) * 2.0 ** (forms.PRESCALE - 149))


def prepare_normed_reduced(
    h_TI: Tensor, norm_I: Tensor, eps: float, dtype: torch.dtype, *tensors: Any
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Both steps by one kernel."""
    prepared = prepare_reduced(h_TI * norm_I, dtype, *tensors)
    return prepared, mean_squares(h_TI, prepared[1].shape[1], eps)


def multiply_reduced(
    x: tuple[Tensor, Tensor],
    means_TC: Tensor | None,
    dtype: torch.dtype,
    planes_OVG: Sequence[Tensor],
    grid_OG: Tensor,
    scale_like: Tensor,
    _places_N: Tensor,
    bias_O: Tensor | None,
) -> Tensor:
    """`forms.reduce_planes`."""
    x_QNTVG, sums_TG = x
    y_TO = forms.reduce_planes(planes_OVG, grid_OG, scale_like.dtype, x_QNTVG, shared_out(sums_TG, planes_OVG))
    if means_TC is not None and len(means_TC) == 1:
        # Summed for each output again, as the product sums its V and G, this is no kernel of its own.
        means_TOVG = shared_out(means_TC, planes_OVG).unsqueeze(1).expand(-1, len(grid_OG), -1, -1)
        y_TO = y_TO * means_TOVG.sum((2, 3)).rsqrt()
    elif means_TC is not None:
        y_TO = y_TO * means_TC.sum(1, keepdim=True).rsqrt()
    return written(with_bias(y_TO, bias_O, dtype))


def shared_out(sums_TG: Tensor, planes_OVG: Sequence[Tensor]) -> Tensor:
    """The same share of its group's sum for each part, [T, V, G]."""
    parts = planes_OVG[0].shape[1]
    return (sums_TG / parts).unsqueeze(1).expand(-1, parts, -1)


def prepare_dotted(x_TI: Tensor, dtype: torch.dtype, _words_OPG: Tensor, grid_OG: Tensor, *_: Any) -> Tensor:
    """`forms.spread`."""
    return written(forms.spread(x_TI.to(dtype), grid_OG.shape[1]))


def prepare_normed_dotted(
    h_TI: Tensor, norm_I: Tensor, eps: float, dtype: torch.dtype, *tensors: Any
) -> tuple[Tensor, Tensor]:
    """Both steps by one kernel, which only gets rows that are whole tiles from here on."""
    _, grid_OG, *_ = tensors
    h_TI = forms.in_whole_tiles(h_TI)
    return prepare_dotted(h_TI * norm_I, dtype, *tensors), mean_squares(h_TI, gcd(grid_OG.shape[1], MOST_PIECES), eps)


def multiply_dotted(
    x_NTPG: Tensor,
    means_TC: Tensor | None,
    _dtype: torch.dtype,
    words_OPG: Tensor,
    grid_OG: Tensor,
    scale_like: Tensor,
    exponents_2O: Tensor,
    bias_O: Tensor | None,
) -> Tensor:
    """`forms.dot_planes`."""
    factors_T1 = None if means_TC is None else means_TC.sum(1, keepdim=True).rsqrt()
    return forms.dot_planes(words_OPG, grid_OG, scale_like.dtype, x_NTPG, exponents_2O, bias_O, factors_T1)


def library_product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """`linear`, where weight and activations have one dtype, else what `ROWS` computes.

    `model.dense_product` would be hundreds of slices to compile.
    """
    if x_TI.dtype == weight_OI.dtype:
        return linear(x_TI, weight_OI, bias_O)
    return multiply_rows(prepare_rows(x_TI, x_TI.dtype), None, x_TI.dtype, weight_OI, bias_O)


def summed_product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """A dense product of one row, as a sum for each output: it reads the weight faster than the library's."""
    y_TO = (weight_OI.float() * written(x_TI).float()).sum(1).unsqueeze(0)
    return with_bias(y_TO, bias_O, x_TI.dtype)


def tiled_product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """A dense product of many outputs, by tensor cores; of whole tiles of rows."""
    if x_TI.dtype != weight_OI.dtype:
        return library_product(x_TI, weight_OI, bias_O)
    stored_TI = written(forms.in_whole_tiles(x_TI))
    return written(with_bias(sum_of_products([weight_OI], [stored_TI.t()]).t(), bias_O, x_TI.dtype))


def prepare_rows(x_TI: Tensor, _dtype: torch.dtype, *_: Any) -> Tensor:
    """`cpu_forms.in_tiles`."""
    return written(cpu_forms.in_tiles(x_TI))


def multiply_rows(
    x_CRI: Tensor, _means_TC: None, dtype: torch.dtype, weight_OI: Tensor, bias_O: Tensor | None
) -> Tensor:
    """`cpu_forms.reduce_dense`."""
    return with_bias(cpu_forms.reduce_dense(weight_OI, x_CRI), bias_O, dtype)


def prepare_words(
    x_TI: Tensor, _dtype: torch.dtype, _words_KGPW: Tensor, grid_KG2W: Tensor, _bias_O: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`cpu_forms.prescale_words`."""
    x_CGPRN, means_CGR = cpu_forms.prescale_words(x_TI, grid_KG2W.shape[1])
    return written(x_CGPRN), written(means_CGR)


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


def expand_product(
    x_TI: Tensor, words_OPG: Tensor, grid_OG: Tensor, scale_like: Tensor, bias_O: Tensor | None
) -> Tensor:
    """`arrange.expand` and the library's matmul, for activations of 16 bits."""
    if x_TI.dtype.itemsize != 2:
        return many_rows_product(x_TI, words_OPG, grid_OG, scale_like, bias_O)
    weight_OI = expand(words_OPG, grid_OG, scale_like.dtype, x_TI.dtype).view(x_TI.dtype)
    return linear(x_TI, weight_OI, None if bias_O is None else bias_O.to(x_TI.dtype))


def many_rows_product(x_TI: Tensor, words: Tensor, grid: Tensor, scale_like: Tensor, bias_O: Tensor | None) -> Tensor:
    """`kernel.arranged_product`."""
    return arranged_product(x_TI, Arranged(words, grid), scale_like.dtype, bias_O)


@cache
def sliced(group_size: int) -> Form:
    """`kernel.matmul`."""

    def product(
        x_TI: Tensor, qweight_IW: Tensor, qzeros_GW: Tensor, scales_GO: Tensor, bias_O: Tensor | None
    ) -> Tensor:
        return matmul(x_TI, qweight_IW, qzeros_GW, scales_GO, group_size, bias_O)

    return in_one_step(product)


REDUCE = Form(prepare_reduced, multiply_reduced, prepare_normed_reduced, stays_float32=True)
DOT = Form(prepare_dotted, multiply_dotted, prepare_normed_dotted)
WORDS = Form(prepare_words, multiply_words)
ROWS = Form(prepare_rows, multiply_rows)
EXPAND, MANY_ROWS = map(in_one_step, (expand_product, many_rows_product))
LINEAR, SUMMED, TILED = map(in_one_step, (library_product, summed_product, tiled_product))
# With the options of these Inductor would write a library's matmul itself.
WRITTEN_BY_INDUCTOR = frozenset((REDUCE, DOT, WORDS, ROWS, SUMMED, TILED))


def _form_for(device: torch.device, rows: int, groups: int) -> Form:
    if device.type != "cuda":
        return WORDS if rows <= MOST_ROWS_ON_CPU else MANY_ROWS
    if rows > MOST_ROWS_DOTTED:
        return EXPAND
    most_reduced = MOST_ROWS_REDUCED_MANY_GROUPS if groups > MANY_GROUPS else MOST_ROWS_REDUCED
    return REDUCE if rows <= most_reduced else DOT


def _dense_form_for(device: torch.device, outputs: int, dtype: torch.dtype, rows: int) -> Form:
    """On CUDA the library reads 2.8 TB/s of a head where 3.0 to 3.2 can be read (docs/performance.md)."""
    if device.type != "cuda":
        return ROWS if rows <= MOST_ROWS_ON_CPU else LINEAR
    if rows == 1:
        return SUMMED
    return TILED if rows <= MOST_ROWS_TILED and outputs >= FEWEST_OUTPUTS_TILED and dtype.itemsize == 2 else LINEAR


def lower(
    function: Callable[..., Any],
    forms_in_it: Collection[Form],
    traced: Callable[..., Arguments] | None = None,
    **options: Any,
) -> Compiled:
    """`function` compiled with Inductor's `options`, and those that its forms of products need."""
    if WRITTEN_BY_INDUCTOR.intersection(forms_in_it):
        return forms.compiled(function, tiles.block_sizes, traced, **options)
    # With padding Inductor would time 2 to 7 rows padded to 8, on a second copy of the head.
    needed = {"shape_padding": False} | (EXPAND_IN_TILES if EXPAND in forms_in_it else {})
    return Compiled(function, needed | options, traced=traced)


def _alone(layer: Any, rows: int) -> Product:
    if isinstance(layer, nn.Linear):
        return _join_dense([layer], rows)
    if layer.arranged:
        return _join_int4([layer], rows)
    return Product(sliced(layer.group_size), (layer.qweight, layer.qzeros, layer.scales, layer.bias))


def _join_dense(layers: Sequence[Any], rows: int) -> Product:
    """Afterwards the layers hold views of the joined weight: there is never a second copy of the model."""
    weight_OI = lay_together([layer.weight.data for layer in layers])
    sizes = [layer.out_features for layer in layers]
    for layer, part_OI in zip(layers, weight_OI.split(sizes), strict=True):
        layer.weight = nn.Parameter(part_OI, requires_grad=False)
    form = _dense_form_for(weight_OI.device, len(weight_OI), weight_OI.dtype, rows)
    return Product(form, (weight_OI, joined_bias(layers)))


def _join_int4(layers: Sequence[QuantLinear], rows: int) -> Product:
    (words, grid), bias_O = fuse(layers), joined_bias(layers)
    form = _form_for(words.device, rows, grid.shape[1])
    scale_like = torch.empty(0, dtype=layers[0].scale_dtype, device=words.device)
    if form in (EXPAND, MANY_ROWS):
        return Product(form, (words, grid, scale_like, bias_O))
    if form is WORDS:
        return Product(form, (cpu_forms.as_loaded(words), grid, bias_O))
    if form is DOT:
        return Product(form, (words, grid, scale_like, magic_exponents(words.device, len(words)), bias_O))
    places = [2.0 ** (forms.PRESCALE - place) for _, place in forms.SUBNORMAL_PLACES]
    places_N = torch.tensor(places, device=words.device)
    planes_OVG = forms.planes(words, tiles.parts_for(words.shape[2], words.shape[1], rows))
    return Product(form, (planes_OVG, grid, scale_like, places_N, bias_O))
