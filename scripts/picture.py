"""A picture of one layer of one token, out of a trace that `bench.py --profile DIR` has left.

    python scripts/picture.py DIR/llama-3.1-8b-int4-1-128.json docs/token-1-row.svg --title "Llama-3.1-8B, one row"

Each kernel is a bar in a line of its own, named by what it is for; the time between two bars is that between two
kernels. A kernel is known by its place: attention by its name, and the four products as the longest kernels between
two attentions, which come in the order o, gate and up, down, and qkv of the next layer.
"""

import argparse
import json
import re
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

ATTENTION = re.compile(r"triton_tem_fused_flex_attention|flash_fwd\w*_kernel")
PRODUCTS = ("o", "gate and up", "down", "qkv")
# What the small kernels before each of these are for.
BEFORE = {
    "qkv": "residual, norm",
    "attention": "rotary, cache",
    "o": "sum of parts",
    "gate and up": "residual, norm",
    "down": "silu(gate) * up",
}
LEFT, SCALE_WIDTH, RIGHT, LINE, TOP = 130, 560, 70, 20, 58
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f } .title { font-weight: 600 } .value, .tick { fill: #57606a }
.product { fill: #3b7dd8 } .attention { fill: #d9730d } .small { fill: #2f9e6e } line { stroke: #8c959f55 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .value, .tick { fill: #9198a1 } }
"""


class Kernel(NamedTuple):
    """One launch: microseconds."""

    name: str
    start: float
    length: float


class Bar(NamedTuple):
    """A kernel and what it is for."""

    label: str
    kind: str
    start: float
    length: float


def kernels_of(trace: Path) -> list[Kernel]:
    """All that the device did, in order."""
    events = json.loads(trace.read_text())["traceEvents"]
    on_device = (event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"))
    return sorted((Kernel(e["name"], e["ts"], e["dur"]) for e in on_device), key=lambda kernel: kernel.start)


def layer_in_the_middle(kernels: list[Kernel]) -> list[Bar]:
    """The kernels behind one `down` up to the next one, about the middle of the trace."""
    attentions = [place for place, kernel in enumerate(kernels) if ATTENTION.search(kernel.name)]
    if len(attentions) < 3:
        raise SystemExit("this trace has no three kernels of attention: is it one of bench.py --profile, on a GPU?")
    middle = len(attentions) // 2
    earlier, here, later = attentions[middle - 1 : middle + 2]
    *_, behind, qkv = products_between(kernels, earlier, here)
    o, gate_up, down, _ = products_between(kernels, here, later)
    known = dict(zip((qkv, here, o, gate_up, down), BEFORE, strict=True))
    bars: list[Bar] = []
    waiting: list[Kernel] = []
    for place in range(behind + 1, down + 1):
        if place not in known:
            waiting.append(kernels[place])
            continue
        bars += [Bar(BEFORE[known[place]], "small", kernel.start, kernel.length) for kernel in waiting]
        kind = "attention" if place == here else "product"
        bars.append(Bar(known[place], kind, kernels[place].start, kernels[place].length))
        waiting = []
    return bars


def products_between(kernels: list[Kernel], first: int, last: int) -> list[int]:
    """The places of the four longest kernels between two, in order."""
    places = range(first + 1, last)
    return sorted(sorted(places, key=lambda place: -kernels[place].length)[: len(PRODUCTS)])


def picture(bars: list[Bar], title: str) -> str:
    """The SVG, readable on light and on dark."""
    begin = bars[0].start
    span = bars[-1].start + bars[-1].length - begin
    busy = sum(bar.length for bar in bars)
    unit = SCALE_WIDTH / span
    width, height = LEFT + SCALE_WIDTH + RIGHT, TOP + LINE * len(bars) + 8
    told = f"{len(bars)} kernels, {busy:.1f} us in them and {span - busy:.1f} us between them"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<title>{escape(title)}: {told}</title>",
        f"<style>{STYLE}</style>",
        f'<text class="title" x="8" y="18">{escape(title)}</text>',
        f'<text class="value" x="8" y="36">{told}</text>',
    ]
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**6) if span / step <= 12)
    for tick in range(0, int(span) + 1, step):
        x = LEFT + tick * unit
        lines.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 4}" y2="{height - 8}"/>')
        lines.append(f'<text class="tick" x="{x:.1f}" y="{TOP - 8}" text-anchor="middle">{tick}</text>')
    for number, bar in enumerate(bars):
        y, x, length = TOP + LINE * number, LEFT + (bar.start - begin) * unit, bar.length * unit
        lines.append(f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(bar.label)}</text>')
        lines.append(f'<rect class="{bar.kind}" x="{x:.1f}" y="{y + 3}" width="{length:.1f}" height="14" rx="2"/>')
        lines.append(f'<text class="value" x="{x + length + 5:.1f}" y="{y + 14}">{bar.length:.1f}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("svg", type=Path, help="file to write")
    parser.add_argument("--title", default="one layer of one token")
    arguments = parser.parse_args()
    bars = layer_in_the_middle(kernels_of(arguments.trace))
    arguments.svg.write_text(picture(bars, f"{arguments.title}, microseconds"))
    for bar in bars:
        print(f"{bar.start - bars[0].start:8.1f} {bar.length:7.1f} us  {bar.label}")


if __name__ == "__main__":
    main()
