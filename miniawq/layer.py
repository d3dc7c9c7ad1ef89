"""One token through a model as functions of tensors, to be compiled once and called for every layer.

A layer is one function, attention included, or two around an attention that is not compiled (`attend.py`); `enter`
comes before all layers and `finish` behind them. The weights are arguments. The length is a number on the device, so no
length ever compiles anything: new keys are written where it points, and attention reads as far as it says.

Shapes: B batch, M positions in the cache, S slots of a layer's queries, keys and values, D model width, F feed-forward
width, V vocabulary, C parts of it, H query heads, J key/value heads, K all heads (H + 2 J), E size of one head.
"""

from collections.abc import Callable
from functools import cache
from math import gcd
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, silu

from miniawq.attend import Blocks, Look, block_attention, first_seen
from miniawq.compiling import Arguments, Kept, any_length
from miniawq.forms import written
from miniawq.model import LlamaConfig
from miniawq.products import Form, Prepared, Product, lower, multiply, prepare, prepare_normed, products_of
from miniawq.rope import Rope
from miniawq.sampling import NOT_A_NUMBER

PARTS_OF_LOGITS = 256  # of all rows together
# Longer sums than those of parts of attention and of a norm's means become kernels of their own.
SUM_WHERE_READ = {"unroll_reductions_threshold": 65}


class Layer(NamedTuple):
    """The weights of one layer; matrices that read the same input lie together."""

    input_norm_D: Tensor
    qkv: tuple[Product, ...]
    qk_norm_KE: Tensor | None
    o: tuple[Product, ...]
    post_norm_D: Tensor
    gate_up: tuple[Product, ...]
    down: tuple[Product, ...]

    @classmethod
    def of(cls, block: Any, rows: int) -> "Layer":
        """The weights of a DecoderBlock, whose own are views of these from now on."""
        attn, mlp = block.self_attn, block.mlp
        return cls(
            input_norm_D=block.input_layernorm.weight.data,
            qkv=products_of((attn.q_proj, attn.k_proj, attn.v_proj), rows),
            qk_norm_KE=_norms_of_heads(attn),
            o=products_of((attn.o_proj,), rows),
            post_norm_D=block.post_attention_layernorm.weight.data,
            gate_up=products_of((mlp.gate_proj, mlp.up_proj), rows),
            down=products_of((mlp.down_proj,), rows),
        )


def _norms_of_heads(attn: Any) -> Tensor | None:
    """The weights of a layer's norms of queries and keys, for each head; values have none that counts."""
    if isinstance(attn.q_norm, nn.Identity):
        return None
    norms = (attn.q_norm.weight.data, attn.k_norm.weight.data, attn.k_norm.weight.data)
    linears = (attn.q_proj, attn.k_proj, attn.v_proj)
    return torch.cat(
        [norm_E.expand(linear.out_features // attn.head_dim, -1) for norm_E, linear in zip(norms, linears, strict=True)]
    )


def before_attention(
    config: LlamaConfig, layer: Layer, prepared: Prepared, rope: Rope, position_1: Tensor, cache_SJE: Tensor
) -> None:
    """Queries, keys and values of the normed residual stream, into their slots of the layer's cache (`parts_of`)."""
    qkv_BO = multiply(layer.qkv, prepared)
    rotate_into_cache(config, layer.qk_norm_KE, qkv_BO, rope, position_1, cache_SJE)


def rotate_into_cache(
    config: LlamaConfig, qk_norm_KE: Tensor | None, qkv_BO: Tensor, rope: Rope, position_1: Tensor, cache_SJE: Tensor
) -> None:
    """What the product of q, k and v has made, with queries and keys normed and rotated, into its slots.

    All heads alike, because Inductor writes two tensors by two kernels.
    """
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    new_BKE = qkv_BO.unflatten(1, (-1, size))
    rows, (row_B, head_K, place_E) = len(new_BKE), (torch.arange(n, device=new_BKE.device) for n in new_BKE.shape)
    row_B1, is_value_K = row_B.unsqueeze(1), head_K >= heads + kv_heads
    if qk_norm_KE is not None:
        # One weight for each head, which the library's norm does not take.
        normed_BKE = qk_norm_KE * torch.nn.functional.rms_norm(new_BKE, (size,), eps=config.rms_norm_eps)
        new_BKE = written(torch.where(is_value_K.unsqueeze(1), new_BKE, normed_BKE))
    cos_1E, sin_1E = rope
    # `apply_rope`: the partner of each channel, and whether it is taken away.
    partner_BKE = new_BKE.unflatten(2, (2, -1)).flip(2).flatten(2)
    turned_BKE = new_BKE * cos_1E + partner_BKE * torch.where(place_E < size // 2, -sin_1E, sin_1E)
    shared = heads // kv_heads
    room = (len(cache_SJE) - rows * shared) // (2 * rows)
    behind_BK = rows * shared + (row_B1 + rows * is_value_K) * room + position_1
    slot_BK = torch.where(head_K < heads, row_B1 * shared + head_K // kv_heads, behind_BK)
    places = slot_BK.unsqueeze(2), (head_K % kv_heads).unsqueeze(1), place_E
    cache_SJE.index_put_(places, torch.where(is_value_K.unsqueeze(1), new_BKE, turned_BKE))


def parts_of(config: LlamaConfig, rows: int, cache_SJE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views q_BHE, keys_BMJE, values_BMJE of a layer's cache: first the last token's queries, J heads a slot."""
    of_queries = rows * config.num_attention_heads // config.num_key_value_heads
    q_BHE = cache_SJE[:of_queries].reshape(rows, config.num_attention_heads, config.head_dim)
    keys_BMJE, values_BMJE = cache_SJE[of_queries:].unflatten(0, (2, rows, -1))
    return q_BHE, keys_BMJE, values_BMJE


def after_attention(
    config: LlamaConfig, layer: Layer, following: Layer, h_BD: Tensor, attended_BHE: Tensor
) -> tuple[Tensor, Prepared]:
    """The residual stream behind the layer, and normed and prepared for `before_attention` of the following one.

    Here, because the kernel that ends this layer can do both.
    """
    h_BD = written(h_BD + multiply(layer.o, prepare(layer.o, attended_BHE.flatten(1))))
    normed = prepare_normed(layer.gate_up, h_BD, layer.post_norm_D, config.rms_norm_eps)
    gate_BF, up_BF = multiply(layer.gate_up, normed).chunk(2, dim=-1)
    h_BD = written(h_BD + multiply(layer.down, prepare(layer.down, silu(gate_BF) * up_BF)))
    return h_BD, prepare_normed(following.qkv, h_BD, following.input_norm_D, config.rms_norm_eps)


def whole_layer(
    config: LlamaConfig,
    layer: Layer,
    following: Layer,
    h_BD: Tensor,
    prepared: Prepared,
    rope: Rope,
    cache_SJE: Tensor,
    blocks: Blocks,
) -> tuple[Tensor, Prepared]:
    """`before_attention`, attention by blocks and `after_attention`."""
    before_attention(config, layer, prepared, rope, blocks.position_1, cache_SJE)
    attended_BHE = block_attention(*parts_of(config, len(h_BD), cache_SJE), blocks)
    return after_attention(config, layer, following, h_BD, attended_BHE)


def finish(
    config: LlamaConfig, head: tuple[Product, ...], norm_D: Tensor, is_greedy: bool, h_BD: Tensor
) -> tuple[Tensor, Tensor | None]:
    """logits_BV, and the most probable ids_B if that is what is wanted."""
    logits_BV = multiply(head, prepare_normed(head, h_BD, norm_D, config.rms_norm_eps))
    return logits_BV, most_probable(logits_BV) if is_greedy else None


def most_probable(logits_BV: Tensor) -> Tensor:
    """What `sampling.sample` chooses without a temperature: the first of the largest, NOT_A_NUMBER if there is a NaN.

    In two steps, because Inductor does not cut an argmax into parts and one program would read all logits. The largest
    of each part, beside its place, tells of a NaN too.
    """
    parts = gcd(logits_BV.shape[1], max(PARTS_OF_LOGITS // 16, PARTS_OF_LOGITS // len(logits_BV)))
    logits_BCV = logits_BV.float().unflatten(1, (parts, -1))
    best_BC, place_BC = written(logits_BCV.amax(-1)), written(logits_BCV.argmax(-1))
    part_B1 = best_BC.argmax(-1, keepdim=True)
    ids_B = (part_B1 * logits_BCV.shape[2] + place_BC.gather(1, part_B1)).squeeze(1)
    return ids_B.masked_fill(best_BC.amax(-1).isnan(), NOT_A_NUMBER)


class Entry(NamedTuple):
    """What all layers share in one token, `seen` by their window, and the first layer's activations."""

    h_BD: Tensor
    prepared: Prepared
    rope: Rope
    seen: dict[int | None, Any]


def enter(
    config: LlamaConfig,
    first: Layer,
    look: Look,
    embedding_VD: Tensor,
    tables_ME: Rope,
    ids_B: Tensor,
    position_1: Tensor,
    padding_B: Tensor,
) -> Entry:
    """The embedding of each id, the rotary tables of the position, and what `look` makes of what each window shows.

    The id of a row that has no number (-1) is taken for 0, since nobody looks at such rows.
    """
    cos_ME, sin_ME = tables_ME
    starts = {window: first_seen(position_1, padding_B, window) for window in dict.fromkeys(config.layer_windows)}
    h_BD = written(embedding(ids_B.clamp_min(0), embedding_VD).to(first.input_norm_D.dtype))
    return Entry(
        h_BD,
        prepare_normed(first.qkv, h_BD, first.input_norm_D, config.rms_norm_eps),
        (cos_ME[position_1], sin_ME[position_1]),
        {window: look(position_1, first_B, len(cos_ME)) for window, first_B in starts.items()},
    )


# Nothing compiled depends on how many positions there are.
OF_ANY_LENGTH: dict[Callable[..., Any], Callable[..., Arguments]] = {
    enter: lambda config, first, look, embedding_VD, tables_ME, *others: (
        config, first, look, embedding_VD, tuple(map(any_length, tables_ME)), *others
    ),
    before_attention: lambda *others_and_cache: (*others_and_cache[:-1], any_length(others_and_cache[-1])),
    whole_layer: lambda *others: (
        *others[:-2], any_length(others[-2]), others[-1]._replace(index_B11N=any_length(others[-1].index_B11N, 3))
    ),
}  # fmt: skip


@cache
def compiled(
    function: Callable[..., Any], forms_in_it: frozenset[Form], config: LlamaConfig, rows: int, path: Path | None
) -> Callable[..., Any]:
    """`function` compiled for models of one shape and a number of rows, once in a process, and kept at `path`.

    Dynamo keeps what it has compiled with the code object, up to a limit, and tries one after the other. A copy of the
    code has a list of its own, which other shapes do not fill.
    """
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    options: dict[str, Any] = SUM_WHERE_READ if function is whole_layer else {}
    lowered = lower(own, forms_in_it, OF_ANY_LENGTH.get(function), **options)
    return lowered if path is None else Kept(lowered, path)


class Functions(NamedTuple):
    """What a token is computed by, compiled or not. `layer` is `before`, attention by blocks and `after` in one."""

    enter: Callable[..., Any]
    before: Callable[..., Any]
    after: Callable[..., Any]
    layer: Callable[..., Any]
    finish: Callable[..., Any]


UNCOMPILED = Functions(enter, before_attention, after_attention, whole_layer, finish)
