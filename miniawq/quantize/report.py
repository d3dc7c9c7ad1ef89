"""What a run did and gained: a JSON report, a model card and a picture."""

import logging
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from miniawq.checkpoint.shards import write_bytes, write_json

log = logging.getLogger(__name__)

PANELS = 6  # searches shown one by one: what fits in a row
# Lines of the dense model card that hold for the quantized model too.
INHERITED = re.compile(r"^(?:license\w*|language): .*$", re.MULTILINE)

CARD = """---
{front_matter}
---

# {name}

{base} in INT4, made with miniawq {version}.

| | |
|---|---|
| method | {method} |
| format | {layout}, group size {group_size}, scales {scale_dtype} |
| packed layers | {packed} |
| dense layers | {dense} |
| calibration | {tokens} tokens, {source} (sha256 of the ids {sha256}) |
| size | {size:.1f} MB, {source_size:.1f} MB before |

`quantization_report.json` holds the settings, and for each block what was searched and what it gained.

    miniawq generate {name} --prompt "Once upon a time"
    vllm serve {name}
"""


@dataclass(frozen=True)
class QuantizationReport:
    """Everything about one run; `blocks` holds what the searches of each block found, `head` that of a packed head.

    `seconds` of a run that went on have those of the blocks that were finished before.
    """

    source: str
    settings: dict[str, Any]
    calibration: dict[str, Any]
    dense_linears: list[str]
    blocks: list[dict[str, Any]]
    head: dict[str, Any] | None
    verification: dict[str, Any]
    source_bytes: int
    written_bytes: int
    peak_memory_bytes: int
    peak_device_bytes: int | None  # where another device than the host quantizes
    seconds: float

    def summary(self) -> str:
        """Four lines for people."""
        worst = self.verification["largest_error_over_bound"]
        device = "" if self.peak_device_bytes is None else f", {self.peak_device_bytes / 2**30:.2f} GiB of the device's"
        return (
            f"{self.verification['packed_linears']} layers packed, {len(self.dense_linears)} dense; "
            f"the largest error is {worst:.4f} of its bound\n"
            f"{self.written_bytes / 1e6:.1f} MB, {self.source_bytes / 1e6:.1f} MB before\n{self.gains()}\n"
            f"{self.seconds:.1f} s, {self.peak_memory_bytes / 2**30:.2f} GiB of memory{device} at most"
        )

    def gains(self) -> str:
        """What the searches left of plain rounding's loss on the calibration text."""
        recipe = self.settings["recipe"]
        if not recipe["formulas"] and (recipe["clip"], recipe["codes"]) == ("none", "nearest"):
            return "plain rounding: nothing was searched"
        layers = [layer for block in self.blocks for layer in block["layers"].values()]
        lost, plain = (sum(layer[name] for layer in layers) for name in ("loss", "plain_loss"))
        folds = [left_of(fold) for block in self.blocks for fold in block["folds"] if fold["plain_loss"] > 0]
        if not plain > 0 or not folds:
            return "this text shows no loss"
        return (
            f"factors left {statistics.median(folds):.1%} of plain rounding's loss (the median of {len(folds)} folds), "
            f"then ranges and codes {lost / plain:.1%} of the layers' loss"
            + (f" and {left_of(self.head):.1%} of the head's" if self.head and self.head["plain_loss"] > 0 else "")
        )


def write_report(directory: Path, name: str, report: QuantizationReport) -> None:
    """`quantization_report.json`, `README.md`, and `quantization_report.png` where matplotlib is installed.

    `name` is that of the new checkpoint.
    """
    write_json(directory / "quantization_report.json", finite(asdict(report)))
    card = directory / "README.md"
    former = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    write_bytes(card, model_card(name, report, INHERITED.findall(former.partition("\n---")[0])).encode())
    try:
        import matplotlib  # noqa: F401  (the extra `plots`)
    except ImportError:
        log.info("quantization_report.png is not drawn: it needs pip install 'miniawq[plots]'")
        return
    try:
        draw_report(directory / "quantization_report.png", report.blocks)
    except Exception as error:  # hours of work are worth more than a picture
        (directory / "quantization_report.png").unlink(missing_ok=True)
        log.warning("quantization_report.png could not be drawn: %s", str(error)[:200])


def finite(value: Any) -> Any:
    """The same lists and dictionaries with None for NaN and infinity, which are not JSON."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def model_card(name: str, report: QuantizationReport, inherited: Sequence[str] = ()) -> str:
    """The README of the new checkpoint; `inherited` are lines of front matter from the dense one."""
    settings, recipe = report.settings, report.settings["recipe"]
    front_matter = [*inherited, "pipeline_tag: text-generation", "tags: [awq, int4, miniawq]"]
    searched = ", ".join(recipe["formulas"]) or "no"
    return CARD.format(
        front_matter="\n".join(front_matter),
        name=name,
        base=Path(report.source).name,
        version=settings["miniawq"],
        method=f"AWQ: scales from {searched} statistics, clip {recipe['clip']}, codes {recipe['codes']}",
        layout=settings["layout"],
        group_size=recipe["group_size"],
        scale_dtype=recipe["scale_dtype"],
        packed=report.verification["packed_linears"],
        dense=", ".join(report.dense_linears) or "none",
        tokens=report.calibration["tokens_used"],
        source=report.calibration["source"],
        sha256=report.calibration["sha256"][:16],
        size=report.written_bytes / 1e6,
        source_size=report.source_bytes / 1e6,
    )


def draw_report(path: Path, blocks: list[dict[str, Any]]) -> None:
    """What searches left of plain rounding's loss by block: factors of each fold's, ranges and codes of each layer's.
    Below, the loss over the exponent where factors gained most.
    """
    from matplotlib.figure import Figure

    folds = [(block["layer"], fold) for block in blocks for fold in block["folds"] if fold["plain_loss"] > 0]
    by_factors = [(layer, fold["compared"], left_of(fold)) for layer, fold in folds]
    by_codes = [
        (block["layer"], name.rpartition(".")[2], left_of(layer))
        for block in blocks
        for name, layer in block["layers"].items()
        if layer["plain_loss"] > 0
    ]
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
    left, right = above.subplots(1, 2, sharey=True)
    for axes, points, what in ((left, by_factors, "Factors"), (right, by_codes, "Then ranges and codes")):
        for kind in dict.fromkeys(kind for _, kind, _ in points):
            axes.plot(
                *zip(*[(layer, part) for layer, name, part in points if name == kind], strict=True), "o-", label=kind
            )
        parts = [part for *_, part in points] or [1.0]
        axes.set_title(f"{what} left {min(parts):.0%} to {max(parts):.0%} of the loss")
        axes.set(xlabel="block", ylim=(0, 1.05))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize="small", ncols=2)
    left.set_ylabel("loss, plain rounding is 1")
    below.suptitle("Loss over the exponent r where factors gained most: r = 0 is plain rounding")
    most = sorted(folds, key=lambda found: left_of(found[1]))[:PANELS]
    panels = below.subplots(1, max(1, len(most)), squeeze=False, sharey=True)[0]
    for panel, (layer, fold) in zip(panels, most, strict=False):
        for formula in dict.fromkeys(trial[0] for trial in fold["trials"]):
            tried = sorted(
                (ratio, loss / fold["plain_loss"]) for kind, ratio, loss in fold["trials"] if kind == formula
            )
            panel.plot(*zip(*tried, strict=True), ".-", label=formula)
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set(title=f"block {layer}, {fold['compared'].rpartition('.')[2]}", xlabel="exponent r")
    panels[0].set(ylabel="loss, plain rounding is 1")
    if most:
        panels[0].set_ylim(0, 1.25)
        panels[-1].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def left_of(found: Mapping[str, Any]) -> float:
    """The part of plain rounding's loss that a fold or a layer still has."""
    return found["loss"] / found["plain_loss"]
