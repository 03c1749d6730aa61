"""Numbers that say how far two arrays are apart. All of them compute in float64."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ringexport.errors import ShapeError, ToleranceExceededError
from ringexport.tensors import match

__all__ = [
    "Distance",
    "cosine",
    "distance",
    "kl_divergence",
    "log_softmax",
    "symmetric_difference",
    "top1_agreement",
    "ulp",
]

Array = npt.NDArray[np.generic]
Float64 = npt.NDArray[np.float64]
_ROWS_AT_ONCE = 64  # bounds the float64 copies of logits with a large vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far `found` is from `expected`; distances of parts add up to that of the whole.

    Attributes:
        squared_error: sum of squared differences.
        squared_norm: sum of squares of `expected`.
        max_error: largest absolute difference.
        max_expected: largest absolute value of `expected`.
    """

    squared_error: float = 0.0
    squared_norm: float = 0.0
    max_error: float = 0.0
    max_expected: float = 0.0

    @property
    def relative(self) -> float:
        """Root of the squared error over the norm of `expected`."""
        return _ratio(self.squared_error**0.5, self.squared_norm**0.5)

    @property
    def max_relative(self) -> float:
        """Largest difference over the largest expected value."""
        return _ratio(self.max_error, self.max_expected)

    def __add__(self, other: "Distance") -> "Distance":
        return Distance(
            squared_error=self.squared_error + other.squared_error,
            squared_norm=self.squared_norm + other.squared_norm,
            max_error=max(self.max_error, other.max_error),
            max_expected=max(self.max_expected, other.max_expected),
        )


def distance(found: Array, expected: Array) -> Distance:
    """Return the distance of two arrays of the same shape.

    Raises:
        ShapeError: the shapes differ.
        ToleranceExceededError: infinities or NaN are not at the same places; no number describes
            such a difference.
    """
    left, right = _pair(found, expected)
    finite = np.isfinite(right)
    difference = left[finite] - right[finite]
    return Distance(
        squared_error=float(np.square(difference).sum()),
        squared_norm=float(np.square(right[finite]).sum()),
        max_error=float(np.abs(difference).max(initial=0.0)),
        max_expected=float(np.abs(right[finite]).max(initial=0.0)),
    )


def symmetric_difference(left: Array, right: Array) -> float:
    """Return 1 - 2<x, y> / (|x|^2 + |y|^2): 0 for equal arrays, blind to none of the two.

    Source: `calc_diff` of DeepGEMM.
    """
    x, y = _pair(left, right)
    norms = float(np.square(x).sum() + np.square(y).sum())
    return 0.0 if norms == 0.0 else 1.0 - 2.0 * float((x * y).sum()) / norms


def cosine(left: Array, right: Array) -> Float64:
    """Return the cosine over the last axis; 1 where both are zero.

    Args:
        left, right: [..., D].

    Returns:
        [...] float64.
    """
    x, y = _pair(left, right)
    products = np.einsum("...d,...d->...", x, y)
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    both_zero = ~(x.any(axis=-1) | y.any(axis=-1))
    result: Float64 = np.where(both_zero, 1.0, products / np.maximum(norms, np.finfo(float).tiny))
    return result


def log_softmax(logits: Array) -> Float64:
    """Return the log probabilities over the last axis, float64."""
    values = np.asarray(logits, dtype=np.float64)
    shifted = values - values.max(axis=-1, keepdims=True)
    result: Float64 = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def kl_divergence(expected_logits: Array, found_logits: Array) -> Float64:
    """Return KL(expected || found) per row, in nats.

    Args:
        expected_logits, found_logits: [N, vocab].

    Returns:
        [N] float64, >= 0 but for rounding.
    """
    bound = match("expected logits", expected_logits, "N vocab")
    match("found logits", found_logits, "N vocab", bound)
    rows = []
    for start in range(0, len(expected_logits), _ROWS_AT_ONCE):
        p = log_softmax(expected_logits[start : start + _ROWS_AT_ONCE])
        q = log_softmax(found_logits[start : start + _ROWS_AT_ONCE])
        rows.append((np.exp(p) * (p - q)).sum(axis=-1))
    return np.concatenate(rows) if rows else np.zeros(0)


def top1_agreement(left: Array, right: Array) -> float:
    """Return the share of rows [N, vocab] whose largest entry is at the same place; 1 if N is 0."""
    bound = match("left logits", left, "N vocab")
    match("right logits", right, "N vocab", bound)
    if len(left) == 0:
        return 1.0
    same = np.argmax(left, axis=-1) == np.argmax(right, axis=-1)
    return float(same.mean())


def ulp(value: float, dtype: npt.DTypeLike) -> float:
    """Return the gap between `value` and the next larger number of a floating dtype.

    Args:
        value: finite.
        dtype: a numpy or ml_dtypes floating dtype, such as float32 or bfloat16.
    """
    kind = np.dtype(dtype)
    rounded = np.abs(np.asarray(value, dtype=kind))
    bits = f"u{kind.itemsize}"
    following = (rounded.view(bits) + 1).astype(bits).view(kind)
    return float(following) - float(rounded)


def _pair(left: Array, right: Array) -> tuple[Float64, Float64]:
    """Check shapes and non-finite places, then convert to float64."""
    if left.shape != right.shape:
        raise ShapeError(f"cannot compare shapes {list(left.shape)} and {list(right.shape)}")
    x = np.asarray(left, dtype=np.float64)
    y = np.asarray(right, dtype=np.float64)
    odd = ~(np.isfinite(x) & np.isfinite(y))
    if odd.any() and not np.array_equal(x[odd], y[odd], equal_nan=True):
        first = tuple(
            int(i) for i in np.argwhere(odd & ~((x == y) | (np.isnan(x) & np.isnan(y))))[0]
        )
        raise ToleranceExceededError(
            f"NaN or infinity at index {list(first)} on one side only: {x[first]} and {y[first]}"
        )
    return x, y


def _ratio(numerator: float, denominator: float) -> float:
    if denominator == 0.0:
        return 0.0 if numerator == 0.0 else float("inf")
    return numerator / denominator
