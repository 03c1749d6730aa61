"""ONNX Runtime: one graph for prefill and decode, with the state updated in place.

The state is numpy memory that is bound by pointer as input and as output of each call, so a step
copies nothing but its logits. Rows are contiguous in every state array: a call for some of the
rows binds the address of their first element.

GroupQueryAttention on the CPU limits how rows may share a call: several tokens on top of cached
ones need a call of one row; fresh rows, or one token per row, may be ragged.
"""

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ringexport.errors import (
    BackendUnavailableError,
    BundleError,
    RingExportError,
    ShapeError,
)
from ringexport.runtime.onnxruntime_import import import_onnxruntime
from ringexport.runtime.runner import (
    DEFAULT_PREFILL_CHUNK,
    BaseRunner,
    Logits,
    RunnerSpec,
    Tokens,
    memory_guard,
)
from ringexport.runtime.state import BaseState, StateLayout, StateSnapshot

try:
    onnxruntime = import_onnxruntime()
    from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
except ImportError as error:  # pragma: no cover - the tests' environment has it
    raise BackendUnavailableError(
        f"the onnxruntime backend needs the package onnxruntime: {error}",
        hint="pip install 'ringexport[ort]'",
    ) from error

__all__ = ["OrtOptions", "OrtRunner", "OrtState"]

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Session = Any  # onnxruntime.InferenceSession, which has no type information
Binding = Any  # onnxruntime.IOBinding

FIRST_CAPACITY = 256
"""Tokens that the KV cache of a new state can hold before it grows by doubling."""
MAX_PADDED_TOKENS = 8192
"""Tokens, padding included, of one call with several rows; more rows go one by one."""

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}
ORT_ERRORS = tuple(
    getattr(ort_errors, name)
    for name in (
        "EPFail",
        "EngineError",
        "Fail",
        "InvalidArgument",
        "InvalidGraph",
        "InvalidProtobuf",
        "NoModel",
        "NoSuchFile",
        "NotImplemented",
        "RuntimeException",
    )
)
STATE_TENSORS = {"past_state": "present_state", "past_key": "present_key"} | {
    "past_value": "present_value"
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OrtOptions:
    """How onnxruntime runs the graph.

    Attributes:
        provider: execution provider, "cpu" or "cuda".
        threads: threads per operation, None for one per physical core.
        spin: let idle threads wait busily, which is faster but keeps the cores loaded.
        prefill_chunk: tokens per row and call.
    """

    provider: str = "cpu"
    threads: int | None = None
    spin: bool = True
    prefill_chunk: int = DEFAULT_PREFILL_CHUNK


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
        self.decode_call: _DecodeCall | None = None

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
class _DecodeCall:
    """A decode step of one state, bound once: only tokens and positions change."""

    rows: slice
    binding: Binding
    tokens: npt.NDArray[np.int64]
    position: npt.NDArray[np.int32]
    logits: Logits
    constants: tuple[Array, ...]


class OrtRunner(BaseRunner[OrtState]):
    """Runs model.onnx of a bundle's target.

    Args:
        directory: holds model.onnx, its external data, and probe.onnx.
        context_length: tokens that a row can hold.
        model_digest: see `BaseRunner`.
        options: how to run it.

    Raises:
        BackendUnavailableError: this onnxruntime has no such execution provider.
        BundleError: the graph cannot be loaded, or is no graph of ringexport.
    """

    def __init__(
        self,
        directory: Path,
        *,
        context_length: int,
        model_digest: Callable[[], str],
        options: OrtOptions | None = None,
    ) -> None:
        options = options or OrtOptions()
        self._options = options
        self._directory = directory
        _check_provider(options.provider)
        self._session: Session = _open_session(directory / "model.onnx", options)
        self._probe_session: Session = None
        self.dtypes, layout = _state_inputs(self._session)
        outputs = {output.name: output.shape for output in self._session.get_outputs()}
        vocab_size = outputs.get("logits", [None])[-1]
        if not isinstance(vocab_size, int):
            raise BundleError(f"{directory / 'model.onnx'} has no output logits of known width")
        spec = RunnerSpec(
            name=f"onnxruntime:{options.provider}",
            vocab_size=vocab_size,
            context_length=context_length,
            layout=layout,
            prefill_chunk=options.prefill_chunk,
        )
        super().__init__(spec, model_digest)

    def probe(
        self, tokens: npt.ArrayLike, lengths: npt.ArrayLike | None, state: OrtState
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Feed tokens like `prefill` and return what the layers computed; see `ProbeRunner`.

        Raises:
            ShapeError, ContextLengthError: as for `prefill`; also T beyond prefill_chunk.
            BundleError: probe.onnx cannot be loaded.
        """
        ids, sizes = self._check_tokens(tokens, lengths, self._check_state(state))
        batch, width = ids.shape
        if width > self.spec.prefill_chunk:
            raise ShapeError(
                f"{width} tokens per row were given, a probe takes {self.spec.prefill_chunk}",
                hint="probe several calls of fewer tokens",
            )
        if self._probe_session is None:
            self._probe_session = _open_session(self._directory / "probe.onnx", self._options)
        state.reserve(int((state.position + sizes).max()))
        found: dict[str, Array] = {}
        for row in np.flatnonzero(sizes):
            rows, length = slice(row, row + 1), int(sizes[row])
            index = np.arange(length)[None]
            call = self._bind(self._probe_session, state, rows, ids[rows, :length], index)
            names = [output.name for output in self._probe_session.get_outputs()]
            extra = [name for name in names if name.startswith(("hidden.", "expert_ids."))]
            for name in extra:
                call.binding.bind_output(name)
            _run(self._probe_session, call.binding)
            state.position[row] += length
            values = dict(zip(names, call.binding.get_outputs(), strict=True))
            parts = {name: values[name].numpy() for name in extra} | {"logits": call.logits}
            for name, part in parts.items():
                fill = -1 if name.startswith("expert_ids.") else 0
                whole = np.full((batch, width, part.shape[-1]), fill, dtype=part.dtype)
                found.setdefault(name, whole)[rows, :length] = part
        return found

    def _new_state(self, batch: int) -> OrtState:
        return OrtState(self, batch)

    def _prefill_chunk(
        self, tokens: Tokens, lengths: Tokens, state: OrtState, every_position: bool
    ) -> Logits:
        batch, width = tokens.shape
        vocab = self.spec.vocab_size
        state.reserve(int((state.position + lengths).max()))
        shape = (batch, width, vocab) if every_position else (batch, 1, vocab)
        result: Logits = np.zeros(shape, dtype=np.float32)
        for rows in _groups(lengths, state.position):
            sizes = lengths[rows]
            longest = int(sizes.max())
            index = (
                np.tile(np.arange(longest), (len(sizes), 1))
                if every_position
                else sizes[:, None] - 1
            )
            call = self._bind(self._session, state, rows, tokens[rows, :longest], index, sizes)
            _run(self._session, call.binding)
            state.position[rows] += sizes
            result[rows, : index.shape[1]] = call.logits
        if every_position:
            result[np.arange(width) >= lengths[:, None]] = 0
            return result
        return result[:, 0]

    def _decode(self, tokens: Tokens, state: OrtState) -> Logits:
        return self._decode_slice(tokens, state, slice(0, state.batch))

    def _decode_rows(self, tokens: Tokens, state: OrtState, rows: list[int]) -> Logits:
        if rows != list(range(rows[0], rows[0] + len(rows))):
            return super()._decode_rows(tokens, state, rows)
        return self._decode_slice(tokens, state, slice(rows[0], rows[0] + len(rows)))

    def _decode_slice(self, tokens: Tokens, state: OrtState, rows: slice) -> Logits:
        state.reserve(int(state.position[rows].max()) + 1)
        call = state.decode_call
        if call is None or call.rows != rows:
            index = np.zeros((len(tokens), 1), dtype=np.int64)
            call = self._bind(self._session, state, rows, tokens[:, None], index)
            state.decode_call = call
        call.tokens[:, 0] = tokens
        call.position[:] = state.position[rows]
        _run(self._session, call.binding)
        state.position[rows] += 1
        return call.logits[:, 0].copy()

    def _bind(
        self,
        session: Session,
        state: OrtState,
        rows: slice,
        tokens: Tokens,
        logits_index: Tokens,
        lengths: Tokens | None = None,
    ) -> _DecodeCall:
        """Bind a call for contiguous rows; lengths None means that no row is padded."""
        batch, width = tokens.shape
        sizes = np.full(batch, width) if lengths is None else lengths
        inputs: dict[str, Array] = {
            "tokens": np.array(tokens, dtype=np.int64, order="C"),
            "lengths": np.array(sizes, dtype=np.int32),
            "position": np.array(state.position[rows], dtype=np.int32),
            "logits_index": np.array(logits_index, dtype=np.int64, order="C"),
        }
        shape = (batch, logits_index.shape[1], self.spec.vocab_size)
        logits: Logits = np.empty(shape, dtype=np.float32)
        binding = session.io_binding()
        for name, array in inputs.items():
            _bind_input(binding, name, array)
        _bind_output(binding, "logits", logits)
        for name, array in state.arrays():
            kind, layer = name.split(".")
            part = array[rows]
            _bind_input(binding, name, part)
            _bind_output(binding, f"{STATE_TENSORS[kind]}.{layer}", part)
        return _DecodeCall(
            rows=rows,
            binding=binding,
            tokens=inputs["tokens"],
            position=inputs["position"],
            logits=logits,
            constants=(inputs["lengths"], inputs["logits_index"]),
        )

    def _close(self) -> None:
        self._session = None
        self._probe_session = None


def _groups(lengths: Tokens, position: Tokens) -> list[slice]:
    """Split rows into contiguous groups that may share a call; rows of length 0 are in none."""
    active = np.flatnonzero(lengths)
    longest = int(lengths.max())
    padded = len(lengths) * longest
    together = (
        len(active) == len(lengths)
        and (longest == 1 or not position.any())
        and padded <= min(MAX_PADDED_TOKENS, 2 * int(lengths.sum()))
    )
    if together:
        return [slice(0, len(lengths))]
    return [slice(int(row), int(row) + 1) for row in active]


def _bind_input(binding: Binding, name: str, array: Array) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def _bind_output(binding: Binding, name: str, array: Array) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def _run(session: Session, binding: Binding) -> None:
    try:
        session.run_with_iobinding(binding)
    except (RuntimeError, *ORT_ERRORS) as error:
        raise RingExportError(
            f"onnxruntime failed in {_failed_node(str(error))}: {_first_line(str(error))}",
            hint="the state of this call is lost; if it happens again, report it with the model",
        ) from error


def _failed_node(message: str) -> str:
    """Return the node that an error of onnxruntime names."""
    found = re.search(r"running (\S+) node\. Name:'([^']*)'", message)
    return f"{found[1]} {found[2]!r}" if found else "the graph"


def _first_line(message: str) -> str:
    status = message.partition("Status Message:")[2] or message
    return status.strip().splitlines()[0][:400] if status.strip() else "no reason given"


def _check_provider(provider: str) -> None:
    if provider not in PROVIDERS:
        raise BackendUnavailableError(
            f"onnxruntime has no provider {provider!r} here, expected {' or '.join(PROVIDERS)}"
        )
    if provider != "cpu":
        raise BackendUnavailableError(
            f"onnxruntime:{provider} cannot run yet: the state is kept in host memory",
            hint="use the backend onnxruntime:cpu",
        )


def _open_session(path: Path, options: OrtOptions) -> Session:
    """Load a graph; its external data lies beside it."""
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    settings.intra_op_num_threads = options.threads or 0
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 4  # errors are raised; stderr belongs to the command line
    settings.add_session_config_entry(
        "session.intra_op.allow_spinning", "1" if options.spin else "0"
    )
    try:
        with memory_guard(f"the graph {path} and its weights"):
            return onnxruntime.InferenceSession(
                str(path), settings, providers=[PROVIDERS[options.provider]]
            )
    except ORT_ERRORS as error:
        raise BundleError(
            f"onnxruntime cannot load {path}: {_first_line(str(error))}",
            hint="build the bundle again, or upgrade onnxruntime to the version in its manifest",
        ) from error


def _state_inputs(session: Session) -> tuple[dict[str, np.dtype[Any]], StateLayout]:
    """Read the state's layout from the graph's inputs."""
    dtypes: dict[str, np.dtype[Any]] = {}
    recurrent: dict[int, tuple[int, int, int]] = {}
    kv_cache: dict[int, tuple[int, int]] = {}
    for entry in session.get_inputs():
        kind, _, layer = entry.name.partition(".")
        if kind not in STATE_TENSORS:
            continue
        if entry.type not in DTYPES or len(entry.shape) != 4 or not layer.isdigit():
            raise BundleError(f"graph input {entry.name} is {entry.type} {entry.shape}")
        dtypes[entry.name] = DTYPES[entry.type]
        _, heads, middle, last = entry.shape
        if kind == "past_state":
            recurrent[int(layer)] = (heads, middle, last)
        else:
            kv_cache[int(layer)] = (heads, last)
    return dtypes, StateLayout(recurrent=recurrent, kv_cache=kv_cache)
