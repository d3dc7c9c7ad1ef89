"""Run the vectors against the NumPy adapter, with no torch and no safetensors library: a model for other languages.

python examples/oracle/run_vectors.py [miniawq/oracle/vectors]
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import numpy_adapter as adapter

VECTORS = Path(__file__).parents[2] / "miniawq" / "oracle" / "vectors"
DTYPES = {"U8": np.uint8, "I32": np.int32, "F16": np.float16, "F32": np.float32, "F64": np.float64, "BF16": np.uint16}


def to_bfloat16(values):
    """Float32 numbers rounded to those that bfloat16 holds, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def read_safetensors(path):
    """Arrays by name, and the names of those of bfloat16, which NumPy lacks: they come as float32."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    arrays, bfloat16 = {}, set()
    for name, told in header.items():
        if name != "__metadata__" and told["dtype"] in DTYPES:
            begin, end = (start + offset for offset in told["data_offsets"])
            arrays[name] = np.frombuffer(data[begin:end], DTYPES[told["dtype"]]).reshape(told["shape"])
            if told["dtype"] == "BF16":
                arrays[name] = (arrays[name].astype(np.uint32) << 16).view(np.float32)
                bfloat16.add(name)
    return arrays, bfloat16


def run(case, arrays, bfloat16):
    """None when the case passes, else what is wrong."""
    function = getattr(adapter, case["function"])
    arguments = {name: arrays[key] for name, key in case["inputs"].items()}
    try:
        result = function(**arguments, **case["parameters"])
    except ValueError as refusal:
        return None if case["result"] == "invalid" else f"refused: {refusal}"
    if case["result"] == "invalid":
        return "not refused"
    expected = {name: arrays[key] for name, key in case["expected"].items()}
    if "x" in case["inputs"] and case["inputs"]["x"] in bfloat16:
        result = to_bfloat16(result)
    if case["compare"] in ("rounding bound", "half scale"):
        codes, zeros, scales = result
        size = len(codes) // len(scales)
        scale = scales.astype(np.float64).repeat(size, 0)
        error = np.abs((codes.astype(float) - zeros.repeat(size, 0)) * scale - arguments["weight"].T)
        most = 0.5 + 2.0**-19 if case["compare"] == "half scale" else 0.5074
        return None if (error <= most * scale + 15 * 2.0**-25).all() else f"off by {(error / scale).max()} scales"
    if case["compare"] == "within":
        wrong = np.abs(result.astype(float) - expected["y"]) > expected["bound"]
    else:
        (value,) = expected.values()
        wrong = (result != value) | (result.dtype != value.dtype)
    return f"{wrong.sum()} of {wrong.size} elements differ" if wrong.any() else None


def main(directory):
    passed, failed = 0, 0
    for level in ("L0", "L1", "L2", "L3"):
        told = json.loads((directory / f"{level}.json").read_text())
        arrays, bfloat16 = read_safetensors(directory / told["tensors"])
        for case in told["cases"]:
            wrong = run(case, arrays, bfloat16)
            passed, failed = passed + (wrong is None), failed + (wrong is not None)
            if wrong:
                print(f"{case['id']} ({case['comment']}): {wrong}")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else VECTORS))
