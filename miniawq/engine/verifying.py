"""The compiled step that also checks guesses: `speculation.py` makes them."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from miniawq.engine.sampling import Sampling
from miniawq.engine.step import DecodeStep
from miniawq.model import Llama

# With its own token these are 8, the fewest columns of a tensor core's product: fewer guesses would cost the same.
MOST_GUESSES = 7


class SpeculativeStep(DecodeStep):
    """A `DecodeStep` of one text that checks guesses by a second one, whose rows are neighbouring tokens of that text.

    Both have one cache. It has slots for the queries of all rows, and the step for one token takes the last of them.
    """

    def __init__(
        self, model: Llama, max_seq_len: int, sampling: Sampling | None = None, *, compiles: bool = True
    ) -> None:
        rows = MOST_GUESSES + 1
        self.several = DecodeStep(model, rows, max_seq_len, sampling, compiles=compiles, texts=1)
        super().__init__(model, 1, 1, sampling, compiles=compiles)
        self.several.generator, self.several.history = self.generator, self.history
        self.cache, self.tables = self.several.cache, self.several.tables
        of_a_row = self.config.num_attention_heads // self.config.num_key_value_heads
        self.caches = tuple(cache_UJE[MOST_GUESSES * of_a_row :] for cache_UJE in self.several.caches)

    def described(self) -> dict[str, str]:
        """As of a `DecodeStep`, with the guesses."""
        return super().described() | {"guesses": str(MOST_GUESSES)}

    def compile(self, directory: Path | None = None) -> None:
        """Both steps, as `DecodeStep.compile`."""
        for_several = None if directory is None else directory / "several"
        if for_several is not None:
            for_several.mkdir(exist_ok=True)
        super().compile(directory)
        self.several.compile(for_several)
        self.build_seconds += self.several.build_seconds

    def verify(self, ids: Sequence[int]) -> Tensor:
        """As `PlainStep.verify`."""
        return self.several.verify(ids)
