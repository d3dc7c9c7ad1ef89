"""The oracle's checks as parameters of tests: those that take seconds run in `make test-all`."""

import pytest

from miniawq.oracle.check import Check
from miniawq.oracle.door import CHECKS

LONG = {
    "L0.pack.combinations",
    "L0.unpack.combinations",
    "L0.pack.whole-layer",
    "L0.unpack.whole-layer",
    "L1.combinations",
    "L1.combinations-of-scales",
    "L1.past-16-bits",
    "L1.refuses-misfits",
    "L1.special-scales",
    "L1.state",
    "L1.views",
    "L1.whole-layer",
    "L2.combinations",
    "L2.combinations-of-groups",
    "L2.half-scale",
    "L2.nearest-code",
    "L2.neighbour",
    "L2.past-16-bits",
    "L2.refuses-nan-anywhere",
    "L2.state",
    "L3.batches-in-memory",
    "L3.combinations",
    "L3.combinations-of-sums",
    "L3.corners",
    "L3.every-size",
    "L3.few-rows-of-wide-layers",
    "L3.long-with-bias",
    "L3.past-16-bits",
    "L3.ranges",
    "L3.refuses-misfits",
    "L3.special-biases",
    "L3.state",
    "L3.state-of-more-rows",
    "L3.views",
    "L3.whole-layer",
    "L4.reads.dialects",
    "L4.reads.eleven-layers",
    "L4.refuses.each-tensor-long",
    "L4.refuses.each-tensor-missing",
    "L4.refuses.each-tensor-short",
    "L4.state",
    "L5.clip.any-order",
    "L5.clip.combinations",
    "L5.clip.corners",
    "L5.clip.state",
    "L5.clip.views",
    "L5.clip.whole-tiles",
    "L5.scales.any-order",
    "L5.scales.combinations",
    "L5.scales.corners",
    "L5.scales.state",
    "L5.scales.views",
    "L5.scales.whole-tiles",
}
SHORT = [check for check in CHECKS if check.id not in LONG]


def marked(checks: list[Check], every: int = 1) -> list:
    """Parameters, named by the checks' ids. Of those that are quick only every n-th runs in `make test`."""
    quick = {check.id for check in [check for check in checks if check.id not in LONG][::every]}
    return [
        pytest.param(check, id=check.id, marks=() if check.id in quick else pytest.mark.thorough) for check in checks
    ]
