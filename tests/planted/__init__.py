"""Faults that somebody made or might make, by room. `scripts/planted_faults.py` plants them one by one."""

from tests.helpers import ROOT, TESTS
from tests.planted import (
    awq,
    checkpoint,
    commands,
    compiled,
    engine,
    generate,
    kernel,
    model,
    oracle,
    packing,
    quantize,
    text,
)
from tests.planted.fault import Fault

ROOMS: dict[str, list[Fault]] = {
    module.__name__.rpartition(".")[2]: module.FAULTS
    for module in (
        packing,
        awq,
        kernel,
        model,
        compiled,
        checkpoint,
        text,
        engine,
        quantize,
        commands,
        generate,
        oracle,
    )
}


def stale() -> list[str]:
    """Faults that can no longer be planted: their pattern does not match exactly once, or their test is gone."""
    found = [(fault, fault.problem(ROOT / "miniawq", TESTS)) for room, faults in ROOMS.items() for fault in faults]
    return [f"{fault.file}: {fault.pattern!r} {problem}" for fault, problem in found if problem]
