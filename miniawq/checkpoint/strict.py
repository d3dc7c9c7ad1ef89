"""Files of strangers, read strictly: small ones whole and within limits, JSON, and the heads of weight files."""

import json
import math
import os
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from miniawq.errors import NotFound, UnsupportedCheckpoint

LFS_POINTER = b"version https://git-lfs"
Header = dict[str, tuple[str, tuple[int, ...]]]

# Bytes that a file of each kind may have; the first pattern that fits its name counts. Parsed by Python, JSON takes up
# to thirty times its bytes. The largest published ones of dense models have a third of it.
LIMITS = {
    "*.safetensors": 16 << 20,  # of the header
    "*.safetensors.index.json": 16 << 20,
    "tokenizer.json": 128 << 20,
    "tokenizer_config.json": 16 << 20,
    "*.jinja": 4 << 20,
    "*report*.json": 64 << 20,
    "*.json": 8 << 20,
}
COPIED_LIMIT = 256 << 20  # of a file that is only copied
DEEPEST = 64  # levels of a JSON file


def limit_of(name: str) -> int:
    """Bytes that a file of this name, or the header of a weight file, may have."""
    return next((limit for pattern, limit in LIMITS.items() if fnmatch(name, pattern)), COPIED_LIMIT)


def read_small(path: Path, limit: int | None = None) -> bytes:
    """A small file, read whole; UnsupportedCheckpoint if it is larger than `limit`, or than LIMITS has it."""
    limit = limit or limit_of(path.name)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(limit + 1) if size <= limit else b""
    except OSError as error:
        raise NotFound(f"{path.name} cannot be read", f"{path}: {error.strerror}", "make it readable") from error
    if max(size, len(content)) > limit:
        raise UnsupportedCheckpoint(
            f"{path.name} is too large",
            f"{path} has {size} bytes, and a file of its kind has at most {limit}",
            "the file is damaged or made to take memory: look for another upload",
        )
    return content


def parse_json(path: Path) -> Any:
    """A JSON file, read strictly: UnsupportedCheckpoint if it is large or deep, if a key is there twice, and on numbers
    that are not finite.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"the key {key[:100]!r} is there twice")
        return made

    def finite(word: str) -> float:
        if not math.isfinite(number := float(word)):
            raise ValueError(f"{word[:100]} is no finite JSON number")
        return number

    content = read_small(path)
    try:
        value = json.loads(content, object_pairs_hook=unique, parse_constant=finite, parse_float=finite)
        _check_depth(value)
        if b"\\u" in content or b"\xed" in content:
            json.dumps(value, ensure_ascii=False).encode()  # fails on half of a surrogate pair, which is no text
        return value
    except (ValueError, RecursionError) as error:
        raise UnsupportedCheckpoint(
            f"{path.name} cannot be read", f"{path}: {error}", "download the file again, or correct it"
        ) from error


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        values = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in values for item in items]
    if level:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels")


def read_header(path: Path) -> Header:
    """dtype and shape of every tensor of a safetensors file, without reading values."""
    check_head(path)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    except SafetensorError as error:
        raise damaged_file(path, error) from error
    except RuntimeError:  # the system does not map a file that is larger than memory
        return header_unmapped(path)


def check_head(path: Path) -> None:
    """UnsupportedCheckpoint if a safetensors file has no header of an allowed length."""
    try:
        with open(path, "rb") as file:
            size, length = os.fstat(file.fileno()).st_size, int.from_bytes(head := file.read(8), "little")
    except OSError as error:
        raise NotFound(f"{path.name} cannot be read", f"{path}: {error.strerror}", "make it readable") from error
    if head == LFS_POINTER[:8] or len(head) < 8 or length > size - 8:
        raise damaged_file(path, f"its header has {length} bytes")
    if length > (limit := limit_of(path.name)):
        raise UnsupportedCheckpoint(
            f"the header of {path.name} is too large",
            f"{path} says that it has {length} bytes, and a header has at most {limit}",
            "the file is damaged or made to take memory: look for another upload",
        )


def header_entries(path: Path) -> tuple[dict[str, Any], int]:
    """What the header of a safetensors file says of each tensor, as it stands there, and where values begin."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length)
    try:
        return {key: entry for key, entry in json.loads(text).items() if key != "__metadata__"}, 8 + length
    except (ValueError, AttributeError, RecursionError) as error:
        raise damaged_file(path, f"its header: {error}") from error


def header_unmapped(path: Path) -> Header:
    """dtype and shape of every tensor, from the first bytes of a file whose head is checked.

    UnsupportedCheckpoint unless the tensors lie end to end and are all of the file.
    """
    entries, values = header_entries(path)
    header, end = {}, 0
    try:
        for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            makes_sense = isinstance(dtype, str) and all(type(size) is int and size >= 0 for size in (*shape, last))
            if not makes_sense or first != end or last < first:
                raise ValueError(f"what it says of {key[:100]}")
            header[key], end = (dtype, shape), last
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise damaged_file(path, f"its header: {error}") from error
    if values + end != path.stat().st_size:
        raise damaged_file(path, "its tensors are not all of it")
    return header


def damaged_file(path: Path, error: SafetensorError | str) -> UnsupportedCheckpoint:
    """Tell a Git LFS pointer and an incomplete download from other damage."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(len(LFS_POINTER))
        if head == LFS_POINTER:
            return UnsupportedCheckpoint(
                f"{path.name} is a Git LFS pointer, not weights",
                f"{path} has {size} bytes and begins with {LFS_POINTER.decode()!r}",
                "run `git lfs pull` in that directory, or download with huggingface_hub",
            )
        expected = int.from_bytes(head[:8], "little") + 8
        if size >= expected:
            file.seek(8)
            try:
                entries = json.loads(file.read(expected - 8))
                expected += max(entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__")
                expected = expected if isinstance(expected, int) else size
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                expected = size
    why = f"{path} has {size} bytes, expected {expected}" if expected != size else f"{path}: {str(error)[:300]}"
    return UnsupportedCheckpoint(
        f"{path.name} is damaged or incomplete", why, "the download may have been interrupted: download the file again"
    )
