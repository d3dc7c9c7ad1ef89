"""The oracle on other people's code: adapters, and the table of docs/oracle.md.

    python scripts/peers/oracle.py SOURCES [PEER ...]       SOURCES holds the unpacked sdists
    python scripts/peers/oracle.py SOURCES --check          fail unless each peer's file of expected failures is exact

Needs an environment of its own, on any machine without a GPU:

    pip install torch==2.13.0 triton==3.9.0 torchao==0.18.0 compressed-tensors==0.20.0 'miniawq[oracle]'
    pip download --no-deps --no-binary :all: autoawq==0.2.9 gptqmodel==7.7.0 vllm==0.6.3, then tar xf each

Single files of AutoAWQ, GPTQModel and vLLM are loaded without their packages, whose imports need a GPU. An adapter only
renames, reshapes and transposes; where a peer has no function, the adapter has none.
"""

import argparse
import ast
import contextlib
import importlib
import importlib.util
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from miniawq.oracle import truth  # noqa: E402
from miniawq.oracle.contract import LEVELS  # noqa: E402
from miniawq.oracle.door import chosen, conformance  # noqa: E402
from miniawq.oracle.report import ConformanceReport, as_text, badge, read_expected_failures  # noqa: E402

EXPECTED = ROOT / "miniawq" / "oracle" / "peers"


def file_module(path: Path) -> types.ModuleType:
    """A single file as a module, without its package."""
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}_{abs(hash(path))}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hollow_packages(root: Path, *names: str) -> None:
    """Packages whose modules can be imported, but whose __init__ is not run."""
    for name in names:
        package = types.ModuleType(name)
        package.__path__ = [str(root / name.replace(".", "/"))]
        sys.modules[name] = package


def method(path: Path, name: str) -> Callable[..., Any]:
    """One method of a file as a function, without importing the file."""
    tree = ast.parse(path.read_text())
    found = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    found.decorator_list = []
    scope: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module([found], []), str(path), "exec"), scope)
    return scope[name]


def size_of(group_size: int, k: int) -> int:
    """The contract's -1 in numbers."""
    return k if group_size == -1 else group_size


def codes_of(fake: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> Tensor:
    """The integer codes behind a fake-quantized weight [N, K], which is what these quantizers return."""
    size = size_of(group_size, fake.shape[1])
    steps = fake.double() / scales.double().repeat_interleave(size, 1)
    return (steps.round() + zeros.double().repeat_interleave(size, 1)).t().to(torch.uint8)


def autoawq(sources: Path) -> Any:
    """AutoAWQ: `packing_utils`, the packer of `WQLinear_GEMM`, `pseudo_quantize_tensor` on float16 weights."""
    root = sources / "autoawq-0.2.9"
    packing = file_module(root / "awq/utils/packing_utils.py")
    hollow_packages(root, "awq", "awq.utils", "awq.modules", "awq.modules.linear", "awq.modules.triton")
    sys.modules["awq.utils.utils"] = SimpleNamespace(get_best_device=lambda: "cpu")  # type: ignore[assignment]
    gemm = importlib.import_module("awq.modules.linear.gemm")
    quantizer = method(root / "awq/quantize/quantizer.py", "pseudo_quantize_tensor")

    def pack(codes: Tensor) -> Tensor:
        k, n = codes.shape
        linear = torch.nn.Linear(k, n, bias=False)
        linear.weight.data = codes.t().float()
        layer = gemm.WQLinear_GEMM.from_linear(linear, 4, k, scales=torch.ones(1, n), zeros=torch.zeros(1, n))
        return layer.qweight

    def unpack(words: Tensor) -> Tensor:
        codes, _ = packing.reverse_awq_order(*packing.unpack_awq(words, words, 4), 4)
        return torch.bitwise_and(codes, 15).to(torch.uint8)

    def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
        return packing.dequantize_gemm(qweight, qzeros, scales, 4, size_of(group_size, len(qweight)))

    def quantize(weight: Tensor, group_size: int) -> Any:
        me = SimpleNamespace(group_size=group_size, zero_point=True, w_bit=4)
        fake, scales, zeros = quantizer(me, weight.half())
        return codes_of(fake, scales, zeros, group_size), zeros.t().to(torch.uint8), scales.t()

    # The packer makes N // 32 * 4 words: any N that 32 does not divide ends in an IndexError.
    return SimpleNamespace(name="AutoAWQ", version="0.2.9", pack=pack, unpack=unpack, dequantize=dequantize,
                           quantize=quantize, multiple_of_n=32)  # fmt: skip


def triton_kernels(name: str, version: str, path: Path) -> Any:
    """The Triton kernels that vLLM and AutoAWQ share, interpreted; leading dimensions and bias as WQLinear."""
    kernels = file_module(path)
    kernels.get_same_device_cm = lambda tensor: contextlib.nullcontext()

    def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
        return kernels.awq_dequantize_triton(qweight, scales, qzeros)

    def matmul(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, bias: Any = None) -> Tensor:
        y = kernels.awq_gemm_triton(x.reshape(-1, x.shape[-1]), qweight, scales, qzeros, 8)
        return (y if bias is None else y + bias).reshape(*x.shape[:-1], y.shape[-1])

    return SimpleNamespace(name=name, version=version, dequantize=dequantize, matmul=matmul, dtypes=("float16",))


def gptqmodel(sources: Path) -> Any:
    """GPTQModel: its copy of `packing_utils`, and its `pseudo_quantize_tensor` in the dtype of the weight."""
    root = sources / "gptqmodel-7.7.0" / "gptqmodel"
    packing = file_module(root / "quantization/awq/utils/packing_utils.py")
    quantizer = method(root / "looper/awq_processor.py", "pseudo_quantize_tensor")

    def pack(codes: Tensor) -> Tensor:
        return packing.pack_awq(codes, codes, 4)[0]

    def unpack(words: Tensor) -> Tensor:
        codes, _ = packing.reverse_awq_order(*packing.unpack_awq(words, words, 4), 4)
        return codes.to(torch.uint8)

    def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
        return packing.dequantize_gemm(qweight, qzeros, scales, 4, size_of(group_size, len(qweight)))

    def quantize(weight: Tensor, group_size: int) -> Any:
        me = SimpleNamespace(qcfg=SimpleNamespace(group_size=group_size, sym=False, bits=4))
        fake, scales, zeros = quantizer(me, weight)
        return codes_of(fake, scales, zeros, group_size), zeros.t().to(torch.uint8), scales.t().half()

    return SimpleNamespace(name="GPTQModel", version="7.7.0", pack=pack, unpack=unpack, dequantize=dequantize,
                           quantize=quantize)  # fmt: skip


def compressed_tensors(sources: Path) -> Any:
    """compressed-tensors: its AutoAWQ converter and its decompressor, its quantization parameters and codes."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import quantize as to_codes
    from compressed_tensors.quantization.utils.helpers import calculate_qparams

    def settings(group_size: int) -> Any:
        strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
        return QuantizationArgs(num_bits=4, type="int", symmetric=False, **strategy)

    def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
        tensors = {"m.qweight": qweight, "m.qzeros": qzeros, "m.scales": scales}
        converted = AutoAWQConverter(group_size=group_size).process(tensors)
        local = {name.removeprefix("m."): tensor for name, tensor in converted.items()}
        scheme = QuantizationScheme(targets=["Linear"], weights=settings(group_size))
        return PackedQuantizationCompressor.decompress(local, scheme)["weight"].t()

    def quantize(weight: Tensor, group_size: int) -> Any:
        args, size = settings(group_size), size_of(group_size, weight.shape[1])
        if weight.shape[1] % size:
            to_codes(weight, torch.ones(len(weight), 1), torch.zeros(len(weight), 1), args, dtype=torch.int8)
        groups = weight.unflatten(1, (-1, size))
        scales, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        codes = to_codes(weight, scales, zeros, args, dtype=torch.int8)
        return (codes + 8).t().to(torch.uint8), (zeros + 8).t().to(torch.uint8), scales.t().half()

    version = importlib.import_module("compressed_tensors").__version__
    # unpack_from_int32 cannot view one transposed row of packed zeros as bytes, so N = 8 fails.
    return SimpleNamespace(name="compressed-tensors", version=version, dequantize=dequantize, quantize=quantize,
                           multiple_of_n=16)  # fmt: skip


def torchao(sources: Path) -> Any:
    """torchao: affine parameters, codes and values; the int4 matmul of PyTorch for CPUs. Words are unpacked here."""
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
        codes = truth.unpack(qweight).t().contiguous()
        zeros, size = truth.unpack(qzeros).t(), size_of(group_size, codes.shape[1])
        return dequantize_affine(codes, (1, size), scales.t(), zeros.int(), torch.uint8, 0, 15,
                                 output_dtype=torch.float16).t()  # fmt: skip

    def quantize(weight: Tensor, group_size: int) -> Any:
        size = size_of(group_size, weight.shape[1])
        scales, zeros = choose_qparams_affine(weight, MappingType.ASYMMETRIC, (1, size), torch.uint8, 0, 15, eps=1e-6)
        codes = quantize_affine(weight, (1, size), scales, zeros, torch.uint8, 0, 15)
        shape = (len(weight), -1)
        return codes.t(), zeros.reshape(shape).t().to(torch.uint8), scales.reshape(shape).t().half()

    def matmul(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, bias: Any = None) -> Tensor:
        codes, zeros = truth.unpack(qweight).t().contiguous().int(), truth.unpack(qzeros).to(x.dtype)
        if zeros.shape != scales.shape:
            raise ValueError("the pairs of scales and zeros are made here")
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = scales.to(x.dtype)
        pairs = torch.stack([scales, (8 - zeros) * scales], dim=-1)
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, packed, size_of(group_size, len(qweight)), pairs)
        return (y if bias is None else y + bias).reshape(*x.shape[:-1], len(codes))

    version = importlib.import_module("torchao").__version__
    return SimpleNamespace(name="torchao", version=version, dequantize=dequantize, quantize=quantize, matmul=matmul,
                           group_sizes=(32, 64, 128), multiple_of_n=16)  # fmt: skip


PEERS: dict[str, Callable[[Path], Any]] = {
    "autoawq": autoawq,
    "autoawq-triton": lambda s: triton_kernels(
        "AutoAWQ Triton", "0.2.9", s / "autoawq-0.2.9/awq/modules/triton/gemm.py"),
    "vllm-triton": lambda s: triton_kernels(
        "vLLM Triton", "0.6.3", s / "vllm-0.6.3/vllm/model_executor/layers/quantization/awq_triton.py"),
    "gptqmodel": gptqmodel,
    "compressed-tensors": compressed_tensors,
    "torchao": torchao,
}  # fmt: skip


def report_on(peer: str, sources: Path) -> ConformanceReport:
    """The report, with the peer's shipped file of expected failures."""
    file = EXPECTED / f"{peer}.txt"
    expected = read_expected_failures(file, chosen()) if file.exists() else {}
    return conformance(PEERS[peer](sources), chosen(), expected=expected)


def row(report: ConformanceReport) -> str:
    """One line of the table: checks that passed of those that ran, by level, and the flags."""
    cells = []
    for level in LEVELS:
        counts = report.counts(level)
        ran = sum(counts.values()) - counts["skipped"]
        cells.append(f"{counts['passed']}/{ran}" if ran else "")
    verdict = ", ".join(part for part in badge(report).split(", ") if "skipped" not in part)
    return f"| {report.target} {report.version} | {' | '.join(cells)} | {verdict} |"


def main() -> int:
    """The table, or the full reports of named peers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path)
    parser.add_argument("peers", nargs="*", choices=[*PEERS, []], help=f"some of {', '.join(PEERS)}")
    parser.add_argument("--check", action="store_true", help="exit 1 unless every peer does exactly what its file says")
    arguments = parser.parse_args()
    exact = True
    print(f"| Peer | {' | '.join(LEVELS)} | Verdict |\n|---|{'---|' * len(LEVELS)}---|")
    for peer in arguments.peers or PEERS:
        started = time.perf_counter()
        report = report_on(peer, arguments.sources)
        exact &= report.ok
        print(row(report), flush=True)
        print(f"{peer}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
        if arguments.peers:
            print(as_text(report))
    return 0 if exact or not arguments.check else 1


if __name__ == "__main__":
    sys.exit(main())
