"""The file of calibration stats: bytes, identity, and what it refuses."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ringexport.errors import CalibrationError
from ringexport.stats import CLIP_OBSERVERS, CalibrationStats, Quantity
from tests.numerics import assert_same


def stats(**changes: object) -> CalibrationStats:
    clips = np.arange(1, len(CLIP_OBSERVERS) + 1, dtype=np.float32)
    entries = {
        ("a.b", Quantity.INPUT_ABSMAX): np.array([7.5], np.float32),
        ("a.b", Quantity.INPUT_CLIPS): clips,
        ("a.b", Quantity.INPUT_SAMPLES): np.array([[-1.0, 2.0]], np.float32),
        ("a", Quantity.INPUT_ABSMAX): np.array([0.0], np.float32),
    }
    known = CalibrationStats(
        model_digest="d" * 64,
        calibration_set="english:e",
        num_samples=2,
        num_tokens=30,
        entries=entries,
        settings='{"decay_index": "serving"}',
    )
    return replace(known, **changes)


def test_the_file_keeps_everything(tmp_path: Path) -> None:
    saved = stats()
    saved.save(tmp_path / "stats")
    loaded = CalibrationStats.load(tmp_path / "stats")
    assert replace(loaded, entries={}) == replace(saved, entries={})
    assert loaded.entries.keys() == saved.entries.keys()
    for key, array in saved.entries.items():
        assert_same(loaded.entries[key], array)
    assert hashlib.sha256((tmp_path / "stats").read_bytes()).hexdigest() == saved.digest
    assert [path.name for path in tmp_path.iterdir()] == ["stats"]


def test_the_order_of_entries_does_not_matter() -> None:
    turned = stats(entries=dict(reversed(stats().entries.items())))
    assert turned.to_bytes() == stats().to_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"model_digest": "e" * 64},
        {"calibration_set": "code:e"},
        {"num_tokens": 31},
        {"settings": '{"decay_index": "hf"}'},
        {"entries": {}},
    ],
)
def test_the_digest_covers_everything(changes: dict[str, object]) -> None:
    assert stats(**changes).digest != stats().digest


@pytest.mark.parametrize(
    ("quantity", "value"),
    [
        (Quantity.INPUT_ABSMAX, -1.0),
        (Quantity.INPUT_ABSMAX, np.nan),
        (Quantity.INPUT_CLIPS, np.inf),
        (Quantity.INPUT_SAMPLES, np.nan),
    ],
)
def test_numbers_that_nothing_can_have_are_refused(quantity: Quantity, value: float) -> None:
    with pytest.raises(CalibrationError, match=f"{quantity} of a holds"):
        stats(entries={("a", quantity): np.array([value], np.float32)})


def test_ranges_that_are_missing_or_zero() -> None:
    with pytest.raises(CalibrationError, match="lack input_absmax of c"):
        stats().input_range("c")
    with pytest.raises(CalibrationError, match="a saw nothing but zeros"):
        stats().input_range("a")
    with pytest.raises(CalibrationError, match=r"has shape \[1\], expected \[4\]"):
        stats().get("a.b", Quantity.INPUT_ABSMAX, (4,))


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        ({"format": "other"}, "a:input_absmax", "holds no calibration stats"),
        ({"format_version": 99}, "a:input_absmax", "is in version 99 of its format"),
        ({"num_tokens": -1}, "a:input_absmax", "damaged metadata"),
        ({"settings": None}, "a:input_absmax", "damaged metadata"),
        ({"more": 1}, "a:input_absmax", "damaged metadata"),
        ({}, "a:unknown", "holds 'a:unknown', expected module:quantity"),
    ],
)
def test_files_that_are_something_else(
    tmp_path: Path, change: dict[str, object], name: str, message: str
) -> None:
    header = stats().to_bytes()
    (length,) = np.frombuffer(header[:8], "<u8")
    about = json.loads(json.loads(header[8 : 8 + int(length)])["__metadata__"]["ringexport"])
    about = {key: value for key, value in (about | change).items() if value is not None}
    path = tmp_path / "stats"
    save_file({name: np.ones(1, np.float32)}, path, metadata={"ringexport": json.dumps(about)})
    with pytest.raises(CalibrationError, match=message):
        CalibrationStats.load(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot read the calibration stats"):
        CalibrationStats.load(tmp_path / "none")
    stats().save(tmp_path / "cut")
    data = (tmp_path / "cut").read_bytes()
    (tmp_path / "cut").write_bytes(data[:-3])
    with pytest.raises(CalibrationError, match="cannot read the calibration stats"):
        CalibrationStats.load(tmp_path / "cut")
