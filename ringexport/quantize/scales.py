"""Find the scales of weight tiles: from the largest magnitude, or with the least squared error."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ringexport.errors import QuantizationError, ShapeError
from ringexport.ops.quantization import (
    Granularity,
    GranularityKind,
    NumberFormat,
    row_scale,
    row_slabs,
)
from ringexport.quantize.e4m3 import e4m3_bits
from ringexport.quantize.scheme import WeightObserver, WeightScheme

__all__ = ["absmax_scale", "absmax_tiles", "find_scale", "real_values", "reduce_tiles"]

_BF16 = np.dtype(ml_dtypes.bfloat16)
_WORDS: Mapping[np.dtype[Any], tuple[np.dtype[Any], int, int]] = {
    _BF16: (np.dtype(np.uint16), 0x7FFF, 0x7F80),
    np.dtype(np.float16): (np.dtype(np.uint16), 0x7FFF, 0x7C00),
    np.dtype(np.float32): (np.dtype(np.uint32), 0x7FFFFFFF, 0x7F800000),
}
"""Stored dtype -> its integer view, the mask of the magnitude, and infinity."""

_ZERO_SCALE = np.float32(np.finfo(np.float32).eps)
_SMALLEST_SCALE = np.float32(2.0**-129)  # 2^20 of the smallest subnormal
_MSE_RATIOS = {
    NumberFormat.FP8_E4M3: tuple(2.0 ** (step / 8) for step in range(-4, 8)),
    NumberFormat.INT8: tuple(1.0 - 0.025 * step for step in range(17)),
}
"""Candidates for `mse`, as factors on the absmax scale; 1.0 is among them.

FP8 codes repeat with every power of two, so one octave covers what a scale can change, and half an
octave below 1 clips. INT8 clips down to 60 % of the range.
"""


def absmax_tiles(
    array: npt.NDArray[Any], granularity: Granularity, *, name: str = "the array"
) -> npt.NDArray[np.float32]:
    """Return the largest magnitude of each tile, fp32 in the shape of the scale.

    Magnitudes are compared as integers, which orders them the same way and finds NaN and infinity
    on the side.

    Raises:
        QuantizationError: a NaN or infinity; the message names the index.
        ShapeError: not two dimensions, or another dtype than bf16, fp16 and fp32.
    """
    if array.dtype not in _WORDS:
        raise ShapeError(f"{name} is {array.dtype}, expected bfloat16, float16 or float32")
    word, mask, infinity = _WORDS[array.dtype]
    shape = granularity.scale_shape(array.shape)
    tile_rows, _ = granularity.tile(array.shape)
    largest = np.zeros((1, 1) if len(shape) == 1 else shape, word)
    for start, stop in row_slabs(array.shape, granularity):
        words = np.bitwise_and(array[start:stop].view(word), word.type(mask))
        found = reduce_tiles(np.maximum, words, granularity, array.shape)
        part = largest[start // tile_rows : (stop - 1) // tile_rows + 1]
        np.maximum(part, found, out=part)
        if found.size and found.max() >= infinity:
            _refuse_non_finite(array[start:stop], start, name)
    return real_values(largest.view(array.dtype)).reshape(shape)


def absmax_scale(
    absmax: npt.NDArray[np.float32], number_format: NumberFormat
) -> npt.NDArray[np.float32]:
    """Return absmax / half_range in fp32; tiles of zeros get a small scale, never 0.

    None is below 2^-129: it would have too few bits to keep numbers within half a step.

    Args:
        absmax: fp32, any shape.
        number_format: of the codes.
    """
    scale = np.asarray(absmax / np.float32(number_format.half_range), np.float32)
    scale[scale == 0] = _ZERO_SCALE
    return np.maximum(scale, _SMALLEST_SCALE)


def find_scale(
    array: npt.NDArray[Any], scheme: WeightScheme, absmax: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Return the scale of `array` by the observer of `scheme`.

    Args:
        array: [rows, columns] bf16, fp16 or fp32, finite.
        scheme: format, granularity, observer.
        absmax: of each tile, as `absmax_tiles` gives it.
    """
    scale = absmax_scale(absmax, scheme.format)
    if scheme.observer is WeightObserver.ABSMAX:
        return scale
    granularity, shape = scheme.granularity, array.shape
    candidates = [
        np.maximum(scale * np.float32(ratio), np.finfo(np.float32).tiny)
        for ratio in _MSE_RATIOS[scheme.format]
    ]
    tiles = scale.reshape(1, 1).shape if scale.ndim == 1 else scale.shape
    errors = np.zeros((len(candidates), *tiles))
    tile_rows, _ = granularity.tile(shape)
    for start, stop in row_slabs(shape, granularity):
        slab = real_values(array[start:stop])
        part = slice(start // tile_rows, (stop - 1) // tile_rows + 1)
        for index, candidate in enumerate(candidates):
            factor = row_scale(candidate, granularity, shape, (start, stop))
            error = np.square(slab - _round_trip(slab, factor, scheme.format), dtype=np.float64)
            errors[index, part] += reduce_tiles(np.add, error, granularity, shape)
    order = np.argsort([abs(ratio - 1.0) for ratio in _MSE_RATIOS[scheme.format]], kind="stable")
    best = order[np.argmin(errors[order], axis=0)].reshape(scale.shape)
    return np.asarray(np.choose(best, candidates), np.float32)


def real_values(slab: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return a new contiguous fp32 array with the values of a bf16, fp16 or fp32 one."""
    if slab.dtype != _BF16:
        return slab.astype(np.float32, order="C")
    words = slab.view(np.uint16).astype(np.uint32, order="C")
    return np.left_shift(words, np.uint32(16), out=words).view(np.float32)


def reduce_tiles(
    function: np.ufunc,
    slab: npt.NDArray[Any],
    granularity: Granularity,
    shape: tuple[int, ...],
) -> npt.NDArray[Any]:
    """Reduce one slab with `function` to one number per tile, [tile rows, tile columns].

    Args:
        function: np.maximum or np.add.
        slab: rows that `row_slabs` yielded.
        granularity: which elements make up a tile.
        shape: [rows, columns] of the whole array.
    """
    tile_rows, tile_columns = granularity.tile(shape)
    if tile_rows > 1 or granularity.kind is GranularityKind.TENSOR:
        slab = function.reduce(slab, axis=0, keepdims=True)
    if tile_columns >= slab.shape[1]:
        return np.asarray(function.reduce(slab, axis=1, keepdims=True, initial=0))
    return np.asarray(function.reduceat(slab, np.arange(0, slab.shape[1], tile_columns), axis=1))


def _round_trip(
    slab: npt.NDArray[np.float32], factor: npt.NDArray[np.float32], number_format: NumberFormat
) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):  # an infinity is clipped like any other large value
        scaled = slab / factor
    if number_format is NumberFormat.INT8:
        np.clip(np.rint(scaled, out=scaled), -128.0, 127.0, out=scaled)
        return scaled * factor
    codes = np.empty(slab.shape, np.uint8)
    e4m3_bits(scaled, codes)
    return np.asarray(codes.view(number_format.dtype).astype(np.float32) * factor)


def _refuse_non_finite(slab: npt.NDArray[Any], first_row: int, name: str) -> None:
    row, column = (int(i) for i in np.argwhere(~np.isfinite(slab.astype(np.float32)))[0])
    raise QuantizationError(
        f"{name} holds {float(slab[row, column])} at [{first_row + row}, {column}], expected "
        "finite values",
        hint="the file is damaged, or the model was saved after it diverged",
    )
