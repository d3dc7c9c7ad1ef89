"""What journal and report say about a finished block: made here, and checked when a journal is read again."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from miniawq.awq import FactorSearch, Fold, Statistics
from miniawq.checkpoint.shards import Spec, serialize

PRIVATE = ("scales", "digests")  # what only the journal holds


def note_on(fold: Fold, statistics: Statistics) -> str:
    """What a user has to know about the text that a fold saw; mostly nothing."""
    if not statistics.usable:
        return "no calibration text, or NaN or infinity in it"
    dead = int((fold.gather(statistics.magnitude_I) == 0).sum())
    return f"{dead} channels are never active" if dead else ""


def record_of(search: FactorSearch, note: str) -> dict[str, Any]:
    """A search as the journal and the report hold it."""
    return {
        "previous": search.fold.smooth_layer,
        "compared": search.fold.compared,
        "formula": search.chosen.formula,
        "ratio": search.chosen.ratio,
        "loss": search.chosen.loss,
        "plain_loss": search.trials[0].loss,
        "note": note,
        "trials": [list(trial) for trial in search.trials],
    }


def encode_factors(factors: Mapping[str, Tensor]) -> str:
    """Factors by the name of their smooth layer, as text."""
    return base64.b64encode(serialize(factors)).decode()


def decode_factors(text: str) -> dict[str, Tensor]:
    """The inverse; ValueError when the text is no such thing."""
    try:
        return safetensors.torch.load(base64.b64decode(text, validate=True))
    except (SafetensorError, binascii.Error) as error:
        raise ValueError(str(error)) from error


def record_problem(record: Mapping[str, Any], layer: int, specs: Sequence[Spec], folds: Sequence[Fold]) -> str:
    """What is wrong with the record of block `layer`, whose run writes `specs`; empty if nothing is."""
    names = [spec.name for spec in specs]
    own = [place for place, name in enumerate(names, start=1) if name.startswith(f"model.layers.{layer}.")]
    if not own or record.get("layer") != layer:
        return f"it is not the record of block {layer}"
    if record.get("tensors") != own[-1]:
        return f"`tensors` is {record.get('tensors')!r:.100}, and block {layer} ends with tensor {own[-1]}"
    if not isinstance(record.get("seconds"), float):
        return f"`seconds` is {record.get('seconds')!r:.100}, and not a number"
    digests, searches, layers = (record.get(key) for key in ("digests", "folds", "layers"))
    first = 0 if layer == 0 else own[0] - 1
    if not isinstance(digests, dict) or [*digests] != names[first : own[-1]]:
        return "`digests` does not name the tensors of this block"
    if not all(isinstance(digest, str) for digest in digests.values()):
        return "`digests` holds something that is no text"
    if not isinstance(searches, list) or not isinstance(layers, dict) or not all(map(_has_losses, layers.values())):
        return "`folds` or `layers` is not what a search leaves"
    try:
        factors = decode_factors(record["scales"])
    except (KeyError, TypeError, ValueError) as error:
        return f"`scales` cannot be decoded: {str(error)[:100]}"
    if factors.keys() != {fold.smooth_layer for fold in folds if fold.smooth_layer}:
        return "`scales` does not name the folds of this model"
    if not all(factors_P.is_floating_point() and factors_P.dim() == 1 for factors_P in factors.values()):
        return "`scales` holds something that is no row of factors"
    return ""


def _has_losses(layer: object) -> bool:
    return isinstance(layer, dict) and all(isinstance(layer.get(key), float) for key in ("plain_loss", "loss"))
