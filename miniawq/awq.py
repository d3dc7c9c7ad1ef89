"""Chapter 2: AWQ as the paper has it (Lin et al., arXiv 2306.00978): scale up the channels that matter, clip, round.

A linear layer y = W x stays the same function when column i of W is multiplied by a factor t_i and x_i is divided by
it. Its rounding does not stay the same: a column that is scaled up is rounded more finely, and the other columns of its
group more coarsely. Columns that meet large activations matter most, so the candidates for t are

    t_i = a_i^r, normalised        a_i = mean |x_i| on calibration text,  r = 0, 1/20, .. 1

and AWQ takes the candidate that loses least:

    loss(t) = mean (f(x; Q(W diag(t)) diag(1 / t)) - f(x; W))^2        f: the attention, the MLP, or the layer alone

It folds 1 / t into the operation that makes x: a norm's weight, or the rows of the linear layer before. Then it limits
the range of each group of weights (clipping), and rounds. Plain rounding, r = 0 with nothing clipped, is always tried
first and wins ties.

`llama_folds` is the table of what is divided and what is multiplied, `quantize_block` is the loop, and the functions
after it are its steps. `Method` holds the two searches: `PAPER` here, better ones in `quantize/recipes.py`.

Shapes: O outputs, I inputs, G groups of S inputs, T tokens, P channels of a smooth layer (what a fold divides).
"""

from __future__ import annotations  # so that the table and the loop can stand before the steps

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from miniawq.errors import UnsupportedCheckpoint
from miniawq.model import LlamaConfig
from miniawq.packing import TOP_CODE, Grid, Quantized, asymmetric_grid, dequantize, grouped, round_to_grid

RATIOS = [step / 20 for step in range(21)]  # exponents r of the candidates; the first is plain rounding
CLIPPED_TO = [1 - step / 20 for step in range(10)]  # parts of a group's largest magnitude; the first clips nothing
UNCLIPPED = ("q_proj", "k_proj", "qkv_proj")  # clipping queries and keys does harm (the paper's code)
LARGEST_LOG_FACTOR = math.log(1e4)  # float16 holds weights that are scaled by up to 1e4 either way
EXACT = 1e-5  # relative error; the float32 sums of a block in another order differ by less


@dataclass(frozen=True, eq=False)
class Fold:
    """A row of the table: divide the output of `smooth_layer`, multiply the columns of `balance_layers`.

    The set of linears `balance_layers` is all that reads this output; `compared` is the module whose output decides.
    Input channel i of the linears reads channel `reads_I[i]` of the smooth layer; None: channel i. A smooth layer that
    makes more channels makes these last. Without one nothing is folded: the linears read the residual stream itself.
    """

    smooth_layer: str | None
    balance_layers: tuple[str, ...]
    compared: str
    reads_I: Tensor | None = None

    @property
    def compares_one_layer(self) -> bool:
        """Whether the loss is that of a single linear layer, which second moments give without any text."""
        return self.balance_layers == (self.compared,)

    def spread(self, factors_P: Tensor) -> Tensor:
        """The factor of each input channel of the balance layers."""
        return factors_P if self.reads_I is None else factors_P[self.reads_I.to(factors_P.device)]

    def gather(self, values_I: Tensor) -> Tensor:
        """For each channel of the smooth layer the mean of `values_I` over the inputs that read it, [P]."""
        if self.reads_I is None:
            return values_I
        reads_I = self.reads_I.to(values_I.device)
        readers_P = torch.bincount(reads_I)
        return values_I.new_zeros(len(readers_P)).index_add_(0, reads_I, values_I) / readers_P


def llama_folds(config: LlamaConfig) -> list[Fold]:
    """The table of the Llama family: only names differ. One matrix for q, k and v makes v last, as one for gate and up.

    Under grouped-query attention several query heads read the same value channel, so several columns of o_proj share
    its factor.
    """
    names = config.names
    qkv = tuple(f"self_attn.{name}" for name in names.qkv)
    gate_up = tuple(f"{names.mlp}.{name}" for name in names.gate_up)
    down = f"{names.mlp}.{names.down}"
    channels_JE = torch.arange(config.num_key_value_heads * config.head_dim).view(-1, config.head_dim)
    reads_I = channels_JE.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, dim=0).flatten()
    return [
        Fold(names.before_attention, qkv, "self_attn"),
        Fold(qkv[-1], ("self_attn.o_proj",), "self_attn.o_proj", reads_I),
        Fold(names.before_mlp, gate_up, names.mlp),
        Fold(gate_up[-1], (down,), down),
    ]


class QuantizedLayer(NamedTuple):
    """A quantized layer and its losses on the text, both after folding: with plain ranges, and as it is."""

    quantized: Quantized
    plain_loss: float
    loss: float


@torch.no_grad()
def quantize_block(
    block: nn.Module,
    statistics: dict[Fold, Statistics],
    rounding: Rounding,
    method: Method,
    dtype: torch.dtype,
    look: Callable[[Fold], Mapping[str, Statistics]] | None = None,
) -> tuple[list[FactorSearch], dict[str, QuantizedLayer]]:
    """The loop: search the factors of every fold, fold them, then search ranges and round, layer by layer.

    `statistics` come from `observe`; norms will be stored in `dtype`. The block is changed: its norms are folded, and
    its linear layers hold the numbers that the codes stand for. `look` is for recipes that look at the text again
    before they round the layers of a fold, and gives the statistics of each; the paper does not.
    """
    searches = []
    for fold, seen in statistics.items():
        ones_P = torch.ones_like(fold.gather(seen.magnitude_I))
        nothing = FactorSearch(fold, ones_P, [Trial("activations", 0, math.nan)])
        searches.append(method.factors(block, fold, seen, rounding) if seen.usable and fold.smooth_layer else nothing)
    for index, search in enumerate(searches):
        factors_P = apply_fold(block, search.fold, search.factors_P, dtype)
        statistics[search.fold].divide(search.fold.spread(factors_P))
        searches[index] = search._replace(factors_P=factors_P)
    layers = {}
    for fold, once in statistics.items():
        for name, seen in (look(fold) if look else dict.fromkeys(fold.balance_layers, once)).items():
            parameter = block.get_parameter(f"{name}.weight")
            layers[name] = quantize_layer(name, parameter.data, seen, rounding, method)
            parameter.data = dequantize(layers[name].quantized, torch.float32)
    return searches, layers


class Method(NamedTuple):
    """The searches of AWQ, and what becomes of the nearest codes: the seam where other searches are plugged in.

    factors(block, fold, statistics, rounding) -> FactorSearch; ranges(layer name, weight_OI, statistics, rounding) ->
    ranges_OG2; codes(weight_OI, nearest codes, statistics) -> what is stored.
    """

    factors: Callable[[nn.Module, Fold, Statistics, Rounding], FactorSearch]
    ranges: Callable[[str, Tensor, Statistics, Rounding], Tensor]
    codes: Callable[[Tensor, Quantized, Statistics], Quantized] = lambda weight_OI, nearest, statistics: nearest


class Statistics:
    """What the balance layers of a fold see: a = mean |x|, C = mean(x x^T), and some calls of the compared module."""

    def __init__(self, inputs: int, device: torch.device | str = "cpu", stride: int = 1) -> None:
        self.magnitude_I = torch.zeros(inputs, dtype=torch.float64, device=device)
        self.moments_II = torch.zeros(inputs, inputs, device=device)
        self.tokens, self.stride, self.calls_seen = 0, stride, 0
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []  # arguments, keywords, output

    @property
    def usable(self) -> bool:
        """Whether there was text, and nothing in it became NaN or infinite. (C is finite if its diagonal is.)"""
        return bool(self.moments_II.diagonal().isfinite().all())

    def see_inputs(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.add(arguments[0].flatten(0, -2).float())

    def see_call(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> None:
        if self.calls_seen % self.stride == 0:
            self.calls.append((arguments, keywords, output))
        self.calls_seen += 1

    def add(self, x_TI: Tensor) -> None:
        self.tokens += len(x_TI)
        self.magnitude_I += x_TI.abs().sum(0)
        self.moments_II += x_TI.t() @ x_TI

    def finish(self) -> None:
        """Turn sums into means, which are NaN if there was no text."""
        self.magnitude_I = (self.magnitude_I / self.tokens).float()
        self.moments_II /= self.tokens

    def divide(self, factors_I: Tensor) -> None:
        """Become the statistics of x / t."""
        self.magnitude_I /= factors_I
        self.moments_II /= factors_I[:, None]
        self.moments_II /= factors_I

    def losses(self, error_OI: Tensor) -> Tensor:
        """The diagonal of E C E^T, [O]: the mean squared error of each output when the weight is off by E."""
        return (error_OI @ self.moments_II).mul_(error_OI).sum(1)


@contextmanager
def observe(
    block: nn.Module, folds: Sequence[Fold], stride: int = 1, kind: type[Statistics] = Statistics
) -> Iterator[dict[Fold, Statistics]]:
    """Fill in the statistics of every fold while the block runs; keep every `stride`-th call of compared modules."""
    found = {}
    with ExitStack() as hooks:
        for fold in folds:
            first: Any = block.get_submodule(fold.balance_layers[0])
            found[fold] = seen = kind(first.in_features, first.weight.device, stride)
            hooks.callback(first.register_forward_pre_hook(seen.see_inputs).remove)
            if fold.smooth_layer and not fold.compares_one_layer:
                compared = block.get_submodule(fold.compared)
                hooks.callback(compared.register_forward_hook(seen.see_call, with_kwargs=True).remove)
        yield found
    for seen in found.values():
        seen.finish()


@dataclass(frozen=True)
class Rounding:
    """Q: groups of `group_size` inputs (-1: all), and the grid that makes a scale and a zero of each group's range."""

    group_size: int = 128
    grid: Grid = asymmetric_grid
    scale_dtype: torch.dtype = torch.float16

    def ranges(self, weight_OI: Tensor) -> Tensor:
        """The plain range of every group, [O, G, 2]: its lowest and its highest value, zero included."""
        groups_OGS = grouped(weight_OI, self.group_size)
        return torch.stack((groups_OGS.amin(-1).clamp(max=0), groups_OGS.amax(-1).clamp(min=0)), dim=-1)

    def codes(self, weight_OI: Tensor, ranges_OG2: Tensor) -> Quantized:
        """The codes that a file will hold: the nearest ones, by quotients in float64."""
        return round_to_grid(weight_OI, *self.grid(ranges_OG2, self.scale_dtype))

    def snap(self, groups: Tensor, ranges: Tensor) -> Tensor:
        """Q for searches: groups [.., S] on the grids of ranges [.., 2], in float32.

        It multiplies by reciprocals, so that next to a tie it can differ from `codes`.
        """
        scales, zeros = (grid.float().unsqueeze(-1) for grid in self.grid(ranges, self.scale_dtype))
        # code - zero lies in -zero..15 - zero: small whole numbers, so clamping them before adding the zero is exact.
        return (groups * scales.reciprocal()).round_().clamp_(-zeros, TOP_CODE - zeros).mul_(scales)

    def plain(self, weight_OI: Tensor) -> Tensor:
        """Q(W) with plain ranges, [O, I]."""
        return self.snap(grouped(weight_OI, self.group_size), self.ranges(weight_OI)).flatten(1)

    def scaled(self, weight_OI: Tensor, factors_I: Tensor) -> Tensor:
        """Q(W diag(t)) diag(1 / t)."""
        return self.plain(weight_OI * factors_I).mul_(factors_I.reciprocal())


class Trial(NamedTuple):
    """A candidate and its loss. The formula "activations" with ratio 0 is plain rounding."""

    formula: str
    ratio: float
    loss: float


class FactorSearch(NamedTuple):
    """The factors found for a fold, and all candidates that were tried, plain rounding first."""

    fold: Fold
    factors_P: Tensor
    trials: list[Trial]

    @property
    def chosen(self) -> Trial:
        """The candidate that lost least, the first one in a tie."""
        return min(self.trials, key=lambda trial: trial.loss)


def search_factors(block: nn.Module, fold: Fold, statistics: Statistics, rounding: Rounding) -> FactorSearch:
    """The factors t = a^r that lose least; a tie goes to the smaller r, and so to plain rounding."""
    activation_P = fold.gather(statistics.magnitude_I)
    candidates = [normalised(ratio * activation_P.log(), activation_P > 0) for ratio in RATIOS]
    # All losses are fetched at once: a GPU would stand idle after each single answer.
    losses_K = torch.stack([loss_of(block, fold, statistics, rounding, factors_P) for factors_P in candidates])
    losses = losses_K.nan_to_num(nan=torch.inf).tolist()
    trials = [Trial("activations", ratio, loss) for ratio, loss in zip(RATIOS, losses, strict=True)]
    return FactorSearch(fold, candidates[losses.index(min(losses))], trials)


def normalised(log_factors_P: Tensor, live_P: Tensor) -> Tensor:
    """t / sqrt(max t * min t), from log t, so that t scales up as much as down; channels never active keep 1."""
    middle = (log_factors_P.where(live_P, -torch.inf).max() + log_factors_P.where(live_P, torch.inf).min()) / 2
    log_P = (log_factors_P - middle).where(live_P, 0.0)
    return log_P.clamp(-LARGEST_LOG_FACTOR, LARGEST_LOG_FACTOR).exp()


def loss_of(block: nn.Module, fold: Fold, statistics: Statistics, rounding: Rounding, factors_P: Tensor) -> Tensor:
    """loss(t): of one layer tr(E C E^T) / O, of a module by running it on the recorded calls."""
    parameters = [block.get_parameter(f"{name}.weight") for name in fold.balance_layers]
    weights = [parameter.data for parameter in parameters]
    if fold.compares_one_layer:
        error_OI = rounding.scaled(weights[0], fold.spread(factors_P)).sub_(weights[0])
        return statistics.losses(error_OI).mean()
    for parameter in parameters:
        parameter.data = rounding.scaled(parameter.data, fold.spread(factors_P))
    module = block.get_submodule(fold.compared)
    squares = [
        (module(*arguments, **keywords) - output).square().mean() for arguments, keywords, output in statistics.calls
    ]
    for parameter, weight_OI in zip(parameters, weights, strict=True):
        parameter.data = weight_OI
    return torch.stack(squares).mean()


def apply_fold(block: nn.Module, fold: Fold, factors_P: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Fold factors into a block; returns the factors that were folded.

    A norm is stored in `dtype`: its divided weight is rounded to that, and the columns follow the rounded numbers, so
    that folding is exact for what the file holds.
    """
    if fold.smooth_layer is None:
        return factors_P
    smooth: Any = block.get_submodule(fold.smooth_layer)
    weight = smooth.weight.data
    if weight.dim() == 1:
        offset = getattr(smooth, "offset", 0.0)  # what a norm adds to its weight
        smooth.weight.data = ((weight + offset) / factors_P - offset).to(dtype).to(weight.dtype)
        gain_P = smooth.weight.data + offset
        factors_P = ((weight + offset) / gain_P).where(gain_P.isfinite() & (gain_P != 0), factors_P)
    else:
        divisors_O = last_of(len(weight), factors_P)
        smooth.weight.data = weight / divisors_O[:, None]
        if smooth.bias is not None:
            smooth.bias.data = smooth.bias.data / divisors_O
    for name in fold.balance_layers:
        parameter = block.get_parameter(f"{name}.weight")
        parameter.data = parameter.data * fold.spread(factors_P)
    return factors_P


def last_of(outputs: int, factors_P: Tensor) -> Tensor:
    """What each output of a linear layer is divided by: 1 before its last P."""
    return pad(factors_P, (outputs - len(factors_P), 0), value=1.0)


def check_folds(block: nn.Module, folds: Sequence[Fold], forward: Callable[[], Tensor]) -> None:
    """UnsupportedCheckpoint names a fold that changes the block: something not multiplied reads the smooth layer.

    `forward` runs the block on a little text. Powers of two fold without rounding, so its outputs must stay the same.
    """
    before = forward()
    for fold in [fold for fold in folds if fold.smooth_layer]:
        ones_P = torch.ones_like(fold.gather(block.get_parameter(f"{fold.balance_layers[0]}.weight")[0]))
        factors_P = 2.0 ** (ones_P.cumsum(0) % 7 - 3)
        apply_fold(block, fold, factors_P)
        after = forward()
        apply_fold(block, fold, 1 / factors_P)
        if not (after - before).abs().max() <= EXACT * before.abs().max():
            raise UnsupportedCheckpoint(
                f"{fold.smooth_layer} cannot be divided by factors",
                f"not all that reads its output is multiplied in {', '.join(fold.balance_layers)}",
                "this architecture needs another table of folds",
            )


def quantize_layer(
    name: str, weight_OI: Tensor, statistics: Statistics, rounding: Rounding, method: Method
) -> QuantizedLayer:
    """Search the ranges of a layer and round it.

    A row that would lose more by its stored codes than by those of plain rounding gets those of plain rounding: so no
    row loses by the search on the calibration text.
    """

    def losses(quantized: Quantized) -> Tensor:
        return statistics.losses(dequantize(quantized, torch.float32).sub_(weight_OI))

    found = plain = rounding.codes(weight_OI, rounding.ranges(weight_OI))
    plain_O = losses(plain)
    if statistics.usable:
        found = rounding.codes(weight_OI, method.ranges(name, weight_OI, statistics, rounding))
        found = method.codes(weight_OI, found, statistics)
        worse_O1 = (losses(found) > plain_O)[:, None]
        found = Quantized(*(safe.where(worse_O1, new) for safe, new in zip(plain, found, strict=True)))
    return QuantizedLayer(found, float(plain_O.mean()), float(losses(found).mean()))


def search_ranges(name: str, weight_OI: Tensor, statistics: Statistics, rounding: Rounding) -> Tensor:
    """Ranges [O, G, 2], each clipped on both sides to the part of its largest magnitude that loses least.

    Each group is searched by itself, as if the others had no error: the loss of group g is E_g C_gg E_g^T.
    """
    plain_OG2 = rounding.ranges(weight_OI)
    if name.rpartition(".")[2] in UNCLIPPED:
        return plain_OG2
    groups_OGS = grouped(weight_OI, rounding.group_size)
    size = groups_OGS.shape[-1]
    moments_GSS = torch.stack([C_SI.split(size, 1)[g] for g, C_SI in enumerate(statistics.moments_II.split(size))])
    best_OG2, lowest_OG = plain_OG2, plain_OG2.new_full(plain_OG2.shape[:2], torch.inf)
    for part in CLIPPED_TO:
        bound_OG1 = part * plain_OG2.abs().amax(-1, keepdim=True)
        clipped_OG2 = plain_OG2.clamp(-bound_OG1, bound_OG1)
        error_OGS = rounding.snap(groups_OGS, clipped_OG2).sub_(groups_OGS)
        losses_OG = torch.einsum("ogs,gst->ogt", error_OGS, moments_GSS).mul_(error_OGS).sum(-1)
        best_OG2 = clipped_OG2.where((losses_OG < lowest_OG)[..., None], best_OG2)
        lowest_OG = torch.minimum(losses_OG, lowest_OG)
    return best_OG2


PAPER = Method(search_factors, search_ranges)
