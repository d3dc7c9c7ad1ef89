"""One product y = x W^T beside the others: our forms as a decode step has them, the library's, torch's own INT4, peers.

    OMP_NUM_THREADS=1 python scripts/bench_products.py --device cpu
    python scripts/bench_products.py --device cuda --shapes 28672x4096 --rows 1,16,2048 --peers ours,bfloat16

Groups of 128, random weights. Every result is first compared with the product in float64; the error is relative to
sum |x| |w|. All peers of one shape and number of rows take turns, so a machine that is busy, or a clock that falls, is
so for all; medians. On a CPU processor time for one thread, wall time for more. On a GPU one CUDA graph for each peer,
which goes through so many copies of the weight that none is in the cache. stdout has one JSON object a line, the first
about the machine and how fast it copies; stderr has a line for people.

    ours        the compiled product of a decode step, alone in its function      float32 on a CPU, else bfloat16
    shared      a quarter of four such products of four weights in one function, which is nearer to a layer (CPU)
    eager       the product of a prompt: `compiled/eager.py`                        float32 on a CPU, else bfloat16
    expand      the weight alone, expanded to bfloat16, as `eager` does it (GPU)
    bfloat16    `torch.nn.functional.linear` with the dequantized weight: cuBLAS, oneDNN
    dense       the same weight and activations by the form that a decode step has for them
    float32     `torch.nn.functional.linear` with all in float32 (CPU)
    torch_int4  torch's own INT4 product: on a GPU tinygemm                         bfloat16
    gemlite     the package of that name, if it is installed (GPU)                  float16
    humming     humming-kernels, if it is installed (GPU); compiles by nvcc         bfloat16

`--kernelbench GB_PER_S` takes the shapes and rows of problem 07_w4a16_gemm of Infatoshi/KernelBench-Hard and adds its
score: the geometric mean of bytes moved / time / the memory bandwidth that the card is sold with.
"""

import argparse
import importlib
import itertools
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._pytree import tree_map

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from miniawq.compiled import (
    Arranged,
    Prepacked,
    Product,
    arrange,
    check,
    compile_with_forms,
    dense_product,
    int4_product,
    multiply,
    multiply_prepacked,
    own_copy,
    prepack,
    prepare,
    written,
)
from miniawq.compiled.eager import expansion
from miniawq.hardware import copy_bandwidth
from miniawq.packing import Quantized, dequantize, encode_awq

GROUP_SIZE, SHARING = 128, 4
SHAPES = {  # OUTPUTSxINPUTS: of Llama-3.1 8B and 70B; of Llama-3.2 1B and 8B
    "cuda": "6144x4096,4096x4096,28672x4096,4096x14336,10240x8192,8192x8192,57344x8192,8192x28672",
    "cpu": "2048x2048,8192x2048,2048x8192,4096x4096,28672x4096,4096x14336",
}
ROWS = {"cuda": "1,2,3,4,8,16,32,64,128,256,512,1024,2048", "cpu": "1,2,3,4,6,8,16,32,64"}
# Shapes and rows of KernelBench-Hard, its problem.yaml.
KERNELBENCH = (("12288x4096", (1, 32, 256)), ("4096x4096", (1,)), ("14336x4096", (16,)))
CHECKED_ROWS = 64  # more rows repeat these
L2_BYTES = 60e6
LARGEST_ERROR = {torch.float32: 2e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}
WARM_UPS, REPLAYS = 3, 15


def bytes_of(weight: Arranged | Tensor) -> int:
    """What a product reads of it."""
    return weight.nbytes if isinstance(weight, Tensor) else weight.words.nbytes + weight.grid.nbytes


class Case:
    """One shape: a random weight, copies of it as they are needed, activations, the exact product and its magnitude."""

    def __init__(self, outputs: int, inputs: int, device: torch.device) -> None:
        self.outputs, self.inputs, self.device = outputs, inputs, device
        self.made: dict[str, Of] = {}
        generator = torch.Generator(device).manual_seed(outputs + inputs)
        options: dict[str, Any] = {"generator": generator, "device": device}
        shape_OG = (outputs, inputs // GROUP_SIZE)
        codes_OI = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, **options)
        scales_OG = (torch.rand(shape_OG, **options) * 0.01 + 0.005).half()
        self.quantized = Quantized(codes_OI, scales_OG, torch.randint(6, 10, shape_OG, dtype=torch.uint8, **options))
        self.x_TI = torch.randn(CHECKED_ROWS, inputs, **options).bfloat16().float()
        exact, magnitude = [], []
        for rows in torch.arange(outputs).split(2048):
            some = slice(int(rows[0]), int(rows[-1]) + 1)
            weight_OI = dequantize(Quantized(*(part[some] for part in self.quantized)), torch.float64)
            exact.append(self.x_TI.double() @ weight_OI.t())
            magnitude.append(self.x_TI.double().abs() @ weight_OI.abs().t())
        self.exact_TO, self.magnitude_TO = torch.cat(exact, 1), torch.cat(magnitude, 1)

    def x(self, rows: int, dtype: torch.dtype) -> Tensor:
        """So many rows of activations."""
        return self.x_TI.repeat(-(-rows // len(self.x_TI)), 1)[:rows].to(dtype).contiguous()

    def sets(self, rows: int, dtype: torch.dtype, weights: Sequence[Any], *others: Any) -> list[tuple[Any, ...]]:
        """Arguments of a call: activations, one of the weights, and what else there is."""
        x_TI = self.x(rows, dtype)
        return [(x_TI, weight, *others) for weight in weights]

    def error(self, y_TO: Tensor) -> float:
        """The largest error, relative to sum |x| |w|."""
        rows = min(len(y_TO), len(self.exact_TO))
        return float(((y_TO[:rows].double() - self.exact_TO[:rows]).abs() / self.magnitude_TO[:rows]).max())

    @property
    def our_dtype(self) -> torch.dtype:
        """Of our activations: what `miniawq generate` chooses."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @cached_property
    def prepacked(self) -> list[Prepacked]:
        """Copies of the weight as our forms read it."""
        return self.clones(prepack(self.quantized))

    @cached_property
    def bfloat16(self) -> list[Tensor]:
        """Copies of the dense weight."""
        return self.clones(dequantize(self.quantized, torch.bfloat16))

    def clones(self, weight: Any, count: int = 0) -> list[Any]:
        """So many copies, or (0) on a GPU as many as do not fit into its cache together."""
        needed = max(2, math.ceil(3 * L2_BYTES / bytes_of(weight))) if self.device.type == "cuda" else 1
        return [
            tree_map(lambda part: part.clone() if isinstance(part, Tensor) else part, weight)
            for _ in range(count or needed)
        ]


class Candidate(NamedTuple):
    """What is timed: `call` with each of the `sets` of arguments in turn.

    `nbytes` is what it reads of one weight, `products` how many products one call does, `note` what is worth knowing;
    `of_result` makes y_TO of what it returns.
    """

    call: Callable[..., Any]
    sets: Sequence[tuple[Any, ...]]
    dtype: torch.dtype
    nbytes: int
    products: int = 1
    note: str = ""
    of_result: Callable[[Any], Tensor] = lambda y_TO: y_TO


Of = Callable[[int], Candidate | None]


def multiply_in_turn(products: Sequence[Product], x_TI: Tensor) -> Tensor:
    """The last of several products, each waiting for the one before."""
    y_TO = multiply(products[:1], prepare(products[:1], x_TI))
    for product in products[1:]:
        x_TI = x_TI + 1e-30 * written(y_TO)[:, :1]
        y_TO = multiply([product], prepare([product], x_TI))
    return y_TO


def in_step(
    case: Case, weights: Sequence[Any], product: Callable[..., Product], dtype: torch.dtype, of_call: int = 1
) -> Of:
    """The products that a decode step chooses, so many in a function; none where it takes what `eager` times."""

    def of(rows: int) -> Candidate | None:
        accepts = partial(check, device=case.device, dtype=dtype)
        products, x_TI = [product(weight, None, rows, dtype, accepts) for weight in weights], case.x(rows, dtype)
        form = products[0].form
        sets = [(products[first : first + of_call], x_TI) for first in range(0, len(products), of_call)]
        call = compile_with_forms(own_copy(multiply_in_turn), [form])
        return None if form.name == "plain" else Candidate(call, sets, dtype, bytes_of(weights[0]), of_call, form.name)

    return of


def eager(case: Case) -> Of:
    weights, dtype = case.clones(arrange(case.quantized)), case.our_dtype
    return lambda rows: Candidate(multiply_prepacked, case.sets(rows, dtype, weights), dtype, bytes_of(weights[0]))


def expand(case: Case) -> Of:
    def of(rows: int) -> Candidate:
        dtype = torch.bfloat16
        expanded, _ = expansion(case.prepacked[0], dtype)
        sets = [(weight.words, weight.grid) for weight in case.prepacked]

        def of_result(weight_OI: Tensor) -> Tensor:
            return linear(case.x(rows, dtype), weight_OI.view(dtype))

        return Candidate(expanded, sets, dtype, bytes_of(case.prepacked[0]), of_result=of_result)

    return of


def by_library(case: Case, weights: Sequence[Tensor]) -> Of:
    dtype = weights[0].dtype
    return lambda rows: Candidate(linear, case.sets(rows, dtype, weights), dtype, bytes_of(weights[0]))


def torch_int4(case: Case) -> Of:
    """Its weight is (code - 8) * scale + offset."""
    codes_OI, scales_OG, zeros_OG = case.quantized
    offsets_OG = (8 - zeros_OG.float()) * scales_OG.float()
    grid_GO2 = torch.stack([scales_OG.float(), offsets_OG], -1).transpose(0, 1).contiguous().bfloat16()
    if case.device.type == "cuda":
        words = torch.ops.aten._convert_weight_to_int4pack(codes_OI[:, ::2] << 4 | codes_OI[:, 1::2], 8)
        product = torch.ops.aten._weight_int4pack_mm
    else:
        words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI.int(), 1)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
    weights, dtype, nbytes = case.clones(words), torch.bfloat16, words.nbytes + grid_GO2.nbytes
    return lambda rows: Candidate(product, case.sets(rows, dtype, weights, GROUP_SIZE, grid_GO2), dtype, nbytes)


def gemlite(case: Case) -> Of:
    library = importlib.import_module("gemlite")
    codes_OI, scales_OG, zeros_OG = case.quantized
    layers, half = [], library.DType.FP16
    for _ in case.prepacked:
        layer = library.GemLiteLinear(4, GROUP_SIZE, case.inputs, case.outputs, input_dtype=half, output_dtype=half)
        layer.pack(codes_OI, scales_OG.view(-1, 1), zeros_OG.half().view(-1, 1), None)
        layers.append(layer)
    nbytes, dtype = bytes_of(case.prepacked[0]), torch.float16
    return lambda rows: Candidate(lambda x_TI, layer: layer(x_TI), case.sets(rows, dtype, layers), dtype, nbytes)


def humming(case: Case) -> Of:
    library = importlib.import_module("humming.layer")
    weight_config = {"quant_method": "awq", "bits": 4, "group_size": GROUP_SIZE, "zero_point": True}
    layers, dtype = [], torch.bfloat16
    for _ in case.prepacked:
        layer = library.HummingLayer(
            shape_n=case.outputs, shape_k=case.inputs, weight_config=weight_config, torch_dtype=dtype
        ).to(case.device)
        layer.load_from_tensors(encode_awq(case.quantized))
        layer.transform()
        layers.append(layer)
    nbytes = bytes_of(case.prepacked[0])
    return lambda rows: Candidate(lambda x_TI, layer: layer(x_TI), case.sets(rows, dtype, layers), dtype, nbytes)


def shared(case: Case) -> Of:
    return in_step(case, case.clones(case.prepacked[0], SHARING), int4_product, case.our_dtype, SHARING)


def float32(case: Case) -> Of:
    return by_library(case, [dequantize(case.quantized, torch.float32)])


EVERYWHERE: dict[str, Callable[[Case], Of]] = {
    "ours": lambda case: in_step(case, case.prepacked, int4_product, case.our_dtype),
    "eager": eager,
    "bfloat16": lambda case: by_library(case, case.bfloat16),
    "dense": lambda case: in_step(case, case.bfloat16, dense_product, torch.bfloat16),
    "torch_int4": torch_int4,
}
PEERS = {
    "cuda": EVERYWHERE | {"expand": expand, "gemlite": gemlite, "humming": humming},
    "cpu": EVERYWHERE | {"shared": shared, "float32": float32},
}


def recorded(candidate: Candidate) -> Callable[[], float]:
    """What replays a graph of at least eight calls, and returns the seconds of one."""
    sets = list(itertools.islice(itertools.cycle(candidate.sets), max(8, len(candidate.sets))))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for arguments in sets[:2]:
            candidate.call(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for arguments in sets:
            candidate.call(*arguments)

    def replay() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / len(sets)

    return replay


def called(candidate: Candidate) -> Callable[[], float]:
    """What calls it once on the CPU, and returns the seconds."""
    clock = time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns
    call = partial(candidate.call, *candidate.sets[0])

    def timed() -> float:
        start = clock()
        call()
        return (clock() - start) * 1e-9

    return timed


def medians(turns: dict[str, Callable[[], float]], seconds: float) -> dict[str, float]:
    """Seconds of each, called in turn for about so long, and some times at least."""
    taken: dict[str, list[float]] = {name: [] for name in turns}
    end, rounds = time.monotonic() + seconds, 0
    while time.monotonic() < end or rounds < WARM_UPS + REPLAYS:
        for name, turn in turns.items():
            taken[name].append(turn())
        rounds += 1
    return {name: statistics.median(times[WARM_UPS:]) for name, times in taken.items()}


def measure(case: Case, peers: Sequence[str], rows: int, seconds: float) -> dict[str, dict[str, Any]]:
    """What is found about each peer that has this number of rows."""
    candidates, found, turns = {}, {}, {}
    for name in peers:
        try:
            if name not in case.made:
                case.made[name] = PEERS[case.device.type][name](case)
            if not (candidate := case.made[name](rows)):
                continue
            error = case.error(candidate.of_result(candidate.call(*candidate.sets[0])))
            right = error <= LARGEST_ERROR[candidate.dtype]
            found[name] = {"form": candidate.note, "error": error, "right": right}
            turns[name] = recorded(candidate) if case.device.type == "cuda" else called(candidate)
            candidates[name] = candidate
        except Exception as problem:
            found[name] = {"failed": f"{type(problem).__name__}: {str(problem)[:300]}"}
    for name, taken in medians(turns, seconds).items() if turns else ():
        each = taken / candidates[name].products
        found[name] |= {"us": each * 1e6, "GB_per_s": candidates[name].nbytes / each / 1e9}
    return found


def bytes_moved(shape: str, rows: int) -> float:
    """As KernelBench-Hard counts them: activations, codes, scales and zeros of 16 bits, the result."""
    outputs, inputs = map(int, shape.split("x"))
    return 2 * rows * (inputs + outputs) + outputs * inputs * (1 / 2 + 2 * 2 / GROUP_SIZE)


def tell(shape: str, rows: int, found: dict[str, dict[str, Any]]) -> None:
    """One line for people, and one for each peer for machines."""
    for name, one in found.items():
        print(json.dumps({"shape": shape, "rows": rows, "peer": name} | one), flush=True)
    ends = {True: "", False: " WRONG"}
    parts = [
        f"{name} {one['us']:.1f}{ends[one['right']]}" if "us" in one else f"{name} failed"
        for name, one in found.items()
    ]
    print(f"{shape} {rows} rows, microseconds: {', '.join(parts)}", file=sys.stderr, flush=True)


@torch.inference_mode()
def main() -> int:
    """Print what is asked for; exit code 1 if a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    add("--shapes", help=f"outputs x inputs ({SHAPES['cpu']} on a CPU)")
    add("--rows", help=f"rows of activations ({ROWS['cpu']} on a CPU)")
    add("--peers", help="which of those above (all of the device)")
    add("--threads", type=int, help="threads of a CPU (torch's default)")
    add("--seconds", type=float, default=1.0, help="for each line (1); 18 turns at least")
    add("--kernelbench", type=float, metavar="GB_PER_S", help="add the score of KernelBench-Hard at this bandwidth")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device, kind = arguments.device, arguments.device.type
    peers = arguments.peers.split(",") if arguments.peers else list(PEERS[kind])
    rows_of = [int(rows) for rows in (arguments.rows or ROWS[kind]).split(",")]
    name = torch.cuda.get_device_name(device) if kind == "cuda" else torch.backends.cpu.get_cpu_capability()
    said = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps(said | {"copy_GB_per_s": copy_bandwidth(device) / 1e9}), flush=True)
    wrong, fractions = False, defaultdict[str, list[float]](list)
    wanted = [(shape, rows_of) for shape in (arguments.shapes or SHAPES[kind]).split(",")]
    for shape, some_rows in KERNELBENCH if arguments.kernelbench else wanted:
        case = Case(*map(int, shape.split("x")), device)
        for rows in some_rows:
            found = measure(case, peers, rows, arguments.seconds)
            tell(shape, rows, found)
            wrong |= not all(one.get("right", True) for one in found.values())
            for peer, one in found.items():
                fractions[peer].append(bytes_moved(shape, rows) / (one["us"] * 1e3) if "us" in one else math.nan)
    if arguments.kernelbench:
        scores = {peer: statistics.geometric_mean(some) / arguments.kernelbench for peer, some in fractions.items()}
        print(json.dumps({"kernelbench": scores}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
