"""Directories and files that appear whole: locked while they are filled, and published last.

`published` (a directory) and `published_file` are for a run that is short, and begins again after a kill: it fills what
stands beside the destination.
`locked`, `publish` and `recall` are for a long one, which goes on: it fills a directory inside the destination.
"""

import glob
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from miniawq.checkpoint.shards import PARTIAL, disk_errors, sync_directory
from miniawq.errors import DoesNotFit, UsageError

log = logging.getLogger(__name__)

UNFINISHED = "unfinished"  # the directory, in that of a checkpoint, of what is not published yet
LOCK = ".lock"
LOCK_SECONDS = 10  # another run holds the lock of a new directory for a moment, to see whether it is abandoned
LAST = "config.json"  # without which nobody takes a directory for a checkpoint


@contextmanager
def published(destination: str | Path) -> Iterator[Path]:
    """A directory beside `destination` to fill, which gets that name when the block ends without an error."""
    with published_file(destination) as partial:
        with disk_errors(partial):
            partial.mkdir()
        yield partial


@contextmanager
def published_file(destination: str | Path) -> Iterator[Path]:
    """The name beside `destination` of a file to write, which gets that one when the block ends without an error.

    Until then it has a name that no other run uses, and a lock of that name beside it: what a killed run has left, the
    next one removes. UsageError when the destination exists, at the beginning or at the end.
    """
    destination = Path(destination)
    with disk_errors(destination):
        _refuse_existing(destination)
        _remove_abandoned(destination)
        made = _make_directory(destination.parent)
        partial = destination.with_name(f"{destination.name}{PARTIAL}-{uuid.uuid4().hex[:8]}")
    lock = FileLock(partial.with_name(partial.name + LOCK), timeout=LOCK_SECONDS)
    try:
        with disk_errors(destination):
            _make_file_of(lock)
            lock.acquire()
        yield partial
        with disk_errors(destination):
            _refuse_existing(destination)
            _rename(partial, destination)
    except BaseException:
        _remove_whole(partial)
        _remove_lock(lock)
        _remove_empty(made)
        raise
    _remove_lock(lock)
    with disk_errors(destination):
        sync_directory(destination.parent)


def _remove_whole(path: Path) -> None:
    """Remove a file, or a directory with all that is in it."""
    with suppress(OSError):
        path.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _remove_abandoned(destination: Path) -> None:
    """Remove what killed runs have left beside `destination`: nobody holds the locks of their directories."""
    for found in destination.parent.glob(f"{glob.escape(destination.name)}{PARTIAL}-{'[0-9a-f]' * 8}{LOCK}"):
        lock = FileLock(found, timeout=0)
        with suppress(OSError):  # it is held, or another user's
            lock.acquire()
            log.info("removing %s, which an interrupted run has left", found.with_suffix(""))
            _remove_whole(found.with_suffix(""))
            _remove_lock(lock)


def _make_file_of(lock: FileLock) -> None:
    """Make the file of a lock: where that cannot be, the library would wait for it."""
    os.close(os.open(lock.lock_file, os.O_RDWR | os.O_CREAT, 0o644))


def _remove_lock(lock: FileLock) -> None:
    """Remove a lock that is held; before it is released where the system allows it, so that nobody else takes it."""
    with suppress(OSError):
        os.unlink(lock.lock_file)
    lock.release()
    with suppress(OSError):
        os.unlink(lock.lock_file)


def _refuse_existing(destination: Path) -> None:
    if destination.exists() or destination.is_symlink():
        raise _exists(destination)


def _rename(partial: Path, destination: Path) -> None:
    """Give what was made its name. A directory's is refused by the system if another run takes it in this moment."""
    try:
        os.rename(partial, destination)
    except OSError as error:
        if destination.exists():
            raise _exists(destination) from error
        raise


def _exists(destination: Path) -> UsageError:
    return UsageError(
        f"cannot write to {destination}", "something of that name exists", "name a new directory, or remove it"
    )


def publish(work: Path) -> None:
    """Move all that is in `work` into the directory around it, config.json last, and remove `work`.

    A kill leaves a directory that does not open, or the whole checkpoint.
    """
    with disk_errors(work.parent):
        for path in sorted(work.iterdir(), key=lambda path: (path.name == LAST, path.name)):
            if path.name == LAST:
                sync_directory(work.parent)
            os.replace(path, work.parent / path.name)
        sync_directory(work.parent)
        work.rmdir()


def recall(names: Sequence[str], work: Path) -> None:
    """Move what a killed `publish` has moved back into `work`, config.json first."""
    with disk_errors(work.parent):
        work.mkdir(exist_ok=True)
        for name in sorted(names, key=lambda name: name != LAST):
            if (work.parent / name).exists():
                os.replace(work.parent / name, work / name)


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """Hold a file, by a lock beside it, for this run alone: UsageError while another run holds it."""
    lock = _taken(file.with_name(file.name + LOCK), file, "file")
    try:
        yield
    finally:
        _remove_lock(lock)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory, which is made, for this run alone: UsageError while another run holds it.

    At the end a directory that was made and is empty is removed. The lock stays in one with unfinished work: another
    run may wait for this very file.
    """
    with disk_errors(directory):
        if (directory.exists() or directory.is_symlink()) and not directory.is_dir():
            raise UsageError(f"cannot write to {directory}", "it is no directory", "name a new directory")
        made = _make_directory(directory)
    try:
        lock = _taken(directory / LOCK, directory, "directory")
        try:
            yield
        finally:
            if not (directory / UNFINISHED).exists():
                with suppress(OSError):
                    (directory / LOCK).unlink()
            lock.release()
    finally:
        _remove_empty(made)


def _taken(path: Path, written: Path, kind: str) -> FileLock:
    """The lock at `path`, held from now on: UsageError while another run holds it."""
    lock = FileLock(path, timeout=0)
    try:
        with disk_errors(written):
            _make_file_of(lock)
        lock.acquire()
    except Timeout as error:
        why, fix = f"{path} is held by it", f"wait for it, or name another {kind}"
        raise UsageError(f"another run is writing to {written}", why, fix) from error
    return lock


def _make_directory(directory: Path) -> list[Path]:
    """Make a directory and those around it; returns those that were not there, the innermost first."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except BaseException:
        _remove_empty(missing)
        raise
    return missing


def _remove_empty(directories: Sequence[Path]) -> None:
    for directory in directories:
        with suppress(OSError):
            directory.rmdir()


def check_disk(destination: Path, nbytes: int) -> None:
    """DoesNotFit when the disk of `destination`, which need not exist yet, has less than `nbytes` free.

    MiniawqError when it is read-only.
    """
    with disk_errors(destination):
        place = next(path for path in (destination.absolute(), *destination.absolute().parents) if path.exists())
        free = shutil.disk_usage(place).free
        if free < nbytes:
            tempfile.TemporaryFile(dir=place).close()  # a read-only disk has no space free either
    if free < nbytes:
        raise DoesNotFit(
            f"{destination} needs {nbytes / 1e9:.2f} GB of disk",
            f"{place} has {free / 1e9:.2f} GB free",
            "free some space, or name a destination on another disk",
        )
