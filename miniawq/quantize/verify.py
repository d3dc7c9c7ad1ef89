"""Check a finished INT4 checkpoint against the dense one it was made from, from the files alone.

With the scale s and zero z of a group as stored, no weight w of the folded model is further from its stored value than

    max(r s, max(w) - (15 - z) s, -min(w) - z s)

r is 1/2 for nearest codes, and 1 for codes that may be either of the two beside their weight. The last two are what
clipping cuts off on purpose.
"""

import ctypes
import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from miniawq.checkpoint.background import ahead
from miniawq.checkpoint.blocks import Stored, place_stored, read_stored
from miniawq.checkpoint.opening import Checkpoint
from miniawq.errors import MiniawqError
from miniawq.packing import TOP_CODE, Quantized, row_slices
from miniawq.text.tokenizer import Tokenizer

ROUNDING = 1e-6  # relative; folding the weights again rounds them in float32
HASHING_THREADS = 4  # more do not read a disk faster


def verify(
    source: Checkpoint,
    written: Checkpoint,
    listed: set[str],
    smooth: Callable[[str, Tensor], Tensor],
    device: torch.device | str = "cpu",
    reach: float = 0.5,
    digests: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Check every linear layer of `written`: packed within the bound, or in `listed` and dense.

    `smooth` gives a layer's weight [O, I] float32 after folding; but for what is clipped, codes are at most `reach`
    scales from their weights. Tensors named in `digests` must have these SHA-256. MiniawqError names the first layer or
    tensor that fails.
    """
    device = torch.device(device)
    check_digests(written, digests)
    for name in source.linears:
        if (name in written.quantized) == (name in listed):
            raise _broken(name, "it is neither packed nor listed as dense, or it is both")

    def stored(name: str) -> tuple[str, Stored, Stored]:
        return name, read_stored(source, f"{name}.weight", device), read_stored(written, f"{name}.weight", device)

    worst = 0.0
    for name, weight, packed in ahead(map(stored, written.quantized)):
        dense, quantized = place_stored(source, name, weight, device), place_stored(written, name, packed, device)
        assert isinstance(dense, Tensor)
        assert isinstance(quantized, Quantized)
        weight_OI = smooth(name, dense.float())
        error = error_over_bound(weight_OI, quantized, reach)
        if not error <= 1 + ROUNDING:
            raise _broken(name, f"a weight is {error:.6f} times the bound away from its code")
        worst = max(worst, error)
    return {"packed_linears": len(written.quantized), "largest_error_over_bound": worst}


def check_digests(written: Checkpoint, digests: Mapping[str, str]) -> None:
    """MiniawqError names the first tensor whose bytes have not the SHA-256 that a ShardWriter noted."""

    def digest_of(name: str) -> str:
        values = written.read(name).contiguous()
        return hashlib.sha256((ctypes.c_char * values.nbytes).from_address(values.data_ptr())).hexdigest()

    # Reading and hashing leave Python's lock, so a few threads do several tensors at a time.
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        for name, found in zip(digests, threads.map(digest_of, digests), strict=True):
            if found != digests[name]:
                raise _broken(name, "the file does not hold the bytes that were written")


def has_tokenizer(directory: Path) -> bool:
    """Whether the tokenizer of a checkpoint opens."""
    try:
        Tokenizer(directory)
    except MiniawqError:
        return False
    return True


def error_over_bound(weight_OI: Tensor, quantized: Quantized, reach: float = 0.5) -> float:
    """The largest error of any weight, in units of its group's bound: at most 1."""
    codes_OI, scales_OG, zeros_OG = quantized
    worst = []
    for rows in row_slices(codes_OI):
        groups_OGS = weight_OI[rows].unflatten(1, (scales_OG.shape[1], -1)).double()
        scale_OG, zero_OG = scales_OG[rows].double(), zeros_OG[rows].double()
        above_OG = groups_OGS.amax(-1) - (TOP_CODE - zero_OG) * scale_OG
        below_OG = -groups_OGS.amin(-1) - zero_OG * scale_OG
        bound_OG = torch.maximum(torch.maximum(above_OG, below_OG), reach * scale_OG)
        codes_OGS = codes_OI[rows].unflatten(1, (scales_OG.shape[1], -1))
        values_OGS = (codes_OGS - zero_OG.unsqueeze(-1)) * scale_OG.unsqueeze(-1)
        worst.append(((groups_OGS - values_OGS).abs().amax(-1) / bound_OG).max())
    return float(torch.stack(worst).max())


def _broken(name: str, why: str) -> MiniawqError:
    return MiniawqError(
        f"the written checkpoint is wrong at {name}",
        why,
        "nothing is published: remove the destination and run again; report it if that fails, too",
    )
