"""Quantize arrays: find the scales, divide, round to nearest even, count what saturates."""

from typing import Any

import numpy as np
import numpy.typing as npt

from ringexport.errors import QuantizationError, ShapeError
from ringexport.ops.quantization import NumberFormat, Quantized, row_scale, row_slabs
from ringexport.quantize.e4m3 import e4m3_bits
from ringexport.quantize.scales import absmax_tiles, find_scale, real_values
from ringexport.quantize.scheme import WeightScheme

__all__ = ["quantize_array", "round_slab"]

_BITS = np.dtype(np.uint8)


def quantize_array(
    array: npt.NDArray[Any],
    scheme: WeightScheme,
    *,
    scale: npt.NDArray[np.float32] | None = None,
    name: str = "the array",
) -> Quantized:
    """Quantize a two-dimensional array; the input is not modified.

    Every element is divided by its scale in fp32, rounded to the nearest code, ties to even, and
    clipped to the range of the format. Temporary arrays take a few hundred kilobytes, so `array`
    may be a view of a memory-mapped file.

    Args:
        array: [rows, columns] bf16, fp16 or fp32.
        scheme: format, granularity, and how scales are found.
        scale: used instead of finding it, fp32 in the shape that `scheme` asks for, positive.
        name: what to call the array in messages.

    Returns:
        Values and scale, and how many elements saturated.

    Raises:
        QuantizationError: a NaN or infinity, or a scale that is not a positive number.
        ShapeError: not two dimensions, another dtype, or a scale of another shape.
    """
    granularity = scheme.granularity
    absmax = absmax_tiles(array, granularity, name=name)
    if scale is None:
        scale = find_scale(array, scheme, absmax)
    _check_scale(scale, granularity.scale_shape(array.shape), name)
    safe = (scheme.format.half_range + scheme.format.saturation) / 2
    clip = bool((absmax / np.float32(safe) > scale).any())
    values = np.empty(array.shape, scheme.format.dtype)
    saturated = 0
    for start, stop in row_slabs(array.shape, granularity):
        slab = real_values(array[start:stop])
        with np.errstate(over="ignore"):  # an infinity is clipped like any other large value
            np.divide(slab, row_scale(scale, granularity, array.shape, (start, stop)), out=slab)
        if clip:
            saturated += int(np.count_nonzero(np.abs(slab) > scheme.format.saturation))
        round_slab(slab, scheme.format, values[start:stop], clip=clip)
    return Quantized(
        values=values, weight_scale=scale, granularity=granularity, saturated=saturated
    )


def round_slab(
    scaled: npt.NDArray[np.float32],
    number_format: NumberFormat,
    out: npt.NDArray[Any],
    *,
    clip: bool = True,
) -> None:
    """Round scaled values to codes.

    Args:
        scaled: fp32, contiguous, no NaN; overwritten.
        number_format: of `out`.
        out: same shape, dtype of the format.
        clip: whether magnitudes above `number_format.saturation` may occur.
    """
    if number_format is NumberFormat.FP8_E4M3:
        e4m3_bits(scaled, out.view(_BITS), clip=clip)
        return
    np.rint(scaled, out=scaled)
    np.clip(scaled, -128.0, 127.0, out=scaled)
    np.copyto(out, scaled, casting="unsafe")


def _check_scale(scale: npt.NDArray[np.float32], shape: tuple[int, ...], name: str) -> None:
    if scale.shape != shape or scale.dtype != np.float32:
        raise ShapeError(
            f"the scale of {name} is {scale.dtype} {list(scale.shape)}, expected float32 "
            f"{list(shape)}"
        )
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise QuantizationError(f"the scale of {name} holds a value that is not positive")
