"""ONNX Runtime itself: sessions, their errors, and what a graph says about its state."""

import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ringexport.errors import BackendUnavailableError, BundleError, RingExportError
from ringexport.runtime.onnxruntime_import import import_onnxruntime
from ringexport.runtime.runner import DEFAULT_PREFILL_CHUNK, memory_guard
from ringexport.runtime.state import StateLayout

try:
    onnxruntime = import_onnxruntime()
    from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
except ImportError as error:  # pragma: no cover - the tests' environment has it
    raise BackendUnavailableError(
        f"the onnxruntime backend needs the package onnxruntime: {error}",
        hint="pip install 'ringexport[ort]'",
    ) from error

__all__ = [
    "CUDA_HINT",
    "STATE_TENSORS",
    "Binding",
    "OrtOptions",
    "Session",
    "element_type",
    "failed_node",
    "onnxruntime",
    "open_session",
    "preload_libraries",
    "resolved_shape",
    "run_bound",
    "state_inputs",
    "why_no_provider",
]

Session = Any  # onnxruntime.InferenceSession, which has no type information
Binding = Any  # onnxruntime.IOBinding

CUDA_HINT = "pip uninstall onnxruntime; pip install 'onnxruntime-gpu[cuda,cudnn]'"
"""Both packages install the module onnxruntime: the one installed last wins."""

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bfloat16)": np.dtype(ml_dtypes.bfloat16),
    "tensor(int64)": np.dtype(np.int64),
}
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16; running a bundle does not need the package onnx
_ORT_ERRORS = tuple(
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
        cuda_graph: replay decode steps as CUDA graphs; for the provider cuda.
    """

    provider: str = "cpu"
    threads: int | None = None
    spin: bool = True
    prefill_chunk: int = DEFAULT_PREFILL_CHUNK
    cuda_graph: bool = False


def why_no_provider(provider: str) -> str | None:
    """Return why this onnxruntime cannot run a provider, None if it may."""
    if provider not in PROVIDERS:
        return f"onnxruntime has no provider {provider!r} here, expected {' or '.join(PROVIDERS)}"
    if PROVIDERS[provider] in onnxruntime.get_available_providers():
        return None
    return f"the installed onnxruntime {onnxruntime.__version__} is built without {provider}"


def open_session(
    path: Path,
    options: OrtOptions,
    *,
    provider_options: dict[str, str] | None = None,
    initializers: dict[str, Any] | None = None,
) -> Session:
    """Load a graph; its external data lies beside it.

    Args:
        path: of the graph.
        options: how to run it.
        provider_options: of the execution provider.
        initializers: OrtValue in the provider's memory for weights that are not to be read.

    Raises:
        BackendUnavailableError: the provider cannot be used here.
        BundleError: the graph cannot be loaded.
    """
    problem = why_no_provider(options.provider)
    if problem is not None:
        hint = CUDA_HINT if options.provider == "cuda" else "use the backend onnxruntime:cpu"
        raise BackendUnavailableError(problem, hint=hint)
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    settings.intra_op_num_threads = options.threads or 0
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 4  # errors are raised; stderr belongs to the command line
    settings.add_session_config_entry(
        "session.intra_op.allow_spinning", "1" if options.spin else "0"
    )
    for name, value in (initializers or {}).items():
        settings.add_initializer(name, value)
    providers = [(PROVIDERS[options.provider], provider_options or {})]
    if options.provider != "cpu":
        preload_libraries()
        providers.append((PROVIDERS["cpu"], {}))  # shapes are computed on the host
    try:
        with memory_guard(f"the graph {path} and its weights"):
            session = onnxruntime.InferenceSession(str(path), settings, providers=providers)
    except _ORT_ERRORS as error:
        raise BundleError(
            f"onnxruntime cannot load {path}: {_first_line(str(error))}",
            hint="build the bundle again, or upgrade onnxruntime to the version in its manifest",
        ) from error
    if PROVIDERS[options.provider] not in session.get_providers():
        raise BackendUnavailableError(
            f"onnxruntime cannot use its {options.provider} provider here: CUDA's libraries of the "
            "version that it was built for, cuDNN or a GPU are missing",
            hint=CUDA_HINT,
        )
    return session


def preload_libraries() -> None:
    """Load CUDA's libraries from installed wheels, where the loader would not look for them."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        onnxruntime.preload_dlls()


def run_bound(session: Session, binding: Binding, graph_id: int | None = None) -> None:
    """Run a session on what is bound.

    Args:
        session: to run.
        binding: of all its inputs and outputs.
        graph_id: of the CUDA graph to record or replay, -1 for none; None where there are none.

    Raises:
        RingExportError: the run failed.
    """
    options = None
    if graph_id is not None:
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph_id))
    try:
        session.run_with_iobinding(binding, options)
    except (RuntimeError, *_ORT_ERRORS) as error:
        raise RingExportError(
            f"onnxruntime failed in {failed_node(str(error))}: {_first_line(str(error))}",
            hint="the state of this call is lost; if it happens again, report it with the model",
        ) from error


def failed_node(message: str) -> str:
    """Return the node that an error of onnxruntime names."""
    found = re.search(r"running (\S+) node\. Name:'([^']*)'", message)
    return f"{found[1]} {found[2]!r}" if found else "the graph"


def _first_line(message: str) -> str:
    status = message.partition("Status Message:")[2] or message
    return status.strip().splitlines()[0][:400] if status.strip() else "no reason given"


def element_type(dtype: np.dtype[Any]) -> Any:
    """Return how a binding calls a dtype: numpy has no bf16 of its own."""
    return _BFLOAT16 if dtype == ml_dtypes.bfloat16 else dtype


def resolved_shape(declared: list[str | int], sizes: dict[str, int]) -> tuple[int, ...]:
    """Return a declared shape with its named dimensions replaced."""
    return tuple(sizes[size] if isinstance(size, str) else size for size in declared)


def state_inputs(session: Session) -> tuple[dict[str, np.dtype[Any]], StateLayout]:
    """Read the dtypes and the layout of the state from the graph's inputs.

    Raises:
        BundleError: an input that no graph of ringexport has.
    """
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
