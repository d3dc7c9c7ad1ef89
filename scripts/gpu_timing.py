"""What the timings of products on a GPU share: shapes, random weights with their exact product, turns, clocks."""

import contextlib
import fcntl
import itertools
import os
import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from miniawq import arrange

SHAPES = {
    "8b.qkv": (6144, 4096),
    "8b.o": (4096, 4096),
    "8b.gate_up": (28672, 4096),
    "8b.down": (4096, 14336),
    "70b.qkv": (10240, 8192),
    "70b.o": (8192, 8192),
    "70b.gate_up": (57344, 8192),
    "70b.down": (8192, 28672),
}
GROUP = 128
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
L2_BYTES = 60e6
SCALE_DTYPE = torch.float16


@contextlib.contextmanager
def gpu_turn():
    """One process at a time on the GPU."""
    with open(os.environ["GPU_LOCK"], "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        if CUDA:
            torch.cuda.synchronize()


def seconds_per_call(function, argument_sets, replays=15):
    """Median over replays of a graph that calls `function` on each set of arguments in turn, at least eight calls."""
    (seconds,) = seconds_side_by_side([(function, argument_sets)], replays)
    return seconds


def seconds_side_by_side(calls, replays=15):
    """`seconds_per_call` of several functions whose graphs are replayed in turn: the clock falls for all alike."""
    recorded = [
        record(function, list(itertools.islice(itertools.cycle(sets), max(8, len(sets))))) for function, sets in calls
    ]
    times = [[replay() for replay in recorded] for _ in range(replays + 3)]
    return [median(column[3:]) for column in zip(*times, strict=True)]


def record(function, sets):
    """What replays a graph of `function` on each of the sets, and returns the seconds of a call."""
    if not CUDA:
        start = time.perf_counter()
        function(*sets[0])
        seconds = time.perf_counter() - start
        return lambda: seconds
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for arguments in sets[:2]:
            function(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        for arguments in sets:
            function(*arguments)
        graph.capture_end()

    def replay():
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / len(sets)

    return replay


def copy_bandwidth():
    """Bytes per second read and written by the fastest of six copies of 4 GiB, outside a graph.

    As nodes of a graph, copies of 1 GiB ran at two thirds of that.
    """
    source, target = torch.zeros(2, 4 << 30, dtype=torch.uint8, device=DEVICE)
    times = []
    for _ in range(6):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    del source, target
    torch.cuda.empty_cache()
    return 2 * (4 << 30) / min(times)


class Case:
    """One shape: copies of random words, scales and zeros, activations, the exact product and its magnitude."""

    def __init__(self, outputs, inputs, rows=64):
        generator = torch.Generator(DEVICE).manual_seed(outputs + inputs)
        groups = inputs // GROUP
        words_OPG = torch.randint(
            -(2**31), 2**31, (outputs, GROUP // 8, groups), generator=generator, dtype=torch.int32, device=DEVICE
        )
        scales_OG = (torch.rand(outputs, groups, generator=generator, device=DEVICE) * 0.02 + 1e-3).to(SCALE_DTYPE)
        zeros_OG = torch.randint(0, 16, (outputs, groups), generator=generator, dtype=torch.uint8, device=DEVICE)
        self.published = words_OPG, scales_OG, zeros_OG
        grid_OG = arrange.pack_grid(scales_OG, zeros_OG)
        self.bytes = words_OPG.nbytes + grid_OG.nbytes
        copies = max(2, int(-(-3 * L2_BYTES // self.bytes))) if CUDA else 1
        self.weights = [(words_OPG.clone(), grid_OG.clone()) for _ in range(copies)]
        self.x_TI = torch.randn(rows, inputs, generator=generator, device=DEVICE).bfloat16()
        self.exact_TO = torch.empty(rows, outputs, dtype=torch.float64, device=DEVICE)
        self.magnitude_TO = torch.empty_like(self.exact_TO)
        for some in torch.arange(outputs).split(2048):
            some = slice(int(some[0]), int(some[-1]) + 1)
            weight_OI = exact_weight(words_OPG[some], scales_OG[some], zeros_OG[some])
            self.exact_TO[:, some] = self.x_TI.double() @ weight_OI.t()
            self.magnitude_TO[:, some] = self.x_TI.double().abs() @ weight_OI.abs().t()

    def error(self, y_TO):
        rows = min(len(y_TO), len(self.exact_TO))
        return ((y_TO[:rows].double() - self.exact_TO[:rows]).abs() / self.magnitude_TO[:rows]).max().item()


def exact_weight(words_OPG, scales_OG, zeros_OG):
    nibbles_N = torch.arange(0, 32, 4, device=words_OPG.device, dtype=torch.int32)
    codes_OGPN = (words_OPG.transpose(1, 2).unsqueeze(-1) >> nibbles_N) & 15
    steps_OGPN = codes_OGPN - zeros_OG[..., None, None].double()
    return (steps_OGPN * scales_OG[..., None, None].double()).flatten(1)
