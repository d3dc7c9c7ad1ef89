"""AWQ: scale the channels that meet large activations before rounding, and clip (Lin et al., arXiv 2306.00978).

A linear layer y = W x is the same function when column i of W is multiplied by s_i and x_i divided by it. Rounding is
not the same: a column scaled up is rounded more finely, at the cost of its group's neighbours. AWQ searches the s that
lose least on calibration text and folds 1 / s into the operation that makes x: a norm's weight, or the rows of the
linear before.

    loss(s) = mean (f(x; Q(W diag(s)) diag(1 / s)) - f(x; W))^2        f: the attention, the MLP, or the layer alone

Then the range of every group is searched (clipping, rounding.py), and the folded weights are rounded.

This file knows no model: a table of `Fold`s names the modules of a block. All searches are in float32 and contain plain
rounding, which wins ties, so none loses more than it on the calibration text.

Shapes: O outputs, I inputs, G groups of S inputs, P channels of the previous operation, T tokens, K candidates.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from miniawq.errors import UnsupportedCheckpoint
from miniawq.packing import Quantized, dequantize, round_to_grid
from miniawq.rounding import Rounding, compensated, layer_loss, limit_search, range_search, row_losses, triangle

Formula = Literal["activations", "duo"]
Step = tuple[Formula, int]

PLAIN: Step = ("activations", 0)
SMALLEST = torch.finfo(torch.float32).tiny
LARGEST_LOG_SCALE = math.log(1e4)
EXACT = 1e-5


@dataclass(frozen=True, eq=False)
class Fold:
    """A row of the method's table: multiply the columns of `linears` by scales, divide the output of `previous`.

    `previous` is a norm or a linear layer, `linears` all that read its output, `compared` the module whose output
    decides. Input channel i of the linears reads output channel `reads_I[i]` of `previous`; None: channel i.
    """

    previous: str
    linears: tuple[str, ...]
    compared: str
    reads_I: Tensor | None = None

    def spread(self, scales_P: Tensor) -> Tensor:
        """The scale of each input channel of the linears."""
        return scales_P if self.reads_I is None else scales_P[self.reads_I.to(scales_P.device)]

    def gather(self, values_I: Tensor, channels: int) -> Tensor:
        """The mean of `values_I` over the inputs that read each channel of `previous`."""
        if self.reads_I is None:
            return values_I
        reads_I = self.reads_I.to(values_I.device)
        sums_P = values_I.new_zeros(channels).index_add_(0, reads_I, values_I)
        return sums_P / torch.bincount(reads_I, minlength=channels)


@dataclass(frozen=True)
class Recipe(Rounding):
    """What is searched, beside how weights are rounded.

    formulas: how candidate scales follow from the statistics; none is no scaling.
    ratios, stride: exponents are multiples of 1 / ratios; every stride-th is tried, then those around the best.
    clip: the paper's limits, both ends of each range (rounding.py), or none; layers named in `unclipped` keep theirs.
    compensate: round with GPTQ's error compensation, which is no part of AWQ.
    """

    formulas: tuple[Formula, ...] = ("activations", "duo")
    ratios: int = 20
    stride: int = 4
    clip: Literal["none", "limits", "ranges"] = "ranges"
    unclipped: tuple[str, ...] = ()
    compensate: bool = False


DEFAULT = Recipe()
PAPER = Recipe(formulas=("activations",), stride=1, clip="limits", unclipped=("q_proj", "k_proj"))
PLAIN_ROUNDING = Recipe(formulas=(), clip="none")


class Call(NamedTuple):
    """One recorded call of a module: arguments and result."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Tensor


@dataclass
class Statistics:
    """What the linears of a fold see: mean |x| per channel, C = mean(x x^T), and calls of the compared module."""

    magnitude_I: Tensor
    moments_II: Tensor
    tokens: int = 0
    calls: list[Call] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        """Whether there was text, and nothing in it became NaN or infinite."""
        # With a finite diagonal all of C = mean(x x^T) is finite, and asking all of it would take copies of it.
        return self.tokens > 0 and bool(self.moments_II.diagonal().isfinite().all())

    def divide(self, scales_I: Tensor) -> None:
        """Become the statistics of x / s."""
        self.magnitude_I /= scales_I
        self.moments_II /= scales_I[:, None]
        self.moments_II /= scales_I


@contextmanager
def observe(block: nn.Module, folds: Sequence[Fold], kept_calls: Collection[int]) -> Iterator[dict[Fold, Statistics]]:
    """Fill in the statistics of every fold while the block runs; of compared modules keep calls with these numbers."""
    found, handles = {}, []
    for fold in folds:
        reader = block.get_submodule(fold.linears[0])
        like = block.get_parameter(f"{fold.linears[0]}.weight").float()
        inputs = like.shape[1]
        found[fold] = Statistics(like.new_zeros(inputs, dtype=torch.float64), like.new_zeros(inputs, inputs))
        handles.append(reader.register_forward_pre_hook(_inputs_hook(found[fold])))
        if fold.linears != (fold.compared,):
            hook = _calls_hook(found[fold], kept_calls)
            handles.append(block.get_submodule(fold.compared).register_forward_hook(hook, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for statistics in found.values():
        statistics.magnitude_I = (statistics.magnitude_I / max(1, statistics.tokens)).float()
        statistics.moments_II /= max(1, statistics.tokens)
        for here in triangle(len(statistics.moments_II)):
            statistics.moments_II[: here.start, here] = statistics.moments_II[here, : here.start].t()


def _inputs_hook(statistics: Statistics) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x_TI = arguments[0].detach().flatten(0, -2).float()
        statistics.tokens += len(x_TI)
        statistics.magnitude_I += x_TI.abs().sum(0)
        # Contiguous along the tokens, over which is summed: so a GPU multiplies TF32 at its full rate.
        x_IT = x_TI.t().contiguous()
        for here in triangle(len(x_IT)):
            statistics.moments_II[here, : here.stop].addmm_(x_IT[here], x_IT[: here.stop].t())

    return hook


def _calls_hook(statistics: Statistics, kept_calls: Collection[int]) -> Callable[..., None]:
    numbers = itertools.count()

    def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> None:
        if next(numbers) in kept_calls:
            statistics.calls.append(Call(arguments, keywords, output))

    return hook


def candidate_scales(activation_P: Tensor, weight_P: Tensor, formula: Formula, ratio: float) -> Tensor:
    """Scales from mean |x| and mean relative |w|: a^r (the paper), or a^r / w^(1 - r) ("duo", AutoAWQ).

    Divided by sqrt(max * min). A channel that is never active, or has no weights, keeps the scale 1.
    """
    live_P = (activation_P > 0) & (weight_P > 0)
    log_P = ratio * activation_P.log()
    if formula == "duo":
        log_P = log_P - (1 - ratio) * weight_P.log()
    middle = (log_P.where(live_P, -torch.inf).max() + log_P.where(live_P, torch.inf).min()) / 2
    return (log_P - middle).where(live_P, 0.0).clamp(-LARGEST_LOG_SCALE, LARGEST_LOG_SCALE).exp()


def relative_weight(weights: Sequence[Tensor], rounding: Rounding) -> Tensor:
    """The mean over the rows of all layers of |w| / (the largest |w| of its group), per input channel."""
    groups_OGS = rounding.grouped(torch.cat(list(weights)).abs_())
    return groups_OGS.div_(groups_OGS.amax(-1, keepdim=True).clamp(min=SMALLEST)).mean(0).flatten()


def loss_function(
    block: nn.Module, fold: Fold, statistics: Statistics, rounding: Rounding
) -> Callable[[Tensor], Tensor]:
    """loss(s) of a fold: for one layer from the second moments, for a module by running it on the recorded calls."""
    parameters = [block.get_parameter(f"{name}.weight") for name in fold.linears]
    weights = [parameter.data for parameter in parameters]

    def rounded(weight_OI: Tensor, scales_P: Tensor) -> Tensor:
        return rounding.scaled(weight_OI, fold.spread(scales_P))

    def loss_of_layer(scales_P: Tensor) -> Tensor:
        return layer_loss(rounded(weights[0], scales_P).sub_(weights[0]), statistics.moments_II)

    def loss_of_module(scales_P: Tensor) -> Tensor:
        module = block.get_submodule(fold.compared)
        try:
            for parameter, weight_OI in zip(parameters, weights, strict=True):
                parameter.data = rounded(weight_OI, scales_P)
            squares = [
                (module(*call.arguments, **call.keywords) - call.output).square().mean() for call in statistics.calls
            ]
        finally:
            for parameter, weight_OI in zip(parameters, weights, strict=True):
                parameter.data = weight_OI
        return torch.stack(squares).mean()

    return loss_of_layer if fold.linears == (fold.compared,) else loss_of_module


class Trial(NamedTuple):
    """One candidate and what it lost. Ratio 0 of the activations is plain rounding."""

    formula: Formula
    ratio: float
    loss: float


@dataclass(frozen=True)
class ScaleSearch:
    """The scales chosen for a fold and all that was tried, plain rounding first."""

    fold: Fold
    scales_P: Tensor
    chosen: Trial
    trials: list[Trial]
    note: str = ""


def search_fold(block: nn.Module, fold: Fold, statistics: Statistics, recipe: Recipe) -> ScaleSearch:
    """The candidate scales that lose least; ties, and text that became NaN, go to plain rounding."""
    weights = [block.get_parameter(f"{name}.weight").data for name in fold.linears]
    channels = len(block.get_parameter(f"{fold.previous}.weight"))
    if not statistics.usable:
        nothing = Trial(*PLAIN, math.nan)
        ones_P = weights[0].new_ones(channels)
        return ScaleSearch(fold, ones_P, nothing, [nothing], "no calibration text, or NaN or infinity in it")
    activation_P = fold.gather(statistics.magnitude_I, channels)
    weight_P = fold.gather(relative_weight(weights, recipe), channels)
    loss = loss_function(block, fold, statistics, recipe)
    trials: dict[Step, float] = {}

    def scales(step: Step) -> Tensor:
        return candidate_scales(activation_P, weight_P, step[0], step[1] / recipe.ratios)

    def run(steps: Sequence[Step]) -> None:
        # All losses are fetched at once: waiting for each would leave a GPU idle.
        losses_K = torch.stack([loss(scales(step)) for step in steps]).nan_to_num(nan=torch.inf)
        trials.update(zip(steps, losses_K.tolist(), strict=True))

    coarse = [(formula, step) for formula in recipe.formulas for step in range(0, recipe.ratios + 1, recipe.stride)]
    run([PLAIN, *(step for step in coarse if step != PLAIN)])
    formula, best = min(trials, key=trials.__getitem__)
    around = range(max(0, best - recipe.stride + 1), min(recipe.ratios, best + recipe.stride - 1) + 1)
    if near := [(formula, step) for step in around if recipe.formulas and (formula, step) not in trials]:
        run(near)
    told = {step: Trial(step[0], step[1] / recipe.ratios, lost) for step, lost in trials.items()}
    chosen = min(trials, key=trials.__getitem__)
    dead = int((activation_P == 0).sum())
    note = f"{dead} channels are never active" if dead else ""
    return ScaleSearch(fold, scales(chosen), told[chosen], list(told.values()), note)


def apply_fold(block: nn.Module, fold: Fold, scales_P: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Fold scales into a block; returns the scales that were folded.

    Where a norm's weight divided by its scale is no number of `dtype`, in which it will be stored, the nearest number
    is taken and the columns follow it, so that folding is exact for the stored numbers.
    """
    previous = block.get_parameter(f"{fold.previous}.weight")
    if previous.dim() == 1:
        stored_P = (previous.data / scales_P).to(dtype).to(previous.dtype)
        kept_P = stored_P.isfinite() & (stored_P != 0)
        scales_P = (previous.data / stored_P).where(kept_P, scales_P)
        previous.data = stored_P
    else:
        previous.data = previous.data / scales_P[:, None]
    bias = getattr(block.get_submodule(fold.previous), "bias", None)
    if bias is not None:
        bias.data = bias.data / scales_P
    for name in fold.linears:
        parameter = block.get_parameter(f"{name}.weight")
        parameter.data = parameter.data * fold.spread(scales_P)
    return scales_P


def check_folds(block: nn.Module, folds: Sequence[Fold], forward: Callable[[], Tensor]) -> None:
    """Refuse a fold that changes what the block computes because something unscaled reads the previous operation.

    Powers of two fold without rounding, so the outputs must stay the same; `forward` runs the block on a little text.
    UnsupportedCheckpoint names the fold.
    """
    before = forward()
    generator = torch.Generator().manual_seed(0)
    for fold in folds:
        weight = block.get_parameter(f"{fold.previous}.weight")
        scales_P = (2.0 ** torch.randint(-3, 4, (len(weight),), generator=generator)).to(weight.device)
        apply_fold(block, fold, scales_P)
        after = forward()
        apply_fold(block, fold, 1 / scales_P)
        if not (after - before).abs().max() <= EXACT * before.abs().max():
            raise UnsupportedCheckpoint(
                f"{fold.previous} cannot be divided by scales",
                f"not all that reads its output is compensated by {', '.join(fold.linears)}",
                "this architecture needs another table of folds",
            )


class Layer(NamedTuple):
    """A quantized layer and its losses: with plain ranges, and as it is, both after folding."""

    quantized: Quantized
    plain_loss: float
    loss: float


@dataclass(frozen=True)
class QuantizedBlock:
    """What became of a block: the searches of its folds, and its layers by name."""

    searches: list[ScaleSearch]
    layers: dict[str, Layer]


@torch.no_grad()
def quantize_block(
    block: nn.Module, statistics: dict[Fold, Statistics], recipe: Recipe, dtype: torch.dtype = torch.float16
) -> QuantizedBlock:
    """Search, fold, clip and round the linears of all folds; norms will be stored in `dtype`.

    The block is changed: its norms are folded, and its linears hold the numbers that the codes stand for.
    """
    searches = [search_fold(block, fold, seen, recipe) for fold, seen in statistics.items()]
    for index, search in enumerate(searches):
        folded_P = apply_fold(block, search.fold, search.scales_P, dtype)
        statistics[search.fold].divide(search.fold.spread(folded_P))
        searches[index] = replace(search, scales_P=folded_P)
    layers = {}
    for fold, seen in statistics.items():
        for name in fold.linears:
            parameter = block.get_parameter(f"{name}.weight")
            clip = "none" if name.rpartition(".")[2] in recipe.unclipped else recipe.clip
            layers[name] = quantize_layer(parameter.data, seen, replace(recipe, clip=clip))
            parameter.data = dequantize(layers[name].quantized, torch.float32)
    return QuantizedBlock(searches, layers)


def quantize_layer(weight_OI: Tensor, statistics: Statistics, recipe: Recipe) -> Layer:
    """Choose the range of every group and round to its codes; a row that would lose by its ranges keeps plain ones."""
    moments_II, ends_OG2 = statistics.moments_II, recipe.ends(weight_OI)
    plain_O = row_losses(recipe.plain(weight_OI).sub_(weight_OI), moments_II)
    if statistics.usable and recipe.clip != "none":
        search = limit_search if recipe.clip == "limits" else range_search
        found_OG2 = search(weight_OI, moments_II, recipe)
        error_OI = recipe.snap(recipe.grouped(weight_OI), found_OG2).flatten(1).sub_(weight_OI)
        worse_O = row_losses(error_OI, moments_II) > plain_O
        del error_OI
        ends_OG2 = ends_OG2.where(worse_O[:, None, None], found_OG2)
    scales_OG, zeros_OG = recipe.scales_and_zeros(ends_OG2)
    if statistics.usable and recipe.compensate:
        quantized = compensated(weight_OI, scales_OG, zeros_OG, moments_II)
    else:
        quantized = round_to_grid(weight_OI, scales_OG, zeros_OG)
    loss = layer_loss(dequantize(quantized, torch.float32).sub_(weight_OI), moments_II)
    return Layer(quantized, float(plain_O.mean()), float(loss))


def _one_layer(weight_OI: Tensor, x_TI: Tensor) -> tuple[nn.Module, Fold, Statistics]:
    block = nn.Module()
    block.previous = nn.Module()
    block.previous.weight = nn.Parameter(torch.ones_like(weight_OI[0], dtype=torch.float32), requires_grad=False)
    block.linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    block.linear.weight = nn.Parameter(weight_OI.float(), requires_grad=False)
    fold = Fold("previous", ("linear",), "linear")
    with observe(block, [fold], ()) as statistics:
        block.linear(x_TI.float())
    return block, fold, statistics[fold]


@torch.no_grad()
def search_scales(weight_OI: Tensor, x_TI: Tensor, group_size: int = 128) -> Tensor:
    """The scales [I] (float32) for one layer on its own, for inputs x: the columns are to be multiplied by them."""
    block, fold, statistics = _one_layer(weight_OI, x_TI)
    return search_fold(block, fold, statistics, Recipe(group_size)).scales_P


@torch.no_grad()
def search_clip(weight_OI: Tensor, x_TI: Tensor, group_size: int = 128) -> Tensor:
    """The paper's clip limits [O, G] (float32) for one layer: magnitudes beyond are cut off before rounding."""
    _, _, statistics = _one_layer(weight_OI, x_TI)
    return limit_search(weight_OI.float(), statistics.moments_II, Rounding(group_size)).abs().amax(-1)
