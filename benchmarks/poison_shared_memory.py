"""A pytest plugin: NaN in all shared memory of the GPU before every launch of the kernel library.

What a kernel reads there without having written it (a tail of a row, a token that does not exist)
is usually zero or left over from a launch like it, and harmless. With this it is NaN in every
number format. compute-sanitizer has no tool that sees such reads. Needs nvcc.

    RINGEXPORT_REQUIRE=gpu PYTHONPATH=benchmarks:. python -m pytest -o addopts= \\
        -p poison_shared_memory -m gpu tests/kernels
"""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from ringexport.kernels.library import KernelCall

SOURCE = r"""
#include <cuda_runtime.h>

__global__ void __launch_bounds__(1024, 1) poison_kernel(int words) {
  extern __shared__ volatile unsigned memory[];
  for (int i = threadIdx.x; i < words; i += 1024) memory[i] = 0xffffffffu;
}

// Several blocks for each multiprocessor, of which only one fits at a time.
extern "C" int poison(void* stream) {
  int device = 0, bytes = 0, multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaFuncSetAttribute(poison_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  poison_kernel<<<4 * multiprocessors, 1024, bytes, (cudaStream_t)stream>>>(bytes / 4);
  return (int)cudaGetLastError();
}
"""
_launch = KernelCall.launch
_launches = 0


@functools.cache
def poison() -> Any:
    """Compile and load the kernel."""
    folder = Path(tempfile.mkdtemp(prefix="poison"))
    (folder / "poison.cu").write_text(SOURCE, encoding="utf-8")
    command = [
        "nvcc",
        "-arch=native",
        "-shared",
        "-Xcompiler=-fPIC",
        "poison.cu",
        "-o",
        "poison.so",
    ]
    subprocess.run(command, cwd=folder, check=True)
    function = ctypes.CDLL(str(folder / "poison.so")).poison
    function.argtypes = [ctypes.c_void_p]
    return function


def launch(call: KernelCall, stream: int = 0) -> None:
    """Launch in the place of `KernelCall.launch`."""
    global _launches  # noqa: PLW0603
    error = poison()(stream)
    if error:
        raise RuntimeError(f"the launch that fills shared memory failed with CUDA error {error}")
    _launches += 1
    _launch(call, stream)


def pytest_configure() -> None:
    """Put the launch in place."""
    KernelCall.launch = launch  # type: ignore[method-assign]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say that it was."""
    terminalreporter.write_line(f"{_launches} launches found NaN in shared memory")
