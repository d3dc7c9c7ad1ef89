"""One token through a model as functions of tensors, which are compiled once and called for every layer.

`enter` comes before all layers and `finish` after them. A layer is one function, attention included (`whole_layer`), or
two around an attention that is not compiled. The weights are arguments. The length is a number on the device, so no
length ever compiles anything: new keys are written where it points, and attention reads as far as it says.

The cache of a layer is one tensor of slots [U, J, E], so that one kernel writes all that a token brings:

    slots       B x H / J                      X x M                   X x M
    hold        queries of the new token       keys                    values
    slot of     row b, heads h with h // J     text x, position m      text x, position m
    in a slot   place j: head h, h % J = j     key head j              value head j

A cache narrower than the activations holds no queries: these go to attention as they are.

Each row continues a text of its own, or all rows are neighbouring tokens of one text (`speculation.py`).

Shapes, beside the book's: U slots, A all heads (H + 2 J): queries, keys, values; X texts, B or 1.
"""

from collections.abc import Callable
from functools import lru_cache
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from miniawq.compiled import (
    Compiled,
    Form,
    Kept,
    Prepared,
    Product,
    any_length,
    compile_with_forms,
    in_whole_rows,
    multiply,
    own_copy,
    prepare,
    prepare_normed,
    with_rows,
    written,
)
from miniawq.engine.attend import Blocks, block_attention, blocks_of, first_seen
from miniawq.engine.sampling import NOT_A_NUMBER
from miniawq.engine.weights import Layer
from miniawq.model import ACTIVATIONS, LlamaConfig, Rope, narrowed, partners, scaled

PARTS_OF_LOGITS = 256  # of all rows together
# Longer sums than those of parts of attention and of a norm's mean squares become kernels of their own.
SUM_WHERE_READ = {"unroll_reductions_threshold": 65}

Arguments = tuple[Any, ...]


def before_attention(
    config: LlamaConfig, layer: Layer, prepared: Prepared, rope: Rope, position_B: Tensor, cache_UJE: Tensor
) -> Tensor | None:
    """Write the queries, keys and values of the normed residual stream into their slots of the layer's cache.

    Returns the queries [B, H, E] that a narrower cache does not hold.
    """
    qkv_BO = multiply(layer.qkv, prepared)[: layer.rows]
    return rotate_into_cache(config, layer, qkv_BO, rope, position_B, cache_UJE)


def rotate_into_cache(
    config: LlamaConfig, layer: Layer, qkv_BO: Tensor, rope: Rope, position_B: Tensor, cache_UJE: Tensor
) -> Tensor | None:
    """What the product of q, k and v has made, with queries and keys normed and rotated, into its slots.

    All heads alike, because Inductor writes two tensors by two kernels.
    """
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    qk_norm_AE = layer.qk_norm_AE
    new_BAE = qkv_BO.unflatten(1, (-1, size))
    rows, (row_B, head_A, place_E) = len(new_BAE), (torch.arange(n, device=new_BAE.device) for n in new_BAE.shape)
    row_B1, is_value_A = row_B.unsqueeze(1), head_A >= heads + kv_heads
    if qk_norm_AE is not None:
        normed_BAE = normed_heads(config, new_BAE)
        # A norm of a head after turning is one before, but for its weight: turning keeps the mean square.
        normed_BAE = normed_BAE if config.qk_norm == "turned heads" else qk_norm_AE * normed_BAE
        new_BAE = written(torch.where(is_value_A.unsqueeze(1), new_BAE, normed_BAE))
    cos_B1E, sin_B1E, *growth = (table.unsqueeze(1) for table in rope)
    turned_BAE = new_BAE * cos_B1E + partners(new_BAE, config.rope) * sin_B1E
    if growth:
        turned_BAE = torch.where((head_A < heads).unsqueeze(1), turned_BAE * growth[0], turned_BAE)
    if qk_norm_AE is not None and config.qk_norm == "turned heads":
        turned_BAE = qk_norm_AE * turned_BAE
    shared, texts = heads // kv_heads, layer.texts
    room = (len(cache_UJE) - rows * shared) // (2 * texts)
    text_B1 = row_B1 if texts == rows else torch.zeros_like(row_B1)
    place_BA = rows * shared + (text_B1 + texts * is_value_A) * room + position_B.unsqueeze(1)
    slot_BA = torch.where(head_A < heads, row_B1 * shared + head_A // kv_heads, place_BA)
    made_BAE = torch.where(is_value_A.unsqueeze(1), new_BAE, turned_BAE)
    first = 0 if cache_UJE.dtype == made_BAE.dtype else heads
    places = slot_BA[:, first:].unsqueeze(2), (head_A[first:] % kv_heads).unsqueeze(1), place_E
    cache_UJE.index_put_(places, narrowed(made_BAE[:, first:], cache_UJE.dtype))
    return written(made_BAE[:, :heads]) if first else None


def normed_heads(config: LlamaConfig, new_BAE: Tensor) -> Tensor:
    """Heads divided by the roots of their mean squares, or of that of all heads of their kind."""
    if config.qk_norm != "all heads":
        # One weight for each head, which the library's norm does not take.
        return torch.nn.functional.rms_norm(new_BAE, (config.head_dim,), eps=config.rms_norm_eps)
    kinds = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
    parts = new_BAE.split(kinds, dim=1)
    normed = [torch.nn.functional.rms_norm(part, part.shape[1:], eps=config.rms_norm_eps) for part in parts]
    return torch.cat(normed, dim=1)


def parts_of_cache(
    config: LlamaConfig, layer: Layer, cache_UJE: Tensor, q_BHE: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Views q_BHE, unless they are given, keys_XMJE and values_XMJE of a layer's cache."""
    of_queries = layer.rows * config.num_attention_heads // config.num_key_value_heads
    if q_BHE is None:
        q_BHE = cache_UJE[:of_queries].reshape(layer.rows, config.num_attention_heads, config.head_dim)
    keys_XMJE, values_XMJE = cache_UJE[of_queries:].unflatten(0, (2, layer.texts, -1))
    return q_BHE, keys_XMJE, values_XMJE


def after_attention(
    config: LlamaConfig, layer: Layer, following: Layer, h_BD: Tensor, attended_BHE: Tensor
) -> tuple[Tensor, Prepared]:
    """The residual stream after the layer, and the same normed and prepared for `before_attention` of the next layer.

    The kernel that ends this layer does both.
    """
    attended_BI = with_rows(attended_BHE.flatten(1), len(h_BD))
    attended_BD = multiply(layer.o, prepare(layer.o, attended_BI))
    h_BD = added(config, h_BD, attended_BD, layer.after_attention_D)
    normed = entering(config, layer.gate_up, h_BD, layer.before_mlp_D)
    gate_BF, up_BF = multiply(layer.gate_up, normed).chunk(2, dim=-1)
    fed_BD = multiply(layer.down, prepare(layer.down, ACTIVATIONS[config.hidden_act](gate_BF) * up_BF))
    h_BD = added(config, h_BD, fed_BD, layer.after_mlp_D)
    return h_BD, entering(config, following.qkv, h_BD, following.before_attention_D)


def entering(config: LlamaConfig, products: tuple[Product, ...], h_BD: Tensor, norm_D: Tensor | None) -> Prepared:
    """The residual stream, after the norm if the family has one there, prepared for products."""
    return prepare(products, h_BD) if norm_D is None else prepare_normed(products, h_BD, norm_D, config.rms_norm_eps)


def added(config: LlamaConfig, h_BD: Tensor, y_BD: Tensor, norm_D: Tensor | None) -> Tensor:
    """The residual stream and what attention or MLP adds to it, after the norm if the family has one there."""
    if norm_D is not None:
        y_BD = torch.nn.functional.rms_norm(y_BD, norm_D.shape, norm_D, config.rms_norm_eps)
    return written(h_BD + scaled(y_BD, config.residual_multiplier))


def whole_layer(
    config: LlamaConfig,
    layer: Layer,
    following: Layer,
    h_BD: Tensor,
    prepared: Prepared,
    rope: Rope,
    cache_UJE: Tensor,
    blocks: Blocks,
) -> tuple[Tensor, Prepared]:
    """`before_attention`, attention by blocks and `after_attention`."""
    q_BHE = before_attention(config, layer, prepared, rope, blocks.position_B, cache_UJE)
    parts = parts_of_cache(config, layer, cache_UJE, q_BHE)
    attended_BHE = block_attention(*parts, blocks, config.attention_multiplier)
    return after_attention(config, layer, following, h_BD, attended_BHE)


def finish(
    config: LlamaConfig, head: tuple[Product, ...], norm_D: Tensor, is_greedy: bool, h_BD: Tensor
) -> tuple[Tensor, Tensor | None]:
    """logits_BV, and the most probable ids_B if that is what is wanted."""
    logits_BV = multiply(head, prepare_normed(head, h_BD, norm_D, config.rms_norm_eps))
    logits_BV = scaled(logits_BV, 1 / config.logits_scaling)
    return logits_BV, most_probable(logits_BV) if is_greedy else None


def most_probable(logits_BV: Tensor) -> Tensor:
    """What `sampling.sample` chooses without a temperature: the first of the largest, NOT_A_NUMBER if there is a NaN.

    In two steps, because Inductor does not cut an argmax into parts and one program would read all logits. The largest
    of each part, beside its place, tells of a NaN too.
    """
    parts = gcd(logits_BV.shape[1], max(PARTS_OF_LOGITS // 16, PARTS_OF_LOGITS // len(logits_BV)))
    parts_of_logits = logits_BV.float().unflatten(1, (parts, -1))
    best, place = written(parts_of_logits.amax(-1)), written(parts_of_logits.argmax(-1))
    part_B1 = best.argmax(-1, keepdim=True)
    ids_B = (part_B1 * parts_of_logits.shape[2] + place.gather(1, part_B1)).squeeze(1)
    return ids_B.masked_fill(best.amax(-1).isnan(), NOT_A_NUMBER)


class Entry(NamedTuple):
    """What layers share in one token, `ropes` in the order of the tables, `seen` by their window, and the first layer's
    activations.
    """

    h_BD: Tensor
    prepared: Prepared
    ropes: tuple[Rope, ...]
    seen: dict[int | None, Any]


def enter(
    config: LlamaConfig,
    first: Layer,
    by_blocks: bool,
    embedding_VD: Tensor,
    tables: tuple[Rope, ...],
    ids_B: Tensor,
    position_B: Tensor,
    padding_B: Tensor,
) -> Entry:
    """The embedding of each id, the rows of the rotary tables at its position, and what each window shows: blocks, or
    first positions.

    A row whose logits held a NaN has the id -1; it counts as 0, and its result is not used.
    """
    starts = {window: first_seen(position_B, padding_B, window) for window in dict.fromkeys(config.layer_windows)}
    own_B = (position_B - padding_B).clamp_min(0)
    room, dtype = len(tables[0][0]), tables[0][0].dtype
    embedded_BD = scaled(embedding(ids_B.clamp_min(0), embedding_VD).to(dtype), config.embedding_multiplier)
    h_BD = written(in_whole_rows(first.qkv, embedded_BD))
    return Entry(
        h_BD,
        entering(config, first.qkv, h_BD, first.before_attention_D),
        tuple(tuple(table[own_B] for table in rope) for rope in tables),
        {window: blocks_of(position_B, first_B, room) for window, first_B in starts.items()} if by_blocks else starts,
    )


# Nothing compiled depends on how many positions there are.
OF_ANY_LENGTH: dict[Callable[..., Any], Callable[..., Arguments]] = {
    enter: lambda config, first, by_blocks, embedding_VD, tables, *others: (
        config, first, by_blocks, embedding_VD, tuple(tuple(map(any_length, rope)) for rope in tables), *others
    ),
    before_attention: lambda *others_and_cache: (*others_and_cache[:-1], any_length(others_and_cache[-1])),
    whole_layer: lambda *others: (
        *others[:-2], any_length(others[-2]), others[-1]._replace(block_index=any_length(others[-1].block_index, 3))
    ),
}  # fmt: skip


@lru_cache(maxsize=64)
def compiled_function(
    function: Callable[..., Any], forms: frozenset[Form], config: LlamaConfig, rows: int, path: Path | None
) -> Compiled | Kept:
    """`function` compiled for models of one shape and a number of rows, once in a process, and kept at `path`."""
    options: dict[str, Any] = SUM_WHERE_READ if function is whole_layer else {}
    made = compile_with_forms(own_copy(function), forms, OF_ANY_LENGTH.get(function), **options)
    return made if path is None else Kept(made, path)


class Functions(NamedTuple):
    """The functions of a token, compiled or not. `layer` is `before`, attention by blocks and `after` in one."""

    enter: Callable[..., Any]
    before: Callable[..., Any]
    after: Callable[..., Any]
    layer: Callable[..., Any]
    finish: Callable[..., Any]


UNCOMPILED = Functions(enter, before_attention, after_attention, whole_layer, finish)
