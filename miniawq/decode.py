"""One more token for every row: what `model.py` computes for one position, by few compiled functions in fixed buffers.

A layer is two functions of tensors, around its attention. The weights are arguments, so each is compiled once and
called for every layer. The length is a number on the device, so no length ever compiles anything: new keys are written
where it points, and attention, which is not compiled, reads as far as it says. On CUDA the launches of a whole token
are recorded once, in a CUDA graph, and replayed for each token; on a CPU the same functions run one by one.

Shapes: B batch, M positions in the cache, T slots of a layer's keys (B M), S slots of its keys and values (2 T),
D model width, F feed-forward width, V vocabulary, C parts of it, H query heads, J key/value heads, E size of one head.
"""

import copy
import logging
import time
from collections.abc import Callable
from functools import cache
from math import gcd
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, pad, silu

from miniawq import forms
from miniawq.errors import InvalidInput
from miniawq.model import KVCache, Llama, LlamaConfig, attention, attention_mask, rms_norm
from miniawq.products import (
    Product,
    is_int4,
    lower,
    multiply,
    norm_and_multiply,
    products_of,
    reduce_product,
    written,
)
from miniawq.rope import Rope, apply_rope, rope_tables
from miniawq.sampling import NOT_A_NUMBER, History, Sampling, sample

log = logging.getLogger(__name__)

# In the first call on a stream libraries allocate what they keep.
WARM_UP_CALLS = 2
SPARE_ROOM = 32
SMALLEST_BUCKET = 256
GREEDY = Sampling()
MOST_PARTS_OF_LOGITS = 256


class Layer(NamedTuple):
    """The weights of one layer; matrices that read the same input lie together."""

    input_norm_D: Tensor
    qkv: tuple[Product, ...]
    q_norm_E: Tensor | None
    k_norm_E: Tensor | None
    o: tuple[Product, ...]
    post_norm_D: Tensor
    gate_up: tuple[Product, ...]
    down: tuple[Product, ...]

    @classmethod
    def of(cls, block: Any, rows: int) -> "Layer":
        """The weights of a DecoderBlock, whose own are views of these from now on."""
        attn, mlp = block.self_attn, block.mlp
        q_norm, k_norm = (getattr(norm, "weight", None) for norm in (attn.q_norm, attn.k_norm))
        return cls(
            input_norm_D=block.input_layernorm.weight.data,
            qkv=products_of((attn.q_proj, attn.k_proj, attn.v_proj), rows),
            q_norm_E=None if q_norm is None else q_norm.data,
            k_norm_E=None if k_norm is None else k_norm.data,
            o=products_of((attn.o_proj,), rows),
            post_norm_D=block.post_attention_layernorm.weight.data,
            gate_up=products_of((mlp.gate_proj, mlp.up_proj), rows),
            down=products_of((mlp.down_proj,), rows),
        )


def before_attention(
    config: LlamaConfig,
    layer: Layer,
    h_BD: Tensor,
    rope: Rope,
    slots_2B: Tensor,
    cache_SJE: Tensor,
) -> Tensor:
    """q_BHE of the residual stream; the new keys of all rows, then their values, go into their slots of the cache."""
    heads, kv_heads, eps = config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps
    qkv_BO = written(norm_and_multiply(layer.qkv, h_BD, layer.input_norm_D, eps))
    qkv_BHE = qkv_BO.unflatten(-1, (-1, config.head_dim))
    q_BHE, k_BJE, v_BJE = qkv_BHE.split((heads, kv_heads, kv_heads), dim=1)
    if layer.q_norm_E is not None and layer.k_norm_E is not None:
        q_BHE, k_BJE = rms_norm(q_BHE, layer.q_norm_E, eps), rms_norm(k_BJE, layer.k_norm_E, eps)
    # In one memory, because Inductor writes two tensors by two kernels.
    cache_SJE.index_copy_(0, slots_2B, torch.cat((apply_rope(k_BJE, rope), v_BJE)))
    return apply_rope(q_BHE, rope).contiguous()


def after_attention(config: LlamaConfig, layer: Layer, h_BD: Tensor, attended_BHE: Tensor) -> Tensor:
    """The residual stream behind the layer."""
    h_BD = written(h_BD + multiply(layer.o, attended_BHE.flatten(1)))
    gate_up_BF = norm_and_multiply(layer.gate_up, h_BD, layer.post_norm_D, config.rms_norm_eps)
    gate_BF, up_BF = written(gate_up_BF).chunk(2, dim=-1)
    return h_BD + multiply(layer.down, silu(gate_BF) * up_BF)


def finish(
    config: LlamaConfig, head: tuple[Product, ...], norm_D: Tensor, is_greedy: bool, h_BD: Tensor
) -> tuple[Tensor, Tensor | None]:
    """logits_BV, and the most probable ids_B if that is what is wanted."""
    logits_BV = norm_and_multiply(head, h_BD, norm_D, config.rms_norm_eps)
    return logits_BV, most_probable(logits_BV) if is_greedy else None


def most_probable(logits_BV: Tensor) -> Tensor:
    """What `sampling.sample` chooses without a temperature: the first of the largest, NOT_A_NUMBER if there is a NaN.

    In two steps, because Inductor does not cut an argmax into parts and one program would read all logits. The largest
    of each part, beside its place, tells of a NaN too.
    """
    parts = gcd(logits_BV.shape[1], MOST_PARTS_OF_LOGITS)
    logits_BCV = logits_BV.float().unflatten(1, (parts, -1))
    best_BC, place_BC = written(logits_BCV.amax(-1)), written(logits_BCV.argmax(-1))
    part_B1 = best_BC.argmax(-1, keepdim=True)
    ids_B = (part_B1 * logits_BCV.shape[2] + place_BC.gather(1, part_B1)).squeeze(1)
    return ids_B.masked_fill(best_BC.amax(-1).isnan(), NOT_A_NUMBER)


class Spans(NamedTuple):
    """Which slots of a layer's cache [T, J, E] the new token of each row sees: int32, as flash attention takes them."""

    rows_B1: Tensor  # 0, 1, .. B: the first query of each row, and an end
    starts_B1: Tensor  # the first slot of each row, and an end
    used_B: Tensor


def spans_of(first_slot_B1: Tensor, position_1: Tensor, padding_B: Tensor, window: int | None) -> Spans:
    """From behind the padding, or the last `window`, to the new token."""
    end_1 = position_1 + 1
    first_B = padding_B if window is None else torch.maximum(padding_B, end_1 - window)
    rows_B1 = torch.arange(len(padding_B) + 1, device=padding_B.device, dtype=torch.int32)
    return Spans(rows_B1, (first_slot_B1 + pad(first_B, (0, 1))).int(), (end_1 - first_B).int())


class Entry(NamedTuple):
    """What all layers share in one token."""

    h_BD: Tensor
    rope: Rope
    slots_2B: Tensor
    spans: dict[int | None, Spans]


def enter(
    config: LlamaConfig, embedding_VD: Tensor, tables_ME: Rope, ids_B: Tensor, position_1: Tensor, padding_B: Tensor
) -> Entry:
    """The embedding of each id, the rotary tables of the position, its slots, and what is seen through each window.

    The id of a row that has no number (-1) is taken for 0, since nobody looks at such rows.
    """
    cos_ME, sin_ME = tables_ME
    rows, room = len(ids_B), cos_ME.shape[0]
    first_slot_B1 = torch.arange(rows + 1, device=ids_B.device) * room
    return Entry(
        embedding(ids_B.clamp_min(0), embedding_VD),
        (cos_ME[position_1], sin_ME[position_1]),
        torch.arange(2 * rows, device=ids_B.device) * room + position_1,
        {
            window: spans_of(first_slot_B1, position_1, padding_B, window)
            for window in dict.fromkeys(config.layer_windows)
        },
    )


def mask_of(position_1: Tensor, padding_B: Tensor, window: int | None, end: int) -> Tensor:
    """The same as bool [B, 1, 1, M] over the first `end` positions of the cache."""
    key_M = torch.arange(end, device=padding_B.device)
    seen_BM = (key_M <= position_1) & (key_M >= padding_B[:, None])
    if window is not None:
        seen_BM = seen_BM & (key_M > position_1 - window)
    return seen_BM[:, None, None]


def flash_attention(q_BHE: Tensor, keys_TJE: Tensor, values_TJE: Tensor, spans: Spans) -> Tensor:
    """[B, H, E]. The keys of a row are split among the processors, and each is read once for the heads that share it.

    `aten::_flash_attention_forward` finds the lengths on the device; its launches depend on the size of the cache only.
    """
    longest = len(keys_TJE) // len(q_BHE)
    return torch.ops.aten._flash_attention_forward(
        q_BHE,
        keys_TJE,
        values_TJE,
        spans.rows_B1,
        spans.starts_B1,
        1,
        longest,
        0.0,
        False,
        False,
        seqused_k=spans.used_B,
    )[0]


def flash_attention_works(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this device and this torch compute it, shown by an example with padding and an end before the cache's."""
    if device.type != "cuda":
        return False
    heads, kv_heads, size, room, end = config.num_attention_heads, config.num_key_value_heads, config.head_dim, 512, 300
    generator = torch.Generator(device).manual_seed(0)
    q_BHE = torch.randn(2, heads, size, device=device, generator=generator).to(dtype)
    keys_TJE, values_TJE = torch.randn(2, 2 * room, kv_heads, size, device=device, generator=generator).to(dtype)
    padding_B, position_1 = torch.tensor([3, 290], device=device), torch.tensor([end - 1], device=device)
    spans = spans_of(torch.arange(3, device=device) * room, position_1, padding_B, None)
    mask = mask_of(position_1, padding_B, None, end)
    keys_BJME, values_BJME = (
        t.unflatten(0, (2, room))[:, :end].transpose(1, 2).float() for t in (keys_TJE, values_TJE)
    )
    expected = attention(q_BHE.unsqueeze(2).float(), keys_BJME, values_BJME, mask).squeeze(2)
    try:
        error = (flash_attention(q_BHE, keys_TJE, values_TJE, spans) - expected).abs().max()
    except (RuntimeError, TypeError) as problem:
        log.info("attention by masks, not by lengths: %s", str(problem).splitlines()[0])
        return False
    if not (works := bool(error < 0.02)):
        log.warning("flash attention by lengths is wrong by %.3g on this device: attention by masks instead", error)
    return works


@cache
def compiled(function: Callable[..., Any], is_int4: bool, config: LlamaConfig, rows: int) -> Callable[..., Any]:
    """`function` compiled for models of one shape and a number of rows, once in a process.

    Dynamo keeps what it has compiled with the code object, up to a limit, and tries one after the other. A copy of the
    code has a list of its own, which other shapes do not fill.
    """
    return lower(FunctionType(function.__code__.replace(), function.__globals__, function.__name__), is_int4)


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
        self.reads_by_length = flash_attention_works(self.config, like.device, like.dtype)
        self.functions: tuple[Callable[..., Any], ...] = (enter, before_attention, after_attention, finish)
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
            keys_NBMJE = self.cache.keys_NBMJE
            shape = (len(keys_NBMJE), 2, *keys_NBMJE.shape[1:])
            cache_N2BMJE = torch.zeros(shape, device=like.device, dtype=like.dtype)
            self.cache.keys_NBMJE, self.cache.values_NBMJE = cache_N2BMJE.unbind(1)
            self.ids_B = torch.zeros(batch, dtype=torch.long, device=like.device)
            self.padding_B, self.position_1 = torch.zeros_like(self.ids_B), torch.zeros_like(self.ids_B[:1])
            has_history = self.sampling.has_penalties
            self.history = History.of_prompt(self.ids_B[:, None], self.config.vocab_size) if has_history else None
        self.caches = cache_N2BMJE.flatten(1, 3).unbind()
        self.generator = torch.Generator(like.device)

    @torch.inference_mode()
    def compile(self) -> None:
        """Compile what a token needs by computing one for a text that nobody reads.

        This step's own buffers are left alone: another thread may let the model write a text into them meanwhile.
        """
        started = time.perf_counter()
        first, batch = self.layers[0], len(self.ids_B)
        products = (*first.qkv, *first.o, *first.gate_up, *first.down)
        if self.device.type == "cuda" and any(product.form is reduce_product for product in products):
            forms.prove(self.device)
        kinds: dict[Callable[..., Any], bool] = {
            enter: False,
            before_attention: any(map(is_int4, first.qkv)),
            after_attention: any(map(is_int4, first.down)),
            finish: any(map(is_int4, self.head)),
        }
        spare = copy.copy(self)
        spare._make_room(batch, SPARE_ROOM)
        spare.functions = tuple(compiled(function, kind, self.config, batch) for function, kind in kinds.items())
        # Nothing compiled depends on how many positions there are.
        for tensor in (*self.tables_ME, *self.caches, *spare.tables_ME, *spare.caches):
            torch._dynamo.mark_dynamic(tensor, 0)
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

    def _end_of_reading(self, length: int) -> int:
        """How far a graph can read: everywhere if it goes by lengths, else to the next power of two."""
        room = self.cache.max_seq_len
        return room if self.reads_by_length else min(room, max(SMALLEST_BUCKET, 1 << length.bit_length()))

    def _token(self, end: int) -> None:
        """From `ids_B` to the next `ids_B`, by nothing that a CUDA graph cannot record."""
        enter, before_attention, after_attention, finish = self.functions
        entry = enter(self.config, self.embedding_VD, self.tables_ME, self.ids_B, self.position_1, self.padding_B)
        masks = {} if self.reads_by_length else self._masks(end)
        h_BD = entry.h_BD
        for layer, cache_SJE, window in zip(self.layers, self.caches, self.config.layer_windows, strict=True):
            q_BHE = before_attention(self.config, layer, h_BD, entry.rope, entry.slots_2B, cache_SJE)
            keys_TJE, values_TJE = cache_SJE.chunk(2)
            if self.reads_by_length:
                attended_BHE = flash_attention(q_BHE, keys_TJE, values_TJE, entry.spans[window])
            else:
                keys_BJME, values_BJME = self._first(end, keys_TJE), self._first(end, values_TJE)
                attended_BHE = attention(q_BHE.unsqueeze(2), keys_BJME, values_BJME, masks[window]).squeeze(2)
            h_BD = after_attention(self.config, layer, h_BD, attended_BHE)
        if self.history is not None:
            self.history.add(self.ids_B.clamp_min(0))
        self.logits_BV, ids_B = finish(self.config, self.head, self.norm_D, self.sampling == GREEDY, h_BD)
        if ids_B is None:
            ids_B = sample(self.logits_BV, self.sampling, self.history, self.generator)
        self.ids_B.copy_(ids_B)

    def _first(self, end: int, cache_TJE: Tensor) -> Tensor:
        """The first `end` positions of each row, [B, J, M, E]."""
        return cache_TJE.unflatten(0, (len(self.ids_B), -1))[:, :end].transpose(1, 2)

    def _masks(self, end: int) -> dict[int | None, Tensor | None]:
        windows = set(self.config.layer_windows)
        if self.device.type == "cuda":
            return {window: mask_of(self.position_1, self.padding_B, window, end) for window in windows}
        padding_B = self.cache.padding_B
        return {window: attention_mask(end - 1, 1, window, padding_B, self.device) for window in windows}

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
