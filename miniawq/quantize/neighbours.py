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
from functools import lru_cache, partial

import torch
from torch import Tensor

from miniawq.awq import Statistics
from miniawq.compiled import WORKSHOP, Recorded, any_length, compile_with_forms, own_copy
from miniawq.packing import Quantized
from miniawq.quantize.descent import Steps, Visit, resettled, settled
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
    settle, resettle = visits(weight_IO.device, size, scales_GO.dtype)
    for sweep in range(SWEEPS + 1):
        visit = resettle if sweep < SWEEPS else settle
        for group, scale_O in enumerate(scales_GO):
            here = slice(group * size, (group + 1) * size)
            pull_SO = torch.addmm(pull_IO[here], moments_II[here], error_IO)
            group_is = error_IO[here], pull_SO, weight_IO[here], scale_O, zeros_GO[group]
            error_IO[here], scales_GO[group] = visit(moments_II[here, here], *group_is)
    scale_IO = scales_GO.float().repeat_interleave(size, 0)
    codes_IO = ((error_IO + weight_IO) / scale_IO).round_() + zeros_GO.repeat_interleave(size, 0)
    return Quantized(codes_IO.t().to(torch.uint8).contiguous(), scales_GO.t().contiguous(), nearest.zeros_OG)


def trust(inputs: int, tokens: int) -> float:
    """What is left of covariances: some tokens do not determine those of many inputs."""
    return 1 / (1 + DOUBT * math.sqrt(inputs / max(1, tokens)))


@lru_cache
def visits(device: torch.device, size: int, dtype: torch.dtype) -> tuple[Visit, Visit]:
    """`settled` and `resettled` for groups of a size and scales of a dtype.

    On a GPU what lies between the products is compiled, and all of a visit is launched at once.
    """
    if device.type == "cpu":
        return partial(settled, Steps()), partial(resettled, Steps())
    steps = compiled_steps()
    if not WORKSHOP.accepts(("learned codes", device, size, dtype), lambda *_: prove_steps(steps, device, size, dtype)):
        steps = Steps()
    return Recorded(partial(settled, steps)), Recorded(partial(resettled, steps))


def compiled_steps() -> Steps:
    """For layers of any width."""
    without_outputs = (0, 1, 1)  # so many of their first arguments
    return Steps(
        *(
            compile_with_forms(own_copy(step), (), partial(of_any_width, count))
            for step, count in zip(Steps(), without_outputs, strict=True)
        )
    )


def of_any_width(fixed: int, *arguments: Tensor) -> tuple[Tensor, ...]:
    return *arguments[:fixed], *(any_length(x, x.dim() - 1) for x in arguments[fixed:])


def prove_steps(steps: Steps, device: torch.device, size: int, dtype: torch.dtype) -> str:
    """Why compiled steps are not to be used: they lead elsewhere, and not only where two codes are nearly equal."""
    draw = torch.Generator().manual_seed(0)
    x_TS, weight_SO = (torch.randn(rows, count, generator=draw) for rows, count in ((2 * size, size), (size, 64)))
    scale_O, zero_O = (weight_SO.abs().amax(0) / 7).to(dtype), torch.full((64,), 8.0)
    error_SO, moments_SS = (weight_SO / scale_O).round() * scale_O - weight_SO, x_TS.t() @ x_TS / len(x_TS)
    group = [x.to(device) for x in (moments_SS, error_SO, moments_SS @ error_SO, weight_SO, scale_O, zero_O)]
    (found_SO, _), (expected_SO, _) = (resettled(some, *group) for some in (steps, Steps()))
    others = int(((found_SO - expected_SO).abs() > group[4] / 100).sum())
    return f"{others} of {found_SO.numel()} codes differ" if others > found_SO.numel() // 50 else ""
