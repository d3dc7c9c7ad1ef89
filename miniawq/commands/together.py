"""Requests that are answered at once: how many rows there are, and the batch that answers them."""

from collections.abc import Sequence

import torch

from miniawq.checkpoint.opening import Checkpoint
from miniawq.commands.figures import Writing
from miniawq.engine.batch import Batch, Request
from miniawq.engine.memory import fitting_rows
from miniawq.engine.rows import PlainRows, compiled_rows


class Together:
    """Requests with the settings of a run. `fit` comes before `batch`."""

    def __init__(self, run: Writing, requests: Sequence[Request], is_chat: bool) -> None:
        self.run, self.requests, self.is_chat = run, requests, is_chat
        self.rows = 1
        # Of the longest text, prompt and answer together.
        self.positions = max((len(ids) + max_tokens for ids, max_tokens, _ in requests), default=1)

    def fit(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> tuple[int, int]:
        """Choose how many rows there are: --batch-size, or as many as memory allows. Rows, and positions of each."""
        arguments, most = self.run.arguments, max(1, len(self.requests))
        if arguments.batch_size:
            self.rows = min(arguments.batch_size, most)
        else:
            sizes = {"most": most, "max_seq_len": self.positions, "overhead": arguments.memory_margin}
            self.rows = fitting_rows(checkpoint, device, dtype, **sizes)
            if self.run.decoders.compiles:
                self.rows = 1 << (self.rows.bit_length() - 1)  # so that few steps are ever compiled
        return self.rows, self.positions

    def batch(self) -> Batch:
        """What answers them, when the run has its model."""
        run = self.run
        make = compiled_rows if run.decoders.compiles else PlainRows
        return Batch(
            run.tokenizer,
            make(run.model, self.rows, self.positions),
            self.requests,
            sampling=run.sampling,
            stop=run.arguments.stop,
            stop_ids=run.ends(self.is_chat),
            logprobs=run.arguments.logprobs,
        )
