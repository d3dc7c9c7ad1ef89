"""One more token for every row: what `model.py` computes for one position, by few compiled functions in fixed buffers.

A layer is a function of tensors, attention included, or two around an attention that is not compiled (`attend.py`).
The weights are arguments, so each is compiled once and called for every layer. The length is a number on the device, so
no length ever compiles anything: new keys are written where it points, and attention reads as far as it says. On CUDA
the launches of a whole token are recorded once, in a CUDA graph, and replayed for each token; on a CPU the same
functions run one by one.

Shapes: B batch, M positions in the cache, S slots of a layer's queries, keys and values, D model width, F feed-forward
width, V vocabulary, C parts of it, H query heads, J key/value heads, E size of one head.
"""

import copy
import logging
import time
from collections.abc import Callable
from functools import cache
from math import gcd
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, silu

from miniawq import forms
from miniawq.attend import (
    Blocks,
    Look,
    Spans,
    block_attention,
    blocks_of,
    first_position,
    first_seen,
    flash_attention,
    looking_on,
    mask_of,
)
from miniawq.compiling import Arguments, Kept, any_length
from miniawq.errors import InvalidInput
from miniawq.forms import written
from miniawq.model import KVCache, Llama, LlamaConfig, attention, attention_mask
from miniawq.products import (
    REDUCE,
    Prepared,
    Product,
    is_compiled_as_form,
    lower,
    multiply,
    prepare,
    prepare_normed,
    products_of,
)
from miniawq.rope import Rope, rope_tables
from miniawq.sampling import NOT_A_NUMBER, History, Sampling, sample

log = logging.getLogger(__name__)

# In the first call on a stream libraries allocate what they keep.
WARM_UP_CALLS = 2
SPARE_ROOM = 32
SMALLEST_BUCKET = 256
GREEDY = Sampling()
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
    h_BD = written(embedding(ids_B.clamp_min(0), embedding_VD))
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
    function: Callable[..., Any], has_forms: bool, config: LlamaConfig, rows: int, path: Path | None
) -> Callable[..., Any]:
    """`function` compiled for models of one shape and a number of rows, once in a process, and kept at `path`.

    Dynamo keeps what it has compiled with the code object, up to a limit, and tries one after the other. A copy of the
    code has a list of its own, which other shapes do not fill.
    """
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    options: dict[str, Any] = SUM_WHERE_READ if function is whole_layer else {}
    lowered = lower(own, has_forms, OF_ANY_LENGTH.get(function), **options)
    return lowered if path is None else Kept(lowered, path)


class Functions(NamedTuple):
    """What a token is computed by, compiled or not. `layer` is `before`, attention by blocks and `after` in one."""

    enter: Callable[..., Any]
    before: Callable[..., Any]
    after: Callable[..., Any]
    layer: Callable[..., Any]
    finish: Callable[..., Any]


class DecodeStep:
    """`step(ids_B) -> ids_B` feeds one token to every row and chooses the next, all on the device.

    It owns what a recorded step must own: the cache, the history, the random numbers. A text starts with `begin`; its
    prompt goes through the model itself, into `cache`; the first `step` compiles, unless `compile` has been called.
    """

    def __init__(
        self, model: Llama, batch: int, max_seq_len: int, sampling: Sampling | None = None, *, compile_: bool = True
    ) -> None:
        self.config, self.sampling = model.config, sampling or Sampling()
        like = model.model.embed_tokens.weight
        self.device = like.device
        # What is made in inference mode could not be used outside.
        with torch.inference_mode(False), torch.no_grad():
            self.layers = [Layer.of(block, batch) for block in model.model.layers]
            self.head = products_of((model.lm_head,), batch)
            self.norm_D, self.embedding_VD = model.model.norm.weight.data, like.data
        self.look = looking_on(like.device, self.config, like.dtype, compile_)
        self.functions = Functions(enter, before_attention, after_attention, whole_layer, finish)
        self.is_ready = not compile_
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.build_seconds = 0.0
        self._make_room(batch, max_seq_len)

    def _make_room(self, batch: int, max_seq_len: int) -> None:
        """All that belongs to the text."""
        like = self.embedding_VD
        with torch.inference_mode(False), torch.no_grad():
            positions_M = torch.arange(max_seq_len, device=like.device)
            self.tables_ME = rope_tables(self.config.rope, positions_M, max_seq_len, like.dtype)
            self.cache = KVCache(self.config, batch, max_seq_len, device="meta", dtype=like.dtype)
            layers, _, _, kv_heads, size = self.cache.keys_NBMJE.shape
            of_queries = batch * self.config.num_attention_heads // kv_heads
            shape = (layers, of_queries + 2 * batch * max_seq_len, kv_heads, size)
            cache_NSJE = torch.zeros(shape, device=like.device, dtype=like.dtype)
            kept_N2BMJE = cache_NSJE[:, of_queries:].unflatten(1, (2, batch, max_seq_len))
            self.cache.keys_NBMJE, self.cache.values_NBMJE = kept_N2BMJE.unbind(1)
            self.ids_B = torch.zeros(batch, dtype=torch.long, device=like.device)
            self.padding_B, self.position_1 = torch.zeros_like(self.ids_B), torch.zeros_like(self.ids_B[:1])
            has_history = self.sampling.has_penalties
            self.history = History.of_prompt(self.ids_B[:, None], self.config.vocab_size) if has_history else None
        self.caches = cache_NSJE.unbind()
        self.generator = torch.Generator(like.device)

    @torch.inference_mode()
    def compile(self, directory: Path | None = None) -> None:
        """Compile what a token needs by computing one for a text that nobody reads.

        This step's own buffers are left alone: another thread may let the model write a text into them meanwhile. With
        a directory, which must be of steps like this one, what is there is taken, and the rest is left there.
        """
        started = time.perf_counter()
        first, batch = self.layers[0], len(self.ids_B)
        products = (*first.qkv, *first.o, *first.gate_up, *first.down)
        if self.device.type == "cuda" and any(product.form is REDUCE for product in products):
            forms.prove(self.device)
        has_forms = {
            enter: any(map(is_compiled_as_form, first.qkv)),
            before_attention: any(map(is_compiled_as_form, first.qkv)),
            after_attention: any(map(is_compiled_as_form, first.down)),
            whole_layer: any(map(is_compiled_as_form, (*first.qkv, *first.down))),
            finish: any(map(is_compiled_as_form, self.head)),
        }
        spare = copy.copy(self)
        spare._make_room(batch, SPARE_ROOM)
        choice = "greedy" if self.sampling == GREEDY else "any"
        # On CUDA loading what was kept takes longer than tracing it again (docs/performance.md).
        keeps = directory if self.device.type == "cpu" else None
        paths = {f: keeps and keeps / f"{f.__name__}-{choice}.aot" for f in self.functions}
        spare.functions = Functions(*(compiled(f, has_forms[f], self.config, batch, paths[f]) for f in self.functions))
        spare._token(1)
        self.functions, self.is_ready = spare.functions, True
        self.build_seconds += time.perf_counter() - started

    def begin(self, tokens_BL: Tensor, padding_B: Tensor | None = None, seed: int | None = None) -> None:
        """Forget the last text. `tokens_BL` counts for penalties only: run it into `cache` afterwards."""
        self.cache.length, self.cache.padding_B = 0, padding_B
        self.padding_B.copy_(torch.zeros_like(self.padding_B) if padding_B is None else padding_B)
        self.generator.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
        if self.history is not None:
            fresh = History.of_prompt(tokens_BL, self.config.vocab_size, padding_B)
            for kept, new in zip(self.history, fresh, strict=True):
                kept.copy_(new)

    @torch.inference_mode()
    def step(self, ids_B: Tensor) -> Tensor:
        """Append ids_B to the rows; the ids behind them, NOT_A_NUMBER for a row whose logits hold a NaN."""
        length, room = self.cache.length, self.cache.max_seq_len
        if length >= room:
            raise InvalidInput("the cache is full", f"it has room for {room} positions", "make a DecodeStep with more")
        if not self.is_ready:
            self.compile()
        self.position_1.fill_(length)
        if self.device.type == "cuda":
            graph = self._graph(self._end_of_reading(length))
            self.ids_B.copy_(ids_B)
            graph.replay()
        else:
            self.ids_B.copy_(ids_B)
            self._token(length + 1)
        self.cache.length += 1
        return self.ids_B.clone()

    @property
    def reads_by_length(self) -> bool:
        """Whether attention finds on the device how far to read."""
        return self.look is not first_position

    def _end_of_reading(self, length: int) -> int:
        """How far a graph can read: everywhere if it goes by lengths, else to the next power of two."""
        room = self.cache.max_seq_len
        return room if self.reads_by_length else min(room, max(SMALLEST_BUCKET, 1 << length.bit_length()))

    def _token(self, end: int) -> None:
        """From `ids_B` to the next `ids_B`, by nothing that a CUDA graph cannot record."""
        config, position_1 = self.config, self.position_1
        entry = self.functions.enter(
            config, self.layers[0], self.look, self.embedding_VD, self.tables_ME, self.ids_B, position_1, self.padding_B
        )
        h_BD, prepared = entry.h_BD, entry.prepared
        seen: dict[int | None, Any] = entry.seen if self.reads_by_length else self._masks(end, entry.seen)
        following = (*self.layers[1:], self.layers[-1])  # What the last one prepares nobody reads.
        for layer, next_layer, cache_SJE, window in zip(
            self.layers, following, self.caches, config.layer_windows, strict=True
        ):
            if self.look is blocks_of:
                h_BD, prepared = self.functions.layer(
                    config, layer, next_layer, h_BD, prepared, entry.rope, cache_SJE, seen[window]
                )
                continue
            self.functions.before(config, layer, prepared, entry.rope, position_1, cache_SJE)
            attended = self._attended(cache_SJE, seen[window], end)
            h_BD, prepared = self.functions.after(config, layer, next_layer, h_BD, attended)
        if self.history is not None:
            self.history.add(self.ids_B.clamp_min(0))
        self.logits_BV, ids_B = self.functions.finish(config, self.head, self.norm_D, self.sampling == GREEDY, h_BD)
        if ids_B is None:
            ids_B = sample(self.logits_BV, self.sampling, self.history, self.generator)
        self.ids_B.copy_(ids_B)

    def _attended(self, cache_SJE: Tensor, seen: Spans | Tensor | None, end: int) -> Tensor:
        """[B, H, E], by spans or a mask."""
        q_BHE, keys_BMJE, values_BMJE = parts_of(self.config, len(self.ids_B), cache_SJE)
        if isinstance(seen, Spans):
            return flash_attention(q_BHE, keys_BMJE, values_BMJE, seen)
        keys_BJME, values_BJME = keys_BMJE[:, :end].transpose(1, 2), values_BMJE[:, :end].transpose(1, 2)
        return attention(q_BHE.unsqueeze(2), keys_BJME, values_BJME, seen).squeeze(2)

    def _masks(self, end: int, first: dict[int | None, Tensor]) -> dict[int | None, Tensor | None]:
        if self.device.type == "cuda":
            return {window: mask_of(self.position_1, first_B, end) for window, first_B in first.items()}
        padding_B = self.cache.padding_B
        return {window: attention_mask(end - 1, 1, window, padding_B, self.device) for window in first}

    def _graph(self, end: int) -> torch.cuda.CUDAGraph:
        """The recorded token that reads up to `end`. Recording it leaves history and random numbers as they were."""
        if end in self.graphs:
            return self.graphs[end]
        started = time.perf_counter()
        random_state = self.generator.get_state()
        counts_BV = None if self.history is None else self.history.counts_BV.clone()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                self._token(end)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph):
            self._token(end)
        self.generator.set_state(random_state)
        if self.history is not None and counts_BV is not None:
            self.history.counts_BV.copy_(counts_BV)
        self.graphs[end] = graph
        self.build_seconds += time.perf_counter() - started
        return graph
