"""Sizes in flags, and the flag that several verbs have for one."""

import argparse
import re
from collections.abc import Callable
from typing import Any

LARGEST = 1 << 60  # number of a flag


def parse_size(text: str) -> int:
    """Bytes from "24GiB", "1.5 GB", "800MiB" or a plain number."""
    units = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    if not found or found[2].upper() not in units:
        raise argparse.ArgumentTypeError(f"{text[:50]!r} is no size; write 24GiB, 800MiB or a number of bytes")
    if (nbytes := float(found[1]) * units[found[2].upper()]) > LARGEST:
        raise argparse.ArgumentTypeError(f"{text[:50]!r} is out of range")
    return int(nbytes)


def add_memory_margin_flag(add: Callable[..., Any]) -> None:
    """Add --memory-margin, the `overhead` of a footprint, by an `add_argument` of argparse."""
    margin = "memory to leave to the device's runtime and to others (1GiB; on a CPU 512MiB)"
    add("--memory-margin", type=parse_size, metavar="SIZE", help=margin)
