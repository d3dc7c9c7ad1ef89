"""Run commands and draw what a terminal shows of them: the picture in README.md.

python scripts/draw_terminal.py docs/terminal.svg "miniawq generate --max-tokens 90 --greedy"
"""

import argparse
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLUMNS, LINE, MARGIN, WIDTH = 84, 19, 18, 740
STYLE = "font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 14px; white-space: pre"


def shown(command: str) -> list[tuple[str, str]]:
    """Lines of a terminal, each with its colour: the command, its text, and what went to stderr."""
    words = [sys.executable, "-m", *shlex.split(command)]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [("#8bd5ca", f"$ {command}")]
    for colour, text in (("#e6e6e6", run.stdout), ("#8a8f98", run.stderr)):
        for line in text.strip().splitlines():
            lines += [(colour, part) for part in textwrap.wrap(line, COLUMNS) or [""]]
    return lines


def picture(commands: Sequence[str]) -> str:
    """The lines of all commands as an SVG."""
    lines = [line for command in commands for line in [*shown(command), ("", "")]][:-1]
    height = 2 * MARGIN + LINE * len(lines)
    rows = [
        f'<text x="{MARGIN}" y="{MARGIN + LINE * number + 14}" fill="{colour}">{escape(text)}</text>'
        for number, (colour, text) in enumerate(lines)
        if text
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" style="{STYLE}">',
            f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#1e2127"/>',
            *rows,
            "</svg>\n",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("commands", nargs="+")
    arguments = parser.parse_args()
    arguments.picture.write_text(picture(arguments.commands))
    return 0


if __name__ == "__main__":
    sys.exit(main())
