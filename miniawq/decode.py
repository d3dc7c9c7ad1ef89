"""One more token for every row: what `model.py` computes for one position, by few compiled functions in fixed buffers.

The functions are those of `layer.py`. On CUDA the launches of a whole token are recorded once, in a CUDA graph, and
replayed for each token; on a CPU the same functions run one by one.

Shapes: B batch, M positions in the cache, S slots of a layer's queries, keys and values, V vocabulary, H query heads, J
key/value heads, E size of one head.
"""

import copy
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miniawq import forms
from miniawq.attend import Spans, blocks_of, first_position, flash_attention, looking_on, mask_of
from miniawq.errors import InvalidInput
from miniawq.layer import UNCOMPILED, Functions, Layer, compiled, parts_of
from miniawq.model import KVCache, Llama, attention, attention_mask
from miniawq.products import REDUCE, products_of
from miniawq.rope import rope_tables
from miniawq.sampling import History, Sampling, sample

log = logging.getLogger(__name__)

# In the first call on a stream libraries allocate what they keep.
WARM_UP_CALLS = 2
SPARE_ROOM = 32
SMALLEST_BUCKET = 256
GREEDY = Sampling()


class DecodeStep:
    """`step(ids_B) -> ids_B` feeds one token to every row and chooses the next, all on the device.

    It owns what a recorded step must own: the cache, the history, the random numbers. A text starts with `begin`; its
    prompt goes through the model itself, into `cache`; the first `step` compiles, unless `compile` has been called.
    """

    def __init__(
        self, model: Llama, batch: int, max_seq_len: int, sampling: Sampling | None = None, *, compile_: bool = True
    ) -> None:
        self.config, self.sampling = model.config, sampling or Sampling()
        self.device, self.dtype = model.device, model.dtype
        # What is made in inference mode could not be used outside.
        with torch.inference_mode(False), torch.no_grad():
            self.layers = [Layer.of(block, batch) for block in model.model.layers]
            self.head = products_of((model.lm_head,), batch)
            self.norm_D, self.embedding_VD = model.model.norm.weight.data, model.model.embed_tokens.weight.data
        self.look = looking_on(self.device, self.config, self.dtype, compile_)
        self.functions = UNCOMPILED
        self.is_ready = not compile_
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.build_seconds = 0.0
        self._make_room(batch, max_seq_len)

    def _make_room(self, batch: int, max_seq_len: int) -> None:
        """All that belongs to the text."""
        with torch.inference_mode(False), torch.no_grad():
            positions_M = torch.arange(max_seq_len, device=self.device)
            self.tables_ME = rope_tables(self.config.rope, positions_M, max_seq_len, self.dtype)
            self.cache = KVCache(self.config, batch, max_seq_len, device="meta", dtype=self.dtype)
            layers, _, _, kv_heads, size = self.cache.keys_NBMJE.shape
            of_queries = batch * self.config.num_attention_heads // kv_heads
            shape = (layers, of_queries + 2 * batch * max_seq_len, kv_heads, size)
            cache_NSJE = torch.zeros(shape, device=self.device, dtype=self.dtype)
            kept_N2BMJE = cache_NSJE[:, of_queries:].unflatten(1, (2, batch, max_seq_len))
            self.cache.keys_NBMJE, self.cache.values_NBMJE = kept_N2BMJE.unbind(1)
            self.ids_B = torch.zeros(batch, dtype=torch.long, device=self.device)
            self.padding_B, self.position_1 = torch.zeros_like(self.ids_B), torch.zeros_like(self.ids_B[:1])
            has_history = self.sampling.has_penalties
            self.history = History.of_prompt(self.ids_B[:, None], self.config.vocab_size) if has_history else None
        self.caches = cache_NSJE.unbind()
        self.generator = torch.Generator(self.device)

    @torch.inference_mode()
    def compile(self, directory: Path | None = None) -> None:
        """Compile what a token needs by computing one for a text that nobody reads.

        This step's own buffers are left alone: another thread may let the model write a text into them meanwhile. With
        a directory, which must be of steps like this one, what is there is taken, and the rest is left there.
        """
        started = time.perf_counter()
        first, batch = self.layers[0], len(self.ids_B)
        of_layer = (*first.qkv, *first.o, *first.gate_up, *first.down)
        if self.device.type == "cuda" and any(product.form is REDUCE for product in of_layer):
            forms.prove(self.device)
        spare = copy.copy(self)
        spare._make_room(batch, SPARE_ROOM)
        choice = "greedy" if self.sampling == GREEDY else "any"
        # On CUDA loading what was kept takes longer than tracing it again (docs/performance.md).
        keeps = directory if self.device.type == "cpu" else None
        paths = [keeps and keeps / f"{function.__name__}-{choice}.aot" for function in UNCOMPILED]
        products_in = (first.qkv, first.qkv, of_layer, of_layer, self.head)
        forms_in = [frozenset(product.form for product in products) for products in products_in]
        spare.functions = Functions(
            *(
                compiled(function, its_forms, self.config, batch, path)
                for function, its_forms, path in zip(UNCOMPILED, forms_in, paths, strict=True)
            )
        )
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
