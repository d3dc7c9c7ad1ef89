"""Faults of the grammar that no check finds, each with the reason why it is none."""

ARGUED: dict[str, str] = {}
