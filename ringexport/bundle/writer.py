"""Write a bundle so that the destination holds either the old one or the complete new one."""

import contextlib
import dataclasses
import errno
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from ringexport.bundle.files import (
    LOCK_NAME,
    BuildLock,
    check_place,
    clean_stale_builds,
    exchange_directories,
    file_entry,
    is_bundle_directory,
    remove_tree,
    strangers_in_bundle,
    sync_path,
    walk_files,
)
from ringexport.bundle.manifest import MANIFEST_NAME, Manifest, check_relative_path
from ringexport.bundle.reader import EngineBundle
from ringexport.errors import OutputError
from ringexport.progress import NoProgress, Progress

__all__ = ["BundleWriter", "check_destination"]

_FULL = {errno.ENOSPC, errno.EDQUOT}


class BundleWriter:
    """Context manager: write files under `path(...)`, then `commit` the manifest.

    Everything goes to ``<destination>.tmp-<id>`` beside the destination. Leaving the block without
    `commit`, by an error or an interrupt, removes it and leaves the destination as it was.

    Args:
        destination: where the bundle is to be; a directory that is missing, empty or a bundle.
        overwrite: whether an existing bundle may be replaced.
        expected_bytes: what the bundle will take, to refuse a disk that is too small early.

    Raises:
        OutputError: on entering, if the destination cannot be written, holds something else, or
            has too little space; later, if the disk is full.
    """

    def __init__(
        self, destination: Path, *, overwrite: bool = True, expected_bytes: int | None = None
    ) -> None:
        self.destination = Path(os.path.abspath(destination))  # noqa: PTH100 (keeps links)
        self.directory = self._sibling("tmp")
        self._overwrite = overwrite
        self._expected_bytes = expected_bytes
        self._made_parents: list[Path] = []
        self._lock: BuildLock | None = None

    def __enter__(self) -> Self:
        check_destination(self.destination, overwrite=self._overwrite)
        try:
            self._make_parents()
            clean_stale_builds(self.destination)
            self.directory.mkdir()
            self._lock = BuildLock(self.directory)
            self._check_space()
        except OSError as error:
            self._remove()
            raise self._translate(error) from error
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        translated = self._translate(error) if isinstance(error, OSError) else None
        self._remove()
        if translated is not None:
            raise translated from error

    def path(self, relative: str) -> Path:
        """Return where to write the bundle's file `relative`; its directory exists."""
        check_relative_path(relative)
        path = self.directory / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def commit(
        self,
        manifest: Manifest,
        *,
        progress: Progress | None = None,
        check: Callable[[EngineBundle], None] | None = None,
    ) -> Manifest:
        """Hash and sync every file, write the manifest, and swap the bundle into place.

        Args:
            manifest: without `files`; they are filled in here.
            progress: told about the bytes that are hashed.
            check: called with the finished bundle before it takes its place; if it raises, the
                destination stays as it was.

        Returns:
            The manifest as written.

        Raises:
            OutputError: the disk is full or the destination cannot be replaced.
        """
        progress = progress or NoProgress()
        names = [name for name in walk_files(self.directory) if name != LOCK_NAME]
        total = sum((self.directory / name).stat().st_size for name in names)
        progress.start("hashing and syncing the bundle", total, "bytes")
        entries = []
        for name in names:
            entries.append(file_entry(self.directory, name, progress.advance))
            sync_path(self.directory / name)
        complete = dataclasses.replace(manifest, files=tuple(entries))
        manifest_path = self.directory / MANIFEST_NAME
        manifest_path.write_text(complete.to_json(), encoding="utf-8", newline="\n")
        sync_path(manifest_path)
        for directory, _, _ in os.walk(self.directory, topdown=False):
            sync_path(Path(directory))
        progress.finish()
        bundle = EngineBundle.open(self.directory, verify=False)
        if check is not None:
            check(bundle)
        self._publish()
        return complete

    def _publish(self) -> None:
        """Move the finished directory to the destination."""
        check_destination(self.destination, overwrite=self._overwrite)
        if self._lock is not None:
            self._lock.release()
        if not self.destination.exists():
            self.directory.rename(self.destination)
        else:
            aside = self._sibling("old")
            exchange_directories(self.directory, self.destination, aside)
            remove_tree(aside)
        self._made_parents = []
        sync_path(self.destination.parent)

    def _sibling(self, kind: str) -> Path:
        name = f"{self.destination.name}.{kind}-{uuid.uuid4().hex[:12]}"
        return self.destination.with_name(name)

    def _make_parents(self) -> None:
        missing = []
        parent = self.destination.parent
        while not parent.exists():
            missing.append(parent)
            parent = parent.parent
        if not parent.is_dir():
            raise OutputError(
                f"cannot write {self.destination}: {parent} is not a directory",
                hint="choose another -o",
            )
        self._made_parents = missing
        self.destination.parent.mkdir(parents=True, exist_ok=True)

    def _check_space(self) -> None:
        free = shutil.disk_usage(self.directory).free
        if self._expected_bytes is not None and free < self._expected_bytes:
            raise OutputError(
                f"not enough space at {self.destination.parent}: the bundle may need"
                f" up to {self._expected_bytes:,} bytes, {free:,} bytes are free",
                hint="free some space, or write to another disk with -o",
            )

    def _translate(self, error: OSError) -> OutputError:
        """Say what an operating system error means for the output."""
        where = error.filename or self.destination
        if error.errno == errno.EFBIG:
            return OutputError(
                f"cannot write {where}: it would pass the file size limit of this process or disk",
                hint="raise the limit (ulimit -f), or write to another disk with -o",
            )
        if error.errno not in _FULL:
            return OutputError(
                f"cannot write {where}: {error.strerror or error}",
                hint="choose an output that this user may write, with -o",
            )
        free = "an unknown number of"
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(self.destination.parent).free:,}"
        written = sum((self.directory / name).stat().st_size for name in walk_files(self.directory))
        needed = f"needs more than {written:,}"
        if self._expected_bytes:
            needed = f"may need up to {self._expected_bytes:,}"
        return OutputError(
            f"the disk is full at {self.destination.parent}: {error.strerror}; the bundle {needed}"
            f" bytes, {free} bytes were free after {written:,} were written",
            hint="free some space, or write to another disk with -o; an older bundle is untouched",
        )

    def _remove(self) -> None:
        if self._lock is not None:
            self._lock.release()
        remove_tree(self.directory)
        for parent in self._made_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        self._made_parents = []


def check_destination(destination: Path, *, overwrite: bool = True) -> None:
    """Refuse a destination that holds anything but a bundle, or is in the way of others.

    Raises:
        OutputError: a place that `check_place` refuses, a file, another kind of directory, a
            bundle with files that are not its own, or a bundle that may not be replaced.
    """
    try:
        check_place(destination)
        if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
            kind = "symbolic link" if destination.is_symlink() else "file"
            raise OutputError(
                f"{destination} is a {kind}, a bundle is a directory", hint="choose another -o"
            )
        empty = not destination.is_dir() or not any(destination.iterdir())
    except OSError as error:
        hint = "choose a shorter -o" if error.errno == errno.ENAMETOOLONG else "choose another -o"
        raise OutputError(f"cannot write {destination}: {error.strerror}", hint=hint) from error
    if empty:
        return
    if not is_bundle_directory(destination):
        raise OutputError(
            f"{destination} exists and is not a ringexport bundle; it is left alone",
            hint="choose another -o, or remove that directory yourself",
        )
    if not overwrite:
        raise OutputError(f"the bundle {destination} exists", hint="choose another -o")
    strangers = strangers_in_bundle(destination, hidden=True)
    if strangers:
        raise OutputError(
            f"the bundle {destination} holds {len(strangers)} file(s) that are not part of it,"
            f" such as {strangers[0]}; replacing it would lose them",
            hint="move them elsewhere, or choose another -o",
        )
