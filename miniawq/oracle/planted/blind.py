"""Faults written by hand after the checks were frozen, as authors of kernels make them; scored once, and kept.

They know nothing of the tables of the checks, and are not thinned out: what survives stays here and is told.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import miniawq.oracle.loader as loader
import miniawq.oracle.truth as truth
from miniawq.oracle.planted.grammar import Bred, Function, bred
from miniawq.oracle.planted.storage import as_memory

BLIND: list[Bred] = []


def planted(function: str, kind: str) -> Callable[[Function], Function]:
    """Keep a wrong function under what is wrong with it."""

    def keep(wrong: Function) -> Function:
        BLIND.append(bred(function, kind, "", "", wrong))
        return wrong

    return keep


def lay(name: str, kind: str, change: Callable[..., Any]) -> None:
    """A wrong function without a name of its own."""
    BLIND.append(bred(name, kind, "", "", change))


def cut_rows(t: Tensor, first: int) -> Tensor:
    """Zero from a row on."""
    return torch.where(torch.arange(len(t))[:, None] < first, t, 0)


# L0

lay(
    "pack",
    "rows past the last whole tile of 16 left out",
    lambda c: cut_rows(truth.pack(c), len(c) // 16 * 16) if len(c) > 16 else truth.pack(c),
)
lay(
    "pack",
    "square matrices of words transposed",
    lambda c: truth.pack(c).t().contiguous() if len(c) == c.shape[1] // 8 else truth.pack(c),
)
lay(
    "pack",
    "codes above 15 accepted in the last column of a word",
    lambda c: truth.pack(torch.where((torch.arange(c.shape[-1]) % 8 == 7), c & 15, c)),
)
lay("pack", "columns past 16384 zero", lambda c: torch.where(torch.arange(c.shape[1] // 8) < 2048, truth.pack(c), 0))
lay("pack", "large codes looked for in the last 64 rows", lambda c: truth.pack(torch.cat([c[:-64] & 15, c[-64:]])))
lay("pack", "large codes seen as signed bytes", lambda c: truth.pack(torch.where(c.view(torch.int8) < 0, c & 15, c)))
lay(
    "pack",
    "only multiples of 4 asked for",
    lambda c: truth.pack(c[:, : c.shape[1] // 8 * 8] if c.shape[1] % 4 == 0 else c),
)
lay(
    "unpack",
    "the most negative word taken for its own magnitude",
    lambda w: truth.unpack(torch.where(w == -(2**31), torch.zeros_like(w), w)),
)
lay("unpack", "negative words divided towards zero", lambda w: unpack_truncating(w))
lay("unpack", "int8 returned", lambda w: truth.unpack(w).to(torch.int8))
lay("unpack", "an even number of rows assumed", lambda w: cut_rows(truth.unpack(w), max(1, len(w) // 2 * 2)))
lay(
    "unpack",
    "the words of a column vector read as a row",
    lambda w: truth.unpack(as_memory(w)) if (w.shape[1] == 1 and w.stride(0) != 1) else truth.unpack(w),
)
lay(
    "unpack",
    "words of 17 and more rows and columns read in tiles",
    lambda w: truth.unpack(w).roll(1 if min(w.shape) > 16 else 0, 0),
)


@planted("pack", "made with float32 powers of 16")
def pack_in_floats(codes: Tensor) -> Tensor:
    truth.pack(codes)
    parts = [codes[:, c::8].float() * 16.0**i for i, c in enumerate(truth.NIBBLE_HOLDS_COLUMN)]
    words = torch.stack(parts).sum(0).double().long()
    return torch.where(words < 2**31, words, words - 2**32).int()


def unpack_truncating(words: Tensor) -> Tensor:
    codes = truth.unpack(words)
    odd = (words < 0) & (words % 16 != 0)
    codes[:, 4::8] = torch.where(odd, (codes[:, 4::8] + 1) & 15, codes[:, 4::8])
    return codes


# L1


def with_parts(change: Callable[..., Any]) -> Function:
    """Dequantization from changed codes, zeros, scales and the group of each row."""

    def wrong(w: Tensor, z: Tensor, s: Tensor, g: int) -> Tensor:
        truth.dequantize(w, z, s, g)
        k = len(w)
        group = torch.arange(k) // (k if g == -1 else g)
        q, zero, scale, group = change(truth.unpack(w).double(), truth.unpack(z).double(), s.double(), group)
        return ((q - zero[group]) * scale[group]).half()

    return wrong


lay("dequantize", "group numbers wrap at 64", with_parts(lambda q, z, s, g: (q, z, s, g % 64)))
lay(
    "dequantize",
    "group numbers from a float16 row number",
    with_parts(
        lambda q, z, s, g: (q, z, s, ((torch.arange(len(q)).half().long() * len(z)) // len(q)).clamp(max=len(z) - 1))
    ),
)
lay(
    "dequantize",
    "scales of the tail past a multiple of 64 columns from the block before",
    with_parts(
        lambda q, z, s, g: (
            q,
            z,
            torch.cat(
                [s[:, : s.shape[1] // 64 * 64], s[:, s.shape[1] // 64 * 64 - s.shape[1] % 64 : s.shape[1] // 64 * 64]],
                1,
            )
            if s.shape[1] > 128 and s.shape[1] % 64
            else s,
            g,
        )
    ),
)
lay("dequantize", "a zero of 15 taken for -1", with_parts(lambda q, z, s, g: (q, torch.where(z == 15, -1.0, z), s, g)))
lay("dequantize", "a zero of 0 taken for 8", with_parts(lambda q, z, s, g: (q, torch.where(z == 0, 8.0, z), s, g)))
lay("dequantize", "a scale of 0 taken for 1", with_parts(lambda q, z, s, g: (q, z, torch.where(s == 0, 1.0, s), g)))
lay("dequantize", "negative results saturate", lambda w, z, s, g: truth.dequantize(w, z, s, g).clamp(min=-65504))
lay(
    "dequantize",
    "odd groups of 64 take the zeros before",
    with_parts(lambda q, z, s, g: (q, z[torch.arange(len(z)) // 2 * 2] if len(q) // len(z) == 64 else z, s, g)),
)
lay(
    "dequantize",
    "zeros of one group too many taken",
    lambda w, z, s, g: truth.dequantize(w, z[: len(s)] if len(z) == len(s) + 1 else z, s, g),
)
lay("dequantize", "subnormal results cut off", lambda w, z, s, g: subnormals_cut(w, z, s, g))
lay(
    "dequantize",
    "group_size -1 filled up to a multiple of 32",
    with_parts(
        lambda q, z, s, g: (
            torch.where(
                (torch.arange(len(q)) >= len(q) // 32 * 32)[:, None] & (len(z) == 1) & (len(q) % 32 > 0), 0.0, q
            ),
            z,
            s,
            g,
        )
    ),
)
lay(
    "dequantize",
    "zeros at an offset read from the start of their memory",
    lambda w, z, s, g: truth.dequantize(w, torch.as_strided(z, z.shape, z.stride(), 0), s, g),
)
lay(
    "dequantize",
    "scales read as if they were rows apart",
    lambda w, z, s, g: truth.dequantize(w, z, as_memory(s) if s.stride(-1) == 1 and not s.is_contiguous() else s, g),
)
lay(
    "dequantize",
    "the product through two float16 steps past 512 columns",
    lambda w, z, s, g: truth.dequantize(w, z, s, g) if s.shape[1] <= 512 else in_halves(w, z, s, g),
)


def subnormals_cut(w: Tensor, z: Tensor, s: Tensor, g: int) -> Tensor:
    exact = truth.real_weight(truth.unpack(w), truth.unpack(z), s, g)
    right = truth.dequantize(w, z, s, g)
    return torch.where(exact.abs() < 2.0**-14, ((exact * 2**24).trunc() / 2**24).half(), right)


def in_halves(w: Tensor, z: Tensor, s: Tensor, g: int) -> Tensor:
    size = len(w) if g == -1 else g
    truth.dequantize(w, z, s, g)
    scale = s.repeat_interleave(size, 0)
    return truth.unpack(w).half() * scale - truth.unpack(z).repeat_interleave(size, 0).half() * scale


# L2


def requantized(change: Callable[..., Any]) -> Function:
    """The right codes, zeros and scales, changed."""
    return lambda w, g: change(*truth.quantize(w, g), w)


lay("quantize", "negative groups span their own range", lambda w, g: own_range(w, g))
lay(
    "quantize",
    "a float16 sum tells whether all is finite",
    lambda w, g: (
        truth.quantize(w, g)
        if bool((w.sum(dtype=torch.float16) if w.dtype == torch.float16 else w.float().sum().half()).isfinite())
        else refuse()
    ),
)
lay(
    "quantize",
    "negative infinity taken for the smallest number",
    lambda w, g: truth.quantize(torch.where(w == -torch.inf, -9, w), g),
)
lay(
    "quantize",
    "the seventeenth group takes the scale before",
    requantized(lambda q, z, s, w: (q, z, torch.cat([s[:16], s[15:16], s[17:]]) if len(s) > 16 else s)),
)
lay("quantize", "codes wrap instead of being clamped", lambda w, g: wrapping(w, g))
lay(
    "quantize",
    "outputs past 128 share scales in pairs",
    requantized(
        lambda q, z, s, w: (
            q,
            z,
            torch.cat([s[:, :128], s[:, 128:].reshape(len(s), -1, 2).amax(-1).repeat_interleave(2, 1)], 1)
            if s.shape[1] > 128
            else s,
        )
    ),
)
lay(
    "quantize",
    "bfloat16 weights through float16",
    lambda w, g: truth.quantize(w.half() if w.dtype == torch.bfloat16 and bool((w.abs() < 6e4).all()) else w, g),
)
lay(
    "quantize",
    "transposed weights read as they lie",
    lambda w, g: truth.quantize(as_memory(w) if w.dim() == 2 and w.stride(0) == 1 and w.shape[0] > 1 else w, g),
)
lay("quantize", "the weight clamped in place", lambda w, g: clamping(w, g))
lay("quantize", "scales from the largest magnitude of one-signed groups", lambda w, g: truth.quantize(w, g))
BLIND.pop()  # the right function under another name
lay(
    "quantize",
    "float64 weights beyond float32 precision cut",
    lambda w, g: truth.quantize(w.float() if w.dtype == torch.float64 else w, g),
)
lay(
    "quantize",
    "zeros of constant groups are 0",
    requantized(
        lambda q, z, s, w: (
            q,
            torch.where(
                (w.t().reshape(len(s), -1, len(w)).amax(1) == w.t().reshape(len(s), -1, len(w)).amin(1)), 0, z
            ).byte(),
            s,
        )
    ),
)
lay("quantize", "groups of 128 in two halves with the first half's scale", lambda w, g: halved(w, g))
lay("quantize", "scales to nearest where they are below 2**-10", lambda w, g: nearest_below(w, g))


def refuse() -> Any:
    raise ValueError("not finite")


def own_range(w: Tensor, g: int) -> Any:
    q, z, s = truth.quantize(w, g)
    groups = w.double().t().reshape(len(s), -1, len(w))
    low, high = groups.amin(1), groups.amax(1)
    scale = torch.where(high < 0, ((high - low) / 15).clamp(min=2.0**-20), s.double()).half()
    zeros = torch.where(high < 0, (-low / scale.double()).round().clamp(0, 15), z.double())
    codes = ((groups / scale.double()[:, None]).round() + zeros[:, None]).clamp(0, 15)
    return torch.where((high < 0)[:, None], codes, q.reshape(codes.shape)).reshape(q.shape).byte(), zeros.byte(), scale


def wrapping(w: Tensor, g: int) -> Any:
    q, z, s = truth.quantize(w, g)
    size = len(q) // len(s)
    steps = (w.t().double() / s.double().repeat_interleave(size, 0)).round() + z.repeat_interleave(size, 0)
    return (steps.long() & 15).byte(), z, s


def clamping(w: Tensor, g: int) -> Any:
    result = truth.quantize(w, g)
    if w.stride(0) != 0:
        w.clamp_(-1, 1)
    return result


def halved(w: Tensor, g: int) -> Any:
    q, z, s = truth.quantize(w, g)
    if g != 128:
        return q, z, s
    half = truth.quantize(w.reshape(len(w), -1, 128)[..., :64].reshape(len(w), -1), 64)
    steps = w.t().double() / half[2].double().repeat_interleave(128, 0)
    return (steps.round() + half[1].repeat_interleave(128, 0)).clamp(0, 15).byte(), half[1], half[2]


def nearest_below(w: Tensor, g: int) -> Any:
    q, _, s = truth.quantize(w, g)
    groups = w.double().t().reshape(len(s), -1, len(w))
    exact = (groups.amax(1).clamp(min=0) - groups.amin(1).clamp(max=0)) / 15
    scale = torch.where(exact < 2.0**-10, exact.half().clamp(min=2.0**-24), s)
    zeros = (-groups.amin(1).clamp(max=0) / scale.double()).round().clamp(0, 15)
    codes = ((groups / scale.double()[:, None]).round() + zeros[:, None]).clamp(0, 15)
    return codes.reshape(q.shape).byte(), zeros.byte(), scale


# L3


def before(change: Callable[..., Any]) -> Function:
    """The right product of changed arguments."""
    return lambda x, w, z, s, g, b=None: truth.matmul(*change(x, w, z, s, g, b))


def after(change: Callable[..., Tensor]) -> Function:
    """The right product, changed."""
    return lambda x, w, z, s, g, b=None: change(truth.matmul(x, w, z, s, g, b), x, w, z, s, g, b)


def flat(y: Tensor) -> Tensor:
    return y.reshape(-1, y.shape[-1])


def rows_of(x: Tensor) -> int:
    return x[..., 0].numel()


lay(
    "matmul",
    "the bias left out in the last part tile of 128 rows",
    after(
        lambda y, x, w, z, s, g, b: (
            y
            if (b is None or rows_of(x) <= 128)
            else torch.cat(
                [flat(y)[: rows_of(x) // 128 * 128], flat(truth.matmul(x, w, z, s, g))[rows_of(x) // 128 * 128 :]]
            ).reshape(y.shape)
        )
    ),
)
lay(
    "matmul",
    "the bias on the first 1024 outputs",
    before(
        lambda x, w, z, s, g, b: (
            x,
            w,
            z,
            s,
            g,
            None if (b is None) else torch.where(torch.arange(len(b)) < 1024, b, 0),
        )
    ),
)
lay(
    "matmul",
    "rows of zeros skipped with their bias",
    after(lambda y, x, w, z, s, g, b: torch.where((x == 0).all(-1, keepdim=True), 0, y)),
)
lay(
    "matmul",
    "inputs past a multiple of 128 left out",
    before(
        lambda x, w, z, s, g, b: (
            torch.where(torch.arange(x.shape[-1]) < max(128, x.shape[-1] // 128 * 128), x, 0),
            w,
            z,
            s,
            g,
            b,
        )
    ),
)
lay("matmul", "splits of 1024 inputs added in the dtype of x", lambda *a: split_sums(*a))
lay("matmul", "one row summed in the dtype of x", lambda *a: half_row(*a))
lay(
    "matmul",
    "bfloat16 through float16 where it fits",
    before(
        lambda x, w, z, s, g, b: (
            x.half().to(x.dtype) if (x.dtype == torch.bfloat16 and bool((x.abs() < 65504).all())) else x,
            w,
            z,
            s,
            g,
            b,
        )
    ),
)
lay(
    "matmul",
    "NaN also reaches the row 16 further",
    after(
        lambda y, x, w, z, s, g, b: (
            torch.where(flat(y).isnan().all(1, keepdim=True).roll(16, 0), torch.nan, flat(y)).reshape(y.shape)
            if rows_of(x) > 16
            else y
        )
    ),
)
lay(
    "matmul",
    "the first of several batches for all",
    before(lambda x, w, z, s, g, b: (x[:1].expand_as(x) if x.dim() == 4 else x, w, z, s, g, b)),
)
lay("matmul", "a vector gives a matrix of one row", after(lambda y, x, *a: y[None] if x.dim() == 1 else y))
lay("matmul", "no rows give as many columns as inputs", after(lambda y, x, *a: x if x.numel() == 0 else y))
lay(
    "matmul",
    "no rows and a bias give one row",
    after(lambda y, x, w, z, s, g, b: b[None] if x.numel() == 0 and b is not None else y),
)
lay(
    "matmul",
    "negative overflow saturates",
    after(lambda y, x, *a: y.clamp(min=-65504) if y.dtype == torch.float16 else y),
)
lay(
    "matmul",
    "the bias read every other element",
    before(lambda x, w, z, s, g, b: (x, w, z, s, g, None if b is None else as_memory(b) if b.stride(0) == 2 else b)),
)
lay("matmul", "sums in bfloat16 past 256 outputs", lambda *a: coarse_sums(*a))
lay(
    "matmul",
    "the last group's scale past 64 groups",
    before(lambda x, w, z, s, g, b: (x, w, z, torch.where((torch.arange(len(s)) >= 64)[:, None], s[-1:], s), g, b)),
)
lay(
    "matmul",
    "8-bit activations from 256 rows on",
    before(lambda x, w, z, s, g, b: (x.to(torch.float8_e4m3fn).to(x.dtype) if rows_of(x) >= 256 else x, w, z, s, g, b)),
)
lay(
    "matmul",
    "the bias of bfloat16 added after rounding",
    after(
        lambda y, x, w, z, s, g, b: y if (b is None or x.dtype != torch.bfloat16) else truth.matmul(x, w, z, s, g) + b
    ),
)
lay(
    "matmul",
    "pairs of groups of 32 merged from 128 inputs on",
    before(
        lambda x, w, z, s, g, b: (x, w, z, s[torch.arange(len(s)) // 2 * 2] if g == 32 and len(s) >= 4 else s, g, b)
    ),
)
lay(
    "matmul",
    "x at an odd offset read from the element before",
    before(
        lambda x, w, z, s, g, b: (
            torch.as_strided(x, x.shape, x.stride(), x.storage_offset() - 1) if x.storage_offset() % 2 else x,
            w,
            z,
            s,
            g,
            b,
        )
    ),
)
lay(
    "matmul",
    "a bias twice as long cut",
    before(
        lambda x, w, z, s, g, b: (x, w, z, s, g, None if b is None else b[: s.shape[1]] if len(b) > s.shape[1] else b)
    ),
)
lay(
    "matmul",
    "x with whole groups too many cut",
    before(
        lambda x, w, z, s, g, b: (
            x[..., : len(w)] if (g > 0 and x.shape[-1] > len(w) and (x.shape[-1] - len(w)) % 8 == 0) else x,
            w,
            z,
            s,
            g,
            b,
        )
    ),
)
lay(
    "matmul",
    "infinity times a weight of 0 is 0",
    before(lambda x, w, z, s, g, b: (torch.where(x.isinf(), x.sign() * torch.finfo(x.dtype).max, x), w, z, s, g, b)),
)
lay(
    "matmul",
    "float32 results of large sums in float16",
    after(
        lambda y, x, *a: (
            y.half().float()
            if (y.dtype == torch.float32 and y.numel() and bool((y.abs().amax() > 100) & (y.abs().amax() < 6e4)))
            else y
        )
    ),
)
lay("matmul", "weights decoded once for each address", lambda *a: kept_weight(*a))
lay(
    "matmul",
    "the bias of a broadcast view read as memory",
    before(
        lambda x, w, z, s, g, b: (
            x,
            w,
            z,
            s,
            g,
            b if (b is None or b.stride(0) != 0) else torch.cat([b[:1], torch.zeros_like(b[1:])]),
        )
    ),
)
lay(
    "matmul",
    "rows from 513 on computed from row 512",
    after(
        lambda y, x, *a: (
            torch.cat([flat(y)[:513], flat(y)[512:513].expand(len(flat(y)) - 513, -1)]).reshape(y.shape)
            if rows_of(x) > 513
            else y
        )
    ),
)
lay("matmul", "negative zero scales the sign of the sum", before(lambda x, w, z, s, g, b: (x, w, z, s, g, b)))
BLIND.pop()  # changes nothing

KEPT: dict[Any, Tensor] = {}


def kept_weight(x: Tensor, w: Tensor, z: Tensor, s: Tensor, g: int, b: Any = None) -> Tensor:
    truth.matmul(x, w, z, s, g, b)
    key = (w.data_ptr(), s.data_ptr(), tuple(w.shape), g)
    if key not in KEPT:
        KEPT[key] = truth.dequantize(w, z, s, g).double()
    y = x.double() @ KEPT[key]
    return (y if b is None else y + b.double()).to(x.dtype)


def split_sums(x: Tensor, w: Tensor, z: Tensor, s: Tensor, g: int, b: Any = None) -> Tensor:
    right = truth.matmul(x, w, z, s, g, b)
    if len(w) <= 1024:
        return right
    total: Any = 0
    weight = truth.dequantize(w, z, s, g).double()
    for first in range(0, len(w), 1024):
        total = total + (x[..., first : first + 1024].double() @ weight[first : first + 1024]).to(x.dtype)
    return total if b is None else total + b


def half_row(x: Tensor, w: Tensor, z: Tensor, s: Tensor, g: int, b: Any = None) -> Tensor:
    right = truth.matmul(x, w, z, s, g, b)
    if rows_of(x) != 1:
        return right
    terms = x.reshape(-1, 1) * truth.dequantize(w, z, s, g).to(x.dtype)
    total = torch.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return (total if b is None else total + b).reshape(right.shape)


def coarse_sums(x: Tensor, w: Tensor, z: Tensor, s: Tensor, g: int, b: Any = None) -> Tensor:
    right = truth.matmul(x, w, z, s, g, b)
    return right if s.shape[1] <= 256 else truth.matmul(x, w, z, s, g).bfloat16().to(x.dtype) + (0 if b is None else b)


# L4


def changed(change: Callable[[dict[str, Tensor]], Any]) -> Function:
    """The right tensors, changed."""

    def wrong(directory: Path) -> dict[str, Tensor]:
        loaded = loader.load_checkpoint(directory)
        return change(dict(loaded)) or loaded

    return wrong


def lenient(words: str) -> Function:
    """A refusal in which these words stand, left out."""

    def wrong(directory: Path) -> dict[str, Tensor]:
        try:
            return loader.load_checkpoint(directory)
        except loader.Refused as error:
            if words in str(error):
                return {}
            raise

    return wrong


def renumbered(t: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layers numbered in the order of their names as text."""
    numbers = {name.split(".")[2] for name in t if name.startswith("model.layers.")}
    places = dict(zip(sorted(numbers), sorted(numbers, key=int), strict=True))

    def name_of(name: str) -> str:
        parts = name.split(".")
        return ".".join([*parts[:2], places[parts[2]], *parts[3:]]) if name.startswith("model.layers.") else name

    return {name_of(name): tensor for name, tensor in t.items()}


lay("load_checkpoint", "layers in the order of their names as text", changed(renumbered))
lay(
    "load_checkpoint",
    "biases in float32",
    changed(lambda t: {n: v.float() if n.endswith("bias") else v for n, v in t.items()}),
)
lay(
    "load_checkpoint",
    "the embedding as head",
    changed(lambda t: t | ({"lm_head.weight": t["model.embed_tokens.weight"]} if "lm_head.weight" in t else {})),
)
lay("load_checkpoint", "missing biases let pass", lenient("bias is missing"))
lay("load_checkpoint", "missing norms let pass in later layers", lenient("1.input_layernorm.weight is missing"))
lay("load_checkpoint", "missing zeros let pass in later layers", lenient("layers.1.mlp.up_proj.qzeros is missing"))
lay("load_checkpoint", "another group size let pass in the last layer", lenient("layers.2.mlp.down_proj"))
lay("load_checkpoint", "a truncated third shard let pass", lenient("00003"))
lay(
    "load_checkpoint",
    "norms of queries and keys exchanged",
    changed(
        lambda t: (
            t
            | {
                n: t[n.replace("q_norm", "zz").replace("k_norm", "q_norm").replace("zz", "k_norm")]
                for n in t
                if "q_norm" in n or "k_norm" in n
            }
        )
    ),
)
lay(
    "load_checkpoint",
    "bfloat16 embeddings in float16",
    changed(lambda t: {n: v.half() if "embed" in n else v for n, v in t.items()}),
)
lay(
    "load_checkpoint",
    "float32 norms in bfloat16",
    changed(lambda t: {n: v.bfloat16() if v.dtype == torch.float32 and "norm" in n else v for n, v in t.items()}),
)
lay(
    "load_checkpoint",
    "the last eight outputs of up_proj zero",
    changed(lambda t: {n: torch.cat([v[:-8], 0 * v[-8:]]) if "up_proj.weight" in n else v for n, v in t.items()}),
)
lay(
    "load_checkpoint",
    "layers past the ninth from the ninth",
    changed(lambda t: {n: t.get(n.replace("layers.10.", "layers.9."), v) for n, v in t.items()}),
)
lay(
    "load_checkpoint",
    "a dense projection transposed where it lies among packed ones",
    changed(
        lambda t: {
            n: v.t() if n == "model.layers.2.self_attn.o_proj.weight" and v.shape == (96, 64) else v
            for n, v in t.items()
        }
    ),
)
lay("load_checkpoint", "every wrong dtype let pass", lenient("dtype"))
lay(
    "load_checkpoint",
    "tensors of the third shard zero",
    changed(lambda t: {n: 0 * v if n == sorted(t)[-1] else v for n, v in t.items()}),
)

# L5

lay("search_scales", "every second token", lambda w, x, g: truth.search_scales(w, x[::2], g))
lay("search_scales", "every second output", lambda w, x, g: truth.search_scales(w[::2], x, g))
lay("search_scales", "factors of at most 4", lambda w, x, g: truth.search_scales(w, x, g).clamp(max=4))
lay(
    "search_scales",
    "an exponent of a half up to 128 tokens",
    lambda w, x, g: truth.search_scales(w, x, g) if (len(x) > 128) else x.float().abs().mean(0).clamp(min=1e-4) ** 0.5,
)
lay("search_scales", "candidates compared by the weight's error", lambda w, x, g: by_weights(w, x, g))
lay(
    "search_scales",
    "a running mean that forgets old tokens",
    lambda w, x, g: truth.search_scales(w, x * (0.9 ** torch.arange(len(x)).flip(0))[:, None].to(x.dtype), g),
)
lay(
    "search_scales",
    "statistics of the largest token",
    lambda w, x, g: truth.search_scales(w, x[x.float().abs().sum(1).argmax()][None], g),
)
lay(
    "search_scales",
    "the last channel left out",
    lambda w, x, g: torch.cat([truth.search_scales(w, x, g)[:-1], torch.ones(1)]),
)
lay("search_scales", "outputs past 128 left out", lambda w, x, g: truth.search_scales(w[:128], x, g))
lay("search_scales", "half-precision statistics", lambda w, x, g: truth.search_scales(w, (x.half() ** 2).sqrt(), g))
lay("search_clip", "the first 32 tokens", lambda w, x, g: truth.search_clip(w, x[:32], g))
lay(
    "search_clip",
    "one bound for all groups of an output",
    lambda w, x, g: torch.minimum(truth.search_clip(w, x, g).amax(1, keepdim=True), magnitudes(w, g)),
)
lay(
    "search_clip",
    "clipped in the first group alone",
    lambda w, x, g: torch.cat([truth.search_clip(w, x, g)[:, :1], magnitudes(w, g)[:, 1:]], 1),
)
lay(
    "search_clip",
    "never below nine tenths",
    lambda w, x, g: torch.maximum(truth.search_clip(w, x, g), 0.9 * magnitudes(w, g)),
)
lay(
    "search_clip",
    "the mean of the outputs' errors",
    lambda w, x, g: truth.search_clip(w, x.float().mean(0, keepdim=True), g),
)
lay("search_clip", "a step too far", lambda w, x, g: truth.search_clip(w, x, g) * 0.95)
lay(
    "search_clip",
    "activations of the group before",
    lambda w, x, g: truth.search_clip(w, x.roll(g if g > 0 else 1, 1), g),
)
lay("search_clip", "every second token", lambda w, x, g: truth.search_clip(w, x[::2], g))
lay("search_clip", "signs of activations lost", lambda w, x, g: truth.search_clip(w, x.abs(), g))


def by_weights(w: Tensor, x: Tensor, g: int) -> Tensor:
    """The candidates are right, their loss is that of the weight."""
    size = x.double().abs().mean(0).clamp(min=1e-4)
    candidates = [size ** (i / 20) for i in range(20)]
    losses = [truth.scaled_loss(w, torch.eye(len(size)), c, g) for c in candidates]
    return candidates[losses.index(min(losses))].float()


def magnitudes(w: Tensor, g: int) -> Tensor:
    n, k = w.shape
    return w.float().reshape(n, -1, k if g == -1 else g).abs().amax(-1)
