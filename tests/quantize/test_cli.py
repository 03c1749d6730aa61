"""`ringexport quantize` as people call it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ringexport.checkpoint import CheckpointWeights
from ringexport.checkpoint.digest import checkpoint_digest
from ringexport.cli.main import run_cli
from tests.quantize.stats import make_stats


def test_quantize_and_json(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "q"
    assert run_cli(["quantize", str(tiny_checkpoint), "-o", str(output), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipe"] == "fp8"
    assert found["quantized_modules"] == 270
    assert found["saturated"] == {}
    assert found["peak_memory_bytes"] > 1 << 20
    assert (output / "config.json").exists()
    assert run_cli(["quantize", str(tiny_checkpoint), "-o", str(output)]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "quantized 270 modules with recipe fp8" in captured.err
    assert "peak memory" in captured.err


def test_dry_run_shows_every_kind(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["quantize", str(tiny_checkpoint), "-o", str(tmp_path / "q"), "--dry-run"]
    assert run_cli(arguments) == 0
    text = capsys.readouterr().out
    for word in ("routed_experts", "fp8_e4m3 channel", "as they are", "needs calibration"):
        assert word in text
    assert run_cli([*arguments, "--json", "--recipe", "int8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["modules"]) == 275
    assert found["needs_stats"] == ["SmoothQuant"]
    assert list(tmp_path.iterdir()) == []


def test_stats_and_own_recipe(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "own.toml"
    recipe.write_text(
        'base = "fp8-static"\n[[rules]]\ntargets = ["*.dense"]\nscheme = "unquantized"'
    )
    arguments = [
        "quantize",
        str(tiny_checkpoint),
        "-o",
        str(tmp_path / "q"),
        "--recipe",
        str(recipe),
    ]
    stats = tmp_path / "stats.safetensors"
    with CheckpointWeights.open(tiny_checkpoint) as weights:
        found = make_stats(weights.config)
        found.save(stats)
        assert run_cli([*arguments, "--stats", str(stats)]) == 3
        assert "stats are of another checkpoint" in capsys.readouterr().err
        replace(found, model_digest=checkpoint_digest(weights)).save(stats)
    assert run_cli([*arguments, "--stats", str(stats)]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--recipe", "fp9"], 3, "there is no recipe 'fp9'"),
        (["--recipe", "x"], 3, "hint: choices: bf16, fp32, fp8,"),
        (["--recipe", "int8", "--calibration", "x"], 3, "hint: choices: chat, code, english, all"),
        (["--recipe", "int8", "--save-stats", "/proc/stats"], 6, "cannot write /proc/stats"),
        (["--recipe", "int8", "--calibration", ""], 3, "there is no prompt set ''"),
        (["--recipe", "bf16"], 3, "quantizes nothing"),
        (["--stats", "none"], 3, "calibration stats none: No such file or directory\nhint: give"),
        (["--recpe", "fp8"], 2, "recpe"),
    ],
)
def test_wrong_arguments(
    arguments: list[str],
    code: int,
    message: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["quantize", str(tiny_checkpoint), "-o", str(tmp_path / "q"), *arguments]
    assert run_cli(command) == code
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
