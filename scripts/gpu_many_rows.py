"""Many rows beside cuBLAS: ours (`expand` and cuBLAS), cuBLAS with the weight in bfloat16, and `expand` alone.

    python scripts/gpu_many_rows.py --rows 2048

Products of many rows are bound by power, and the clock falls while they run. So the three are replayed in turn, which
the forms of `gpu_kernels.py` are not. Without a GPU each runs once, small, uncompiled.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpu_kernels import BOUNDS, dense_job, expand_job
from gpu_timing import CUDA, SHAPES, Case, copy_bandwidth, seconds_side_by_side


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    arguments = parser.parse_args()
    print(torch.__version__, torch.cuda.get_device_name() if CUDA else "no GPU: each once, small")
    if CUDA:
        print(f"copy {copy_bandwidth() / 1e12:.2f} TB/s")
    print("| shape | cuBLAS us | ours us | cuBLAS / ours | expand us |", flush=True)
    for shape in arguments.shapes.split(","):
        case = Case(*(SHAPES[shape] if CUDA else (64, 512)))
        ours, weights, finish = expand_job(case, arguments.rows)
        error = case.error(finish(ours(*weights[0]))) if finish else 0
        alone, _, _ = expand_job(case, 0)
        dense, dense_sets, _ = dense_job(case, arguments.rows)
        calls = [(dense, dense_sets), (ours, weights), (alone, weights)]
        cublas, product, expand = (seconds * 1e6 for seconds in seconds_side_by_side(calls))
        wrong = "" if error <= BOUNDS["expand"] else f" WRONG by {error:.1e}"
        print(f"| {shape} | {cublas:.1f} | {product:.1f} | {cublas / product:.3f} | {expand:.1f} |{wrong}", flush=True)


if __name__ == "__main__":
    main()
