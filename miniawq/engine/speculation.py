"""Several tokens by one step, where a text repeats itself: what followed before is guessed, and checked.

A step reads all weights to compute one token. It computes a few neighbouring tokens in little more time, if somebody
says what they are. Prompt lookup (Saxena, github.com/apoorvumang/prompt-lookup-decoding) says so without a second
model: where the last few ids stand earlier in the text, what followed them there may follow again. `verify` feeds the
guesses and chooses what follows each, as the step would have. Guesses are kept as far as they are what was chosen, and
the first choice that differs is kept too.

So the text is the one without guesses, up to rounding: most probable tokens stay the most probable ones, and a drawn
token is drawn from the same distribution (rejection sampling of a guess that is certain; Leviathan et al., arXiv
2211.17192). Only which random number meets which token is another matter.
"""

from collections.abc import Iterator, Sequence
from itertools import cycle, islice

import torch
from torch import Tensor

from miniawq.engine.cached_text import common_length
from miniawq.engine.delivery import on_their_way
from miniawq.engine.start import Step
from miniawq.engine.verifying import MOST_GUESSES

RUN = 3  # ids that must stand earlier in the text
# In steps: checking guesses costs less than half a one, and waiting for a token to see them begin wrong a twentieth.
# Where too few come true there are few attempts, each after so many tokens.
PRICE, WAITING, CREDIT, PAUSE = 0.5, 0.05, 1.5, 48


class Lookup:
    """The ids of a text, and where each run of RUN ids ended before.

    Guesses cost time, so it counts them (`guessed`) and those that came true (`right`).
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids: list[int] = []
        self.ends: dict[tuple[int, ...], int] = {}
        self.guessed = self.right = self.pause = 0
        self.credit = CREDIT
        for token_id in ids:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        """The text goes on."""
        if len(self.ids) >= RUN:
            self.ends[tuple(self.ids[-RUN:])] = len(self.ids)
        self.ids.append(token_id)
        self.pause = max(0, self.pause - 1)

    def guess(self, most: int) -> list[int]:
        """What followed the last ids where they stood last; nothing if they did not, or if too few guesses came true.

        Where that reaches the end of the text, the text goes round in a circle.
        """
        end = self.ends.get(tuple(self.ids[-RUN:]))
        return [] if end is None or self.pause else list(islice(cycle(self.ids[end:]), max(0, most)))

    def learn(self, guessed: int, right: int) -> None:
        """So many guesses were checked, none where they began wrong, and so many came true."""
        self.guessed, self.right = self.guessed + guessed, self.right + right
        self.credit = min(CREDIT, self.credit + right - (PRICE if guessed else WAITING))
        if self.credit <= 0:
            self.credit, self.pause = PRICE, PAUSE


def speculated(step: Step, ids_B: Tensor, count: int, lookup: Lookup) -> Iterator[list[int]]:
    """`delivery.delivered` for one text, with guesses.

    A guess is made of the ids that the host knows. It begins with the token that the device has just computed, so only
    where there is one the next step waits until that token has come.
    """
    while count:
        guesses = lookup.guess(min(MOST_GUESSES + 1, count - 1))
        arrive, ahead_B = on_their_way(ids_B), None
        if not guesses and count > 1 and step.returns_early:
            ahead_B = step.step(ids_B)
        (token_id,) = arrive()
        lookup.add(token_id)
        yield [token_id]
        count -= 1
        if count and len(guesses) > 1 and guesses[0] == token_id:
            chosen_L = step.verify([token_id, *guesses[1:]])
            chosen = chosen_L.tolist()
            right = common_length(guesses[1:], chosen)
            keep(step, [token_id, *chosen[:right]])
            lookup.learn(len(guesses) - 1, right)
            for token_id in chosen[:right]:
                lookup.add(token_id)
                yield [token_id]
            count, ids_B = count - right, chosen_L[right : right + 1]
        elif count:
            ids_B = step.step(ids_B) if ahead_B is None else ahead_B
            if guesses and guesses[0] != token_id:
                lookup.learn(0, 0)


def keep(step: Step, ids: Sequence[int]) -> None:
    """Let the text go on with these ids, which have been verified."""
    step.cache.length += len(ids)
    if step.history is not None:
        step.history.extend(torch.tensor(ids, device=step.history.counts_BV.device))
