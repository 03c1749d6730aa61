"""ONNX Runtime on the CPU: one graph for prefill and decode, with the state updated in place.

The state is numpy memory that is bound by pointer as input and as output of each call, so a step
copies nothing but its logits. Rows are contiguous in every state array: a call for some of the
rows binds the address of their first element.
"""

from collections.abc import Callable, Iterable
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
from ringexport.runtime.runner import Logits, Tokens
from ringexport.runtime.state import BaseState, StateSnapshot

__all__ = ["OrtOptions", "OrtRunner", "OrtState"]

Array = npt.NDArray[Any]

FIRST_CAPACITY = 256
"""Tokens that the KV cache of a new state can hold before it grows by doubling."""


class OrtState(BaseState):
    """State arrays in host memory.

    Attributes:
        recurrent: layer -> [B, H, K, V].
        kv_cache: layer -> (key, value), each [B, Hkv, S, D] with S >= max(position).
        decode_call: what the last decode step bound; dropped when the cache moves.
    """

    def __init__(self, owner: "OrtRunner", batch: int) -> None:
        spec = owner.spec
        super().__init__(owner, spec.layout, batch, context_length=spec.context_length)
        self._owner = owner
        self.capacity = min(FIRST_CAPACITY, spec.context_length)
        self.recurrent: dict[int, Array] = {
            layer: np.zeros((batch, *sizes), dtype=owner.dtypes[f"past_state.{layer}"])
            for layer, sizes in spec.layout.recurrent.items()
        }
        self.kv_cache: dict[int, tuple[Array, Array]] = {}
        for layer, (heads, size) in spec.layout.kv_cache.items():
            dtype = owner.dtypes[f"past_key.{layer}"]
            shape = (batch, heads, self.capacity, size)
            self.kv_cache[layer] = (np.zeros(shape, dtype=dtype), np.zeros(shape, dtype=dtype))
        self.decode_call: _Call | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, including room for tokens to come."""
        return self.position.nbytes + sum(array.nbytes for _, array in self.arrays())

    @property
    def model_digest(self) -> str:
        """See `BaseState.model_digest`."""
        return self._owner.model_digest

    def arrays(self) -> Iterable[tuple[str, Array]]:
        """Yield graph input name and array of every state tensor."""
        for layer, state in self.recurrent.items():
            yield f"past_state.{layer}", state
        for layer, (key, value) in self.kv_cache.items():
            yield f"past_key.{layer}", key
            yield f"past_value.{layer}", value

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` per row in the KV cache, doubling it as often as needed."""
        if tokens <= self.capacity:
            return
        capacity = max(self.capacity, 1)
        while capacity < tokens:
            capacity *= 2
        capacity = min(capacity, self.context_length)
        self.decode_call = None
        for layer, (key, value) in self.kv_cache.items():
            self.kv_cache[layer] = (self._grown(key, capacity), self._grown(value, capacity))
        self.capacity = capacity  # at the end: if memory runs out, no layer has less than it

    def _grown(self, array: Array, capacity: int) -> Array:
        """Return a larger cache, whose unused memory is never touched."""
        batch, heads, _, size = array.shape
        larger = np.zeros((batch, heads, capacity, size), dtype=array.dtype)
        for row, used in enumerate(self.position):
            larger[row, :, :used] = array[row, :, :used]
        return larger

    def _read_rows(self, rows: list[int], tokens: slice) -> dict[str, Array]:
        tensors: dict[str, Array] = {
            f"recurrent_state.{layer}": array[rows] for layer, array in self.recurrent.items()
        }
        for layer, pair in self.kv_cache.items():
            for part, array in zip(("key", "value"), pair, strict=True):
                tensors[f"kv_cache.{layer}.{part}"] = array[rows, :, tokens]
        return tensors

    def _write_rows(self, rows: list[int], snapshot: StateSnapshot) -> None:
        used = int(snapshot.position.max())
        self.reserve(used)
        for layer, array in self.recurrent.items():
            array[rows] = snapshot.tensors[f"recurrent_state.{layer}"]
        for layer, pair in self.kv_cache.items():
            for part, array in zip(("key", "value"), pair, strict=True):
                array[rows, :, :used] = snapshot.tensors[f"kv_cache.{layer}.{part}"]

    def _copy_rows(self, rows: list[int], source: "OrtState", source_rows: list[int]) -> None:
        used = source.position[source_rows]
        self.reserve(int(used.max()))
        for row, origin, tokens in zip(rows, source_rows, used, strict=True):
            for layer, array in self.recurrent.items():
                array[row] = source.recurrent[layer][origin]
            for layer, pair in self.kv_cache.items():
                for mine, theirs in zip(pair, source.kv_cache[layer], strict=True):
                    mine[row, :, :tokens] = theirs[origin, :, :tokens]

    def _clear_rows(self, rows: list[int]) -> None:
        for array in self.recurrent.values():
            array[rows] = 0

    def _fork(self, rows: list[int]) -> "OrtState":
        other = OrtState(self._owner, len(rows))
        other.copy_rows(range(len(rows)), self, rows)
        return other


@dataclass(slots=True)
class _Call:
    """A call bound to host memory; a decode step is bound once, only its inputs change."""

    rows: slice
    session: Session
    binding: Binding
    inputs: dict[str, Array]
    logits: Logits

    def run(self) -> Logits:
        """See `BoundCall`."""
        run_bound(self.session, self.binding)
        return self.logits

    def refresh(self, tokens: Tokens, position: npt.NDArray[np.int64]) -> None:
        """See `BoundCall`."""
        self.inputs["tokens"][:, 0] = tokens
        self.inputs["position"][:] = position


class OrtRunner(OrtRunnerBase[OrtState]):
    """Runs model.onnx of a bundle's target on the CPU; arguments and errors as of the base."""

    def __init__(
        self,
        directory: Path,
        *,
        context_length: int,
        model_digest: Callable[[], str],
        options: OrtOptions | None = None,
    ) -> None:
        super().__init__(
            directory,
            context_length=context_length,
            model_digest=model_digest,
            options=options or OrtOptions(),
        )

    def _new_state(self, batch: int) -> OrtState:
        return OrtState(self, batch)

    def _reserve(self, state: OrtState, tokens: int) -> None:
        state.reserve(tokens)

    def _decode_call(self, state: OrtState, rows: slice) -> _Call:
        call = state.decode_call
        if call is None or call.rows != rows:
            tokens = np.zeros((rows.stop - rows.start, 1), dtype=np.int64)
            call = state.decode_call = self._bind(state, rows, tokens, np.zeros_like(tokens))
        return call

    def _bind(
        self,
        state: OrtState,
        rows: slice,
        tokens: Tokens,
        logits_index: Tokens,
        lengths: Tokens | None = None,
        *,
        probes: dict[str, Array] | None = None,
    ) -> _Call:
        inputs = graph_inputs(tokens, state.position[rows], logits_index, lengths)
        shape = (*logits_index.shape, self.spec.vocab_size)
        logits: Logits = np.empty(shape, dtype=np.float32)
        session = self._session if probes is None else self._probe_session
        binding = session.io_binding()
        for name, array in inputs.items():
            _bind(binding.bind_input, name, array)
        for name, array in {"logits": logits, **(probes or {})}.items():
            _bind(binding.bind_output, name, array)
        for name, array in state.arrays():
            kind, layer = name.split(".")
            part = array[rows]
            _bind(binding.bind_input, name, part)
            _bind(binding.bind_output, f"{STATE_TENSORS[kind]}.{layer}", part)
        return _Call(rows, session, binding, inputs, logits)


def _bind(bind: Callable[..., None], name: str, array: Array) -> None:
    bind(name, "cpu", 0, element_type(array.dtype), array.shape, array.ctypes.data)
