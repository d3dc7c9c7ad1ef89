"""Faults of the grammar in numbers, L1 to L3: wrong formats, wrong rounding, wrong steps of a product."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import miniawq.oracle.truth as truth
from miniawq.oracle.planted.grammar import (
    CHANGES,
    LAYER,
    PLACES,
    PRODUCT,
    WEIGHTS,
    Bred,
    Function,
    bred,
    masked,
    only,
)
from miniawq.oracle.planted.storage import as_memory, towards_zero

# L1: the rounding of a weight


def half_away(exact: Tensor) -> Tensor:
    """To float16 with ties away from zero."""
    nearest = exact.to(torch.float16)
    farther = (nearest.view(torch.int16) + 1).view(torch.float16)
    tie = (exact.abs() - nearest.double().abs()) == (farther.double().abs() - exact.abs())
    return torch.where(tie & nearest.isfinite(), farther, nearest)


def half_up(exact: Tensor) -> Tensor:
    """To float16 with ties upwards."""
    return torch.where(exact > 0, half_away(exact), exact.to(torch.float16))


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "ties away from zero": half_away,
    "ties up": half_up,
    "cut off": lambda e: towards_zero(e, torch.ones(())),
    "through bfloat16": lambda e: e.bfloat16().half(),
    "saturated": lambda e: e.clamp(-65504, 65504).half(),
    "subnormals flushed": lambda e: torch.where(e.abs() < 2.0**-14, 0.0, e).half(),
    "large ones off by one unit": lambda e: torch.where(
        e.abs() > 32768, CHANGES["off by one unit"](e.half()), e.half()
    ),
    "NaN as 0": lambda e: e.half().nan_to_num(posinf=torch.inf, neginf=-torch.inf),
    "negative scales as positive": lambda e: e.half(),
}


def real(w: Tensor, z: Tensor, s: Tensor, g: int) -> Tensor:
    truth.dequantize(w, z, s, g)
    return truth.real_weight(truth.unpack(w), truth.unpack(z), s, g)


def roundings_of_weights() -> Iterator[Bred]:
    """L1: another rounding of the product."""
    for kind, rounding in ROUNDINGS.items():
        for when in ("", "8 outputs", "more than 256 outputs", "more than 8 groups", "scales a view", "group_size -1"):
            if kind == "negative scales as positive":
                wrong: Function = lambda w, z, s, g: truth.dequantize(w, z, s.abs(), g)  # noqa: E731
            else:
                wrong = lambda w, z, s, g, r=rounding: r(real(w, z, s, g))  # noqa: E731
            yield bred("dequantize", kind, "weight", when, only("dequantize", LAYER[when], wrong))


# L3: formats, bias, special values, strides


def product(x: Any, w: Any, z: Any, s: Any, g: Any, bias: Any = None, **wrong: Any) -> Tensor:
    """The product with some steps replaced, that of the bias by `b`."""
    step = {name: wrong.get(name, lambda t, *_: t) for name in ("x", "w", "y", "b", "out")}
    truth.matmul(x, w, z, s, g, bias)
    y = step["y"](step["x"](x).double() @ step["w"](truth.dequantize(w, z, s, g)).double(), x)
    y = y if bias is None else y + step["b"](bias, x).double()
    return step["out"](y, x).to(x.dtype)


def spread_down(y: Tensor, x: Tensor) -> Tensor:
    """NaN also reaches the next row."""
    flat = y.reshape(-1, y.shape[-1])
    return torch.where(flat.isnan().any(1, keepdim=True).roll(1, 0), torch.nan, flat).reshape(y.shape)


STEPS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "x through float16": {"x": lambda t: t.half()},
    "x through bfloat16": {"x": lambda t: t.bfloat16()},
    "x through TF32": {"x": lambda t: (t.float().view(torch.int32) + 4096 & -8192).view(torch.float32)},
    "bias through float16": {"b": lambda b, x: b.half()},
    "bias through bfloat16": {"b": lambda b, x: b.bfloat16()},
    "result through float16": {"out": lambda y, x: y.half()},
    "result through bfloat16": {"out": lambda y, x: y.bfloat16()},
    "bias after rounding": {"y": lambda y, x: y.to(x.dtype).double()},
    "bias left out": {"b": lambda b, x: 0 * b.nan_to_num(0, 0, 0)},
    "bias twice": {"b": lambda b, x: 2 * b},
    "bias shifted": {"b": lambda b, x: b.roll(1)},
    "bias read past its strides": {"b": lambda b, x: as_memory(b)},
    "NaN of the bias as 0": {"b": lambda b, x: b.nan_to_num(0, torch.inf, -torch.inf)},
    "NaN of x as 0": {"x": lambda t: t.nan_to_num(0, torch.inf, -torch.inf)},
    "infinities of x cut": {"x": lambda t: torch.where(t.isinf(), t.sign() * 60000, t)},
    "negative infinity of x as positive": {"x": lambda t: torch.where(t.isinf(), torch.inf, t)},
    "NaN into the next row": {"y": spread_down},
    "result saturated": {"out": lambda y, x: y.clamp(-65504, 65504) if x.dtype == torch.float16 else y},
    "overflow too early": {
        "out": lambda y, x: torch.where((y.abs() >= 65504) & (x.dtype == torch.float16), y.sign() * torch.inf, y)
    },
    "subnormal x flushed": {"x": lambda t: torch.where(t.abs() < 2.0**-14, 0.0, t.double())},
    "subnormal weights flushed": {"w": lambda t: torch.where(t.abs() < 2.0**-14, 0.0, t)},
    "subnormal results flushed": {"out": lambda y, x: torch.where(y.abs() < 2.0**-14, 0.0, y)},
    "result cut off": {"out": lambda y, x: cut(y, x.dtype)},
    "ties away from zero": {"out": lambda y, x: away(y, x.dtype)},
    "strides of x ignored": {"x": lambda t: as_memory(t) if t.numel() <= t.untyped_storage().nbytes() // 2 else t},
    "weights through bfloat16": {"w": lambda t: t.bfloat16()},
}


def cut(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded towards zero."""
    rounded = y.to(dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    lower = (rounded.view(bits) - 1).view(dtype)
    return torch.where((rounded.double().abs() > y.abs()) & rounded.isfinite(), lower, rounded).double()


def away(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to nearest, ties away from zero."""
    rounded = y.to(dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    higher = (rounded.view(bits) + 1).view(dtype).double()
    tie = (y.abs() - rounded.double().abs()) == (higher.abs() - y.abs())
    return torch.where(tie & rounded.isfinite() & (y != rounded.double()), higher, rounded.double())


STEP_CIRCUMSTANCES = {
    "bias": ("a bias", "a bias and one row", "three dimensions", "bfloat16", "65 rows and more"),
    "NaN": ("", "65 rows and more", "three dimensions", "bfloat16"),
    "other": ("", "one row", "65 rows and more", "three dimensions", "bfloat16", "float32"),
}
HARMLESS = {  # steps that change nothing under a circumstance, or nothing that the contract speaks of
    ("x through float16", ""), ("x through TF32", "bfloat16"),
    ("x through bfloat16", "bfloat16"), ("bias through bfloat16", "bfloat16"), ("result through bfloat16", "bfloat16"),
    ("result saturated", "bfloat16"), ("result saturated", "float32"), ("overflow too early", "bfloat16"),
    ("overflow too early", "float32"), ("weights through bfloat16", "bfloat16"),
    ("ties away from zero", "float32"), ("result cut off", "float32"),
}  # fmt: skip


def steps_of_products() -> Iterator[Bred]:
    """L3: one step of the product wrong."""
    for kind, steps in STEPS.items():
        group = "bias" if "bias" in kind else "NaN" if "NaN" in kind or "infinit" in kind else "other"
        for when in STEP_CIRCUMSTANCES[group]:
            if (kind, when) in HARMLESS:
                continue
            wrong = lambda *a, s=steps: product(*a, **s)  # noqa: E731
            yield bred("matmul", kind, "", when, only("matmul", PRODUCT[when], wrong))


# L2


def rounded_with(weight: Tensor, group_size: int, store: Callable[[Tensor], Tensor], kind: str = "") -> Any:
    """Plain rounding with another step."""
    truth.quantize(weight, group_size)
    n, k = weight.shape
    size = k if group_size == -1 else group_size
    groups = weight.double().t().reshape(k // size, size, n)
    lowest, highest = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    exact = (highest - lowest) / 15
    stored = store(exact)
    step = (exact.clamp(min=2.0**-24) if kind == "codes from the exact scale" else stored.double())[:, None]
    zeros = (-lowest / stored.double()).round().clamp(0, 15)
    if kind == "zero rounded down":
        zeros = (-lowest / stored.double()).floor().clamp(0, 15)
    if kind == "zero rounded up":
        zeros = (-lowest / stored.double()).ceil().clamp(0, 15)
    codes = ((groups / step).round() + zeros[:, None]).clamp(0, 15)
    if kind == "codes cut off near ties":
        codes = ((groups / step + 2.0**-8).floor() + zeros[:, None]).clamp(0, 15)
    if kind == "codes rounded with a bias":
        codes = ((groups / step + 0.01).round() + zeros[:, None]).clamp(0, 15)
    if kind == "zero added before rounding":
        codes = (groups / step - (lowest / stored.double())[:, None]).round().clamp(0, 15)
    return codes.reshape(k, n).byte(), zeros.byte(), stored


def smallest_half(t: Tensor) -> Tensor:
    return t.clamp(min=2.0**-24)


STORES: dict[str, Callable[[Tensor], Tensor]] = {
    "scale to nearest": lambda v: smallest_half(v.half()),
    "scale rounded down": lambda v: smallest_half(towards_zero(v, torch.ones(()))),
    "scale one unit too large": lambda v: CHANGES["off by one unit"](truth.round_up_to_half(v)),
    "scale with 10 bits": lambda v: truth.round_up_to_half((v * 2**30).ceil() / 2**30).clamp(min=2.0**-14),
    "a floor of 1e-6": lambda v: truth.round_up_to_half(v.clamp(min=1e-6)),
    "scale through bfloat16": lambda v: smallest_half(v.bfloat16().half()),
}
KINDS_OF_ROUNDING = (
    "codes from the exact scale", "zero rounded down", "zero rounded up", "codes cut off near ties",
    "codes rounded with a bias", "zero added before rounding",
)  # fmt: skip


def roundings_of_scales() -> Iterator[Bred]:
    """L2: scales, zeros and codes rounded in another way, or changed in a place."""
    for when, predicate in WEIGHTS.items():
        for kind, store in STORES.items():
            wrong: Function = lambda w, g, s=store: rounded_with(w, g, s)  # noqa: E731
            yield bred("quantize", kind, "", when, only("quantize", predicate, wrong))
        for kind in KINDS_OF_ROUNDING:
            wrong = lambda w, g, k=kind: rounded_with(w, g, truth.round_up_to_half, k)  # noqa: E731
            if (kind, when) != ("zero added before rounding", "group_size 64"):
                yield bred("quantize", kind, "", when, only("quantize", predicate, wrong))
        for number, (part, change, place) in enumerate(
            (part, change, place) for part in (0, 1, 2) for change in ("off by one unit", "its left neighbour")
            for place in ("last column", "last row", "middle element", "columns past 256")
        ):  # fmt: skip
            if number % 3 == len(when) % 3 and (part, place) != (1, "columns past 256"):
                name = ("codes", "zeros", "scales")[part]
                yield bred("quantize", f"{name} {change}", place, when,
                           only("quantize", predicate, changed_part(part, change, place)))  # fmt: skip


def changed_part(part: int, change: str, place: str) -> Function:
    """One of codes, zeros and scales changed in a place."""

    def wrong(weight: Tensor, group_size: int) -> Any:
        parts = list(truth.quantize(weight, group_size))
        parts[part] = masked(parts[part], CHANGES[change], PLACES[place])
        return tuple(parts)

    return wrong
