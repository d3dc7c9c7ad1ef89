"""What can go wrong, told in three lines: what; why, with the file and the key; what to do."""


class MiniawqError(Exception):
    """Base of every error that a user can meet. `exit_code` is the exit status of the command line."""

    exit_code = 1

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(what, why, fix)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        return "\n  ".join(line for line in (self.what, self.why, self.fix) if line)


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
