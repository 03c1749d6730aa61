"""The only reader of environment variables; everything below the command line takes arguments."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ringexport.errors import ConfigError

__all__ = [
    "Settings",
    "Toolchain",
    "forbid_onnxruntime_telemetry",
    "load_settings",
    "load_toolchain",
    "rest_torch_threads",
]

VARIABLES = {
    "RINGEXPORT_THREADS": "threads per operation of CPU backends; default: all physical cores",
    "RINGEXPORT_BACKEND": "backend of `run`, `eval` and `bench` where --backend is not given",
    "RINGEXPORT_KERNEL_LIBRARY": "CUDA kernel library; default: build/plugins/libringkernels.so",
    "RINGEXPORT_PLUGIN_LIBRARY": "TensorRT plugins; default: build/plugins/libringplugins.so",
    "RINGEXPORT_API_KEY": "key that clients of `serve` must send, where --api-key is not given",
    "NO_COLOR": "any value but the empty one: no colours on the terminal",
}
"""Every variable that ringexport reads and what it does; docs/cli.md shows this table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the environment asks for.

    Attributes:
        threads: threads per operation of CPU backends, None for the backend's own choice.
        backend: name of a backend, or "auto".
        kernel_library: path of the CUDA kernel library, None for the default place.
        plugin_library: path of the TensorRT plugin library, None for the default place.
        api_key: what clients of the server must send, None for nothing.
        color: False if NO_COLOR is set.
    """

    threads: int | None = None
    backend: str = "auto"
    kernel_library: Path | None = None
    plugin_library: Path | None = None
    api_key: str | None = field(default=None, repr=False)
    color: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolchain:
    """Where the variables of CUDA and TensorRT point, which CMake reads to compile plugins/.

    Attributes:
        nvcc: CUDACXX, which leaves no other choice.
        cuda_roots: CUDA_HOME, CUDA_PATH and the toolkit's usual place.
        tensorrt_roots: TENSORRT_ROOT and the system's prefixes.
    """

    nvcc: str | None
    cuda_roots: tuple[Path, ...]
    tensorrt_roots: tuple[Path, ...]


def load_toolchain(environ: Mapping[str, str] | None = None) -> Toolchain:
    """Read the variables that others have defined.

    Args:
        environ: read instead of the environment of the process.
    """
    values = os.environ if environ is None else environ
    cuda = [values.get("CUDA_HOME"), values.get("CUDA_PATH"), "/usr/local/cuda"]
    tensorrt = [values.get("TENSORRT_ROOT"), "/usr/local", "/usr"]
    return Toolchain(
        nvcc=values.get("CUDACXX") or None,
        cuda_roots=tuple(Path(root) for root in cuda if root),
        tensorrt_roots=tuple(Path(root) for root in tensorrt if root),
    )


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the variables of `VARIABLES`.

    Args:
        environ: read instead of the environment of the process.

    Raises:
        ConfigError: a variable has a value that cannot be used.
    """
    values = os.environ if environ is None else environ
    return Settings(
        threads=_threads(values.get("RINGEXPORT_THREADS", "")),
        backend=values.get("RINGEXPORT_BACKEND", "") or "auto",
        kernel_library=Path(path) if (path := values.get("RINGEXPORT_KERNEL_LIBRARY")) else None,
        plugin_library=Path(path) if (path := values.get("RINGEXPORT_PLUGIN_LIBRARY")) else None,
        api_key=values.get("RINGEXPORT_API_KEY", "") or None,
        color=not values.get("NO_COLOR", ""),
    )


def forbid_onnxruntime_telemetry() -> None:
    """Keep onnxruntime, which must not be imported yet, from writing and sending usage data.

    It reads this variable once, when it is imported; without it, the official packages make a
    device id and a database in ~/.cache/Microsoft before any function can be called.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"


def rest_torch_threads() -> None:
    """Let torch's CPU threads, which must not be imported yet, sleep soon after their work.

    libgomp reads this once. Its threads spin for milliseconds by default, and where other programs
    want the processors everybody waits for them: a calibration took 58 s instead of 13 beside four
    busy programs on two cores. Alone it takes as long, decode of the reference 5 % longer.
    """
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        os.environ["GOMP_SPINCOUNT"] = "10000"


def _threads(text: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= 4096):
        raise ConfigError(
            f"RINGEXPORT_THREADS is {text[:40]!r}, expected a number from 1 to 4096",
            hint="unset it to use all physical cores",
        )
    return int(text)
