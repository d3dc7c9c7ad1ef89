"""Answers as a terminal shows them: what a model thinks aloud, between <think> and </think>, is dimmed."""

import os
import sys
from collections.abc import Iterable, Iterator

from miniawq.engine.completion import overlap

BEGIN, END = "<think>", "</think>"
DIM, PLAIN = "\x1b[2m", "\x1b[22m"


def begins_in_thought(prompt: str) -> bool:
    """Whether the template has opened the thought already."""
    return prompt.rstrip().endswith(BEGIN)


def styled(pieces: Iterable[str], in_thought: bool) -> Iterable[str]:
    """The pieces, dimmed where stdout is a terminal that shows it, unless NO_COLOR is set (no-color.org)."""
    shows = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return dimmed(pieces, in_thought) if shows else pieces


def dimmed(pieces: Iterable[str], in_thought: bool) -> Iterator[str]:
    """The same text with marks for the terminal; what may begin a tag waits until it does not."""
    held = ""
    if in_thought:
        yield DIM
    try:
        for piece in pieces:
            held += piece
            while (tag := END if in_thought else BEGIN) in held:
                before, _, held = held.partition(tag)
                yield before + (tag + PLAIN if in_thought else DIM + tag)
                in_thought = not in_thought
            ready = len(held) - overlap(held, tag)
            yield held[:ready]
            held = held[ready:]
        yield held + (PLAIN if in_thought else "")
    except KeyboardInterrupt:
        yield held + PLAIN
        raise
