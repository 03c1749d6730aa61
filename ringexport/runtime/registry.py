"""Backends by name, imported when asked for: a missing package counts only for its backend."""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ringexport.bundle import EngineBundle, FileEntry
from ringexport.errors import BackendUnavailableError, BundleError, CheckpointError, DigestError
from ringexport.files import sha256_of
from ringexport.ops.decay import DecayIndex
from ringexport.runtime.gpu import has_gpu
from ringexport.runtime.runner import DEFAULT_PREFILL_CHUNK, Runner

__all__ = [
    "BackendInfo",
    "RunnerOptions",
    "available_backends",
    "backend_choices",
    "check_backend",
    "open_bundle_runner",
    "open_checkpoint_runner",
]

UNQUANTIZED = ("fp32", "bf16")
CUDA_PROVIDER_FILE = "*onnxruntime_providers_cuda.*"
"""What onnxruntime-gpu has and onnxruntime has not: both install the same package."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendInfo:
    """A backend and whether it can run here.

    Attributes:
        name: as --backend takes it.
        missing: why it cannot run here, None if it can.
        hint: what to do about it.
    """

    name: str
    missing: str | None = None
    hint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerOptions:
    """How a runner is opened.

    Attributes:
        threads: threads per operation of CPU backends, None for the backend's choice.
        spin: let idle threads of onnxruntime wait busily.
        prefill_chunk: tokens per row that are computed at once.
        checkpoint: where the torch backend finds a bundle's checkpoint, if it has moved.
        decay_index: form of the decay for a checkpoint; a bundle knows its own.
        device: of the torch backend.
        dtype: of the torch backend.
        kernel_library: of the cuda backend, None for the default place.
        max_batch: sequences that the cuda backend plans memory for.
        max_context: tokens of each, None for the model's context.
    """

    threads: int | None = None
    spin: bool = True
    prefill_chunk: int = DEFAULT_PREFILL_CHUNK
    checkpoint: Path | None = None
    decay_index: DecayIndex = DecayIndex.SERVING
    device: str = "cpu"
    dtype: str = "float32"
    kernel_library: Path | None = None
    max_batch: int = 16
    max_context: int | None = None


def available_backends() -> tuple[BackendInfo, ...]:
    """Return all backends, the preferred first, without importing their packages."""
    ort = _package("onnxruntime:cpu", "onnxruntime", "ort")
    return (_onnxruntime_cuda(), ort, _package("torch", "torch", "torch"))


def _package(name: str, package: str, extra: str) -> BackendInfo:
    if importlib.util.find_spec(package) is not None:
        return BackendInfo(name=name)
    return BackendInfo(
        name=name,
        missing=f"the package {package} is not installed",
        hint=f"pip install 'ringexport[{extra}]'",
    )


def _onnxruntime_cuda() -> BackendInfo:
    """Look for onnxruntime's CUDA provider, and for a GPU."""
    name, hint = "onnxruntime:cuda", "pip uninstall onnxruntime; pip install 'ringexport[ort-cuda]'"
    spec = importlib.util.find_spec("onnxruntime")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    if not any(list(Path(place, "capi").glob(CUDA_PROVIDER_FILE)) for place in places):
        missing = "the package onnxruntime-gpu is not installed"
        return BackendInfo(name=name, missing=missing, hint=hint)
    if not has_gpu():
        missing = "this machine has no NVIDIA GPU with a driver"
        return BackendInfo(name=name, missing=missing, hint="use the backend onnxruntime:cpu")
    return BackendInfo(name=name)


def open_bundle_runner(
    bundle: EngineBundle, backend: str = "auto", options: RunnerOptions | None = None
) -> Runner:
    """Load a bundle's model.

    Args:
        bundle: an opened bundle.
        backend: name of a backend, or "auto" for the first target of the bundle that can run here.
        options: how to run it.

    Raises:
        BackendUnavailableError: unknown backend, one that cannot run here, or no such target.
        BundleError, CheckpointError, ConfigError: files that cannot be used.
    """
    options = options or RunnerOptions()
    if backend == "torch":
        _require(_known_backend(backend))
        return _torch_from_bundle(bundle, options)
    name = _choose_target(bundle, backend, options)
    target = bundle.targets[name]
    if _is_packed(name):
        return _open_packed(bundle, name, options)
    if _is_engine(name):
        from ringexport.runtime.backends.trt import open_engine  # noqa: PLC0415 - on demand

        return open_engine(
            bundle.directory / target.directory,
            name,
            target.limits,
            partial(_bundle_digest, bundle),
        )
    return _open_onnxruntime(bundle, name, options)


def check_backend(bundle: EngineBundle, backend: str, options: RunnerOptions | None = None) -> None:
    """Say whether a target of a bundle can run here, as far as that is known without loading it.

    Raises:
        BackendUnavailableError: as `open_bundle_runner`.
    """
    _choose_target(bundle, backend, options or RunnerOptions())


def _open_onnxruntime(bundle: EngineBundle, name: str, options: RunnerOptions) -> Runner:
    from ringexport.runtime.backends.ort import OrtOptions, OrtRunner  # noqa: PLC0415 - on demand
    from ringexport.runtime.backends.ort_cuda import OrtCudaRunner  # noqa: PLC0415 - on demand

    target = bundle.targets[name]
    on_gpu = name == "onnxruntime:cuda"
    kind = OrtCudaRunner if on_gpu else OrtRunner
    return kind(
        bundle.directory / target.directory,
        context_length=target.limits.get("context_length", bundle.manifest.model.context_length),
        model_digest=partial(_bundle_digest, bundle),
        options=OrtOptions(
            provider=name.partition(":")[2],
            threads=options.threads,
            spin=options.spin,
            prefill_chunk=options.prefill_chunk,
            cuda_graph=on_gpu,
        ),
    )


def open_checkpoint_runner(
    checkpoint: Path, backend: str = "auto", options: RunnerOptions | None = None
) -> Runner:
    """Load a checkpoint with the torch reference.

    Args:
        checkpoint: its directory.
        backend: "auto" or "torch".
        options: how to run it.

    Raises:
        BackendUnavailableError: a backend that needs a bundle, or torch is missing.
        CheckpointError, ConfigError: the checkpoint cannot be used.
    """
    options = options or RunnerOptions()
    name = "torch" if backend == "auto" else backend
    if _is_gpu_target(name) or _known_backend(name).name != "torch":
        raise BackendUnavailableError(
            f"the backend {backend} cannot run a checkpoint, only a bundle",
            hint=f"build one: ringexport build {checkpoint} -o BUNDLE",
        )
    _require(_known_backend(name))
    return _torch_runner(
        checkpoint, options, options.decay_index, partial(_checkpoint_digest, checkpoint, options)
    )


def _torch_runner(
    checkpoint: Path,
    options: RunnerOptions,
    decay_index: DecayIndex,
    model_digest: Callable[[], str],
) -> Runner:
    from ringexport.runtime.backends.torch_ref import TorchRunner  # noqa: PLC0415 - on demand

    return TorchRunner(
        checkpoint,
        model_digest=model_digest,
        decay_index=decay_index,
        dtype=options.dtype,
        device=options.device,
        threads=options.threads,
        prefill_chunk=options.prefill_chunk,
    )


def _torch_from_bundle(bundle: EngineBundle, options: RunnerOptions) -> Runner:
    """Load the checkpoint that a bundle was built from, after comparing its digests."""
    checkpoint = options.checkpoint or bundle.source_path
    hint = "give the checkpoint that the bundle was built from with --checkpoint"
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"the bundle's checkpoint is not at {checkpoint}, the torch backend needs it", hint=hint
        )
    for entry in bundle.manifest.source.files:
        if _sha256(checkpoint / entry.path) != entry.sha256:
            raise DigestError(
                f"{checkpoint / entry.path} is not the file that the bundle was built from",
                hint=hint,
            )
    form = bundle.manifest.decay.form
    if form not in list(DecayIndex):
        raise BundleError(
            f"the bundle {bundle.directory} has the decay form {form!r:.80},"
            f" expected one of {', '.join(DecayIndex)}",
            hint="build it again with: ringexport build",
        )
    decay_index = DecayIndex(form)
    return _torch_runner(checkpoint, options, decay_index, partial(_bundle_digest, bundle))


def _is_engine(name: str) -> bool:
    return name.startswith(("tensorrt:", "tensorrt-rtx:"))


def _is_packed(name: str) -> bool:
    return name.startswith("cuda:")


def _is_gpu_target(name: str) -> bool:
    """Say whether a name is that of a target which is a backend of the bundles that have it."""
    return _is_engine(name) or _is_packed(name)


def _open_packed(bundle: EngineBundle, name: str, options: RunnerOptions) -> Runner:
    from ringexport.runtime.backends.cuda import open as cuda  # noqa: PLC0415 - on demand

    return cuda.open_packed(
        bundle.directory / bundle.targets[name].directory,
        bundle.directory / "model" / "config.json",
        library=options.kernel_library,
        model_digest=partial(_bundle_digest, bundle),
        options=cuda.CudaOptions(
            max_batch=options.max_batch,
            max_context=options.max_context,
            prefill_chunk=options.prefill_chunk,
            capture_ahead=True,
        ),
    )


def _engines(bundle: EngineBundle, options: RunnerOptions) -> tuple[BackendInfo, ...]:
    """Return the GPU targets of a bundle; each is a backend of its own."""
    infos = []
    for name in bundle.targets:
        found: tuple[str, str | None] | None = None
        if _is_engine(name):
            from ringexport.runtime.backends import trt  # noqa: PLC0415 - on demand

            found = trt.why_not_here(name)
        elif _is_packed(name):
            found = _why_not_packed(name, options)
        else:
            continue
        missing, hint = found or (None, None)
        infos.append(BackendInfo(name=name, missing=missing, hint=hint))
    return tuple(infos)


def _why_not_packed(name: str, options: RunnerOptions) -> tuple[str, str | None] | None:
    try:
        from ringexport.runtime.backends.cuda import open as cuda  # noqa: PLC0415 - on demand
    except BackendUnavailableError as error:
        return error.message, error.hint
    return cuda.why_not_here(name, options.kernel_library)


def backend_choices(bundle: EngineBundle | None) -> list[str]:
    """Return what a backend may be called for a bundle, or for a checkpoint (None)."""
    return ["auto", *(() if bundle is None else bundle.targets), "torch"]


def _known_backend(
    name: str, bundle: EngineBundle | None = None, options: RunnerOptions | None = None
) -> BackendInfo:
    engines = () if bundle is None else _engines(bundle, options or RunnerOptions())
    backends = {info.name: info for info in (*engines, *available_backends())}
    if name not in backends:
        raise BackendUnavailableError(
            f"there is no backend {name!r}", hint=f"choose {' or '.join(backend_choices(bundle))}"
        )
    return backends[name]


def _require(info: BackendInfo) -> None:
    if info.missing is not None:
        raise BackendUnavailableError(
            f"the backend {info.name} cannot run here: {info.missing}", hint=info.hint
        )


def _choose_target(bundle: EngineBundle, backend: str, options: RunnerOptions) -> str:
    """Return the target to run; backends other than torch are named like targets."""
    if backend != "auto":
        if backend not in bundle.targets:
            if not _is_gpu_target(backend):
                _known_backend(backend, bundle, options)
            runnable = [one.name for one in available_backends() if one.name in bundle.targets]
            raise BackendUnavailableError(
                f"the bundle {bundle.directory} has no target {backend},"
                f" it has {', '.join(bundle.targets) or 'none'}",
                hint=f"choose {' or '.join(['auto', *runnable, 'torch'])}",
            )
        _require(_known_backend(backend, bundle, options))
        return backend
    backends = (*_engines(bundle, options), *available_backends())
    for info in backends:
        if info.name in bundle.targets and info.missing is None:
            return info.name
    known = {info.name: info.missing for info in backends}
    reasons = [
        f"{name}: {known.get(name, 'this version has no backend for it')}"
        for name in bundle.targets
    ]
    raise BackendUnavailableError(
        f"no target of {bundle.directory} can run here ({'; '.join(reasons) or 'it has none'})",
        hint="ringexport doctor tells what is missing",
    )


def _bundle_digest(bundle: EngineBundle) -> str:
    manifest = bundle.manifest
    recipe, quantization = manifest.build.recipe, manifest.quantization
    if quantization is not None:
        calibration = quantization.calibration
        stats = "" if calibration is None else calibration.stats_sha256
        recipe = f"{recipe}:{quantization.modules_sha256}:{stats}"
    return _model_digest(manifest.source.files, manifest.decay.form, recipe)


def _checkpoint_digest(checkpoint: Path, options: RunnerOptions) -> str:
    paths = sorted([*checkpoint.glob("*.safetensors"), checkpoint / "config.json"])
    entries = [
        FileEntry(path=path.name, size=path.stat().st_size, sha256=_sha256(path)) for path in paths
    ]
    return _model_digest(entries, options.decay_index, UNQUANTIZED[0])


def _model_digest(files: Iterable[FileEntry], decay: str, recipe: str) -> str:
    """Name weights, config, decay and quantization: states fit models of equal digest."""
    used = [
        [entry.path, entry.size, entry.sha256]
        for entry in files
        if entry.path.endswith(".safetensors") or entry.path == "config.json"
    ]
    identity = {
        "files": sorted(used),
        "decay": str(decay),
        "recipe": None if recipe in UNQUANTIZED else recipe,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
