"""Clip values against brute force over the elements, and against TensorRT's algorithm in loops."""

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch

from ringexport.calibrate.clipping import ClipFinder, ClipMethod, round_trip
from ringexport.calibrate.observers import NUM_BINS, RangeBank
from ringexport.errors import ConfigError
from ringexport.ops.quantization import NumberFormat
from tests.conftest import SEED

Floats = npt.NDArray[np.float64]
FORMATS = list(NumberFormat)


def samples(kind: str) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(SEED)
    shape = (512, 64)
    drawn = {
        "normal": lambda: rng.standard_normal(shape),
        "heavy": lambda: rng.standard_t(2.5, shape),
        "half-zero": lambda: np.maximum(rng.standard_normal(shape), 0.0),
        "outliers": lambda: (
            rng.standard_normal(shape) * np.where(rng.random(shape) < 1e-3, 40.0, 1)
        ),
        "uniform": lambda: rng.uniform(-1.0, 1.0, shape),
    }[kind]()
    return drawn.astype(np.float32)


KINDS = ("normal", "heavy", "half-zero", "outliers", "uniform")


@pytest.fixture(scope="module")
def finder() -> ClipFinder:
    return ClipFinder(percentile=99.9)


def bank_of(array: npt.NDArray[np.float32]) -> RangeBank:
    bank = RangeBank(1, array.shape[1])
    bank.observe([(0, torch.from_numpy(array))])
    return bank


def quantized(magnitudes: Floats, clip: float, codes: NumberFormat) -> Floats:
    """Round trip by the library's casts, not by the code under test."""
    scale = clip / codes.half_range
    if codes is NumberFormat.INT8:
        return np.clip(np.rint(magnitudes / scale), -128, 127) * scale
    scaled = np.clip(magnitudes / scale, -448.0, 448.0).astype(np.float32)
    return scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


@pytest.mark.parametrize("codes", FORMATS)
def test_round_trip_is_that_of_the_casts(codes: NumberFormat) -> None:
    magnitudes = np.abs(samples("heavy")).astype(np.float64).ravel()
    found = round_trip(torch.from_numpy(magnitudes), torch.tensor(3.5).double(), codes)
    np.testing.assert_allclose(found.numpy(), quantized(magnitudes, 3.5, codes), rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_percentile_is_the_quantile_of_the_elements(finder: ClipFinder, kind: str) -> None:
    array = samples(kind)
    bank = bank_of(array)
    clip = float(finder.find(bank, ClipMethod.PERCENTILE, NumberFormat.INT8))
    bin_width = 2.0 ** int(bank.exponent) / NUM_BINS
    expected = np.quantile(np.abs(array), 0.999, method="inverted_cdf")
    assert clip == pytest.approx(expected, abs=1.01 * bin_width)


def test_percentile_100_is_the_largest() -> None:
    bank = bank_of(samples("heavy"))
    clip = ClipFinder(percentile=100.0).find(bank, ClipMethod.PERCENTILE, NumberFormat.INT8)
    assert float(clip) == float(bank.absmax)


@pytest.mark.parametrize("codes", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_within_a_percent_of_the_best(
    finder: ClipFinder, kind: str, codes: NumberFormat
) -> None:
    magnitudes = np.abs(samples(kind)).astype(np.float64)
    bank = bank_of(samples(kind))
    clip = float(finder.find(bank, ClipMethod.MSE, codes))

    def error(candidate: float) -> float:
        return float(np.square(quantized(magnitudes, candidate, codes) - magnitudes).mean())

    grid = np.geomspace(magnitudes.max() / 10, magnitudes.max() * 2, 150)
    assert error(clip) <= 1.01 * min(error(float(candidate)) for candidate in grid)


def tensorrt_entropy(counts: npt.NDArray[np.int64], codes: NumberFormat) -> tuple[int, Floats]:
    """The calibrator as its authors publish it: loops over candidates, codes and bins."""
    bins = counts.astype(np.float64)
    bins[0] = bins[1]
    values = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    borders = (values[:-1] + values[1:]) / 2 / 448
    candidates = range(NUM_BINS, 127, -16)
    divergences = []
    for stop in candidates:
        if codes is NumberFormat.INT8:
            code = np.floor(np.arange(stop) * 128 / stop).astype(int)
        else:
            code = np.searchsorted(borders, (np.arange(stop) + 0.5) / stop)
        kept = bins[:stop]
        filled = np.bincount(code, weights=kept > 0, minlength=128)
        average = np.bincount(code, weights=kept, minlength=128) / np.maximum(filled, 1)
        spread = np.where(kept > 0, average[code], 0.0)
        reference = kept.copy()
        reference[-1] += bins[stop:].sum()
        reference, spread = reference / reference.sum(), spread / spread.sum()
        used = reference > 0
        with np.errstate(divide="ignore"):
            ratio = np.log(reference[used] / spread[used])
        divergences.append(float((reference[used] * ratio).sum()))
    best = int(np.argmin(np.round(divergences, 12)))
    return list(candidates)[best], np.asarray(divergences)


@pytest.mark.parametrize("codes", FORMATS)
@pytest.mark.parametrize("kind", ["normal", "heavy", "outliers"])
def test_entropy_is_that_of_the_published_algorithm(
    finder: ClipFinder, kind: str, codes: NumberFormat
) -> None:
    bank = bank_of(samples(kind))
    stop, divergences = tensorrt_entropy(bank.counts[0].numpy(), codes)
    assert np.ptp(divergences[np.isfinite(divergences)]) > 1e-4  # otherwise it says nothing
    width = 2.0 ** int(bank.exponent) / NUM_BINS
    expected = min(stop * width, float(bank.absmax))
    assert float(finder.find(bank, ClipMethod.ENTROPY, codes)) == pytest.approx(expected, rel=1e-6)


def test_entropy_clips_outliers_in_int8(finder: ClipFinder) -> None:
    bank = bank_of(samples("outliers"))
    clip = float(finder.find(bank, ClipMethod.ENTROPY, NumberFormat.INT8))
    assert clip < 0.6 * float(bank.absmax)


@pytest.mark.parametrize("codes", FORMATS)
@pytest.mark.parametrize("method", list(ClipMethod))
def test_clip_values_scale_with_powers_of_two(
    finder: ClipFinder, method: ClipMethod, codes: NumberFormat
) -> None:
    array = samples("heavy")
    clip = finder.find(bank_of(array), method, codes)
    scaled = finder.find(bank_of(array * np.float32(2.0**-20)), method, codes)
    assert torch.equal(scaled, clip * 2.0**-20)


@pytest.mark.parametrize("codes", FORMATS)
@pytest.mark.parametrize("method", list(ClipMethod))
def test_rows_do_not_influence_each_other(
    finder: ClipFinder, method: ClipMethod, codes: NumberFormat
) -> None:
    banks = [bank_of(samples(kind)) for kind in KINDS]
    joined = RangeBank(len(banks) + 1, 64)  # the last row saw nothing
    for name in ("counts", "exponent", "channel_absmax"):
        parts = [getattr(bank, name) for bank in banks]
        setattr(joined, name, torch.cat((*parts, getattr(joined, name)[-1:])))
    found = finder.find(joined, method, codes)
    alone = [finder.find(bank, method, codes) for bank in banks]
    assert torch.equal(found[:-1], torch.cat(alone))
    assert float(found[-1]) == 0.0


@pytest.mark.parametrize("method", list(ClipMethod))
def test_int8_never_clips_above_the_largest(finder: ClipFinder, method: ClipMethod) -> None:
    for kind in KINDS:
        bank = bank_of(samples(kind))
        assert 0 < float(finder.find(bank, method, NumberFormat.INT8)) <= float(bank.absmax)


@pytest.mark.parametrize("percentile", [0.0, -1.0, 100.1, float("nan")])
def test_percentile_out_of_range_is_refused(percentile: float) -> None:
    with pytest.raises(ConfigError, match="percentile is"):
        ClipFinder(percentile=percentile)
