"""Functions of many small operations, launched on a GPU all at once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class RecordedLaunch(NamedTuple):
    """A graph that reads `arguments` and writes `results`, where they are."""

    graph: torch.cuda.CUDAGraph
    arguments: tuple[Tensor, ...]
    results: Any


class Recorded:
    """`function` of tensors, recorded for the shapes that it meets again; its results are good until the next call.

    It waits for nothing, changes none of its arguments, and does the same for the same shapes. What is on no GPU goes
    to the function itself.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.recordings: dict[Any, RecordedLaunch | None] = {}

    def __call__(self, *arguments: Tensor) -> Any:
        if not arguments[0].is_cuda:
            return self.function(*arguments)
        key = torch.get_float32_matmul_precision(), *((x.shape, x.dtype) for x in arguments)
        if key not in self.recordings:
            self.recordings[key] = None  # the first time prepares what a graph may not do, and compiles
            return self.function(*arguments)
        recording = self.recordings[key] or self._recorded(arguments)
        self.recordings[key] = recording
        for kept, new in zip(recording.arguments, arguments, strict=True):
            kept.copy_(new)
        recording.graph.replay()
        return recording.results

    def _recorded(self, arguments: tuple[Tensor, ...]) -> RecordedLaunch:
        kept, graph = tuple(map(torch.empty_like, arguments)), torch.cuda.CUDAGraph()
        # Another thread may read the next weights meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = self.function(*kept)
        return RecordedLaunch(graph, kept, results)
