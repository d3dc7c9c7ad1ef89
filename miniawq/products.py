"""Linear layers as pure functions of tensors, for code that is compiled once and given each layer's weights in turn.

Shapes: T rows, I input features, O output features.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from miniawq.kernel import QuantLinear, matmul

Form = Callable[..., Tensor]


class Product(NamedTuple):
    """form(x_TI, *tensors) -> y_TO. Products of the same form and shapes differ in their tensors only."""

    form: Form
    tensors: tuple[Tensor | None, ...]

    @property
    def nbytes(self) -> int:
        """What one call reads."""
        return sum(tensor.nbytes for tensor in self.tensors if tensor is not None)


@cache
def int4_form(group_size: int) -> Form:
    """The INT4 product of AutoAWQ words."""

    def product(
        x_TI: Tensor, qweight_IW: Tensor, qzeros_GW: Tensor, scales_GO: Tensor, bias_O: Tensor | None
    ) -> Tensor:
        return matmul(x_TI, qweight_IW, qzeros_GW, scales_GO, group_size, bias_O)

    return product


def products_of(layers: Sequence[nn.Module], rows: int) -> tuple[Product, ...]:
    """Layers that read the same input, as one product of all their outputs where their weights can lie together.

    Afterwards the layers hold views of the joined weights: there is never a second copy of the model.
    """
    if all(type(layer) is nn.Linear for layer in layers):
        return (_join_dense(layers),)
    return tuple(_product_of(layer) for layer in layers)


def _product_of(layer: nn.Module) -> Product:
    if isinstance(layer, QuantLinear):
        return Product(int4_form(layer.group_size), (layer.qweight, layer.qzeros, layer.scales, layer.bias))
    assert isinstance(layer, nn.Linear), type(layer)
    return Product(linear, (layer.weight, layer.bias))


def _join_dense(layers: Sequence[Any]) -> Product:
    weight_OI = lay_together([layer.weight.data for layer in layers])
    sizes = [layer.out_features for layer in layers]
    for layer, part_OI in zip(layers, weight_OI.split(sizes), strict=True):
        layer.weight = nn.Parameter(part_OI, requires_grad=False)
    has_bias = layers[0].bias is not None
    return Product(linear, (weight_OI, torch.cat([layer.bias.data for layer in layers]) if has_bias else None))


def lay_together(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts as one tensor: the memory they are in if they already lie behind one another, or a copy."""
    first = parts[0]
    ends = [part.data_ptr() + part.nbytes for part in parts]
    in_order = [part.data_ptr() for part in parts[1:]] == ends[:-1]
    if in_order and all(part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for part in parts):
        return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())
    return torch.cat(list(parts))


def multiply(products: Sequence[Product], x_TI: Tensor) -> Tensor:
    """y_TO of all products, side by side."""
    parts = [product.form(x_TI, *product.tensors) for product in products]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
