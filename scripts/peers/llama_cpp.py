"""llama.cpp's Q4_0 and Q4_K on the shapes of `bench_products.py`, in one process with ours, on one thread.

    pip download --no-deps --no-binary :all: llama-cpp-python && tar xf llama_cpp_python-*.tar.gz    # for example
    cmake -B build -S llama_cpp_python-*/vendor/llama.cpp -DBUILD_SHARED_LIBS=ON && cmake --build build --target ggml
    OMP_NUM_THREADS=1 python scripts/peers/llama_cpp.py --libraries build/bin

It is asked through ctypes, as it runs a model: weights in the buffer that rearranges them where it has one for the
type, float32 activations, which it rounds to 8 bits itself (ours stay in float32). Both take turns at four weights of a
shape, four products in a call, as the peer `shared` there; medians of processor time for one product, in microseconds.
"""

import argparse
import ctypes
import sys
from collections.abc import Callable
from ctypes import c_bool, c_int, c_int64, c_size_t, c_void_p
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench_products import SHARING, Case, called, medians, shared

from miniawq.packing import dequantize

FLOAT32, TYPES = 0, {"Q4_0": 2, "Q4_K": 12}  # ggml.h


class InitParams(ctypes.Structure):
    """`ggml_init_params`."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class Ggml:
    """The few functions of llama.cpp's tensor library that one product takes."""

    def __init__(self, directory: Path) -> None:
        self.libraries = [
            ctypes.CDLL(str(directory / f"libggml-{name}.so"), ctypes.RTLD_GLOBAL) for name in ("base", "cpu")
        ]
        self.backend = self.pointer("ggml_backend_cpu_init")
        self.pointer("ggml_backend_cpu_set_n_threads", self.backend, c_int(1))
        self.rearranging = self.pointer("_Z35ggml_backend_cpu_repack_buffer_typev")

    def pointer(self, name: str, *arguments: Any) -> c_void_p:
        """`name(*arguments)`, of whichever library has it."""
        function = next(getattr(library, name) for library in self.libraries[::-1] if hasattr(library, name))
        function.restype = c_void_p
        return c_void_p(function(*arguments))

    def context(self) -> c_void_p:
        """A context whose tensors have no memory yet."""
        return self.pointer("ggml_init", InitParams(1 << 20, None, True))

    def matrix(self, context: c_void_p, kind: int, rows: int, columns: int) -> c_void_p:
        """A tensor [rows, columns]."""
        return self.pointer("ggml_new_tensor_2d", context, c_int(kind), c_int64(columns), c_int64(rows))

    def products(self, kind: int, weight_OI: Tensor, x_TI: Tensor) -> tuple[Callable[[], Any], Tensor]:
        """A function that multiplies with each of several copies of a weight, and y_TO."""
        (outputs, inputs), rows = weight_OI.shape, len(x_TI)
        weights, others = self.context(), self.context()
        copies = [self.matrix(weights, kind, outputs, inputs) for _ in range(SHARING)]
        if not self.pointer("ggml_backend_alloc_ctx_tensors_from_buft", weights, self.rearranging):
            raise SystemExit("llama.cpp has no memory for the weight")
        data = ctypes.create_string_buffer(weight_OI.numel())
        floats = c_void_p(weight_OI.data_ptr())
        counts = (c_int64(0), c_int64(outputs), c_int64(inputs))
        size = self.pointer("ggml_quantize_chunk", c_int(kind), floats, data, *counts, None).value
        x = self.matrix(others, FLOAT32, rows, inputs)
        graph = self.pointer("ggml_new_graph", others)
        for weight in copies:
            self.pointer("ggml_backend_tensor_set", weight, data, c_size_t(0), c_size_t(size))
            y = self.pointer("ggml_mul_mat", others, weight, x)
            self.pointer("ggml_build_forward_expand", graph, y)
        self.pointer("ggml_backend_alloc_ctx_tensors", others, self.backend)
        self.pointer("ggml_backend_tensor_set", x, c_void_p(x_TI.data_ptr()), c_size_t(0), c_size_t(x_TI.nbytes))
        call = partial(self.pointer, "ggml_backend_graph_compute", self.backend, graph)
        call()
        y_TO = torch.empty(rows, outputs)
        self.pointer("ggml_backend_tensor_get", y, c_void_p(y_TO.data_ptr()), c_size_t(0), c_size_t(y_TO.nbytes))
        return call, y_TO


@torch.inference_mode()
def main() -> None:
    """Print a table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libraries", type=Path, required=True, help="directory of libggml-base.so and libggml-cpu.so")
    parser.add_argument("--shapes", default="4096x14336,4096x4096,2048x2048", help="outputs x inputs")
    parser.add_argument("--rows", default="1,2,4,8", help="1,2,4,8")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each line (1)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ggml = Ggml(arguments.libraries)
    print("| shape | rows | ours |", *(f"{name} |" for name in TYPES), *(f"{name} / ours |" for name in TYPES))
    for shape in arguments.shapes.split(","):
        case = Case(*map(int, shape.split("x")), torch.device("cpu"))
        weight_OI, of = dequantize(case.quantized, torch.float32), shared(case)
        for rows in map(int, arguments.rows.split(",")):
            candidate, x_TI = of(rows), case.x(rows, torch.float32)
            assert candidate is not None, f"our compiled product has fewer rows than {rows}"
            turns, exact_TO = {"ours": called(candidate)}, case.exact_TO[:rows].float()
            turns["ours"]()
            for name, kind in TYPES.items():
                call, y_TO = ggml.products(kind, weight_OI, x_TI)
                # Its weights are rounded again, to its own grid.
                assert (y_TO - exact_TO).norm() < 0.2 * exact_TO.norm(), (name, shape, rows)
                turns[name] = called(candidate._replace(call=call, sets=[()]))
            taken = {name: each * 1e6 / SHARING for name, each in medians(turns, arguments.seconds).items()}
            ratios = [f"{taken[name] / taken['ours']:.2f} |" for name in TYPES]
            print(f"| {shape} | {rows} |", *(f"{each:.0f} |" for each in taken.values()), *ratios, flush=True)


if __name__ == "__main__":
    main()
