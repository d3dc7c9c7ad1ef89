"""Continue a prompt: ids one step at a time, then the same as text in pieces, cut at stop strings, with its figures.

Shapes: B batch, L positions of the prompt, V vocabulary.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from miniawq import artifacts, kernel
from miniawq.decode import DecodeStep
from miniawq.errors import InvalidInput, MiniawqError
from miniawq.footprint import PREFILL_CHUNK
from miniawq.kernel import QuantLinear
from miniawq.model import KVCache, Llama
from miniawq.sampling import NOT_A_NUMBER, History, Sampling, sample
from miniawq.tokenizer import Tokenizer

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

Clock = Callable[[], float]


class PlainStep:
    """What `DecodeStep` computes, by the model as it is: nothing to compile, and a cache for one text."""

    def __init__(self, model: Llama, batch: int, max_seq_len: int, sampling: Sampling) -> None:
        self.model, self.sampling = model, sampling
        self.cache = KVCache(model.config, batch, max_seq_len, device=model.device, dtype=model.dtype)
        self.history: History | None = None
        self.generator = torch.Generator(model.device)

    def begin(self, tokens_BL: Tensor, padding_B: Tensor | None = None, seed: int | None = None) -> None:
        """Forget the last text. `tokens_BL` counts for penalties only: run it into `cache` afterwards."""
        self.cache.length, self.cache.padding_B = 0, padding_B
        self.generator.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
        if self.sampling.has_penalties:
            self.history = History.of_prompt(tokens_BL, self.model.config.vocab_size, padding_B)

    def step(self, ids_B: Tensor) -> Tensor:
        """Append ids_B to the rows; the ids behind them, NOT_A_NUMBER for a row whose logits hold a NaN."""
        if self.history is not None:
            self.history.add(ids_B)
        logits_BV = last_logits(self.model, ids_B[:, None], self.cache)
        return sample(logits_BV, self.sampling, self.history, self.generator)


class EagerStart(PlainStep):
    """A `DecodeStep` for which no token waits long: while a thread compiles it, the model writes into the same buffers.

    So a text is the same, up to rounding, wherever the one takes over from the other. Compiling begins behind the first
    token, and if an earlier process has left its artifacts, the second one waits for it: a model that runs beside it
    makes it take twice as long. So does a text that must be the same again (`streams` is False): the two round
    differently in 16 bits. `ahead` counts the steps of this text that the model has made.
    """

    def __init__(self, model: Llama, compiled: DecodeStep, streams: bool = True) -> None:
        self.model, self.compiled, self.sampling, self.streams = model, compiled, compiled.sampling, streams
        self.cache, self.history, self.generator = compiled.cache, compiled.history, compiled.generator
        self.ahead, self.is_warm = 0, False
        # Compiled code is for a number of threads, and a new thread would begin with the default one.
        self._thread = threading.Thread(target=self._compile, args=(torch.get_num_threads(),), daemon=True)
        if not compiled.is_ready:
            kernel.compiler = self._thread

    def begin(self, tokens_BL: Tensor, padding_B: Tensor | None = None, seed: int | None = None) -> None:
        """As `DecodeStep.begin`."""
        self.ahead = 0
        self.compiled.begin(tokens_BL, padding_B, seed)
        if self._has_to_start:
            # Said before the first token, in whose line it would stand otherwise.
            self.is_warm = artifacts.are_here(self.compiled)
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
            return self.compiled.step(ids_B)
        self.ahead += 1
        return super().step(ids_B)

    @property
    def is_compiling(self) -> bool:
        """Whether the thread is at work."""
        return self._thread.is_alive()

    def wait(self) -> None:
        """Until it is not."""
        self._thread.join()

    @property
    def _has_to_start(self) -> bool:
        return self._thread.ident is None and not self.compiled.is_ready

    def _compile(self, threads: int) -> None:
        torch.set_num_threads(threads)
        try:
            with torch.inference_mode(), artifacts.kept(self.compiled) as directory:
                self.compiled.compile(directory)
                if self.compiled.device.type == "cuda":
                    # The prompts of later texts go through a compiled function too.
                    self.model(self.compiled.ids_B[:, None])
        except Exception as error:
            log.warning("the decode step cannot be compiled, and stays slow: %s", str(error).strip().partition("\n")[0])
            log.debug("this is why", exc_info=True)
        finally:
            kernel.compiler = None


@torch.inference_mode()
def generate(
    model: Llama,
    tokens_BL: Tensor,
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    seed: int | None = None,
    stop_ids: frozenset[int] = frozenset(),
    padding_B: Tensor | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    decoder: DecodeStep | PlainStep | None = None,
) -> Iterator[list[int | None]]:
    """Continue each row of tokens_BL, yielding one id a row at every step, and None for rows that have ended.

    A row ends with the first of `stop_ids`, which is still yielded; the iterator ends with the last row, or after
    `max_tokens` steps. `padding_B` counts the padding at the start of each row. The prompts run in pieces of
    `prefill_chunk` tokens, those of all rows together, to bound the memory they take. `sampling` defaults to greedy,
    `seed` to torch's global generator. A `decoder` computes the steps behind the prompt in place of the model; it must
    have the same `sampling`.
    """
    sampling = sampling or Sampling()
    check_prompt(model, tokens_BL, max_tokens)
    batch, needed = len(tokens_BL), tokens_BL.shape[1] + max_tokens
    decoder = decoder or PlainStep(model, batch, needed, sampling)
    found = (decoder.sampling, decoder.cache.keys_NBMJE.shape[1], decoder.cache.max_seq_len >= needed)
    if found != (sampling, batch, True):
        why = f"wanted: {batch} rows, {needed} positions, {sampling}"
        raise InvalidInput("the decoder was made for another text", why, "make one for this text, or give none")
    decoder.begin(tokens_BL, padding_B, seed)
    for chunk_BL in tokens_BL.split(max(1, prefill_chunk // batch), dim=1):
        logits_BV = last_logits(model, chunk_BL, decoder.cache)
    ids_B = sample(logits_BV, sampling, decoder.history, decoder.generator)
    running = [True] * len(tokens_BL)
    for left in reversed(range(max_tokens)):
        ids = ids_B.tolist()
        if NOT_A_NUMBER in ids:
            fix = f"{logits_BV.dtype} may be too narrow for this model: try --dtype bfloat16 or float32"
            raise MiniawqError("the model computed something that is not a number", "", fix)
        yield [token_id if is_on else None for token_id, is_on in zip(ids, running, strict=True)]
        running = [is_on and token_id not in stop_ids for token_id, is_on in zip(ids, running, strict=True)]
        if not left or not any(running):
            return
        ids_B = decoder.step(ids_B)


def last_logits(model: Llama, tokens_BL: Tensor, cache: KVCache) -> Tensor:
    """logits_BV behind the last of these positions; no other position is projected to the vocabulary."""
    return model.lm_head(model.hidden(tokens_BL, cache)[:, -1])


def check_prompt(model: Llama, tokens_BL: Tensor, max_tokens: int) -> None:
    """Raise InvalidInput if the prompt is empty, has ids unknown to the model, or leaves no room for `max_tokens`."""
    length, limit = tokens_BL.shape[1], model.config.max_position_embeddings
    if tokens_BL.numel() == 0:
        raise InvalidInput("the prompt has no tokens", "this tokenizer puts no BOS before a text", "give it a word")
    if int(tokens_BL.max()) >= model.config.vocab_size:
        why = f"id {int(tokens_BL.max())}; config.json: vocab_size = {model.config.vocab_size}"
        raise InvalidInput("the prompt has an id that the model does not know", why, "use the tokenizer of this model")
    if max_tokens < 1 or length + max_tokens > limit:
        why = f"{length} in the prompt and {max_tokens} new; config.json: max_position_embeddings = {limit}"
        raise InvalidInput("prompt and answer do not fit into the context", why, "shorten the prompt or max_tokens")


class StopStrings:
    """Cuts a text that comes in pieces before the first stop string that is completed, wherever the pieces end.

    What may begin a stop string is held back until it does not. Of two that end together the longer counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """What of the text up to now can be shown and has not been; nothing after a stop string."""
        if self.found is not None:
            return ""
        text = self._held + piece
        ends = [(text.index(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if ends:
            end, _, self.found = min(ends)
            return text[: end - len(self.found)]
        kept = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """What was held back for a stop string that did not come."""
        return "" if self.found is not None else self._held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop`."""
        longest = min(len(stop) - 1, len(text))
        return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


class Completion:
    """One text being generated. Iterate to get it in pieces; everything else is true of the part that has come.

    `finish_reason` is None until it ends, then "stop" (an end id, or a stop string: see `stop_reason`) or "length".
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        new_ids: Iterable[int],
        *,
        stop_ids: frozenset[int] = frozenset(),
        stop: Sequence[str] = (),
        clock: Clock = time.perf_counter,
    ) -> None:
        self.prompt_ids = list(prompt_ids)
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self._tokenizer, self._new_ids, self._clock = tokenizer, new_ids, clock
        self._stop_ids, self._stop = stop_ids, stop
        self._started = 0.0
        self._times: list[float] = []

    def __iter__(self) -> Iterator[str]:
        stream, stops = self._tokenizer.stream(self.prompt_ids), StopStrings(self._stop)
        self._started = self._clock()
        for token_id in self._new_ids:
            self._times.append(self._clock())
            self.ids.append(token_id)
            if token_id in self._stop_ids:
                self.stop_reason = token_id
                break
            yield from self._show(stops.push(stream.push(token_id)))
            if stops.found is not None:
                break
        yield from self._show(stops.push(stream.finish()))
        yield from self._show(stops.finish())
        self.stop_reason = stops.found if stops.found is not None else self.stop_reason
        self.finish_reason = "length" if self.stop_reason is None else "stop"

    def _show(self, piece: str) -> Iterator[str]:
        if piece:
            self.text += piece
            yield piece

    @property
    def first_token_seconds(self) -> float:
        """From the start to the first token: the time that the prompt takes."""
        return self._times[0] - self._started if self._times else 0.0

    @property
    def prompt_rate(self) -> float:
        """Tokens of the prompt per second."""
        return _rate(len(self.prompt_ids), self.first_token_seconds)

    @property
    def generation_rate(self) -> float:
        """Tokens per second after the first one."""
        return self.rate_behind(1)

    def rate_behind(self, count: int) -> float:
        """Tokens per second after the first `count`."""
        times = self._times[count - 1 :]
        return _rate(len(times) - 1, times[-1] - times[0]) if times else 0.0

    def record(self) -> dict[str, Any]:
        """For machines, with the field names of mlx-lm where it has them."""
        return {
            "text": self.text,
            "tokens": self.ids,
            "prompt_tokens": len(self.prompt_ids),
            "prompt_tps": self.prompt_rate,
            "generation_tokens": len(self.ids),
            "generation_tps": self.generation_rate,
            "first_token_s": self.first_token_seconds,
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
        }


def complete(
    model: Llama,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    stop: Sequence[str] = (),
    stop_ids: frozenset[int] | None = None,
    clock: Clock = time.perf_counter,
    **options: Any,
) -> Completion:
    """Text behind a prompt, in pieces as it comes; `options` go to `generate`, `stop_ids` default to `eos_ids`."""
    stop_ids = tokenizer.eos_ids if stop_ids is None else stop_ids
    tokens_BL = torch.tensor([list(prompt_ids)], dtype=torch.long, device=model.device)
    steps = generate(model, tokens_BL, max_tokens=max_tokens, stop_ids=stop_ids, **options)
    ids = (token_id for (token_id,) in steps if token_id is not None)
    return Completion(tokenizer, prompt_ids, ids, stop_ids=stop_ids, stop=stop, clock=clock)


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count > 0 and seconds > 0 else 0.0


def bytes_per_token(model: Llama) -> int:
    """Bytes of weights that one step of one row reads: all but the rows of the embedding that it does not look up."""
    packed = [part for layer in model.modules() if isinstance(layer, QuantLinear) for part in layer.arranged or ()]
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *packed)}
    unread = 0 if model.config.tie_word_embeddings else model.model.embed_tokens.weight.nbytes
    return sum(tensors.values()) - unread


def peak_memory(model: Llama) -> int:
    """Bytes: on a GPU the most that torch has allocated there, on a CPU the most that the process has had."""
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.device)
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
