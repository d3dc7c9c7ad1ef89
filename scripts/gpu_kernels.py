"""Time every form of the INT4 product with many block sizes on the shapes of Llama-3.1 8B and 70B.

    python scripts/gpu_kernels.py --out $OUT --seconds 290

Each worker process compiles (which takes the processor) and takes turns at the GPU (under a lock) to be timed: cold L2,
several copies of the weight in rotation, one CUDA graph, the median of its replays. Every result is checked against
float64 first. Prints as it goes and writes kernels.json. Without a GPU it runs each form once, small, uncompiled.
"""

import argparse
import contextlib
import fcntl
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from miniawq import forms

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
SEEN = []
# Largest error allowed, relative to sum |x| |w|: see tests/test_kernel_forms.py for where these come from.
BOUNDS = {"planes": 2e-5, "dot": 2e-3, "expand": 2e-3}


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
    sets = list(itertools.islice(itertools.cycle(argument_sets), max(8, len(argument_sets))))
    if not CUDA:
        start = time.perf_counter()
        function(*sets[0])
        return time.perf_counter() - start
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
    times = []
    for _ in range(replays + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3 / len(sets))
    return median(times[3:])


class Case:
    """One shape: copies of random words, scales and zeros, activations, the exact product and its magnitude."""

    def __init__(self, outputs, inputs, rows=64):
        generator = torch.Generator(DEVICE).manual_seed(outputs + inputs)
        groups = inputs // GROUP
        words_OPG = torch.randint(
            -(2**31), 2**31, (outputs, GROUP // 8, groups), generator=generator, dtype=torch.int32, device=DEVICE
        )
        scales_OG = (torch.rand(outputs, groups, generator=generator, device=DEVICE) * 0.02 + 1e-3).half()
        zeros_OG = torch.randint(0, 16, (outputs, groups), generator=generator, dtype=torch.uint8, device=DEVICE)
        self.bytes = words_OPG.numel() * 4 + scales_OG.numel() * 3
        copies = max(2, int(-(-3 * L2_BYTES // self.bytes))) if CUDA else 1
        self.weights = [(words_OPG.clone(), scales_OG.clone(), zeros_OG.clone()) for _ in range(copies)]
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


def compiled(function, blocks=None, **options):
    """Compiled with exactly these block sizes; `SEEN` keeps what Inductor says that the kernels iterate over."""
    if not CUDA:
        return function
    torch._dynamo.reset()

    def choose(kind, **sizes):
        SEEN.append(f"{kind} {sizes}")
        return blocks

    return forms.compiled(function, choose, fx_graph_cache=False, **options)


def planes_job(case, rows, blocks):
    function = compiled(forms.reduce_planes, blocks)
    groups = case.weights[0][1].shape[1]
    x = forms.prescale(case.x_TI[:rows], groups)
    sets = [(words.unbind(1), scales, zeros, *x) for words, scales, zeros in case.weights]
    return function, sets, lambda y_TO: y_TO


def dot_job(case, rows, blocks, splits):
    blocks = blocks | ({"ZBLOCK": 1} if splits > 1 else {})

    def split_dot(*arguments):
        return forms.dot_planes(*arguments, splits=splits)

    function = compiled(split_dot, blocks)
    groups = case.weights[0][1].shape[1]
    x_TI = case.x_TI.repeat(-(-rows // len(case.x_TI)), 1)[:rows].half()
    x = forms.spread(x_TI, groups), forms.magic_exponents(DEVICE)
    return function, [(*weight, *x) for weight in case.weights], lambda y_OT: y_OT.t()[:rows]


def expand_job(case, rows, slice_rows):
    """Expand `slice_rows` outputs into a scratch, multiply, and so on."""
    expand = compiled(forms.expand)
    x_TI = case.x_TI.repeat(-(-rows // len(case.x_TI)), 1)[:rows]
    y_TO = torch.empty(rows, case.exact_TO.shape[1], dtype=x_TI.dtype, device=DEVICE)

    def sliced(words_OPG, scales_OG, zeros_OG):
        for first in range(0, len(words_OPG), slice_rows):
            some = slice(first, first + slice_rows)
            weight_OI = expand(words_OPG[some], scales_OG[some], zeros_OG[some], torch.bfloat16).view(torch.bfloat16)
            torch.mm(x_TI, weight_OI.t(), out=y_TO[:, some])
        return y_TO

    return sliced, case.weights, lambda y: y


def dense_job(case, rows):
    weights = [exact_weight(*(t[:4096] for t in case.weights[0])).bfloat16()]
    weights = [weights[0].repeat(-(-case.exact_TO.shape[1] // len(weights[0])), 1)[: case.exact_TO.shape[1]]]
    copies = max(2, int(-(-3 * L2_BYTES // (weights[0].numel() * 2)))) if CUDA else 1
    x_TI = case.x_TI.repeat(-(-rows // len(case.x_TI)), 1)[:rows]
    return torch.nn.functional.linear, [(x_TI, weights[0].clone()) for _ in range(copies)], None


JOBS = {"planes": planes_job, "dot": dot_job, "expand": expand_job, "dense": dense_job}


def run_job(job, case):
    start = time.perf_counter()
    SEEN.clear()
    kind, arguments = job["kind"], job["arguments"]
    with gpu_turn():
        function, sets, finish = JOBS[kind](case, **arguments)
    y = function(*sets[0])
    if CUDA:
        torch.cuda.synchronize()
    compile_seconds = time.perf_counter() - start
    with gpu_turn():
        error = case.error(finish(y)) if finish else 0.0
        seconds = seconds_per_call(function, sets)
    bound = BOUNDS.get(kind, 1)
    return job | {
        "us": round(seconds * 1e6, 2),
        "TB/s": round(case.bytes / seconds / 1e12, 3),
        "error": f"{error:.1e}",
        "right": error <= bound,
        "compile_s": round(compile_seconds, 1),
        "seen": list(SEEN),
    }


def worker():
    deadline = float(os.environ["DEADLINE"])
    cases = {}
    torch._dynamo.config.recompile_limit = 1000
    for line in sys.stdin:
        job = json.loads(line)
        if time.time() > deadline:
            break
        try:
            if job["shape"] not in cases:
                cases.clear()
                outputs, inputs = SHAPES[job["shape"]] if CUDA else (64, 512)
                with gpu_turn():
                    cases[job["shape"]] = Case(outputs, inputs)
            with torch.no_grad():
                print(json.dumps(run_job(job, cases[job["shape"]])), flush=True)
        except Exception as error:
            print(json.dumps(job | {"failed": f"{type(error).__name__}: {str(error)[-400:]}"}), flush=True)
            if "CUDA error" in str(error):
                raise


def blocks(x, y, r, warps, stages):
    sizes = {"XBLOCK": x, "YBLOCK": y, "R0_BLOCK": r, "num_warps": warps, "num_stages": stages}
    return {name: size for name, size in sizes.items() if size}


def sweep():
    """All jobs, the important ones of a shape first."""
    for shape, (outputs, inputs) in SHAPES.items():
        jobs = [{"kind": "dense", "arguments": {"rows": rows}} for rows in (1, 16, 32, 64, 256, 2048)]
        for rows, tiles in PLANE_TILES.items():
            jobs += [{"kind": "planes", "arguments": {"rows": rows, "blocks": blocks(*tile)}} for tile in tiles]
        for rows, tiles in DOT_TILES.items():
            for tile, splits in itertools.product(tiles, (1, 2, 4)):
                if outputs // tile[1] * splits <= 132 * 12:
                    jobs.append({"kind": "dot", "arguments": {"rows": rows, "blocks": blocks(*tile), "splits": splits}})
        megabytes = outputs * inputs * 2 / 2**20
        for rows in (64, 256, 2048):
            for parts in sorted({1, round(megabytes / 64) or 1, round(megabytes / 24) or 1}):
                arguments = {"rows": rows, "slice_rows": -(-outputs // parts // 128) * 128}
                jobs.append({"kind": "expand", "arguments": arguments})
        yield from ({"shape": shape} | job for job in jobs)


# XBLOCK (outputs), YBLOCK, R0_BLOCK (groups), warps, stages.
PLANE_TILES = {
    1: [
        (16, 0, 16, 2, 1),
        (16, 0, 32, 2, 1),
        (32, 0, 16, 2, 1),
        (8, 0, 32, 2, 1),
        (8, 0, 16, 1, 1),
        (16, 0, 16, 1, 1),
        (32, 0, 16, 4, 1),
        (16, 0, 32, 4, 1),
        (32, 0, 32, 4, 1),
        (64, 0, 16, 4, 1),
        (16, 0, 16, 2, 2),
        (32, 0, 16, 2, 3),
        (4, 0, 32, 1, 1),
        (8, 0, 64, 4, 1),
    ],
    2: [(16, 0, 16, 2, 1), (32, 0, 16, 2, 1), (16, 0, 32, 4, 1), (8, 0, 32, 2, 1)],
    3: [(16, 0, 16, 2, 1), (32, 0, 16, 4, 1), (8, 0, 32, 2, 1)],
}
# XBLOCK (rows), YBLOCK (outputs), R0_BLOCK (words), warps, stages.
DOT_TILES = {
    16: [(16, 64, 32, 4, 1), (16, 64, 32, 4, 2), (16, 64, 32, 4, 3), (16, 64, 64, 4, 2), (16, 128, 32, 8, 3)],
    32: [(32, 64, 32, 4, 2), (32, 64, 32, 4, 3), (32, 128, 32, 8, 3)],
    64: [(64, 64, 16, 8, 3), (64, 64, 32, 8, 2), (64, 128, 16, 8, 3)],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--seconds", type=float, default=290, help="stop starting jobs after this long")
    parser.add_argument("--workers", type=int, default=14 if CUDA else 1)
    parser.add_argument("--kinds", default="dense,planes,dot,expand")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker()
    print(torch.__version__, torch.cuda.get_device_name() if CUDA else "no GPU: each form once, small", flush=True)
    if CUDA:
        a, b = torch.empty(2, 1 << 30, dtype=torch.uint8, device=DEVICE)
        copy = seconds_per_call(lambda source, target: target.copy_(source), [(a, b)])
        print(f"copy {2 * a.numel() / copy / 1e12:.2f} TB/s", flush=True)
        del a, b
        torch.cuda.empty_cache()

    jobs = [job for job in sweep() if job["kind"] in arguments.kinds.split(",")]
    if not CUDA:
        jobs = [job for job in jobs if job["shape"] == "8b.o"]
    queues = [
        jobs[k * len(jobs) // arguments.workers : (k + 1) * len(jobs) // arguments.workers]
        for k in range(arguments.workers)
    ]
    environment = os.environ | {
        "GPU_LOCK": os.environ.get("GPU_LOCK") or tempfile.mkstemp(prefix="gpu-lock")[1],
        "DEADLINE": str(time.time() + arguments.seconds),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115
    workers = []
    for queue in queues:
        process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
        )  # fmt: skip
        process.stdin.write("".join(json.dumps(job) + "\n" for job in queue))
        process.stdin.close()
        workers.append(process)
    results = collect(workers, len(jobs), Path(arguments.out) / "kernels.json")
    if len(results) < len(jobs):
        log.seek(0)
        print("stderr of the workers:", log.read()[-3000:])
    summary(results)


def collect(workers, expected, path):
    """Print results as they come, and keep them in `path`."""
    results = []

    def read(process):
        for line in process.stdout:
            if line.startswith("{"):
                results.append(json.loads(line))
                show(results[-1])

    readers = [threading.Thread(target=read, args=(process,)) for process in workers]
    for reader in readers:
        reader.start()
    while any(reader.is_alive() for reader in readers):
        time.sleep(1)
        path.write_text(json.dumps(list(results), indent=0))
    path.write_text(json.dumps(results, indent=0))
    print(f"{len(results)} of {expected} jobs done", flush=True)
    return results


def show(result):
    what = (
        " ".join(f"{name}={value}" for name, value in result["arguments"].items()).replace("BLOCK", "").replace("'", "")
    )
    if "failed" in result:
        print(result["shape"], result["kind"], what, "FAILED", result["failed"][:200], flush=True)
    else:
        wrong = "" if result["right"] else "  WRONG"
        print(
            f"{result['shape']:12s} {result['kind']:7s} {result['us']:8.2f} us {result['TB/s']:6.3f} TB/s "
            f"err {result['error']} compile {result['compile_s']:5.1f} s  {what}{wrong}",
            flush=True,
        )


def summary(results):
    best = {}
    for result in results:
        if result.get("right"):
            key = (result["shape"], result["kind"], result["arguments"]["rows"])
            best[key] = min(best.get(key, result), result, key=lambda r: r["us"])
    print("\nbest of each shape, form and number of rows")
    for result in best.values():
        show(result)


if __name__ == "__main__":
    sys.exit(main())
