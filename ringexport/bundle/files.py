"""Files and directories on disk: digests, syncing, atomic exchange, and what dead builds left."""

import contextlib
import ctypes
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

from ringexport.bundle.manifest import FORMAT, MANIFEST_NAME, FileEntry
from ringexport.errors import OutputError
from ringexport.files import sha256_of

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows has no flock; there every build is taken to be alive
    fcntl = None

__all__ = [
    "LOCK_NAME",
    "BuildLock",
    "check_apart",
    "check_place",
    "clean_stale_builds",
    "exchange_directories",
    "file_entry",
    "find_stale_builds",
    "is_bundle_directory",
    "remove_tree",
    "strangers_in_bundle",
    "sync_path",
    "walk_files",
]

log = logging.getLogger(__name__)

LOCK_NAME = ".building"
_GRACE_SECONDS = 60.0  # a directory this young may be about to get, or have just lost, its lock
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class BuildLock:
    """A file in a build's temporary directory, locked for as long as the build lives.

    The operating system drops the lock when the process ends, however it ends.
    """

    def __init__(self, directory: Path) -> None:
        self._file = (directory / LOCK_NAME).open("w")
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise

    def release(self, *, keep_file: bool = False) -> None:
        """Drop the lock and remove its file. Doing it twice is harmless.

        Args:
            keep_file: leave the file, which marks the directory as that of a build that is over.
        """
        self._file.close()
        if not keep_file:
            Path(self._file.name).unlink(missing_ok=True)


def _is_alive(directory: Path) -> bool:
    """Tell whether the build that owns this temporary directory still runs."""
    if fcntl is None:
        return True
    try:
        with (directory / LOCK_NAME).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return _age_seconds(directory) < _GRACE_SECONDS
    except OSError:
        return True
    return False


def _age_seconds(directory: Path) -> float:
    """Return how long ago the directory was last created, changed or renamed."""
    try:
        return time.time() - directory.stat().st_ctime
    except FileNotFoundError:
        return 0.0


def find_stale_builds(
    parent: Path, name: str = "*", *, kinds: Sequence[str] = ("tmp", "old")
) -> list[Path]:
    """List temporary directories in `parent` whose build is dead, oldest name first.

    Args:
        parent: where to look.
        name: of the destination.
        kinds: "tmp" and "old" beside a destination, "work" for what a later run may continue.
    """
    if not parent.is_dir():
        return []
    found = [path for kind in kinds for path in parent.glob(f"{name}.{kind}-*")]
    return sorted(path for path in found if path.is_dir() and not _is_alive(path))


def clean_stale_builds(destination: Path) -> list[Path]:
    """Remove what dead builds of `destination` left beside it.

    A bundle that was moved aside and never replaced is put back first.

    Returns:
        The directories that were removed.
    """
    removed = []
    for path in find_stale_builds(destination.parent, destination.name):
        if ".old-" in path.name and not destination.exists() and is_bundle_directory(path):
            log.info("putting back %s, which a build that died had moved to %s", destination, path)
            path.rename(destination)
            continue
        log.info("removing %s, left by a build that died", path)
        remove_tree(path)
        removed.append(path)
    return removed


def is_bundle_directory(path: Path) -> bool:
    """Tell whether a directory holds a manifest of any version of the bundle format."""
    try:
        text = (path / MANIFEST_NAME).read_text(encoding="utf-8")
        value = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and value.get("format") == FORMAT


def check_apart(checkpoint: Path, destination: Path) -> None:
    """Refuse an output that is, is inside, or holds the checkpoint that it is made of.

    Raises:
        OutputError: they are not apart.
    """
    # Path.resolve() would fail on link loops.
    source, place = (Path(os.path.realpath(path)) for path in (checkpoint, destination))
    if place == source:
        how = f"is the checkpoint {checkpoint} itself"
    elif source in place.parents:
        how = f"is inside the checkpoint {checkpoint}"
    elif place in source.parents:
        how = f"holds the checkpoint {checkpoint}"
    else:
        return
    raise OutputError(
        f"the output {destination} {how}", hint="write it beside the checkpoint, with -o"
    )


def check_place(destination: Path) -> None:
    """Refuse a place where a new directory would harm others, whatever is there now.

    Raises:
        OutputError: the current directory or one above it, or a place inside a bundle.
    """
    place, here = Path(os.path.realpath(destination)), Path.cwd()  # resolve() fails on link loops
    if here == place or place in here.parents:
        # It is exchanged for a new one: shells and programs would stay in a directory that is gone.
        raise OutputError(
            f"the output {destination} is the current directory, or one above it",
            hint="choose a new directory in it with -o, or start the command elsewhere",
        )
    for parent in place.parents:
        if is_bundle_directory(parent):
            raise OutputError(
                f"the output {destination} is inside the bundle {parent}, which would be refused"
                " for files that are not its own",
                hint="choose an -o outside of it",
            )


def strangers_in_bundle(path: Path, *, hidden: bool) -> list[str]:
    """List files of a bundle directory that its manifest does not name.

    Args:
        path: of the bundle.
        hidden: count hidden files too. They harm nobody who reads the bundle, but who replaces
            it would delete them. The lock of a build is never counted.
    """
    manifest = json.loads((path / MANIFEST_NAME).read_text(encoding="utf-8"))
    files = manifest.get("files")
    entries = files if isinstance(files, list) else []
    known = {str(entry.get("path")) for entry in entries if isinstance(entry, dict)}
    return [
        name
        for name in walk_files(path)
        if name not in known
        and name not in {MANIFEST_NAME, LOCK_NAME}
        and (hidden or not _is_hidden(name))
    ]


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def walk_files(root: Path) -> Iterator[str]:
    """Yield every file and link below `root`, sorted, as a path with forward slashes."""
    names = []
    for directory, folders, files in os.walk(root):
        links = [name for name in folders if (Path(directory) / name).is_symlink()]
        names += [(Path(directory) / name).relative_to(root).as_posix() for name in files + links]
    yield from sorted(names)


def file_entry(root: Path, name: str, advance: Callable[[int], None] | None = None) -> FileEntry:
    """Read a file once and return its size and digest.

    Args:
        root: the directory that `name` is relative to.
        name: path with forward slashes.
        advance: called with the number of bytes after each piece.
    """
    size = 0

    def count(amount: int) -> None:
        nonlocal size
        size += amount
        if advance is not None:
            advance(amount)

    digest = sha256_of(root / name, count)
    return FileEntry(path=name, size=size, sha256=digest)


def sync_path(path: Path) -> None:
    """Make a file or a directory's entries reach the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Remove a directory and everything in it, as far as the system allows."""
    shutil.rmtree(path, ignore_errors=True)


def exchange_directories(new: Path, destination: Path, aside: Path) -> None:
    """Put `new` at `destination` and what was there at `aside`.

    On Linux this is one atomic step. Elsewhere there are two renames; if the second one fails the
    first is undone, and if the process dies in between, `clean_stale_builds` puts the old
    directory back.

    Raises:
        OutputError: the directories could not be renamed.
    """
    try:
        if _exchange_atomically(new, destination):
            new.rename(aside)
            return
        try:
            destination.rename(aside)
            new.rename(destination)
        except BaseException:
            if aside.exists() and not destination.exists():
                aside.rename(destination)
            raise
    except OSError as error:
        raise OutputError(f"cannot replace {destination}: {error.strerror}") from error


def _exchange_atomically(first: Path, second: Path) -> bool:
    """Exchange two directories with renameat2; False where the system cannot."""
    with contextlib.suppress(OSError, AttributeError):
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
        result: int = renameat2(
            _AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE
        )
        return result == 0
    return False
