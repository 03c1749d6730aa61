"""Comparisons for tests: inf and NaN masks first, then values, and the worst element reported."""

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["assert_close", "assert_same", "nan_filled"]


def assert_close(
    actual: npt.ArrayLike, expected: npt.ArrayLike, *, rtol: float, atol: float = 0.0
) -> None:
    """Check |actual - expected| <= atol + rtol * max|expected| with equal inf and NaN masks.

    The bound follows the tensor's largest magnitude: elements near zero carry the rounding of the
    large terms that cancelled in them.
    """
    left, right = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert left.shape == right.shape, f"shape {left.shape}, expected {right.shape}"
    for kind, mask in (("NaN", np.isnan), ("inf", np.isinf)):
        where = np.argwhere(mask(left) != mask(right))
        assert where.size == 0, f"{kind} masks differ first at {where[0].tolist()}"
    finite = np.isfinite(right)
    np.testing.assert_array_equal(left[~finite], right[~finite])
    if not finite.any():
        return
    error = np.abs(np.where(finite, left, 0.0) - np.where(finite, right, 0.0))
    bound = atol + rtol * float(np.abs(right[finite]).max())
    worst = np.unravel_index(int(error.argmax()), error.shape)
    assert error[worst] <= bound, (
        f"index {[int(i) for i in worst]}: {left[worst]!r}, expected {right[worst]!r}, "
        f"error {error[worst]:.3e} > {bound:.3e} (rtol {rtol:g}, atol {atol:g})"
    )


def assert_same(actual: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    """Check shape, dtype and every bit, NaN payloads and signed zeros included."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert np.ascontiguousarray(actual).tobytes() == np.ascontiguousarray(expected).tobytes()


def nan_filled(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """Return an array full of NaN: what a test hands in where nothing may be read."""
    return np.full(shape, np.nan, dtype=dtype)
