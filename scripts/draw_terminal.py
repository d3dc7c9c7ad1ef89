"""Record sessions at a terminal and draw them: the pictures of README.md and docs/generate.md.

    pip install pyte                            # a terminal in Python
    python scripts/draw_terminal.py             # all of them, into docs/
    python scripts/draw_terminal.py chat batch

Programs run at a pseudo-terminal, and keys are typed when they wait for them. Each piece of a moving picture comes when
it came, though no pause is longer than `LONGEST_PAUSE`; who wants no motion sees its end.
"""

import argparse
import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COLUMNS, LINE, MARGIN, WIDTH = 84, 19, 18, 740
MOST_COLUMNS, MOST_LINES, LINES = 2000, 400, 60  # of the screen, and of what programs are told
PATIENCE, LONGEST_PAUSE = 60, 0.4  # seconds
COLOURS = {"default": "#e6e6e6", "cyan": "#8bd5ca"}
STYLE = "font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 14px; white-space: pre"
# `fill-opacity`, because a part of a line has no opacity of its own.
MOTION = (
    "<style>@media (prefers-reduced-motion: no-preference) {tspan {animation: come 1ms backwards}} "
    "@keyframes come {from {fill-opacity: 0}}</style>"
)


class Keys(NamedTuple):
    """What is typed when a new line, up to the cursor, matches."""

    line: str
    typed: str


class Session(NamedTuple):
    """Commands, the keys for all of them in order, and the files that they find."""

    commands: Sequence[str]
    keys: Sequence[Keys] = ()
    files: Sequence[tuple[str, str]] = ()
    moves: bool = False


ASKED, ANSWERING = r"^> $", r"^.{70}"
TALES = ("Once upon a time", "There was once a poor woodcutter", "The wolf", "In a dark forest", "The king's daughter")
SESSIONS = {
    "terminal": Session(["miniawq generate --max-tokens 77"], moves=True),
    "chat": Session(
        ["cat story.jinja", "miniawq generate --chat --chat-template story.jinja --max-tokens 40 --seed 7"],
        [
            Keys(ASKED, "Once upon a time there was a wolf who\r"),
            Keys(ASKED, "But the youngest daughter\r"),
            Keys(ANSWERING, "\x03"),
            Keys(ASKED, "/stats\r"),
            Keys(ASKED, "\x04"),
        ],
        [("story.jinja", "{{ messages | map(attribute='content') | map('trim') | join(' ') }}\n")],
    ),
    "batch": Session(
        [
            "head -3 tales.txt",
            "miniawq generate --prompts tales.txt -o told.jsonl --stop .",
            "head -8 told.jsonl | jq -r '[.id, .generation_tokens, .text] | @tsv' | cut -c -72",
        ],
        files=[("tales.txt", "".join(f"{tale}\n" for tale in TALES * 8))],
    ),
}


class Recording:
    """A wide screen, and when each of its characters came; the terminal of the programs is as wide as the picture."""

    def __init__(self) -> None:
        import pyte

        self.screen = pyte.Screen(MOST_COLUMNS, MOST_LINES)
        self.stream = pyte.Stream(self.screen)
        self.came: dict[tuple[int, int], tuple[Any, float]] = {}
        self.now, self.last, self.typed_at = 0.0, time.monotonic(), -1

    def show(self, text: str) -> None:
        """Write to the screen."""
        last, self.last = self.last, time.monotonic()
        self.now += min(LONGEST_PAUSE, self.last - last)
        self.stream.feed(text)
        for row in self.screen.dirty:
            for column, char in self.screen.buffer[row].items():
                if self.came.get((row, column), (None, 0.0))[0] != char:
                    self.came[row, column] = char, self.now
        self.screen.dirty.clear()

    @property
    def line(self) -> str:
        """That of the cursor, up to it."""
        cursor = self.screen.cursor
        return "".join(self.screen.buffer[cursor.y][column].data for column in range(cursor.x))

    def run(self, command: str, keys: list[Keys], folder: Path) -> None:
        """Run a command, and type the keys that it waits for."""
        self.show(f"\x1b[36m$ {command}\x1b[0m\r\n")
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (LINES, COLUMNS))
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "TERM": "xterm", "XDG_STATE_HOME": str(folder / "state")}
        self.screen.write_process_input = lambda text: os.write(ours, text.encode())
        program = subprocess.Popen(
            ["bash", "-c", command], stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=environment,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY),
        )  # fmt: skip
        os.close(theirs)
        self._follow(ours, keys)
        os.close(ours)
        if program.wait(PATIENCE) not in (0, 130):
            raise SystemExit(f"{command}: exit code {program.returncode}")

    def _follow(self, terminal: int, keys: list[Keys]) -> None:
        """Show what comes until the other end is closed."""
        while True:
            if not select.select([terminal], [], [], PATIENCE)[0]:
                raise SystemExit(f"nothing comes any more; the line is {self.line!r}")
            try:
                self.show(os.read(terminal, 1 << 16).decode(errors="replace"))
            except OSError:  # EIO: nobody has the other end
                return
            if keys and self.screen.cursor.y > self.typed_at and re.search(keys[0].line, self.line):
                self.typed_at = self.screen.cursor.y
                os.write(terminal, keys.pop(0).typed.encode())

    def lines(self) -> Iterator[list[tuple[Any, float]]]:
        """Characters and their times, wrapped at spaces."""
        for row in range(self.screen.cursor.y):
            last = max((column for line, column in self.came if line == row), default=-1)
            blank = self.screen.default_char, 0.0
            left = [self.came.get((row, column), blank) for column in range(last + 1)]
            while left and left[-1][0].data == " ":
                left.pop()
            while len(left) > COLUMNS:
                spaces = [place for place in range(COLUMNS + 1) if left[place][0].data == " "]
                cut = spaces[-1] if spaces else COLUMNS
                yield left[:cut]
                left = left[cut + bool(spaces) :]
            yield left


def drawn(lines: Sequence[list[tuple[Any, float]]], moves: bool) -> str:
    """An SVG; characters of one colour that came together are one part of a line."""
    height = 2 * MARGIN + LINE * len(lines)
    rows = []
    for number, line in enumerate(lines):
        parts = []
        for (colour, seconds), cells in groupby(line, lambda cell: (cell[0].fg, cell[1] if moves else 0)):
            text = escape("".join(cell.data for cell, _ in cells), quote=False)
            delay = f' style="animation-delay: {seconds:.2f}s"' if moves else ""
            parts.append(f'<tspan fill="{COLOURS.get(colour, COLOURS["default"])}"{delay}>{text}</tspan>')
        if parts:
            rows.append(f'<text x="{MARGIN}" y="{MARGIN + LINE * number + 14}">{"".join(parts)}</text>')
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" style="{STYLE}">',
            *([MOTION] if moves else []),
            f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#1e2127"/>',
            *rows,
            "</svg>\n",
        ]
    )


def picture(session: Session) -> str:
    """The session, played."""
    recording, keys = Recording(), list(session.keys)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in session.files:
            (Path(folder) / name).write_text(text)
        for command in session.commands:
            recording.run(command, keys, Path(folder))
    return drawn(list(recording.lines()), session.moves)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *SESSIONS], metavar="NAME", help=", ".join(SESSIONS))
    for name in parser.parse_args().names or SESSIONS:
        (ROOT / "docs" / f"{name}.svg").write_text(picture(SESSIONS[name]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
