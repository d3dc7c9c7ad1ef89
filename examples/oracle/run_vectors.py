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
DTYPES = {"U8": np.uint8, "I32": np.int32, "F16": np.float16, "F32": np.float32, "F64": np.float64}


def read_safetensors(path):
    """Arrays by name; bfloat16, which NumPy lacks, is left out."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    arrays = {}
    for name, told in header.items():
        if name != "__metadata__" and told["dtype"] in DTYPES:
            begin, end = (start + offset for offset in told["data_offsets"])
            arrays[name] = np.frombuffer(data[begin:end], DTYPES[told["dtype"]]).reshape(told["shape"])
    return arrays


def run(case, arrays):
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
    if case["compare"] == "rounding bound":
        codes, zeros, scales = result
        size = len(codes) // len(scales)
        scale = scales.astype(np.float64).repeat(size, 0)
        error = np.abs((codes.astype(float) - zeros.repeat(size, 0)) * scale - arguments["weight"].T)
        return None if (error <= 0.5074 * scale + 15 * 2.0**-25).all() else f"off by {(error / scale).max()} scales"
    if case["compare"] == "within":
        wrong = np.abs(result.astype(float) - expected["y"]) > expected["bound"]
    else:
        (value,) = expected.values()
        wrong = (result != value) | (result.dtype != value.dtype)
    return f"{wrong.sum()} of {wrong.size} elements differ" if wrong.any() else None


def main(directory):
    passed, failed, skipped = 0, 0, 0
    for level in ("L0", "L1", "L2", "L3"):
        told = json.loads((directory / f"{level}.json").read_text())
        arrays = read_safetensors(directory / told["tensors"])
        for case in told["cases"]:
            if not {*case["inputs"].values(), *case.get("expected", {}).values()} <= arrays.keys():
                skipped += 1
                continue
            wrong = run(case, arrays)
            passed, failed = passed + (wrong is None), failed + (wrong is not None)
            if wrong:
                print(f"{case['id']} ({case['comment']}): {wrong}")
    print(f"{passed} passed, {failed} failed, {skipped} skipped (bfloat16)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else VECTORS))
