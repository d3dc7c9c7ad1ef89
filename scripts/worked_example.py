"""The worked example of docs/specification.md: an 8 x 16 weight, from floats to the bytes of a file, and its picture.

python scripts/worked_example.py                 # the numbers
python scripts/worked_example.py --write         # into docs/specification.md and docs/packing.svg
"""

import argparse
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from miniawq.checkpoint.shards import serialize
from miniawq.packing import AWQ_ORDER, Quantized, dequantize, encode_awq, quantize

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURE = ROOT / "docs" / "specification.md", ROOT / "docs" / "packing.svg"
MARKERS = re.compile(r"(<!-- WORKED -->\n).*?(<!-- END OF WORKED -->)", re.DOTALL)
GROUP_SIZE = 8
# Outputs 1 and 6 begin with weights of one sign, output 2 with zeros, output 3 with one value, output 5 with weights
# halfway between two codes; output 4 ends with an outlier.
WEIGHTS = """
-0.30 -0.17 -0.06  0.00  0.05  0.14  0.25  0.42  -0.21  0.33  0.08 -0.44  0.12  0.02 -0.09  0.27
 1.00  1.02  1.04  1.06  1.07  1.08  1.09  1.10   0.31 -0.12  0.26  0.05 -0.37  0.18 -0.04  0.11
 0.00  0.00  0.00  0.00  0.00  0.00  0.00  0.00  -0.14  0.23 -0.31  0.07  0.29 -0.05  0.16 -0.22
 0.50  0.50  0.50  0.50  0.50  0.50  0.50  0.50   0.09 -0.28  0.13  0.35 -0.16  0.21 -0.02 -0.40
-0.24  0.10  0.33 -0.07  0.19 -0.36  0.04  0.28   0.06 -0.11  0.15 -0.03  0.08 -0.09  0.02  2.00
-7.00 -3.50 -1.00  0.00  0.50  2.50  4.25  8.00  -0.25  0.17  0.36 -0.08  0.03 -0.33  0.22  0.14
-0.52 -0.31 -0.11 -0.46 -0.05 -0.27 -0.39 -0.18   0.20 -0.15  0.07  0.32 -0.26  0.01  0.24 -0.19
 0.13  0.37 -0.20  0.29 -0.41  0.16 -0.08  0.22  -0.34  0.25  0.11 -0.13  0.30 -0.01  0.40 -0.29
"""


def weight() -> Tensor:
    """The weight, float32 [8, 16]."""
    return torch.tensor([[float(value) for value in line.split()] for line in WEIGHTS.strip().splitlines()])


def file_of(quantized: Quantized) -> bytes:
    """The safetensors file with the three tensors of the layer `proj`."""
    return serialize({f"proj.{name}": tensor for name, tensor in encode_awq(quantized).items()})


def rows(title: str, values: Tensor, form: str, groups: int = 1, by: str = "output") -> str:
    """A matrix with a title, one line a row, its groups apart."""
    lines = [title]
    for number, row in enumerate(values.tolist()):
        cells = [format(value, form) for value in row]
        size = len(cells) // groups
        parts = [" ".join(cells[first : first + size]) for first in range(0, len(cells), size)]
        lines.append(f"  {by} {number:<2} " + "   ".join(parts))
    return "\n".join(lines)


def words(title: str, values: Tensor, by: str) -> str:
    """int32 words as hexadecimal numbers."""
    lines = [f"  {by} {number:<2} " + " ".join(f"{word & 0xFFFFFFFF:#010x}" for word in row)
             for number, row in enumerate(values.tolist())]  # fmt: skip
    return "\n".join([title, *lines])


def dump(content: bytes) -> str:
    """A file as `hexdump -C` shows it, without what is text beside it."""
    lines = [content[first : first + 16] for first in range(0, len(content), 16)]
    return "\n".join(f"  {16 * number:04x}  {line.hex(' ')}" for number, line in enumerate(lines))


def example() -> str:
    """All numbers of the example, as the page has them."""
    weight_OI = weight()
    quantized = quantize(weight_OI, GROUP_SIZE)
    tensors, content = encode_awq(quantized), file_of(quantized)
    header = 8 + int.from_bytes(content[:8], "little")
    text = content[8:header].decode().strip().replace("},", "},\n  ")
    scales_OG = quantized.scales_OG
    error_OGS = (dequantize(quantized, torch.float64) - weight_OI).abs().unflatten(1, (-1, GROUP_SIZE))
    bits_OG = scales_OG.view(torch.int16)
    return "\n\n".join(
        [
            rows("W, float32 [8, 16]; the groups stand apart", weight_OI, "5.2f", 2),
            rows("scales s [8, 2], rounded up to float16", scales_OG, ".9g"),
            rows("the bits of these float16 numbers", bits_OG, "#06x"),
            rows("zeros z [8, 2]", quantized.zeros_OG, "2d"),
            rows("codes q [8, 16]", quantized.codes_OI, "2d", 2),
            rows("back, w' = (q - z) s [8, 16], to four digits", dequantize(quantized, torch.float64), "7.4f", 2),
            rows("largest |w - w'| / s of each group [8, 2]", error_OGS.amax(-1) / scales_OG.double(), ".4f"),
            words("qweight, int32 [16, 1]: the codes of all outputs at one input", tensors["qweight"], "input"),
            words("qzeros, int32 [2, 1]", tensors["qzeros"], "group"),
            f"the file: {len(content)} bytes, of which {header - 8} hold the header\n\n  {text}",
            f"its values, from byte {header} on: qweight, qzeros, scales\n{dump(content[header:])}",
        ]
    )


LEFT, STEP, BOX = 130, 82, 66  # of the columns of boxes
DRAWN = 15  # the input in the picture
COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#8a4fa3", "#b07d12", "#2a8c8c", "#a3365a", "#5c6670")


def box(x: int, y: int, width: int, text: str, colour: str) -> str:
    """A number in a coloured box."""
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="34" rx="4" fill="{colour}"/>'
        f'<text x="{x + width // 2}" y="{y + 23}" text-anchor="middle" fill="#fff" font-size="16">{text}</text>'
    )


def label(x: int, y: int, text: str, anchor: str = "middle", size: int = 13) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="#333">{text}</text>'


def picture() -> str:
    """How the codes of eight outputs at one input become a word, and four bytes of the file."""
    quantized = quantize(weight(), GROUP_SIZE)
    codes = quantized.codes_OI[:, DRAWN].tolist()
    word = encode_awq(quantized)["qweight"][DRAWN, 0].item() & 0xFFFFFFFF
    places = [LEFT + STEP * number for number in range(8)]
    titles = {78: "output", 111: "code", 212: "bits", 245: "code, hex", 274: "nibble", 371: "byte, hex", 400: "in file"}
    parts = [label(20, y, title, "start") for y, title in titles.items()]
    title = f"Outputs {', '.join(map(str, AWQ_ORDER))} of one input make a word, from its lowest bits up"
    parts.append(label(20, 30, title, "start", 18))
    for output, (x, code) in enumerate(zip(places, codes, strict=True)):
        parts += [label(x + BOX // 2, 78, str(output)), box(x, 88, BOX, str(code), COLOURS[output])]
    for nibble, output in enumerate(AWQ_ORDER):
        x = places[7 - nibble]
        start, end = places[output] + BOX // 2, x + BOX // 2
        parts.append(f'<path d="M{start} 122 C{start} 170 {end} 150 {end} 196" fill="none" '
                     f'stroke="{COLOURS[output]}" stroke-width="2.5"/>')  # fmt: skip
        parts.append(box(x, 222, BOX, f"{codes[output]:x}", COLOURS[output]))
        parts += [label(end, 212, f"{4 * nibble + 3}..{4 * nibble}"), label(end, 274, str(nibble))]
    parts.append(label(places[7] + BOX + 14, 244, f"= {word:#010x}", "start", 16))
    for number, value in enumerate(word.to_bytes(4, "little")):
        x, right = places[2 * number], places[6 - 2 * number] + STEP // 2 + BOX // 2 - 8
        parts.append(f'<path d="M{right} 282 C{right} 320 {x + 74} 308 {x + 74} 342" fill="none" stroke="#777" '
                     'stroke-width="2"/>')  # fmt: skip
        parts += [box(x, 348, STEP + BOX, f"{value:02x}", "#444"), label(x + 74, 400, str(number))]
    body = "\n".join(parts)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 420" font-family="sans-serif">\n'
        f'<rect width="920" height="420" fill="#fff"/>\n{body}\n</svg>\n'
    )


def page() -> str:
    """The specification with today's numbers in it."""
    return MARKERS.sub(lambda found: f"{found[1]}```text\n{example()}\n```\n{found[2]}", PAGE.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the numbers and the picture into docs/")
    if parser.parse_args().write:
        PAGE.write_text(page())
        PICTURE.write_text(picture())
    else:
        print(example())
    return 0


if __name__ == "__main__":
    sys.exit(main())
