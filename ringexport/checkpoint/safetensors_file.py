"""One safetensors file: a header that is checked before anything is trusted, and mapped data.

A file is: 8 bytes little-endian header length, a JSON header, then the tensors' bytes without gaps.
Opening reads the header only; the data is memory-mapped at the first read.

Source: safetensors 0.8 README "Format".
"""

import math
import mmap
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ringexport.checkpoint.fields import show
from ringexport.errors import CheckpointError
from ringexport.strict_json import parse_object

__all__ = ["FLOAT_DTYPES", "SafetensorsFile", "TensorInfo"]

_LENGTH_BYTES = 8
_HEADER_LIMIT_BYTES = 100_000_000
_MAX_RANK = 8
_DAMAGED = "the file is damaged or was not written by safetensors; download it again"
_DTYPES: Mapping[str, "np.dtype[Any]"] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
FLOAT_DTYPES = (_DTYPES["BF16"], _DTYPES["F16"], _DTYPES["F32"])
"""Dtypes of what is not quantized."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies and what it is.

    Attributes:
        name: as in the file.
        dtype: stored dtype: bfloat16 or float8_e4m3fn (ml_dtypes), float16, float32, int8; int32
            and int64 in packed weights only.
        shape: sizes, outermost first.
        nbytes: stored size.
        file: the file that holds it.
        offset: of the first byte, from the beginning of the file.
    """

    name: str
    dtype: "np.dtype[Any]"
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int


class SafetensorsFile:
    """A checked header and, from the first read on, a read-only mapping of the data.

    Attributes:
        path: the file.
        tensors: what it holds, in the order of the header.
        size_bytes: of the whole file.
    """

    def __init__(self, path: Path, tensors: dict[str, TensorInfo], size_bytes: int) -> None:
        self.path = path
        self.tensors = tensors
        self.size_bytes = size_bytes
        self._map: mmap.mmap | None = None
        self._closed = False

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read and check the header of `path`; the data is not touched.

        Raises:
            CheckpointError: not a regular file, truncated, oversized, or a header that is not
                valid JSON or does not describe the data exactly: no hole, overlap or remainder.
        """
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path} is not a regular file")
            with path.open("rb") as stream:
                prefix = stream.read(_LENGTH_BYTES)
                length = _header_length(path, prefix, status.st_size)
                header = stream.read(length)
        except OSError as failure:
            raise CheckpointError(f"cannot read {path}: {failure.strerror}") from failure
        if len(header) != length:
            raise CheckpointError(f"{path} changed while it was read")
        entries = parse_object(header, source=f"the header of {path}", error=CheckpointError)
        _check_metadata(path, entries.pop("__metadata__", {}))
        data_start = _LENGTH_BYTES + length
        tensors = {
            name: _tensor_info(path, name, entry, data_start) for name, entry in entries.items()
        }
        _check_layout(path, tensors, data_start, status.st_size)
        return cls(path, tensors, status.st_size)

    def read(self, name: str) -> npt.NDArray[Any]:
        """Return a read-only view of the mapped tensor; pages are loaded as they are used.

        Raises:
            CheckpointError: the file changed its size since it was opened, or was closed.
        """
        info = self.tensors[name]
        count = math.prod(info.shape)
        if count == 0:
            return np.empty(info.shape, info.dtype)
        flat = np.frombuffer(self._mapped(), info.dtype, count, info.offset)
        return flat.reshape(info.shape)

    def prefetch(self, name: str) -> None:
        """Ask the system to load a tensor's pages into its file cache, without waiting for them."""
        info = self.tensors[name]
        if info.nbytes == 0:
            return
        start = info.offset // mmap.PAGESIZE * mmap.PAGESIZE
        self._mapped().madvise(mmap.MADV_WILLNEED, start, info.offset + info.nbytes - start)

    def release(self, name: str) -> None:
        """Drop the pages of a tensor from memory; a later read loads them again."""
        info = self.tensors[name]
        if self._map is None or info.nbytes == 0:
            return
        start = info.offset // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, start, info.offset + info.nbytes - start)

    def close(self) -> None:
        """Refuse further reads; the mapping goes when the last array that views it goes."""
        self._map = None
        self._closed = True

    def _mapped(self) -> mmap.mmap:
        """Return the mapping. The size is checked each time: reading beyond it would kill us."""
        if self._closed:
            raise CheckpointError(f"{self.path} was closed")
        try:
            if self.path.stat().st_size != self.size_bytes:
                raise CheckpointError(
                    f"{self.path} changed while it was in use: {self.path.stat().st_size:,} bytes, "
                    f"expected {self.size_bytes:,}",
                    hint="wait until the download or copy has finished",
                )
            if self._map is None:
                with self.path.open("rb") as stream:
                    self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as failure:  # ValueError: the file became empty
            raise CheckpointError(f"cannot map {self.path}: {failure}") from failure
        return self._map


def _header_length(path: Path, prefix: bytes, size_bytes: int) -> int:
    """Return the length of the JSON header after checking it against the file's size."""
    if len(prefix) < _LENGTH_BYTES:
        raise CheckpointError(
            f"{path} has {size_bytes} bytes, too few for a safetensors file", hint=_DAMAGED
        )
    if prefix.startswith(b"version "):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the weights",
            hint="fetch the real files with `git lfs pull`",
        )
    length = int.from_bytes(prefix, "little")
    available = size_bytes - _LENGTH_BYTES
    if not 2 <= length <= min(available, _HEADER_LIMIT_BYTES):
        raise CheckpointError(
            f"{path} announces a header of {length:,} bytes, expected from 2 to "
            f"{min(available, _HEADER_LIMIT_BYTES):,}",
            hint=_DAMAGED,
        )
    return length


def _check_metadata(path: Path, metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(
            f"{path}: __metadata__ is {show(metadata)}, expected an object of strings",
            hint=_DAMAGED,
        )


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """Check one header entry by itself."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{path}: tensor {show(name)} is described by {show(entry)}, expected an object of "
            "dtype, shape and data_offsets",
            hint=_DAMAGED,
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or len(shape) > _MAX_RANK:
        raise CheckpointError(
            f"{path}: tensor {show(name)} has shape {show(shape)}, expected at most {_MAX_RANK} "
            "integers >= 0",
            hint=_DAMAGED,
        )
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{path}: tensor {show(name)} has data_offsets {show(offsets)}, expected [begin, end]",
            hint=_DAMAGED,
        )
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"{path}: tensor {show(name)} has dtype {show(entry['dtype'])}, expected "
            f"{', '.join(_DTYPES)}",
            hint="of quantized checkpoints only 8-bit ones can be read; use the bf16 checkpoint",
        )
    nbytes = math.prod(shape) * dtype.itemsize
    begin, end = offsets
    if end - begin != nbytes:
        raise CheckpointError(
            f"{path}: tensor {show(name)} has {end - begin} bytes, expected {nbytes} for "
            f"{entry['dtype']} {show(shape)}",
            hint=_DAMAGED,
        )
    return TensorInfo(name, dtype, tuple(shape), nbytes, path, data_start + begin)


def _are_sizes(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    for item in value:  # noqa: SIM110 - half the time of all() with a generator, 48,000 times
        if type(item) is not int or not 0 <= item < 1 << 63:
            return False
    return True


def _check_layout(
    path: Path, tensors: dict[str, TensorInfo], data_start: int, size_bytes: int
) -> None:
    """Check that the tensors fill the file from the header to its end, each byte once."""
    position, previous = data_start, None
    for info in sorted(tensors.values(), key=attrgetter("offset", "nbytes")):
        if info.offset != position:
            fault = "overlaps" if info.offset < position else "leaves a hole after"
            neighbour = "the header" if previous is None else f"tensor {show(previous)}"
            raise CheckpointError(
                f"{path}: tensor {show(info.name)} at byte {info.offset} {fault} {neighbour}, "
                f"which ends at {position}",
                hint=_DAMAGED,
            )
        position, previous = info.offset + info.nbytes, info.name
    if position != size_bytes:
        fault = "truncated" if position > size_bytes else "oversized"
        raise CheckpointError(
            f"{path} is {fault}: {size_bytes:,} bytes, expected {position:,}",
            hint="download the file again",
        )
