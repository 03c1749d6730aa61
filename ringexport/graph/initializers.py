"""Weights of a graph that are read only while they are written: one chunk in memory at a time."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from math import prod

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx

from ringexport.checkpoint.weights import CheckpointWeights

__all__ = [
    "AnyArray",
    "ComputeDtype",
    "LazyInitializer",
    "from_array",
    "stacked_down_projections",
    "stacked_gate_up_projections",
    "table",
    "transposed_projection",
    "vector",
]

AnyArray = npt.NDArray[np.generic]

BLOCK_BYTES = 1 << 24
"""Most bytes of fp32 that one chunk holds."""


class ComputeDtype(StrEnum):
    """Dtype of activations, matrices and KV cache; state, router and logits are always fp32."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"

    @property
    def numpy(self) -> np.dtype[np.generic]:
        """The numpy dtype, of ml_dtypes for bf16."""
        types: dict[str, type] = {
            "fp32": np.float32,
            "fp16": np.float16,
            "bf16": ml_dtypes.bfloat16,
        }
        dtype: np.dtype[np.generic] = np.dtype(types[self.value])
        return dtype

    @property
    def onnx(self) -> int:
        """The ONNX element type."""
        return int(onnx.helper.np_dtype_to_tensor_dtype(self.numpy))


@dataclass(frozen=True, slots=True, kw_only=True)
class LazyInitializer:
    """A graph weight whose values are produced when it is written.

    Attributes:
        name: in the graph.
        shape: of the whole tensor.
        dtype: numpy dtype of the stored values.
        chunks: returns a new iterator over C-ordered pieces that follow each other.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    chunks: Callable[[], Iterable[AnyArray]]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensor."""
        return prod(self.shape) * self.dtype.itemsize

    def to_array(self) -> AnyArray:
        """Return the whole tensor; for small ones and for tests."""
        pieces = [np.ravel(chunk) for chunk in self.chunks()]
        return np.concatenate(pieces).astype(self.dtype, copy=False).reshape(self.shape)


def from_array(name: str, array: AnyArray) -> LazyInitializer:
    """Wrap an array that is in memory anyway."""
    return LazyInitializer(name=name, shape=array.shape, dtype=array.dtype, chunks=lambda: [array])


def vector(
    name: str, weights: CheckpointWeights, source: str, dtype: ComputeDtype
) -> LazyInitializer:
    """Copy the checkpoint tensor `source` as it lies."""

    def chunks() -> Iterator[AnyArray]:
        yield weights.read_f32(source).astype(dtype.numpy, copy=False)

    shape = weights.info(source).shape
    return LazyInitializer(name=name, shape=shape, dtype=dtype.numpy, chunks=chunks)


def table(
    name: str, weights: CheckpointWeights, source: str, dtype: ComputeDtype
) -> LazyInitializer:
    """Copy a [rows, columns] tensor in blocks of rows."""
    rows, columns = weights.info(source).shape

    def chunks() -> Iterator[AnyArray]:
        weights.check_finite([source])
        for start, stop in _blocks(rows, columns):
            yield (
                weights.read_rows(source, start, stop)
                .astype(np.float32)
                .astype(dtype.numpy, copy=False)
            )
        weights.release(source)

    return LazyInitializer(name=name, shape=(rows, columns), dtype=dtype.numpy, chunks=chunks)


def transposed_projection(
    name: str,
    weights: CheckpointWeights,
    source: str,
    dtype: ComputeDtype,
    *,
    rows: tuple[int, int] | None = None,
) -> LazyInitializer:
    """Turn an [out, in] projection, or `rows` of it, into the [in, out] matrix of a MatMul."""
    height, width = weights.info(source).shape
    first, last = rows or (0, height)

    def chunks() -> Iterator[AnyArray]:
        # Every chunk takes some columns of all rows, so the source stays mapped until the last.
        weights.check_finite([source])
        stored = weights.read_rows(source, first, last)
        for start, stop in _blocks(width, last - first):
            columns = stored[:, start:stop].astype(np.float32).T
            yield np.ascontiguousarray(columns, dtype=dtype.numpy)
        weights.release(source)

    shape = (width, last - first)
    return LazyInitializer(name=name, shape=shape, dtype=dtype.numpy, chunks=chunks)


def stacked_gate_up_projections(
    name: str, weights: CheckpointWeights, experts: list[str], dtype: ComputeDtype
) -> LazyInitializer:
    """Stack experts to [E, 2*I, D] with the rows of gate_proj and up_proj alternating.

    Args:
        name: in the graph.
        weights: the checkpoint.
        experts: name prefixes, such as ``model.layers.1.mlp.experts.0``.
        dtype: of the stored values.
    """
    rows, columns = weights.info(f"{experts[0]}.gate_proj.weight").shape

    def chunks() -> Iterator[AnyArray]:
        for expert in experts:
            both = np.empty((2 * rows, columns), dtype=dtype.numpy)
            both[0::2] = weights.read_f32(f"{expert}.gate_proj.weight")
            both[1::2] = weights.read_f32(f"{expert}.up_proj.weight")
            yield both

    shape = (len(experts), 2 * rows, columns)
    return LazyInitializer(name=name, shape=shape, dtype=dtype.numpy, chunks=chunks)


def stacked_down_projections(
    name: str, weights: CheckpointWeights, experts: list[str], dtype: ComputeDtype
) -> LazyInitializer:
    """Stack the down projections of experts to [E, D, I]; arguments as above."""
    rows, columns = weights.info(f"{experts[0]}.down_proj.weight").shape

    def chunks() -> Iterator[AnyArray]:
        for expert in experts:
            matrix = weights.read_f32(f"{expert}.down_proj.weight")
            yield matrix.astype(dtype.numpy, copy=False)

    shape = (len(experts), rows, columns)
    return LazyInitializer(name=name, shape=shape, dtype=dtype.numpy, chunks=chunks)


def _blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Cut `rows` so that a block of fp32 rows of `columns` stays below BLOCK_BYTES."""
    step = max(1, BLOCK_BYTES // (4 * columns))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)
