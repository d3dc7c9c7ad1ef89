"""The files of a checkpoint: in a directory, or in a repository on the Hugging Face Hub.

Only `huggingface_hub` touches the network, so its variables (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT, ...) hold.
Small files come first. A weight file is downloaded when one of its tensors is read; its header can be read before.
"""

import argparse
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from safetensors import SafetensorError, safe_open

from miniawq.errors import MiniawqError, NotFound, UnsupportedCheckpoint, UsageError

log = logging.getLogger(__name__)

NEVER_TRUSTED = "has no effect: miniawq never executes repository code"
DEMO = Path(__file__).parents[1] / "demo" / "fairytales-awq"
SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model", "*.txt", "*.md", "LICENSE*", "NOTICE*", "USE_POLICY*")
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


class LocalFiles:
    """The files of a checkpoint in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.name = directory, directory.name
        self.stamps: dict[str, tuple[int, int]] = {}  # size and time of the weight files whose headers were read
        found = [*directory.glob("*"), *directory.glob("additional_chat_templates/*")]
        self.names = sorted(path.relative_to(directory).as_posix() for path in found if path.is_file())

    def local(self, name: str) -> Path:
        """The path of a file; NotFound when it is not there."""
        if not (path := self.directory / name).is_file():
            raise NotFound(f"{name} is missing", f"{self.directory} has no such file", "download the repository again")
        return path

    def json(self, name: str) -> Any:
        """A parsed JSON file, read strictly (`parse_json`)."""
        return parse_json(self.local(name))

    def missing(self, names: Sequence[str]) -> MiniawqError:
        """The error to raise when weight files are not there."""
        return UnsupportedCheckpoint(
            "weight files are missing",
            f"{self.directory} lacks {', '.join(names)}",
            "the download may be incomplete: download the repository again",
        )

    def header(self, name: str) -> Header:
        """dtype and shape of every tensor of a safetensors file, without reading values."""
        path = self.local(name)
        self.stamps[name] = _stamp(path)
        check_head(path)
        try:
            with safe_open(path, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                return {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
        except SafetensorError as error:
            raise damaged_file(path, error) from error
        except RuntimeError:  # the system does not map a file that is larger than memory
            return header_unmapped(path)

    def unchanged(self, name: str) -> None:
        """UnsupportedCheckpoint if a weight file is another one than when its header was read."""
        if name in self.stamps and _stamp(path := self.local(name)) != self.stamps[name]:
            raise UnsupportedCheckpoint(
                f"{name} was changed while it was in use",
                f"{path} has another size or time than when its header was read",
                "let nobody write to a checkpoint that is in use, and run the command again",
            )

    def fetch(self, names: Sequence[str]) -> None:
        """Make sure that these files are on this machine."""
        for name in names:
            self.local(name)


class HubFiles(LocalFiles):
    """The files of a repository on the Hub at one commit; `directory` is its snapshot in the cache."""

    def __init__(
        self,
        repo_id: str,
        revision: str | None,
        local_files_only: bool,
        token: str | bool | None,
        cache_dir: str | Path | None,
    ) -> None:
        self.repo_id = repo_id
        self._options: dict[str, Any] = {"token": token, "cache_dir": cache_dir}
        offline: dict[str, Any] = {"local_files_only": local_files_only}
        with hub_errors(repo_id, revision):
            found = snapshot_download(
                repo_id, revision=revision, allow_patterns=list(SMALL_FILES), **offline, **self._options
            )
        super().__init__(Path(str(found)))
        self.commit, self.name = self.directory.name, repo_id
        self.online = not local_files_only and self._list(token)

    def _list(self, token: str | bool | None) -> bool:
        """Learn the names of all files from the Hub; False if it cannot be asked, so that only the cache is left."""
        try:
            with hub_errors(self.repo_id, self.commit):
                info = HfApi(token=token).model_info(self.repo_id, revision=self.commit)
        except NotFound as error:
            log.info("%s; going on with the files in the cache", error.what)
            return False
        if info.id != self.repo_id:
            log.warning("%s is now called %s", self.repo_id, info.id)
        self.names = sorted(sibling.rfilename for sibling in info.siblings or [])
        return True

    def missing(self, names: Sequence[str]) -> MiniawqError:
        """The error to raise when weight files are not there; offline, the cache lacks them."""
        if self.online:
            return super().missing(names)
        return NotFound(
            f"{self.repo_id} is only partly in the cache",
            f"{self.directory} lacks {', '.join(names)}, and the Hub cannot be reached or may not be asked",
            "run once with the network, without --local-files-only and HF_HUB_OFFLINE",
        )

    def local(self, name: str) -> Path:
        """The path of a file in the cache, downloaded if it is not there yet."""
        if not (path := self.directory / name).is_file():
            with hub_errors(self.repo_id, self.commit):
                options: dict[str, Any] = {"local_files_only": not self.online, **self._options}
                path = Path(str(hf_hub_download(self.repo_id, name, revision=self.commit, **options)))
        return path

    def header(self, name: str) -> Header:
        """dtype and shape of every tensor; from the Hub only the head of the file is read."""
        if (self.directory / name).is_file() or not self.online:
            return super().header(name)
        with hub_errors(self.repo_id, self.commit):
            api = HfApi(token=self._options["token"])
            found = api.parse_safetensors_file_metadata(self.repo_id, name, revision=self.commit)
        return {key: (info.dtype, tuple(info.shape)) for key, info in found.tensors.items()}

    def fetch(self, names: Sequence[str]) -> None:
        """Download the files that are not in the cache yet, several at a time."""
        if self.online and not all((self.directory / name).is_file() for name in names):
            with hub_errors(self.repo_id, self.commit):
                snapshot_download(self.repo_id, revision=self.commit, allow_patterns=list(names), **self._options)
        super().fetch(names)


def locate(
    model: str | Path | None,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> LocalFiles:
    """The files of `model`: a directory, a Hub id, "id@revision", or None for the demo that comes with miniawq."""
    if model is None:
        return LocalFiles(DEMO)
    name, _, named_revision = str(model).partition("@")
    path = Path(os.path.expanduser(model))
    try:
        is_directory, exists = path.is_dir(), path.exists()
    except OSError as error:  # a name that is too long, or a directory that may not be searched
        raise NotFound(f"there is no directory {str(model)[:200]}", error.strerror or "", "check the path") from error
    if is_directory:
        return LocalFiles(path)
    if exists:
        raise UnsupportedCheckpoint(
            f"{model} is a single file",
            "a checkpoint is a directory with config.json and safetensors files",
            "name its directory; GGUF files are not read: look for the model that it was made from",
        )
    if isinstance(model, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise NotFound(f"there is no directory {model}", "", "check the path, or name a Hub repository as owner/name")
    if revision and named_revision and revision != named_revision:
        raise UsageError(f"two revisions are asked for: {named_revision} in {model}, and {revision}")
    return HubFiles(name, revision or named_revision or None, local_files_only, token, cache_dir)


def add_hub_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every verb that opens a checkpoint, named as in huggingface_hub."""
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository (or MODEL@REVISION)")
    parser.add_argument("--token", help="Hub access token (default: HF_TOKEN, or that of `hf auth login`)")
    parser.add_argument("--cache-dir", help="where downloads are kept (default: HF_HOME)")
    parser.add_argument("--local-files-only", "--offline", action="store_true", help="never use the network")
    parser.add_argument("--trust-remote-code", action="store_true", help=NEVER_TRUSTED)


def hub_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The values of those flags, as `locate` and `open_checkpoint` take them."""
    if arguments.trust_remote_code:
        log.info("--trust-remote-code %s", NEVER_TRUSTED)
    names = ("revision", "token", "cache_dir", "local_files_only")
    return {name: getattr(arguments, name) for name in names}


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


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of a file, which tell whether it was changed."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


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


# Class names of huggingface_hub.errors (its releases differ), the most special first: what, why, what to do.
HUB_ERRORS = {
    "GatedRepoError": (
        "{repo} is gated",
        "its owner asks for a licence to be accepted, and this token has no access",
        "accept it at https://huggingface.co/{repo}, then `hf auth login`, or set HF_TOKEN",
    ),
    "DisabledRepoError": ("{repo} is disabled", "the Hub has closed access to it", "choose another repository"),
    "RevisionNotFoundError": (
        "{repo} has no revision {revision}",
        "no branch, tag or commit of that name",
        "see https://huggingface.co/{repo}/commits, or leave the revision out",
    ),
    "RepositoryNotFoundError": (
        "there is no {repo}, neither here nor on the Hub",
        "no directory of that name, and the Hub knows no such repository (or it is private)",
        "check the spelling; for a private one, `hf auth login` or set HF_TOKEN",
    ),
    "RemoteEntryNotFoundError": ("a file of {repo} is missing", "{error}", "the upload may be incomplete"),
    "IncompleteSnapshotError": (
        "{repo} is only partly in the cache",
        "the download was interrupted, and the Hub cannot be reached or may not be asked",
        "run once with the network, without --local-files-only",
    ),
    "LocalEntryNotFoundError": (
        "{repo} is no directory here, it is not in the cache, and the Hub cannot be reached or may not be asked",
        "{error}",
        "check the network; HF_HUB_OFFLINE and --local-files-only forbid downloads",
    ),
    "RevisionResolutionError": (
        "{repo} is no directory here, it is not in the cache, and the Hub cannot be reached or may not be asked",
        "{error}",
        "check the network; HF_HUB_OFFLINE and --local-files-only forbid downloads",
    ),
    "OfflineModeIsEnabled": ("{repo} cannot be fetched", "HF_HUB_OFFLINE is set", "unset it, or name a directory"),
    "HFValidationError": ("{repo} is no directory here, and no Hub id", "{error}", "a Hub id is owner/name"),
    "SafetensorsParsingError": ("a weight file of {repo} is damaged", "{error}", "tell the owner of the repository"),
    "HTTPError": ("{repo} cannot be fetched", "{error}", "try again; the download goes on where it stopped"),
    "ConnectionError": ("{repo} cannot be fetched", "{error}", "check the network"),
    "TimeoutError": ("{repo} cannot be fetched", "{error}", "check the network"),
}


@contextmanager
def hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn errors of huggingface_hub into NotFound, with what to do; others pass."""
    try:
        yield
    except MiniawqError:
        raise
    except Exception as error:
        names = {kind.__name__ for kind in type(error).__mro__}
        if not (known := next((HUB_ERRORS[name] for name in HUB_ERRORS if name in names), None)):
            raise
        first_line = str(error).strip().partition("\n")[0]
        filled = [line.format(repo=repo_id, revision=revision, error=first_line) for line in known]
        raise NotFound(*filled) from error
