"""Files that nobody vouches for: inside their folder, regular, of bounded size; and digests."""

import hashlib
import stat
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

from ringexport.errors import OutputError, RingExportError

__all__ = [
    "check_writable",
    "file_exists",
    "is_truncated_library",
    "read_regular",
    "resolve_inside",
    "sha256_of",
]

_CHUNK_BYTES = 4 << 20
_ELF_64 = b"\x7fELF\x02"
_ELF_HEADER_BYTES = 64


def resolve_inside(directory: Path, name: str, *, error: type[RingExportError]) -> Path:
    """Return the path of file `name` in `directory`; links may not lead out of it.

    The one exception is the Hugging Face cache, whose ``models--*/snapshots/REVISION`` folders link
    to the ``blobs`` folder beside ``snapshots``.

    Args:
        directory: the folder.
        name: a plain file name.
        error: the class to raise.

    Raises:
        error: a path instead of a name, a missing file, or a link that leads elsewhere.
    """
    if name != Path(name).name or name in {"", ".", ".."} or "\0" in name or "\\" in name:
        raise error(
            f"{directory} names the file {name[:80]!r}, expected a plain file name",
            hint="files outside the checkpoint's folder are never read",
        )
    path = directory / name
    try:
        target = path.resolve(strict=True)
        root = directory.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as failure:  # also: link loops, odd characters
        raise error(
            f"{directory} has no file {name[:80]!r}", hint="download the whole checkpoint"
        ) from failure
    allowed = [root]
    cache = root.parent.parent
    if root.parent.name == "snapshots" and cache.name.startswith("models--"):
        allowed.append(cache / "blobs")
    if target.parent not in allowed:
        raise error(
            f"{path} is a link to {target}, outside the checkpoint's folder",
            hint="copy the file into the folder",
        )
    return path


def file_exists(path: Path) -> bool:
    """Say whether there is anything of this name, a dangling link included."""
    return path.is_symlink() or path.exists()


def check_writable(path: Path) -> None:
    """Find out before long work whether a file can be written; nothing is left behind.

    Raises:
        OutputError: a folder, or a folder around it that is missing or closed.
    """
    hint = "give a file in a folder that exists and that this user may write"
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder", hint=hint)
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as failure:
        raise OutputError(
            f"cannot write {path}: {(failure.strerror or str(failure)).lower()}", hint=hint
        ) from failure


def read_regular(path: Path, *, limit_bytes: int, error: type[RingExportError]) -> bytes:
    """Return the content of a regular file.

    Args:
        path: the file; a pipe, device or folder is refused instead of waited for.
        limit_bytes: a larger file is refused unread.
        error: the class to raise.

    Raises:
        error: a file that is not regular, too large, or unreadable.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path} is not a regular file")
        if status.st_size > limit_bytes:
            raise error(f"{path} has {status.st_size:,} bytes, expected at most {limit_bytes:,}")
        return path.read_bytes()
    except OSError as failure:
        raise error(f"cannot read {path}: {failure.strerror or failure}") from failure


def is_truncated_library(path: Path) -> bool:
    """Say whether a shared library ends before its sections do; loading it would end the process.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        header = file.read(_ELF_HEADER_BYTES)
    if len(header) < _ELF_HEADER_BYTES or not header.startswith(_ELF_64):
        return False  # the loader says what it is instead
    (offset,) = struct.unpack_from("<Q", header, 40)  # e_shoff
    entry_bytes, count = struct.unpack_from("<HH", header, 58)  # e_shentsize, e_shnum
    return bool(offset + entry_bytes * count > path.stat().st_size)


def sha256_of(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """Return SHA-256 of a file's content, hexadecimal.

    Args:
        path: the file.
        advance: called with the number of bytes after each piece.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if advance is not None:
                advance(count)
    return digest.hexdigest()
