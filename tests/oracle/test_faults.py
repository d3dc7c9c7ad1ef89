"""The oracle is tested itself: every planted fault is found by the check that is named with it."""

import re

import pytest

from miniawq.oracle.contract import LEVELS
from miniawq.oracle.door import CHECKS
from miniawq.oracle.faults import FAULTS, SETS, killed, killer_of
from miniawq.oracle.planted.survivors import ARGUED
from tests.helpers import ROOT
from tests.helpers.checks import LONG
from tests.helpers.marks import thorough_but

TABLE = (ROOT / "docs" / "oracle.md").read_text()


SOON = [fault for fault in FAULTS if fault.killer not in LONG][::3]


@pytest.mark.parametrize("fault", thorough_but(SOON, FAULTS), ids=lambda fault: f"{fault.killer}: {fault.name}")
def test_fault_is_killed(fault):
    assert killed(fault)


def test_faults_are_at_least_forty_over_all_levels():
    assert len(FAULTS) >= 40
    assert {fault.killer[:2] for fault in FAULTS} == set(LEVELS)
    assert len({(fault.killer, fault.name) for fault in FAULTS}) == len(FAULTS)


def test_the_table_in_the_guide_has_every_fault_and_no_survivor():
    rows = re.findall(r"^\| (L\d) \| (.+?) \| `(.+?)` \|$", TABLE, re.M)
    assert set(rows) == {(fault.killer[:2], fault.name, fault.killer) for fault in FAULTS}


def test_every_check_but_samplings_of_others_has_a_fault_of_its_own():
    """L4 has a check for each directory; there the faults are as many as the kinds of mistakes."""
    named = {fault.killer for fault in FAULTS}
    rest = {check.id for check in CHECKS if check.level != "L4"} - named
    assert rest == {"L0.unpack.random", "L0.round-trip.words", "L1.random-scales", "L5.clip.never-worse"} & rest


def test_the_grammar_is_large_and_its_names_are_its_own():
    names = [fault.name for faults in SETS.values() for fault in faults]
    assert len(SETS["grammar"]) >= 400
    assert len(set(names)) == len(names)
    assert set(ARGUED) & set(names)


@pytest.mark.thorough
@pytest.mark.parametrize("name", SETS)
def test_a_sample_of_each_set_is_found(name):
    places = range(5, len(SETS[name]), len(SETS[name]) // 5)
    assert [SETS[name][place].name for place in places if not killer_of((name, place))] == []
