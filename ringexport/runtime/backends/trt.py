"""TensorRT and TensorRT-RTX: one engine, a profile for decode and one for prefill.

The state lives in GPU memory and is bound as input and as output of every call, so that plugins
update it in place. A decode step of a state is recorded as a CUDA graph when it comes again; the
graph is dropped when its buffers move, or another state takes a step. The flavour and the CUDA
runtime are constructor arguments.
"""

import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ringexport.engine.build import ENGINE_FILE, LAYERS_FILE
from ringexport.engine.callbacks import make_log
from ringexport.engine.device import device_architecture
from ringexport.engine.flavor import FLAVORS, TensorRt, find_module, open_tensorrt
from ringexport.engine.plugins import PLUGIN_LIBRARY_FILE, PluginLibrary
from ringexport.engine.table import read_table
from ringexport.engine.target import EngineTarget
from ringexport.errors import BackendUnavailableError, BundleError, ConfigError, RingExportError
from ringexport.runtime.backends.trt_memory import (
    CudaRuntime,
    DeviceArray,
    DeviceGraph,
    DeviceRuntime,
)
from ringexport.runtime.backends.trt_state import DecodeCall, TrtState
from ringexport.runtime.runner import BaseRunner, Logits, RunnerSpec, Tokens
from ringexport.runtime.state import StateLayout

__all__ = ["TrtLimits", "TrtRunner", "check_engine", "open_engine", "why_not_here"]

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]

DECODE, PREFILL = 0, 1
"""Optimization profiles, by the order in ringexport/engine/profile.py."""
STATE_TENSORS = {
    "past_state": "present_state",
    "past_key": "present_key",
    "past_value": "present_value",
}
MIN_PREFILL_TOKENS = 2
"""A call of one token runs in the decode profile; a shorter prefill is padded to this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrtLimits:
    """Largest sizes of the two profiles of an engine, from the manifest.

    Attributes:
        context_length: tokens that a row of the model can hold.
        decode_rows, decode_cache_tokens: rows of a decode step, and tokens that they can hold.
        prefill_rows, prefill_new_tokens, prefill_logits, prefill_cache_tokens: of one prefill call.
    """

    context_length: int
    decode_rows: int
    decode_cache_tokens: int
    prefill_rows: int
    prefill_new_tokens: int
    prefill_logits: int
    prefill_cache_tokens: int

    @property
    def row_tokens(self) -> int:
        """Tokens that a row can hold in this engine."""
        return min(self.context_length, self.decode_cache_tokens, self.prefill_cache_tokens)


def check_engine(directory: Path, target: EngineTarget, architecture: int | None) -> PluginLibrary:
    """Refuse an engine that cannot run here, before TensorRT sees it; return its plugins.

    Args:
        directory: of the target.
        target: that the engine was built for.
        architecture: of the GPU in this machine, None without one.

    Raises:
        BackendUnavailableError: no GPU, or one that the engine or the plugins are not for.
        BundleError: the engine is truncated or has no weights, or its layer table is damaged.
        VersionError: the plugin library is of another version.
    """
    if architecture is None or architecture not in target.architectures:
        here = "no NVIDIA GPU" if architecture is None else f"a GPU of sm_{architecture}"
        raise BackendUnavailableError(
            f"the engine is for {target.name}, and this machine has {here}",
            hint="build a bundle for this GPU, or use another target of the bundle",
        )
    table = read_table(directory / LAYERS_FILE)
    expected = table.engine_bytes
    engine = directory / ENGINE_FILE
    found = engine.stat().st_size if engine.is_file() else 0
    if found != expected:
        raise BundleError(
            f"the engine {engine} has {found} bytes, expected {expected}",
            hint="copy the bundle again, or build it again",
        )
    if table.options.get("strip_plan"):
        raise BundleError(
            f"the engine {engine} was built without its weights (option strip_plan)",
            hint="refit it in a program of your own, or build without the option",
        )
    library = PluginLibrary.read(directory / PLUGIN_LIBRARY_FILE)
    library.check()
    if library.lacks([architecture]):
        raise BackendUnavailableError(
            f"the plugin library {library.path} has no kernels for sm_{architecture}, only for:"
            f" {library.kernels}",
            hint="compile the plugins for this GPU, and build the bundle again",
        )
    return library


def why_not_here(name: str) -> tuple[str, str] | None:
    """Return what is missing to run a target here and what to do about it, None if nothing is."""
    target = _parsed(name)
    flavor = FLAVORS[target.flavor]
    architecture = device_architecture()
    if architecture not in target.architectures:
        here = "no NVIDIA GPU" if architecture is None else f"a GPU of sm_{architecture}"
        return f"this machine has {here}", "build a bundle for the GPU of this machine"
    if find_module(flavor) is None:
        return f"{flavor.name} is not installed", flavor.hint
    return None


def open_engine(
    directory: Path,
    name: str,
    limits: Mapping[str, int],
    model_digest: Callable[[], str],
) -> "TrtRunner":
    """Load the engine of a bundle's target on the GPU of this machine.

    Args:
        directory: of the target.
        name: of the target.
        limits: of the target, from the manifest.
        model_digest: see `BaseRunner`.

    Raises:
        BackendUnavailableError: it cannot run here.
        BundleError, VersionError: files that cannot be used.
    """
    target = _parsed(name)
    library = check_engine(directory, target, device_architecture())
    known = [field.name for field in fields(TrtLimits)]
    unusable = [key for key in known if limits.get(key, 0) < 1]
    if unusable:
        raise BundleError(
            f"the manifest has no usable limit {unusable[0]} for {name}",
            hint="build the bundle again",
        )
    tensorrt = open_tensorrt(FLAVORS[target.flavor])
    library.load(tensorrt)
    return TrtRunner(
        directory,
        tensorrt=tensorrt,
        cuda=CudaRuntime(),
        name=name,
        limits=TrtLimits(**{key: limits[key] for key in known}),
        model_digest=model_digest,
    )


def _parsed(name: str) -> EngineTarget:
    try:
        target = EngineTarget.parse(name)
    except ConfigError as error:
        raise BundleError(f"the bundle has the target {name!r:.80}: {error.message}") from error
    if target is None:
        raise BundleError(f"{name!r:.80} is no TensorRT target")
    return target


class TrtRunner(BaseRunner[TrtState]):
    """Runs an engine.

    Args:
        directory: holds the engine, its layer table and the plugin library.
        tensorrt: the loaded flavour that built the engine; its plugins are registered.
        cuda: memory and stream.
        name: of the target.
        limits: of the engine's profiles.
        model_digest: see `BaseRunner`.

    Raises:
        BundleError: TensorRT cannot load the engine, or it is no engine of ringexport.
    """

    def __init__(
        self,
        directory: Path,
        *,
        tensorrt: TensorRt,
        cuda: DeviceRuntime,
        name: str,
        limits: TrtLimits,
        model_digest: Callable[[], str],
    ) -> None:
        trt = tensorrt.module
        self.cuda = cuda
        self._log = make_log(tensorrt)
        self._runtime = trt.Runtime(self._log)
        path = directory / ENGINE_FILE
        if read_table(directory / LAYERS_FILE).options.get("version_compatible"):
            self._runtime.engine_host_code_allowed = True  # such an engine brings a runtime along
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise BundleError(
                f"{tensorrt.flavor.name} {tensorrt.version} cannot load {path}{self._reason()}",
                hint="build the bundle again with this version",
            )
        self._limits = limits
        self.dtypes, layout, vocab_size = _describe(trt, self._engine, path)
        self._contexts = [self._context(profile) for profile in (DECODE, PREFILL)]
        self._bound: weakref.ref[DecodeCall] | None = None  # what the decode context is bound to
        spec = RunnerSpec(
            name=name,
            vocab_size=vocab_size,
            context_length=limits.row_tokens,
            layout=layout,
            max_batch=limits.decode_rows,
            prefill_chunk=limits.prefill_new_tokens,
        )
        super().__init__(spec, model_digest)

    def array(self, *shape: int, dtype: npt.DTypeLike) -> DeviceArray:
        """Return a zeroed array in GPU memory."""
        return DeviceArray(self.cuda, shape, dtype)

    def _context(self, profile: int) -> Any:
        context = self._engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(profile, self.cuda.stream):
            raise BundleError(f"the engine has no usable profile {profile}{self._reason()}")
        self.cuda.synchronize()
        return context

    def _new_state(self, batch: int) -> TrtState:
        return TrtState(self, batch)

    def _prefill_chunk(
        self, tokens: Tokens, lengths: Tokens, state: TrtState, every_position: bool
    ) -> Logits:
        batch, width = tokens.shape
        vocab = self.spec.vocab_size
        shape = (batch, width, vocab) if every_position else (batch, vocab)
        result: Logits = np.zeros(shape, dtype=np.float32)
        state.reserve(int((state.position + lengths).max()))
        # As many positions at once as the profile gives logits for.
        step = self._limits.prefill_logits if every_position else width
        for start in range(0, width, step):
            sizes = np.clip(lengths - start, 0, min(step, width - start))
            part = tokens[:, start : start + int(sizes.max(initial=0))]
            for first in range(0, batch, self._limits.prefill_rows):
                rows = slice(first, min(first + self._limits.prefill_rows, batch))
                if not sizes[rows].any():
                    continue
                logits = self._prefill_rows(part[rows], sizes[rows], state, rows, every_position)
                if every_position:
                    count = logits.shape[1]
                    used = np.arange(count) < sizes[rows, None]
                    result[rows, start : start + count] = np.where(used[..., None], logits, 0)
                else:
                    result[rows] = logits[:, 0]
        return result

    def _prefill_rows(
        self,
        tokens: Tokens,
        sizes: Tokens,
        state: TrtState,
        rows: slice,
        every_position: bool,
    ) -> Logits:
        """Feed neighbouring rows, of which at least one has tokens, and advance their position."""
        longest = int(sizes.max())
        width = max(longest, MIN_PREFILL_TOKENS)
        ids = np.zeros((len(sizes), width), dtype=np.int64)
        ids[:, :longest] = tokens[:, :longest]
        last = np.maximum(sizes - 1, 0)[:, None]
        index = np.tile(np.arange(longest), (len(sizes), 1)) if every_position else last
        values: dict[str, Array] = {
            "tokens": ids,
            "lengths": sizes.astype(np.int32),
            "position": state.position[rows].astype(np.int32),
            "logits_index": index.astype(np.int64),
        }
        inputs = {
            name: self.array(*value.shape, dtype=value.dtype) for name, value in values.items()
        }
        for name, value in values.items():
            inputs[name].write(value)
        shape = (len(sizes), index.shape[1], self.spec.vocab_size)
        logits = self.array(*shape, dtype=np.float32)
        context = self._contexts[PREFILL]
        self._bind(context, state, rows, inputs, logits)
        self._execute(context)
        self.cuda.synchronize()
        state.position[rows] += sizes
        return logits.read()

    def _decode(self, tokens: Tokens, state: TrtState) -> Logits:
        state.reserve(int(state.position.max()) + 1)
        call = state.decode_call or self._decode_call(state)
        state.decode_call = call
        call.inputs["tokens"].write(tokens[:, None])
        call.inputs["position"].write(state.position)
        self._step(call, state)
        self.cuda.synchronize()
        state.position += 1
        return np.asarray(call.logits.read()[:, 0], dtype=np.float32)

    def _step(self, call: DecodeCall, state: TrtState) -> None:
        """Start a decode step: plainly after another state, then as a graph.

        TensorRT prepares for new shapes in the first step, which no graph may hold. A graph is void
        once the context that it was captured from is bound anew.
        """
        context = self._contexts[DECODE]
        bound = self._bound() if self._bound is not None else None
        if bound is not call:
            self._bound = None
            if bound is not None:
                bound.graph = None
            self._bind(context, state, slice(0, state.batch), call.inputs, call.logits)
            self._bound = weakref.ref(call)
            self._execute(context)
            return
        # Only TensorRT-RTX can say no: it may compile kernels while it runs.
        asked = getattr(context, "is_stream_capturable", None)
        if call.graph is None and (asked is None or asked(self.cuda.stream)):
            call.graph = DeviceGraph(self.cuda, lambda: self._execute(context))
        if call.graph is None:
            self._execute(context)
        else:
            call.graph.launch()

    def _decode_call(self, state: TrtState) -> DecodeCall:
        batch = state.batch
        inputs = {
            "tokens": self.array(batch, 1, dtype=np.int64),
            "lengths": self.array(batch, dtype=np.int32),
            "position": self.array(batch, dtype=np.int32),
            "logits_index": self.array(batch, 1, dtype=np.int64),
        }
        inputs["lengths"].write(np.ones(batch))
        return DecodeCall(
            inputs=inputs, logits=self.array(batch, 1, self.spec.vocab_size, dtype=np.float32)
        )

    def _bind(
        self,
        context: Any,
        state: TrtState,
        rows: slice,
        inputs: dict[str, DeviceArray],
        logits: DeviceArray,
    ) -> None:
        """Tell a context shapes and addresses; state tensors are input and output at once."""
        for name, array in inputs.items():
            self._set_shape(context, name, array.shape)
            context.set_tensor_address(name, array.address)
        context.set_tensor_address("logits", logits.address)
        for name, array in state.arrays.items():
            kind, _, layer = name.partition(".")
            address = array.address + rows.start * array.row_bytes
            self._set_shape(context, name, (rows.stop - rows.start, *array.shape[1:]))
            context.set_tensor_address(name, address)
            context.set_tensor_address(f"{STATE_TENSORS[kind]}.{layer}", address)

    def _set_shape(self, context: Any, name: str, shape: tuple[int, ...]) -> None:
        # What is refused leaves the shape of the call before, with which the step would run.
        if not context.set_input_shape(name, shape):
            raise RingExportError(
                f"{self.spec.name} refuses {name} of shape {list(shape)}{self._reason()}",
                hint="the limits in the manifest do not fit this engine; build the bundle again",
            )

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(self.cuda.stream):
            raise RingExportError(
                f"{self.spec.name} failed{self._reason()}",
                hint="the state of this call is lost; if it happens again, report it",
            )

    def _reason(self) -> str:
        return f": {' '.join(self._log.errors[-1].split())[:400]}" if self._log.errors else ""

    def _close(self) -> None:
        self._contexts = []
        self._engine = None
        self._runtime = None


def _describe(
    trt: Any, engine: Any, path: Path
) -> tuple[dict[str, np.dtype[Any]], StateLayout, int]:
    """Read dtypes and layout of the state, and the width of the logits, from an engine."""
    known = {
        trt.DataType.FLOAT: np.dtype(np.float32),
        trt.DataType.HALF: np.dtype(np.float16),
        trt.DataType.BF16: np.dtype(ml_dtypes.bfloat16),
    }
    dtypes: dict[str, np.dtype[Any]] = {}
    recurrent: dict[int, tuple[int, int, int]] = {}
    kv_cache: dict[int, tuple[int, int]] = {}
    vocab_size = 0
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        shape = tuple(engine.get_tensor_shape(name))
        kind, _, layer = name.partition(".")
        if name == "logits":
            vocab_size = shape[-1]
        if kind not in STATE_TENSORS or not layer.isdigit() or len(shape) != 4:
            continue
        dtypes[name] = known.get(engine.get_tensor_dtype(name), np.dtype(np.void))
        if kind == "past_state":
            recurrent[int(layer)] = shape[1:]
        else:
            kv_cache[int(layer)] = (shape[1], shape[3])
    if vocab_size < 1 or np.dtype(np.void) in dtypes.values() or not dtypes:
        raise BundleError(f"{path} is no engine of ringexport", hint="build the bundle again")
    return dtypes, StateLayout(recurrent=recurrent, kv_cache=kv_cache), vocab_size
