"""Time every form of the INT4 product with many block sizes on the shapes of Llama-3.1 8B and 70B.

    python scripts/gpu_kernels.py --out $OUT --seconds 190      # a sweep of tiles
    python scripts/gpu_kernels.py --out $OUT --jobs chosen      # what a decode step takes, and cuBLAS
    python scripts/gpu_kernels.py --out $OUT --jobs ways        # one row: what searches and launches of Inductor give

Each worker process compiles (which takes the processor) and takes turns at the GPU (under a lock) to be timed: cold L2,
several copies of the weight in rotation, one CUDA graph, the median of its replays. Every result is checked against
float64 first. Prints as it goes and writes kernels.json. Without a GPU it runs each form once, small, uncompiled.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpu_timing import (
    CUDA,
    DEVICE,
    GROUP,
    L2_BYTES,
    SCALE_DTYPE,
    SHAPES,
    Case,
    copy_bandwidth,
    exact_weight,
    gpu_turn,
    seconds_per_call,
)

from miniawq import arrange, forms, kernel, products, tiles

SEEN = []
# Largest error allowed, relative to sum |x| |w|: see tests/test_kernel_forms.py for where these come from.
BOUNDS = {"planes": 2e-5, "dot": 5e-3, "expand": 5e-3}

# Other options than those of `forms.compiled`, and whether Inductor looks for its own block sizes.
WAYS = {
    "chosen": ({}, False),
    "pdl": ({"triton.enable_pdl": True}, False),
    "search": ({}, True),
    "search, looped": ({"triton.persistent_reductions": False}, True),
    "coordinate descent": ({"coordinate_descent_tuning": True}, True),
}


def compiled(function, blocks=None, way="chosen"):
    """Compiled with exactly these block sizes, or those of `tiles.block_sizes`, or those that Inductor finds.

    `SEEN` keeps what Inductor says that the kernels iterate over.
    """
    if not CUDA:
        return function
    torch._dynamo.reset()
    options, searches = WAYS[way]
    # Inductor's key does not see tiles: only those that are always the same may be found again.
    options = options | {"fx_graph_cache": blocks is None and way == "chosen"}
    if searches:
        return torch.compile(function, fullgraph=True, dynamic=False, options=forms.OPTIONS | options)

    def choose(kind, **sizes):
        SEEN.append(f"{kind} {sizes}")
        return blocks if blocks and kind in ("planes", "dot") else tiles.block_sizes(kind, **sizes)

    return forms.compiled(function, choose, **options)


def planes_job(case, rows, parts, blocks, way="chosen"):
    def function(grid_OG, x_QNTVG, sums_TVG, *planes_OVG):
        return forms.reduce_planes(planes_OVG, grid_OG, SCALE_DTYPE, x_QNTVG, sums_TVG)

    x = forms.prescale(case.x_TI[:rows], case.weights[0][1].shape[1], parts)
    sets = [(grid, *x, *forms.planes(words, parts)) for words, grid in case.weights]
    return compiled(function, blocks, way), sets, lambda y_TO: y_TO


def dot_job(case, rows, blocks, splits):
    if blocks and splits > 1:
        blocks = blocks | {"ZBLOCK": 1}

    def function(words_OPG, grid_OG, x_NTPG, exponents_2O):
        return forms.dot_planes(words_OPG, grid_OG, SCALE_DTYPE, x_NTPG, exponents_2O, splits=splits)

    outputs, groups = case.weights[0][1].shape
    # As `products.prepare_dotted` writes them: by a view alone, programs would read them one by one.
    x = forms.spread(repeated(case.x_TI, rows), groups).contiguous(), arrange.magic_exponents(DEVICE, outputs)
    return compiled(function, blocks), [(*weight, *x) for weight in case.weights], lambda y_TO: y_TO[:rows]


def expand_job(case, rows):
    """`kernel.expanded_product`, or `expand` alone with no rows."""
    x_TI = repeated(case.x_TI, max(rows, 1))
    kernel.compiled_expand.cache_clear()

    def function(words_OPG, grid_OG):
        if rows and CUDA:
            return kernel.expanded_product(x_TI, arrange.Arranged(words_OPG, grid_OG), SCALE_DTYPE, None)
        expand = kernel.expand_by_one_kernel if CUDA else arrange.expand
        return expand(words_OPG, grid_OG, SCALE_DTYPE, torch.bfloat16)

    return function, case.weights, (lambda y: y) if rows and CUDA else None


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
    """Compiled twice: the second time Inductor finds what the first has left in its directory."""
    SEEN.clear()
    kind, arguments, build_seconds = job["kind"], job["arguments"], []
    for _ in range(2):
        with gpu_turn():
            function, sets, finish = JOBS[kind](case, **arguments)
        start = time.perf_counter()
        y = function(*sets[0])
        if CUDA:
            torch.cuda.synchronize()
        build_seconds.append(round(time.perf_counter() - start, 2))
    with gpu_turn():
        error = case.error(finish(y)) if finish else 0.0
        seconds = seconds_per_call(function, sets)
    bound = BOUNDS.get(kind, 1)
    return job | {
        "us": round(seconds * 1e6, 2),
        "TB/s": round(case.bytes / seconds / 1e12, 3),
        "error": f"{error:.1e}",
        "right": error <= bound,
        "cold_s": build_seconds[0],
        "warm_s": build_seconds[1],
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
    """Tiles for all forms, those of the 8B shapes first."""
    for shape, (outputs, inputs) in SHAPES.items():
        groups, small = inputs // GROUP, shape.startswith("8b")
        yield from (dense(shape, rows) for rows in ((1, 16, 256, 2048) if small else (1,)))
        for rows in (1, 2, 3, 4, 8) if small else (1, 2):
            for parts, tile in plane_tiles(rows, groups, outputs):
                yield planes(shape, rows, parts, blocks=blocks(*tile))
        for rows, several in DOT_TILES.items() if shape in DOTTED else ():
            for tile, splits in itertools.product(several, DOTTED[shape]):
                yield dot(shape, rows, blocks(*tile), splits)
        for rows in (0, 256, 2048) if shape in ("8b.o", "8b.down", "8b.gate_up", "70b.down") else ():
            yield {"shape": shape, "kind": "expand", "arguments": {"rows": rows}}


def chosen():
    """One job for each shape and number of rows: the form and the tile that a decode step takes, and cuBLAS."""
    for shape, (_, inputs) in SHAPES.items():
        groups, small = inputs // GROUP, shape.startswith("8b")
        for rows in (1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 2048):
            form = products._form_for(torch.device("cuda"), rows, groups)
            if form is products.REDUCE:
                yield planes(shape, rows, tiles.parts_for(groups, GROUP // 8, rows))
            elif form is products.DOT:
                yield dot(shape, rows)
            elif small:
                yield {"shape": shape, "kind": "expand", "arguments": {"rows": rows}}
            if form is not products.EXPAND or small:
                yield dense(shape, rows)


def ways():
    """One row, as a decode step takes it and in the other `WAYS`."""
    for (shape, (_, inputs)), way in itertools.product(SHAPES.items(), WAYS):
        groups = inputs // GROUP
        yield planes(shape, 1, tiles.parts_for(groups, GROUP // 8, 1), way=way)


def dense(shape, rows):
    return {"shape": shape, "kind": "dense", "arguments": {"rows": rows}}


def planes(shape, rows, parts, blocks=None, way="chosen"):
    arguments = {"rows": rows, "parts": parts, "blocks": blocks, "way": way}
    return {"shape": shape, "kind": "planes", "arguments": arguments}


def dot(shape, rows, blocks=None, splits=None):
    return {"shape": shape, "kind": "dot", "arguments": {"rows": rows, "blocks": blocks, "splits": splits}}


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


# XBLOCK (rows), YBLOCK (outputs), R0_BLOCK (words), warps and stages; DOTTED: splits of the sum.
DOT_TILES = {
    8: [(8, 32, 32, 2, 3), (8, 64, 32, 4, 3), (8, 32, 64, 2, 3)],
    16: [(16, 32, 32, 2, 3), (16, 32, 32, 2, 4), (16, 64, 32, 4, 3)],
    32: [(32, 64, 32, 4, 3), (32, 64, 32, 4, 2), (32, 128, 16, 8, 3)],
    64: [(64, 128, 32, 8, 3), (64, 128, 32, 8, 2), (64, 64, 32, 4, 2)],
    128: [(128, 64, 32, 4, 3), (128, 128, 16, 8, 3)],
}
DOTTED = {
    "8b.qkv": (1, 2, 4),
    "8b.o": (2, 4),
    "8b.down": (2, 4),
    "8b.gate_up": (1,),
    "70b.qkv": (1, 2),
    "70b.o": (1, 2, 4),
    "70b.gate_up": (1,),
    "70b.down": (1, 2, 4),
}


JOB_LISTS = {"sweep": sweep, "chosen": chosen, "ways": ways}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--seconds", type=float, default=190, help="stop starting jobs after this long")
    parser.add_argument("--workers", type=int, default=14 if CUDA else 1)
    parser.add_argument("--kinds", default="dense,planes,dot,expand")
    parser.add_argument("--jobs", choices=JOB_LISTS, default="sweep")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker()
    print(torch.__version__, torch.cuda.get_device_name() if CUDA else "no GPU: each form once, small", flush=True)
    if CUDA:
        print(f"copy {copy_bandwidth() / 1e12:.2f} TB/s", flush=True)

    jobs = list(JOB_LISTS[arguments.jobs]())
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
        "TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp(),
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
            f"err {result['error']} cold {result['cold_s']:5.1f} warm {result['warm_s']:5.1f} s  {what}{wrong}",
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
