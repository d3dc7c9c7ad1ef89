"""What can go wrong, told in three lines: what; why, with the file and the key; what to do."""


class MiniawqError(Exception):
    """Base of every error a user can meet. `exit_code` is the command line's exit status."""

    exit_code = 1

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(what, why, fix)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        return "\n  ".join(line for line in (self.what, self.why, self.fix) if line)


class InvalidInput(MiniawqError, ValueError):
    """A tensor, text or number outside the domain of the function it was given to."""


class UsageError(MiniawqError):
    """Command-line flags that make no sense together."""

    exit_code = 2


class UnsupportedCheckpoint(MiniawqError):
    """A checkpoint that is damaged, or that would give plausible but wrong text if we went on."""

    exit_code = 3


class DoesNotFit(MiniawqError):
    """The plan needs more memory or disk than there is."""

    exit_code = 4


class NotFound(MiniawqError):
    """A file, repository or revision that is not there, or not reachable offline."""

    exit_code = 5
