"""Pairwise covering arrays: few cases in which every two levels of every two factors meet.

Most faults of kernels need one or two circumstances together (many rows and a bias, a view and one row); a covering
array meets all pairs with about as many cases as the two longest factors have pairs of levels. Each factor lists its
simplest level first, and a failing case is simplified factor by factor, so that what is left tells what it takes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from random import Random
from typing import Any

Setting = dict[str, Any]
Factors = Mapping[str, Sequence[Any]]
Allowed = Callable[[Setting], bool]
TRIES = 4  # settings tried for each one that is kept: more make the array little shorter


def covering(factors: Factors, allowed: Allowed = lambda setting: True, seed: int = 0) -> list[Setting]:
    """Settings in which every allowed pair of levels occurs; the same ones for the same seed.

    `allowed` says which settings may be asked for. It must be monotone: a setting that is allowed stays so when a
    factor gets its simplest level.
    """
    simplest = {name: levels[0] for name, levels in factors.items()}
    open_pairs = {
        ((one, a), (other, b))
        for one, other in combinations(factors, 2)
        for a in range(len(factors[one]))
        for b in range(len(factors[other]))
        if allowed(simplest | {one: factors[one][a], other: factors[other][b]})
    }
    random, settings = Random(seed), []
    while open_pairs:
        start = min(open_pairs, key=str) if seed == 0 else random.choice(sorted(open_pairs, key=str))
        tries = [completed(dict(start), factors, allowed, open_pairs, random) for _ in range(TRIES)]
        best = max(tries, key=lambda places: len(pairs_of(places) & open_pairs))
        open_pairs -= pairs_of(best)
        settings.append({name: factors[name][best[name]] for name in factors})
    return settings


Pair = tuple[tuple[str, int], tuple[str, int]]


def pairs_of(places: dict[str, int]) -> set[Pair]:
    """All pairs of levels of a setting, given by the places of its levels in the order of the factors."""
    return set(combinations(places.items(), 2))


def completed(chosen: dict[str, int], factors: Factors, allowed: Allowed, open_pairs: set[Pair], random: Random) -> Any:
    """The levels chosen so far, and for each other factor the level that closes most pairs."""
    rest = [name for name in factors if name not in chosen]
    random.shuffle(rest)
    order = {name: i for i, name in enumerate(factors)}
    for name in rest:
        counts = []
        for place in range(len(factors[name])):
            levels = {known: levels[chosen.get(known, 0)] for known, levels in factors.items()}
            if allowed(levels | {name: factors[name][place]}):
                pairs = [sorted([(name, place), taken], key=lambda level: order[level[0]]) for taken in chosen.items()]
                counts.append((sum(tuple(pair) in open_pairs for pair in pairs), random.random(), place))
        chosen = chosen | {name: max(counts)[2]}
    return {name: chosen[name] for name in factors}


def simpler(setting: Setting, factors: Factors, allowed: Allowed) -> Iterator[Setting]:
    """The setting with one factor at a simpler level, the simplest levels first."""
    for name, levels in factors.items():
        for level in levels[: levels.index(setting[name])]:
            if allowed(setting | {name: level}):
                yield setting | {name: level}


def simplified(setting: Setting, factors: Factors, allowed: Allowed, fails: Callable[[Setting], bool]) -> Setting:
    """A failing setting of which no factor can be made simpler without the failure going away."""
    while True:
        found = next((other for other in simpler(setting, factors, allowed) if fails(other)), None)
        if found is None:
            return setting
        setting = found
