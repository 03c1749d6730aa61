"""Real processes whose standard streams are closed, full or watched."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from ringexport.cli.console import BarProgress
from ringexport.cli.streams import stdout_problem
from tests.cli.test_process import COMMAND, ROOT, environment, in_terminal

TIMEOUT = 60


def shell(line: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a line of the shell, in which "$@" is ringexport with its arguments."""
    return subprocess.run(
        ["sh", "-c", line, "sh", *COMMAND, *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )


def commands(bundle: Path) -> list[tuple[object, ...]]:
    return [
        ("inspect", bundle),
        ("inspect", bundle, "--json"),
        ("doctor",),
        ("run", bundle, "x", "--max-new-tokens", 3),
        ("--help",),
        ("run", "--help"),
    ]


@pytest.mark.parametrize("index", range(6))
def test_a_reader_that_has_gone(bundle: Path, index: int) -> None:
    read, write = os.pipe()
    os.close(read)
    arguments = [str(argument) for argument in commands(bundle)[index]]
    done = subprocess.run(
        [*COMMAND, *arguments],
        stdout=write,
        stderr=subprocess.PIPE,
        env=environment(),
        check=False,
        timeout=TIMEOUT,
    )
    os.close(write)
    assert done.returncode == 141
    lines = done.stderr.decode().splitlines()
    assert [line for line in lines if not line.startswith("verifying")] == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("index", range(6))
def test_a_full_disk_below_stdout(bundle: Path, index: int) -> None:
    done = shell('"$@" > /dev/full', *commands(bundle)[index])
    assert done.returncode == 6
    assert "error: cannot write the result to stdout: no space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("index", range(6))
def test_a_closed_stdout(bundle: Path, index: int) -> None:
    done = shell('"$@" >&-', *commands(bundle)[index])
    assert done.returncode == 6
    assert "error: cannot write the result to stdout: it is closed" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_closed_stdout_is_no_concern_of_a_build(tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = shell('"$@" >&-', "build", tiny_checkpoint, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr


def test_all_streams_closed(bundle: Path) -> None:
    assert shell('"$@" <&- >&- 2>&-', "inspect", bundle).returncode == 6
    assert shell('"$@" > /dev/full 2>&1', "inspect", bundle).returncode == 6


def test_a_closed_stdin(bundle: Path) -> None:
    arguments = ("--max-new-tokens", 2)
    assert shell('"$@" <&-', "run", bundle, "x", *arguments).returncode == 0
    for extra in (["-"], []):
        done = shell('"$@" <&-', "run", bundle, *extra, *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert "stdin" in done.stderr


def test_ctrl_c_while_python_imports() -> None:
    """-X importtime writes a line per imported module: the signal comes between two of them."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *COMMAND[1:], "doctor"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        cwd=ROOT,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "click" in line:
            break
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    words = [line for line in rest.splitlines() if not line.startswith("import time:")]
    assert words == ["interrupted"]


def test_the_installed_command_starts_the_same_way() -> None:
    assert 'ringexport = "ringexport.__main__:main"' in (ROOT / "pyproject.toml").read_text()


def test_errors_about_files_are_not_about_stdout() -> None:
    assert stdout_problem(OSError(errno.ENOSPC, "No space", "some/file")) is None
    assert stdout_problem(OSError(errno.ENOENT, "No such file")) is None


def test_people_see_the_prompt_before_its_continuation(bundle: Path) -> None:
    arguments = ["run", str(bundle), "the rain", "--max-new-tokens", "3"]
    assert "\x1b[2mthe rain\x1b[0m" in in_terminal(arguments)
    assert "the rain" not in in_terminal([*arguments, "--quiet"])
    piped = shell('"$@"', *arguments)
    assert "the rain" not in piped.stdout + piped.stderr


@pytest.mark.parametrize("stage", ["hashing and syncing the bundle", "a very long stage " * 5])
@pytest.mark.parametrize("unit", ["bytes", "tensors"])
def test_bars_fit_on_one_line(stage: str, unit: str) -> None:
    console = Console(width=80, force_terminal=True)
    progress = BarProgress(console)
    progress.start(stage, 123_456_789_012, unit)
    try:
        progress.advance(98_765_432_109)
        assert progress._bar is not None
        lines = console.render_lines(progress._bar.get_renderable(), pad=False)
        text = "".join(segment.text for segment in lines[0])
    finally:
        progress.close()
    assert len(lines) == 1
    assert "80%" in text
    assert stage[:24] in text
