"""Steps that wait for no compiler: the model as it is, or the model until a thread has compiled a `DecodeStep`."""

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Linear

from miniawq.checkpoint.loading import DenseLinear
from miniawq.compiled import WORKSHOP, Table, are_here, first_line, kept, shared_step
from miniawq.engine.cached_text import CachedText
from miniawq.engine.memory import bytes_per_token, cache_room
from miniawq.engine.sampling import History, Sampling, sample
from miniawq.engine.step import DecodeStep
from miniawq.engine.verifying import SpeculativeStep
from miniawq.engine.weights import can_step
from miniawq.kernel import QuantLinear
from miniawq.model import KVCache, Llama

log = logging.getLogger(__name__)

Read = Callable[[Tensor, KVCache], Tensor]

SMALL_MODEL_BYTES = 32 << 20  # 10 ms at the bandwidth of one core


class Step(Protocol):
    """What computes one more token for every row: `PlainStep`, `EagerStart`, `DecodeStep`.

    `read` takes a piece of the prompts and gives hidden_BLD after the final norm.
    """

    sampling: Sampling
    cache: KVCache
    history: History | None
    generator: torch.Generator
    logits_BV: Tensor  # from which the last step has chosen

    @property
    def returns_early(self) -> bool: ...

    def begin(self, tokens_BL: Tensor, padding_B: Tensor | None = None, seed: int | None = None) -> None: ...

    @property
    def read(self) -> Read: ...

    def step(self, ids_B: Tensor) -> Tensor: ...

    def verify(self, ids: Sequence[int]) -> Tensor: ...


class PlainStep:
    """One more token for every row by the model as it is: nothing to compile, and a cache for one text."""

    def __init__(self, model: Llama, batch: int, max_seq_len: int, sampling: Sampling) -> None:
        self.model, self.sampling = model, sampling
        self.read: Read = model.model
        self.surroundings = ready_for_steps(model)
        self.cache = KVCache(model.config, batch, max_seq_len, device=model.device, dtype=model.dtype)
        self.history: History | None = None
        self.generator = torch.Generator(model.device)
        self.logits_BV = torch.empty(0)

    @property
    def returns_early(self) -> bool:
        """Never: the host launches kernel after kernel, which takes longer than computing them."""
        return False

    def begin(self, tokens_BL: Tensor, padding_B: Tensor | None = None, seed: int | None = None) -> None:
        """Forget the last text. `tokens_BL` counts for penalties only: run it into `cache` afterwards."""
        self.cache.length, self.cache.padding_B = 0, padding_B
        self.generator.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
        if self.sampling.has_penalties:
            self.history = History.of_prompt(tokens_BL, self.model.config.vocab_size, padding_B)

    def step(self, ids_B: Tensor) -> Tensor:
        """Append ids_B to the rows; the next ids, NOT_A_NUMBER for a row whose logits hold a NaN."""
        if self.history is not None:
            self.history.add(ids_B)
        with self.surroundings():
            self.logits_BV = self.model.last_logits(ids_B[:, None], self.cache)
            return sample(self.logits_BV, self.sampling, self.history, self.generator)

    def verify(self, ids: Sequence[int]) -> Tensor:
        """What is chosen after each of these neighbouring ids of one text, ids_L. The length stays as it was."""
        length, ids_L = self.cache.length, torch.tensor(list(ids), device=self.model.device)
        with self.surroundings():
            logits_LV = self.model(ids_L[None], self.cache)[0]
        self.cache.length = length
        history = None if self.history is None else self.history.after_each(ids_L)
        return sample(logits_LV, self.sampling, history, self.generator)


def threads_for(model: Llama) -> int | None:
    """One thread for a model that is done before a second one has woken up; all of them (None) for others."""
    return 1 if bytes_per_token(model) < SMALL_MODEL_BYTES else None


Surroundings = Callable[[], AbstractContextManager[None]]


def ready_for_steps(model: Llama) -> Surroundings:
    """How one step after another is to be run, by a model whose head is arranged for it now.

    As a `shared_step` on a CPU whose layers all share their products: tables, and narrow dense weights. Between them
    there is too little for a second thread, for which the first would wait wherever another process is busy. Else as
    it is.
    """
    if isinstance(model.lm_head, DenseLinear):
        model.lm_head.prepare()
    layers = [module for module in model.model.modules() if isinstance(module, (QuantLinear, Linear))]
    is_shared = model.device.type == "cpu" and all(hands_out(layer, model.dtype) for layer in layers)
    return shared_step if is_shared else nullcontext


def hands_out(layer: QuantLinear | Linear, dtype: torch.dtype) -> bool:
    """Whether helpers can take a part of a layer's products of few rows."""
    if isinstance(layer, QuantLinear):
        return isinstance(layer.prepacked, Table)
    return isinstance(layer, DenseLinear) and layer.weight.dtype != dtype


class EagerStart(PlainStep):
    """A `DecodeStep` for which no token waits long: while a thread compiles it, the model writes into the same buffers.

    So a text is the same, up to rounding, wherever the one takes over from the other. Compiling begins after the first
    token. If an earlier process has left its artifacts, the second token waits for it: a model that runs beside it
    would make it take twice as long. So does a text that must be the same again (`streams` is False): the two round
    differently in 16 bits. `ahead` counts the steps of this text that the model has made.
    """

    def __init__(self, model: Llama, compiled: DecodeStep, streams: bool = True) -> None:
        self.model, self.compiled, self.sampling, self.streams = model, compiled, compiled.sampling, streams
        self.cache, self.history, self.generator = compiled.cache, compiled.history, compiled.generator
        self.read = compiled.read
        self.ahead, self.is_warm, self.surroundings = 0, False, nullcontext
        # Compiled code is for a number of threads, and a new thread would begin with the default one.
        self._thread = threading.Thread(target=self._compile, args=(torch.get_num_threads(),), daemon=True)
        if not compiled.is_ready:
            WORKSHOP.reserve(self._thread)

    def begin(self, tokens_BL: Tensor, padding_B: Tensor | None = None, seed: int | None = None) -> None:
        """As `DecodeStep.begin`."""
        self.ahead = 0
        self.compiled.begin(tokens_BL, padding_B, seed)
        if self._has_to_start:
            # Said before the first token, in whose line it would stand otherwise.
            self.is_warm = are_here(self.compiled.described())
            meanwhile = "until then the text comes slowly" if self.streams else "the text goes on then"
            log.info("loading the compiled step" if self.is_warm else f"compiling, this once; {meanwhile}")

    def step(self, ids_B: Tensor) -> Tensor:
        """As `DecodeStep.step`."""
        if self._has_to_start:
            self._thread.start()
            if self.is_warm or not self.streams:
                self.wait()
        # A CUDA graph is recorded in the first step, and meanwhile no other thread may use the device.
        if self.compiled.is_ready and not self.is_compiling:
            ids_B = self.compiled.step(ids_B)
            self.logits_BV = self.compiled.logits_BV
            return ids_B
        self.ahead += 1
        return super().step(ids_B)

    def verify(self, ids: Sequence[int]) -> Tensor:
        """As `PlainStep.verify`."""
        if self.compiled.is_ready and not self.is_compiling:
            return self.compiled.verify(ids)
        self.ahead += 1
        return super().verify(ids)

    @property
    def returns_early(self) -> bool:
        """As `DecodeStep.returns_early`, once it has taken over."""
        return self.compiled.returns_early and not self.is_compiling

    @property
    def is_compiling(self) -> bool:
        """Whether the thread is at work."""
        return self._thread.is_alive()

    def wait(self) -> None:
        """Return when the thread is not at work any more."""
        self._thread.join()

    @property
    def _has_to_start(self) -> bool:
        return self._thread.ident is None and not self.compiled.is_ready

    def _compile(self, count: int) -> None:
        torch.set_num_threads(count)
        try:
            with torch.inference_mode(), kept(self.compiled.described()) as directory:
                self.compiled.compile(directory)
                if self.compiled.device.type == "cuda":
                    # The prompts of later texts go through a compiled function too.
                    self.model(self.compiled.ids_B[:, None])
        except Exception as error:
            log.warning("the decode step cannot be compiled, and stays slow: %s", first_line(error))
            log.debug("this is why", exc_info=True)
        finally:
            WORKSHOP.reserve(None)


class Decoders:
    """The steps of one conversation, or of all samples of a prompt: one compiled step for all texts that fit its cache.

    `wanted` says whether steps are compiled; None means on CUDA. `streams` is that of `EagerStart`. `speculates` says
    whether they can check guesses, which pays only if they are compiled. Where a conversation goes on, `cached` says
    what the cache holds of it. `use` comes first.
    """

    def __init__(
        self,
        sampling: Sampling,
        limit: int,
        device: torch.device,
        *,
        wanted: bool | None,
        streams: bool,
        converses: bool,
        speculates: bool = False,
    ) -> None:
        self.sampling, self.limit, self.streams, self.converses = sampling, limit, streams, converses
        self.speculates = speculates
        self.compiles = (device.type == "cuda" if wanted is None else wanted) and WORKSHOP.knows_torch
        self.step: PlainStep | None = None
        self.cached: CachedText | None = None

    def use(self, model: Llama) -> None:
        """Make steps of this model."""
        self.model = model
        self.compiles = self.compiles and can_step(model)

    def sample(self, sampling: Sampling) -> None:
        """Choose tokens so from now on."""
        self.wait()
        self.sampling, self.step = sampling, None

    def room(self, positions: int) -> int:
        """Positions of the cache that a text of so many gets."""
        return cache_room(positions, self.limit, self.compiles or self.converses)

    def for_text(self, positions: int) -> Step:
        """A step for a text of so many positions, prompt and answer together."""
        if self.step is None or self.step.cache.max_seq_len < positions:
            self.wait()
            self.step = None  # its memory is needed for the next
            self.cached = CachedText() if self.converses else None
            self.step = self._made(self.room(positions))
        return self.step

    def _made(self, room: int) -> PlainStep:
        if not self.compiles:
            return PlainStep(self.model, 1, room, self.sampling)
        if self.speculates:
            compiled: DecodeStep = SpeculativeStep(self.model, room, self.sampling)
        else:
            compiled = DecodeStep(self.model, 1, room, self.sampling)
        return EagerStart(self.model, compiled, self.streams)

    @property
    def current(self) -> EagerStart | None:
        """The step, if it is one that is compiled."""
        return self.step if isinstance(self.step, EagerStart) else None

    def wait(self) -> None:
        """Let the compiler finish what it has begun, so that the next process finds it."""
        if self.current is not None and self.current.is_compiling:
            log.info("still compiling, so that the next text begins faster (Ctrl-C leaves it)")
            self.current.wait()
            log.info("compiled in %.1f s", self.build_seconds)

    @property
    def build_seconds(self) -> float:
        """Seconds that compiling the step has taken."""
        return 0.0 if self.current is None else self.current.compiled.build_seconds

    @property
    def ahead(self) -> int:
        """Tokens of the current text that the model wrote before the compiled step took over."""
        return 0 if self.current is None else self.current.ahead
