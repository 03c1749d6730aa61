"""8-bit formats, the shapes of their scales, and the way back to real numbers.

The words are those of compressed-tensors: a *granularity* says which elements share a scale, and
real = quantized x ``weight_scale``, always a product. Arrays are two-dimensional: [out, in] for
weights, [tokens, channels] for activations.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ringexport.errors import ConfigError, ShapeError

__all__ = [
    "Granularity",
    "GranularityKind",
    "NumberFormat",
    "Quantized",
    "dequantize",
    "row_scale",
    "row_slabs",
]

SLAB_ELEMENTS = 1 << 17
"""Elements handled at once: the temporary arrays of one slab stay in the L2 cache."""

_PATTERN = re.compile(r"(tensor|channel|token|group|block)(?:\(\s*(\d+)\s*(?:,\s*(\d+)\s*)?\))?")
_NUM_SIZES = {"tensor": 0, "channel": 0, "token": 0, "group": 1, "block": 2}
_MAX_TILE = 1 << 20
_E4M3_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_E4M3_VALUES.flags.writeable = False  # code -> value: a lookup is far faster than a cast


class NumberFormat(StrEnum):
    """An 8-bit number format.

    FP8_E4M3: 4 exponent and 3 mantissa bits, largest value 448, no infinity (OCP "e4m3fn").
    INT8: two's complement, symmetric (no zero point), all of -128..127, as compressed-tensors.
    """

    FP8_E4M3 = "fp8_e4m3"
    INT8 = "int8"

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy dtype of stored values."""
        return np.dtype(ml_dtypes.float8_e4m3fn if self is NumberFormat.FP8_E4M3 else np.int8)

    @property
    def half_range(self) -> float:
        """What the largest magnitude of a tile is mapped to, as compressed-tensors does.

        448 in FP8. 127.5 in INT8, half of the width of -128..127: the largest value is then half
        a step from 127 or -128, no further from its code than any other element.
        """
        return 448.0 if self is NumberFormat.FP8_E4M3 else 127.5

    @property
    def saturation(self) -> float:
        """Scaled magnitudes above this are clipped by more than rounding would move them.

        464 is the tie between 448 and what would be the next FP8 value. In INT8 a hundredth of a
        step is added to 127.5 for the rounding of the fp32 quotient.
        """
        return 464.0 if self is NumberFormat.FP8_E4M3 else 127.51


class GranularityKind(StrEnum):
    """Which elements share a scale."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    TOKEN = "token"
    GROUP = "group"
    BLOCK = "block"


@dataclass(frozen=True, slots=True)
class Granularity:
    """Which elements of a two-dimensional array share a scale.

    tensor: all, scale [1]. channel and token: one row, scale [rows, 1]. group(n): n neighbours in
    a row, scale [rows, ceil(columns / n)]. block(r, c): tiles, scale [ceil(rows / r),
    ceil(columns / c)]. Groups and blocks at the edges may be ragged.
    """

    kind: GranularityKind
    rows: int = 0
    columns: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "tensor", "channel", "token", "group(64)" or "block(128, 128)".

        Raises:
            ConfigError: anything else.
        """
        found = _PATTERN.fullmatch(text.strip())
        sizes = [int(size[:9]) for size in (found.groups()[1:] if found else ()) if size]
        if (
            found is None
            or len(sizes) != _NUM_SIZES[found[1]]
            or not all(1 <= size <= _MAX_TILE for size in sizes)
        ):
            raise ConfigError(
                f"granularity {text[:80]!r} is not known, expected 'tensor', 'channel', 'token', "
                "'group(n)' or 'block(r, c)'"
            )
        rows, columns = (0, 0, *sizes)[-2:]
        return cls(GranularityKind(found[1]), 1 if len(sizes) == 1 else rows, columns)

    def __str__(self) -> str:
        """Return the text that `parse` reads."""
        if self.kind is GranularityKind.GROUP:
            return f"group({self.columns})"
        if self.kind is GranularityKind.BLOCK:
            return f"block({self.rows}, {self.columns})"
        return self.kind.value

    def tile(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return rows and columns of the tiles of an array of `shape`, at least 1 each.

        Raises:
            ShapeError: the array does not have two dimensions.
        """
        if len(shape) != 2:
            raise ShapeError(
                f"an array of shape {list(shape)} cannot be quantized per {self}, expected 2 "
                "dimensions"
            )
        rows, columns = max(shape[0], 1), max(shape[1], 1)
        if self.kind is GranularityKind.TENSOR:
            return rows, columns
        if self.kind in {GranularityKind.CHANNEL, GranularityKind.TOKEN}:
            return 1, columns
        return self.rows, self.columns

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the scale of an array of `shape`."""
        rows, columns = self.tile(shape)
        if self.kind is GranularityKind.TENSOR:
            return (1,)
        return -(-shape[0] // rows), -(-shape[1] // columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """An array in 8 bits.

    Attributes:
        values: [rows, columns] in the dtype of the format.
        weight_scale: fp32, shape by `granularity`; real = values x weight_scale.
        granularity: which elements share a scale.
        saturated: elements that were clipped by more than rounding moves them.
    """

    values: npt.NDArray[Any]
    weight_scale: npt.NDArray[np.float32]
    granularity: Granularity
    saturated: int = 0


def row_slabs(shape: tuple[int, ...], granularity: Granularity) -> Iterator[tuple[int, int]]:
    """Yield row ranges of about `SLAB_ELEMENTS`, none of which crosses a row of tiles.

    Args:
        shape: [rows, columns] of the array.
        granularity: tiles of one row may share a slab, larger ones are cut if they are too large.
    """
    tile_rows, _ = granularity.tile(shape)
    size = max(1, SLAB_ELEMENTS // max(shape[1], 1))
    if tile_rows == 1:
        tile_rows = max(shape[0], 1)
    for first in range(0, shape[0], tile_rows):
        last = min(first + tile_rows, shape[0])
        yield from ((start, min(start + size, last)) for start in range(first, last, size))


def row_scale(
    weight_scale: npt.NDArray[np.float32],
    granularity: Granularity,
    shape: tuple[int, ...],
    rows: tuple[int, int],
) -> npt.NDArray[np.float32]:
    """Return the scale of one slab in a shape that broadcasts against it.

    Args:
        weight_scale: of the whole array.
        granularity: of `weight_scale`.
        shape: [rows, columns] of the whole array.
        rows: a range that `row_slabs` yielded.
    """
    if granularity.kind is GranularityKind.TENSOR:
        return weight_scale.reshape(1, 1)
    start, stop = rows
    tile_rows, tile_columns = granularity.tile(shape)
    part = weight_scale[start // tile_rows : (stop - 1) // tile_rows + 1]
    if part.shape[1] == 1:
        return part
    return np.repeat(part, tile_columns, axis=1)[:, : shape[1]]


def dequantize(quantized: Quantized) -> npt.NDArray[np.float32]:
    """Return values x weight_scale, [rows, columns] fp32; the product is rounded once.

    Raises:
        ShapeError: a scale that does not fit the values.
    """
    values, scale = quantized.values, quantized.weight_scale
    shape, granularity = values.shape, quantized.granularity
    if scale.shape != granularity.scale_shape(shape):
        raise ShapeError(
            f"weight_scale has shape {list(scale.shape)}, expected "
            f"{list(granularity.scale_shape(shape))} for {list(shape)} values per {granularity}"
        )
    real = np.empty(shape, np.float32)
    for start, stop in row_slabs(shape, granularity):
        factor = row_scale(scale, granularity, shape, (start, stop))
        np.multiply(_code_values(values[start:stop]), factor, out=real[start:stop])
    return real


def _code_values(codes: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    if codes.dtype == np.int8:
        return codes.astype(np.float32)
    return np.take(_E4M3_VALUES, codes.view(np.uint8))
