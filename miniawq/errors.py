"""What can go wrong, told in three lines: what; why, with the file and the key; what to do.

Words of strangers are in these lines: names of tensors, values of configs, what a template says. So they are written
with `clean`, as every notice is.
"""

import re

INTERRUPTED = 130  # the exit status after Ctrl-C
MESSAGE_CHARACTERS = 2000
LINE_CHARACTERS = 600
# Control characters but for tab and end of line, marks that turn the direction of text or end a line, tags, and halves
# of surrogate pairs.
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)


def clean(text: str, limit: int | None = MESSAGE_CHARACTERS) -> str:
    """`text` as a terminal can show it: unsafe characters as escapes, and its middle left out if it is too long."""
    if limit is not None and len(text) > limit:
        text = _shortened(text, limit)
    text = UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)
    return text if limit is None else _shortened(text, limit)


def _shortened(text: str, limit: int) -> str:
    half = limit // 2 - 4
    return text if len(text) <= limit else f"{text[:half]} [...] {text[-half:]}"


class MiniawqError(Exception):
    """Base of every error that a user can meet. `exit_code` is the exit status of the command line."""

    exit_code = 1

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(what, why, fix)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        lines = (" ".join(str(part).split("\n")) for part in (self.what, self.why, self.fix) if part)
        return "\n  ".join(clean(line, LINE_CHARACTERS) for line in lines)


class InvalidInput(MiniawqError, ValueError):
    """A tensor, text or number that the function which it was given to is not defined for."""


class UsageError(MiniawqError):
    """A wish that makes no sense: flags that contradict each other, an unknown device, a destination that exists."""

    exit_code = 2


class UnsupportedCheckpoint(MiniawqError):
    """A checkpoint that is damaged, or that would give plausible but wrong text if we went on."""

    exit_code = 3


class DoesNotFit(MiniawqError):
    """The work needs more memory or disk than there is."""

    exit_code = 4


class NotFound(MiniawqError):
    """A file, repository or revision that is not there, or not reachable offline."""

    exit_code = 5


class MissingExtra(MiniawqError, ModuleNotFoundError):
    """Packages that only some of miniawq needs, and that are not installed."""

    exit_code = 5
