"""What a cache holds, so that a text that begins like the last one is computed from where they part.

The next prompt of a conversation begins with all that was said before.
"""

from collections.abc import Sequence
from itertools import takewhile

from torch import Tensor


class CachedText:
    """The ids at the positions of one cache, a list for each row, as far as the host has read them.

    The cache may lack the last of them, or hold one more (`delivery.py`): what both have counts. `kept` says how many
    positions of the last prompt were not computed.
    """

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.kept = 0

    def begin(self, tokens_BL: Tensor, length: int) -> int:
        """Note a new prompt. How many of its positions are among the first `length` of the cache; never all of them,
        because the last one's logits are wanted.
        """
        before, self.rows = self.rows, tokens_BL.tolist()
        fits = len(before) == len(self.rows)
        same = map(common_length, before, self.rows) if fits else [0]
        self.kept = min(length, tokens_BL.shape[1] - 1, *same)
        return self.kept

    def add(self, ids: Sequence[int]) -> None:
        """Note one chosen id for each row."""
        for row, token_id in zip(self.rows, ids, strict=True):
            row.append(token_id)

    def forget(self) -> None:
        """Trust nothing in the cache."""
        self.rows = []


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the beginning that both have."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
