"""What the compiler makes, kept for the next process: a directory for each kind of compiled step.

Inductor finds what it compiled before by the content of the graph. Here it gets a directory that outlives a reboot,
named after what else decides the result; `torch.compiler.save_cache_artifacts` would keep the graphs, but not the
objects of a C++ compiler. Traced functions lie there too (`compiler.py`). A seal, written last, lists the files.

The next process runs these files: they are code. So they lie in a directory that is the user's own (mode 0700), and are
never read from one that somebody else owns or may write to.
"""

import hashlib
import json
import logging
import os
import platform
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import platformdirs
import torch
from torch.utils._pytree import tree_leaves

from miniawq import __version__

log = logging.getLogger(__name__)

INDUCTOR_DIRECTORY = "TORCHINDUCTOR_CACHE_DIR"
SEAL = "seal.json"
MOST_DIRECTORIES = 32  # a step of 8B takes 20 to 60 MB
OLDEST_SECONDS = 90 * 24 * 3600
# What is traced depends on all of this package, and Inductor does not see when a block size changes.
SOURCES = Path(__file__).parents[1]


def cache_directory() -> Path:
    """Where artifacts are: MINIAWQ_CACHE, or `miniawq` in the user's cache directory (XDG_CACHE_HOME, ~/.cache)."""
    return Path(os.environ.get("MINIAWQ_CACHE") or platformdirs.user_cache_dir("miniawq")).expanduser()


def identity(device: torch.device, weights: Any, **described: str) -> dict[str, str]:
    """All that decides what is compiled: shapes of weights, what the caller `described`, versions, sources, device."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        known = f"{properties.name}, {properties.major}.{properties.minor}, CUDA {torch.version.cuda}"
    else:
        known = f"{device.type}, {platform.machine()}, {torch.get_num_threads()} threads, {_cpu_features()}"
    sources = b"".join(path.read_bytes() for path in sorted(SOURCES.rglob("*.py")))
    return {
        "miniawq": f"{__version__}, {_digest(sources)}",
        "torch": torch.__version__,
        "triton": _version_of("triton"),
        "python": f"{sys.implementation.cache_tag}, {platform.system()}",
        "device": known,
        "weights": ", ".join(
            f"{leaf.dtype} {list(leaf.shape)}" for leaf in tree_leaves(weights) if hasattr(leaf, "shape")
        ),
        **described,
    }


def directory_of(decides: Mapping[str, str]) -> Path:
    """Where a kind of step has its artifacts."""
    return cache_directory() / "compiled" / _digest(json.dumps(decides).encode())


def are_here(decides: Mapping[str, str]) -> bool:
    """Whether an earlier process left all that such a step needs. A damaged directory is removed, with a warning."""
    directory = directory_of(decides)
    try:
        if not directory.exists() or not _is_private(directory):
            return False
        seal = json.loads((directory / SEAL).read_bytes())
        changed = [name for name, digest in seal["files"].items() if _digest_of(directory / name) != digest]
        if not changed and seal["decides"] == decides:
            return True
        why = f"{changed[0]} has changed" if changed else "it is another one's"
    except FileNotFoundError as error:
        if error.filename == str(directory / SEAL):
            return False
        why = str(error)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        why = f"{SEAL}: {error}"
    log.warning("compiled code in %s is damaged and made again: %s", directory, why)
    _remove(directory)
    return False


@contextmanager
def kept(decides: Mapping[str, str]) -> Iterator[Path | None]:
    """Compile in here: what is in the directory of such a step is found, and what is new is sealed at the end.

    A directory in which something cannot be compiled is removed. There is no directory (None) if the user has set
    TORCHINDUCTOR_CACHE_DIR, or if it cannot be a private one.
    """
    directory = directory_of(decides)
    if INDUCTOR_DIRECTORY in os.environ or not _is_private(directory):
        yield None
        return
    os.environ[INDUCTOR_DIRECTORY] = str(directory)
    try:
        yield directory
        _seal(directory, decides)
        _prune(directory.parent)
    except OSError as error:
        log.warning("what was compiled is not kept: %s", error)
    except Exception:
        _remove(directory)
        raise
    finally:
        del os.environ[INDUCTOR_DIRECTORY]


def _is_private(directory: Path) -> bool:
    """Make the directory if it is not there; whether it is this user's and no other may write to it or its parent."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in (directory, directory.parent):
            if not hasattr(os, "getuid"):  # Windows: the user's profile is private
                continue
            found = path.stat()
            if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
                log.warning("compiled code is not kept: %s can be written to by others (chmod 700 it)", path)
                return False
    except OSError as error:
        log.warning("what is compiled is not kept: %s", error)
        return False
    return True


def _seal(directory: Path, decides: Mapping[str, str]) -> None:
    names = [path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if path.is_file()]
    files = {name: _digest_of(directory / name) for name in names if name != SEAL and not name.startswith("locks/")}
    if not files:
        return
    partial = directory / f"{SEAL}.{os.getpid()}"
    partial.write_text(json.dumps({"decides": decides, "files": files}, indent=2))
    os.replace(partial, directory / SEAL)


def _prune(parent: Path) -> None:
    """Remove directories beyond the newest MOST_DIRECTORIES, and those older than OLDEST_SECONDS."""
    newest_first = sorted(parent.glob(f"*/{SEAL}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for place, seal in enumerate(newest_first):
        if place >= MOST_DIRECTORIES or time.time() - seal.stat().st_mtime > OLDEST_SECONDS:
            _remove(seal.parent)


def _remove(directory: Path) -> None:
    """Remove a directory. It is renamed first, so no other process finds half of it."""
    refuse = directory.with_name(f"{directory.name}.{os.getpid()}")
    try:
        os.replace(directory, refuse)
    except OSError:
        return
    shutil.rmtree(refuse, ignore_errors=True)


def _cpu_features() -> str:
    """Compilers make code for the very processor, and a home directory may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return _digest("".join(line for line in lines if line.startswith(("flags", "Features"))).encode())


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _digest_of(path: Path) -> str:
    return _digest(path.read_bytes())
