"""ONNX Runtime on NVIDIA GPUs: state and cache stay on the device.

The graph takes one input more than that of the CPU: `total_length`, in host memory (lower_cuda.py).
A recorded graph keeps the value that it saw, so decode steps give it the capacity of the smallest
cache that holds the longest row, which says how the work is split and thereby the last bits of the
result: they do not depend on what else the cache has held. Prompts give the true length.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ringexport.runtime.backends.ort_base import OrtRunnerBase, graph_inputs
from ringexport.runtime.backends.ort_session import (
    STATE_TENSORS,
    Binding,
    OrtOptions,
    Session,
    element_type,
    run_bound,
)
from ringexport.runtime.backends.trt_memory import CudaRuntime, DeviceArray, DeviceRuntime
from ringexport.runtime.backends.trt_state import TrtState, grown_capacity
from ringexport.runtime.runner import Logits, Tokens

__all__ = ["OrtCudaRunner"]

Array = npt.NDArray[Any]

MAX_GRAPHS = 16
"""CUDA graphs that a session records at most: it cannot give them back. More steps run plainly."""
_NO_GRAPH = -1
_Key = tuple[int, int, int, int]
"""Of a decode step of a state: capacity, first and last row, total length."""


@dataclass(slots=True)
class _Call:
    """A call bound to device memory; inputs are copied there before it, logits back behind it."""

    rows: slice
    session: Session
    binding: Binding
    inputs: dict[str, DeviceArray]
    logits: DeviceArray
    total_length: npt.NDArray[np.int32]
    probes: list[tuple[DeviceArray, Array]]
    graph_id: int | None

    def run(self) -> Logits:
        """See `BoundCall`."""
        run_bound(self.session, self.binding, self.graph_id)
        for source, target in self.probes:
            target[...] = source.read()
        logits: Logits = self.logits.read()
        return logits

    def refresh(self, tokens: Tokens, position: npt.NDArray[np.int64]) -> None:
        """See `BoundCall`."""
        self.inputs["tokens"].write(tokens[:, None])
        self.inputs["position"].write(position)


class OrtCudaRunner(OrtRunnerBase[TrtState]):
    """Runs model.onnx of an onnxruntime:cuda target; arguments and errors as of the base.

    Args:
        cuda: memory of the device and the stream that everything runs on; None: the first GPU.
        initializers: see `open_session`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        context_length: int,
        model_digest: Callable[[], str],
        options: OrtOptions | None = None,
        cuda: DeviceRuntime | None = None,
        initializers: dict[str, Any] | None = None,
    ) -> None:
        options = options or OrtOptions(provider="cuda")
        self.cuda = cuda or CudaRuntime()
        self._graphs = 0
        self._calls: weakref.WeakKeyDictionary[TrtState, dict[_Key, _Call]]
        self._calls = weakref.WeakKeyDictionary()
        provider_options = {
            "user_compute_stream": str(self.cuda.stream),
            "use_tf32": "0",
            "enable_cuda_graph": str(int(options.cuda_graph)),
        }
        super().__init__(
            directory,
            context_length=context_length,
            model_digest=model_digest,
            options=options,
            provider_options=provider_options if options.provider == "cuda" else None,
            initializers=initializers,
        )

    def array(self, *shape: int, dtype: npt.DTypeLike) -> DeviceArray:
        """Return a zeroed array in device memory."""
        return DeviceArray(self.cuda, shape, dtype)

    def _new_state(self, batch: int) -> TrtState:
        return TrtState(self, batch)

    def _reserve(self, state: TrtState, tokens: int) -> None:
        state.reserve(tokens)

    def _decode_call(self, state: TrtState, rows: slice) -> _Call:
        longest = int(state.position[rows].max()) + 1
        total_length = grown_capacity(longest, state.context_length)
        key = (state.capacity, rows.start, rows.stop, total_length)
        calls = self._calls.setdefault(state, {})
        if key not in calls:
            # A call of a smaller cache is void; one without a graph is cheap to bind again.
            for old, call in list(calls.items()):
                if old[0] != state.capacity or call.graph_id in {None, _NO_GRAPH}:
                    del calls[old]
            calls[key] = self._new_decode_call(state, rows, total_length)
        return calls[key]

    def _new_decode_call(self, state: TrtState, rows: slice, total_length: int) -> _Call:
        tokens = np.zeros((rows.stop - rows.start, 1), dtype=np.int64)
        call = self._bind(state, rows, tokens, np.zeros_like(tokens))
        call.total_length[:] = total_length
        if call.graph_id is not None and self._graphs < MAX_GRAPHS:
            self._graphs += 1
            call.graph_id = self._graphs
            self._record(call, state)
        return call

    def _record(self, call: _Call, state: TrtState) -> None:
        """Let onnxruntime record a decode step, for which it runs the step several times.

        The recurrent states are put back afterwards; what is written to the cache, at the places
        of the next tokens, the next step overwrites.
        """
        recurrent = [
            array for name, array in state.arrays.items() if name.startswith("past_state.")
        ]
        kept = [self.array(*array.shape, dtype=array.dtype) for array in recurrent]
        for array, copy in zip(recurrent, kept, strict=True):
            self._copy(copy, array)
        call.run()
        for array, copy in zip(recurrent, kept, strict=True):
            self._copy(array, copy)

    def _copy(self, target: DeviceArray, source: DeviceArray) -> None:
        size = source.row_bytes
        self.cuda.copy_blocks((target.address, size), (source.address, size), size, target.shape[0])

    def _bind(
        self,
        state: TrtState,
        rows: slice,
        tokens: Tokens,
        logits_index: Tokens,
        lengths: Tokens | None = None,
        *,
        probes: dict[str, Array] | None = None,
    ) -> _Call:
        values = graph_inputs(tokens, state.position[rows], logits_index, lengths)
        total = (values["position"] + values["lengths"]).max(keepdims=True)
        shape = (*logits_index.shape, self.spec.vocab_size)
        call = _Call(
            rows=rows,
            session=self._session if probes is None else self._probe_session,
            binding=None,
            inputs={name: self.array(*one.shape, dtype=one.dtype) for name, one in values.items()},
            logits=self.array(*shape, dtype=np.float32),
            total_length=total,
            probes=[],
            graph_id=_NO_GRAPH if self._options.cuda_graph else None,
        )
        binding = call.binding = call.session.io_binding()
        for name, value in values.items():
            call.inputs[name].write(value)
            self._bind_array(binding.bind_input, name, call.inputs[name])
        binding.bind_input("total_length", "cpu", 0, total.dtype, total.shape, total.ctypes.data)
        self._bind_array(binding.bind_output, "logits", call.logits)
        for name, target in (probes or {}).items():
            source = self.array(*target.shape, dtype=target.dtype)
            self._bind_array(binding.bind_output, name, source)
            call.probes.append((source, target))
        for name, array in state.arrays.items():
            kind, _, layer = name.partition(".")
            self._bind_array(binding.bind_input, name, array, rows)
            self._bind_array(binding.bind_output, f"{STATE_TENSORS[kind]}.{layer}", array, rows)
        return call

    def _bind_array(
        self, bind: Callable[..., None], name: str, array: DeviceArray, rows: slice | None = None
    ) -> None:
        """Bind an array, or some rows of it."""
        first, shape = 0, array.shape
        if rows is not None:
            first, shape = rows.start, (rows.stop - rows.start, *array.shape[1:])
        address = array.address + first * array.row_bytes
        bind(name, self._options.provider, 0, element_type(array.dtype), shape, address)

    def _close(self) -> None:
        self._calls.clear()
        super()._close()
