"""Ids on their way from the device to the host, which reads them one step late so that the device never waits.

A GPU computes what was launched while the host goes on. If the host read the ids of a step before it launched the next,
the GPU would stand still meanwhile. But the next step finds those ids on the device; the host only has to know them to
show them, and to see that a text has ended. So the next step is launched first. What it computes after the end of a
text is thrown away.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from miniawq.engine.start import Step


def delivered(step: Step, ids_B: Tensor, count: int) -> Iterator[list[int]]:
    """ids_B and what follows them, as lists: `count` in all, so at most `count - 1` calls of the step."""
    for left in reversed(range(count)):
        arrive = on_their_way(ids_B)
        if left and step.returns_early:
            ids_B = step.step(ids_B)
            yield arrive()
        else:
            yield arrive()
            ids_B = step.step(ids_B) if left else ids_B


def observed(
    step: Step, ids_B: Tensor, count: int, logits_BV: Tensor, watch: Callable[[Tensor, list[int]], None]
) -> Iterator[list[int]]:
    """As `delivered`, but `watch` sees the ids, and the logits that they were chosen from, before there are others."""
    for left in reversed(range(count)):
        ids = ids_B.tolist()
        watch(logits_BV, ids)
        yield ids
        if left:
            ids_B = step.step(ids_B)
            logits_BV = step.logits_BV


def on_their_way(ids_B: Tensor) -> Callable[[], list[int]]:
    """Begin to copy ids to the host. The result waits for this copy, and for nothing that is launched after it."""
    if not ids_B.is_cuda:
        return ids_B.tolist
    # Such a copy goes to pinned memory, and so on beside the host.
    copied_B, has_come = ids_B.to("cpu", non_blocking=True), torch.cuda.Event()
    has_come.record()

    def arrive() -> list[int]:
        has_come.synchronize()
        return copied_B.tolist()

    return arrive
