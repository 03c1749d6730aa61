"""Accumulators against fp64 numpy, and their independence of batches and order."""

import itertools

import numpy as np
import pytest
import torch

from ringexport.calibrate.observers import (
    NUM_BINS,
    AbsMax,
    RangeBank,
)
from ringexport.errors import ShapeError
from ringexport.ops.quantization import Granularity
from tests.conftest import SEED


def values(tokens: int = 257, channels: int = 48, seed: int = SEED) -> torch.Tensor:
    """Tokens whose magnitudes differ by many powers of two."""
    rng = np.random.default_rng(seed)
    wild = rng.standard_normal((tokens, channels)) * 2.0 ** rng.integers(-14, 9, (tokens, 1))
    return torch.from_numpy(wild.astype(np.float32))


def bank_of(*parts: torch.Tensor) -> RangeBank:
    bank = RangeBank(1, parts[0].shape[1])
    for part in parts:
        bank.observe([(0, part)])
    return bank


def assert_same_bank(left: RangeBank, right: RangeBank) -> None:
    assert torch.equal(left.exponent, right.exponent)
    assert torch.equal(left.counts, right.counts)
    assert torch.equal(left.channel_absmax, right.channel_absmax)


def test_histogram_is_that_of_numpy_in_fp64() -> None:
    data = values()
    bank = bank_of(data)
    magnitudes = data.abs().double().numpy().ravel()
    top = 2.0 ** np.floor(np.log2(magnitudes.max()) + 1)
    expected, _ = np.histogram(magnitudes, bins=NUM_BINS, range=(0.0, top))
    assert 2.0 ** int(bank.exponent) == top
    np.testing.assert_array_equal(bank.counts[0].numpy(), expected)
    assert float(bank.absmax) == magnitudes.max()


@pytest.mark.parametrize("size", [1, 7, 64, 257])
def test_histogram_does_not_depend_on_the_batch_size(size: int) -> None:
    data = values()
    assert_same_bank(bank_of(*data.split(size)), bank_of(data))


def test_histogram_does_not_depend_on_the_order() -> None:
    data = values(96)
    order = torch.randperm(len(data))
    assert_same_bank(bank_of(*data[order].split(5)), bank_of(*data.split(11)))


def test_merge_is_associative_and_commutative() -> None:
    parts = values(90).split((1, 9, 80))
    results = []
    for order in itertools.permutations(parts):
        left = bank_of(order[0])
        left.merge(bank_of(order[1]))
        left.merge(bank_of(order[2]))
        right = bank_of(order[1])
        right.merge(bank_of(order[2]))
        first = bank_of(order[0])
        first.merge(right)
        results += [left, first]
    for result in results:
        assert_same_bank(result, bank_of(*parts))


def test_merge_with_nothing_changes_nothing() -> None:
    bank = bank_of(values())
    bank.merge(RangeBank(1, 48))
    assert_same_bank(bank, bank_of(values()))
    empty = RangeBank(1, 48)
    empty.merge(bank)
    assert_same_bank(empty, bank)


def test_merge_refuses_another_number_of_rows() -> None:
    with pytest.raises(ShapeError, match=r"bank of \[2, 3\] rows and channels, expected \[1, 3\]"):
        RangeBank(1, 3).merge(RangeBank(2, 3))


def test_range_grows_beyond_all_bins_at_once() -> None:
    bank = bank_of(torch.full((4, 3), 1e-9), torch.full((1, 3), 3e7))
    assert int(bank.counts[0, 0]) == 12
    assert int(bank.counts.sum()) == 15


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 1.0, 2.0**127, 3.3e38])
def test_every_magnitude_is_counted(magnitude: float) -> None:
    bank = bank_of(torch.tensor([[magnitude, -magnitude]], dtype=torch.float32))
    assert int(bank.counts.sum()) == 2
    assert int(bank.counts.min()) == 0
    assert float(bank.absmax) == np.float32(magnitude)


def test_a_power_of_two_is_inside_the_range() -> None:
    bank = bank_of(torch.tensor([[4.0]]))
    assert int(bank.exponent) == 3
    assert int(bank.counts[0].argmax()) == NUM_BINS // 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_show_in_absmax(bad: float) -> None:
    bank = bank_of(torch.ones(2, 3), torch.tensor([[0.5, bad, 1.0]]), torch.ones(2, 3))
    assert not bool(bank.absmax.isfinite().all())


def test_bf16_counts_as_its_fp32_values() -> None:
    data = values().bfloat16()
    assert_same_bank(bank_of(data), bank_of(data.float()))


def test_rows_of_a_bank_are_banks_of_their_own() -> None:
    data = values(120)
    parts = dict(zip((3, 0, 4), data.split((20, 99, 1)), strict=True))
    bank = RangeBank(5, data.shape[1])
    bank.observe([*parts.items(), (1, data[:0])])
    bank.observe([(row, part * 3) for row, part in parts.items()])
    for row in range(5):
        expected = RangeBank(1, data.shape[1])
        if row in parts:
            expected = bank_of(parts[row], parts[row] * 3)
            assert torch.equal(bank.channel_absmax[row], parts[row].abs().amax(0) * 3)
        assert torch.equal(bank.counts[row : row + 1], expected.counts)
        assert torch.equal(bank.exponent[row : row + 1], expected.exponent)
        assert torch.equal(bank.absmax[row : row + 1], expected.absmax)
    assert_same_bank(bank.total(), bank_of(data, data * 3))


def test_the_same_row_twice_in_one_call() -> None:
    data = values(40)
    bank = RangeBank(1, data.shape[1])
    bank.observe([(0, data[:7]), (0, data[7:])])
    assert_same_bank(bank, bank_of(data))


def test_ranges_without_histograms() -> None:
    data = values(40)
    bank = RangeBank(1, data.shape[1])
    bank.observe([(0, data)], count=False)
    assert torch.equal(bank.absmax, bank_of(data).absmax)
    assert int(bank.counts.sum()) == 0


@pytest.mark.parametrize("text", ["tensor", "channel", "token", "group(32)", "block(16, 10)"])
def test_absmax_at_every_granularity_is_that_of_numpy(text: str) -> None:
    data = values(96, 80)
    observer, other = AbsMax(Granularity.parse(text)), AbsMax(Granularity.parse(text))
    observer.observe(data[:48])
    observer.observe(data[:0])
    other.observe(data[48:])
    observer.merge(other)
    observer.merge(AbsMax(Granularity.parse(text)))
    magnitudes = np.abs(data.numpy().astype(np.float64))
    rows, columns = {
        "tensor": (96, 80),
        "channel": (96, 1),
        "token": (1, 80),
        "group(32)": (1, 32),
        "block(16, 10)": (16, 10),
    }[text]
    expected = [
        [magnitudes[r : r + rows, c : c + columns].max() for c in range(0, 80, columns)]
        for r in range(0, 96, rows)
    ]
    np.testing.assert_array_equal(observer.result().numpy(), expected)


def test_absmax_of_nothing_is_empty() -> None:
    assert AbsMax(Granularity.parse("token")).result().numel() == 0
