"""The source of a long run, remembered at its start: weights by a fingerprint, each side file by its hash.

Side files (tokenizer, templates, licence, card) are copied at the start, and the copies are compared at the end.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from miniawq.checkpoint.opening import Checkpoint
from miniawq.checkpoint.shards import disk_errors, write_bytes
from miniawq.checkpoint.strict import COPIED_LIMIT, read_small
from miniawq.errors import MiniawqError

PIECES, PIECE_BYTES = 1024, 4096  # of each weight file, for the fingerprint: 4 MiB of any size


def fingerprint(checkpoint: Checkpoint) -> str:
    """A hash of the checkpoint's config, headers and evenly spaced pieces of its weight files.

    It tells two fine-tunes of a model apart without reading all of either.
    """
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name, info in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {info}".encode())
    for name in sorted({info.file for info in checkpoint.tensors.values()}):
        path = checkpoint.files.local(name)
        size = path.stat().st_size
        with open(path, "rb") as file:
            for piece in range(PIECES):
                file.seek(max(piece * PIECE_BYTES, size * piece // PIECES))
                digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()


def side_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """The SHA-256 of every side file of the source, by name."""
    return {name: _sha256(checkpoint.files.local(name)) for name in checkpoint.side_files}


def copy_side_files(checkpoint: Checkpoint, directory: Path) -> None:
    """Copy tokenizer, templates, licence and card to another checkpoint, byte for byte."""
    for name in checkpoint.side_files:
        content = read_small(checkpoint.files.local(name), COPIED_LIMIT)
        with disk_errors(directory):
            (directory / name).parent.mkdir(exist_ok=True)
        write_bytes(directory / name, content)


def check_side_files(checkpoint: Checkpoint, directory: Path, digests: Mapping[str, str]) -> None:
    """MiniawqError unless the side files in `directory` are those of the source when `digests` were taken."""
    for name, digest in digests.items():
        if not (directory / name).is_file() or _sha256(directory / name) != digest:
            raise MiniawqError(
                f"{checkpoint.directory} changed during the run",
                f"the copy of {name} is not the file that was there at the start",
                "nothing is published: remove what is unfinished, leave the source alone and run again",
            )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
