"""The directory that a quantized checkpoint grows in: found again after a kill, published whole.

It lies beside the destination and its name holds the digest of everything that the output depends
on, so what an interrupted run finished is used again only by a run that would write the same.
"""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from ringexport.bundle.files import (
    LOCK_NAME,
    BuildLock,
    check_place,
    exchange_directories,
    find_stale_builds,
    remove_tree,
    sync_path,
    walk_files,
)
from ringexport.checkpoint.state_format import REPORT_NAME
from ringexport.errors import OutputError

__all__ = ["REPORT_NAME", "WorkDirectory", "check_output"]

"""Marks a directory as written by `ringexport quantize`, which may replace it."""

FORMAT = "ringexport-quantized-checkpoint"
_KEY_CHARACTERS = 16


class WorkDirectory:
    """Files under construction. `open` it, write, then `publish`, or `discard`.

    Attributes:
        path: where files are written.
        destination: where they are to be.
    """

    def __init__(self, destination: Path, key: str) -> None:
        self.destination = Path(os.path.abspath(destination))  # noqa: PTH100 (keeps links)
        name = f"{self.destination.name}.tmp-{key[:_KEY_CHARACTERS]}"
        self.path = self.destination.with_name(name)
        self._lock: BuildLock | None = None

    def open(self, expected_bytes: int) -> None:
        """Create the directory, or take over the one that a dead run of the same work left.

        What dead runs of other work towards the same destination left is removed.

        Args:
            expected_bytes: size of the finished output, to refuse a disk that is too small.

        Raises:
            OutputError: another run is at it, the disk is too small, or the directory cannot be
                written.
        """
        check_output(self.destination)
        try:
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            for stale in find_stale_builds(self.destination.parent, self.destination.name):
                if stale != self.path:
                    remove_tree(stale)
            self.path.mkdir(exist_ok=True)
            self._take_lock()
            done = sum((self.path / name).stat().st_size for name in walk_files(self.path))
            free = shutil.disk_usage(self.path).free
        except OSError as failure:
            raise _cannot_write(self.destination, failure) from failure
        if free + done < expected_bytes:
            self.discard()
            raise OutputError(
                f"not enough space at {self.destination.parent}: the quantized checkpoint needs "
                f"{expected_bytes:,} bytes, {free + done:,} are free",
                hint="free some space, or write to another disk with -o",
            )

    def find_part(self, name: str, size_bytes: int) -> dict[str, Any] | None:
        """Return what `finish_part` noted about the file `name`, None if it is not complete."""
        try:
            note = json.loads(self._note(name).read_text(encoding="utf-8"))
            complete = (self.path / name).stat().st_size == size_bytes
        except (OSError, ValueError):
            return None
        return note if complete and isinstance(note, dict) else None

    def unfinished(self, name: str) -> Path:
        """Return where to write the file `name` before `finish_part`."""
        return self.path / f".{name}.part"

    def finish_part(self, name: str, note: dict[str, Any]) -> None:
        """Make the file written to `unfinished(name)` a complete one; it must be synced.

        Args:
            name: of the file.
            note: what a later run needs to know about it; JSON.
        """
        self.unfinished(name).rename(self.path / name)
        temporary = self.unfinished(f"{name}.note")
        temporary.write_text(json.dumps(note), encoding="utf-8")
        sync_path(temporary)
        temporary.rename(self._note(name))
        sync_path(self.path)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file in the form that Hugging Face tools use, and sync it."""
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        (self.path / name).write_text(text, encoding="utf-8", newline="\n")
        sync_path(self.path / name)

    def remove_notes(self) -> None:
        """Remove everything that is not part of the output, except the lock."""
        for path in self.path.glob(".*"):
            if path.name != LOCK_NAME:
                path.unlink()

    def publish(self) -> None:
        """Put the directory at the destination; what was there is replaced in one step.

        Raises:
            OutputError: the destination holds something else by now, or cannot be replaced.
        """
        check_output(self.destination)
        sync_path(self.path)
        self._release()
        try:
            if self.destination.exists():
                aside = self.destination.with_name(
                    f"{self.destination.name}.old-{uuid.uuid4().hex[:12]}"
                )
                exchange_directories(self.path, self.destination, aside)
                remove_tree(aside)
            else:
                self.path.rename(self.destination)
            sync_path(self.destination.parent)
        except OSError as failure:
            raise _cannot_write(self.destination, failure) from failure

    def discard(self) -> None:
        """Remove the directory and everything in it."""
        self._release()
        remove_tree(self.path)

    def keep(self) -> None:
        """Leave the directory for a later run of the same work; harmless after `publish`."""
        if self._lock is not None:
            self._lock.release(keep_file=True)
            self._lock = None

    def translate(self, failure: OSError) -> OutputError:
        """Say what an operating system error means for the output."""
        return _cannot_write(self.destination, failure)

    def _take_lock(self) -> None:
        try:
            self._lock = BuildLock(self.path)
        except BlockingIOError as failure:
            raise OutputError(
                f"another process is writing {self.destination}",
                hint="wait for it, or choose another -o",
            ) from failure

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _note(self, name: str) -> Path:
        return self.path / f".{name}.json"


def check_output(destination: Path) -> None:
    """Refuse a destination that holds anything but an earlier output of `ringexport quantize`.

    Raises:
        OutputError: a file, a link, another directory, one with files that are not its own, or a
            place that `check_place` refuses.
    """
    check_place(destination)
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise OutputError(
            f"{destination} is not a directory, a checkpoint is one", hint="choose another -o"
        )
    try:
        names = [name for name in walk_files(destination) if not name.startswith(".")]
        if not names:
            return
        report = json.loads((destination / REPORT_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        report = None
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise OutputError(
            f"{destination} exists and was not written by ringexport quantize; it is left alone",
            hint="choose another -o, or remove that directory yourself",
        )
    known = {REPORT_NAME, *map(str, report.get("files") or [])}
    strangers = [name for name in names if name not in known]
    if strangers:
        raise OutputError(
            f"{destination} holds {len(strangers)} file(s) that are not part of it, such as "
            f"{strangers[0]}; replacing it would lose them",
            hint="move them elsewhere, or choose another -o",
        )


def _cannot_write(destination: Path, failure: OSError) -> OutputError:
    return OutputError(
        f"cannot write {failure.filename or destination}: {failure.strerror or failure}",
        hint="free some space, or choose another output with -o",
    )
