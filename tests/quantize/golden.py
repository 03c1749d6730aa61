"""The slow, obvious quantizer that the fast one is compared with: loops, fp64, all codes listed."""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ringexport.ops.quantization import Granularity, NumberFormat

__all__ = ["golden_absmax", "golden_codes", "golden_dequantize", "tiles_of"]


def tiles_of(shape: tuple[int, ...], granularity: Granularity) -> dict[tuple[int, int], Any]:
    """Return tile index -> the slices of its elements, by the definition of each granularity."""
    rows, columns = shape
    sizes = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "token": (1, columns),
        "group": (1, granularity.columns),
        "block": (granularity.rows, granularity.columns),
    }
    height, width = sizes[granularity.kind.value]
    return {
        (i // height, j // width): np.s_[i : min(i + height, rows), j : min(j + width, columns)]
        for i in range(0, rows, height)
        for j in range(0, columns, width)
    }


def golden_absmax(array: npt.NDArray[Any], granularity: Granularity) -> npt.NDArray[np.float64]:
    """Return the largest magnitude of each tile, [tile rows, tile columns]."""
    tiles = tiles_of(array.shape, granularity)
    found = np.zeros([1 + max(index[axis] for index in tiles) for axis in (0, 1)])
    for index, place in tiles.items():
        found[index] = np.abs(array[place].astype(np.float64)).max()
    return found


def golden_codes(
    array: npt.NDArray[Any],
    scale: npt.NDArray[np.float32],
    granularity: Granularity,
    number_format: NumberFormat,
) -> npt.NDArray[Any]:
    """Return the nearest code of each element, ties to the even one, found by trying all."""
    codes, values = _codes(number_format)
    result = np.empty(array.shape, codes.dtype)
    grid = scale.reshape(1, 1) if scale.ndim == 1 else scale
    for index, place in tiles_of(array.shape, granularity).items():
        with np.errstate(over="ignore"):
            scaled = (array[place].astype(np.float32) / grid[index]).astype(np.float64)
        clipped = np.clip(scaled, values.min(), values.max())
        distance = np.abs(clipped[..., None] - values)
        odd = (codes.view(np.uint8) & 1).astype(bool)
        wrong_sign = np.signbit(values) != np.signbit(clipped)[..., None]
        if number_format is NumberFormat.INT8:
            wrong_sign[:] = False
        tied = distance == distance.min(axis=-1, keepdims=True)
        order = np.where(tied, 0, 4) + np.where(wrong_sign, 2, 0) + np.where(odd, 1, 0)
        result[place] = codes[np.argmin(order, axis=-1)]
    return result


def golden_dequantize(
    codes: npt.NDArray[Any], scale: npt.NDArray[np.float32], granularity: Granularity
) -> npt.NDArray[np.float64]:
    """Return code value x scale in fp64."""
    result = np.empty(codes.shape)
    grid = scale.reshape(1, 1) if scale.ndim == 1 else scale
    for index, place in tiles_of(codes.shape, granularity).items():
        result[place] = codes[place].astype(np.float64) * np.float64(grid[index])
    return result


def _codes(number_format: NumberFormat) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """Return all finite codes and their values."""
    raw = np.arange(256, dtype=np.uint8)
    if number_format is NumberFormat.INT8:
        codes = raw.view(np.int8)
        return codes, codes.astype(np.float64)
    codes = raw[(raw & 0x7F) != 0x7F].view(ml_dtypes.float8_e4m3fn)
    return codes, codes.astype(np.float64)
