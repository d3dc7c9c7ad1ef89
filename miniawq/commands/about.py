"""What `miniawq --version` says, and a report of a problem should: versions, device and compilers."""

import os
import platform
import shutil
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

from miniawq import __version__
from miniawq.compiled import WORKSHOP
from miniawq.hardware import device_memory, pick_device


def about() -> str:
    """One line a thing."""
    memory = device_memory(pick_device(None))
    tried = "" if WORKSHOP.knows_torch else " (not tried with miniawq: nothing is compiled)"
    return "\n".join(
        [
            f"miniawq {__version__}",
            f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
            f"torch {torch.__version__}{tried}",
            f"device {memory.name}, {memory.total / 2**30:.1f} GiB",
            f"compiler {', '.join(compilers()) or 'none: everything runs, and nothing is compiled'}",
        ]
    )


def compilers() -> list[str]:
    """What compiled steps can use here: Triton on a GPU, a C++ compiler on a CPU."""
    found = []
    with suppress(PackageNotFoundError):
        found.append(f"Triton {version('triton')}")
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "cl"]
    found += [path for name in names if (path := shutil.which(name))][:1]
    return found
