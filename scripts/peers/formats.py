"""The formats of `quantize/formats.py` beside other implementations of them, number by number.

    python -m venv /tmp/peers
    /tmp/peers/bin/pip install torch gguf compressed-tensors torchao bitsandbytes llmcompressor
    pip download --no-deps --no-binary :all: llama-cpp-python && tar xf llama_cpp_python-*.tar.gz
    cmake -B build -S llama_cpp_python-*/vendor/llama.cpp -DBUILD_SHARED_LIBS=ON
    cmake --build build --target ggml-base
    PYTHONPATH=. /tmp/peers/bin/python scripts/peers/formats.py --libraries build/bin

The weights are a normal matrix, one with outliers, one with groups of zeros and of one sign, one of tiny numbers, one
full of ties, one whose rows are far apart, and one of bfloat16 numbers. A line says how many numbers differ. For Q4_K
some do: among 21 fits of a group it takes the best by float32 sums, whose order is another. So do some for GPTQ, where
one code that changes next to a tie moves all inputs after it.
"""

import argparse
import ctypes
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from miniawq.packing import asymmetric_grid
from miniawq.quantize.formats import FORMATS, Approximation, gptq_rounding

OUTPUTS, INPUTS = 96, 1024
Q4_K = gguf.GGMLQuantizationType.Q4_K


def weights() -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    normal_OI = 0.02 * torch.randn(OUTPUTS, INPUTS, generator=generator)
    yield "normal", normal_OI
    outliers_OI = normal_OI.clone()
    outliers_OI[:, ::97] *= 50
    yield "outliers", outliers_OI
    signed_OI = normal_OI.abs()
    signed_OI[:, :256], signed_OI[1::2] = 0, -signed_OI[1::2]
    yield "one sign, zeros", signed_OI
    yield "tiny", normal_OI * 1e-3
    yield "ties", (normal_OI * 400).round() / 8
    yield "far apart", normal_OI * torch.logspace(-9, 0, OUTPUTS)[:, None]
    yield "bfloat16", normal_OI.bfloat16().float()


def compressed_tensors(preset: str, weight_OI: Tensor) -> Tensor:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
    from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

    arguments = PRESET_SCHEMES[preset]["weights"]
    if preset == "W8A16":
        arguments = QuantizationArgs(num_bits=8, symmetric=True, strategy=QuantizationStrategy.CHANNEL)
    groups_OGS = weight_OI.unflatten(1, (-1, arguments.group_size or weight_OI.shape[1]))
    whole = generate_gparam(weight_OI.min(), weight_OI.max()) if preset == "NVFP4A16" else None
    scales, zeros = calculate_qparams(groups_OGS.amin(-1), groups_OGS.amax(-1), arguments, whole)
    return fake_quantize(weight_OI, scales, zeros, arguments, global_scale=whole)


def torchao_fp8(weight_OI: Tensor) -> Tensor:
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    layer = torch.nn.Linear(*weight_OI.shape[::-1], bias=False)
    layer.weight = torch.nn.Parameter(weight_OI)
    quantize_(layer, Float8WeightOnlyConfig())
    return layer.weight.dequantize()


def torchao_mxfp4(weight_OI: Tensor) -> Tensor:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    return MXTensor.to_mx(weight_OI, torch.float4_e2m1fn_x2, 32).dequantize(torch.float32)


def bitsandbytes_nf4(weight_OI: Tensor) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return dequantize_4bit(*quantize_4bit(weight_OI, blocksize=64, quant_type="nf4"))


def gguf_format(kind: gguf.GGMLQuantizationType, weight_OI: Tensor) -> Tensor:
    return torch.from_numpy(gguf.dequantize(gguf.quantize(weight_OI.numpy(), kind), kind))


def ggml_q4_k(libraries: Path, weight_OI: Tensor) -> Tensor:
    ggml = ctypes.CDLL(str(libraries / "libggml-base.so"))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    outputs, inputs = weight_OI.shape
    data = np.empty((outputs, inputs // 256 * 144), dtype=np.uint8)
    pointers = (ctypes.c_void_p(weight_OI.data_ptr()), ctypes.c_void_p(data.ctypes.data))
    sizes = (ctypes.c_int64(0), ctypes.c_int64(outputs), ctypes.c_int64(inputs))
    ggml.ggml_quantize_chunk(ctypes.c_int(Q4_K), *pointers, *sizes, None)
    return torch.from_numpy(gguf.dequantize(data, Q4_K))


def llm_compressor_gptq(weight_OI: Tensor, moments_II: Tensor, act_order: bool) -> Tensor:
    """Its GPTQ with one group a row and our grid, which it takes of the whole weight before it starts."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    scales_O1, zeros_O1 = asymmetric_grid(weight_OI[:, None], torch.float16)
    # Its codes are -8 to 7.
    grid = {"scale": scales_O1.float(), "zero_point": zeros_O1.float() - 8, "global_scale": None}
    layer = torch.nn.Linear(*weight_OI.shape[::-1], bias=False)
    layer.weight = torch.nn.Parameter(weight_OI)
    layer.weight_observer = SimpleNamespace(get_qparams=lambda: grid)
    settings = {"num_bits": 4, "symmetric": False, "strategy": "channel", "actorder": "weight" if act_order else None}
    with torch.no_grad():
        return quantize_weight(layer, QuantizationArgs(**settings), moments_II.clone())[1]["weight"]


def compared(name: str, peer: str, theirs: Callable[[Tensor], Tensor], ours: Callable[[Tensor], Approximation]) -> None:
    for kind, weight_OI in weights():
        ours_OI, bits = ours(weight_OI)
        theirs_OI = theirs(weight_OI).float()
        ratio = float((ours_OI - weight_OI).square().sum() / (theirs_OI - weight_OI).square().sum())
        told = f"{int((ours_OI != theirs_OI).sum()):6} differ, squared error {ratio:.5f} of theirs"
        print(f"{name:6} {peer:20} {kind:16} {bits / weight_OI.numel():.4f} bits, {told}")


def golden(peers: dict[tuple[str, str], Callable[[Tensor], Tensor]], path: Path) -> None:
    """A small weight, and what each peer makes of it: the vectors of `tests/quantize/test_formats.py`."""
    generator = torch.Generator().manual_seed(1)
    weight_OI = 0.02 * torch.randn(2, 512, generator=generator)
    weight_OI[0, 7], weight_OI[1, 64:128] = 1.0, 0.0
    weight_OI[0, 32:64] = torch.arange(-16, 16) / 16  # ties of Q4_0
    weight_OI[1, 320:336] *= 4e-5  # a group whose scale becomes 0 in NVFP4
    weight_OI[1, 256:320] = weight_OI[1, 256:320].abs()
    found = {name: theirs(weight_OI.clone()).float().contiguous() for (name, _), theirs in peers.items()}
    save_file(found | {"weight": weight_OI}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libraries", type=Path, required=True, help="the directory of libggml-base.so")
    parser.add_argument("--golden", type=Path, help="write what the peers make of a small weight, and end")
    arguments = parser.parse_args()
    peers = {
        ("bf16", "gguf"): partial(gguf_format, gguf.GGMLQuantizationType.BF16),
        ("int8", "compressed-tensors"): partial(compressed_tensors, "W8A16"),
        ("fp8", "compressed-tensors"): partial(compressed_tensors, "FP8_DYNAMIC"),
        ("fp8", "torchao"): torchao_fp8,
        ("nvfp4", "compressed-tensors"): partial(compressed_tensors, "NVFP4A16"),
        ("mxfp4", "torchao"): torchao_mxfp4,
        ("nf4", "bitsandbytes"): bitsandbytes_nf4,
        ("q4_0", "gguf"): partial(gguf_format, gguf.GGMLQuantizationType.Q4_0),
        ("q4_k", "ggml (C)"): partial(ggml_q4_k, arguments.libraries),
    }
    if arguments.golden:
        golden(peers, arguments.golden)
        return
    print(f"{OUTPUTS * INPUTS} numbers a line")
    for (name, peer), theirs in peers.items():
        compared(name, peer, theirs, FORMATS[name].approximate)
    generator = torch.Generator().manual_seed(2)
    x_TI = torch.randn(4 * INPUTS, INPUTS, generator=generator).cumsum(1) / 8  # neighbouring inputs are alike
    moments_II = x_TI.t() @ x_TI / len(x_TI)
    for act_order in (False, True):
        settings = {"moments_II": moments_II, "act_order": act_order}
        name, theirs = "gptq-act-order" if act_order else "gptq", partial(llm_compressor_gptq, **settings)
        compared(name, "llm-compressor", theirs, partial(gptq_rounding, group_size=-1, **settings))


if __name__ == "__main__":
    main()
