"""AWQ INT4 in Triton, as a target of the oracle: on a GPU, or on a CPU under Triton's interpreter.

python -m miniawq.oracle examples.oracle.triton_adapter --device cuda
TRITON_INTERPRET=1 python -m miniawq.oracle examples.oracle.triton_adapter
"""

import os

import torch
import triton
import triton.language as tl

name, version = "Triton example", triton.__version__
group_sizes = (-1, 32, 64, 128)
max_weights = 1 << (20 if "TRITON_INTERPRET" in os.environ else 40)  # the interpreter takes minutes for more

ROWS, COLUMNS, INPUTS = 16, 64, 32


@triton.jit
def decode(words, zeros, scales, k, columns, groups_of, words_in_row, n, inside):
    """A tile of the weight in float16: nibble (column % 8) / 2 + 4 (column % 2) of word column / 8."""
    shift = (columns % 8 // 2 + columns % 2 * 4) * 4
    group = k // groups_of
    code = tl.load(words + k[:, None] * words_in_row + columns[None, :] // 8, mask=inside, other=0)
    zero = tl.load(zeros + group[:, None] * words_in_row + columns[None, :] // 8, mask=inside, other=0)
    scale = tl.load(scales + group[:, None] * n + columns[None, :], mask=inside, other=0.0)
    steps = ((code >> shift[None, :]) & 15) - ((zero >> shift[None, :]) & 15)
    return (steps.to(tl.float32) * scale.to(tl.float32)).to(tl.float16)


@triton.jit
def dequantize_kernel(words, zeros, scales, out, inputs, n, groups_of, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (k < inputs)[:, None] & (columns < n)[None, :]
    weight = decode(words, zeros, scales, k, columns, groups_of, n // 8, n, inside)
    tl.store(out + k[:, None] * n + columns[None, :], weight, mask=inside)


@triton.jit
def matmul_kernel(
    x, words, zeros, scales, out, rows, inputs, n, groups_of,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, inputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (k < inputs)[:, None] & (columns < n)[None, :]
        weight = decode(words, zeros, scales, k, columns, groups_of, n // 8, n, inside)
        some = tl.load(
            x + row[:, None] * inputs + k[None, :], mask=(row < rows)[:, None] & (k < inputs)[None, :], other=0.0
        )
        total += tl.dot(some.to(tl.float32), weight.to(tl.float32), input_precision="ieee")
    tl.store(out + row[:, None] * n + columns[None, :], total, mask=(row < rows)[:, None] & (columns < n)[None, :])


def checked(qweight, qzeros, scales, group_size):
    """Contiguous arguments, K, N and the size of a group; ValueError when they do not fit together."""
    inputs, n = qweight.shape[0], qweight.shape[1] * 8
    size = inputs if group_size == -1 else group_size
    if qzeros.shape != (inputs // size, n // 8) or scales.shape != (inputs // size, n):
        raise ValueError(f"qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)}, scales {list(scales.shape)}")
    return qweight.contiguous(), qzeros.contiguous(), scales.contiguous(), inputs, n, size


def dequantize(qweight, qzeros, scales, group_size):
    words, zeros, scales, inputs, n, size = checked(qweight, qzeros, scales, group_size)
    out = torch.empty(inputs, n, dtype=torch.float16, device=words.device)
    block = 1024 if n > 1024 else COLUMNS
    grid = (triton.cdiv(inputs, INPUTS), triton.cdiv(n, block))
    dequantize_kernel[grid](words, zeros, scales, out, inputs, n, size, BLOCK_K=INPUTS, BLOCK_N=block)
    return out


def matmul(x, qweight, qzeros, scales, group_size, bias=None):
    words, zeros, scales, inputs, n, size = checked(qweight, qzeros, scales, group_size)
    if not x.is_floating_point():
        raise ValueError(f"x holds floats, not {x.dtype}")
    if bias is not None and bias.shape != scales.shape[1:]:
        raise ValueError(f"a bias of shape {tuple(bias.shape)} for {n} outputs")
    if x.shape[-1] != inputs:
        raise ValueError(f"x has {x.shape[-1]} features, the weight {inputs}")
    flat = x.reshape(-1, inputs).contiguous()
    total = torch.empty(len(flat), n, dtype=torch.float32, device=x.device)
    if len(flat):
        grid = (triton.cdiv(len(flat), ROWS), triton.cdiv(n, COLUMNS))
        matmul_kernel[grid](flat, words, zeros, scales, total, len(flat), inputs, n, size,
                            BLOCK_M=ROWS, BLOCK_K=INPUTS, BLOCK_N=COLUMNS)  # fmt: skip
    y = total if bias is None else total + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], n)
