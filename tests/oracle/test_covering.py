"""Covering arrays have every pair of levels, and a failing setting is made as simple as it can be."""

from itertools import combinations, product

import pytest

from miniawq.oracle.covering import covering, simplified

FACTORS = {"rows": (1, 65, 1000), "bias": (False, True), "dtype": ("float16", "float32"), "x": ("plain", "view")}


def small(setting):
    return setting["rows"] < 1000 or not setting["bias"]


@pytest.mark.parametrize("seed", [0, 7])
def test_every_allowed_pair_of_levels_occurs_and_nothing_else(seed):
    settings = covering(FACTORS, small, seed)
    assert all(small(setting) for setting in settings)
    for one, other in combinations(FACTORS, 2):
        met = {(setting[one], setting[other]) for setting in settings}
        simplest = {name: levels[0] for name, levels in FACTORS.items()}
        pairs = set(product(FACTORS[one], FACTORS[other]))
        assert met == {pair for pair in pairs if small(simplest | {one: pair[0], other: pair[1]})}
    assert len(settings) < 12  # all settings would be 24


def test_the_same_seed_gives_the_same_array():
    assert covering(FACTORS, small, 3) == covering(FACTORS, small, 3) != covering(FACTORS, small, 4)


def test_a_failing_setting_keeps_only_what_it_takes_to_fail():
    worst = {"rows": 1000, "bias": False, "dtype": "float32", "x": "view"}
    found = simplified(worst, FACTORS, small, lambda s: s["rows"] > 1 and s["x"] == "view")
    assert found == {"rows": 65, "bias": False, "dtype": "float16", "x": "view"}


def test_a_setting_that_may_not_be_asked_for_is_never_tried():
    def allowed(setting):
        return setting["rows"] != 65 or setting["x"] == "plain"

    worst = {"rows": 1000, "bias": False, "dtype": "float16", "x": "view"}
    assert simplified(worst, FACTORS, allowed, lambda s: s["rows"] > 1 and s["x"] == "view") == worst
