"""Marks of cases: `make test` runs the quick ones, `make test-all` runs all."""

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest


def thorough_but(quick: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """All cases; those that are not quick run thoroughly only."""
    return [pytest.param(case, marks=() if case in quick else pytest.mark.thorough) for case in cases]


def each_once(*axes: Sequence[Any]) -> list[Any]:
    """All combinations; quick are as few as have every value of every axis."""
    quick = {tuple(axis[place % len(axis)] for axis in axes) for place in range(max(map(len, axes)))}
    return [
        pytest.param(*case, marks=() if case in quick else pytest.mark.thorough) for case in itertools.product(*axes)
    ]
