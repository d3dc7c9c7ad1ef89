"""How many tokens prompt and answer may have together, and how many of them an answer gets."""

import argparse
import logging

import torch

from miniawq.checkpoint.opening import Checkpoint
from miniawq.commands.flags import DEFAULT_MAX_TOKENS
from miniawq.engine.memory import fitting_context
from miniawq.errors import InvalidInput, UsageError

log = logging.getLogger(__name__)


class Context:
    """`limit` is --max-seq-len, or the model's own until `fit` lowers it, which `why` tells."""

    def __init__(self, arguments: argparse.Namespace, longest: int) -> None:
        self.arguments = arguments
        self.limit = longest if arguments.max_seq_len is None else arguments.max_seq_len
        if not 0 < self.limit <= longest:
            why = f"config.json: max_position_embeddings = {longest}"
            raise UsageError(f"--max-seq-len {arguments.max_seq_len} is out of range", why, f"give {longest} or less")
        self.why = ""

    def room(self, prompt_length: int) -> int:
        """How many tokens to generate: as many as asked for, or as fit. InvalidInput if there is room for none."""
        wanted, left = self.arguments.max_tokens, self.limit - prompt_length
        if left < 1:
            most = f"prompt and answer together may have {self.limit}{self.why}"
            why = f"it has {prompt_length} tokens, {1 - left} too many: {most}"
            raise InvalidInput("the prompt does not fit into the context", why, "shorten it, or begin again")
        return left if wanted == -1 else min(wanted or DEFAULT_MAX_TOKENS, left)

    def wanted(self, prompt_length: int | None) -> int:
        """Positions that a prompt and its answer take; of a conversation (None) as far as --max-seq-len says."""
        if prompt_length is not None:
            return prompt_length + self.room(prompt_length)
        wanted = self.arguments.max_seq_len or max(self.arguments.max_tokens or 0, DEFAULT_MAX_TOKENS)
        return min(self.limit, wanted)

    def fit(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        """Lower a limit that nobody has set to what fits into free memory, and say so where all of it is wanted."""
        if self.arguments.max_seq_len is not None or not self.arguments.memory_check:
            return
        margin, longest = self.arguments.memory_margin, self.limit
        most = fitting_context(checkpoint, device, dtype, overhead=margin)
        if 0 < most < longest:
            self.limit, self.why = most, ", as many as fit into free memory"
            if self.arguments.interactive or self.arguments.max_tokens == -1:
                log.info("the context has %d tokens%s; the model's own has %d", most, self.why, longest)
