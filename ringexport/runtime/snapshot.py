"""The content of a decode state as numpy arrays, in one layout for all backends, and its file."""

import os
import uuid
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    "Array",
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
METADATA_KEYS = {"format", "format_version", "model_digest", "note", "checksum"}
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
        tensors: name -> array as `StateLayout.shapes(B, max(position) - start)` says. Cached keys
            and values beyond a row's own position are zero, so equal states give equal bytes.
        start: the first token whose keys and values are here. A part that does not begin at 0
            can be kept, and `joined` to those before it.
    """

    position: npt.NDArray[np.int64]
    tensors: Mapping[str, Array]
    start: int = 0

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
        used = max(int(position.max(initial=0)) - self.start, 0)
        tensors = {
            name: array[index, :, :used] if name.startswith("kv_cache.") else array[index]
            for name, array in self.tensors.items()
        }
        return StateSnapshot(position=position, tensors=tensors, start=self.start)

    @classmethod
    def joined(cls, parts: "Sequence[StateSnapshot]") -> "StateSnapshot":
        """Return the snapshot whose caches are those of all parts, one after the other.

        Args:
            parts: of the same rows, which all hold the same number of tokens; each part begins
                where the one before it ends, the first at 0.

        Raises:
            ShapeError: parts that do not follow each other.
        """
        ends = [0, *(int(part.position.max(initial=0)) for part in parts)]
        if not parts or [part.start for part in parts] != ends[:-1]:
            raise ShapeError("the parts of a snapshot do not follow each other from token 0")
        tensors = {
            name: np.concatenate([part.tensors[name] for part in parts], axis=2)
            if name.startswith("kv_cache.")
            else array
            for name, array in parts[-1].tensors.items()
        }
        return cls(position=parts[-1].position, tensors=tensors)


def check_snapshot(snapshot: StateSnapshot, layout: StateLayout, *, context_length: int) -> None:
    """Check that `snapshot` fits the model.

    Raises:
        ShapeError: missing, unknown or wrongly shaped tensors, or only a part.
        ContextLengthError: a position outside 0..context_length.
    """
    position = snapshot.position
    if snapshot.start != 0:
        raise ShapeError(f"the snapshot begins at token {snapshot.start}, it is only a part")
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
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    metadata["checksum"] = _checksum(tensors, note)
    content = safetensors_bytes(tensors, metadata=metadata)
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

    What it holds is compared with the checksum in it. Files of before there was one are still read.

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
    note, checksum = metadata.get("note", ""), metadata.get("checksum")
    if checksum is not None and checksum != _checksum(tensors, note):
        raise BundleError(
            f"the state file {path} is damaged: its content does not match its checksum",
            hint="copy it again from where it was saved, or " + REBUILD_HINT,
        )
    position = tensors.pop("position", None)
    if position is None or position.dtype != np.int64 or position.ndim != 1:
        raise BundleError(f"the state file {path} has no usable position", hint=REBUILD_HINT)
    snapshot = StateSnapshot(position=position, tensors=tensors)
    return StateFile(snapshot=snapshot, note=note)


def _checksum(tensors: Mapping[str, Array], note: str) -> str:
    """Return the CRC-32 of tensors, their names, dtypes and shapes, and the note, in hex.

    It finds what disks and copies have damaged, at the speed of memory; whoever means to can write
    a new one.
    """
    found = zlib.crc32(note.encode())
    for name, array in sorted(tensors.items()):
        found = zlib.crc32(f"\n{name} {array.dtype.str} {array.shape}\n".encode(), found)
        found = zlib.crc32(array.data, found)
    return f"{found:08x}"


def _check_metadata(path: Path, metadata: Mapping[str, str], model_digest: str) -> None:
    """Check format, version and model of a state file, and that it says nothing else."""
    if metadata.get("format") != STATE_FORMAT:
        raise BundleError(f"{path} is no state file of ringexport", hint=REBUILD_HINT)
    version = metadata.get("format_version", "")
    if version != str(STATE_FORMAT_VERSION):
        raise VersionError(
            f"{path} is in state format {version!r}, this version reads {STATE_FORMAT_VERSION}",
            hint="upgrade ringexport, or " + REBUILD_HINT,
        )
    unknown = sorted(metadata.keys() - METADATA_KEYS)
    if unknown:  # the name of the checksum may be what is damaged
        raise BundleError(
            f"the state file {path} holds the unknown key {unknown[0]!r:.80}", hint=REBUILD_HINT
        )
    found = metadata.get("model_digest", "")
    if found != model_digest:
        raise DigestError(
            f"{path} was saved with another model: its digest is {found[:16]}...,"
            f" this model's {model_digest[:16]}...",
            hint="open the bundle that saved it, or " + REBUILD_HINT,
        )
