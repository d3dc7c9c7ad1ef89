"""What the compiler makes, kept for the next process: in a directory for each kind of step.

Inductor finds what it compiled before by the content of the graph. Here it is given a directory that outlives a reboot,
and that is named after what else decides the result; `torch.compiler.save_cache_artifacts` would keep the graphs, but
not the objects of a C++ compiler. Traced functions lie there too (`compiling.py`). Every file appears complete or not
at all, and a seal, written last, lists them.
"""

import hashlib
import json
import logging
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from miniawq import __version__
from miniawq.decode import DecodeStep
from miniawq.shards import write_json

log = logging.getLogger(__name__)

INDUCTOR_DIRECTORY = "TORCHINDUCTOR_CACHE_DIR"
SEAL = "seal.json"
# What is traced depends on all of this package, and Inductor does not see when a tile changes.
SOURCES = Path(__file__).parent


def cache_directory() -> Path:
    """Where artifacts are: MINIAWQ_CACHE, or `miniawq` in the user's cache directory (XDG_CACHE_HOME, ~/.cache)."""
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("MINIAWQ_CACHE") or f"{users}/miniawq").expanduser()


def what_decides(step: DecodeStep) -> dict[str, str]:
    """Everything that makes compiled code of a step useless for another one, in words."""
    if step.device.type == "cuda":
        properties = torch.cuda.get_device_properties(step.device)
        device = f"{properties.name}, {properties.major}.{properties.minor}, CUDA {torch.version.cuda}"
    else:
        device = f"{step.device.type}, {platform.machine()}, {torch.get_num_threads()} threads, {_cpu_features()}"
    weights = tree_leaves((step.layers[0], step.head, step.embedding_VD))
    tensors = [leaf for leaf in weights if isinstance(leaf, Tensor)]
    sources = b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.py")))
    return {
        "miniawq": f"{__version__}, {_digest(sources)}",
        "torch": torch.__version__,
        "triton": _version_of("triton"),
        "python": f"{sys.implementation.cache_tag}, {platform.system()}",
        "device": device,
        "model": str(step.config),
        "dtype": str(step.dtype),
        "weights": ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in tensors),
        "rows": str(len(step.ids_B)),
    }


def directory_of(decides: dict[str, str]) -> Path:
    """Where a kind of step has its artifacts."""
    return cache_directory() / "compiled" / _digest(json.dumps(decides).encode())


def are_here(step: DecodeStep) -> bool:
    """Whether an earlier process has left all that `step` needs. What is damaged is given up, with a notice."""
    decides = what_decides(step)
    return _is_whole(directory_of(decides), decides)


@contextmanager
def kept(step: DecodeStep) -> Iterator[Path | None]:
    """Compile in here what `step` needs: what is in the directory already is found, and what is new sealed at the end.

    A directory in which something cannot be compiled is given up. A user's own TORCHINDUCTOR_CACHE_DIR is left alone:
    then there is no directory.
    """
    decides = what_decides(step)
    directory = directory_of(decides)
    if os.environ.get(INDUCTOR_DIRECTORY, str(directory)) != str(directory):
        yield None
        return
    os.environ[INDUCTOR_DIRECTORY] = str(directory)
    try:
        yield directory
        _seal(directory, decides)
    except OSError as error:
        log.warning("what was compiled is not kept: %s", error)
    except Exception:
        give_up(directory)
        raise


def _is_whole(directory: Path, decides: dict[str, str]) -> bool:
    """Whether the files are those that the seal lists; if they are not, the directory is gone afterwards."""
    try:
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
    give_up(directory)
    return False


def give_up(directory: Path) -> None:
    """Take a directory out of the way. It is renamed first, so that nobody finds half of it."""
    refuse = directory.with_name(f"{directory.name}.{os.getpid()}")
    try:
        os.replace(directory, refuse)
    except OSError:
        return
    shutil.rmtree(refuse, ignore_errors=True)


def _seal(directory: Path, decides: dict[str, str]) -> None:
    names = [path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if path.is_file()]
    files = {name: _digest_of(directory / name) for name in names if name != SEAL and not name.startswith("locks/")}
    write_json(directory / SEAL, {"decides": decides, "files": files})


def _cpu_features() -> str:
    """Compilers make code for the very processor; directories may be shared by several."""
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
