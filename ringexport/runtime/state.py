"""The explicit decode state: what a runner remembers of the tokens that it has seen.

A state belongs to the runner that made it and lives in that runner's memory. A `StateSnapshot`
is the same content as numpy arrays in one layout for all backends, so that a state can be kept,
compared, saved to a file and restored, bit for bit.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from ringexport.errors import ShapeError
from ringexport.runtime.snapshot import (
    Array,
    StateFile,
    StateLayout,
    StateSnapshot,
    check_snapshot,
    read_state_file,
    write_state_file,
    zero_unused,
)

__all__ = [
    "BaseState",
    "DecodeState",
    "StateFile",
    "StateLayout",
    "StateSnapshot",
    "check_snapshot",
    "read_state_file",
    "write_state_file",
    "zero_unused",
]


class DecodeState(Protocol):
    """What every backend's state offers; see `BaseState` for the common part."""

    @property
    def position(self) -> npt.NDArray[np.int64]:
        """[B] int64: tokens that each row has seen."""

    @property
    def batch(self) -> int:
        """Number of rows."""

    @property
    def nbytes(self) -> int:
        """Bytes held in the backend's memory."""

    def snapshot(self) -> StateSnapshot:
        """Copy the content."""

    def restore(self, snapshot: StateSnapshot) -> None:
        """Take over the content of `snapshot`, which must have as many rows."""

    def snapshot_rows(self, rows: Sequence[int], *, start: int = 0) -> StateSnapshot:
        """Copy the content of `rows`, with keys and values from token `start` on."""

    def restore_rows(self, rows: Sequence[int], snapshot: StateSnapshot) -> None:
        """Take over `snapshot` in `rows`; the other rows keep what they have."""

    def copy_rows(
        self, rows: Sequence[int], source: "DecodeState", source_rows: Sequence[int]
    ) -> None:
        """Take over `source_rows` of a state of the same runner, which may be this one."""

    def move_rows(
        self, rows: Sequence[int], source: "DecodeState", source_rows: Sequence[int]
    ) -> None:
        """Take over rows like `copy_rows`; what `source_rows` hold afterwards is not defined."""

    def reset(self, rows: Sequence[int]) -> None:
        """Make `rows` as empty as those of a new state."""

    def fork(self, rows: Sequence[int] | None = None) -> Self:
        """Return an independent copy, of all rows or of `rows` in their order."""

    def save(self, path: Path) -> None:
        """Write the content to a file."""

    def load(self, path: Path) -> None:
        """Take over the content of a file that `save` wrote."""


class BaseState(ABC):
    """The part of a state that does not depend on the backend.

    Attributes:
        owner: the runner that made it; other runners refuse it.
        position: [B] int64, tokens that each row has seen. Read it; runners advance it.
    """

    def __init__(
        self, owner: object, layout: StateLayout, batch: int, *, context_length: int
    ) -> None:
        self.owner = owner
        self.layout = layout
        self.context_length = context_length
        self.position: npt.NDArray[np.int64] = np.zeros(batch, dtype=np.int64)

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.position)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held in the backend's memory."""

    def snapshot(self) -> StateSnapshot:
        """Copy the content to numpy arrays."""
        return self.snapshot_rows(range(self.batch))

    def snapshot_rows(self, rows: Sequence[int], *, start: int = 0) -> StateSnapshot:
        """Copy the content of `rows`, in their order, to numpy arrays.

        Args:
            rows: they may repeat.
            start: leave out keys and values of the tokens before this one.

        Raises:
            ShapeError: a row that does not exist, no rows, or a start beyond what they hold.
        """
        chosen = self._existing(rows)
        position = self.position[chosen]
        used = int(position.max())
        if not 0 <= start <= used:
            raise ShapeError(f"token {start} is not among the {used} that the rows hold")
        tensors = dict(self._read_rows(chosen, slice(start, used)))
        for name, array in tensors.items():
            if name.startswith("kv_cache."):
                zero_unused(array, np.maximum(position - start, 0))
        return StateSnapshot(position=position, tensors=tensors, start=start)

    def restore(self, snapshot: StateSnapshot) -> None:
        """Take over the content of `snapshot`, bit for bit; the snapshot is not kept.

        Raises:
            ShapeError: another number of rows, or tensors that do not fit the model.
            ContextLengthError: a position beyond the context.
        """
        if snapshot.batch != self.batch:
            raise ShapeError(
                f"the snapshot has {snapshot.batch} rows, the state {self.batch}",
                hint="restore into a state with as many rows",
            )
        self.restore_rows(range(self.batch), snapshot)

    def restore_rows(self, rows: Sequence[int], snapshot: StateSnapshot) -> None:
        """Take over `snapshot` in `rows`, bit for bit; the other rows keep what they have.

        Raises:
            ShapeError: a row that does not exist or comes twice, another number of rows, or
                tensors that do not fit the model.
            ContextLengthError: a position beyond the context.
        """
        chosen = self._targets(rows, snapshot.batch)
        check_snapshot(snapshot, self.layout, context_length=self.context_length)
        self._write_rows(chosen, snapshot)
        self.position[chosen] = snapshot.position

    def copy_rows(
        self, rows: Sequence[int], source: DecodeState, source_rows: Sequence[int]
    ) -> None:
        """Take over `source_rows` of a state of the same runner, bit for bit.

        Args:
            rows: of this state.
            source: may be this state, if no row is both read and written.
            source_rows: one for each of `rows`.

        Raises:
            ShapeError: a row that does not exist or comes twice, or a state of another runner.
        """
        other, chosen, origin = self._pairs(rows, source, source_rows)
        self._copy_rows(chosen, other, origin)
        self.position[chosen] = other.position[origin]

    def move_rows(
        self, rows: Sequence[int], source: DecodeState, source_rows: Sequence[int]
    ) -> None:
        """Take over rows like `copy_rows`, without a copy where the backend can.

        What `source_rows` hold afterwards is not defined: reset them before they are used again.

        Raises:
            ShapeError: as `copy_rows`.
        """
        other, chosen, origin = self._pairs(rows, source, source_rows)
        self._move_rows(chosen, other, origin)
        self.position[chosen] = other.position[origin]

    def reset(self, rows: Sequence[int]) -> None:
        """Make `rows` as empty as those of a new state.

        Raises:
            ShapeError: a row that does not exist, or no rows.
        """
        chosen = self._existing(rows)
        self._clear_rows(chosen)
        self.position[chosen] = 0

    def fork(self, rows: Sequence[int] | None = None) -> Self:
        """Return an independent copy, of all rows or of `rows` in their order.

        Raises:
            ShapeError: a row that does not exist, or no rows.
        """
        return self._fork(self._existing(range(self.batch) if rows is None else rows))

    def _existing(self, rows: Sequence[int]) -> list[int]:
        """Check that there are rows and that they exist."""
        chosen = [int(row) for row in rows]
        for row in chosen:
            if not 0 <= row < self.batch:
                raise ShapeError(f"row {row} of a state with {self.batch} rows does not exist")
        if not chosen:
            raise ShapeError("a state needs at least one row")
        return chosen

    def _pairs(
        self, rows: Sequence[int], source: DecodeState, source_rows: Sequence[int]
    ) -> tuple[Self, list[int], list[int]]:
        """Check what `copy_rows` is given."""
        if not isinstance(source, type(self)) or source.owner is not self.owner:
            raise ShapeError("the rows are of a state of another runner")
        origin = source._existing(source_rows)  # noqa: SLF001 - a state like this one
        chosen = self._targets(rows, len(origin))
        if source is self and set(chosen) & set(origin):
            raise ShapeError(f"the rows {origin} and {chosen} of one state overlap")
        return source, chosen, origin

    def _targets(self, rows: Sequence[int], count: int) -> list[int]:
        """Check that `count` rows can be written to these."""
        chosen = self._existing(rows)
        if count != len(chosen) or len(set(chosen)) != len(chosen):
            raise ShapeError(f"{count} rows were to be written to the rows {chosen}")
        return chosen

    @abstractmethod
    def _read_rows(self, rows: list[int], tokens: slice) -> dict[str, Array]:
        """Copy existing rows, under the names of `StateLayout.shapes`.

        Args:
            rows: in this order.
            tokens: which keys and values; what lies beyond a row's position does not matter.
        """

    @abstractmethod
    def _write_rows(self, rows: list[int], snapshot: StateSnapshot) -> None:
        """Copy a checked snapshot to existing rows; the caller sets their position afterwards."""

    def _copy_rows(self, rows: list[int], source: Self, source_rows: list[int]) -> None:
        """Copy rows that exist and do not overlap; a backend can override it to stay on its device.

        The caller sets their position afterwards.
        """
        self._write_rows(rows, source.snapshot_rows(source_rows))

    def _move_rows(self, rows: list[int], source: Self, source_rows: list[int]) -> None:
        """Take over rows that exist and do not overlap; a backend can override it to copy nothing.

        The caller sets their position afterwards.
        """
        self._copy_rows(rows, source, source_rows)

    def _clear_rows(self, rows: list[int]) -> None:
        """Make existing rows empty; a backend can override it to stay on its device.

        The caller sets their position afterwards.
        """
        position = np.zeros(len(rows), dtype=np.int64)
        shapes = self.layout.shapes(len(rows), 0)
        tensors = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
        self._write_rows(rows, StateSnapshot(position=position, tensors=tensors))

    @abstractmethod
    def _fork(self, rows: list[int]) -> Self:
        """Copy existing rows into a new state."""

    @property
    @abstractmethod
    def model_digest(self) -> str:
        """What a state file must carry to fit this state: names weights and decay."""

    def save(self, path: Path) -> None:
        """Write the content to a safetensors file, which replaces an existing one at once.

        Raises:
            OutputError: the file cannot be written; an existing one is untouched.
        """
        write_state_file(path, self.snapshot(), model_digest=self.model_digest)

    def load(self, path: Path) -> None:
        """Take over the content of a file that `save` wrote, bit for bit.

        Raises:
            BundleError: the file cannot be read or is damaged.
            VersionError: it is in a newer format.
            DigestError: it belongs to another model.
            ShapeError: it has another number of rows, or does not fit the model.
        """
        self.restore(read_state_file(path, model_digest=self.model_digest).snapshot)
