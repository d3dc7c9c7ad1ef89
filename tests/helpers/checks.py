"""The oracle's checks as parameters of tests: those that take seconds run in `make test-all`."""

import pytest

from miniawq.oracle.check import Check
from miniawq.oracle.door import CHECKS

LONG = {
    "L0.unpack.combinations",
    "L1.combinations",
    "L1.combinations-of-scales",
    "L1.past-16-bits",
    "L1.special-scales",
    "L2.past-16-bits",
    "L3.batches-in-memory",
    "L3.combinations",
    "L3.combinations-of-sums",
    "L3.long-with-bias",
    "L3.past-16-bits",
    "L4.state",
    "L5.scales.combinations",
    "L5.scales.corners",
    "L5.scales.state",
    "L5.scales.whole-tiles",
    "L5.clip.combinations",
    "L5.clip.corners",
    "L5.clip.state",
    "L5.clip.whole-tiles",
}
SHORT = [check for check in CHECKS if check.id not in LONG]


def marked(checks: list[Check]) -> list:
    """Parameters, named by the checks' ids."""
    return [
        pytest.param(check, id=check.id, marks=[pytest.mark.thorough] if check.id in LONG else []) for check in checks
    ]
