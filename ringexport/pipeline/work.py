"""A folder beside an output where long stages keep what they finished, for the next run only."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from ringexport.bundle.files import BuildLock, find_stale_builds, remove_tree
from ringexport.checkpoint import CheckpointWeights
from ringexport.errors import OutputError
from ringexport.progress import Progress
from ringexport.version import __version__

__all__ = ["WORK_KIND", "WorkFolder", "remove_stale_work", "source_state"]

WORK_KIND = "work"
_KEY_CHARACTERS = 16


class WorkFolder:
    """A folder whose name holds the digest of everything that its contents depend on.

    Use it as a context manager. It is gone after success and after an error; after an interrupt
    or a kill it stays, and only a run with the same inputs finds it again. Other inputs, or a
    source that changed, mean another name, so nothing stale is ever used; what dead runs towards
    the same output left under other names is removed.

    Args:
        destination: of the output.
        inputs: everything that the contents depend on; JSON.
        progress: told where the folder is when an interrupt leaves it there.

    Raises:
        OutputError: on entering, the folder cannot be made, or another process is at work in it.
    """

    def __init__(self, destination: Path, inputs: Mapping[str, object], progress: Progress) -> None:
        self._progress = progress
        text = json.dumps({"version": __version__, **inputs}, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        self._destination = Path(os.path.abspath(destination))  # noqa: PTH100 (keeps links)
        name = f"{self._destination.name}.{WORK_KIND}-{key[:_KEY_CHARACTERS]}"
        self.path = self._destination.with_name(name)
        self._lock: BuildLock | None = None

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            remove_stale_work(self._destination, keep=self.path)
            self.path.mkdir(exist_ok=True)
            self._lock = BuildLock(self.path)
        except BlockingIOError as failure:
            raise OutputError(
                f"another process is writing {self._destination}",
                hint="wait for it, or choose another -o",
            ) from failure
        except OSError as failure:
            raise OutputError(
                f"cannot write {self.path}: {failure.strerror or failure}",
                hint="choose an output that this user may write, with -o",
            ) from failure
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        if self._lock is not None:
            self._lock.release(keep_file=True)
        if interrupted:
            self._progress.note(
                f"what was finished is kept in {self.path}; the same command continues it"
            )
        else:
            remove_tree(self.path)


def remove_stale_work(destination: Path, *, keep: Path | None = None) -> None:
    """Remove the work folders of dead runs towards `destination`, but for `keep`."""
    parent = Path(os.path.abspath(destination)).parent  # noqa: PTH100 (keeps links)
    for path in find_stale_builds(parent, destination.name, kinds=(WORK_KIND,)):
        if path != keep:
            remove_tree(path)


def source_state(weights: CheckpointWeights) -> dict[str, object]:
    """Return what tells one state of a checkpoint from another, without reading the weights.

    Files count by name, size and time of change, config.json by its contents.
    """
    names = ("tokenizer.json", "tokenizer_config.json")
    files = [*weights.files(), *(weights.path / name for name in names)]
    states = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in files
        if path.is_file()
    ]
    config = (weights.path / "config.json").read_bytes()
    return {
        "path": str(weights.path.resolve()),
        "files": states,
        "config": hashlib.sha256(config).hexdigest(),
    }
