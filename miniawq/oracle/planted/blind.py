"""Faults written after the checks were frozen, to be scored once and honestly."""

from miniawq.oracle.planted.grammar import Bred

BLIND: list[Bred] = []
