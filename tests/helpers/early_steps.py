"""A step that is used as on a GPU."""

from miniawq.engine.step import DecodeStep


class EarlyStep(DecodeStep):
    """Used as if a token took one launch, on a CPU too: its cache may hold one position more than was read."""

    returns_early = True
