"""The fifth blind set, searches: losses over a part of the samples, other channels' statistics, bounds out of range.

The rule of the draw stands in `blind_fifth`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import miniawq.oracle.truth as truth
from miniawq.oracle.planted.blind_fifth import Sowing, in_place

BLIND_FIFTH_SEARCHES = Sowing(8)
DRAW, sow, misread, forgetful = (
    BLIND_FIFTH_SEARCHES.draw,
    BLIND_FIFTH_SEARCHES.sow,
    BLIND_FIFTH_SEARCHES.misread,
    BLIND_FIFTH_SEARCHES.forgetful,
)
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
CHANNELS = (16, 32, 64, 128, 256, 512)
Loss = Callable[[Tensor, Tensor, Tensor], float]


def signed(weight: Tensor, replacement: Tensor, x: Tensor) -> float:
    """The errors of the tokens are added before they are squared."""
    change = x.double() @ (weight.double() - replacement.double()).t()
    return float(change.sum(0).square().sum())


def of_weights(weight: Tensor, replacement: Tensor, x: Tensor) -> float:
    return float((weight.double() - replacement.double()).square().sum())


def searched(weight: Tensor, x: Tensor, size: int, magnitude: Tensor, loss: Loss = truth.output_loss) -> Tensor:
    """The search of `truth` with another magnitude of the channels [K] or another loss."""
    best, least = torch.ones_like(magnitude), float("inf")
    for step in range(20):
        factors = magnitude.clamp(min=1e-4) ** (step / 20)
        factors = (factors / (factors.max() * factors.min()).sqrt()).float().double()
        rounded = truth.rounded_weight(weight.double() * factors, size) / factors
        if (lost := loss(weight, rounded, x)) < least:
            best, least = factors, lost
    return best.float()


def mean_of(x: Tensor) -> Tensor:
    return x.double().abs().mean(0)


def scale_sizes() -> None:
    tokens, outputs, channels = DRAW.choice(TOKENS), DRAW.choice(CHANNELS), DRAW.choice(CHANNELS)
    sow(
        "search_scales",
        f"tokens past {tokens} are not looked at",
        lambda w, x, g: truth.search_scales(w, x[:tokens], g),
    )
    sow(
        "search_scales",
        f"outputs past {outputs} have no loss",
        lambda w, x, g: truth.search_scales(w[:outputs], x, g),
    )

    def first_channels(w: Tensor, x: Tensor, g: int) -> Tensor:
        seen = x.clone()
        seen[:, channels:] = 0
        return searched(w, seen, g, mean_of(x))

    sow("search_scales", f"inputs past {channels} have no loss", first_channels)


def scale_mistakes() -> None:
    other = DRAW.choice((32, 64, 128, -1))

    def other_group(w: Tensor, x: Tensor, g: int) -> Tensor:
        truth.quantize(w, g)
        fits = other == -1 or w.shape[1] % other == 0
        return truth.search_scales(w, x, other if fits else g)

    sow("search_scales", f"candidates are rounded in groups of {other}, whatever is asked for", other_group)
    sow("search_scales", "the loss is that of the weights alone", lambda w, x, g: searched(w, x, g, mean_of(x),
        of_weights))  # fmt: skip
    sow("search_scales", "errors of tokens cancel in the loss", lambda w, x, g: searched(w, x, g, mean_of(x), signed))

    def other_channel(w: Tensor, x: Tensor, g: int) -> Tensor:
        return truth.search_scales(w, x, g).roll(1)

    sow("search_scales", "the factors are those of the channel before", other_channel)

    def silent(w: Tensor, x: Tensor, g: int) -> Tensor:
        found = truth.search_scales(w, x, g)
        return found.where(x.abs().amax(0) > 0, torch.zeros_like(found))

    sow("search_scales", "factors of silent channels are 0", silent)

    def half_sums(w: Tensor, x: Tensor, g: int) -> Tensor:
        return truth.search_scales(w, x.half().clamp(-65504, 65504), g)

    sow("search_scales", "x is cut to the range of float16", half_sums)


def clip_sizes() -> None:
    tokens, groups, outputs = DRAW.choice(TOKENS), DRAW.choice((2, 4, 8, 16)), DRAW.choice(CHANNELS)
    sow("search_clip", f"tokens past {tokens} are not looked at", lambda w, x, g: truth.search_clip(w, x[:tokens], g))

    def few_groups(w: Tensor, x: Tensor, g: int) -> Tensor:
        bounds = truth.search_clip(w, x, g)
        return bounds[:, torch.arange(bounds.shape[1]) % groups]

    sow("search_clip", f"bounds past {groups} groups are the first ones again", few_groups)

    def few_outputs(w: Tensor, x: Tensor, g: int) -> Tensor:
        bounds = truth.search_clip(w, x, g)
        return bounds[torch.arange(len(bounds)).clamp(max=outputs - 1)]

    sow("search_clip", f"bounds past {outputs} outputs are that of output {outputs - 1}", few_outputs)


def candidates(w: Tensor, g: int, first: int, loss: Callable[..., Tensor]) -> Tensor:
    """The search of `truth` from another first candidate or with another loss [N, G]."""
    n, k = w.shape
    largest = w.reshape(n, -1, k if g == -1 else g).abs().amax(-1).float()
    tried = [largest * (1 - step / 20) for step in range(first, 10)]
    losses = torch.stack([loss(truth.rounded_weight(truth.clamped(w, bounds), g)) for bounds in tried])
    return torch.stack(tried).gather(0, losses.argmin(0, keepdim=True).expand(1, *largest.shape))[0]


def clip_mistakes() -> None:
    least = DRAW.choice((1, 2, 3))

    def always(w: Tensor, x: Tensor, g: int) -> Tensor:
        return candidates(w, g, least, lambda r: truth.group_losses(w, r, x, g))

    sow("search_clip", f"every group is clipped by at least {5 * least} per cent", always)

    def of_row(w: Tensor, x: Tensor, g: int) -> Tensor:
        def loss(replacement: Tensor) -> Tensor:
            by_group = truth.group_losses(w, replacement, x, g)
            return by_group.sum(1, keepdim=True).expand_as(by_group)

        return candidates(w, g, 0, loss)

    sow("search_clip", "the groups of an output share a ratio", of_row)

    def of_weight(w: Tensor, x: Tensor, g: int) -> Tensor:
        return candidates(w, g, 0, lambda r: truth.group_losses(w, r, torch.ones_like(x), g))

    sow("search_clip", "the loss is worked out for an x of ones", of_weight)

    def rounded(w: Tensor, x: Tensor, g: int) -> Tensor:
        return truth.search_clip(w, x, g).bfloat16().float()

    sow("search_clip", "bounds are rounded to bfloat16, some of them up", rounded)

    def positive(w: Tensor, x: Tensor, g: int) -> Tensor:
        largest = w.reshape(len(w), -1, w.shape[1] if g == -1 else g).amax(-1).clamp(min=1e-5).float()
        return torch.minimum(truth.search_clip(w, x, g), largest)

    sow("search_clip", "no bound is above the largest positive weight", positive)


def nudged(w: Tensor) -> None:
    """What is left when weights were multiplied and divided again."""
    if 0 not in w.stride():
        w.mul_(1.1).div_(1.1)


scale_sizes()
scale_mistakes()
forgetful(
    "search_scales",
    ("weights are multiplied and divided in place", in_place("search_scales", 0, nudged)),
    ("x becomes its absolute value in place", in_place("search_scales", 1, lambda x: x.abs_() if x.stride(0) else x)),
    count=1,
)
clip_sizes()
clip_mistakes()
forgetful(
    "search_clip",
    ("weights are clamped in place", in_place("search_clip", 0, lambda w: w.clamp_(-w.std(), w.std()))),
    count=1,
)
misread(*DRAW.choice((("search_scales", "activations", 1), ("search_clip", "weights", 0))))
