"""Rotary tables: the split form against the whole one and against fp64."""

import numpy as np
import pytest

from ringexport.ops.rotary import rotary_tables, split_rotary_tables


@pytest.mark.parametrize("length", [1, 2, 3, 1000, 8192, 131072])
def test_split_tables_give_the_whole_ones(length: int) -> None:
    inv_freq = 1e6 ** (-np.arange(0, 32, 2) / 32)
    cos, sin = rotary_tables(inv_freq, 1.25, length)
    split = split_rotary_tables(inv_freq, 1.25, length)
    ids = np.unique(np.linspace(0, length - 1, 500).astype(int))
    coarse, fine = np.divmod(ids, split.step)
    (coarse_cos, coarse_sin), (fine_cos, fine_sin) = split.coarse, split.fine
    combined_cos = coarse_cos[coarse] * fine_cos[fine] - coarse_sin[coarse] * fine_sin[fine]
    combined_sin = coarse_sin[coarse] * fine_cos[fine] + coarse_cos[coarse] * fine_sin[fine]
    # Three roundings of values up to 1.25, in fp32.
    np.testing.assert_allclose(combined_cos, cos[ids], atol=3e-7, rtol=0)
    np.testing.assert_allclose(combined_sin, sin[ids], atol=3e-7, rtol=0)
    assert len(coarse_cos) + len(fine_cos) <= 3 * length**0.5 + 3


def test_far_positions_keep_their_phase() -> None:
    inv_freq = np.array([0.65, 1e-5])
    cos, sin = rotary_tables(inv_freq, 1.0, 500_001)
    np.testing.assert_allclose(cos[-1], np.cos(500_000 * inv_freq), atol=1e-7)
    np.testing.assert_allclose(sin[-1], np.sin(500_000 * inv_freq), atol=1e-7)
