"""The oracle is tested itself: every planted fault is found by the check that is named with it."""

import re

import pytest

from miniawq.oracle.contract import LEVELS
from miniawq.oracle.door import CHECKS
from miniawq.oracle.faults import FAULTS, killed
from tests.helpers import ROOT

TABLE = (ROOT / "docs" / "oracle.md").read_text()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.killer}: {fault.name}")
def test_fault_is_killed(fault):
    assert killed(fault)


def test_faults_are_at_least_forty_over_all_levels():
    assert len(FAULTS) >= 40
    assert {fault.killer[:2] for fault in FAULTS} == set(LEVELS)
    assert len({(fault.killer[:2], fault.name) for fault in FAULTS}) == len(FAULTS)


def test_the_table_in_the_guide_has_every_fault_and_no_survivor():
    rows = re.findall(r"^\| (L\d) \| (.+?) \| `(.+?)` \|$", TABLE, re.M)
    assert set(rows) == {(fault.killer[:2], fault.name, fault.killer) for fault in FAULTS}


def test_checks_that_no_fault_names_are_variations_of_others():
    """Every rule of L0 to L3 and L5 that is not a sampling of another one has a fault of its own."""
    named = {fault.killer for fault in FAULTS}
    rest = {check.id for check in CHECKS if check.level != "L4"} - named
    assert rest == {"L0.unpack.random", "L0.round-trip.words", "L1.random-scales", "L5.clip.never-worse"} & rest
