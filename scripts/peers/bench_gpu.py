"""Other people's INT4 kernels on the shapes of gpu_kernels.py, in one process: cuBLAS, tinygemm, gemlite, AutoAWQ.

    python scripts/peers/bench_gpu.py --out $OUT --seconds 200

gemlite (0.6.0) must be importable, AutoAWQ's `awq/modules/triton/gemm.py` importable as `autoawq_gemm`; what is absent
is said and left out. Cold L2, several copies of the weight in rotation, CUDA graphs, the median of the replays. With
GPU_LOCK set to a file it takes turns with gpu_kernels.py.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2] / ".whl/peers")]
os.environ.setdefault("GPU_LOCK", tempfile.mkstemp(prefix="gpu-lock")[1])
from gpu_timing import CUDA, GROUP, L2_BYTES, SHAPES, Case, exact_weight, gpu_turn, seconds_per_call  # noqa: E402

from miniawq.packing import pack  # noqa: E402

ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 2048)


def codes_of(words_OPG):
    nibbles_N = torch.arange(0, 32, 4, device=words_OPG.device, dtype=torch.int32)
    return ((words_OPG.transpose(1, 2).unsqueeze(-1) >> nibbles_N) & 15).flatten(1)


def cublas(case, copies):
    weight_OI = torch.cat([exact_weight(*(t[some] for t in case.published)).bfloat16() for some in slices(case)])
    copies = max(2, int(-(-3 * L2_BYTES // (weight_OI.numel() * 2))))
    weights = [weight_OI.clone() for _ in range(copies)]
    return lambda x_TI, weight_OI: torch.nn.functional.linear(x_TI, weight_OI), weights, torch.bfloat16


def tinygemm(case, copies):
    words_OPG, scales_OG, zeros_OG = case.published
    codes_OI = codes_of(words_OPG).to(torch.int32)
    bytes_OI = (codes_OI[:, ::2] << 4 | codes_OI[:, 1::2]).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(bytes_OI, 8)
    offsets_OG = (8 - zeros_OG.float()) * scales_OG.float()
    scales_GO2 = torch.stack([scales_OG.float().t(), offsets_OG.t()], -1).contiguous().bfloat16()
    weights = [packed.clone() for _ in range(copies)]
    return lambda x, weight: torch.ops.aten._weight_int4pack_mm(x, weight, GROUP, scales_GO2), weights, torch.bfloat16


def gemlite_kernel(case, copies):
    import gemlite

    gemlite.load_config(str(Path(gemlite.__file__).parent / "configs/h100.json"))
    words_OPG, scales_OG, zeros_OG = case.published
    codes_OI = codes_of(words_OPG).to(torch.uint8)
    layers = []
    for _ in range(copies):
        layer = gemlite.GemLiteLinear(
            4, group_size=GROUP, in_features=codes_OI.shape[1], out_features=codes_OI.shape[0],
            input_dtype=gemlite.DType.FP16, output_dtype=gemlite.DType.FP16,
        )  # fmt: skip
        layer.pack(codes_OI, scales_OG.view(-1, 1), zeros_OG.half().view(-1, 1), None)
        layers.append(layer)
    return lambda x, layer: layer(x), layers, torch.float16


def autoawq(case, copies):
    from autoawq_gemm import awq_gemm_triton

    words_OPG, scales_OG, zeros_OG = case.published
    qweight_IW = torch.cat([pack(codes_of(words_OPG[some]).t().to(torch.uint8)) for some in slices(case)], 1)
    qzeros_GW, scales_GO = pack(zeros_OG.t()), scales_OG.t().contiguous()
    weights = [qweight_IW.clone() for _ in range(copies)]
    return lambda x, qweight: awq_gemm_triton(x, qweight, scales_GO, qzeros_GW, 8), weights, torch.float16


def slices(case):
    return [slice(first, first + 4096) for first in range(0, len(case.weights[0][0]), 4096)]


KERNELS = {"cublas": cublas, "tinygemm": tinygemm, "gemlite": gemlite_kernel, "autoawq": autoawq}
# Above these rows a kernel takes long and nobody would use it.
MOST_ROWS = {"cublas": 2048, "tinygemm": 64, "gemlite": 256, "autoawq": 64}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    arguments = parser.parse_args()
    deadline, results = time.time() + arguments.seconds, []
    for shape in arguments.shapes.split(","):
        with gpu_turn():
            case = Case(*(SHAPES[shape] if CUDA else (1024, 1024)))
        for name, make in KERNELS.items():
            if time.time() > deadline:
                break
            try:
                with gpu_turn():
                    kernel, weights, dtype = make(case, len(case.weights))
                for rows in (rows for rows in ROWS if rows <= MOST_ROWS[name]):
                    x_TI = case.x_TI.repeat(-(-rows // len(case.x_TI)), 1)[:rows].to(dtype)
                    error = case.error(kernel(x_TI, weights[0]))
                    with gpu_turn():
                        seconds = seconds_per_call(kernel, [(x_TI, weight) for weight in weights])
                    result = {
                        "shape": shape,
                        "kernel": name,
                        "rows": rows,
                        "us": round(seconds * 1e6, 2),
                        "error": error,
                    }
                    results.append(result)
                    print(f"{shape:12s} {name:9s} rows {rows:5d} {seconds * 1e6:9.2f} us  err {error:.1e}", flush=True)
            except Exception as error:
                print(shape, name, "FAILED", type(error).__name__, str(error)[-300:], flush=True)
            weights = kernel = None
        Path(arguments.out, "peers.json").write_text(json.dumps(results, indent=0))


if __name__ == "__main__":
    sys.exit(main())
