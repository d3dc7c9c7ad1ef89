"""The files of a checkpoint: in a directory, or in a repository on the Hugging Face Hub.

Only `huggingface_hub` touches the network, so its variables (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT, ...) hold.
Small files come first. A weight file is downloaded when one of its tensors is read; its header can be read before.
"""

import argparse
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from miniawq.checkpoint.strict import Header, parse_json, read_header
from miniawq.errors import MiniawqError, NotFound, UnsupportedCheckpoint, UsageError

log = logging.getLogger(__name__)

NEVER_TRUSTED = "has no effect: miniawq never executes repository code"
DEMO = Path(__file__).parents[1] / "demo" / "fairytales-awq"
SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model", "*.txt", "*.md", "LICENSE*", "NOTICE*", "USE_POLICY*")


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
        return read_header(path)

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


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of a file, which tell whether it was changed."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


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
