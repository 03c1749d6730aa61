"""Calibration stats: the file comes back, says what is missing, and damage is noticed."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ringexport.checkpoint import RingConfig
from ringexport.errors import CalibrationError, OutputError
from ringexport.stats import CalibrationStats, Quantity
from tests.checkpoints import tiny_config
from tests.numerics import assert_same
from tests.quantize.stats import make_stats

CONFIG = RingConfig.from_dict(tiny_config(), source="tiny")


def test_save_and_load(tmp_path: Path) -> None:
    stats = make_stats(CONFIG)
    path = tmp_path / "stats.safetensors"
    stats.save(path)
    first = path.read_bytes()
    found = CalibrationStats.load(path)
    assert found.entries.keys() == stats.entries.keys()
    for key, array in stats.entries.items():
        assert_same(found.entries[key], array)
    assert found.digest == stats.digest
    found.save(path)
    assert path.read_bytes() == first
    assert [item.name for item in tmp_path.iterdir()] == ["stats.safetensors"]
    assert make_stats(CONFIG, seed=1).digest != stats.digest
    with pytest.raises(OutputError, match="cannot write"):
        stats.save(tmp_path / "missing" / "stats")


def test_reading() -> None:
    one = np.array([2.0], np.float32)
    zero = np.zeros(1, np.float32)
    stats = CalibrationStats(
        model_digest="",
        calibration_set="",
        num_samples=0,
        num_tokens=0,
        entries={
            ("a", Quantity.INPUT_ABSMAX): one,
            ("b", Quantity.INPUT_ABSMAX): one,
            ("b", Quantity.INPUT_RANGE): one / 2,
            ("c", Quantity.INPUT_ABSMAX): zero,
        },
    )
    assert (stats.input_range("a"), stats.input_range("b")) == (2.0, 1.0)
    with pytest.raises(CalibrationError, match="c saw nothing but zeros"):
        stats.input_range("c")
    with pytest.raises(CalibrationError, match="lack input_absmax of d"):
        stats.input_range("d")
    with pytest.raises(CalibrationError, match=r"shape \[1\], expected \[2\]"):
        stats.get("a", Quantity.INPUT_ABSMAX, (2,))
    assert stats.find("d", Quantity.KEY_ABSMAX) is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_impossible_numbers_are_refused(value: float) -> None:
    with pytest.raises(CalibrationError, match="not finite and >= 0"):
        CalibrationStats(
            model_digest="",
            calibration_set="",
            num_samples=0,
            num_tokens=0,
            entries={("a", Quantity.INPUT_ABSMAX): np.array([value], np.float32)},
        )


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "stats"
    with pytest.raises(CalibrationError, match="cannot read"):
        CalibrationStats.load(path)
    make_stats(CONFIG).save(path)
    good = path.read_bytes()
    for data in (b"", good[:-1], b"{}" * 20):
        path.write_bytes(data)
        with pytest.raises(CalibrationError):
            CalibrationStats.load(path)
    ones = np.ones(1, np.float32)
    header = '{"format": "ringexport-calibration-stats", "format_version": %s}'
    cases = [
        ({"a:input_absmax": ones}, None, "holds no calibration stats"),
        ({"a:input_absmax": ones}, "{", "holds no calibration stats"),
        ({"a:input_absmax": ones}, header % 2, "version 2"),
        ({"a:input_absmax": ones}, header % 1, "damaged metadata"),
    ]
    for arrays, text, message in cases:
        save_file(arrays, path, metadata=None if text is None else {"ringexport": text})
        with pytest.raises(CalibrationError, match=message):
            CalibrationStats.load(path)
    renamed = good.replace(b":input_absmax", b":input_absmix")
    path.write_bytes(renamed)
    with pytest.raises(CalibrationError, match="expected module:quantity"):
        CalibrationStats.load(path)
