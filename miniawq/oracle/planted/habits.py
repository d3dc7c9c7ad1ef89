"""Faults of the grammar in what is taken and in what is kept: refusals left out, state between calls."""

from collections.abc import Callable, Iterator
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

import miniawq.oracle.truth as truth
from miniawq.oracle.planted import CORRECT
from miniawq.oracle.planted.grammar import (
    LAYER,
    MATRIX,
    PRODUCT,
    WEIGHTS,
    Bred,
    Function,
    When,
    bred,
    only,
)


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
    for kind, mend in (("bias cut", lambda x, b, k, n: (x, None if b is None else b[:n])),
                       ("bias filled up", lambda x, b, k, n: (x, None if b is None else torch.cat([b, b])[:n])),
                       ("x cut", lambda x, b, k, n: (x[..., :k], b)),
                       ("x filled up", lambda x, b, k, n: (pad(x, (0, max(0, k - x.shape[-1]))), b)),
                       ):  # fmt: skip
        for when in ("", "one row", "65 rows and more", "three dimensions", "bfloat16", "group_size -1"):
            yield bred("matmul", kind, "", when, curing_product(mend, PRODUCT[when]))
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
    def wrong(x: Tensor, w: Tensor, z: Tensor, s: Tensor, g: int, b: Any = None) -> Tensor:
        if when(w, z, s, g):
            w, z, s, g = fit(w, z, s, g)
        return truth.matmul(x, w, z, s, g, b)

    return wrong


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
        yield Bred(f, "a result kept", "under shapes", "", partial(keeping, f, same_shape))
        yield Bred(f, "a result kept", "under addresses", "", partial(keeping, f, addresses))
        yield Bred(f, "a result kept", "under sums", "", partial(keeping, f, sums))
        yield Bred(f, "the last result again", "for the same shapes", "", partial(last_kept, f))
        yield Bred(f, "one buffer for all results", "of a shape", "", partial(one_buffer, f))
        yield Bred(f, "a wrong result", "every 200th call", "", partial(now_and_then, f, 200, False))
        yield Bred(f, "a wrong result", "one in 50 calls", "", partial(now_and_then, f, 50, True))
        yield Bred(f, "the last element of the call before", "", "", partial(remembered, f))
        for place in range({"pack": 1, "unpack": 1, "dequantize": 3, "quantize": 1, "matmul": 6}.get(f, 2)):
            if (f, place) != ("matmul", 4):
                yield Bred(f, "an argument overwritten", f"number {place}", "", partial(overwriting, f, place))
        yield bred(f, "a wider dtype", "", "", partial(wider_from, f))
        yield bred(f, "a result on no device", "", "", partial(nowhere_from, f))
    yield Bred("load_checkpoint", "a result kept", "under the directory", "", lambda: keeping("load_checkpoint", str))
    yield Bred("load_checkpoint", "a wrong result", "every 200th call", "", lambda: now_and_then(
        "load_checkpoint", 200, False))  # fmt: skip


WIDER = {torch.uint8: torch.int32, torch.int32: torch.int64, torch.float16: torch.float32}


def wider(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(wider(t) for t in result)
    return result.to(WIDER.get(result.dtype, torch.float64))


def nowhere(result: Any) -> Any:
    return tuple(nowhere(t) for t in result) if isinstance(result, tuple) else result.to("meta")


def wider_from(function: str, *arguments: Any) -> Any:
    return wider(CORRECT[function](*arguments))


def nowhere_from(function: str, *arguments: Any) -> Any:
    return nowhere(CORRECT[function](*arguments))
