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

    before_attention_D: Tensor | None
    qkv: Weights
    qk_norm_AE: Tensor | None
    o: Weights
    after_attention_D: Tensor | None
    before_mlp_D: Tensor | None
    gate_up: Weights
    down: Weights
    after_mlp_D: Tensor | None

    @classmethod
    def of(cls, block: Any) -> "LayerWeights":
        """The weights of a DecoderBlock, whose own are views of these from now on."""
        attn, names = block.self_attn, block.config.names
        mlp = getattr(block, names.mlp)
        return cls(
            before_attention_D=_norm(block, names.before_attention),
            qkv=Weights.of(*(getattr(attn, name) for name in names.qkv)),
            qk_norm_AE=_norms_of_heads(attn),
            o=Weights.of(attn.o_proj),
            after_attention_D=_norm(block, names.after_attention),
            before_mlp_D=_norm(block, names.before_mlp),
            gate_up=Weights.of(*(getattr(mlp, name) for name in names.gate_up)),
            down=Weights.of(getattr(mlp, names.down)),
            after_mlp_D=_norm(block, names.after_mlp),
        )

    def for_rows(self, rows: int, texts: int, dtype: torch.dtype, accepts: Accepts) -> "Layer":
        """The same with its products chosen, for rows that continue so many texts."""
        chosen: dict[str, Any] = {
            name: value.products(rows, dtype, accepts) if isinstance(value, Weights) else value
            for name, value in self._asdict().items()
        }
        return Layer(**chosen, rows=rows, texts=texts)


class Layer(NamedTuple):
    """One layer as the functions of a token take it, for so many rows."""

    before_attention_D: Tensor | None
    qkv: tuple[Product, ...]
    qk_norm_AE: Tensor | None
    o: tuple[Product, ...]
    after_attention_D: Tensor | None
    before_mlp_D: Tensor | None
    gate_up: tuple[Product, ...]
    down: tuple[Product, ...]
    after_mlp_D: Tensor | None
    rows: int
    texts: int

    @property
    def forms(self) -> frozenset[Form]:
        """All forms that multiply in it."""
        return frozenset(product.form for product in (*self.qkv, *self.o, *self.gate_up, *self.down))


def _norm(block: Any, name: str | None) -> Tensor | None:
    """The gain of a norm of a block; None where the family has none."""
    return None if name is None else getattr(block, name).gain.data


def _norms_of_heads(attn: Any) -> Tensor | None:
    """The gains of a layer's norms of queries and keys, one row a head; those of value heads are not used."""
    config = attn.config
    if config.qk_norm == "none":
        return None
    queries, keys = (getattr(attn, name).gain.data for name in (config.names.q_norm, config.names.k_norm))
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    counted = (queries, heads), (keys, kv_heads), (keys, kv_heads)
    return torch.cat([norm.view(-1, config.head_dim).expand(count, -1) for norm, count in counted])
