"""ring-nano, the model that every promise is shown on: both backends agree and it is any good."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringexport import Engine, SamplingParams
from ringexport.cli.main import run_cli

ROOT = Path(__file__).parents[2]
PROMPTS = (
    "The purpose of this function is",
    "def read_file(path):\n",
    "Once upon a time",
    "The tables below show",
)
NEW_TOKENS = 64
MAX_BITS_PER_BYTE = 1.6
"""Measured: 1.525 on these 4,000 tokens, in one window from an empty state."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ring-nano") / "bundle"
    assert run_cli(["build", str(ROOT / "models/ring-nano"), "-o", str(path), "-q"]) == 0
    return path


@pytest.fixture(scope="module")
def engines(bundle: Path) -> Iterator[tuple[Engine, Engine]]:
    with (
        Engine.open(bundle, backend="onnxruntime:cpu") as one,
        Engine.open(bundle, backend="torch") as other,
    ):
        yield one, other


@pytest.mark.parametrize("prompt", PROMPTS)
def test_both_backends_write_the_same_text(engines: tuple[Engine, Engine], prompt: str) -> None:
    params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    found, expected = (engine.generate(prompt, params) for engine in engines)
    assert found.new_tokens == NEW_TOKENS
    assert found.text == expected.text
    assert found.text.strip()


def test_held_out_english_is_predicted(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ROOT / "calibration" / "text" / "heldout-english.txt"
    arguments = ["eval", str(bundle), "--text", str(text), "--max-tokens", "4000", "--json", "-q"]
    assert run_cli(arguments) == 0
    total = json.loads(capsys.readouterr().out)["total"]
    assert total["tokens"] == 3999
    assert total["bits_per_byte"] < MAX_BITS_PER_BYTE
