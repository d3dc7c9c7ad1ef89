"""One more token for rows that have lengths of their own, by the model as it is or by a compiled step.

Each row is computed as if it were alone: its positions count from its own beginning, so angles are those of a text
alone; it sees its own positions up to its token and nothing else; all other operations act on rows by themselves. What
a row holds beyond its length (an earlier text, padding) is finite, and has weight 0. Only sums may be taken in another
order than alone.

Rows that begin alike share that beginning: it runs once, and is copied (`share`).
"""

import copy
import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from miniawq.compiled import are_here, first_line, kept
from miniawq.engine.attend import first_seen, mask_of
from miniawq.engine.memory import PREFILL_CHUNK
from miniawq.engine.start import Read, Step, ready_for_steps
from miniawq.engine.step import DecodeStep
from miniawq.model import KVCache, Llama, narrowed

log = logging.getLogger(__name__)


class RowsStep(Protocol):
    """`PlainRows` or `CompiledRows`: a model, a cache, and one token more."""

    model: Llama
    cache: KVCache

    @property
    def read(self) -> Read: ...

    def next_logits(self, ids_B: Tensor, lengths: Sequence[int]) -> Tensor:
        """Append one id to each of the first rows, after so many positions of it; logits_BV of what follows."""


class PlainRows:
    """Nothing to compile."""

    def __init__(self, model: Llama, rows: int, max_seq_len: int) -> None:
        self.model, self.surroundings = model, ready_for_steps(model)
        self.read: Read = model.model
        self.cache = KVCache(model.config, rows, max_seq_len, device=model.device, dtype=model.dtype)

    def next_logits(self, ids_B: Tensor, lengths: Sequence[int]) -> Tensor:
        with self.surroundings():
            return self._logits(ids_B, lengths)

    def _logits(self, ids_B: Tensor, lengths: Sequence[int]) -> Tensor:
        decoder, config = self.model.model, self.model.config
        end, position_B = max(lengths) + 1, torch.tensor(lengths, device=ids_B.device)
        none_B = torch.zeros_like(position_B)  # of padding
        ropes = decoder.ropes(position_B[:, None, None], self.cache.max_seq_len)
        starts = {window: first_seen(position_B, none_B, window) for window in set(config.layer_windows)}
        masks = {window: mask_of(position_B, first_B, end) for window, first_B in starts.items()}
        ends = RowEnds(self.cache, position_B, end)
        h_BLD = decoder.run(decoder.embed(ids_B[:, None]), ropes, masks, ends)
        return self.model.logits(h_BLD[:, -1])


class RowEnds(KVCache):
    """A cache as `model.Attention` takes it, whose new position is another one in each row."""

    def __init__(self, cache: KVCache, position_B: Tensor, end: int) -> None:
        rows = some_rows(cache, 0, len(position_B))
        self.keys_NBMJE, self.values_NBMJE = rows.keys_NBMJE, rows.values_NBMJE
        self.row_B, self.position_B, self.end = torch.arange(len(position_B), device=position_B.device), position_B, end

    def append(self, layer: int, k_BJLE: Tensor, v_BJLE: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values at the ends of the rows; return all up to the longest, [B, J, M, E]."""
        seen = []
        for kept_NBMJE, new_BJLE in ((self.keys_NBMJE, k_BJLE), (self.values_NBMJE, v_BJLE)):
            kept_NBMJE[layer][self.row_B, self.position_B] = narrowed(new_BJLE[:, :, 0], kept_NBMJE.dtype)
            seen.append(kept_NBMJE[layer, :, : self.end].transpose(1, 2).to(new_BJLE.dtype))
        return seen[0], seen[1]


class CompiledRows(DecodeStep):
    """The compiled step with a position for each row. It is compiled for a number of rows, and for any lengths."""

    def next_logits(self, ids_B: Tensor, lengths: Sequence[int]) -> Tensor:
        # The others are computed nevertheless, after what all texts have: a beginning that they share stays.
        left_out = (0, len(self.ids_B) - len(ids_B))
        self.position_B.copy_(pad(torch.tensor(lengths), left_out, value=min(lengths)))
        self._compute(pad(ids_B, left_out), max(lengths))
        return self.logits_BV[: len(ids_B)]

    @property
    def ends_together(self) -> bool:
        """No: each row has its length."""
        return False

    def make_ready(self) -> None:
        """Compile, or take what an earlier process has compiled."""
        is_warm = are_here(self.described())
        log.info("%s for %d rows", "loading the compiled step" if is_warm else "compiling, this once,", len(self.ids_B))
        with torch.inference_mode(), kept(self.described()) as directory:
            self.compile(directory)
            if self.device.type == "cuda":
                self.read.compile()


def compiled_rows(model: Llama, rows: int, max_seq_len: int) -> RowsStep:
    """Compiled rows that are ready; plain ones, with a warning, if they cannot be compiled."""
    try:
        step = CompiledRows(model, rows, max_seq_len)
        step.make_ready()
        return step
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        log.warning("the decode step cannot be compiled, and stays slow: %s", first_line(error))
        log.debug("this is why", exc_info=True)
    return PlainRows(model, rows, max_seq_len)


def prefill(step: RowsStep, first: int, prompts: Sequence[Sequence[int]], past: int) -> Tensor:
    """Run prompts into the rows from `first` on, after `past` positions that are there; logits_BV of their last tokens.

    Shorter ones are filled up after their end, where no token of them sees. Only one alone may be longer than a piece.
    """
    model, longest = step.model, max(map(len, prompts))
    filled = [[*ids, *ids[-1:] * (longest - len(ids))] for ids in map(list, prompts)]
    tokens_BL = torch.tensor(filled, device=model.device)
    cache = some_rows(step.cache, first, len(prompts))
    cache.length = past
    for chunk_BL in tokens_BL.split(PREFILL_CHUNK, dim=1):
        h_BLD = step.read(chunk_BL, cache)
    last_B = torch.tensor([(len(ids) - 1) % PREFILL_CHUNK for ids in prompts], device=model.device)
    return model.logits(h_BLD[torch.arange(len(prompts), device=model.device), last_B])


def share(step: RowsStep, ids: Sequence[int]) -> None:
    """Let all rows begin with these ids."""
    if ids:
        prefill(step, 0, [ids], 0)
        for kept_NBMJE in (step.cache.keys_NBMJE, step.cache.values_NBMJE):
            kept_NBMJE[:, 1:, : len(ids)] = kept_NBMJE[:, :1, : len(ids)]


def clear(step: RowsStep | Step, row: int, past: int) -> None:
    """Make finite again what a row holds after `past` positions: 0 times NaN is no number."""
    for kept_NBMJE in (step.cache.keys_NBMJE, step.cache.values_NBMJE):
        kept_NBMJE[:, row, past:] = 0


def move(step: RowsStep, row: int, into: int) -> None:
    """Let what a row holds go on in another one."""
    for kept_NBMJE in (step.cache.keys_NBMJE, step.cache.values_NBMJE):
        kept_NBMJE[:, into] = kept_NBMJE[:, row]


def some_rows(cache: KVCache, first: int, count: int) -> KVCache:
    """A view of neighbouring rows."""
    rows = copy.copy(cache)
    rows.keys_NBMJE, rows.values_NBMJE = (
        kept_NBMJE[:, first : first + count] for kept_NBMJE in (cache.keys_NBMJE, cache.values_NBMJE)
    )
    return rows
