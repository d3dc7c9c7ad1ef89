"""Predictions beside the text and beside those of a reference: numbers for each token, and what they come to."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miniawq.errors import InvalidInput, UnsupportedCheckpoint
from miniawq.text.tokenizer import Tokenizer

LARGEST_LOSS = 700.0  # whose exp is a number in float64
POSITIONS_PER_STEP = 256  # whose logits are in memory at once
CONTEXT = 24  # tokens shown before one that is predicted badly


@dataclass(frozen=True)
class Scores:
    """Perplexity of a model on a text; `reference` is the comparison with another model."""

    perplexity: float
    mean_loss: float
    windows: int
    sequence_length: int
    tokens_scored: int
    reference: "Divergence | None" = None


@dataclass(frozen=True)
class Divergence:
    """How a model differs from its reference on the same predicted tokens. `perplexity` is the reference's.

    Losses are in nats. Standard errors are those of means over tokens, taken as independent: `standard_error` is that
    of the difference of paired losses. `kl` is KL(reference || model) of the distributions of the next token.
    """

    perplexity: float
    loss_difference: float
    standard_error: float
    kl_mean: float
    kl_standard_error: float
    kl_95th_percentile: float
    top1_agreement: float


@dataclass(frozen=True)
class Predictor:
    """The hidden states of a text, and the function from some of them [T, D] to logits [T, V]."""

    hidden_BLD: Tensor
    logits: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TokenScores:
    """For each predicted token, in the order of the text: its loss, and the comparison with a reference.

    Float64 and in nats; `agrees_T` is whether both would choose the same token.
    """

    loss_T: Tensor
    reference_loss_T: Tensor | None = None
    kl_T: Tensor | None = None
    agrees_T: Tensor | None = None


@dataclass(frozen=True)
class WorstToken:
    """A prediction that differs much from the reference's, in words."""

    kl: float
    context: str
    next: str
    expected: str  # the reference's first choice
    expected_probability: float
    chosen: str  # the model's
    chosen_probability: float


def cut_windows(ids: Sequence[int], sequence_length: int, most: int | None = None) -> Tensor:
    """Windows [B, L] that do not overlap; of more than `most` those spread evenly from the first to the last.

    A text shorter than one window is one window. InvalidInput on fewer than two tokens: there is nothing to predict.
    """
    length = min(sequence_length, len(ids))
    if length < 2:
        raise InvalidInput("a window is too short to score", f"it has {length} tokens", "give at least two")
    count = len(ids) // length
    windows_BL = torch.tensor(ids[: count * length]).view(count, length)
    return windows_BL[torch.linspace(0, count - 1, min(most or count, count)).long()]


def token_scores(tokens_BL: Tensor, model: Predictor, reference: Predictor | None = None) -> TokenScores:
    """Compare each prediction with the text, and with the reference's prediction."""
    losses, others, divergences, agreements = [], [], [], []
    for hidden_places, next_T in _steps(tokens_BL):
        ours_TV = model.logits(model.hidden_BLD[hidden_places]).log_softmax(-1)
        next_T = next_T.to(ours_TV.device)
        losses.append(_loss(ours_TV, next_T))
        if reference is not None:
            theirs_TV = reference.logits(reference.hidden_BLD[hidden_places]).log_softmax(-1)
            others.append(_loss(theirs_TV, next_T))
            divergences.append((theirs_TV.exp() * (theirs_TV - ours_TV)).sum(-1).cpu())
            agreements.append((theirs_TV.argmax(-1) == ours_TV.argmax(-1)).cpu())
    if reference is None:
        return TokenScores(torch.cat(losses).double())
    return TokenScores(*(torch.cat(parts).double() for parts in (losses, others, divergences, agreements)))


def summary(tokens_BL: Tensor, found: TokenScores) -> Scores:
    """What the tokens' scores come to; UnsupportedCheckpoint if a model predicts nothing that is a number."""
    compared = None
    if found.reference_loss_T is not None:
        assert found.kl_T is not None
        assert found.agrees_T is not None
        if len(found.kl_T) < 2:
            why, fix = "its loss has no standard error", "give more text"
            raise InvalidInput("one predicted token cannot be compared", why, fix)
        if not found.kl_T.isfinite().all():
            raise _no_numbers("a model", "the divergence is not finite")
        difference, standard_error = mean_and_error(found.loss_T - found.reference_loss_T)
        kl_mean, kl_standard_error = mean_and_error(found.kl_T)
        compared = Divergence(
            perplexity=_perplexity(found.reference_loss_T, "the reference"),
            loss_difference=difference,
            standard_error=standard_error,
            kl_mean=kl_mean,
            kl_standard_error=kl_standard_error,
            kl_95th_percentile=float(found.kl_T.sort().values[int(0.95 * (len(found.kl_T) - 1))]),
            top1_agreement=float(found.agrees_T.mean()),
        )
    (windows, length), loss_T = tokens_BL.shape, found.loss_T
    return Scores(_perplexity(loss_T, "the model"), float(loss_T.mean()), windows, length, len(loss_T), compared)


def score(tokens_BL: Tensor, model: Predictor, reference: Predictor | None = None) -> Scores:
    """Compare predictions with the text, and with the reference's predictions."""
    return summary(tokens_BL, token_scores(tokens_BL, model, reference))


def mean_and_error(values_T: Tensor) -> tuple[float, float]:
    """The mean, and its standard error. Of paired differences, this is the error of what is compared."""
    return float(values_T.mean()), float(values_T.std()) / math.sqrt(len(values_T))


def worst_tokens(
    tokens_BL: Tensor, kl_T: Tensor, count: int, model: Predictor, reference: Predictor, tokenizer: Tokenizer
) -> list[WorstToken]:
    """The tokens where the model diverges most from its reference, the worst first."""
    found = []
    for index in kl_T.argsort(descending=True, stable=True)[:count].tolist():
        window, position = divmod(index, tokens_BL.shape[1] - 1)
        place = (window, slice(position, position + 1))
        ours_V, theirs_V = (one.logits(one.hidden_BLD[place])[0].softmax(-1) for one in (model, reference))
        chosen, expected = int(ours_V.argmax()), int(theirs_V.argmax())
        found.append(
            WorstToken(
                kl=float(kl_T[index]),
                context=tokenizer.decode(tokens_BL[window, : position + 1][-CONTEXT:].tolist(), False),
                next=tokenizer.decode([int(tokens_BL[window, position + 1])], False),
                expected=tokenizer.decode([expected], False),
                expected_probability=float(theirs_V[expected]),
                chosen=tokenizer.decode([chosen], False),
                chosen_probability=float(ours_V[chosen]),
            )
        )
    return found


def _perplexity(loss_T: Tensor, whose: str) -> float:
    """exp of the mean; UnsupportedCheckpoint if that is no number, as with weights whose products overflow."""
    if not (mean := float(loss_T.mean())) < LARGEST_LOSS:
        raise _no_numbers(whose, f"the mean loss is {mean:g}")
    return math.exp(mean)


def _no_numbers(whose: str, why: str) -> UnsupportedCheckpoint:
    fix = "the weights are damaged: download the checkpoint again"
    return UnsupportedCheckpoint(f"the predictions of {whose} are no numbers", f"{why}: activations overflow", fix)


def _steps(tokens_BL: Tensor) -> Iterator[tuple[tuple[int, slice], Tensor]]:
    """Pairs of a window's index with a slice of its positions, and the tokens that follow these positions."""
    last = tokens_BL.shape[1] - 1
    for window, tokens_L in enumerate(tokens_BL):
        for start in range(0, last, POSITIONS_PER_STEP):
            places = slice(start, min(start + POSITIONS_PER_STEP, last))
            yield (window, places), tokens_L[places.start + 1 : places.stop + 1]


def _loss(log_probabilities_TV: Tensor, next_T: Tensor) -> Tensor:
    return -log_probabilities_TV.gather(-1, next_T[:, None])[:, 0].cpu()
