"""Interrupts at any point: the next run continues, and its result is the same bytes."""

import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ringexport.calibrate import CalibrationSettings, calibrate, stream
from ringexport.calibrate.workdir import WorkStore
from ringexport.checkpoint import CheckpointWeights
from ringexport.errors import CalibrationError, OutputError
from ringexport.stats import CalibrationStats
from tests.calibrate import samples
from tests.calibrate.samples import PROMPTS, SMALL, Recorder, checkpoint
from tests.conftest import SEED

torch.set_num_threads(1)
SETTINGS = replace(samples.SETTINGS, sample_tokens=0)  # faster: nothing is searched
NUM_LAYERS = 4
KILLS = 5


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("resume") / "model", {}, **SMALL)


@pytest.fixture(scope="module")
def expected(directory: Path) -> bytes:
    return run(directory, None).to_bytes()


def run(
    directory: Path,
    workdir: Path | None,
    progress: Recorder | None = None,
    settings: CalibrationSettings = SETTINGS,
) -> CalibrationStats:
    with CheckpointWeights.open(directory) as weights:
        return calibrate(weights, PROMPTS, settings, progress=progress, workdir=workdir)


def interrupt(directory: Path, workdir: Path, after: int) -> Path:
    """Interrupt a run after so many batches and return what it left."""
    with pytest.raises(KeyboardInterrupt):
        run(directory, workdir, Recorder(after))
    (left,) = workdir.iterdir()
    return left


@pytest.mark.parametrize("after", [0, 3, 7])
def test_interrupted_runs_continue_to_the_same_bytes(
    directory: Path, expected: bytes, tmp_path: Path, after: int
) -> None:
    interrupt(directory, tmp_path, after)
    progress = Recorder()
    assert run(directory, tmp_path, progress).to_bytes() == expected
    batches_per_layer = 2
    finished = after // batches_per_layer
    assert progress.amounts["calibrate"] == (NUM_LAYERS - finished) * num_tokens(expected)
    assert bool(progress.notes) == (finished > 0)
    assert list(tmp_path.iterdir()) == []


def num_tokens(stats: bytes) -> int:
    import json
    import struct

    (length,) = struct.unpack("<Q", stats[:8])
    header = json.loads(stats[8 : 8 + length])
    return int(json.loads(header["__metadata__"]["ringexport"])["num_tokens"])


def test_finished_layers_are_not_read_again(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(directory, tmp_path, 5)
    loaded = []
    true_load = stream.LayerStream.load

    def load(self: stream.LayerStream, layer: int) -> dict[str, torch.Tensor]:
        loaded.append(layer)
        return true_load(self, layer)

    monkeypatch.setattr(stream.LayerStream, "load", load)
    run(directory, tmp_path)
    assert loaded == [2, 3]


def test_other_inputs_never_use_what_is_left(directory: Path, tmp_path: Path) -> None:
    left = interrupt(directory, tmp_path, 5)
    other = replace(SETTINGS, max_tokens=40)
    progress = Recorder()
    found = run(directory, tmp_path, progress, other)
    assert progress.amounts["calibrate"] == NUM_LAYERS * found.num_tokens
    assert found.to_bytes() == run(directory, None, settings=other).to_bytes()
    assert left.is_dir()


def test_another_checkpoint_never_uses_what_is_left(directory: Path, tmp_path: Path) -> None:
    interrupt(directory, tmp_path / "work", 5)
    other = checkpoint(tmp_path / "model", {2: {0: 0.125}}, **SMALL)
    progress = Recorder()
    found = run(other, tmp_path / "work", progress)
    assert progress.amounts["calibrate"] == NUM_LAYERS * found.num_tokens


def test_half_written_files_are_ignored(directory: Path, expected: bytes, tmp_path: Path) -> None:
    left = interrupt(directory, tmp_path, 5)
    (left / "hidden-0002.st.tmp").write_bytes(b"half")
    (left / "stats-0002.st").write_bytes(b"stats of a layer whose activations are not there")
    assert run(directory, tmp_path).to_bytes() == expected


@pytest.mark.parametrize("name", ["hidden-0001.st", "stats-0001.st"])
def test_damaged_files_are_an_error(directory: Path, tmp_path: Path, name: str) -> None:
    left = interrupt(directory, tmp_path, 5)
    data = (left / name).read_bytes()
    (left / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(CalibrationError, match=name):
        run(directory, tmp_path)


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    store = WorkStore(tmp_path, "0" * 64)
    with pytest.raises(OutputError, match="another calibration is at work"):
        WorkStore(tmp_path, "0" * 64)
    store.close()
    WorkStore(tmp_path, "0" * 64).discard()
    assert list(tmp_path.iterdir()) == []


def test_a_kill_while_finished_work_is_removed(
    directory: Path, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, **_: object) -> None:
        for stats in path.glob("stats-*"):
            stats.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ringexport.calibrate.workdir.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run(directory, tmp_path)
    assert run(directory, tmp_path).to_bytes() == expected


def test_a_work_directory_that_cannot_be_made_is_an_error(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot use the work directory"):
        run(directory, tmp_path / "file")


ZYGOTE = """
import os, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from tests.calibrate.test_resume import run
directory, workdir, result = (Path(argument) for argument in sys.argv[1:])
for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        run(directory, workdir).save(result)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_kill_at_random_points_changes_nothing(
    directory: Path, expected: bytes, tmp_path: Path
) -> None:
    """One process forks runs, so that torch is imported once; each is killed at a random time."""
    rng, kills = random.Random(SEED), 0
    workdir, result = tmp_path / "work", tmp_path / "stats"
    command = [sys.executable, "-c", ZYGOTE, str(directory), str(workdir), str(result)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    ) as zygote:
        assert zygote.stdin is not None
        assert zygote.stdout is not None
        for attempt in range(60):
            zygote.stdin.write("\n")
            zygote.stdin.flush()
            child = int(zygote.stdout.readline())
            if kills < KILLS:
                time.sleep(rng.uniform(0.02, 0.3))
                kill(child)
            status = int(zygote.stdout.readline())
            kills += status == -signal.SIGKILL
            if status == 0 and kills >= KILLS:
                break
            assert status in {0, -signal.SIGKILL}, f"attempt {attempt} ended with {status}"
        zygote.stdin.close()
    assert kills >= KILLS
    assert result.read_bytes() == expected
    assert list(workdir.iterdir()) == []


def kill(process: int) -> None:
    """Kill a child of the zygote, which is still unwaited for, dead or alive."""
    import os

    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return
