"""AWQ INT4 in plain torch, by a reader who had the five chapters and docs/reading.md alone.

    python -m miniawq.oracle fresh_reader              # in this folder

As it was written, before its author knew the oracle (docs/log/fresh-reader.md). It imports nothing of miniawq.
"""

import math

import torch

# Output (of eight neighbours) that sits in nibble 0, 1, .. 7 of a word.
NIBBLE_HOLDS = [0, 2, 4, 6, 1, 3, 5, 7]


def pack(codes):
    if codes.dtype.is_floating_point or codes.dtype.is_complex:
        raise ValueError(f"codes must be integers, not {codes.dtype}")
    if codes.shape[-1] % 8 != 0:
        raise ValueError(f"{codes.shape[-1]} columns do not fill words of 8")
    wide = codes.to(torch.int64)
    if ((wide < 0) | (wide > 15)).any():
        raise ValueError("a code is outside 0..15")
    eights = wide.reshape(*codes.shape[:-1], codes.shape[-1] // 8, 8)
    word = torch.zeros(eights.shape[:-1], dtype=torch.int64, device=codes.device)
    for nibble, column in enumerate(NIBBLE_HOLDS):
        word += eights[..., column] * 16**nibble
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def unpack(words):
    if words.dtype != torch.int32:
        raise ValueError(f"words must be int32, not {words.dtype}")
    wide = words.to(torch.int64)
    columns = [None] * 8
    for nibble, column in enumerate(NIBBLE_HOLDS):
        columns[column] = (wide >> (4 * nibble)) & 0xF
    return torch.stack(columns, dim=-1).to(torch.uint8).reshape(*words.shape[:-1], words.shape[-1] * 8)


def _group_size(inputs, group_size):
    size = inputs if group_size == -1 else group_size
    if size < 1 or size > inputs or inputs % size != 0:
        raise ValueError(f"{inputs} inputs cannot be cut into groups of {group_size}")
    return size


def _at_least(values):
    """Smallest positive float16 that is >= each value (float64, >= 0); infinity if there is none."""
    half = values.to(torch.float16)
    too_low = half.to(torch.float64) < values
    pattern = half.view(torch.int16)
    pattern = torch.where(too_low, pattern + 1, pattern)
    return torch.clamp(pattern, min=1).view(torch.float16)


def _plain(weight, group_size):
    """codes, zeros, scales as [N, G, S], [N, G], [N, G]."""
    if not weight.is_floating_point():
        raise ValueError(f"the weight is {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError("the weight is no matrix")
    rows, inputs = weight.shape
    size = _group_size(inputs, group_size)
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds NaN or infinity")
    groups = weight.detach().double().reshape(rows, inputs // size, size)
    low = groups.amin(dim=2).clamp(max=0)
    high = groups.amax(dim=2).clamp(min=0)
    scales = _at_least((high - low) / 15)
    if not torch.isfinite(scales).all():
        raise ValueError("a scale does not fit in float16")
    step = scales.double()
    zeros = torch.round(-low / step).clamp(0, 15)
    codes = (torch.round(groups / step[..., None]) + zeros[..., None]).clamp(0, 15)
    return codes, zeros, scales


def quantize(weight, group_size):
    codes, zeros, scales = _plain(weight, group_size)
    return (
        codes.flatten(1).to(torch.uint8).t().contiguous(),
        zeros.to(torch.uint8).t().contiguous(),
        scales.t().contiguous(),
    )


def _exact(qweight, qzeros, scales, group_size):
    """The weight [K, N] in float64: nothing is rounded."""
    if qweight.dim() != 2 or qzeros.dim() != 2 or scales.dim() != 2:
        raise ValueError("qweight, qzeros and scales must be matrices")
    inputs, outputs = qweight.shape[0], qweight.shape[1] * 8
    size = _group_size(inputs, group_size)
    groups = inputs // size
    if qzeros.shape != (groups, qweight.shape[1]) or scales.shape != (groups, outputs):
        raise ValueError(
            f"shapes do not fit: {tuple(qweight.shape)}, {tuple(qzeros.shape)}, {tuple(scales.shape)}, {group_size}"
        )
    codes = unpack(qweight).double().reshape(groups, size, outputs)
    steps = codes - unpack(qzeros).double()[:, None, :]
    return (steps * scales.detach().double()[:, None, :]).reshape(inputs, outputs)


def dequantize(qweight, qzeros, scales, group_size):
    return _exact(qweight, qzeros, scales, group_size).to(scales.dtype)


def matmul(x, qweight, qzeros, scales, group_size, bias=None):
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}, not a float")
    weight = _exact(qweight, qzeros, scales, group_size)
    if x.shape[-1] != weight.shape[0]:
        raise ValueError(f"x has {x.shape[-1]} features, the weight {weight.shape[0]}")
    if bias is not None and tuple(bias.shape) != (weight.shape[1],):
        raise ValueError(f"the bias has shape {tuple(bias.shape)}")
    y = x.double().reshape(math.prod(x.shape[:-1]), x.shape[-1]) @ weight
    if bias is not None:
        y = y + bias.double()
    return y.reshape(*x.shape[:-1], weight.shape[1]).to(x.dtype)


def _candidates(x):
    """Factors a^r for r = 0, 1/20, .. 1; the first is all ones."""
    magnitude = x.abs().mean(dim=0)
    live = magnitude > 0
    logs = torch.where(live, magnitude, torch.ones_like(magnitude)).log()
    for step in range(21):
        scaled = logs * (step / 20)
        if live.any():
            scaled = scaled - (scaled[live].max() + scaled[live].min()) / 2
        scaled = torch.where(live, scaled, torch.zeros_like(scaled))
        yield scaled.clamp(-math.log(1e4), math.log(1e4)).exp().float()


def _loss(weight, factors, x, group_size):
    """Mean square of what the layer's outputs on x are off by."""
    codes, zeros, scales = _plain(weight * factors, group_size)
    rounded = ((codes - zeros[..., None]) * scales.double()[..., None]).flatten(1) / factors.double()
    return ((rounded - weight.double()) @ x.t()).square().mean().item()


@torch.no_grad()
def search_scales(weight, x, group_size):
    if not x.is_floating_point() or x.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must be floats [T, {weight.shape[1]}], not {x.dtype} {tuple(x.shape)}")
    ones = torch.ones(weight.shape[1], dtype=torch.float32, device=weight.device)
    _plain(weight, group_size)  # says what is wrong with the weight
    inputs = x.double()
    if len(x) == 0 or not torch.isfinite(inputs).all():
        return ones
    best, lowest = ones, math.inf
    for factors in _candidates(inputs):
        try:
            loss = _loss(weight, factors, inputs, group_size)
        except ValueError:  # scaled up beyond float16
            continue
        if loss < lowest:
            best, lowest = factors, loss
    return best
