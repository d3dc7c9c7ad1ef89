"""A second definition of AWQ INT4, written from the formats and the paper alone; it shares no code with miniawq.

Each function is as plain as it can be and is a target of its own (`python -m miniawq.oracle miniawq.oracle.truth`).
Arithmetic is float64 wherever a rounding is not the point. Shapes are those of `contract`.

Sources: AutoAWQ `awq/utils/packing_utils.py` and `awq/modules/linear/gemm.py` (the layout), Lin et al. 2023,
arXiv:2306.00978, section 3.2 (the search).
"""

import torch
from torch import Tensor

NIBBLE_HOLDS_COLUMN = (0, 2, 4, 6, 1, 3, 5, 7)
SMALLEST_HALF = 2.0**-24  # the smallest positive float16
LARGEST_HALF = 65504.0  # the largest finite float16


def pack(codes: Tensor) -> Tensor:
    """Codes uint8 [R, C] to words int32 [R, C / 8]."""
    if codes.is_floating_point():
        raise ValueError(f"codes are whole numbers, not {codes.dtype}")
    if codes.shape[1] % 8:
        raise ValueError(f"{codes.shape[1]} columns do not fill whole words of 8 codes")
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) <= 15:
        raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())} do not fit in 4 bits")
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int32, device=codes.device)
    for nibble, column in enumerate(NIBBLE_HOLDS_COLUMN):
        words |= codes[:, column::8].to(torch.int32) << 4 * nibble
    return words


def unpack(words: Tensor) -> Tensor:
    """Words int32 [R, C / 8] to codes uint8 [R, C]."""
    codes = torch.empty(words.shape[0], words.shape[1] * 8, dtype=torch.uint8, device=words.device)
    for nibble, column in enumerate(NIBBLE_HOLDS_COLUMN):
        codes[:, column::8] = words.to(torch.int32) >> 4 * nibble & 15
    return codes


def real_weight(codes: Tensor, zeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """(code - zero) * scale without any rounding, float64 [K, N]: 4 bits times 11 bits is exact."""
    size = codes.shape[0] if group_size == -1 else group_size
    steps = codes.to(torch.float64).unflatten(0, (len(zeros), size)) - zeros.to(torch.float64)[:, None]
    return (steps * scales.to(torch.float64)[:, None]).flatten(0, 1)


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Weights float16 [K, N] from packed words, rounded once."""
    if group_size < 1 and group_size != -1:
        raise ValueError(f"a group_size of {group_size}")
    groups = 1 if group_size == -1 else qweight.shape[0] // group_size
    if qzeros.shape != (groups, qweight.shape[1]) or scales.shape != (groups, qweight.shape[1] * 8):
        raise ValueError(f"{groups} groups, but qzeros {tuple(qzeros.shape)} and scales {tuple(scales.shape)}")
    # The product has 15 significant bits, so the step through float32 that torch takes here rounds nothing.
    return real_weight(unpack(qweight), unpack(qzeros), scales, group_size).to(torch.float16)


def round_up_to_half(values: Tensor) -> Tensor:
    """The smallest positive float16 that is not below each of `values` (float64, >= 0)."""
    if bool((values > LARGEST_HALF).any()):
        raise ValueError(f"a scale of {float(values.max())} does not fit in float16")
    nearest = values.to(torch.float16)
    next_higher = (nearest.view(torch.int16) + 1).view(torch.float16)
    rounded = torch.where(nearest.to(torch.float64) < values, next_higher, nearest)
    return torch.where(rounded == 0, torch.full_like(rounded, SMALLEST_HALF), rounded)


def quantize(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [K, N], zeros [G, N] and scales [G, N] of a weight [N, K], rounded to nearest."""
    n, k = weight.shape
    size = k if group_size == -1 else group_size
    if size < 1 or k % size:
        raise ValueError(f"{k} input features do not divide into groups of {size}")
    if not bool(weight.isfinite().all()):
        raise ValueError("the weight holds NaN or infinity")
    groups = weight.to(torch.float64).t().reshape(k // size, size, n)
    lowest, highest = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scales = round_up_to_half((highest - lowest) / 15)
    zeros = (-lowest / scales.to(torch.float64)).round().clamp(0, 15)
    steps = (groups / scales.to(torch.float64)[:, None]).round()
    codes = (steps + zeros[:, None]).clamp(0, 15).reshape(k, n)
    return codes.to(torch.uint8), zeros.to(torch.uint8), scales


def matmul(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, bias: Tensor | None = None
) -> Tensor:
    """`x @ weight + bias` in float64, the result in the dtype of x."""
    if not x.is_floating_point():
        raise ValueError(f"x holds floats, not {x.dtype}: the result has its dtype")
    if x.shape[-1] != qweight.shape[0]:
        raise ValueError(f"x has {x.shape[-1]} features, the weight {qweight.shape[0]}")
    if bias is not None and bias.shape != scales.shape[1:]:
        raise ValueError(f"a bias of shape {tuple(bias.shape)} for {scales.shape[1]} outputs")
    weight = dequantize(qweight, qzeros, scales, group_size)
    y = x.to(torch.float64) @ weight.to(torch.float64)
    return (y if bias is None else y + bias.to(torch.float64)).to(x.dtype)


def rounded_weight(weight: Tensor, group_size: int) -> Tensor:
    """The weight [N, K] after plain rounding, float64."""
    return real_weight(*quantize(weight, group_size), group_size).t()


def output_loss(weight: Tensor, replacement: Tensor, x: Tensor) -> float:
    """Sum over tokens and outputs of the squared change of `x @ weight.T`, in float64."""
    change = x.to(torch.float64) @ (weight.to(torch.float64) - replacement.to(torch.float64)).t()
    return float(change.square().sum())


def scaled_loss(weight: Tensor, x: Tensor, factors: Tensor, group_size: int) -> float:
    """The loss when `weight * factors` is rounded and `x / factors` is what it meets."""
    exact = factors.to(torch.float64)
    return output_loss(weight, rounded_weight(weight.to(torch.float64) * exact, group_size) / exact, x)


def search_scales(weight: Tensor, x: Tensor, group_size: int, steps: int = 20) -> Tensor:
    """The best of mean(|x|) ** (i / steps), i = 0 .. steps - 1, by `scaled_loss`; i = 0 is plain rounding."""
    size = x.abs().to(torch.float64).mean(0).clamp(min=1e-4)
    best, best_loss = torch.ones_like(size), scaled_loss(weight, x, torch.ones_like(size), group_size)
    for step in range(1, steps):
        factors = size ** (step / steps)
        factors = (factors / (factors.max() * factors.min()).sqrt()).to(torch.float32).to(torch.float64)
        loss = scaled_loss(weight, x, factors, group_size)
        if loss < best_loss:
            best, best_loss = factors, loss
    return best.to(torch.float32)


def group_losses(weight: Tensor, replacement: Tensor, x: Tensor, group_size: int) -> Tensor:
    """The squared change of each group's own part of the output, summed over tokens, float64 [N, G]."""
    n, k = weight.shape
    size = k if group_size == -1 else group_size
    change = (weight.to(torch.float64) - replacement.to(torch.float64)).reshape(n, k // size, size)
    inputs = x.to(torch.float64).reshape(x.shape[0], k // size, size)
    return torch.einsum("tgs,ngs->tng", inputs, change).square().sum(0)


def clamped(weight: Tensor, bounds: Tensor) -> Tensor:
    """The weight [N, K] with each group clamped to plus or minus its bound [N, G]."""
    limit = bounds.to(torch.float64).repeat_interleave(weight.shape[1] // bounds.shape[1], dim=1)
    return weight.to(torch.float64).clamp(-limit, limit)


def search_clip(weight: Tensor, x: Tensor, group_size: int, steps: int = 10) -> Tensor:
    """The best of max(|w|) * (1 - i / 20), i = 0 .. steps - 1, by `group_losses`; i = 0 clips nothing."""
    n, k = weight.shape
    size = k if group_size == -1 else group_size
    largest = weight.reshape(n, k // size, size).abs().amax(-1).to(torch.float32)
    best, best_loss = largest, group_losses(weight, rounded_weight(weight, group_size), x, group_size)
    for step in range(1, steps):
        bounds = largest * (1 - step / 20)
        loss = group_losses(weight, rounded_weight(clamped(weight, bounds), group_size), x, group_size)
        best, best_loss = torch.where(loss < best_loss, bounds, best), torch.minimum(loss, best_loss)
    return best
