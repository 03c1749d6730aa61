"""A way to call the command line in this process, and one bundle that all tests read."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ringexport.cli.main import run_cli


@dataclass(frozen=True)
class Called:
    """What one call of the command line left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Call = Callable[..., Called]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models gain nothing from threads, and other tests run at the same time."""
    monkeypatch.setenv("RINGEXPORT_THREADS", "1")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run `ringexport ARGUMENTS...` and return exit code and output."""

    def run(*arguments: object, stdin: bytes | None = None) -> Called:
        if stdin is not None:
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        code = run_cli([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Called(code, out, err)

    return run


@pytest.fixture(scope="session")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the tiny checkpoint; shared, so copy it before changing it."""
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    assert run_cli(["build", str(tiny_checkpoint), "-o", str(path), "-q"]) == 0
    return path


def assert_refused(called: Called, code: int, *texts: str) -> None:
    """One sentence, at most one hint, nothing on stdout, no traceback."""
    assert called.code == code, called
    assert called.out == ""
    lines = [line for line in called.err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert [line.partition(":")[0] for line in lines] in (["error"], ["error", "hint"]), called.err
    assert "Traceback" not in called.err
    assert "bug" not in lines[0]
    for text in texts:
        assert text in called.err
