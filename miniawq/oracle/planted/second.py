"""Faults of the second edition: one for each check over a covering array, of ranges, of refusals and of state."""

from pathlib import Path
from typing import Any

import torch

import miniawq.oracle.loader as loader
import miniawq.oracle.truth as truth
from miniawq.oracle.planted import Fault
from miniawq.oracle.planted.blind_products import split_sums
from miniawq.oracle.planted.formats import STEPS, STORES, half_away, product, real, rounded_with
from miniawq.oracle.planted.grammar import LAYER, MATRIX, PRODUCT, WEIGHTS, Function, only
from miniawq.oracle.planted.habits import FITS, fitting_product, now_and_then, one_buffer
from miniawq.oracle.planted.readers import CLIP_KINDS, SCALE_KINDS, following, swapped


def late(function: str, circumstance: Function, wrong: Function) -> dict[str, Function]:
    """A function that is wrong under a circumstance."""
    return {function: only(function, circumstance, wrong)}


def step(kind: str, when: str = "") -> dict[str, Function]:
    """A product with one step wrong."""
    return late("matmul", PRODUCT[when], lambda *a: product(*a, **STEPS[kind]))


def stored(kind: str, when: str = "") -> dict[str, Function]:
    """Scales rounded in another way."""
    return late("quantize", WEIGHTS[when], lambda w, g: rounded_with(w, g, STORES[kind]))


def fitted_words(kind: str) -> Function:
    """Parts of a layer made to fit."""
    return lambda w, z, s, g: truth.dequantize(*FITS[kind](w, z, s, g))


def from_float32(w: Any, z: Any, s: Any, g: int) -> Any:
    """Scales of any dtype cut to float16."""
    return truth.dequantize(w, z, s.half(), g)


def stale(directory: Path) -> Any:
    """A directory read once."""
    KEPT.setdefault(str(directory), loader.load_checkpoint(directory))
    return KEPT[str(directory)]


KEPT: dict[str, Any] = {}

SECOND = [
    Fault("rows past 256 zero in a view", "L0.pack.combinations", late(
        "pack", lambda c: len(c) > 256 and not c.is_contiguous(), lambda c: 0 * truth.pack(c))),
    Fault("an offset of words ignored", "L0.unpack.combinations", late(
        "unpack", MATRIX["an offset"], lambda w: truth.unpack(w).roll(1, 1))),
    Fault("a code of 16 saturated past 256 rows", "L0.pack.refuses-large-codes-anywhere", late(
        "pack", MATRIX["more than 256 rows"], lambda c: truth.pack(c.clamp(max=15)))),
    Fault("part words padded past 64 rows", "L0.pack.refuses-part-words-anywhere", late(
        "pack", MATRIX["more than 64 rows"], lambda c: truth.pack(torch.nn.functional.pad(c, (0, -c.shape[1] % 8))))),
    Fault("codes of 32 bits cut to 8", "L0.pack.wrong-dtypes", {"pack": lambda c: truth.pack(c.to(torch.uint8))}),
    Fault("codes of 1.5 cut to 1", "L0.pack.fractions", {
        "pack": lambda c: truth.pack(c.to(torch.uint8) if c.is_floating_point() else c)}),
    Fault("one output buffer", "L0.pack.state", {"pack": one_buffer("pack")}),
    Fault("a wrong code every 200th call", "L0.unpack.state", {"unpack": now_and_then("unpack", 200, False)}),
    Fault("zeros at an offset read shifted", "L1.combinations", late(
        "dequantize", LAYER["zeros at an offset"], lambda w, z, s, g: truth.dequantize(w, z.roll(1, 1), s, g))),
    Fault("scales through bfloat16 past 256 outputs", "L1.combinations-of-scales", late(
        "dequantize", LAYER["more than 256 outputs"], lambda w, z, s, g: truth.dequantize(
            w, z, s.bfloat16().half(), g))),
    Fault("ties away from zero", "L1.every-product", {"dequantize": lambda *a: half_away(real(*a))}),
    Fault("more than 4096 inputs and 256 outputs shifted", "L1.corners", late(
        "dequantize", lambda w, z, s, g: len(w) > 4096 and s.shape[1] > 256,
        lambda *a: truth.dequantize(*a).roll(1, 0))),
    Fault("negative scales read as positive", "L1.special-scales", {
        "dequantize": lambda w, z, s, g: truth.dequantize(w, z, s.abs(), g)}),
    Fault("too many groups of zeros cut", "L1.refuses-misfits", {
        "dequantize": fitted_words("zeros that do not fit")}),
    Fault("float32 scales cut to float16", "L1.wrong-dtypes", {"dequantize": from_float32}),
    Fault("one output buffer", "L1.state", {"dequantize": one_buffer("dequantize")}),
    Fault("codes of a view past 64 outputs moved", "L2.combinations", late(
        "quantize", lambda w, g: len(w) > 64 and not w.is_contiguous(),
        lambda w, g: (truth.quantize(w, g)[0].roll(1, 0), *truth.quantize(w, g)[1:]))),
    Fault("a floor of 1e-6 under the scale", "L2.combinations-of-groups", stored("a floor of 1e-6")),
    Fault("scales rounded to nearest", "L2.half-scale", stored("scale to nearest")),
    Fault("codes rounded with a bias of a hundredth", "L2.nearest-code", {
        "quantize": lambda w, g: rounded_with(w, g, truth.round_up_to_half, "codes rounded with a bias")}),
    Fault("scales one unit too large", "L2.neighbour", stored("scale one unit too large")),
    Fault("weights beyond 65504 clamped", "L2.large-groups", {
        "quantize": lambda w, g: truth.quantize(w.clamp(-65504, 65504), g)}),
    Fault("scales beyond 32768 refused", "L2.takes-large-weights", {
        "quantize": lambda w, g: truth.quantize(torch.where(w.abs() > 5e5, torch.nan, w), g)}),
    Fault("NaN between the first and the last output read as 0", "L2.refuses-nan-anywhere", {
        "quantize": lambda w, g: truth.quantize(torch.cat([w[:1], w[1:-1].nan_to_num(), w[-1:]]), g)}),
    Fault("part groups dropped in float64", "L2.refuses-part-groups-anywhere", late(
        "quantize", WEIGHTS["float64"], lambda w, g: truth.quantize(w[:, : w.shape[1] // g * g] if g > 0 else w, g))),
    Fault("only the largest magnitude checked", "L2.refuses-large-weights-anywhere", {
        "quantize": lambda w, g: truth.quantize(w.clamp(-491280, 491280), g)}),
    Fault("integers wrapped to 8 bits", "L2.wrong-dtypes", {
        "quantize": lambda w, g: truth.quantize(w if w.is_floating_point() else (w & 7), g)}),
    Fault("one output buffer", "L2.state", {"quantize": one_buffer("quantize")}),
    Fault("the bias left out from 65 rows on", "L3.combinations", step("bias left out", "a bias and 65 rows")),
    Fault("x through bfloat16 from 65 rows on", "L3.combinations-of-sums", step(
        "x through bfloat16", "65 rows and more")),
    Fault("8 outputs and more than 4096 inputs zero", "L3.corners", late(
        "matmul", PRODUCT["more than 4096 inputs"], lambda *a: 0 * truth.matmul(*a))),
    Fault("bias added after rounding", "L3.result-rounding", step("bias after rounding")),
    Fault("sums in float16 splits of 1024", "L3.long-exact-sums", {"matmul": split_sums}),
    Fault("bfloat16 through float16", "L3.ranges", step("x through float16", "bfloat16")),
    Fault("float32 through TF32", "L3.float32-bits", step("x through TF32", "float32")),
    Fault("subnormal activations flushed", "L3.subnormals", step("subnormal x flushed")),
    Fault("float16 results saturate", "L3.overflow", step("result saturated")),
    Fault("NaN reaches the next row", "L3.special-inputs", step("NaN into the next row")),
    Fault("NaN of the bias read as 0", "L3.special-biases", step("NaN of the bias as 0")),
    Fault("a NaN scale read as 0", "L3.special-scales", {
        "matmul": lambda x, w, z, s, g, b=None: truth.matmul(x, w, z, s.nan_to_num(0, 1, 1), g, b)}),
    Fault("scales made to fit", "L3.refuses-misfits", {
        "matmul": fitting_product(FITS["scales that do not fit"], LAYER[""])}),
    Fault("a bias too long cut", "L3.refuses-wrong-lengths", {"matmul": lambda x, w, z, s, g, b=None: truth.matmul(
        x, w, z, s, g, None if b is None else b[: s.shape[1]])}),
    Fault("words of 64 bits read as halves", "L3.wrong-dtypes", {"matmul": lambda x, w, z, s, g, b=None: truth.matmul(
        x, w if w.dtype == torch.int32 else 0 * w.int(), z, s, g, b)}),
    Fault("weights rounded to the integers of x", "L3.integer-inputs", {
        "matmul": lambda x, w, z, s, g, b=None: truth.matmul(
            x, w, z, s, g, b) if x.is_floating_point() else truth.matmul(x.float(), w, z, s, g, b).to(x.dtype)}),
    Fault("one output buffer", "L3.state", {"matmul": one_buffer("matmul")}),
    Fault("a file above the directory read", "L4.refuses.index-above", {
        "load_checkpoint": lambda d: following(d, lambda n: n.startswith(".."))}),
    Fault("a file at an absolute path read", "L4.refuses.index-absolute", {
        "load_checkpoint": lambda d: following(d, lambda n: n.startswith("/"))}),
    Fault("layers 1 and 10 exchanged", "L4.reads.eleven-layers", {
        "load_checkpoint": lambda d: swapped("layers.1.", "layers.10.")(loader.load_checkpoint(d))}),
    Fault("a directory read once", "L4.state", {"load_checkpoint": stale}),
    Fault("the first 8 outputs alone", "L5.scales.combinations", {"search_scales": SCALE_KINDS["first 8 outputs"]}),
    Fault("the first 64 outputs alone", "L5.scales.corners", {"search_scales": SCALE_KINDS["first 64 outputs"]}),
    Fault("the first half of the tokens", "L5.scales.any-order", {
        "search_scales": SCALE_KINDS["first half of the tokens"]}),
    Fault("one output buffer", "L5.scales.state", {"search_scales": one_buffer("search_scales")}),
    Fault("clipping by the weight's error", "L5.clip.combinations", {
        "search_clip": CLIP_KINDS["by the weight's error"]}),
    Fault("outputs past 64 not clipped", "L5.clip.corners", {
        "search_clip": CLIP_KINDS["outputs past 64 not clipped"]}),
    Fault("the first half of the tokens", "L5.clip.any-order", {
        "search_clip": CLIP_KINDS["first half of the tokens"]}),
    Fault("one output buffer", "L5.clip.state", {"search_clip": one_buffer("search_clip")}),
]  # fmt: skip
