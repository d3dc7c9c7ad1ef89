"""Linear layers as pure functions of tensors, for code that is compiled once and given each layer's weights in turn.

Shapes: T rows, I input features, O output features, G groups along I, P words of a group, N nibbles of a word (8).
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from miniawq import cpu_forms, forms, tiles
from miniawq.arrange import Arranged, expand, in_storage_order, lay_together, magic_exponents
from miniawq.compiling import Arguments, Compiled
from miniawq.forms import with_bias, written
from miniawq.kernel import QuantLinear, arranged_product, fuse, joined_bias, matmul
from miniawq.model import rms_norm
from miniawq.packing import CODES_PER_WORD

Form = Callable[..., Tensor]

# Up to these rows `reduce_product` was the faster form on an H200, for few and for many groups (docs/log.md).
MOST_ROWS_REDUCED, MOST_ROWS_REDUCED_MANY_GROUPS, MANY_GROUPS = 3, 2, 64
MOST_ROWS_DOTTED = 256
MOST_ROWS_ON_CPU = 32


class Product(NamedTuple):
    """form(x_TI, *tensors) -> y_TO. Products of the same form and shapes differ in their tensors only."""

    form: Form
    tensors: tuple[Any, ...]


def products_of(layers: Sequence[nn.Module], rows: int) -> tuple[Product, ...]:
    """Layers that read the same input, as one product of all their outputs where their weights can lie together.

    `rows` is the number of rows that the product will get.
    """
    if all(type(layer) is nn.Linear for layer in layers):
        return (_join_dense(layers),)
    packed = [layer for layer in layers if isinstance(layer, QuantLinear) and layer.prepare().arranged]
    if len(packed) == len(layers) and len({(layer.group_size, layer.scale_dtype) for layer in packed}) == 1:
        return (_join_int4(packed, rows),)
    return tuple(_join_int4([layer], rows) if layer in packed else _alone(layer) for layer in layers)


def multiply(products: Sequence[Product], x_TI: Tensor) -> Tensor:
    """y_TO of all products, side by side."""
    parts = [product.form(x_TI, *product.tensors) for product in products]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def norm_and_multiply(products: Sequence[Product], h_TI: Tensor, norm_I: Tensor, eps: float) -> Tensor:
    """`multiply` of `rms_norm`. A norm scales a whole row, so the scale may as well come after the product.

    Then the sums of a row need no kernel of their own that everything waits for.
    """
    (first, *others) = products
    if others or first.form is not reduce_product:
        return multiply(products, rms_norm(h_TI, norm_I, eps))
    planes_OVG, grid_OG, scale_like, places_N, bias_O = first.tensors
    h_TI = h_TI.float()
    x_QNTVG, sums_TVG = prescaled(h_TI * norm_I.float(), planes_OVG, places_N)
    squares_TG = written(by_part(h_TI, planes_OVG).square().sum((2, 3, 4)))
    if len(h_TI) == 1:
        # Summed for each output again, as the product sums its V and G, this is no kernel of its own either.
        squares_TOVG = shared_out(squares_TG, planes_OVG).unsqueeze(1).expand(-1, len(grid_OG), -1, -1)
        squares_TO = squares_TOVG.sum((2, 3))
    else:
        # Inductor sums those of several rows apart from the products, for each output: one small kernel is less.
        squares_TO = written(squares_TG.sum(1, keepdim=True))
    y_TO = forms.reduce_planes(planes_OVG, grid_OG, scale_like.dtype, x_QNTVG, sums_TVG)
    y_TO = y_TO * torch.rsqrt(squares_TO / h_TI.shape[1] + eps)
    return written(with_bias(y_TO, bias_O, norm_I.dtype))


def by_part(x_TI: Tensor, planes_OVG: Sequence[Tensor]) -> Tensor:
    """x_TGQVN: the inputs as the words of `planes_OVG` hold them."""
    parts, groups = planes_OVG[0].shape[1:]
    return x_TI.unflatten(-1, (groups, len(planes_OVG), parts, CODES_PER_WORD))


def prescaled(x_TI: Tensor, planes_OVG: Sequence[Tensor], places_N: Tensor) -> tuple[Tensor, Tensor]:
    """`forms.prescale` as one kernel: the powers of two are a tensor, so one expression covers all nibbles.

    Only what all parts of a group take away together matters, so the sums are those of groups. Inductor fuses a sum
    with the scaling only if both run along the same pieces of memory: a group is one piece, a part is not.
    """
    x_TGQVN = by_part(x_TI.float(), planes_OVG)
    x_QNTVG = (x_TGQVN * places_N).permute(2, 4, 0, 3, 1).contiguous()
    sums_TG = written(x_TGQVN.sum((2, 3, 4)) * 2.0 ** (forms.PRESCALE - 149))
    return written(x_QNTVG), shared_out(sums_TG, planes_OVG)


def shared_out(sums_TG: Tensor, planes_OVG: Sequence[Tensor]) -> Tensor:
    """The same share of its group's sum for each part, [T, V, G]."""
    parts = planes_OVG[0].shape[1]
    return (sums_TG / parts).unsqueeze(1).expand(-1, parts, -1)


def reduce_product(
    x_TI: Tensor,
    planes_OVG: Sequence[Tensor],
    grid_OG: Tensor,
    scale_like: Tensor,
    places_N: Tensor,
    bias_O: Tensor | None,
) -> Tensor:
    """`forms.reduce_planes`."""
    x_QNTVG, sums_TVG = prescaled(x_TI, planes_OVG, places_N)
    y_TO = forms.reduce_planes(planes_OVG, grid_OG, scale_like.dtype, x_QNTVG, sums_TVG)
    return with_bias(y_TO, bias_O, x_TI.dtype)


def dot_product(
    x_TI: Tensor,
    words_OPG: Tensor,
    grid_OG: Tensor,
    scale_like: Tensor,
    exponents_2O: Tensor,
    bias_O: Tensor | None,
) -> Tensor:
    """`forms.dot_planes`."""
    x_NTJ = written(forms.spread(x_TI, grid_OG.shape[1]))
    y_TO = forms.dot_planes(words_OPG, grid_OG, scale_like.dtype, x_NTJ, exponents_2O, bias_O)
    return y_TO.narrow(0, 0, len(x_TI))


def words_product(x_TI: Tensor, words_KGPW: Tensor, grid_KG2W: Tensor, bias_O: Tensor | None) -> Tensor:
    """`cpu_forms.reduce_words`."""
    x_CGPRN, means_CGR = cpu_forms.prescale_words(x_TI, grid_KG2W.shape[1])
    y_TO = cpu_forms.reduce_words(words_KGPW, grid_KG2W, written(x_CGPRN), written(means_CGR)).narrow(0, 0, len(x_TI))
    return with_bias(y_TO, bias_O, x_TI.dtype)


def expand_product(
    x_TI: Tensor, words_OPG: Tensor, grid_OG: Tensor, scale_like: Tensor, exponents_2O: Tensor, bias_O: Tensor | None
) -> Tensor:
    """`arrange.expand` and the library's matmul, for activations of 16 bits."""
    if x_TI.dtype.itemsize != 2:
        return many_rows_product(x_TI, words_OPG, grid_OG, scale_like, bias_O)
    bits_OW = expand(words_OPG, grid_OG, scale_like.dtype, exponents_2O, x_TI.dtype)
    stored_TI = in_storage_order(x_TI, grid_OG.shape[1])
    return linear(stored_TI, bits_OW.view(x_TI.dtype), None if bias_O is None else bias_O.to(x_TI.dtype))


def many_rows_product(x_TI: Tensor, words: Tensor, grid: Tensor, scale_like: Tensor, bias_O: Tensor | None) -> Tensor:
    """`kernel.arranged_product`."""
    return arranged_product(x_TI, Arranged(words, grid), scale_like.dtype, bias_O)


@cache
def sliced_product(group_size: int) -> Form:
    """`kernel.matmul`."""

    def product(
        x_TI: Tensor, qweight_IW: Tensor, qzeros_GW: Tensor, scales_GO: Tensor, bias_O: Tensor | None
    ) -> Tensor:
        return matmul(x_TI, qweight_IW, qzeros_GW, scales_GO, group_size, bias_O)

    return product


def _form_for(device: torch.device, rows: int, groups: int) -> Form:
    if device.type != "cuda":
        return words_product if rows <= MOST_ROWS_ON_CPU else many_rows_product
    if rows > MOST_ROWS_DOTTED:
        return expand_product
    most_reduced = MOST_ROWS_REDUCED_MANY_GROUPS if groups > MANY_GROUPS else MOST_ROWS_REDUCED
    return reduce_product if rows <= most_reduced else dot_product


def is_int4(product: Product) -> bool:
    """Whether it is compiled with the options of the forms, by which Inductor would write a library's matmul itself."""
    return product.form in (reduce_product, dot_product, words_product)


def lower(
    function: Callable[..., Any], is_int4: bool, traced: Callable[..., Arguments] | None = None, **options: Any
) -> Compiled:
    """`function` compiled with Inductor's `options`, and those of the forms if it holds some."""
    if is_int4:
        return forms.compiled(function, tiles.block_sizes, traced, **options)
    # With padding Inductor would time 2 to 7 rows padded to 8, on a second copy of the head.
    return Compiled(function, {"shape_padding": False} | options, traced=traced)


def _alone(layer: Any) -> Product:
    if isinstance(layer, QuantLinear):
        return Product(sliced_product(layer.group_size), (layer.qweight, layer.qzeros, layer.scales, layer.bias))
    return Product(linear, (layer.weight.data, layer.bias))


def _join_dense(layers: Sequence[Any]) -> Product:
    """Afterwards the layers hold views of the joined weight: there is never a second copy of the model."""
    weight_OI = lay_together([layer.weight.data for layer in layers])
    sizes = [layer.out_features for layer in layers]
    for layer, part_OI in zip(layers, weight_OI.split(sizes), strict=True):
        layer.weight = nn.Parameter(part_OI, requires_grad=False)
    return Product(linear, (weight_OI, joined_bias(layers)))


def _join_int4(layers: Sequence[QuantLinear], rows: int) -> Product:
    (words, grid), bias_O = fuse(layers), joined_bias(layers)
    form = _form_for(words.device, rows, grid.shape[1])
    scale_like = torch.empty(0, dtype=layers[0].scale_dtype, device=words.device)
    if form is many_rows_product:
        return Product(form, (words, grid, scale_like, bias_O))
    if form is words_product:
        return Product(form, (words.view(torch.float32), grid, bias_O))
    if form in (dot_product, expand_product):
        return Product(form, (words, grid, scale_like, magic_exponents(words.device, len(words)), bias_O))
    places = [2.0 ** (forms.PRESCALE - place) for _, place in forms.SUBNORMAL_PLACES]
    places_N = torch.tensor(places, device=words.device)
    planes_OVG = forms.planes(words, tiles.parts_for(words.shape[2], words.shape[1], rows))
    return Product(form, (planes_OVG, grid, scale_like, places_N, bias_O))
