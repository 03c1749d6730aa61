"""The C++ sample compiles and links without TensorRT, and says why where it cannot run."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

from tests.plugins.native import ROOT, compile_program

SOURCES = [ROOT / "examples" / "cpp" / name for name in ("decode.cpp", "ring_engine.cpp")]


@pytest.fixture(scope="module")
def decode(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_program(tmp_path_factory.mktemp("cpp"), "decode", SOURCES)


def test_usage(decode: Path) -> None:
    done = subprocess.run([decode], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: decode BUNDLE/targets/TARGET")


@pytest.mark.parametrize("token", ["x", "1.5", "-1", "", "99999999999999999999"])
def test_what_is_no_token_is_refused(decode: Path, tmp_path: Path, token: str) -> None:
    command = [decode, tmp_path, "libnvinfer-missing.so", "3", "1", token]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"error: '{token}' is no token id and no count\n"


def test_a_missing_tensorrt_is_named(decode: Path, tmp_path: Path) -> None:
    command = [decode, tmp_path, "libnvinfer-missing.so", "3", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot load TensorRT: libnvinfer-missing.so")


def test_a_library_with_other_interfaces_is_refused(decode: Path, tmp_path: Path) -> None:
    spec = importlib.util.find_spec("tensorrt_rtx_libs")  # importing would load the libraries
    if spec is None or spec.origin is None:
        pytest.skip("tensorrt_rtx_libs is not installed")
    path = next(Path(spec.origin).parent.glob("libtensorrt_rtx.so.*"))
    done = subprocess.run(
        [decode, tmp_path, path, "3", "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "compile it with the headers of that library" in done.stderr
