"""One dense model in several formats: all of them in one pass over its blocks, each scored beside the dense model.

    for each block: read it, run the calibration text through it
                    for each format: change the linears of a copy, run the format's own hidden states through it

So one block is in memory at a time, the statistics of the text are taken once, and no file is written. Embedding, norms
and head stay as they are in every format.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from miniawq import awq
from miniawq.awq import Fold
from miniawq.checkpoint.blocks import BlockStream
from miniawq.checkpoint.opening import Checkpoint
from miniawq.commands.scores import Predictor, Scores, score
from miniawq.errors import UsageError
from miniawq.hardware import synchronize
from miniawq.model import DecoderBlock
from miniawq.quantize.formats import FORMATS, Approximation, gptq_rounding, int4_bits, rtn
from miniawq.quantize.moments import SymmetricStatistics
from miniawq.quantize.packable import packable_folds
from miniawq.quantize.recipes import DEFAULT, NEIGHBOURS, Recipe
from miniawq.quantize.streams import Streams

log = logging.getLogger("miniawq.evaluate")

COMPARED_TOKENS = 4096  # on which modules' outputs are compared, as by `miniawq quantize`
RECIPES = {"awq": DEFAULT, "neighbours": NEIGHBOURS}
COMPENSATED = {"gptq": False, "gptq-act-order": True}
LEARNERS = (*RECIPES, *COMPENSATED)  # formats that look at a text
GROUPED = ("rtn", *LEARNERS)  # formats of any group size
ALL = (*FORMATS, *GROUPED)
FOUR_BITS = 6.0  # bits a weight below which a format is drawn among those of 4
MARKERS = "osD^v<>PX*ph8"  # one a format, since colours repeat
DENSE_BITS = 16  # of each number that no format changes

# Changes the linears of a block, and says how many bits hold them.
Change = Callable[[DecoderBlock, int], int]


@dataclass(frozen=True)
class FormatRow:
    """A format's row: bits a weight of the layers that it changes, bytes of the whole model, seconds by `clock`."""

    name: str
    group_size: int | None
    bits: float
    nbytes: int
    seconds: float
    scores: Scores


class Contestant:
    """A format in the contest: its change, its own hidden states of the scored text, and what it has cost so far."""

    def __init__(self, name: str, group_size: int | None, change: Change, hidden_BLD: Tensor) -> None:
        self.name, self.group_size, self.change, self.hidden_BLD = name, group_size, change, hidden_BLD
        self.bits, self.seconds = 0, 0.0


class Text:
    """The calibration text before and after a dense block, and what the block's folds see of it."""

    def __init__(self, stream: BlockStream, tokens_BL: Tensor, compared_tokens: int) -> None:
        self.stream, self.folds = stream, awq.llama_folds(stream.config)
        self.stride = max(1, tokens_BL.numel() // compared_tokens)
        self.hidden_BLD = torch.empty(*tokens_BL.shape, stream.config.hidden_size)
        stream.embed(tokens_BL, self.hidden_BLD)
        self.before_BLD = self.hidden_BLD.clone()
        self.statistics: dict[Fold, awq.Statistics] = {}
        self.seconds = 0.0

    def enter(self, block: DecoderBlock, layer: int) -> None:
        started = clock(self.stream.device)
        self.before_BLD.copy_(self.hidden_BLD)
        with awq.observe(block, self.folds, self.stride, SymmetricStatistics) as statistics:
            self.stream.advance(block, layer, self.hidden_BLD)
        self.statistics = statistics
        self.seconds += clock(self.stream.device) - started


class Searched:
    """A recipe of `miniawq quantize`."""

    def __init__(self, recipe: Recipe, text: Text) -> None:
        self.recipe, self.text = recipe, text
        states = (torch.empty_like(text.before_BLD), text.before_BLD.clone()) if recipe.learns else None
        self.streams = Streams(text.stream, *states) if states else None

    def __call__(self, block: DecoderBlock, layer: int) -> int:
        recipe, statistics, look = self.recipe, copy.deepcopy(self.text.statistics), None
        if self.streams:
            self.streams.begin(self.text.before_BLD)
            look = partial(self.streams.aims, block, layer)
        _, layers = awq.quantize_block(block, statistics, recipe.rounding, recipe.method, torch.float16, look)
        if self.streams:
            self.streams.follow(block, layer)
        return sum(int4_bits(block.get_parameter(f"{name}.weight"), recipe.group_size) for name in layers)


class Compensated:
    """GPTQ, whose statistics are those of the blocks that it has quantized already, as its authors take them."""

    def __init__(self, text: Text, group_size: int, act_order: bool) -> None:
        self.text, self.group_size, self.act_order = text, group_size, act_order
        self.hidden_BLD = text.before_BLD.clone()

    def __call__(self, block: DecoderBlock, layer: int) -> int:
        bits = 0
        with awq.observe(block, self.text.folds, len(self.hidden_BLD), SymmetricStatistics) as statistics:
            for _ in self.text.stream.run(block, layer, self.hidden_BLD):
                pass
        for fold, seen in statistics.items():
            compensate = partial(
                gptq_rounding, moments_II=seen.moments_II, group_size=self.group_size, act_order=self.act_order
            )
            bits += change_layers(fold.balance_layers, compensate, block, layer)
        self.text.stream.advance(block, layer, self.hidden_BLD)
        return bits


def change_layers(
    names: Sequence[str], approximate: Callable[[Tensor], Approximation], block: DecoderBlock, layer: int
) -> int:
    """Put the numbers of a format in the place of weights; returns the bits that hold them."""
    bits = 0
    for name in names:
        parameter = block.get_parameter(f"{name}.weight")
        parameter.data, more = approximate(parameter.data)
        bits += more
    return bits


def clock(device: torch.device) -> float:
    """Seconds of the processor, which others share; for a GPU those that have passed when its work is done."""
    synchronize(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


@torch.inference_mode()
def run_formats(
    checkpoint: Checkpoint,
    tokens_BL: Tensor,
    asked: Sequence[tuple[str, int | None]],
    calibration_BL: Tensor | None = None,
    device: torch.device | str = "cpu",
    *,
    compared_tokens: int = COMPARED_TOKENS,
    blocks: int | None = None,
) -> tuple[Predictor, list[tuple[Contestant, Predictor]]]:
    """The dense model's predictions, and those of each format with its group size, if it has any.

    The formats change the first `blocks` blocks, or all of them. Seconds of a format that looks at the text have those
    of the text in the dense model.
    """
    stream = BlockStream(checkpoint, device)
    hidden_BLD = torch.empty(*tokens_BL.shape, stream.config.hidden_size)
    stream.embed(tokens_BL, hidden_BLD)
    text = None if calibration_BL is None else Text(stream, calibration_BL, compared_tokens)
    entries = [
        Contestant(name, size, change_of(name, size, checkpoint, text), hidden_BLD.clone()) for name, size in asked
    ]
    for layer in tqdm(range(stream.config.num_hidden_layers), desc="blocks", leave=False, disable=None):
        block = stream.block(layer)
        changes = blocks is None or layer < blocks
        if text and changes:
            text.enter(block, layer)
        for entry in entries:
            ours, started = copy.deepcopy(block), clock(stream.device)
            if changes:
                entry.bits += entry.change(ours, layer)
            entry.seconds += clock(stream.device) - started
            stream.advance(ours, layer, entry.hidden_BLD)
        stream.advance(block, layer, hidden_BLD)
    for entry in entries:
        entry.seconds += text.seconds if text and entry.name in LEARNERS else 0
    head = stream.head()
    return Predictor(hidden_BLD, head), [(entry, Predictor(entry.hidden_BLD, head)) for entry in entries]


def fitting(checkpoint: Checkpoint, names: Sequence[str], group_sizes: Sequence[int]) -> list[tuple[str, int | None]]:
    """Formats and their group sizes, without those whose groups do not divide the inputs of every layer."""
    asked = [(name, size) for name in names for size in (group_sizes if name in GROUPED else [None])]
    folds = len(awq.llama_folds(checkpoint.model_config))
    found = []
    for name, size in asked:
        block = FORMATS[name].block if size is None else size
        if len(packable_folds(checkpoint.model_config, checkpoint.linears, block)) == folds:
            found.append((name, size))
        else:
            log.warning("%s is left out: groups of %d inputs do not fit every layer", name, block)
    return found


def change_of(name: str, group_size: int | None, checkpoint: Checkpoint, text: Text | None) -> Change:
    """What a format does to a block; `text` is there for one that looks at it."""
    if group_size is None:
        return partial(change_layers, layer_names(checkpoint), FORMATS[name].approximate)
    if name == "rtn":
        return partial(change_layers, layer_names(checkpoint), partial(rtn, group_size=group_size))
    assert text is not None, f"{name} looks at a text"
    if name in COMPENSATED:
        return Compensated(text, group_size, COMPENSATED[name])
    return Searched(replace(RECIPES[name], group_size=group_size), text)


def layer_names(checkpoint: Checkpoint) -> list[str]:
    """The linears of a block."""
    return [name for fold in awq.llama_folds(checkpoint.model_config) for name in fold.balance_layers]


def results(
    checkpoint: Checkpoint, tokens_BL: Tensor, dense: Predictor, entries: Sequence[tuple[Contestant, Predictor]]
) -> list[FormatRow]:
    """A row for each format. Bytes are those of its layers, and of the rest of the model in 16 bits."""
    changed = sum(
        math.prod(checkpoint.linears[f"model.layers.{layer}.{name}"])
        for layer in range(checkpoint.model_config.num_hidden_layers)
        for name in layer_names(checkpoint)
    )
    rest = sum(parameter.numel() for parameter in checkpoint.skeleton.parameters()) - changed
    return [
        FormatRow(
            name=entry.name,
            group_size=entry.group_size,
            bits=entry.bits / changed,
            nbytes=(entry.bits + DENSE_BITS * rest) // 8,
            seconds=entry.seconds,
            scores=score(tokens_BL, predictor, dense),
        )
        for entry, predictor in entries
    ]


def size_word(row: FormatRow) -> str:
    return {None: "", -1: "row"}.get(row.group_size, str(row.group_size))


def format_table(found: Sequence[FormatRow]) -> str:
    """The rows in Markdown."""
    lines = [
        "| format | group | bits | MB | perplexity | loss difference | KL | KL at 95 % | same choice | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        other = row.scores.reference
        assert other is not None
        lines.append(
            f"| {row.name} | {size_word(row)} | {row.bits:.3f} | {row.nbytes / 1e6:.2f} | {row.scores.perplexity:.4f} "
            f"| {other.loss_difference:+.5f} +- {other.standard_error:.5f} "
            f"| {other.kl_mean:.6f} +- {other.kl_standard_error:.6f} | {other.kl_95th_percentile:.6f} "
            f"| {other.top1_agreement:.2%} | {row.seconds:.1f} |"
        )
    return "\n".join(lines)


def least(points: Sequence[tuple[float, float, FormatRow]]) -> str:
    """The format of the lowest loss, with its group size."""
    rows = [row for *_, row in sorted(points, key=lambda point: point[1])]
    return f"{rows[0].name} {size_word(rows[0])}".strip() if rows else "none"


def check_picture(path: Path) -> None:
    """UsageError where matplotlib draws no file of this kind."""
    from matplotlib.figure import Figure

    kinds = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix and path.suffix.lower().removeprefix(".") not in kinds:
        raise UsageError(f"{path} cannot be drawn", f"a picture is one of {', '.join(kinds)}", "give FILE.png")


def draw_formats(path: Path, found: Sequence[FormatRow]) -> None:
    """Loss against bytes: a point a format, a line through the group sizes of one; on the right the 4-bit ones alone.

    A title names what loses least. A format without loss has no place on a logarithmic axis and is left out.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    points: dict[str, list[tuple[float, float, FormatRow]]] = {}
    for row in found:
        if row.scores.reference and row.scores.reference.kl_mean > 0:
            points.setdefault(row.name, []).append((row.nbytes / 1e6, row.scores.reference.kl_mean, row))
    figure = Figure(figsize=(12, 6), layout="constrained")
    whole, small = figure.subplots(1, 2)
    for index, some in enumerate(points.values()):
        shown = sorted((x, y, size_word(row)) for x, y, row in some)
        drawn = {"color": f"C{index}", "marker": MARKERS[index]}
        whole.plot([x for x, *_ in shown], [y for _, y, _ in shown], **drawn)
        if some[0][2].bits < FOUR_BITS:
            small.plot([x for x, *_ in shown], [y for _, y, _ in shown], **drawn)
            for x, y, word in shown:
                small.annotate(word, (x, y), xytext=(4, 4), textcoords="offset points", fontsize="x-small")
    every = [point for some in points.values() for point in some]
    four = [point for point in every if point[2].bits < FOUR_BITS]
    whole.set(title=f"Of all formats {least(every)} loses least", yscale="log")
    whole.set(xlabel="MB of the whole model", ylabel="KL from the dense model, nats a token")
    small.set(title=f"Of those of 4 bits {least(four)} loses least", ylim=(0, None))
    small.set(xlabel="MB of the whole model; beside a point, its group size")
    lines = [Line2D([], [], color=f"C{index}", marker=MARKERS[index], label=name) for index, name in enumerate(points)]
    figure.legend(handles=lines, loc="outside right upper")
    figure.savefig(path, dpi=120)
