"""One more token for every row: what `model.py` computes for one position, by few compiled functions in fixed buffers.

The functions are those of `layer.py`. On CUDA the launches of a whole token are recorded once, in a CUDA graph, and
replayed for each token; on a CPU the same functions run one by one.
"""

import copy
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from miniawq.compiled import check, identity
from miniawq.engine.attend import SMALLEST_HEAD, mask_of
from miniawq.engine.layer import UNCOMPILED, Functions, compiled_function, parts_of_cache
from miniawq.engine.reader import LARGEST_DIFFERENCE, PromptReader, relative_difference
from miniawq.engine.sampling import History, Sampling, sample
from miniawq.engine.weights import Accepts, Layer, LayerWeights, Weights
from miniawq.errors import InvalidInput, MiniawqError
from miniawq.model import KVCache, Llama, attention, attention_mask

# In the first call on a stream libraries allocate what they keep.
WARM_UP_CALLS = 2
SPARE_ROOM = 32  # positions of the text that is computed to compile
SMALLEST_BUCKET = 256  # positions that a recorded token with a mask reads at least
GREEDY = Sampling()


class DecodeStep:
    """`step(ids_B) -> ids_B` feeds one token to every row and chooses the next, all on the device.

    It owns what a recorded step must own: the cache, the history, the random numbers. A text starts with `begin`; its
    prompt is read (`read`) into `cache`; the first `step` compiles, unless `compile` has been called.
    With `compiles` False the same functions run as they are. With `texts` 1 all rows are neighbouring tokens of one
    text.
    """

    def __init__(
        self,
        model: Llama,
        batch: int,
        max_seq_len: int,
        sampling: Sampling | None = None,
        *,
        compiles: bool = True,
        texts: int | None = None,
    ) -> None:
        self.texts = texts or batch
        self.model, self.config, self.sampling = model, model.config, sampling or Sampling()
        self.read = PromptReader(model)
        self.device, self.dtype = model.device, model.dtype
        # What is made in inference mode could not be used outside.
        with torch.inference_mode(False), torch.no_grad():
            self.weights = [LayerWeights.of(block) for block in model.model.layers]
            self.head_weights = Weights.of(model.lm_head)
        self.norm_D, self.embedding_VD = model.model.norm.gain.data, model.model.embed_tokens.weight.data
        self.by_blocks = compiles and self.device.type == "cuda" and self.config.head_dim >= SMALLEST_HEAD
        self.functions = UNCOMPILED
        self.is_ready = False
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # and the logits that it writes
        self.build_seconds = 0.0
        self._make_room(batch, max_seq_len)
        if not compiles:
            self._choose_products(lambda form: True)
            self.is_ready = True

    def described(self) -> dict[str, str]:
        """All that decides what is compiled for this step, in words: the name under which it is kept."""
        return identity(
            self.device,
            (self.weights[0], self.head_weights),
            model=str(self.config),
            dtype=str(self.dtype),
            rows=str(len(self.ids_B)),
        )

    def _make_room(self, batch: int, max_seq_len: int) -> None:
        """All that belongs to the text."""
        with torch.inference_mode(False), torch.no_grad():
            self.tables = self.model.model.ropes(torch.arange(max_seq_len, device=self.device), max_seq_len)
            texts = self.texts
            self.cache = KVCache(self.config, texts, max_seq_len, device="meta", dtype=self.dtype)
            layers, _, _, kv_heads, size = self.cache.keys_NBMJE.shape
            of_queries = batch * self.config.num_attention_heads // kv_heads
            shape = (layers, of_queries + 2 * texts * max_seq_len, kv_heads, size)
            cache_NUJE = torch.zeros(shape, device=self.device, dtype=self.cache.keys_NBMJE.dtype)
            kept_N2XMJE = cache_NUJE[:, of_queries:].unflatten(1, (2, texts, max_seq_len))
            self.cache.keys_NBMJE, self.cache.values_NBMJE = kept_N2XMJE.unbind(1)
            self.ids_B = torch.zeros(batch, dtype=torch.long, device=self.device)
            self.padding_B, self.position_B = torch.zeros_like(self.ids_B), torch.zeros_like(self.ids_B)
            has_history = self.sampling.has_penalties
            of_texts = self.ids_B[:texts, None]
            self.history = History.of_prompt(of_texts, self.config.vocab_size) if has_history else None
        self.caches = cache_NUJE.unbind()
        self.generator = torch.Generator(self.device)

    def _choose_products(self, accepts: Accepts) -> None:
        rows = len(self.ids_B)
        with torch.inference_mode(False), torch.no_grad():
            self.layers = [weights.for_rows(rows, self.texts, self.dtype, accepts) for weights in self.weights]
            self.head = self.head_weights.products(rows, self.dtype, accepts)

    @torch.inference_mode()
    def compile(self, directory: Path | None = None) -> None:
        """Compile by computing one token of a spare text, and compare its logits with the model's.

        This step's own buffers are left alone: another thread may let the model write a text into them meanwhile. With
        a directory, which must be of steps like this one, what is there is taken, and the rest is left there.
        MiniawqError if the logits are not those of the model.
        """
        started = time.perf_counter()
        spare = copy.copy(self)
        spare._make_room(len(self.ids_B), SPARE_ROOM)
        # On CUDA loading what was kept takes longer than tracing it again (docs/log).
        keeps = directory if self.device.type == "cpu" else None
        spare._choose_products(lambda form: check(form, self.device, self.dtype, keeps))
        spare.functions = spare._compiled_functions(keeps)
        spare._token(1)
        spare._compare_with_model()
        self.layers, self.head = spare.layers, spare.head
        self.functions, self.is_ready = spare.functions, True
        self.build_seconds += time.perf_counter() - started

    def _compiled_functions(self, directory: Path | None) -> Functions:
        first, rows = self.layers[0], len(self.ids_B)
        choice = "greedy" if self.sampling == GREEDY else "any"
        of_qkv, of_head = (frozenset(product.form for product in products) for products in (first.qkv, self.head))
        forms = (of_qkv, of_qkv, first.forms, first.forms, of_head)
        return Functions(
            *(
                compiled_function(
                    function, used, self.config, rows, directory and directory / f"{function.__name__}-{choice}.aot"
                )
                for function, used in zip(UNCOMPILED, forms, strict=True)
            )
        )

    def _compare_with_model(self) -> None:
        expected_BV = self.model(torch.zeros_like(self.ids_B)[:, None])[:, -1]
        difference = relative_difference(self.logits_BV, expected_BV)
        # The model has no cache here, so rounded keys and values are part of the difference.
        if difference > max(LARGEST_DIFFERENCE[dtype] for dtype in (self.dtype, self.cache.keys_NBMJE.dtype)):
            why = f"its logits differ by {difference:.3g} of their norm from those of the model"
            raise MiniawqError("what was compiled is wrong", why, "please report it, with the model and the device")

    @property
    def ends_together(self) -> bool:
        """Whether the new tokens of all rows stand at the same position."""
        return self.texts == len(self.ids_B)

    @property
    def returns_early(self) -> bool:
        """Whether `step` returns before the device has computed the ids: a recorded token takes one launch."""
        return bool(self.graphs)

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
        """Append ids_B to the rows; the next ids, NOT_A_NUMBER for a row whose logits hold a NaN."""
        length, room = self.cache.length, self.cache.max_seq_len
        if length >= room:
            raise InvalidInput("the cache is full", f"it has room for {room} positions", "make a DecodeStep with more")
        self.position_B.fill_(length)
        self._compute(ids_B, length)
        self.cache.length += 1
        return self.ids_B.clone()

    @torch.inference_mode()
    def verify(self, ids: Sequence[int]) -> Tensor:
        """With `texts` 1: what is chosen after each of these neighbouring ids, ids_L. The length stays as it was.

        Rows for which there is no id compute tokens that no later one sees: their places are written before they are
        read, or are the last place, which no guess may have.
        """
        rows, length, last = len(self.ids_B), self.cache.length, self.cache.max_seq_len - 1
        if len(ids) > rows or self.texts != 1:
            why = f"it has {rows} rows, of {self.texts} texts, and {len(ids)} ids are given"
            raise InvalidInput("this step cannot check guesses", why, "make a SpeculativeStep, or give no lookup")
        assert length + len(ids) <= last, f"{len(ids)} ids after {length} positions of {last + 1}"
        self.position_B.copy_(torch.arange(length, length + rows).clamp_max(last))
        filled = torch.tensor([*ids, *[ids[-1]] * (rows - len(ids))])
        self._compute(filled, min(last, length + rows - 1))
        return self.ids_B[: len(ids)].clone()

    def _compute(self, ids_B: Tensor, last: int) -> None:
        """A token of each row at its `position_B`, none of which is beyond `last`."""
        if not self.is_ready:
            self.compile()
        if self.device.type == "cuda":
            graph, self.logits_BV = self._graph(self._end_of_reading(last))
            self.ids_B.copy_(ids_B)
            graph.replay()
        else:
            self.ids_B.copy_(ids_B)
            self._token(last + 1)

    def _end_of_reading(self, length: int) -> int:
        """How far a recorded token can read: everywhere if it goes by blocks, else to the next power of two."""
        room = self.cache.max_seq_len
        return room if self.by_blocks else min(room, max(SMALLEST_BUCKET, 1 << length.bit_length()))

    def _token(self, end: int) -> None:
        """From `ids_B` to the next `ids_B`, by operations that a CUDA graph can record."""
        config, functions, position_B = self.config, self.functions, self.position_B
        h_BD, prepared, tables, seen = functions.enter(
            config, self.layers[0], self.by_blocks, self.embedding_VD, tuple(self.tables.values()), self.ids_B,
            position_B, self.padding_B,
        )  # fmt: skip
        ropes = dict(zip(self.tables, tables, strict=True))
        masks = {} if self.by_blocks else self._masks(end, seen)
        following = (*self.layers[1:], self.layers[-1])  # Nobody reads what the last one prepares.
        for layer, next_layer, cache_UJE, window, kind in zip(
            self.layers, following, self.caches, config.layer_windows, config.layer_ropes, strict=True
        ):
            rope = ropes[kind]
            if self.by_blocks:
                h_BD, prepared = functions.layer(
                    config, layer, next_layer, h_BD, prepared, rope, cache_UJE, seen[window]
                )
                continue
            q_BHE = functions.before(config, layer, prepared, rope, position_B, cache_UJE)
            attended_BHE = self._attended(layer, cache_UJE, q_BHE, masks[window], end)
            h_BD, prepared = functions.after(config, layer, next_layer, h_BD, attended_BHE)
        history, fed_B = self.history, self.ids_B.clamp_min(0)
        if history is not None and self.texts < len(fed_B):
            history = history.after_each(fed_B)
        elif history is not None:
            history.add(fed_B)
        h_BD = h_BD[: len(self.ids_B)]
        self.logits_BV, ids_B = functions.finish(config, self.head, self.norm_D, self.sampling == GREEDY, h_BD)
        if ids_B is None:
            ids_B = sample(self.logits_BV, self.sampling, history, self.generator)
        self.ids_B.copy_(ids_B)

    def _attended(self, layer: Layer, cache_UJE: Tensor, q_BHE: Tensor | None, mask: Tensor | None, end: int) -> Tensor:
        q_BHE, *kept = parts_of_cache(self.config, layer, cache_UJE, q_BHE)
        seen = (kept_XMJE[:, :end].transpose(1, 2).to(q_BHE.dtype) for kept_XMJE in kept)
        keys, values = (seen_XJME.expand(len(q_BHE), -1, -1, -1) for seen_XJME in seen)
        return attention(q_BHE.unsqueeze(2), keys, values, mask, self.config.attention_multiplier).squeeze(2)

    def _masks(self, end: int, first: dict[int | None, Tensor]) -> dict[int | None, Tensor | None]:
        if self.device.type == "cuda" or not self.ends_together:
            return {window: mask_of(self.position_B, first_B, end) for window, first_B in first.items()}
        padding_B = self.cache.padding_B
        return {window: attention_mask(end - 1, 1, window, padding_B, self.device) for window in first}

    def _graph(self, end: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The recorded token that reads up to `end`. Recording it leaves history and random numbers as they were."""
        if end in self.graphs:
            return self.graphs[end]
        started = time.perf_counter()
        random_state = self.generator.get_state()
        before = [part_BV.clone() for part_BV in self.history or ()]
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
        for part_BV, before_BV in zip(self.history or (), before, strict=True):
            part_BV.copy_(before_BV)
        self.graphs[end] = graph, self.logits_BV
        self.build_seconds += time.perf_counter() - started
        return self.graphs[end]
