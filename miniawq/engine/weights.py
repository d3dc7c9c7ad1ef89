"""The weights of a model as a compiled step holds them: matrices that read the same input lie together."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from miniawq.compiled import Form, Prepacked, Product, dense_product, int4_product, join, joined, lay_together
from miniawq.kernel import QuantLinear, joined_bias

Accepts = Callable[[Form], bool]


class Weights(NamedTuple):
    """The weights of linear layers that read the same input, as one where they can lie together, with their biases."""

    parts: tuple[tuple[Prepacked | Tensor, Tensor | None], ...]

    @classmethod
    def of(cls, *layers: Any) -> "Weights":
        """Afterwards the layers hold views of the joined weight: there is never a second copy of the model."""
        if len(layers) > 1 and (whole := _join(layers)) is not None:
            return cls(((whole, joined_bias(layers)),))
        return cls(tuple((_weight_of(layer), layer.bias) for layer in layers))

    def products(self, rows: int, dtype: torch.dtype, accepts: Accepts) -> tuple[Product, ...]:
        """How so many rows of activations are multiplied with them."""
        return tuple(
            int4_product(weight, bias_O, rows, dtype, accepts)
            if isinstance(weight, Prepacked)
            else dense_product(weight, bias_O, rows, dtype, accepts)
            for weight, bias_O in self.parts
        )


def _weight_of(layer: Any) -> Prepacked | Tensor:
    if isinstance(layer, nn.Linear):
        return layer.weight.data
    weight = layer.prepare_to_compile().prepacked
    assert isinstance(weight, Prepacked)
    return weight


def _join(layers: Sequence[Any]) -> Prepacked | Tensor | None:
    """The weights of layers as one; None where they differ in kind, dtype, group size or block."""
    weights = [_weight_of(layer) for layer in layers]
    packed = [weight for weight in weights if isinstance(weight, Prepacked)]
    dense = [weight for weight in weights if isinstance(weight, Tensor)]
    if not packed and len({weight.dtype for weight in dense}) == 1:
        whole_OI = lay_together(dense)
        sizes = [layer.out_features for layer in layers]
        for layer, part_OI in zip(layers, whole_OI.split(sizes), strict=True):
            layer.weight = nn.Parameter(part_OI, requires_grad=False)
        return whole_OI
    if dense or len({(weight.lanes, weight.group_size, weight.scale_dtype) for weight in packed}) != 1:
        return None
    for layer, part in zip(layers, join(packed), strict=True):
        layer.prepacked = part
    return joined([layer.prepacked for layer in layers])


def can_step(model: nn.Module) -> bool:
    """Whether a compiled step can hold all weights: not AWQ words that their device cannot prepack."""
    packed = [module.prepare() for module in model.modules() if isinstance(module, QuantLinear)]
    return all(layer.prepacked for layer in packed)


class LayerWeights(NamedTuple):
    """The weights of one layer; matrices that read the same input lie together."""

    input_norm_D: Tensor
    qkv: Weights
    qk_norm_AE: Tensor | None
    o: Weights
    post_norm_D: Tensor
    gate_up: Weights
    down: Weights

    @classmethod
    def of(cls, block: Any) -> "LayerWeights":
        """The weights of a DecoderBlock, whose own are views of these from now on."""
        attn, mlp = block.self_attn, block.mlp
        return cls(
            input_norm_D=block.input_layernorm.weight.data,
            qkv=Weights.of(attn.q_proj, attn.k_proj, attn.v_proj),
            qk_norm_AE=_norms_of_heads(attn),
            o=Weights.of(attn.o_proj),
            post_norm_D=block.post_attention_layernorm.weight.data,
            gate_up=Weights.of(mlp.gate_proj, mlp.up_proj),
            down=Weights.of(mlp.down_proj),
        )

    def for_rows(self, rows: int, dtype: torch.dtype, accepts: Accepts) -> "Layer":
        """The same with its products chosen."""
        chosen: dict[str, Any] = {
            name: value.products(rows, dtype, accepts) if isinstance(value, Weights) else value
            for name, value in self._asdict().items()
        }
        return Layer(**chosen, rows=rows)


class Layer(NamedTuple):
    """One layer as the functions of a token take it, for so many rows."""

    input_norm_D: Tensor
    qkv: tuple[Product, ...]
    qk_norm_AE: Tensor | None
    o: tuple[Product, ...]
    post_norm_D: Tensor
    gate_up: tuple[Product, ...]
    down: tuple[Product, ...]
    rows: int

    @property
    def forms(self) -> frozenset[Form]:
        """All forms that multiply in it."""
        return frozenset(product.form for product in (*self.qkv, *self.o, *self.gate_up, *self.down))


def _norms_of_heads(attn: Any) -> Tensor | None:
    """The weights of a layer's norms of queries and keys, one row a head; those of value heads are not used."""
    if isinstance(attn.q_norm, nn.Identity):
        return None
    norms = (attn.q_norm.weight.data, attn.k_norm.weight.data, attn.k_norm.weight.data)
    linears = (attn.q_proj, attn.k_proj, attn.v_proj)
    return torch.cat(
        [norm_E.expand(linear.out_features // attn.head_dim, -1) for norm_E, linear in zip(norms, linears, strict=True)]
    )
