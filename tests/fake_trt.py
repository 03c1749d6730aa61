"""A TensorRT whose engines are ONNX graphs for ONNX Runtime, and a GPU with the host's memory.

It keeps the runner of TensorRT targets honest where no engine can run: profiles with their limits,
bindings by address, in-place state, graphs that replay what was captured, from a context that
nobody has bound anew.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from ringexport.engine.flavor import FLAVORS, TensorRt
from ringexport.runtime.backends.trt import TrtLimits

__all__ = ["FakeCuda", "fake_tensorrt"]

Array = npt.NDArray[Any]


class FakeCuda:
    """A `DeviceRuntime` in host memory that records what is captured instead of running it."""

    def __init__(self) -> None:
        self.stream = 7
        self.memory: dict[int, Any] = {}
        self.captured: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.launches = 0

    def allocate(self, nbytes: int) -> int:
        buffer = ctypes.create_string_buffer(nbytes)
        address = ctypes.addressof(buffer)
        self.memory[address] = buffer
        return address

    def release(self, address: int) -> None:
        del self.memory[address]

    def upload(self, address: int, array: Array) -> None:
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, array: Array, address: int) -> None:
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def copy_blocks(
        self, target: tuple[int, int], source: tuple[int, int], width: int, count: int
    ) -> None:
        for index in range(count):
            ctypes.memmove(target[0] + index * target[1], source[0] + index * source[1], width)

    def synchronize(self) -> None:
        assert self.captured is None

    def capture(self, work: Callable[[], None]) -> int:
        self.captured = []
        work()
        number = len(self.graphs) + 1
        self.graphs[number], self.captured = self.captured, None
        return number

    def launch(self, graph: int) -> None:
        self.launches += 1
        for work in self.graphs[graph]:
            work()

    def drop(self, graph: int) -> None:
        del self.graphs[graph]

    def run(self, work: Callable[[], None]) -> None:
        if self.captured is None:
            work()
        else:
            self.captured.append(work)


class FakeContext:
    """An execution context: shapes within its profile, addresses, one call of the graph."""

    def __init__(self, engine: "FakeEngine") -> None:
        self.engine = engine
        self.profile = -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.changes = 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == self.engine.cuda.stream
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        limits = self.engine.limits
        if name in {"tokens", "logits_index"}:
            rows, width = shape
            if self.profile == 0:
                assert rows <= limits.decode_rows
                assert width == 1
            else:
                most = limits.prefill_new_tokens if name == "tokens" else limits.prefill_logits
                assert rows <= limits.prefill_rows
                assert (2 if name == "tokens" else 1) <= width <= most
        if name.startswith(("past_key.", "past_value.")):
            room = (limits.decode_cache_tokens, limits.prefill_cache_tokens)[self.profile]
            assert shape[2] <= room
        self.shapes[name] = tuple(shape)
        self.changes += 1
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        self.changes += 1
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self.engine.cuda.stream
        shapes, addresses, changes = dict(self.shapes), dict(self.addresses), self.changes

        def work() -> None:
            assert self.changes == changes, "the context has changed since the graph was captured"
            self.engine.compute(shapes, addresses)

        self.engine.cuda.run(work)
        return True


class FakeEngine:
    """The graph of a target for ONNX Runtime, run row by row: fresh and old rows share a call."""

    def __init__(self, path: Path, cuda: FakeCuda, limits: TrtLimits) -> None:
        import onnxruntime

        self.cuda, self.limits = cuda, limits
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(path), options)
        self.tensors = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return str(self.tensors[index].name)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        (found,) = [tensor for tensor in self.tensors if tensor.name == name]
        return tuple(size if isinstance(size, int) else -1 for size in found.shape)

    def get_tensor_dtype(self, name: str) -> str:
        (found,) = [tensor for tensor in self.tensors if tensor.name == name]
        return str(found.type)

    def create_execution_context(self) -> FakeContext:
        return FakeContext(self)

    def compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        kinds = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}
        inputs = {
            tensor.name: _view(addresses[tensor.name], shapes[tensor.name], kinds[tensor.type])
            for tensor in self.session.get_inputs()
        }
        vocab = self.get_tensor_shape("logits")[-1]
        index_shape = shapes["logits_index"]
        logits = _view(addresses["logits"], (*index_shape, vocab), np.float32)
        logits[:] = np.nan
        names = [output.name for output in self.session.get_outputs()]
        for row, length in enumerate(inputs["lengths"].tolist()):
            if length == 0:
                continue
            feed = {name: array[row : row + 1] for name, array in inputs.items()}
            feed["tokens"] = feed["tokens"][:, :length]
            feed["logits_index"] = np.minimum(feed["logits_index"], length - 1)
            found = dict(zip(names, self.session.run(None, feed), strict=True))
            logits[row] = found["logits"][0]
            for name, array in inputs.items():
                if name.startswith("past_"):
                    present = f"present_{name.removeprefix('past_')}"
                    assert addresses[name] == addresses[present], "the state is not in place"
                    array[row] = found[present][0]


def _view(address: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    count = int(np.prod(shape))
    buffer = (ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(address)
    return np.frombuffer(buffer, dtype=dtype).reshape(shape)


def fake_tensorrt(graph: Path, cuda: FakeCuda, limits: TrtLimits) -> TensorRt:
    """Return a flavour whose runtime opens `graph`, whatever engine it is given."""

    class Logger:
        Severity = SimpleNamespace(WARNING=2, INFO=3, ERROR=1, INTERNAL_ERROR=0)

    class Runtime:
        def __init__(self, log: Any) -> None:
            self.log = log

        def deserialize_cuda_engine(self, data: bytes) -> FakeEngine | None:
            if not data:
                self.log.log(1, "the engine is empty")
                return None
            return FakeEngine(graph, cuda, limits)

    types = SimpleNamespace(FLOAT="tensor(float)", HALF="tensor(float16)", BF16="tensor(bfloat16)")
    logger = type("ILogger", (), {"Severity": Logger.Severity, "__init__": lambda _: None})
    module = SimpleNamespace(__version__="0.0", ILogger=logger, Runtime=Runtime, DataType=types)
    return TensorRt(flavor=FLAVORS["tensorrt-rtx"], module=module)
