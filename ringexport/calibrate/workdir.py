"""What an interrupted calibration leaves behind, for the next run with the same inputs only."""

import json
import os
import shutil
from pathlib import Path
from types import ModuleType

import safetensors
import safetensors.torch
from torch import Tensor

from ringexport.errors import CalibrationError, OutputError
from ringexport.stats import CalibrationStats

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows: two runs at once are the user's affair there
    fcntl = None

__all__ = ["WorkStore"]

_PREFIX = "calibrate-"
_LOCK = ".running"
_KEY_DIGITS = 32
_TEMPORARY = ".tmp"


class WorkStore:
    """Stats of each finished layer and the activations after the last one, on disk.

    A file is there completely or not at all, whenever the process is killed: it is written under
    another name, synced and renamed. The stats of a layer come first, so the activations after
    layer i mean that the stats of all layers up to i are there.

    Args:
        parent: where the directory of this calibration is made; its name holds `key`.
        key: digest of everything that the stats depend on, hexadecimal.

    Raises:
        OutputError: it cannot be made, or another process is at work in it.
    """

    def __init__(self, parent: Path, key: str) -> None:
        self.path = parent / f"{_PREFIX}{key[:_KEY_DIGITS]}"
        self._key = key
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / _LOCK).open("w")
        except OSError as failure:
            raise OutputError(
                f"cannot use the work directory {self.path}: {failure.strerror}"
            ) from failure
        try:
            if fcntl is not None:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as failure:
            self._lock.close()
            raise OutputError(
                f"another calibration is at work in {self.path}",
                hint="wait for it, or choose another work directory",
            ) from failure
        for leftover in self.path.glob("*" + _TEMPORARY + "*"):
            leftover.unlink()

    def close(self) -> None:
        """Let others use the directory, which stays."""
        self._lock.close()

    def discard(self) -> None:
        """Remove the directory with everything in it.

        The activations go first: a kill must not leave them without the stats before them.
        """
        for path in self.path.glob("hidden-*.st"):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def save(self, layer: int, stats: CalibrationStats, hidden: Tensor) -> None:
        """Keep what is known after a layer.

        Args:
            layer: index.
            stats: of this layer alone.
            hidden: [N, D] on the CPU, the residual stream after it.

        Raises:
            OutputError: the disk is full, or the like.
        """
        stats.save(self._stats_path(layer))
        path = self._hidden_path(layer)
        temporary = path.with_name(path.name + _TEMPORARY)
        try:
            safetensors.torch.save_file({"hidden": hidden}, temporary, {"key": self._key})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as failure:
            raise OutputError(f"cannot write {path}: {failure.strerror or failure}") from failure
        self._hidden_path(layer - 1).unlink(missing_ok=True)

    def finished_layers(self) -> int:
        """Return how many layers need not be run again."""
        known = [int(path.stem.removeprefix("hidden-")) for path in self.path.glob("hidden-*.st")]
        return max(known, default=-1) + 1

    def load_hidden(self, layer: int) -> Tensor:
        """Return the residual stream after `layer`.

        Raises:
            CalibrationError: the file is damaged.
        """
        path = self._hidden_path(layer)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("key") != self._key:
                    raise CalibrationError(f"{path} is of another calibration", hint=self._hint())
                hidden: Tensor = file.get_tensor("hidden").clone()
        except (OSError, safetensors.SafetensorError) as failure:
            raise CalibrationError(
                f"cannot read {path}: {failure!s:.200}", hint=self._hint()
            ) from failure
        return hidden

    def load_stats(self, layer: int) -> CalibrationStats:
        """Return the stats of `layer` alone.

        Raises:
            CalibrationError: the file is damaged.
        """
        return CalibrationStats.load(self._stats_path(layer))

    def _hint(self) -> str:
        return f"remove {json.dumps(str(self.path))} and calibrate again"

    def _stats_path(self, layer: int) -> Path:
        return self.path / f"stats-{layer:04d}.st"

    def _hidden_path(self, layer: int) -> Path:
        return self.path / f"hidden-{layer:04d}.st"
