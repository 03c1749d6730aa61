"""The tests' own support code: the tiny checkpoint, the comparisons, the rule for skips."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.checkpoints import SPECIAL_TOKENS, make_checkpoint
from tests.numerics import assert_close, assert_same, nan_filled


def test_tiny_checkpoint_is_reproducible_and_fast(tmp_path: Path) -> None:
    first = make_checkpoint(tmp_path / "first")
    start = time.perf_counter()
    second = make_checkpoint(tmp_path / "second")
    assert time.perf_counter() - start < 1.0
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in second.iterdir())
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
    other = make_checkpoint(tmp_path / "other", seed=1)
    weights = "model-00001-of-00002.safetensors"
    assert (first / weights).read_bytes() != (other / weights).read_bytes()


def test_tiny_tokenizer_round_trips_any_text_and_agrees_with_the_configs(
    tiny_checkpoint: Path,
) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))
    text = "<role>HUMAN</role>the thing: héllo 🙂\n\t  x<|role_end|>"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert len(ids) < len(text.encode())
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    generation = json.loads((tiny_checkpoint / "generation_config.json").read_text())
    stops = [tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|role_end|>")]
    assert generation["eos_token_id"] == stops
    assert config["eos_token_id"] == config["pad_token_id"] == stops[0]
    assert all(tokenizer.token_to_id(token) < config["vocab_size"] for token in SPECIAL_TOKENS)
    # The published file has the same 152 bytes.
    assert (tiny_checkpoint / "special_tokens_map.json").stat().st_size == 152


def test_comparisons_see_nan_inf_and_the_worst_element() -> None:
    expected = np.array([1.0, np.nan, np.inf, 4.0], np.float32)
    assert_close(expected, expected, rtol=0)
    assert_close(expected + np.float32(1e-6), expected, rtol=1e-5)
    for bad, message in (
        (nan_filled((4,)), "NaN masks differ first at"),
        (np.array([1, np.nan, 3, 4]), "inf masks differ first at"),
        (np.array([1, np.nan, np.inf, 5]), r"index \[3\]"),
        (np.zeros(3), "shape"),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_close(bad, expected, rtol=1e-5)
    assert_same(expected, expected.copy())
    with pytest.raises(AssertionError):
        assert_same(np.array([0.0]), np.array([-0.0]))


@pytest.mark.parametrize(("required", "outcome"), [("", "1 skipped"), ("trt", "1 error")])
def test_missing_tensorrt_skips_with_its_reason_or_fails_when_required(
    tmp_path: Path, required: str, outcome: str
) -> None:
    root = Path(__file__).parent.parent
    code = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if 'tensorrt' in n else find(n, *a)\n"
        "import pytest\n"
        "sys.exit(pytest.main(sys.argv[1:]))\n"
    )
    case = tmp_path / "test_case.py"
    case.write_text("import pytest\n\n@pytest.mark.trt\ndef test_x():\n    pass\n")
    run = subprocess.run(
        [
            *(sys.executable, "-c", code, "-p", "tests.conftest", "-p", "no:cacheprovider"),
            *("-c", str(root / "pyproject.toml"), "--rootdir", str(tmp_path), str(case)),
        ],
        cwd=root,
        env={"RINGEXPORT_REQUIRE": required, "PATH": "", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome in run.stdout
    assert "neither tensorrt nor tensorrt_rtx is installed" in run.stdout


def test_unknown_requirement_is_refused() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--co", "-q", __file__],
        cwd=Path(__file__).parent.parent,
        env={"RINGEXPORT_REQUIRE": "gpu,tpu", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "RINGEXPORT_REQUIRE names ['tpu']" in run.stderr
