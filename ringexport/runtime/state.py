"""The explicit decode state: what a runner remembers of the tokens that it has seen.

A state belongs to the runner that made it and lives in that runner's memory. A `StateSnapshot`
is the same content as numpy arrays in one layout for all backends, so that a state can be kept,
compared, saved to a file and restored, bit for bit.
"""

import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as safetensors_bytes

from ringexport.errors import (
    BundleError,
    ContextLengthError,
    DigestError,
    OutputError,
    ShapeError,
    VersionError,
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

STATE_FORMAT = "ringexport-state"
STATE_FORMAT_VERSION = 1
REBUILD_HINT = "run the prompt again and save the state anew"

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateLayout:
    """Sizes of the state of one row.

    Attributes:
        recurrent: linear layer -> (H, K, V).
        kv_cache: softmax layer -> (Hkv, D); the number of tokens comes between them.
    """

    recurrent: Mapping[int, tuple[int, int, int]]
    kv_cache: Mapping[int, tuple[int, int]]

    def shapes(self, batch: int, tokens: int) -> dict[str, tuple[int, ...]]:
        """Return tensor name -> shape of a snapshot of `batch` rows with `tokens` cached tokens."""
        shapes: dict[str, tuple[int, ...]] = {
            f"recurrent_state.{layer}": (batch, *sizes) for layer, sizes in self.recurrent.items()
        }
        for layer, (heads, size) in self.kv_cache.items():
            for part in ("key", "value"):
                shapes[f"kv_cache.{layer}.{part}"] = (batch, heads, tokens, size)
        return shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSnapshot:
    """A copy of a state.

    Attributes:
        position: [B] int64, tokens that each row has seen.
        tensors: name -> array as `StateLayout.shapes(B, max(position))` says. Cached keys and
            values beyond a row's own position are zero, so equal states give equal bytes.
    """

    position: npt.NDArray[np.int64]
    tensors: Mapping[str, Array]

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.position)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.position.nbytes + sum(array.nbytes for array in self.tensors.values())

    def rows(self, rows: Sequence[int]) -> "StateSnapshot":
        """Return a snapshot of some rows, in the given order; rows may repeat."""
        index = np.asarray(rows, dtype=np.int64)
        position = self.position[index]
        used = int(position.max(initial=0))
        tensors = {
            name: array[index, :, :used] if name.startswith("kv_cache.") else array[index]
            for name, array in self.tensors.items()
        }
        return StateSnapshot(position=position, tensors=tensors)


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

    @abstractmethod
    def snapshot(self) -> StateSnapshot:
        """Copy the content to numpy arrays."""

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
        check_snapshot(snapshot, self.layout, context_length=self.context_length)
        self._restore(snapshot)
        self.position[:] = snapshot.position

    @abstractmethod
    def _restore(self, snapshot: StateSnapshot) -> None:
        """Copy the tensors of a checked snapshot; `restore` sets the position afterwards."""

    def fork(self, rows: Sequence[int] | None = None) -> Self:
        """Return an independent copy, of all rows or of `rows` in their order.

        Raises:
            ShapeError: a row that does not exist, or no rows.
        """
        chosen = list(range(self.batch)) if rows is None else [int(row) for row in rows]
        for row in chosen:
            if not 0 <= row < self.batch:
                raise ShapeError(f"row {row} of a state with {self.batch} rows does not exist")
        if not chosen:
            raise ShapeError("a state needs at least one row")
        return self._fork(chosen)

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


def check_snapshot(snapshot: StateSnapshot, layout: StateLayout, *, context_length: int) -> None:
    """Check that `snapshot` fits the model.

    Raises:
        ShapeError: missing, unknown or wrongly shaped tensors.
        ContextLengthError: a position outside 0..context_length.
    """
    position = snapshot.position
    for row in range(snapshot.batch):
        if not 0 <= position[row] <= context_length:
            raise ContextLengthError(
                f"row {row} of the snapshot is at position {position[row]},"
                f" expected 0 to {context_length}"
            )
    shapes = layout.shapes(snapshot.batch, int(position.max(initial=0)))
    different = sorted(shapes.keys() ^ snapshot.tensors.keys())
    if different:
        raise ShapeError(
            f"the snapshot does not fit the model: tensor {different[0]!r} is only in one of them"
        )
    for name, shape in shapes.items():
        array = snapshot.tensors[name]
        if array.shape != shape or not np.issubdtype(array.dtype, np.floating):
            raise ShapeError(
                f"{name} of the snapshot is {array.dtype} {list(array.shape)},"
                f" expected floating point {list(shape)}"
            )


def zero_unused(array: Array, position: npt.NDArray[np.int64]) -> Array:
    """Zero, in place, what lies beyond each row's position in a cache [B, Hkv, S, D]."""
    for row, used in enumerate(position):
        array[row, :, int(used) :] = 0
    return array


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFile:
    """What a state file holds.

    Attributes:
        snapshot: the state.
        note: a text of whoever saved it; a session keeps its tokens there.
    """

    snapshot: StateSnapshot
    note: str = ""


def write_state_file(
    path: Path, snapshot: StateSnapshot, *, model_digest: str, note: str = ""
) -> None:
    """Write `snapshot` to `path`: beside it first, then renamed over it.

    Args:
        path: of the safetensors file.
        snapshot: the content.
        model_digest: names the model that the state fits.
        note: see `StateFile`.

    Raises:
        OutputError: the file cannot be written; an existing one is untouched.
    """
    path = Path(path)
    metadata = {
        "format": STATE_FORMAT,
        "format_version": str(STATE_FORMAT_VERSION),
        "model_digest": model_digest,
        "note": note,
    }
    tensors = {"position": snapshot.position} | dict(snapshot.tensors)
    content = safetensors_bytes(
        {name: np.ascontiguousarray(array) for name, array in tensors.items()}, metadata=metadata
    )
    partial = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        try:
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"the state cannot be written to {path}: {error.strerror or error}",
            hint="choose a folder that exists, is writable and has room",
        ) from error


def read_state_file(path: Path, *, model_digest: str) -> StateFile:
    """Read a file that `write_state_file` wrote.

    Raises:
        BundleError: the file is missing, damaged, or no state file.
        VersionError: it is in a newer format.
        DigestError: its model digest is not `model_digest`.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            _check_metadata(path, metadata, model_digest)
            tensors: dict[str, Array] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise BundleError(
            f"the state file {path} cannot be read: {reason}", hint=REBUILD_HINT
        ) from error
    position = tensors.pop("position", None)
    if position is None or position.dtype != np.int64 or position.ndim != 1:
        raise BundleError(f"the state file {path} has no usable position", hint=REBUILD_HINT)
    snapshot = StateSnapshot(position=position, tensors=tensors)
    return StateFile(snapshot=snapshot, note=metadata.get("note", ""))


def _check_metadata(path: Path, metadata: Mapping[str, str], model_digest: str) -> None:
    """Check format, version and model of a state file."""
    if metadata.get("format") != STATE_FORMAT:
        raise BundleError(f"{path} is no state file of ringexport", hint=REBUILD_HINT)
    version = metadata.get("format_version", "")
    if version != str(STATE_FORMAT_VERSION):
        raise VersionError(
            f"{path} is in state format {version!r}, this version reads {STATE_FORMAT_VERSION}",
            hint="upgrade ringexport, or " + REBUILD_HINT,
        )
    found = metadata.get("model_digest", "")
    if found != model_digest:
        raise DigestError(
            f"{path} was saved with another model: its digest is {found[:16]}...,"
            f" this model's {model_digest[:16]}...",
            hint="open the bundle that saved it, or " + REBUILD_HINT,
        )
