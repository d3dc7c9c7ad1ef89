"""What a run did and gained: a JSON report, a model card and a picture."""

import logging
import math
import re
from collections.abc import Sequence
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
| calibration | {tokens} tokens from {source} (sha256 of the ids {sha256}) |
| size | {size:.1f} MB, {source_size:.1f} MB before |

`quantization_report.json` holds the settings, and for each block what was searched and what it gained.

    miniawq generate {name} --prompt "Once upon a time"
    vllm serve {name}
"""


@dataclass(frozen=True)
class QuantizationReport:
    """Everything about one run; `blocks` holds what the searches of each block found."""

    source: str
    settings: dict[str, Any]
    calibration: dict[str, Any]
    dense_linears: list[str]
    blocks: list[dict[str, Any]]
    verification: dict[str, Any]
    source_bytes: int
    written_bytes: int
    peak_memory_bytes: int
    seconds: float

    def summary(self) -> str:
        """Three lines for people."""
        lost = sum(layer["loss"] for block in self.blocks for layer in block["layers"].values())
        plain = sum(layer["plain_loss"] for block in self.blocks for layer in block["layers"].values())
        kept = f"the searches left {lost / plain:.1%} of the layers' loss" if plain > 0 else "this text shows no loss"
        worst = self.verification["largest_error_over_bound"]
        return (
            f"{self.verification['packed_linears']} layers packed, {len(self.dense_linears)} dense; "
            f"the largest error is {worst:.4f} of its bound\n"
            f"{self.written_bytes / 1e6:.1f} MB, {self.source_bytes / 1e6:.1f} MB before; {kept}\n"
            f"{self.seconds:.1f} s, {self.peak_memory_bytes / 2**30:.2f} GiB of memory at most"
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
    """Above, each fold's loss as a part of plain rounding's, by block; below, loss by ratio where most was gained."""
    from matplotlib.figure import Figure

    searches = [(block["layer"], fold) for block in blocks for fold in block["folds"] if fold["plain_loss"] > 0]
    figure = Figure(figsize=(11, 7), layout="constrained")
    rows = figure.subfigures(2, 1, squeeze=False)
    axes = rows[0, 0].subplots()
    for compared in dict.fromkeys(fold["compared"] for _, fold in searches):
        points = [
            (layer, fold["loss"] / fold["plain_loss"]) for layer, fold in searches if fold["compared"] == compared
        ]
        axes.plot(*zip(*points, strict=True), marker="o", label=compared)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="block", ylabel="loss with scales / plain rounding", ylim=(0, 1.05))
    axes.legend()
    gained = sorted(searches, key=lambda found: found[1]["loss"] / found[1]["plain_loss"])[:PANELS]
    for panel, (layer, fold) in zip(
        rows[1, 0].subplots(1, max(1, len(gained)), squeeze=False)[0], gained, strict=False
    ):
        for formula in dict.fromkeys(trial[0] for trial in fold["trials"]):
            points = sorted(
                (ratio, loss / fold["plain_loss"]) for kind, ratio, loss in fold["trials"] if kind == formula
            )
            panel.plot(*zip(*points, strict=True), marker=".", label=formula)
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set(title=f"block {layer}, {fold['compared'].rpartition('.')[2]}", xlabel="ratio")
        panel.legend(fontsize="small")
    figure.savefig(path, dpi=120)
