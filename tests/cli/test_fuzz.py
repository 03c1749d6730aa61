"""Damaged bundles through the whole command: exit code 3 and two lines, or a normal run."""

import contextlib
import io
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringexport.cli.main import run_cli

FILES = (
    "manifest.json",
    "model/config.json",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
    "targets/onnxruntime-cpu/model.onnx",
    "targets/onnxruntime-cpu/weights.bin",
)


@pytest.fixture(scope="module")
def victim(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(bundle, tmp_path_factory.mktemp("victim") / "bundle"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_bundles(victim: Path, data: st.DataObject) -> None:
    path = victim / data.draw(st.sampled_from(FILES))
    original = path.read_bytes()
    place = data.draw(st.integers(0, len(original) - 1))
    if data.draw(st.booleans()):
        damaged = original[:place]
    else:
        flip = data.draw(st.integers(1, 255))
        damaged = original[:place] + bytes([original[place] ^ flip]) + original[place + 1 :]
    path.write_bytes(damaged)
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run_cli(["run", str(victim), "x", "--max-new-tokens", "1", "-q"])
    finally:
        path.write_bytes(original)
    lines = err.getvalue().splitlines()
    if code == 0:
        assert path.name == "manifest.json"
        assert lines == []
        return
    # A target whose name was damaged is a backend that does not exist.
    assert code == 3 or (code == 4 and path.name == "manifest.json"), lines
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"]
    assert out.getvalue() == ""
