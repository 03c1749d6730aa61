import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringexport.compare.metrics import (
    Distance,
    cosine,
    distance,
    kl_divergence,
    log_softmax,
    symmetric_difference,
    top1_agreement,
    ulp,
)
from ringexport.compare.tolerances import (
    TOLERANCES,
    Sense,
    drift_bound,
    reference_state_bound,
)
from ringexport.errors import ShapeError, ToleranceExceededError


def test_distance_by_hand() -> None:
    found = distance(np.array([1.0, 2.0, 4.0]), np.array([1.0, 0.0, 4.0]))
    assert found.squared_error == 4
    assert found.squared_norm == 17
    assert found.relative == pytest.approx(2 / math.sqrt(17))
    assert found.max_relative == 0.5


def test_distance_of_parts_adds_up(rng: np.random.Generator) -> None:
    left, right = rng.standard_normal((2, 10, 7))
    whole = distance(left, right)
    parts = distance(left[:4], right[:4]) + distance(left[4:], right[4:]) + Distance()
    assert parts.relative == pytest.approx(whole.relative)
    assert parts.max_relative == whole.max_relative


def test_distance_from_zero() -> None:
    zero = np.zeros(3)
    assert distance(zero, zero).relative == 0
    assert distance(zero + 1, zero).relative == math.inf
    assert distance(np.zeros(0), np.zeros(0)).relative == 0


def test_different_shapes_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\[2\] and \[3\]"):
        distance(np.zeros(2), np.zeros(3))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_must_be_at_the_same_place(value: float) -> None:
    left, right = np.zeros((2, 3)), np.zeros((2, 3))
    left[1, 2] = value
    with pytest.raises(ToleranceExceededError, match=r"index \[1, 2\]"):
        distance(left, right)
    right[1, 2] = value
    assert distance(left, right).relative == 0


def test_cosine() -> None:
    left = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], dtype=np.float32)
    right = np.array([[2.0, 0.0], [1.0, -1.0], [0.0, 0.0]], dtype=np.float32)
    assert cosine(left, right).tolist() == [1.0, 0.0, 1.0]


def test_symmetric_difference(rng: np.random.Generator) -> None:
    x = rng.standard_normal(100)
    assert symmetric_difference(x, x) == pytest.approx(0, abs=1e-12)
    assert symmetric_difference(x, -x) == pytest.approx(2)
    assert symmetric_difference(np.zeros(3), np.zeros(3)) == 0
    y = x + 1e-3 * rng.standard_normal(100)
    assert symmetric_difference(x, y) == pytest.approx(symmetric_difference(y, x))


def test_log_softmax_of_large_logits() -> None:
    values = log_softmax(np.array([[1e4, 1e4, -1e4]], dtype=np.float32))
    assert values[0, :2] == pytest.approx([-math.log(2)] * 2)
    assert np.exp(values).sum() == pytest.approx(1)


def test_kl_by_hand() -> None:
    p, q = np.array([0.5, 0.5]), np.array([0.25, 0.75])
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl_divergence(np.log([p]), np.log([q]))[0] == pytest.approx(expected)


def test_kl_of_many_rows_equals_row_by_row(rng: np.random.Generator) -> None:
    left, right = rng.standard_normal((2, 150, 11)).astype(np.float32)
    rows = [kl_divergence(left[i : i + 1], right[i : i + 1])[0] for i in range(150)]
    assert kl_divergence(left, right) == pytest.approx(rows)
    assert len(kl_divergence(left[:0], right[:0])) == 0
    with pytest.raises(ShapeError):
        kl_divergence(left, right[:, :5])


def test_top1_agreement() -> None:
    left = np.array([[1, 2], [3, 1], [0, 5], [9, 0]])
    right = np.array([[1, 3], [1, 3], [0, 1], [1, 0]])
    assert top1_agreement(left, right) == 0.75
    assert top1_agreement(left[:0], right[:0]) == 1


def test_ulp() -> None:
    assert ulp(1.0, np.float32) == 2.0**-23
    assert ulp(-1.0, np.float32) == 2.0**-23
    assert ulp(1.0, ml_dtypes.bfloat16) == 2.0**-7
    assert ulp(0.0, np.float64) == 5e-324


@given(st.floats(width=32, min_value=-(2.0**126), max_value=2.0**126))
def test_ulp_is_the_spacing(value: float) -> None:
    assert ulp(value, np.float32) == float(np.spacing(np.abs(np.float32(value))))


def test_every_tolerance_has_a_reason() -> None:
    for tolerance in TOLERANCES.values():
        assert tolerance.reason
        assert tolerance.level in {"L0", "L1", "L2", "L3", "L4"}
        assert not tolerance.accepts(math.nan)
        assert tolerance.accepts(tolerance.bound)
        worse = 1e-9 if tolerance.sense is Sense.AT_MOST else -1e-9
        assert not tolerance.accepts(tolerance.bound + worse)


def test_bounds_that_grow() -> None:
    assert reference_state_bound(10_000) == pytest.approx(1e-3)
    assert reference_state_bound(0) == 1e-5
    assert drift_bound(2048, 1e-6) == pytest.approx(5.657e-6, rel=1e-3)
    assert drift_bound(10, 1e-6) == 1e-6
