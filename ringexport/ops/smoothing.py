"""SmoothQuant's factors: what calibration searches a strength for and quantization applies."""

import numpy as np
import numpy.typing as npt

from ringexport.errors import QuantizationError, ShapeError

__all__ = ["smooth_factors"]

_MAX_EXPONENT = 12.0


def smooth_factors(
    activation_absmax: npt.NDArray[np.float32],
    weight_absmax: npt.NDArray[np.float32],
    strength: float,
) -> npt.NDArray[np.float32]:
    """Return SmoothQuant's factor of each channel, rounded to a power of two.

    factor = activation_absmax ** strength / weight_absmax ** (1 - strength), then divided by the
    geometric mean over the channels, which no scale notices. Channels that are never used, or
    whose weights are all 0, get 1.

    Args:
        activation_absmax: [channels], largest magnitude of each input channel.
        weight_absmax: [channels], largest magnitude of each column over all consumers.
        strength: 0 leaves all outliers in the activations, 1 moves them into the weights.

    Raises:
        QuantizationError: a strength outside 0..1.
        ShapeError: shapes differ.
    """
    if not 0 <= strength <= 1:
        raise QuantizationError(f"migration strength is {strength:g}, expected 0 to 1")
    if activation_absmax.shape != weight_absmax.shape or activation_absmax.ndim != 1:
        raise ShapeError(
            f"activation_absmax has shape {list(activation_absmax.shape)}, weight_absmax "
            f"{list(weight_absmax.shape)}, expected the same number of channels"
        )
    used = (activation_absmax > 0) & (weight_absmax > 0)
    exponents = np.zeros(activation_absmax.shape)
    exponents[used] = strength * np.log2(activation_absmax[used], dtype=np.float64) - (
        1 - strength
    ) * np.log2(weight_absmax[used], dtype=np.float64)
    if used.any():
        exponents[used] -= exponents[used].mean()
    rounded = np.clip(np.rint(exponents), -_MAX_EXPONENT, _MAX_EXPONENT)
    return np.asarray(np.exp2(rounded), np.float32)
