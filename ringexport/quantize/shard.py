"""Write one safetensors file: blocks of rows are quantized by threads and written in order."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt

from ringexport.bundle.files import sync_path
from ringexport.checkpoint import CheckpointWeights
from ringexport.errors import QuantizationError
from ringexport.ops.quantization import Granularity, GranularityKind, Quantized
from ringexport.progress import Progress
from ringexport.quantize.formats import quantize_array
from ringexport.quantize.layout import OutputShard, OutputUnit, shard_header
from ringexport.quantize.scales import absmax_tiles, find_scale
from ringexport.quantize.transforms import TensorFold, fold_tensor

__all__ = ["ShardWriter"]

T = TypeVar("T")
Array = npt.NDArray[Any]
_BLOCK_ELEMENTS = 1 << 23
"""Elements of a block: 16 MiB of bf16 in, 8 MiB of codes out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """Some rows of a unit; `quantized` is None where they are copied."""

    unit: OutputUnit
    last: bool
    source_bytes: int
    values: Array
    quantized: Quantized | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardWriter:
    """Writes the files of one output, one after the other.

    Attributes:
        weights: the source.
        folds: SmoothQuant's factors by name of the source tensor.
        threads: how many blocks are quantized at the same time.
        progress: told about the bytes read.
    """

    weights: CheckpointWeights
    folds: Mapping[str, TensorFold]
    threads: int
    progress: Progress

    def write(self, shard: OutputShard, path: Path) -> dict[str, int]:
        """Write a file and sync it to the disk.

        Memory: about three blocks per thread, each of 24 MiB.

        Returns:
            Number of saturated elements of each quantized module.

        Raises:
            QuantizationError: a NaN or infinity in the source.
            OSError: the file cannot be written.
        """
        saturated: dict[str, int] = {}
        scales: list[npt.NDArray[np.float32]] = []
        with ThreadPoolExecutor(self.threads) as pool, path.open("wb") as file:
            file.write(shard_header(shard.outputs))
            for block in _in_order(pool, self._jobs(shard), ahead=self.threads + 1):
                unit = block.unit
                file.write(_bytes(_packed(block.values) if unit.packed else block.values))
                if block.quantized is not None:
                    scales.append(block.quantized.weight_scale)
                    count = saturated.get(unit.module, 0)
                    saturated[unit.module] = count + block.quantized.saturated
                if block.last:
                    _write_scales(file, unit, scales)
                    scales = []
                    self.weights.release(unit.source)
                self.progress.advance(block.source_bytes)
        sync_path(path)
        return saturated

    def _jobs(self, shard: OutputShard) -> Iterator[Callable[[], _Block]]:
        for unit in shard.units:
            yield from self._unit_jobs(unit)

    def _unit_jobs(self, unit: OutputUnit) -> Iterator[Callable[[], _Block]]:
        self.weights.prefetch(unit.source)
        scale = self._tensor_scale(unit)
        for start, stop in _row_blocks(unit):

            def job(start: int = start, stop: int = stop) -> _Block:
                return self._block(unit, start, stop, scale)

            yield job

    def _block(
        self, unit: OutputUnit, start: int, stop: int, scale: npt.NDArray[np.float32] | None
    ) -> _Block:
        """Read, fold and quantize rows [start, stop)."""
        array = self._rows(unit, start, stop)
        quantized = None
        if unit.scheme is not None:
            quantized = quantize_array(array, unit.scheme, scale=scale, name=unit.source)
        else:
            absmax_tiles(_matrix(array), Granularity(GranularityKind.TENSOR), name=unit.source)
        rows = unit.shape[0]
        return _Block(
            unit=unit,
            last=stop == rows,
            source_bytes=unit.source_bytes * (stop - start) // rows,
            values=array if quantized is None else quantized.values,
            quantized=quantized,
        )

    def _rows(self, unit: OutputUnit, start: int, stop: int) -> Array:
        """Return rows of the source, with factors folded in; in fp32 where they get quantized."""
        stored = self.weights.read(unit.source)[start:stop]
        fold = self.folds.get(unit.source)
        if fold is None:
            return stored
        real = fold_tensor(stored.astype(np.float32), fold, slice(start, stop))
        if unit.scheme is not None:
            return real
        folded = real.astype(stored.dtype)
        if not np.array_equal(folded.astype(np.float32), real):
            raise QuantizationError(
                f"SmoothQuant's factors cannot be folded into {unit.source} exactly in "
                f"{stored.dtype}",
                hint="its values are out of range; choose a smaller strength",
            )
        return folded

    def _tensor_scale(self, unit: OutputUnit) -> npt.NDArray[np.float32] | None:
        """Return the one scale of a tensor that shares it over all blocks, else None."""
        scheme = unit.scheme
        if scheme is None or scheme.granularity.kind is not GranularityKind.TENSOR:
            return None
        array = self._rows(unit, 0, unit.shape[0])
        absmax = absmax_tiles(array, scheme.granularity, name=unit.source)
        return find_scale(array, scheme, absmax)


def _row_blocks(unit: OutputUnit) -> Iterator[tuple[int, int]]:
    """Yield row ranges that no row of tiles crosses, a single one for small tensors."""
    rows = unit.shape[0]
    columns = math.prod(unit.shape[1:])
    step = max(1, _BLOCK_ELEMENTS // max(columns, 1))
    if unit.scheme is not None and unit.scheme.granularity.kind is GranularityKind.BLOCK:
        tile = unit.scheme.granularity.rows
        step = max(tile, step // tile * tile)
    yield from ((start, min(start + step, rows)) for start in range(0, rows, step))


def _write_scales(file: BinaryIO, unit: OutputUnit, scales: list[npt.NDArray[np.float32]]) -> None:
    if unit.scheme is not None:
        shared = unit.scheme.granularity.kind is GranularityKind.TENSOR
        file.write(_bytes(scales[0] if shared else np.concatenate(scales)))
    if unit.packed:
        file.write(_bytes(np.array(unit.shape, np.int64)))
    for value in unit.constants.values():
        file.write(np.float32(value).tobytes())


def _in_order(pool: ThreadPoolExecutor, jobs: Iterator[Callable[[], T]], ahead: int) -> Iterator[T]:
    """Yield the results of `jobs` in their order, with at most `ahead` of them under way."""
    running: deque[Future[T]] = deque()
    try:
        for job in jobs:
            running.append(pool.submit(job))
            if len(running) > ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()


def _packed(codes: Array) -> Array:
    """Add 128 to INT8 codes [out, in] and fill rows to whole int32 words with zero bytes."""
    unsigned = np.bitwise_xor(codes.view(np.uint8), np.uint8(0x80))
    return np.pad(unsigned, ((0, 0), (0, -unsigned.shape[1] % 4)))


def _matrix(array: Array) -> Array:
    return array.reshape(array.shape[0], -1)


def _bytes(array: Array) -> Any:
    """View an array as bytes, to be written."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
