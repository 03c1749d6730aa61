"""Compile the TensorRT host without kernels, and the driver, in the way that CMake does."""

import functools
import importlib.util
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ringexport.version import __version__

__all__ = [
    "HOST",
    "ROOT",
    "compile_driver",
    "compile_host_library",
    "compile_program",
    "compile_shared",
    "missing_tools",
]

ROOT = Path(__file__).parents[2]
HOST = ROOT / "plugins" / "hosts" / "tensorrt"
SOURCES = sorted(path.stem for path in HOST.glob("*.cpp"))
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))


@functools.cache
def tensorrt_headers() -> Path | None:
    """Return the folder of TensorRT's headers, in the order of plugins/hosts/tensorrt."""
    spec = importlib.util.find_spec("kernel_lens")
    wheel = spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else "/"
    roots = [os.environ.get("TENSORRT_ROOT", "/"), "/usr", "/usr/local"]
    folders = [Path(root) / "include" for root in roots]
    folders += [Path("/usr/include/x86_64-linux-gnu"), Path(wheel) / "include" / "tensorrt"]
    return next((path for path in folders if (path / "NvInferRuntime.h").is_file()), None)


def missing_tools() -> str | None:
    """Return what is missing to compile here."""
    if shutil.which("g++") is None:
        return "no g++"
    if not (CUDA / "include" / "cuda_runtime_api.h").is_file():
        return f"no CUDA headers in {CUDA}"
    if tensorrt_headers() is None:
        return "no TensorRT headers: pip install --no-deps kernel-lens==2.0.1"
    return None


def _compiler() -> list[str]:
    reason = missing_tools()
    if reason is not None:
        pytest.skip(f"the TensorRT host cannot be compiled here: {reason}")
    headers = tensorrt_headers()
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden"]
    return ["g++", *flags, "-isystem", str(headers), "-isystem", str(CUDA / "include")]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


def compile_host_library(
    folder: Path, *, version: str = __version__, kernels: str = "none"
) -> Path:
    """Compile libringplugins.so without kernels."""
    compiler = [*_compiler(), f"-I{HOST}", f"-I{ROOT / 'plugins' / 'include'}"]
    compiler += [f'-DRINGPLUGINS_VERSION="{version}"', f'-DRINGPLUGINS_KERNELS="{kernels}"']
    objects = {name: folder / f"{name}.o" for name in SOURCES}
    commands = [
        [*compiler, "-c", str(HOST / f"{name}.cpp"), "-o", str(target)]
        for name, target in objects.items()
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_run, commands))
    library = folder / "libringplugins.so"
    link = ["g++", "-shared", "-o", str(library), *map(str, objects.values())]
    link += [f"-Wl,--version-script={HOST / 'exports.map'}", "-Wl,--no-undefined"]
    _run([*link, *_cudart()])
    return library


def compile_program(folder: Path, name: str, sources: list[Path]) -> Path:
    """Compile a program against TensorRT's headers; nothing of TensorRT is linked."""
    program = folder / name
    _run([*_compiler(), *map(str, sources), "-o", str(program), *_cudart()])
    return program


def compile_shared(folder: Path, name: str, source: str) -> None:
    """Compile a shared library from a text; it is known by its file name."""
    text = folder / f"{name}.cpp"
    text.write_text(source, encoding="utf-8")
    _run(
        [
            *_compiler(),
            "-shared",
            str(text),
            "-fvisibility=default",
            f"-Wl,-soname,{name}",
            "-o",
            str(folder / name),
        ]
    )


def compile_driver(folder: Path) -> Path:
    """Compile plugin_driver."""
    return compile_program(
        folder, "plugin_driver", [ROOT / "plugins" / "tests" / "plugin_driver.cpp"]
    )


def _cudart() -> list[str]:
    return [f"-L{CUDA / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
