"""`build` and `quantize` with recipes that quantize, calibration included."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import cast

import jsonschema
import numpy as np
import pytest

from ringexport.bundle import EngineBundle
from ringexport.checkpoint import CheckpointWeights
from ringexport.checkpoint.digest import checkpoint_digest
from ringexport.runtime.registry import open_bundle_runner
from ringexport.runtime.runner import ProbeRunner
from ringexport.stats import CalibrationStats
from tests.checkpoints import make_checkpoint
from tests.cli.conftest import Call, assert_refused
from tests.quantize.stats import make_stats

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "engines" / "manifest.schema.json"
NANO = ROOT / "models" / "ring-nano"
NUM_KILLS = 20
SMALL_MODULES = 6 + 3 + 2 * 3 * 4 + 2 * 3
"""Linear attention, dense MLP, experts, shared experts."""
WEIGHTS = "targets/onnxruntime-cpu/weights.bin"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts long enough for every expert of the tiny checkpoint to be shown some tokens."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = ["the man and the sea of a thing " * 4, "in and on it he or she is well " * 4]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with few modules, which is calibrated in seconds."""
    return make_small(tmp_path_factory.mktemp("small"))


def make_small(path: Path, seed: int = 0) -> Path:
    sizes = {"num_hidden_layers": 3, "num_experts": 4, "num_experts_per_tok": 2, "n_group": 2}
    return make_checkpoint(path, seed=seed, **sizes)


@pytest.fixture(scope="module")
def stats(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up stats of the tiny checkpoint."""
    path = tmp_path_factory.mktemp("stats") / "stats.safetensors"
    save_stats(tiny_checkpoint, path)
    return path


def save_stats(checkpoint: Path, path: Path, settings: str = "{}") -> None:
    with CheckpointWeights.open(checkpoint) as weights:
        digest = checkpoint_digest(weights)
        found = make_stats(weights.config)
    dataclasses.replace(found, model_digest=digest, settings=settings).save(path)


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def error_of(bundle: Path, exact: Path) -> float:
    """Relative error after the first layer; behind it, random experts swap places."""
    found = []
    for path in (bundle, exact):
        with closing(open_bundle_runner(EngineBundle.open(path), "onnxruntime:cpu")) as runner:
            state = runner.new_state(1)
            probe = cast("ProbeRunner", runner).probe
            probes = probe(np.array([[5, 9, 77, 30]]), np.array([4]), state)
            found.append(probes["hidden.0"])
    return float(np.linalg.norm(found[0] - found[1]) / np.linalg.norm(found[1]))


def test_int8_from_checkpoint_to_bundle(
    call: Call, small_checkpoint: Path, prompts: Path, tmp_path: Path
) -> None:
    arguments = ["--recipe", "int8", "--calibration", prompts]
    called = call("build", small_checkpoint, "-o", tmp_path / "q", *arguments, "--json")
    assert called.code == 0, called.err
    for stage in ("digest the checkpoint: ", "calibrate: ", "quantize to int8: "):
        assert any(line.startswith(stage) for line in called.err.splitlines())
    value = json.loads((tmp_path / "q" / "manifest.json").read_text())
    jsonschema.validate(value, json.loads(SCHEMA.read_text()))
    manifest = EngineBundle.open(tmp_path / "q").manifest
    assert manifest.build.recipe == "int8"
    found = manifest.quantization
    assert found is not None
    assert found.calibration is not None
    assert found.calibration.prompts == "prompts.jsonl"
    assert found.calibration.num_samples == 2
    assert sum(row.modules for row in found.schemes if row.weights) == SMALL_MODULES
    assert found.weight_bytes < found.source_bytes
    assert f"{SMALL_MODULES} modules: int8 products" in found.notes[0]
    assert list(found.notes) == called.json["notes"]
    shown = call("inspect", tmp_path / "q").out
    for text in ("calibrated with", "prompts.jsonl", "int8 token dynamic", "int8 products"):
        assert text in shown
    assert [path.name for path in tmp_path.iterdir()] == ["q"], "the work folder is gone"
    assert call("build", small_checkpoint, "-o", tmp_path / "exact", "-q").code == 0
    assert 0 < error_of(tmp_path / "q", tmp_path / "exact") < 0.03


def test_two_builds_are_byte_identical(
    call: Call,
    tiny_checkpoint: Path,
    stats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["--recipe", "int8", "--stats", stats, "-q"]
    for threads in "13":
        monkeypatch.setenv("RINGEXPORT_THREADS", threads)
        called = call("build", tiny_checkpoint, "-o", tmp_path / threads, *arguments)
        assert called.code == 0, called.err
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")


@pytest.mark.parametrize("recipe", ["fp8", "fp8-block", "fp8-static", "int8-weight-only"])
def test_other_recipes_say_what_is_computed(
    call: Call, tiny_checkpoint: Path, bundle: Path, stats: Path, tmp_path: Path, recipe: str
) -> None:
    extra = ["--stats", stats] if recipe == "fp8-static" else []
    called = call("build", tiny_checkpoint, "-o", tmp_path / "q", "--recipe", recipe, *extra)
    assert called.code == 0, called.err
    found = EngineBundle.open(tmp_path / "q").manifest.quantization
    assert found is not None
    assert (found.calibration is not None) == bool(extra)
    expected = {
        "fp8": ["rounded to FP8, products computed in fp32"],
        "fp8-static": ["rounded to FP8, products computed in fp32", "static scale of the first"],
        "fp8-block": ["rounded to FP8, products computed in fp32", "stored dequantized"],
        "int8-weight-only": ["int8 products"],
    }[recipe]
    assert len(found.notes) == len(expected)
    for text, note in zip(expected, found.notes, strict=True):
        assert text in note
        assert f"note: {note}" in called.err
    if not extra:  # made-up ranges say nothing about the error
        assert 0 < error_of(tmp_path / "q", bundle) < 0.1


def test_a_quantized_checkpoint_is_built_as_it_is(
    call: Call, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    assert call("quantize", tiny_checkpoint, "-o", tmp_path / "c", "-q").code == 0
    assert call("build", tmp_path / "c", "-o", tmp_path / "a", "-q").code == 0
    direct = ["-o", tmp_path / "b", "--recipe", "fp8", "-q"]
    assert call("build", tiny_checkpoint, *direct).code == 0
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    stored = EngineBundle.open(tmp_path / "a").manifest
    assert stored.build.recipe == "as-stored"
    assert stored.quantization is not None
    assert stored.quantization.notes
    called = call("build", tmp_path / "c", "-o", tmp_path / "d", "--recipe", "int8")
    assert_refused(called, 3, "is quantized already", "leave out --recipe")


def test_own_recipe(call: Call, tiny_checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "own.toml"
    recipe.write_text('base = "fp8-all"\nkv_cache = "none"\n')
    output = tmp_path / "q"
    called = call("build", tiny_checkpoint, "-o", output, "--recipe", recipe)
    assert called.code == 0, called.err
    manifest = EngineBundle.open(output).manifest
    assert manifest.build.recipe == "own"
    assert manifest.quantization is not None
    assert all(row.weights for row in manifest.quantization.schemes)


def test_a_calibration_that_nothing_needs_is_not_run(
    call: Call, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    arguments = ["--recipe", "fp8", "--calibration", "english"]
    for command in ("build", "quantize"):
        called = call(command, tiny_checkpoint, "-o", tmp_path / command, *arguments)
        assert called.code == 0, called.err
        assert "the recipe fp8 needs no calibration" in called.err
        assert "calibrate:" not in called.err


INT8_NOTE = "int8 products; inputs are quantized to int8 per block of at most 64"


def test_dry_run_shows_the_modules(call: Call, tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["build", tiny_checkpoint, "-o", tmp_path / "q", "--recipe", "int8", "--dry-run"]
    called = call(*arguments)
    for text in ("routed_experts", "int8 channel", "as they are", "SmoothQuant", "work folder"):
        assert text in called.out
    found = call(*arguments, "--json").json
    assert sum(row["modules"] for row in found["schemes"]) == 275
    assert found["needs_calibration"] == ["SmoothQuant"]
    assert [note.partition(": ")[2] for note in found["notes"]] == [INT8_NOTE]
    assert f"modules: {INT8_NOTE}" in called.err
    assert 0 < found["work_bytes"] < found["source_bytes"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "recipe", "texts"),
    [
        (["--recipe", "fp8-all"], None, ["does not run the recipe fp8-all", "KV cache is fp32"]),
        (["--recipe", "none.toml"], None, ["cannot read none.toml"]),
        ([], 'base = "fp8-all"', ["8-bit KV cache", "kv_cache = 'none'"]),
        ([], 'base = "fp8"\nrecurrent_state = "int8"', ["recurrent state in int8"]),
        ([], 'base = "fp8"\nrecurent_state = "int8"', ["did you mean 'recurrent_state'?"]),
        (["--recipe", "int8", "--calibration", "englsh"], None, ["did you mean 'english'?"]),
        (["--recipe", "int8", "--calibration", "no.jsonl"], None, ["cannot read no.jsonl"]),
        (["--recipe", "int8", "--stats", "no"], None, ["cannot read the calibration stats no"]),
        (["--stats", "a", "--calibration", "english"], None, ["both calibration stats and"]),
    ],
)
def test_requests_that_are_refused(
    call: Call,
    tiny_checkpoint: Path,
    tmp_path: Path,
    arguments: list[str],
    recipe: str | None,
    texts: list[str],
) -> None:
    output = tmp_path / "out" / "q"
    if recipe is not None:
        (tmp_path / "own.toml").write_text(recipe)
        arguments = ["--recipe", str(tmp_path / "own.toml")]
    called = call("build", tiny_checkpoint, "-o", output, *arguments)
    assert called.code == 3
    for text in texts:
        assert text in called.err
    assert "Traceback" not in called.err
    assert not output.parent.exists()


@pytest.mark.parametrize("command", ["build", "quantize"])
def test_stats_of_another_checkpoint_are_refused(
    call: Call, tiny_checkpoint: Path, stats: Path, tmp_path: Path, command: str
) -> None:
    other = make_checkpoint(tmp_path / "other", seed=1)
    arguments = ["--recipe", "int8", "--stats", stats]
    called = call(command, other, "-o", tmp_path / "q", *arguments)
    assert_refused(called, 3, "are of another checkpoint", "--calibration instead")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    assert call(command, tiny_checkpoint, "-o", tmp_path / "q", *arguments).code == 0


def test_stats_of_another_decay_index_are_refused(
    call: Call, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "hf.safetensors"
    save_stats(tiny_checkpoint, path, settings='{"decay_index": "hf"}')
    arguments = ["build", tiny_checkpoint, "-o", tmp_path / "q", "--recipe", "int8"]
    called = call(*arguments, "--stats", path)
    assert_refused(called, 3, "with the decay index hf, expected serving")
    assert call(*arguments, "--stats", path, "--decay-index", "hf").code == 0


def test_quantize_calibrates_and_keeps_the_stats(
    call: Call, small_checkpoint: Path, prompts: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "stats.safetensors"
    source = ["quantize", small_checkpoint, "--recipe", "fp8-static"]
    samples = ["--calibration", prompts, "--calibration-samples", 1]
    called = call(*source, "-o", tmp_path / "a", *samples, "--save-stats", kept)
    assert called.code == 0, called.err
    assert "calibrate: " in called.err
    assert "above the interpreter" in called.err
    assert CalibrationStats.load(kept).num_samples == 1
    assert call(*source, "-o", tmp_path / "b", "--stats", kept, "-q").code == 0
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", kept.name}


# Interrupts, in processes of their own.


class Build:
    """An int8 build of a checkpoint in a process of its own."""

    def __init__(self, checkpoint: Path, output: Path, source: Path) -> None:
        self.output, self.said = output, ""
        option = "--calibration" if source.suffix == ".jsonl" else "--stats"
        command = [sys.executable, "-m", "ringexport", "build", str(checkpoint), "-o", str(output)]
        self.process = subprocess.Popen(
            [*command, "--recipe", "int8", option, str(source)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def stop(self, pattern: str, kind: signal.Signals) -> int:
        """Send a signal as soon as the work folder holds such a file; return the exit status."""
        deadline = time.monotonic() + 120
        while self.process.poll() is None and time.monotonic() < deadline:
            if list(self.output.parent.glob(f"{self.output.name}.work-*/{pattern}")):
                self.process.send_signal(kind)
                break
            time.sleep(0.002)
        _, self.said = self.process.communicate(timeout=120)
        return self.process.returncode

    def finish(self) -> str:
        """Wait for success and return what was said."""
        _, said = self.process.communicate(timeout=200)
        assert self.process.returncode == 0, said
        return said


@pytest.mark.slow
def test_killed_twice_and_completed(small_checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    storm, calm = tmp_path / "storm", tmp_path / "calm"
    Build(small_checkpoint, calm, prompts).finish()
    for pattern in ("calibrate-*/stats-0001.st", "quantized"):
        killed = Build(small_checkpoint, storm, prompts).stop(pattern, signal.SIGKILL)
        assert killed == -signal.SIGKILL
        assert not storm.exists()
    said = Build(small_checkpoint, storm, prompts).finish()
    assert "the calibration was finished by an earlier run" in said
    assert "the weights were quantized by an earlier run" in said
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (storm, calm)]
    assert manifests[0] == manifests[1]  # names what differs
    assert files_of(storm) == files_of(calm)
    left = {path.name for path in tmp_path.iterdir() if ".tmp-" not in path.name}
    assert left == {"calm", "storm"}


@pytest.mark.slow
def test_what_a_killed_build_left_is_not_used_for_a_changed_checkpoint(
    small_checkpoint: Path, prompts: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(small_checkpoint, tmp_path / "source"))
    interrupted = Build(source, tmp_path / "q", prompts)
    assert interrupted.stop("quantized", signal.SIGINT) == 130
    assert "the same command continues it" in interrupted.said
    assert not (tmp_path / "q").exists()
    (left,) = tmp_path.glob("q.work-*")
    shutil.copytree(make_small(tmp_path / "other", seed=1), source, dirs_exist_ok=True)
    said = Build(source, tmp_path / "q", prompts).finish()
    assert "earlier run" not in said
    assert not left.exists()
    Build(source, tmp_path / "fresh", prompts).finish()
    assert files_of(tmp_path / "q") == files_of(tmp_path / "fresh")


@pytest.mark.slow
def test_killed_at_random_points(small_checkpoint: Path, tmp_path: Path) -> None:
    save_stats(small_checkpoint, tmp_path / "stats")
    begin = time.monotonic()
    Build(small_checkpoint, tmp_path / "calm", tmp_path / "stats").finish()
    seconds = time.monotonic() - begin
    moments = np.random.default_rng(0).uniform(0.1 * seconds, seconds, NUM_KILLS)
    for moment in moments:
        build = Build(small_checkpoint, tmp_path / "storm", tmp_path / "stats")
        time.sleep(moment)
        build.process.kill()
        build.process.communicate(timeout=120)
    Build(small_checkpoint, tmp_path / "storm", tmp_path / "stats").finish()
    assert files_of(tmp_path / "storm") == files_of(tmp_path / "calm")
    assert not list(tmp_path.glob("*.work-*"))


@pytest.mark.slow
def test_ring_nano_in_int8(call: Call, tmp_path: Path) -> None:
    arguments = ["--recipe", "int8", "--calibration", "english", "--calibration-samples", 4]
    called = call("build", NANO, "-o", tmp_path / "q", *arguments, "-q")
    assert called.code == 0, called.err
    opened = EngineBundle.open(tmp_path / "q")
    assert opened.manifest.quantization is not None
    assert opened.nbytes < 16e6
    shown = call("run", tmp_path / "q", "The sea was", "--max-new-tokens", 8)
    assert shown.code == 0
    assert len(shown.out) > 8
    compared = call("compare", tmp_path / "q", "--against", "torch", "--tokens", 32, "--json")
    assert "quantized" in compared.json["warning"]
