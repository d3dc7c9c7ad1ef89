"""AWQ INT4 in NumPy, as a target of the oracle: `python -m miniawq.oracle examples.oracle.numpy_adapter`.

NumPy has no bfloat16, so `dtypes` leaves it out and the suite says so. Arrays come and go through `np.asarray`.
"""

import numpy as np

name, version = "numpy example", np.__version__
dtypes = ("float16", "float32")

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def pack(codes):
    codes = np.asarray(codes)
    if not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"codes are integers, not {codes.dtype}")
    if codes.shape[1] % 8:
        raise ValueError(f"{codes.shape[1]} columns")
    if ((codes < 0) | (codes > 15)).any():
        raise ValueError(f"codes from {codes.min()} to {codes.max()}")
    nibbles = codes.reshape(len(codes), -1, 8)[:, :, ORDER].astype(np.uint32)
    return np.bitwise_or.reduce(nibbles << np.arange(0, 32, 4, dtype=np.uint32), axis=2).view(np.int32)


def unpack(words):
    words = np.ascontiguousarray(words).view(np.uint32)
    nibbles = (words[:, :, None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15
    codes = np.empty_like(nibbles, dtype=np.uint8)
    codes[:, :, ORDER] = nibbles
    return codes.reshape(len(words), -1)


def dequantize(qweight, qzeros, scales, group_size):
    codes, zeros, scales = unpack(qweight), unpack(qzeros), np.asarray(scales)
    size = len(codes) if group_size == -1 else group_size
    if zeros.shape != scales.shape or scales.shape != (len(codes) // size, codes.shape[1]):
        raise ValueError(f"codes {codes.shape}, zeros {zeros.shape}, scales {scales.shape}")
    steps = codes.astype(np.float32) - zeros.astype(np.float32).repeat(size, axis=0)
    with np.errstate(over="ignore", invalid="ignore"):
        return (steps * scales.astype(np.float32).repeat(size, axis=0)).astype(np.float16)


def round_up(values):
    nearest = values.astype(np.float16)
    higher = (nearest.view(np.int16) + 1).view(np.float16)
    return np.maximum(np.where(nearest.astype(np.float64) < values, higher, nearest), np.float16(2.0**-24))


def quantize(weight, group_size):
    weight = np.asarray(weight.double()) if hasattr(weight, "double") else np.asarray(weight, dtype=np.float64)
    outputs, inputs = weight.shape
    size = inputs if group_size == -1 else group_size
    if inputs % size:
        raise ValueError(f"{inputs} inputs in groups of {size}")
    if not np.isfinite(weight).all():
        raise ValueError("NaN or infinity")
    groups = weight.T.reshape(inputs // size, size, outputs)
    low, high = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
    with np.errstate(over="ignore"):
        scales = round_up((high - low) / 15)
    if np.isinf(scales).any():
        raise ValueError("a scale does not fit in float16")
    zeros = np.clip(np.rint(-low / scales.astype(np.float64)), 0, 15)
    codes = np.clip(np.rint(groups / scales.astype(np.float64)[:, None]) + zeros[:, None], 0, 15)
    return codes.reshape(inputs, outputs).astype(np.uint8), zeros.astype(np.uint8), scales


def matmul(x, qweight, qzeros, scales, group_size, bias=None):
    if getattr(x, "dtype", None) is not None and "bfloat16" in str(x.dtype):
        raise NotImplementedError("NumPy has no bfloat16")
    x = np.asarray(x)
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"x holds floats, not {x.dtype}")
    if bias is not None and np.shape(bias) != np.shape(scales)[1:]:
        raise ValueError(f"a bias of shape {np.shape(bias)}")
    weight = dequantize(qweight, qzeros, scales, group_size).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        y = x.astype(np.float32) @ weight
        return (y if bias is None else y + np.asarray(bias).astype(np.float32)).astype(x.dtype)
