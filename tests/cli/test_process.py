"""Real processes: signals, pipes, full disks, environment."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ringexport.bundle import EngineBundle

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "ringexport"]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **changes}


@pytest.fixture
def old(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a build is going to replace."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("stage", ["checking", "writing"])
def test_signals_during_a_build(
    tiny_checkpoint: Path, old: Path, kind: signal.Signals, code: int, stage: str
) -> None:
    digest = EngineBundle.open(old).digest
    process = subprocess.Popen(
        [*COMMAND, "build", str(tiny_checkpoint), "-o", str(old), "--decay-index", "hf"],
        stderr=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(stage):
            break
    process.send_signal(kind)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == code, rest
    assert rest.splitlines()[-1] in {"interrupted", "terminated"}
    assert "Traceback" not in rest
    assert EngineBundle.open(old).digest == digest
    assert [path.name for path in old.parent.iterdir()] == ["bundle"]


def test_kill_during_a_build(tiny_checkpoint: Path, old: Path) -> None:
    digest = EngineBundle.open(old).digest
    arguments = ["build", str(tiny_checkpoint), "-o", str(old), "--decay-index", "hf"]
    process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, env=environment())
    assert process.stderr is not None
    process.stderr.readline()
    deadline = time.monotonic() + 30
    while len(list(old.parent.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    assert EngineBundle.open(old).digest == digest
    assert len(list(old.parent.iterdir())) == 2
    subprocess.run([*COMMAND, *arguments, "-q"], env=environment(), check=True, timeout=100)
    assert EngineBundle.open(old).digest != digest
    assert [path.name for path in old.parent.iterdir()] == ["bundle"]


def test_file_size_limit(tiny_checkpoint: Path, old: Path) -> None:
    digest = EngineBundle.open(old).digest

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    done = subprocess.run(
        [*COMMAND, "build", str(tiny_checkpoint), "-o", str(old), "--decay-index", "hf"],
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=limit,
        check=False,
        timeout=100,
    )
    assert done.returncode == 6, done.stderr
    assert "it would pass the file size limit" in done.stderr
    assert "hint: raise the limit" in done.stderr
    assert "disk is full" not in done.stderr
    assert EngineBundle.open(old).digest == digest
    assert [path.name for path in old.parent.iterdir()] == ["bundle"]


def test_a_closed_pipe_is_no_error(bundle: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "inspect", str(bundle), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr:
        lines = process.stderr.read().decode().splitlines()
    assert process.wait(timeout=60) == 141
    assert [line for line in lines if not line.startswith("verifying")] == []


def start_writing(bundle: Path) -> subprocess.Popen[bytes]:
    """Start a long text and wait for its first bytes."""
    arguments = ["run", str(bundle), "x", "--max-new-tokens", "4000", "--temperature", "1"]
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    assert process.stdout is not None
    assert process.stdout.read(1)
    return process


def test_an_interrupted_text_ends_quietly(bundle: Path) -> None:
    process = start_writing(bundle)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.endswith(b"\n")
    assert err.decode().strip() == "interrupted"


def test_a_reader_that_has_enough_ends_the_text_quietly(bundle: Path) -> None:
    process = start_writing(bundle)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141


def test_an_unusable_variable_is_a_config_error() -> None:
    done = subprocess.run(
        [*COMMAND, "doctor"],
        env=environment(RINGEXPORT_THREADS="many"),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 3
    assert done.stderr.startswith("error: RINGEXPORT_THREADS is 'many'")
    assert done.stderr.splitlines()[1].startswith("hint: ")


def in_terminal(arguments: list[str], **changes: str) -> str:
    """Run a command whose stderr and stdout are a terminal and return what it shows."""
    pty = pytest.importorskip("pty")
    shown = bytearray()
    pid, descriptor = pty.fork()
    if pid == 0:  # pragma: no cover (the child)
        os.execve(sys.executable, [*COMMAND, *arguments], environment(TERM="xterm", **changes))
    while True:
        try:
            data = os.read(descriptor, 4096)
        except OSError:
            break
        if not data:
            break
        shown += data
    os.close(descriptor)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return shown.decode()


def test_a_terminal_gets_bars_and_colours(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shown = in_terminal(["build", str(tiny_checkpoint), "-o", str(tmp_path / "a")])
    assert "\x1b[32m✓" in shown
    assert "━" in shown
    assert "built" in shown


def test_no_color_is_honoured(bundle: Path) -> None:
    shown = in_terminal(["inspect", str(bundle)], NO_COLOR="1")
    assert not any(f"\x1b[3{digit}m" in shown for digit in range(1, 8))
    assert "yes" in shown


def test_a_current_directory_that_is_gone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    shell = ["sh", "-c", 'rmdir "$1" && shift && exec "$@"', "sh", str(gone)]
    done = subprocess.run(
        [*shell, *COMMAND, "build", str(tiny_checkpoint), "-o", "bundle"],
        cwd=gone,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert done.stderr.splitlines() == [
        "error: the current directory is gone",
        "hint: change to another one: cd",
    ]
