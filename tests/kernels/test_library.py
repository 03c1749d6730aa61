"""The Python host and the headers agree; no GPU needed."""

import _ctypes
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ringexport.errors import BackendUnavailableError
from ringexport.kernels.library import _SCALARS, OPS, KernelLibrary

PLUGINS = Path(__file__).parents[2] / "plugins"
HEADERS = sorted((PLUGINS / "include" / "ringkernels").glob("*.h"))
FORBIDDEN = ("NvInfer", "torch/", "ATen", "c10/")


def described() -> dict[str, list[list[str]]]:
    command = [sys.executable, str(PLUGINS / "tools" / "describe_layout.py"), *map(str, HEADERS)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pieces = [part.split(')json"')[0] for part in text.split('R"json(')[1:]]
    layout: dict[str, list[list[str]]] = json.loads("".join(pieces))
    return layout


def test_every_op_has_a_struct_that_the_host_understands() -> None:
    layout = described()
    assert set(OPS.values()) == set(layout)
    for fields in layout.values():
        assert all("*" in kind or kind in _SCALARS for _, kind in fields)


def test_enums_of_host_and_headers_agree() -> None:
    spec = importlib.util.find_spec("ringexport.kernels.library")
    assert spec is not None
    types = (PLUGINS / "include" / "ringkernels" / "types.h").read_text()
    for number, name in enumerate(("kFloat32", "kFloat16", "kBFloat16", "kFp8E4M3", "kInt8")):
        assert f"{name} = {number}," in types
    for number, name in enumerate(("kNone", "kTensor", "kChannel", "kBlock128")):
        assert f"{name} = {number}," in types


@pytest.mark.parametrize(
    "path",
    sorted([*PLUGINS.glob("include/**/*.h"), *PLUGINS.glob("kernels/**/*.*")]),
    ids=lambda path: path.name,
)
def test_kernels_know_neither_torch_nor_tensorrt(path: Path) -> None:
    text = path.read_text()
    assert not [name for name in FORBIDDEN if name in text]
    assert len(text.splitlines()) <= 500


@pytest.mark.parametrize("architectures", ["", "sm_90", "80,90a", "all"])
def test_cmake_refuses_what_is_no_architecture(tmp_path: Path, architectures: str) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    command = ["cmake", "-S", str(PLUGINS), "-B", str(tmp_path)]
    command.append(f"-DRINGEXPORT_CUDA_ARCHITECTURES={architectures}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f'is "{architectures}", expected numbers such as 80;90a' in " ".join(done.stderr.split())


def test_missing_library_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="cannot be loaded") as caught:
        KernelLibrary.open(tmp_path / "libringkernels.so")
    assert "make plugins" in str(caught.value.hint)


def test_a_bare_name_is_a_file_of_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not of the folders that the loader searches."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(_ctypes.__file__, "libringkernels.so")
    with pytest.raises(BackendUnavailableError, match="undefined symbol: ring_layout"):
        KernelLibrary.open(Path("libringkernels.so"))


def test_a_truncated_library_is_refused(tmp_path: Path) -> None:
    """Loading one ends the process."""
    whole = Path(_ctypes.__file__).read_bytes()
    path = tmp_path / "libringkernels.so"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BackendUnavailableError, match=r"libringkernels.so is truncated"):
        KernelLibrary.open(path)


def test_a_library_that_may_not_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "libringkernels.so"
    path.write_bytes(b"\x7fELF")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(BackendUnavailableError, match=r"cannot be loaded: .*Permission denied"):
        KernelLibrary.open(path)


def test_a_library_of_another_version_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One that was built before an op was added has no function for it."""
    older = SimpleNamespace(ring_layout=lambda: b"{}")
    monkeypatch.setattr("ringexport.kernels.library.ctypes.CDLL", lambda _: older)
    with pytest.raises(BackendUnavailableError, match=r"of another version: it has no op \w+"):
        KernelLibrary.open(tmp_path / "libringkernels.so")
