"""What the plugin library shows to the outside, and the header that is made from the ops."""

import _ctypes
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from ringexport.engine.flavor import FLAVORS, TensorRt
from ringexport.engine.plugins import (
    ABI_VERSION,
    DEFAULT_LIBRARY,
    PluginLibrary,
    find_library,
)
from ringexport.errors import BackendUnavailableError, VersionError
from ringexport.ops.plugin_header import render_plugin_header
from ringexport.version import __version__
from tests.plugins.native import HOST


def test_the_header_is_that_of_the_contracts() -> None:
    text = (HOST / "op_contract.h").read_text(encoding="utf-8")
    assert text == render_plugin_header(), "run: make docs"


def built_library() -> Path:
    path = Path(os.environ.get("RINGEXPORT_PLUGIN_LIBRARY", DEFAULT_LIBRARY))
    if not path.is_file():
        pytest.skip(f"{path} is not built: make plugins needs nvcc and cmake")
    return path.resolve()


@pytest.mark.parametrize("built", ["host", "with kernels"])
def test_only_two_symbols_are_exported(host_plugins: Path, built: str) -> None:
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    library = host_plugins if built == "host" else built_library()
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout
    assert sorted(line.split()[-1] for line in listed.splitlines()) == [
        "getCreators",
        "setLoggerFinder",
    ]


def test_nothing_of_tensorrt_or_cuda_is_needed_to_load_it(host_plugins: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    dynamic = subprocess.run(
        ["readelf", "-d", host_plugins], capture_output=True, text=True, check=True
    ).stdout
    needed = [line for line in dynamic.splitlines() if "(NEEDED)" in line]
    assert not [
        line for line in needed if "nvinfer" in line or "tensorrt" in line or "cuda" in line
    ]


def test_the_library_says_what_it_is(host_plugins: Path) -> None:
    library = find_library(host_plugins)
    assert (library.version, library.abi, library.kernels) == (__version__, ABI_VERSION, "none")
    assert "abi" in " ".join(library.versions())


def test_abi_of_python_and_cpp_agree() -> None:
    assert f"#define RINGPLUGINS_ABI {ABI_VERSION}\n" in (HOST / "fields.h").read_text()


@pytest.mark.parametrize(
    ("old", "new"),
    [(f"version={__version__};", "version=0.0.9;"), (f"abi={ABI_VERSION};", "abi=7;")],
)
def test_a_library_of_another_version_is_refused(
    host_plugins: Path, tmp_path: Path, old: str, new: str
) -> None:
    path = tmp_path / "libringplugins.so"
    path.write_bytes(host_plugins.read_bytes().replace(old.encode(), new.encode()))
    with pytest.raises(VersionError, match=r"is of ringexport .* expected .* with ABI"):
        find_library(path)


def test_a_truncated_library_is_refused(host_plugins: Path, tmp_path: Path) -> None:
    """Loading one ends the process."""
    path = tmp_path / "libringplugins.so"
    path.write_bytes(host_plugins.read_bytes()[:-100])
    with pytest.raises(BackendUnavailableError, match=r"libringplugins\.so is truncated"):
        find_library(path)


def test_a_library_that_exports_no_plugins_is_refused(tmp_path: Path) -> None:
    """Whatever it says about itself."""
    path = tmp_path / "libringplugins.so"
    other = Path(_ctypes.__file__).read_bytes()
    said = f"@(#)ringplugins;version={__version__};abi={ABI_VERSION};kernels=89;tensorrt_headers=1;"
    path.write_bytes(other + said.encode())
    registry = SimpleNamespace(all_creators=[])
    module = SimpleNamespace(get_plugin_registry=lambda: registry)
    tensorrt = TensorRt(flavor=FLAVORS["tensorrt-rtx"], module=module)
    with pytest.raises(BackendUnavailableError, match="undefined symbol: getCreators"):
        find_library(path).load(tensorrt)


@pytest.mark.parametrize(
    ("kernels", "lacking"),
    [("none", (80, 86, 89, 90, 120)), ("90a", (80, 86, 89, 120)), ("80+120", (90,)),
     ("89", (80, 86, 90, 120)), ("80+86+89+90a+100+120", ())],
)  # fmt: skip
def test_architectures_without_kernels(
    host_plugins: Path, kernels: str, lacking: tuple[int, ...]
) -> None:
    library = replace(PluginLibrary.read(host_plugins), kernels=kernels)
    assert library.lacks((80, 86, 89, 90, 120)) == lacking


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="no plugin library at"):
        find_library(tmp_path / "nothing.so")
    path = tmp_path / "text.so"
    path.write_text("no library")
    with pytest.raises(BackendUnavailableError, match="is no plugin library of ringexport"):
        find_library(path)
    with pytest.raises(BackendUnavailableError, match="cannot be read"):
        PluginLibrary.read(tmp_path)
