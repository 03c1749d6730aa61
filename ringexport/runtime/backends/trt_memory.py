"""GPU memory, a stream and graphs through the CUDA runtime library, without a CUDA package."""

import ctypes
import importlib.util
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ringexport.errors import BackendUnavailableError, RingExportError

__all__ = ["CudaRuntime", "DeviceArray", "DeviceGraph", "DeviceRuntime", "Graph"]

Array = npt.NDArray[Any]
Graph = int

_NAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")
_TO_DEVICE, _TO_HOST, _ON_DEVICE = 1, 2, 3  # cudaMemcpyKind
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_RELAXED = 2  # cudaStreamCaptureModeRelaxed


class DeviceRuntime(Protocol):
    """What the runner asks of a device; every copy is done when the call returns."""

    @property
    def stream(self) -> int:
        """The stream that everything runs on."""

    def allocate(self, nbytes: int) -> int:
        """Return the address of zeroed memory."""

    def release(self, address: int) -> None:
        """Give memory back."""

    def upload(self, address: int, array: Array) -> None:
        """Copy a contiguous array to the device."""

    def download(self, array: Array, address: int) -> None:
        """Fill a contiguous array from the device."""

    def copy_blocks(
        self, target: tuple[int, int], source: tuple[int, int], width: int, count: int
    ) -> None:
        """Copy `count` blocks of `width` bytes; (address, bytes between the starts of blocks)."""

    def synchronize(self) -> None:
        """Wait for the stream."""

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what `work` puts on the stream."""

    def launch(self, graph: Graph) -> None:
        """Start a recorded graph."""

    def drop(self, graph: Graph) -> None:
        """Give a graph back."""


class DeviceArray:
    """An array in device memory, which is given back with the object.

    Attributes:
        shape, dtype: of the array.
        address: of the memory.
    """

    def __init__(
        self, runtime: DeviceRuntime, shape: tuple[int, ...], dtype: npt.DTypeLike
    ) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._runtime = runtime
        self.address = runtime.allocate(max(self.nbytes, 1))
        weakref.finalize(self, runtime.release, self.address)

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the first dimension."""
        return self.nbytes // max(self.shape[0], 1)

    def write(self, array: Array, *, row: int = 0) -> None:
        """Replace the content from a row on."""
        values = np.ascontiguousarray(array, dtype=self.dtype)
        self._runtime.upload(self.address + row * self.row_bytes, values)

    def read(self, *, row: int = 0, shape: tuple[int, ...] | None = None) -> Array:
        """Return a copy of the content, or of `shape` from a row on."""
        values = np.empty(self.shape if shape is None else shape, dtype=self.dtype)
        self._runtime.download(values, self.address + row * self.row_bytes)
        return values


class DeviceGraph:
    """Recorded work, which is given back with the object.

    Args:
        runtime: of the device.
        work: puts on its stream what is recorded.
    """

    def __init__(self, runtime: DeviceRuntime, work: Callable[[], None]) -> None:
        self._runtime = runtime
        self._graph = runtime.capture(work)
        weakref.finalize(self, runtime.drop, self._graph)

    def launch(self) -> None:
        """Start the work."""
        self._runtime.launch(self._graph)


class CudaRuntime:
    """The CUDA runtime library.

    Raises:
        BackendUnavailableError: there is no library, or no device that it can use.
    """

    def __init__(self) -> None:
        self._library = _open_library()
        stream = ctypes.c_void_p()
        self._call("cudaStreamCreate", ctypes.byref(stream))
        self._stream = stream

    @property
    def stream(self) -> int:
        """See `DeviceRuntime`."""
        return int(self._stream.value or 0)

    def allocate(self, nbytes: int) -> int:
        """Return zeroed memory."""
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(nbytes))
        self._call("cudaMemset", address, 0, ctypes.c_size_t(nbytes))
        return int(address.value or 0)

    def release(self, address: int) -> None:
        """Give memory back; at the end of the process the driver may be gone already."""
        self._library.cudaFree(ctypes.c_void_p(address))

    def upload(self, address: int, array: Array) -> None:
        """Copy to the device."""
        self._copy(address, array.ctypes.data, array.nbytes, _TO_DEVICE)

    def download(self, array: Array, address: int) -> None:
        """Copy to the host."""
        self._copy(array.ctypes.data, address, array.nbytes, _TO_HOST)

    def copy_blocks(
        self, target: tuple[int, int], source: tuple[int, int], width: int, count: int
    ) -> None:
        """Copy blocks on the device."""
        if width * count == 0:
            return
        arguments: Iterable[Any] = (
            ctypes.c_void_p(target[0]),
            ctypes.c_size_t(target[1]),
            ctypes.c_void_p(source[0]),
            ctypes.c_size_t(source[1]),
            ctypes.c_size_t(width),
            ctypes.c_size_t(count),
            _ON_DEVICE,
            self._stream,
        )
        self._call("cudaMemcpy2DAsync", *arguments)
        self.synchronize()

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._call("cudaStreamSynchronize", self._stream)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record a graph."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cudaStreamBeginCapture", self._stream, _RELAXED)
        try:
            work()
        finally:
            self._call("cudaStreamEndCapture", self._stream, ctypes.byref(graph))
        self._call("cudaGraphInstantiate", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        self._call("cudaGraphDestroy", graph)
        return int(executable.value or 0)

    def launch(self, graph: Graph) -> None:
        """Start a graph."""
        self._call("cudaGraphLaunch", ctypes.c_void_p(graph), self._stream)

    def drop(self, graph: Graph) -> None:
        """Give a graph back."""
        self._library.cudaGraphExecDestroy(ctypes.c_void_p(graph))

    def _copy(self, target: int, source: int, nbytes: int, kind: int) -> None:
        if nbytes == 0:
            return
        self._call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(target),
            ctypes.c_void_p(source),
            ctypes.c_size_t(nbytes),
            kind,
            self._stream,
        )
        self.synchronize()

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code == 0:
            return
        self._library.cudaGetLastError()  # the next call must not report this one again
        if code == _OUT_OF_MEMORY:
            raise MemoryError("the GPU is out of memory")
        text = self._library.cudaGetErrorString(code).decode("ascii", "replace")
        raise RingExportError(f"{name} failed: {text}")


def _open_library() -> Any:
    places = [*_wheel_libraries(), *_NAMES]
    for place in places:
        try:
            library = ctypes.CDLL(place)
        except OSError:
            continue
        library.cudaGetErrorString.restype = ctypes.c_char_p
        count = ctypes.c_int()
        if library.cudaGetDeviceCount(ctypes.byref(count)) != 0 or count.value == 0:
            raise BackendUnavailableError(
                "the CUDA runtime finds no GPU that it can use",
                hint="install an NVIDIA driver for CUDA 13 or newer",
            )
        return library
    raise BackendUnavailableError(
        "there is no CUDA runtime library (libcudart)", hint="pip install nvidia-cuda-runtime"
    )


def _wheel_libraries() -> list[str]:
    """Return libraries of the wheels nvidia-cuda-runtime (cu13) and nvidia-cuda-runtime-cu12."""
    spec = importlib.util.find_spec("nvidia")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    patterns = ("cu13/lib/libcudart.so.*", "cuda_runtime/lib/libcudart.so.*")
    return [
        str(path) for place in places for pattern in patterns for path in Path(place).glob(pattern)
    ]
