"""`quantize_checkpoint`: what it writes, twice the same, whatever kills or stops it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ringexport.checkpoint import CheckpointWeights
from ringexport.errors import CalibrationError, CheckpointError, OutputError, QuantizationError
from ringexport.ops.quantization import dequantize
from ringexport.ops.schemes import WeightScheme
from ringexport.progress import NoProgress
from ringexport.quantize import run
from ringexport.quantize.formats import quantize_array
from ringexport.quantize.recipe import Recipe
from ringexport.quantize.resolve import resolve_recipe
from ringexport.quantize.run import estimate, quantize_checkpoint
from ringexport.quantize.shard import ShardWriter
from ringexport.quantize.shipped import load_recipe
from ringexport.quantize.transforms import fold_sites
from ringexport.quantize.workdir import REPORT_NAME, WorkDirectory
from tests.checkpoints import make_checkpoint
from tests.numerics import assert_same
from tests.quantize.stats import make_stats

ROOT = Path(__file__).parents[2]
SMALL_SHARDS = 60_000
RECIPES = ("fp8", "fp8-static", "fp8-block", "fp8-all", "int8", "int8-weight-only")


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smaller than the shared one: 4 layers, 8 experts."""
    return make_checkpoint(
        tmp_path_factory.mktemp("run") / "source",
        num_hidden_layers=4,
        layer_group_size=2,
        num_experts=8,
        num_experts_per_tok=2,
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if ".tmp-" in path.name)


def names_of(weights: CheckpointWeights) -> set[str]:
    return {f"{module}.weight" for module in weights.schemes}


def quantize(source: Path, output: Path, recipe: str = "fp8", **options: Any) -> Any:
    loaded = load_recipe(recipe)
    with CheckpointWeights.open(source) as weights:
        needed = resolve_recipe(loaded, weights.config).stats_reasons
        stats = make_stats(weights.config) if needed else None
    options = {"stats": stats, "max_shard_bytes": SMALL_SHARDS} | options
    return quantize_checkpoint(source, output, loaded, **options)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_round_trips_through_the_reader(
    recipe: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    result = quantize(tiny_checkpoint, tmp_path / "q", recipe)
    loaded = load_recipe(recipe)
    smooth = loaded.smoothquant is not None
    with (
        CheckpointWeights.open(tiny_checkpoint) as source,
        CheckpointWeights.open(tmp_path / "q") as found,
    ):
        resolved = resolve_recipe(loaded, source.config)
        assert result.resolved == resolved
        assert set(found.schemes) == set(resolved.quantized)
        for name in source.names():
            entry = resolved.quantized.get(name.removesuffix(".weight"))
            if entry is None:
                if not smooth:
                    assert_same(found.read(name), source.read(name))
                continue
            weights = entry.scheme.weights
            assert isinstance(weights, WeightScheme)
            assert str(found.schemes[entry.module.name].activations) == str(
                entry.scheme.activations
            )
            if not smooth:
                expected = quantize_array(source.read(name), weights)
                assert_same(found.quantized(name).values, expected.values)
                assert_same(found.quantized(name).weight_scale, expected.weight_scale)
            assert_same(found.read_f32(name), dequantize(found.quantized(name)))
            rows = found.info(name).shape[0]
            part = found.read_rows(name, rows // 3, rows - 1)
            assert_same(part, found.read_f32(name)[rows // 3 : rows - 1])
            assert (found.input_scale(entry.module.name) is None) != entry.scheme.needs_stats


def test_static_scales_are_those_of_the_stats(tiny_checkpoint: Path, tmp_path: Path) -> None:
    quantize(tiny_checkpoint, tmp_path / "static", "fp8-static")
    quantize(tiny_checkpoint, tmp_path / "all", "fp8-all")
    with CheckpointWeights.open(tmp_path / "static") as static:
        stats = make_stats(static.config)
        for module in static.schemes:
            expected = np.float32(stats.input_range(module) / 448)
            assert static.input_scale(module) == expected
        assert static.kv_scales(2) is None
    with CheckpointWeights.open(tmp_path / "all") as everything:
        for layer in everything.config.softmax_layers:
            found = everything.kv_scales(layer)
            assert found is not None
            assert all(0 < scale < 9 / 448 for scale in found)


def test_smoothquant_folds_leave_the_product_and_the_router(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Undo the folds of the written weights: the source comes back, up to INT8's rounding."""
    quantize(tiny_checkpoint, tmp_path / "q", "int8")
    with (
        CheckpointWeights.open(tiny_checkpoint) as source,
        CheckpointWeights.open(tmp_path / "q") as found,
    ):
        changed = 0
        for site in fold_sites(source.config):
            name = f"{site.absorber}.weight"
            if name in names_of(found):
                continue
            factors = source.read_f32(name) / found.read_f32(name)
            np.testing.assert_array_equal(np.log2(factors) % 1, 0)
            changed += int((factors != 1).sum())
            for consumer in site.consumers:
                weight = f"{consumer}.weight"
                back = found.read_f32(weight) / factors
                if weight in names_of(found):
                    error = np.abs(back - source.read_f32(weight)) * factors
                    up = name.endswith("post_attention_layernorm.weight") and "up_proj" in weight
                    assert up or error.max() <= np.abs(found.read_f32(weight)).max() / 127
                else:
                    assert_same(back, source.read_f32(weight))
        assert changed > 100


def test_output_is_what_hugging_face_tools_expect(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = quantize(tiny_checkpoint, tmp_path / "q")
    files = contents(tmp_path / "q")
    index = json.loads(files["model.safetensors.index.json"])
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    assert len(shards) >= 4
    loaded = {}
    for shard in shards:
        with safe_open(tmp_path / "q" / shard, framework="numpy") as file:
            loaded |= dict.fromkeys(file.keys(), shard)
    assert loaded == index["weight_map"]
    for shard in shards:
        header = int.from_bytes(files[shard][:8], "little")
        assert header % 8 == 0
        assert len(files[shard]) - header - 8 <= SMALL_SHARDS
    assert sum(len(files[shard]) for shard in shards) == result.output_bytes
    config = json.loads(files["config.json"])
    stored = config.pop("quantization_config")
    assert config == json.loads((tiny_checkpoint / "config.json").read_text())
    assert stored["format"] == "float-quantized"
    assert stored["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert "lm_head" in stored["ignore"]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert files[name] == (tiny_checkpoint / name).read_bytes()
    assert json.loads(files[REPORT_NAME])["files"] == sorted(files)


def test_the_same_inputs_give_the_same_bytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for recipe in ("fp8-block", "int8"):
        quantize(tiny_checkpoint, tmp_path / "a", recipe)
        quantize(tiny_checkpoint, tmp_path / "b", recipe, threads=3)
        assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_blocks_of_rows_do_not_change_the_result(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Recipe.from_dict(
        {
            "rules": [
                {
                    "targets": ["*"],
                    "weights": {"format": "fp8_e4m3", "granularity": "tensor", "observer": "mse"},
                },
                {
                    "targets": ["linear_attention"],
                    "weights": {"format": "int8", "granularity": "block(48, 40)"},
                },
            ]
        },
        name="own",
        source="own",
    )
    quantize_checkpoint(tiny_checkpoint, tmp_path / "a", own)
    monkeypatch.setattr("ringexport.quantize.shard._BLOCK_ELEMENTS", 1000)
    quantize_checkpoint(tiny_checkpoint, tmp_path / "b", own, threads=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_an_older_output_is_replaced_and_nothing_else(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "q"
    quantize(tiny_checkpoint, output, "fp8")
    quantize(tiny_checkpoint, output, "int8-weight-only", max_shard_bytes=10**9)
    assert (output / "model.safetensors").exists()
    assert not (output / "model.safetensors.index.json").exists()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"such as notes\.txt"):
        quantize(tiny_checkpoint, output)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="was not written by ringexport quantize"):
        quantize(tiny_checkpoint, foreign)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(OutputError, match="is not a directory"):
        quantize(tiny_checkpoint, file)
    for inside in (tiny_checkpoint, tiny_checkpoint / "q", tiny_checkpoint.parent):
        with pytest.raises(OutputError, match="the checkpoint"):
            quantize(tiny_checkpoint, inside)
    assert leftovers(tmp_path) == []


class Stop(NoProgress):
    """Raises after some bytes."""

    def __init__(self, after: int, error: BaseException) -> None:
        self.left, self.error = after, error

    def advance(self, amount: int = 1) -> None:
        self.left -= amount
        if self.left < 0:
            raise self.error


def test_an_interrupted_run_is_continued(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(tiny_checkpoint, tmp_path / "whole")
    output = tmp_path / "q"
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_checkpoint, output, progress=Stop(250_000, KeyboardInterrupt()))
    assert not output.exists()
    assert len(leftovers(tmp_path)) == 1
    written: list[str] = []
    original = ShardWriter.write

    def write(self: ShardWriter, shard: Any, path: Path) -> Any:
        written.append(shard.name)
        return original(self, shard, path)

    monkeypatch.setattr(ShardWriter, "write", write)
    result = quantize(tiny_checkpoint, output)
    assert result.reused_files >= 2
    assert len(written) + result.reused_files == len(list(output.glob("*.safetensors")))
    assert contents(output) == contents(tmp_path / "whole")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("method", ["remove_notes", "publish"])
def test_a_run_stopped_at_its_very_end_is_continued(
    method: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(tiny_checkpoint, tmp_path / "whole")

    def stop(self: WorkDirectory) -> None:
        raise KeyboardInterrupt(self.path)

    with monkeypatch.context() as patch:
        patch.setattr(WorkDirectory, method, stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(tiny_checkpoint, tmp_path / "q")
    quantize(tiny_checkpoint, tmp_path / "q")
    assert contents(tmp_path / "q") == contents(tmp_path / "whole")
    assert leftovers(tmp_path) == []


def test_packed_weights_of_any_width(tmp_path: Path) -> None:
    """Rows of 18 codes do not fill whole words; readers see them as if they were not packed."""
    source = make_checkpoint(tmp_path / "source", moe_intermediate_size=18)
    quantize(source, tmp_path / "q", "int8-weight-only")
    with CheckpointWeights.open(source) as plain, CheckpointWeights.open(tmp_path / "q") as found:
        scheme = found.schemes["lm_head"].weights
        assert scheme is not None
        assert "lm_head.weight_packed" in found._owners
        for module in found.schemes:
            name = f"{module}.weight"
            expected = quantize_array(plain.read(name), scheme)
            assert_same(found.quantized(name).values, expected.values)
            assert found.info(name).shape == plain.info(name).shape
            assert_same(found.read_rows(name, 3, 9), dequantize(expected)[3:9])
            found.release(name)


@pytest.mark.parametrize("change", ["recipe", "source", "shards"])
def test_nothing_stale_is_used(change: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint, source)
    output = tmp_path / "q"
    with pytest.raises(KeyboardInterrupt):
        quantize(source, output, progress=Stop(350_000, KeyboardInterrupt()))
    if change == "source":
        path = next(source.glob("*00001*.safetensors"))
        tensors = load_file(path)
        tensors["model.layers.0.mlp.up_proj.weight"] = -tensors["model.layers.0.mlp.up_proj.weight"]
        save_file(tensors, path, metadata={"format": "pt"})
    options: dict[str, Any] = {"max_shard_bytes": 90_000} if change == "shards" else {}
    recipe = "fp8-block" if change == "recipe" else "fp8"
    result = quantize(source, output, recipe, **options)
    assert result.reused_files == 0
    assert leftovers(tmp_path) == [], "what the other run left is gone"
    quantize(source, tmp_path / "fresh", recipe, **options)
    assert contents(output) == contents(tmp_path / "fresh")


def test_a_damaged_part_is_written_again(tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "q"
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_checkpoint, output, progress=Stop(350_000, KeyboardInterrupt()))
    work = next(tmp_path.glob("q.tmp-*"))
    shards = sorted(work.glob("*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    note = work / f".{shards[1].name}.json"
    note.write_text("{")
    quantize(tiny_checkpoint, tmp_path / "whole")
    assert quantize(tiny_checkpoint, output).reused_files == len(shards) - 2
    assert contents(output) == contents(tmp_path / "whole")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("bug")])
def test_a_failure_leaves_the_old_output_and_no_trace(
    error: Exception, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "deep" / "q"
    quantize(tiny_checkpoint, output, "int8-weight-only")
    before = contents(output)
    with pytest.raises((OutputError, RuntimeError), match=r"No space|bug"):
        quantize(tiny_checkpoint, output, progress=Stop(150_000, error))
    assert contents(output) == before
    assert leftovers(output.parent) == []


def test_too_small_a_disk_is_noticed_first(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"needs \d{3},\d{3} bytes, 1,000 are free"):
        quantize(tiny_checkpoint, tmp_path / "q")
    assert list(tmp_path.iterdir()) == []


def test_two_runs_at_once_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "q"

    class Second(NoProgress):
        def note(self, message: str) -> None:
            raise AssertionError(message)

        def finish(self) -> None:
            with pytest.raises(OutputError, match="another process is writing"):
                quantize(tiny_checkpoint, output)

    quantize(tiny_checkpoint, output, progress=Second())
    assert output.exists()


def test_bad_sources_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="recipe bf16 quantizes nothing"):
        quantize(tiny_checkpoint, tmp_path / "q", "bf16")
    for name in ("fp8-static", "fp8-all", "int8"):
        with pytest.raises(CalibrationError, match=f"recipe {name} needs calibration stats"):
            quantize(tiny_checkpoint, tmp_path / "q", name, stats=None)
    quantize(tiny_checkpoint, tmp_path / "once")
    with pytest.raises(QuantizationError, match="is quantized already"):
        quantize(tmp_path / "once", tmp_path / "twice")
    for name in ("model.layers.3.mlp.experts.5.up_proj.weight", "model.layers.1.mlp.gate.weight"):
        broken = tmp_path / "broken"
        shutil.copytree(tiny_checkpoint, broken, dirs_exist_ok=True)
        index = json.loads((broken / "model.safetensors.index.json").read_text())
        path = broken / index["weight_map"][name]
        tensors = load_file(path)
        tensors[name][1, 2] = ml_dtypes.bfloat16(np.nan)
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises((QuantizationError, CheckpointError), match=rf"{name} holds nan at \[1"):
            quantize(broken, tmp_path / "q")
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "q").exists()


def test_estimate_says_what_is_written(tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = estimate(tiny_checkpoint, load_recipe("fp8"))
    result = quantize(tiny_checkpoint, tmp_path / "q", max_shard_bytes=run.MAX_SHARD_BYTES)
    assert (found.source_bytes, found.output_bytes) == (result.source_bytes, result.output_bytes)
    assert found.files == ("model.safetensors",)


KILLED = """
import sys, time
from pathlib import Path
from ringexport.progress import NoProgress
from ringexport.quantize.run import quantize_checkpoint
from ringexport.quantize.shipped import load_recipe

class Slow(NoProgress):
    def advance(self, amount=1):
        time.sleep(0.002)

print("ready", flush=True)
quantize_checkpoint(
    Path(sys.argv[1]), Path(sys.argv[2]), load_recipe("fp8"),
    max_shard_bytes=int(sys.argv[3]), progress=Slow(),
)
"""


def test_kill_nine_at_random_points(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Five kills, each somewhere else; what the killed runs left is continued, never trusted."""
    quantize(tiny_checkpoint, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    chance = random.Random(3)
    arguments = [sys.executable, "-c", KILLED, str(tiny_checkpoint)]
    output = tmp_path / "q"
    for _ in range(5):
        process = subprocess.Popen(
            [*arguments, str(output), str(SMALL_SHARDS)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(chance.uniform(0.05, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if output.exists():
            assert contents(output) == expected
            shutil.rmtree(output)
    quantize(tiny_checkpoint, output)
    assert contents(output) == expected
    assert leftovers(tmp_path) == []
