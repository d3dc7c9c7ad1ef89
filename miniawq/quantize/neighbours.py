"""Codes that know each other: each is one of the two beside its weight, chosen with the errors of all others in view.

A layer of the quantized model sees inputs x', and is to give y. With the error E of its weight and d = W x' - y, its
loss is mean |E x' + d|^2 = tr(E C E^T) + 2 tr(E X^T) + mean |d|^2, with C = mean(x' x'^T) and X = mean(d x'^T)
(`streams.py`). As a function of the error of column i alone this is a parabola with its lowest point at

    E_i - P_i / C_ii        P = E C + X, the pull of all errors on each column

so the better of two codes is the one nearest to that point, and choosing it never raises the loss. Columns are visited
group by group: P by one product for a group, updated after each of its columns. Then the group's scale moves to the
least squares of its codes. The last sweep leaves scales alone, so each code ends beside its weight, and

    |w - w'| <= max(s, max(w) - (15 - z) s, -min(w) - z s)

`quantize/verify.py` checks that in the file, where plain rounding has s / 2 (docs/specification.md).

Shapes: weights lie with inputs first, so that a column of the layer is a row in memory: [I, O], [S, O], [G, O].
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from miniawq.awq import Statistics
from miniawq.compiled import WORKSHOP, Recorded, any_length, compile_with_forms, own_copy
from miniawq.packing import Quantized
from miniawq.quantize.descent import COLUMNS_TOGETHER, Choice, chosen_errors, refitted, settled
from miniawq.quantize.ranges import shrunk
from miniawq.quantize.streams import Aim

SWEEPS = 5  # that move scales too, before the last one; more gain little (docs/log/neighbours.md)
DOUBT = 1.5  # how fast trust falls with inputs for each token (docs/log/neighbours.md)


def neighbouring_codes(weight_OI: Tensor, nearest: Quantized, statistics: Statistics) -> Quantized:
    """Better codes and scales for the same zeros: the last search of an `awq.Method`."""
    trusted = trust(weight_OI.shape[1], statistics.tokens)
    moments_II = shrunk(statistics.moments_II, trusted)
    weight_IO, scales_GO = weight_OI.t().contiguous(), nearest.scales_OG.t().contiguous()
    # Other statistics than an aim: without an error of its own, the layer would give what it is to give.
    pull_IO = trusted * statistics.pull_OI.t() if isinstance(statistics, Aim) else torch.zeros_like(weight_IO)
    zeros_GO = nearest.zeros_OG.t().float()
    size = nearest.group_size
    steps_IO = nearest.codes_OI.t() - zeros_GO.repeat_interleave(size, 0)
    error_IO = steps_IO * scales_GO.float().repeat_interleave(size, 0) - weight_IO
    settle, refit = visits(weight_IO.device)
    for sweep in range(SWEEPS + 1):
        for group, scale_O in enumerate(scales_GO):
            here = slice(group * size, (group + 1) * size)
            weight_SO, before_SO, moments_SS = weight_IO[here], error_IO[here], moments_II[here, here]
            pull_SO = torch.addmm(pull_IO[here], moments_II[here], error_IO)
            error_SO = settle(before_SO, pull_SO, moments_SS, weight_SO, scale_O, zeros_GO[group])
            if sweep < SWEEPS:
                pull_SO.addmm_(moments_SS, error_SO - before_SO)
                error_SO, scales_GO[group] = refit(error_SO, pull_SO, moments_SS, weight_SO, scale_O)
            error_IO[here] = error_SO
    scale_IO = scales_GO.float().repeat_interleave(size, 0)
    codes_IO = ((error_IO + weight_IO) / scale_IO).round_() + zeros_GO.repeat_interleave(size, 0)
    return Quantized(codes_IO.t().to(torch.uint8).contiguous(), scales_GO.t().contiguous(), nearest.zeros_OG)


def trust(inputs: int, tokens: int) -> float:
    """What is left of covariances: some tokens do not determine those of many inputs."""
    return 1 / (1 + DOUBT * math.sqrt(inputs / max(1, tokens)))


@lru_cache
def visits(device: torch.device) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]:
    """What `settled` and `refitted` are on a device: on a GPU each is launched at once, and columns are compiled."""
    if device.type == "cpu":
        return partial(settled, chosen_errors), refitted
    return Recorded(partial(settled, compiled_choice(device))), Recorded(refitted)


def compiled_choice(device: torch.device) -> Choice:
    """`chosen_errors` as one kernel, if that is right."""
    compiled = compile_with_forms(own_copy(chosen_errors), (), of_any_width)
    is_right = WORKSHOP.accepts(("learned codes", device), lambda *_: prove_choice(compiled, device))
    return compiled if is_right else chosen_errors


def of_any_width(*arguments: Tensor) -> tuple[Any, ...]:
    """The arguments of `chosen_errors`, with the outputs of a layer marked."""
    return tuple(x if index == 2 else any_length(x, 1) for index, x in enumerate(arguments))


def prove_choice(compiled: Choice, device: torch.device) -> str:
    """Why a compiled choice is not to be used: it chooses otherwise, and not only where both are nearly equal."""
    inputs_TC, error_CO = torch.randn(2, 64, COLUMNS_TOGETHER, generator=torch.Generator().manual_seed(0)).to(device)
    error_CO, moments_CC = error_CO.t().contiguous(), inputs_TC.t() @ inputs_TC
    arguments = error_CO, moments_CC @ error_CO, moments_CC, error_CO - 1, error_CO + 1
    others = int((compiled(*arguments) != chosen_errors(*arguments)).sum())
    return f"{others} of {error_CO.numel()} choices differ" if others > error_CO.numel() // 100 else ""
