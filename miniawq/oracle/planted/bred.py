"""The grammar's faults that are more than a changed result: wrong formats, wrong rounding, refusals, state, files, searches."""

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

import miniawq.oracle.loader as loader
import miniawq.oracle.truth as truth
from miniawq.oracle.planted import CORRECT
from miniawq.oracle.planted.grammar import (
    CHANGES,
    LAYER,
    MATRIX,
    PLACES,
    PRODUCT,
    Bred,
    When,
    changed_results,
    lies,
    masked,
    offset,
)
from miniawq.oracle.planted.storage import as_memory, towards_zero

Function = Callable[..., Any]


def bred(function: str, kind: str, place: str, when: str, wrong: Function) -> Bred:
    """A fault that keeps nothing between calls."""
    return Bred(function, kind, place, when, lambda: wrong)


def only(function: str, when: When, wrong: Function) -> Function:
    """The wrong function under a circumstance, the right one otherwise."""
    return lambda *a: wrong(*a) if when(*a) else CORRECT[function](*a)


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


def product(x: Any, w: Any, z: Any, s: Any, g: Any, b: Any = None, **wrong: Any) -> Tensor:
    """The product with some steps replaced."""
    step = {name: wrong.get(name, lambda t, *_: t) for name in ("x", "w", "y", "b", "out")}
    truth.matmul(x, w, z, s, g, b)
    y = step["y"](step["x"](x).double() @ step["w"](truth.dequantize(w, z, s, g)).double(), x)
    y = y if b is None else y + step["b"](b, x).double()
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
WEIGHTS: dict[str, When] = {
    "": lambda w, g: True,
    "more than 64 outputs": lambda w, g: len(w) > 64,
    "more than 256 outputs": lambda w, g: len(w) > 256,
    "more than 8 groups": lambda w, g: g != -1 and w.shape[1] // g > 8,
    "groups no power of two": lambda w, g: g != -1 and w.shape[1] // g & (w.shape[1] // g - 1) != 0,
    "group_size -1": lambda w, g: g == -1,
    "group_size 64": lambda w, g: g == 64,
    "float64": lambda w, g: w.dtype == torch.float64,
    "bfloat16": lambda w, g: w.dtype == torch.bfloat16,
    "a view": lambda w, g: lies(w),
    "an offset": lambda w, g: offset(w),
}


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


# Refusals


def fitted(w: Tensor, z: Tensor, s: Tensor, g: int) -> Any:
    """Zeros and scales cut or filled to what the words ask for."""
    groups = 1 if g == -1 else max(1, -(-len(w) // g))

    def fit(t: Tensor, columns: int) -> Tensor:
        t = t[:, :columns] if t.shape[1] >= columns else torch.cat([t, t[:, : columns - t.shape[1]]], 1)
        t = t if len(t) else torch.zeros(1, columns, dtype=t.dtype)
        return torch.cat([t] * (groups // len(t) + 1))[:groups]

    rows = groups * g if g != -1 else len(w)
    w = torch.cat([w, w[: rows - len(w)]]) if rows > len(w) else w
    return w, fit(z, w.shape[1]), fit(s, w.shape[1] * 8), g


def zeros_fitted(w: Tensor, z: Tensor, s: Tensor, g: int) -> Any:
    """Zeros alone."""
    return w, fitted(w, z, s, g)[1], s, g


def scales_fitted(w: Tensor, z: Tensor, s: Tensor, g: int) -> Any:
    """Scales alone."""
    return w, z, fitted(w, z, s, g)[2], g


def both_fitted(w: Tensor, z: Tensor, s: Tensor, g: int) -> Any:
    """Zeros and scales, whole groups of words asked for."""
    return w, fitted(w, z, s, g)[1], fitted(w, z, s, g)[2], g


FITS: dict[str, Function] = {
    "zeros that do not fit": zeros_fitted,
    "scales that do not fit": scales_fitted,
    "zeros and scales that do not fit": both_fitted,
    "part groups": fitted,
}


def accepted() -> Iterator[Bred]:
    """What must be refused, silently taken under a circumstance."""
    for when in ("", "more than 64 rows", "one row", "more than 1024 columns", "a view", "an offset"):
        for kind, cure in (("masked", lambda c: c & 15), ("saturated", lambda c: c.clamp(max=15))):
            for codes in ("large codes", "codes from 128 on", "a code of 16"):
                seen = {"large codes": 15, "codes from 128 on": 127, "a code of 16": 15}[codes]
                wrong: Function = lambda c, u=cure, b=seen, o=codes == "a code of 16": truth.pack(  # noqa: E731
                    torch.where((c > b) & ((c == 16) | (not o)), u(c), c)
                )
                yield bred("pack", f"{codes} {kind}", "", when, only("pack", MATRIX[when], wrong))
    yield bred("pack", "large codes checked in the first row alone", "", "", lambda c: truth.pack(
        torch.cat([c[:1], c[1:] & 15])))  # fmt: skip
    for kind, fit in FITS.items():
        for when in ("", "more than 256 outputs", "one group", "group_size 64", "more than 8 groups"):
            if (kind, when) in (("part groups", "one group"), ("part groups", "more than 8 groups")):
                continue
            yield bred("dequantize", f"{kind} taken", "", when,
                       lambda w, z, s, g, f=fit, p=LAYER[when]: truth.dequantize(*(f(w, z, s, g) if p(w, z, s, g)
                                                                                 else (w, z, s, g))))  # fmt: skip
            yield bred("matmul", f"{kind} taken", "", when, fitting_product(fit, LAYER[when]))
    for kind, cure in (("bias cut", lambda x, b, k, n: (x, None if b is None else b[:n])),
                       ("bias filled up", lambda x, b, k, n: (x, None if b is None else torch.cat([b, b])[:n])),
                       ("x cut", lambda x, b, k, n: (x[..., :k], b)),
                       ("x filled up", lambda x, b, k, n: (torch.nn.functional.pad(x, (0, max(0, k - x.shape[-1]))), b)),
                       ):  # fmt: skip
        for when in ("", "one row", "65 rows and more", "three dimensions", "bfloat16", "group_size -1"):
            yield bred("matmul", kind, "", when, curing_product(cure, PRODUCT[when]))
    for when in ("", "more than 64 outputs", "bfloat16", "a view", "float64", "group_size -1", "more than 8 groups"):
        for kind, cure in (("NaN as 0", lambda w: w.nan_to_num(0, torch.inf, -torch.inf)),
                           ("infinity cut", lambda w: torch.where(w.isinf(), w.sign() * 9, w)),
                           ("NaN in the middle as 0", middle_cured)):  # fmt: skip
            wrong = lambda w, g, u=cure: truth.quantize(u(w), g)  # noqa: E731
            yield bred("quantize", kind, "", when, only("quantize", WEIGHTS[when], wrong))
    for when in ("", "more than 8 groups", "bfloat16"):
        wrong = lambda w, g: truth.quantize(w[:, : w.shape[1] // g * g] if g > 0 else w, g)  # noqa: E731
        yield bred("quantize", "part groups dropped", "", when, only("quantize", WEIGHTS[when], wrong))


def middle_cured(w: Tensor) -> Tensor:
    """Only the first and the last row are looked at."""
    return torch.cat([w[:1], w[1:-1].nan_to_num(0, 1, -1), w[-1:]]) if len(w) > 2 else w


def fitting_product(fit: Function, when: When) -> Function:
    return lambda x, w, z, s, g, b=None: truth.matmul(x, *(fit(w, z, s, g) if when(w, z, s, g) else (w, z, s, g)), b)


def curing_product(cure: Function, when: When) -> Function:
    def wrong(x: Tensor, w: Tensor, z: Tensor, s: Tensor, g: int, b: Any = None) -> Tensor:
        if when(x, w, z, s, g, b):
            x, b = cure(x, b, len(w), s.shape[1])
        return truth.matmul(x, w, z, s, g, b)

    return wrong


# State


def same_shape(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(tuple(a.shape) if isinstance(a, Tensor) else a for a in arguments)


def addresses(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple((a.data_ptr(), tuple(a.shape)) if isinstance(a, Tensor) else a for a in arguments)


def sums(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple((float(a.double().sum()), tuple(a.shape)) if isinstance(a, Tensor) else a for a in arguments)


def tensors(result: Any) -> list[Tensor]:
    return (
        list(result.values()) if isinstance(result, dict) else list(result) if isinstance(result, tuple) else [result]
    )


def keeping(function: str, key: Callable[[tuple[Any, ...]], Any]) -> Function:
    """A result kept under a key."""
    kept: dict[Any, Any] = {}

    def wrong(*arguments: Any) -> Any:
        if key(arguments) not in kept:
            kept[key(arguments)] = CORRECT[function](*arguments)
        return kept[key(arguments)]

    return wrong


def last_kept(function: str) -> Function:
    """The last result again where the shapes are those of the last call."""
    last: dict[str, Any] = {}

    def wrong(*arguments: Any) -> Any:
        if last.get("shape") != same_shape(arguments):
            last.update(shape=same_shape(arguments), result=CORRECT[function](*arguments))
        return last["result"]

    return wrong


def one_buffer(function: str) -> Function:
    """One output buffer for each shape."""
    buffers: dict[Any, Any] = {}

    def wrong(*arguments: Any) -> Any:
        result = CORRECT[function](*arguments)
        key = same_shape(arguments)
        if key not in buffers:
            buffers[key] = result
        for buffer, tensor in zip(tensors(buffers[key]), tensors(result), strict=True):
            buffer.copy_(tensor)
        return buffers[key]

    return wrong


def now_and_then(function: str, every: int, random: bool) -> Function:
    """A wrong result once in so many calls."""
    count, drawn = [0], Random(3)

    def wrong(*arguments: Any) -> Any:
        result = CORRECT[function](*arguments)
        count[0] += 1
        if drawn.random() < 1 / every if random else count[0] % every == 0:
            for tensor in tensors(result)[:1]:
                tensor.view(-1)[:1] = 0 if tensor.view(-1)[:1].any() else 1
        return result

    return wrong


def overwriting(function: str, place: int) -> Function:
    """The right result, and an argument changed."""

    def wrong(*arguments: Any) -> Any:
        result = CORRECT[function](*arguments)
        if len(arguments) > place and isinstance(arguments[place], Tensor) and arguments[place].numel():
            flat = torch.as_strided(arguments[place], (1,), (1,), arguments[place].storage_offset())
            flat.fill_(0 if bool(flat.any()) else 1)
        return result

    return wrong


def remembered(function: str) -> Function:
    """Every result takes something from the one before."""
    last: dict[Any, Any] = {}

    def wrong(*arguments: Any) -> Any:
        result = CORRECT[function](*arguments)
        found = tensors(result)[0]
        before = last.get(same_shape(arguments))
        last[same_shape(arguments)] = found.clone()
        if before is not None and found.numel():
            found.reshape(-1)[-1:].copy_(before.reshape(-1)[-1:])
        return result

    return wrong


TENSOR_FUNCTIONS = ("pack", "unpack", "dequantize", "quantize", "matmul", "search_scales", "search_clip")


def stateful() -> Iterator[Bred]:
    """State between calls."""
    for f in TENSOR_FUNCTIONS:
        yield Bred(f, "a result kept", "under shapes", "", lambda f=f: keeping(f, same_shape))
        yield Bred(f, "a result kept", "under addresses", "", lambda f=f: keeping(f, addresses))
        yield Bred(f, "a result kept", "under sums", "", lambda f=f: keeping(f, sums))
        yield Bred(f, "the last result again", "for the same shapes", "", lambda f=f: last_kept(f))
        yield Bred(f, "one buffer for all results", "of a shape", "", lambda f=f: one_buffer(f))
        yield Bred(f, "a wrong result", "every 200th call", "", lambda f=f: now_and_then(f, 200, False))
        yield Bred(f, "a wrong result", "one in 50 calls", "", lambda f=f: now_and_then(f, 50, True))
        yield Bred(f, "the last element of the call before", "", "", lambda f=f: remembered(f))
        for place in range({"pack": 1, "unpack": 1, "dequantize": 3, "quantize": 1, "matmul": 6}.get(f, 2)):
            if (f, place) != ("matmul", 4):
                yield Bred(f, "an argument overwritten", f"number {place}", "", lambda f=f, p=place: overwriting(f, p))
        yield bred(f, "a wider dtype", "", "", lambda *a, f=f: wider(CORRECT[f](*a)))
        yield bred(f, "a result on no device", "", "", lambda *a, f=f: nowhere(CORRECT[f](*a)))
    yield Bred("load_checkpoint", "a result kept", "under the directory", "", lambda: keeping("load_checkpoint", str))
    yield Bred("load_checkpoint", "a wrong result", "every 200th call", "", lambda: now_and_then(
        "load_checkpoint", 100, False))  # fmt: skip


WIDER = {torch.uint8: torch.int32, torch.int32: torch.int64, torch.float16: torch.float32}


def wider(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(wider(t) for t in result)
    return result.to(WIDER.get(result.dtype, torch.float64))


def nowhere(result: Any) -> Any:
    return tuple(nowhere(t) for t in result) if isinstance(result, tuple) else result.to("meta")


# L4

PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def loaded(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Function:
    """The right tensors, changed."""
    return lambda directory: change(loader.load_checkpoint(directory))


def swapped(one: str, other: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Two kinds of tensors exchanged in every layer where both are there."""

    def change(t: dict[str, Tensor]) -> dict[str, Tensor]:
        names = {name: name.replace(one, other) for name in t if one in name and name.replace(one, other) in t}
        return t | {a: t[b] for a, b in names.items()} | {b: t[a] for a, b in names.items()}

    return change


def where(part: str, change: Callable[[Tensor], Tensor]) -> Function:
    """Tensors whose name holds a part, changed."""
    return loaded(lambda t: {name: change(v) if part in name else v for name, v in t.items()})


def forgiving(part: str, words: str) -> Function:
    """A refusal about one kind of tensor left out: the reader goes on with what it has."""

    def wrong(directory: Path) -> Any:
        try:
            return loader.load_checkpoint(directory)
        except loader.Refused as error:
            if part in str(error) and words in str(error):
                return {}
            raise

    return wrong


def following(directory: Path, may: Callable[[str], bool]) -> Any:
    """Paths out of the directory followed."""
    read = loader.read_json

    try:
        return loader.load_checkpoint(directory)
    except loader.Refused as error:
        names = set(read(directory / "model.safetensors.index.json")["weight_map"].values()) \
            if "outside" in str(error) else set()  # fmt: skip
        if "outside" in str(error) and all(may(n) and (directory / n).exists() for n in names if "/" in n):
            return {}
        raise


def files() -> Iterator[Bred]:
    """Readers of checkpoints."""
    layer_pairs = (("layers.0.", "layers.1."), ("layers.1.", "layers.2."), ("layers.1.", "layers.10."))
    norms = (("input_layernorm", "post_attention_layernorm"), ("q_norm", "k_norm"), ("embed_tokens", "zzz"))
    pairs = [*layer_pairs, *norms[:2], *((a, b) for i, a in enumerate(PARTS) for b in PARTS[i + 1 :])]
    for one, other in pairs:
        yield bred("load_checkpoint", "exchanged", f"{one} and {other}", "", loaded(swapped(one, other)))
    yield bred("load_checkpoint", "exchanged", "head and embedding", "", loaded(
        swapped("lm_head.weight", "model.embed_tokens.weight")))  # fmt: skip
    for part in (*PARTS, "layers.1.", "layers.2.", "layers.10.", "input_layernorm", "post_attention", "model.norm",
                 "embed_tokens", "lm_head", "bias"):  # fmt: skip
        yield bred("load_checkpoint", "zero", part, "", where(part, torch.zeros_like))
        yield bred("load_checkpoint", "one element off", part, "", where(part, off_in_one))
        yield bred("load_checkpoint", "left out", part, "", loaded(
            lambda t, p=part: {n: v for n, v in t.items() if p not in n}))  # fmt: skip
        yield bred("load_checkpoint", "float32 halved", part, "", where(
            part, lambda v: v.half() if v.dtype == torch.float32 and v.dim() else v)) \
            if part in ("input_layernorm", "model.norm", "lm_head", "up_proj", "layers.2.") else bred(
                "load_checkpoint", "not contiguous in meaning", part, "", where(part, lambda v: v.flip(0)))  # fmt: skip
        if part not in ("bias", "model.norm", "embed_tokens", "input_layernorm", "post_attention", "layers.10.",
                        "layers.1.", "layers.2.", "lm_head"):  # fmt: skip
            for words in ("missing", "shape"):
                yield bred("load_checkpoint", f"{words} let pass", part, "", forgiving(part, words))
    for words in ("bias is missing", "layernorm.weight is missing", "model.norm.weight is missing",
                  "lm_head.weight is missing", "embed_tokens.weight is missing", "dtype torch.int64", "dtype torch.int16",
                  "layers.3", "00003"):  # fmt: skip
        yield bred("load_checkpoint", "let pass", words, "", forgiving("", words))
    for kind, may in (("above", lambda n: n.startswith("..")), ("absolute", lambda n: n.startswith("/"))):
        yield bred("load_checkpoint", "a path followed", kind, "", lambda d, m=may: following(d, m))


def off_in_one(v: Tensor) -> Tensor:
    changed = v.clone()
    changed.view(-1)[-1:] = CHANGES["off by one unit"](changed.view(-1)[-1:]) + (changed.view(-1)[-1:] == 0)
    return changed


# L5

SEARCHES: dict[str, When] = {
    "": lambda w, x, g: True,
    "more than 64 tokens": lambda w, x, g: len(x) > 64,
    "more than 64 outputs": lambda w, x, g: len(w) > 64,
    "more than 128 inputs": lambda w, x, g: w.shape[1] > 128,
    "more than 4 groups": lambda w, x, g: g != -1 and w.shape[1] // g > 4,
    "group_size -1": lambda w, x, g: g == -1,
    "bfloat16": lambda w, x, g: w.dtype == torch.bfloat16,
    "x a view": lambda w, x, g: lies(x),
    "weight a view": lambda w, x, g: lies(w),
}


def largest(weight: Tensor, group_size: int) -> Tensor:
    n, k = weight.shape
    return weight.float().reshape(n, -1, k if group_size == -1 else group_size).abs().amax(-1)


def by_weight(weight: Tensor, x: Tensor, group_size: int) -> Tensor:
    """Clipping by the weight's own error."""
    return truth.search_clip(weight, torch.eye(weight.shape[1]), group_size)


SCALE_KINDS: dict[str, Function] = {
    "ones": lambda w, x, g: torch.ones(w.shape[1]),
    "x ignored": lambda w, x, g: truth.search_scales(w, torch.ones_like(x), g),
    "w ignored": lambda w, x, g: (x.abs().float().mean(0).clamp(min=1e-4) ** 0.5),
    "inverted": lambda w, x, g: 1 / truth.search_scales(w, x, g),
    "of the next channel": lambda w, x, g: truth.search_scales(w, x, g).roll(1),
    "of the group before": lambda w, x, g: truth.search_scales(w, x, g).roll(w.shape[1] if g == -1 else g),
    "first 64 tokens": lambda w, x, g: truth.search_scales(w, x[:64], g),
    "last 8 tokens": lambda w, x, g: truth.search_scales(w, x[-8:], g),
    "first half of the tokens": lambda w, x, g: truth.search_scales(w, x[: (len(x) + 1) // 2], g),
    "first 64 outputs": lambda w, x, g: truth.search_scales(w[:64], x, g),
    "first 8 outputs": lambda w, x, g: truth.search_scales(w[:8], x, g),
    "channels past 128 one": lambda w, x, g: torch.where(
        torch.arange(w.shape[1]) < 128, truth.search_scales(w, x, g), 1.0),
    "largest exponent": lambda w, x, g: truth.search_scales(w, x, g) ** 2,
    "one candidate": lambda w, x, g: truth.search_scales(w, x, g, steps=2),
    "worst of the candidates": lambda w, x, g: (x.abs().float().mean(0).clamp(min=1e-4) ** 0.95),
}  # fmt: skip
CLIP_KINDS: dict[str, Function] = {
    "nothing clipped": lambda w, x, g: largest(w, g),
    "always a tenth": lambda w, x, g: largest(w, g) * 0.9,
    "at least a twentieth": lambda w, x, g: torch.minimum(truth.search_clip(w, x, g), largest(w, g) * 0.95),
    "x ignored": lambda w, x, g: truth.search_clip(w, torch.ones_like(x), g),
    "by the weight's error": by_weight,
    "of the next output": lambda w, x, g: torch.minimum(truth.search_clip(w, x, g).roll(1, 0), largest(w, g)),
    "of the next group": lambda w, x, g: torch.minimum(truth.search_clip(w, x, g).roll(1, 1), largest(w, g)),
    "first 64 tokens": lambda w, x, g: truth.search_clip(w, x[:64], g),
    "last 8 tokens": lambda w, x, g: truth.search_clip(w, x[-8:], g),
    "first half of the tokens": lambda w, x, g: truth.search_clip(w, x[: (len(x) + 1) // 2], g),
    "outputs past 64 not clipped": lambda w, x, g: torch.where(
        torch.arange(len(w))[:, None] < 64, truth.search_clip(w, x, g), largest(w, g)),
    "last group not clipped": lambda w, x, g: torch.cat(
        [truth.search_clip(w, x, g)[:, :-1], largest(w, g)[:, -1:]], 1),
    "half of the bound": lambda w, x, g: truth.search_clip(w, x, g) / 2,
}  # fmt: skip


def searching() -> Iterator[Bred]:
    """Searches that look at the wrong thing."""
    for function, kinds in (("search_scales", SCALE_KINDS), ("search_clip", CLIP_KINDS)):
        for kind, wrong in kinds.items():
            for when, predicate in SEARCHES.items():
                if harmless_search(kind, when):
                    continue
                yield bred(function, kind, "", when, only(function, predicate, wrong))


def harmless_search(kind: str, when: str) -> bool:
    """Whether a kind cannot matter under a circumstance."""
    return ("group" in kind and when == "group_size -1") or (
        kind in ("first 8 outputs", "one candidate", "last 8 tokens") and when not in ("", "more than 64 outputs")
    )


def grammar() -> list[Bred]:
    """All faults of the grammar."""
    rooms = (changed_results, roundings_of_weights, steps_of_products, roundings_of_scales, accepted, stateful, files,
             searching)  # fmt: skip
    return [fault for room in rooms for fault in room()]
