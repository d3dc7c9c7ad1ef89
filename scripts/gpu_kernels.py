"""Time every form of the INT4 product with many block sizes on the shapes of Llama-3.1 8B and 70B.

    python scripts/gpu_kernels.py --out $OUT --seconds 190
    python scripts/gpu_kernels.py --out $OUT --chosen

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
from miniawq import arrange, forms

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
BOUNDS = {"planes": 2e-5, "dot": 5e-3, "expand": 5e-3}
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


def compiled(function, blocks=None, **options):
    """Compiled with exactly these block sizes, or those of `forms.block_sizes`.

    `SEEN` keeps what Inductor says that the kernels iterate over.
    """
    if not CUDA:
        return function
    torch._dynamo.reset()

    def choose(kind, **sizes):
        SEEN.append(f"{kind} {sizes}")
        return None if kind == "sum" else blocks or forms.block_sizes(kind, **sizes)

    return forms.compiled(function, choose, fx_graph_cache=False, **options)


def planes_job(case, rows, parts, blocks):
    def function(grid_OG, x_QNTVG, sums_TVG, *planes_OVG):
        return forms.reduce_planes(planes_OVG, grid_OG, SCALE_DTYPE, x_QNTVG, sums_TVG)

    x = forms.prescale(case.x_TI[:rows], case.weights[0][1].shape[1], parts)
    sets = [(grid, *x, *forms.planes(words, parts)) for words, grid in case.weights]
    return compiled(function, blocks), sets, lambda y_TO: y_TO


def dot_job(case, rows, blocks, splits):
    if blocks and splits > 1:
        blocks = blocks | {"ZBLOCK": 1}

    def function(words_OPG, grid_OG, x_NTJ, exponents_2O):
        return forms.dot_planes(words_OPG, grid_OG, SCALE_DTYPE, x_NTJ, exponents_2O, splits)

    x_TI = repeated(case.x_TI, rows)
    outputs, groups = case.weights[0][1].shape
    x = forms.spread(x_TI, groups), arrange.magic_exponents(DEVICE, outputs)
    return compiled(function, blocks), [(*weight, *x) for weight in case.weights], lambda y_OT: y_OT.t()[:rows]


def expand_job(case, rows, slice_rows):
    """Expand `slice_rows` outputs into a scratch, multiply, and so on; with no rows only expand."""

    def one(words_OPG, grid_OG, exponents_2O):
        return arrange.expand(words_OPG, grid_OG, SCALE_DTYPE, exponents_2O, torch.bfloat16)

    expand = compiled(one)
    x_TI = repeated(case.x_TI, max(rows, 1))

    def sliced(words_OPG, grid_OG):
        stored_TI, parts_TO = arrange.in_storage_order(x_TI, grid_OG.shape[1]), []
        for first in range(0, len(words_OPG), slice_rows):
            some = slice(first, first + slice_rows)
            exponents_2O = arrange.magic_exponents(DEVICE, len(words_OPG[some]))
            weight_OI = expand(words_OPG[some], grid_OG[some], exponents_2O).view(torch.bfloat16)
            parts_TO += [torch.nn.functional.linear(stored_TI, weight_OI)] if rows else []
        return torch.cat(parts_TO, -1) if len(parts_TO) > 1 else (parts_TO or [stored_TI])[0]

    return sliced, case.weights, (lambda y: y) if rows else None


def dense_job(case, rows):
    """cuBLAS."""
    outputs = case.exact_TO.shape[1]
    weight_OI = exact_weight(*(t[:4096] for t in case.published)).bfloat16()
    weight_OI = weight_OI.repeat(-(-outputs // len(weight_OI)), 1)[:outputs]
    copies = max(2, int(-(-3 * L2_BYTES // weight_OI.nbytes))) if CUDA else 1
    x_TI = repeated(case.x_TI, rows)
    return torch.nn.functional.linear, [(x_TI, weight_OI.clone()) for _ in range(copies)], None


def repeated(x_TI, rows):
    return x_TI.repeat(-(-rows // len(x_TI)), 1)[:rows]


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
    """All jobs, those of the 8B shapes first."""
    for shape, (outputs, inputs) in SHAPES.items():
        groups, small = inputs // GROUP, shape.startswith("8b")
        jobs = [{"kind": "dense", "arguments": {"rows": rows}} for rows in ((1, 16, 256, 2048) if small else (1,))]
        for rows in (1, 2, 3, 4, 8) if small else (1, 2):
            for parts, tile in plane_tiles(rows, groups, outputs):
                jobs.append({"kind": "planes", "arguments": {"rows": rows, "parts": parts, "blocks": blocks(*tile)}})
        for rows, tiles in DOT_TILES.items() if shape in DOTTED else ():
            for tile, splits in itertools.product(tiles, DOTTED[shape]):
                jobs.append({"kind": "dot", "arguments": {"rows": rows, "blocks": blocks(*tile), "splits": splits}})
        for rows in (0, 256, 2048) if shape in ("8b.o", "8b.down", "8b.gate_up", "70b.down") else ():
            jobs.append({"kind": "expand", "arguments": {"rows": rows, "slice_rows": outputs}})
        yield from ({"shape": shape} | job for job in jobs)


def chosen():
    """One job for each shape and number of rows: the form and the tile that a decode step takes, and cuBLAS."""
    for shape, (outputs, inputs) in SHAPES.items():
        groups, small = inputs // GROUP, shape.startswith("8b")
        for rows in (1, 2, 3, 4, 8, 16, 32, 64, 256, 2048):
            if rows <= (2 if groups > 64 else 3):
                parts = forms.parts_for(groups, GROUP // 8, rows)
                yield {"shape": shape, "kind": "planes", "arguments": {"rows": rows, "parts": parts, "blocks": None}}
            elif rows <= 64:
                yield {"shape": shape, "kind": "dot", "arguments": {"rows": rows, "blocks": None, "splits": None}}
            elif small:
                yield {"shape": shape, "kind": "expand", "arguments": {"rows": rows, "slice_rows": outputs}}
            if rows <= 64 or small:
                yield {"shape": shape, "kind": "dense", "arguments": {"rows": rows}}


def plane_tiles(rows, groups, outputs):
    """(parts, (outputs, -, summands, warps, stages)): a warp takes 128 summands, four neighbours a thread."""
    for parts in (1, 2, 4, 8, 16):
        summands = 1 << (parts * groups - 1).bit_length()
        unrolled = rows * 16 // parts
        if 128 <= summands <= 1024 and unrolled <= 16:
            for x in {1: (1, 2, 4, 8), 2: (1, 2, 4), 3: (1, 2, 4), 4: (1, 2), 8: (1, 2)}[rows]:
                # A thread has four summands of x outputs, for each row: no more than 32 sums in registers.
                if x * rows <= 8 and (x > 1 or rows > 2 or outputs <= 8192):
                    yield parts, (x, 0, summands, summands // 128, 1)
    if rows == 1:
        # As many summands as half of the threads or fewer: Triton then loads an activation where it is needed.
        for parts, tile in (
            (1, (32, 0, 32, 4, 1)),
            (1, (32, 0, 32, 2, 1)),
            (2, (16, 0, 64, 4, 1)),
            (2, (32, 0, 64, 4, 1)),
        ):
            if parts * groups <= 64:
                yield parts, (tile[0], 0, parts * groups, *tile[3:])


# XBLOCK (rows), YBLOCK (outputs), R0_BLOCK (words), warps, stages; and in how many parts the sum is cut.
DOT_TILES = {
    8: [(8, 32, 32, 2, 3), (8, 32, 32, 2, 2), (8, 32, 64, 2, 2), (8, 16, 64, 1, 2), (8, 16, 32, 1, 3)],
    16: [(16, 32, 32, 2, 3), (16, 32, 32, 2, 2), (16, 32, 16, 2, 3), (16, 16, 32, 1, 3), (16, 64, 32, 4, 3)],
    32: [(32, 32, 16, 2, 3), (32, 32, 16, 2, 2), (32, 64, 16, 4, 3), (32, 16, 16, 1, 3), (16, 32, 32, 2, 3)],
    64: [(32, 32, 16, 2, 3), (64, 64, 32, 8, 3), (32, 64, 16, 4, 3)],
}
DOTTED = {
    "8b.qkv": (2, 4, 8),
    "8b.o": (2, 4, 8),
    "8b.down": (2, 4, 8),
    "8b.gate_up": (1,),
    "70b.qkv": (1, 2),
    "70b.gate_up": (1,),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--seconds", type=float, default=190, help="stop starting jobs after this long")
    parser.add_argument("--workers", type=int, default=14 if CUDA else 1)
    parser.add_argument("--kinds", default="dense,planes,dot,expand")
    parser.add_argument("--chosen", action="store_true", help="only what a decode step takes, for all numbers of rows")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker()
    print(torch.__version__, torch.cuda.get_device_name() if CUDA else "no GPU: each form once, small", flush=True)
    if CUDA:
        print(f"copy {copy_bandwidth() / 1e12:.2f} TB/s", flush=True)

    jobs = list(chosen() if arguments.chosen else sweep())
    jobs = [job for job in jobs if job["kind"] in arguments.kinds.split(",")]
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
