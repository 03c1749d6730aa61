"""Build a bundle: read and check, copy, export, digest, try, publish."""

import importlib
import importlib.metadata
import logging
import os
import shutil
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ringexport.bundle import (
    BundleWriter,
    DecayTable,
    EngineBundle,
    Manifest,
    ModelInfo,
    ResolvedBuild,
    SourceInfo,
    TargetInfo,
    ToolInfo,
)
from ringexport.bundle.files import check_apart, file_entry
from ringexport.bundle.writer import check_destination
from ringexport.checkpoint import CheckpointWeights, RingConfig
from ringexport.engine.target import EngineTarget
from ringexport.errors import BackendUnavailableError, CheckpointError, OutputError, RingExportError
from ringexport.ops.decay import DecayIndex, log_decay
from ringexport.pipeline.calibrated import CalibrationRequest
from ringexport.pipeline.gate import GateRequest
from ringexport.pipeline.packed import export_packed, is_packed, max_packed_bytes
from ringexport.pipeline.quantized import QuantizationPlan, plan_quantization, quantized_weights
from ringexport.pipeline.request import BuildRequest, resolve, target_directory
from ringexport.pipeline.target_io import target_io
from ringexport.pipeline.target_schemes import check_model, max_engine_bytes, max_weight_bytes
from ringexport.pipeline.tensorrt import TensorRtTarget, prepare_tensorrt
from ringexport.progress import NoProgress, Progress
from ringexport.quantize.run import estimate as estimate_quantization
from ringexport.runtime.registry import RunnerOptions, check_backend, open_bundle_runner
from ringexport.runtime.tokenizer import ModelTokenizer
from ringexport.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["BuildEstimate", "BuildResult", "build", "estimate"]

log = logging.getLogger(__name__)

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
REQUIRED_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
_GRAPH_BYTES = 2 << 20  # two graphs of some 200 bytes a node, and the manifest
_MEMORY_FACTOR = 2  # runtimes repack weights beside the loaded ones
_SHAPING_PACKAGES = ("ml_dtypes", "numpy", "onnx")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildEstimate:
    """What a build would do.

    Attributes:
        build: the resolved build.
        architecture: of the checkpoint.
        num_parameters: of the checkpoint.
        source_bytes: of its weight files.
        bundle_bytes: what the bundle will take at most.
        work_bytes: what the quantized checkpoint takes beside it until the bundle is complete.
        free_bytes: on the disk of the output.
        quantization: what is quantized and how.
        notes: how targets compute quantized modules, where it is not what the recipe says.
    """

    build: ResolvedBuild
    architecture: str
    num_parameters: int
    source_bytes: int
    bundle_bytes: int
    work_bytes: int
    free_bytes: int
    quantization: QuantizationPlan
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildResult:
    """A finished build.

    Attributes:
        path: of the bundle.
        manifest: as written.
        nbytes: of all files.
        seconds: stage to wall time.
        notes: what the user should know.
        untried: those of the notes that say which target cannot be tried here, by target; they
            were told to the progress, too.
    """

    path: Path
    manifest: Manifest
    nbytes: int
    seconds: dict[str, float]
    notes: tuple[str, ...]
    untried: dict[str, str]


class _Clock:
    """Adds up wall time per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> "Iterator[None]":
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def estimate(request: BuildRequest) -> BuildEstimate:
    """Check a request and the checkpoint without writing anything.

    Raises:
        ConfigError, CheckpointError: the request or the checkpoint cannot be used.
        BackendUnavailableError: a target cannot be built here.
        OutputError: the output cannot be there.
    """
    resolved = resolve(request)
    _check_paths(request)
    with _open_checkpoint(request.checkpoint) as weights:
        plan = _plan(request, resolved, weights)
        prepare_tensorrt(request, resolved, weights.config)
        work_bytes = 0
        if plan.resolved is not None:
            recipe = plan.resolved.recipe
            work_bytes = estimate_quantization(request.checkpoint, recipe).output_bytes
        parent = request.output.absolute().parent
        while not parent.exists():
            parent = parent.parent
        return BuildEstimate(
            build=replace(resolved, recipe=plan.name),
            architecture=ARCHITECTURE,
            num_parameters=weights.config.num_parameters,
            source_bytes=sum(path.stat().st_size for path in weights.files()),
            bundle_bytes=_bundle_bytes(request, weights, plan),
            work_bytes=work_bytes,
            free_bytes=shutil.disk_usage(parent).free,
            quantization=plan,
            notes=plan.notes(weights.config),
        )


ARCHITECTURE = "BailingMoeLinearV2ForCausalLM"


def build(request: BuildRequest, *, progress: Progress | None = None) -> BuildResult:
    """Build a bundle; on any error or interrupt the output is as it was before.

    Args:
        request: what to build.
        progress: told about every stage.

    Raises:
        ConfigError, CheckpointError: the request or the checkpoint cannot be used.
        BackendUnavailableError: a target cannot be built here.
        GraphError: the exported graph is wrong.
        OutputError: the output cannot be written.
    """
    progress = progress or NoProgress()
    clock = _Clock()
    notes: list[str] = []
    untried: dict[str, str] = {}
    resolved = resolve(request)
    log.debug("%s is resolved to %s", request, resolved)
    _check_paths(request)
    with clock.stage("check"):
        progress.start("checking the checkpoint")
        weights = _open_checkpoint(request.checkpoint)
        progress.finish()
    with weights:
        plan = _plan(request, resolved, weights)
        resolved = replace(resolved, recipe=plan.name)
        engines = prepare_tensorrt(request, resolved, weights.config)
        size = _bundle_bytes(request, weights, plan)
        with BundleWriter(request.output, expected_bytes=size) as writer:
            job = _Job(request, resolved, plan, weights, writer, engines)
            complete = _write(job, clock, progress, notes, untried)
    return BuildResult(
        path=request.output,
        manifest=complete,
        nbytes=sum(entry.size for entry in complete.files),
        seconds=clock.seconds,
        notes=(*notes, *untried.values()),
        untried=untried,
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """One build: what was decided, what it reads and where it writes."""

    request: BuildRequest
    resolved: ResolvedBuild
    plan: QuantizationPlan
    weights: CheckpointWeights
    writer: BundleWriter
    engines: dict[str, TensorRtTarget]


def _plan(
    request: BuildRequest, resolved: ResolvedBuild, weights: CheckpointWeights
) -> QuantizationPlan:
    for target in filter(is_packed, resolved.targets):
        check_model(target, weights.config)
    calibration = CalibrationRequest(
        prompts=request.calibration,
        num_samples=request.calibration_samples,
        stats=request.stats,
        decay_index=resolved.decay_index,
    )
    gate = GateRequest.parse(
        request.gate, fallback=request.gate_fallback, decay_index=resolved.decay_index
    )
    plan = plan_quantization(weights, request.recipe, calibration, resolved.targets)
    return plan.with_gate(gate)


def _write(
    job: _Job, clock: _Clock, progress: Progress, notes: list[str], untried: dict[str, str]
) -> Manifest:
    """Quantize if asked for, write everything and put it in place."""
    request, writer = job.request, job.writer
    start = time.perf_counter()
    with quantized_weights(
        job.plan, job.weights, request.output, threads=request.threads, progress=progress
    ) as (weights, quantization):
        if job.plan.resolved is not None:
            clock.seconds["quantize"] = time.perf_counter() - start
        with clock.stage("copy"):
            for name in MODEL_FILES:
                if (request.checkpoint / name).is_file():
                    shutil.copyfile(request.checkpoint / name, writer.path(f"model/{name}"))
        targets = {}
        for target in job.resolved.targets:
            with clock.stage("export"):
                targets[target] = _export_target(job, weights, target, progress)
        with clock.stage("digest"):
            source = _source_info(request, job.weights, progress)
        manifest = _manifest(job.resolved, weights.config, source, targets)
        for engine in job.engines.values():
            manifest = replace(manifest, versions=manifest.versions | engine.versions())
            notes += engine.notes()
        manifest = replace(manifest, quantization=quantization)
        notes += quantization.notes if quantization is not None else ()

        def check(bundle: EngineBundle) -> None:
            with clock.stage("try"):
                options = RunnerOptions(kernel_library=request.kernel_library)
                untried.update(_try_targets(bundle, options, progress))

        start = time.perf_counter()
        complete = writer.commit(manifest, progress=progress, check=check)
        clock.seconds["write"] = time.perf_counter() - start - clock.seconds.get("try", 0.0)
    return complete


def _export_target(
    job: _Job, weights: CheckpointWeights, target: str, progress: Progress
) -> TargetInfo:
    decay_index, engine = job.resolved.decay_index, job.engines.get(target)
    if engine is not None:
        return engine.export(weights, decay_index, job.writer, progress)
    if is_packed(target):
        return export_packed(weights, target, decay_index, job.writer, progress)
    return _export(weights, job.resolved, target, job.writer, progress)


def _check_paths(request: BuildRequest) -> None:
    _check_name(request.output)
    if not request.checkpoint.is_dir():
        kind = "is a file" if request.checkpoint.exists() else "does not exist"
        raise CheckpointError(
            f"there is no checkpoint at {request.checkpoint}: it {kind}",
            hint="give the directory that holds config.json and the safetensors files",
        )
    check_apart(request.checkpoint, request.output)
    check_destination(Path(os.path.abspath(request.output)))  # noqa: PTH100 (keeps links)


def _check_name(output: Path) -> None:
    """Refuse a path that ONNX and TensorRT, which want UTF-8, cannot open."""
    try:
        os.path.realpath(output).encode()
    except UnicodeEncodeError as error:
        raise OutputError(
            f"the path of the output is not UTF-8: {str(output)!r}", hint="choose another -o"
        ) from error


def _open_checkpoint(checkpoint: Path) -> CheckpointWeights:
    """Open the weights and make sure that the tokenizer fits them."""
    for name in REQUIRED_FILES:
        if not (checkpoint / name).is_file():
            problem = f"the checkpoint {checkpoint} has no {name}"
            if (checkpoint / name).exists():
                problem = f"{checkpoint / name} is not a regular file"
            raise CheckpointError(
                problem,
                hint="copy the complete checkpoint: config, tokenizer and weights",
            )
    weights = CheckpointWeights.open(checkpoint)
    ModelTokenizer.open(checkpoint, vocab_size=weights.config.vocab_size)
    return weights


def _bundle_bytes(request: BuildRequest, weights: CheckpointWeights, plan: QuantizationPlan) -> int:
    """Return what the bundle takes at most: weights, copied files and graphs."""
    copied = sum(
        (request.checkpoint / name).stat().st_size
        for name in MODEL_FILES
        if (request.checkpoint / name).is_file()
    )
    stored = copied
    for target in plan.targets:
        if is_packed(target):
            stored += max_packed_bytes(weights.config, plan.schemes)
            continue
        is_engine = EngineTarget.parse(target) is not None
        # The graph lies beside the engine while that is built.
        stored += 2 * max_engine_bytes(weights.config) if is_engine else 0
        stored += 0 if is_engine else max_weight_bytes(weights.config, plan.schemes)
    return stored + stored // 100 + _GRAPH_BYTES


class _Exporter(Protocol):
    """`ringexport.graph.export.export_graph`, as far as it is used here."""

    def __call__(
        self,
        weights: CheckpointWeights,
        directory: Path,
        *,
        decay_index: DecayIndex,
        dtype: str,
        provider: str,
        progress: Progress | None,
    ) -> object:
        """Write the graph."""


def _load_exporter() -> _Exporter:
    """Import the exporter, which needs onnx, only when something is built."""
    try:
        module = importlib.import_module("ringexport.graph.export")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("ringexport"):
            raise
        raise BackendUnavailableError(
            f"building needs the package {error.name}, which is not installed",
            hint="pip install 'ringexport[torch]'",
        ) from error
    exporter: _Exporter = module.export_graph
    return exporter


def _export(
    weights: CheckpointWeights,
    resolved: ResolvedBuild,
    target: str,
    writer: BundleWriter,
    progress: Progress,
) -> TargetInfo:
    """Write the graph of one target and describe it."""
    directory = target_directory(target)
    path = writer.path(f"{directory}/weights.bin").parent
    export_graph = _load_exporter()
    form = DecayIndex(resolved.decay_index)
    provider = target.partition(":")[2]
    dtype = "fp32" if provider == "cpu" or resolved.recipe == "fp32" else "bf16"
    export_graph(weights, path, decay_index=form, dtype=dtype, provider=provider, progress=progress)
    progress.finish()
    return TargetInfo(
        directory=directory,
        files={
            "graph": f"{directory}/model.onnx",
            "probe": f"{directory}/probe.onnx",
            "weights": f"{directory}/weights.bin",
        },
        io=target_io(weights.config),
        limits={"context_length": weights.config.context_length},
    )


def _source_info(
    request: BuildRequest, weights: CheckpointWeights, progress: Progress
) -> SourceInfo:
    """Digest the files of the checkpoint that the build used."""
    root = request.checkpoint
    names = {name for name in MODEL_FILES if (root / name).is_file()}
    names |= {path.name for path in weights.files()}
    total = sum((root / name).stat().st_size for name in names)
    progress.start("hashing the checkpoint", total, "bytes")
    try:
        files = tuple(file_entry(root, name, progress.advance) for name in sorted(names))
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from error
    progress.finish()
    return SourceInfo(path=_relative(root, request.output), files=files)


def _relative(checkpoint: Path, output: Path) -> str:
    """Return the checkpoint's path seen from the bundle, so that both can move together."""
    try:
        return Path(os.path.relpath(checkpoint.resolve(), output.resolve())).as_posix()
    except ValueError:  # another drive
        return checkpoint.resolve().as_posix()


def _manifest(
    resolved: ResolvedBuild, config: RingConfig, source: SourceInfo, targets: dict[str, TargetInfo]
) -> Manifest:
    form = DecayIndex(resolved.decay_index)
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    table = {
        str(layer): tuple(float(x) for x in log_decay(heads, layer, layers, form))
        for layer in config.linear_layers
    }
    config_entry = next(entry for entry in source.files if entry.path == "config.json")
    return Manifest(
        tool=ToolInfo(name="ringexport", version=__version__),
        versions={name: importlib.metadata.version(name) for name in _SHAPING_PACKAGES},
        source=source,
        model=ModelInfo(
            architecture=ARCHITECTURE,
            config_sha256=config_entry.sha256,
            num_parameters=config.num_parameters,
            num_layers=layers,
            vocab_size=config.vocab_size,
            context_length=config.context_length,
        ),
        build=resolved,
        decay=DecayTable(form=resolved.decay_index, table=table),
        targets=targets,
    )


def _try_targets(
    bundle: EngineBundle, options: RunnerOptions, progress: Progress
) -> dict[str, str]:
    """Run a few tokens through every target before the bundle takes its place.

    Returns:
        Target to the note why it was not tried.
    """
    memory, untried = _memory_bytes(), {}
    for target in bundle.targets:
        if memory is not None and _MEMORY_FACTOR * bundle.nbytes > memory:
            reason = "this machine has too little memory to load it"
            untried[target] = f"{target} was not tried: {reason}"
            progress.note(untried[target])
            continue
        try:
            check_backend(bundle, target, options)
            progress.start(f"trying {target}")
            with closing(open_bundle_runner(bundle, target, options)) as runner:
                state = runner.new_state(1)
                tokens = [[0, 1, bundle.manifest.model.vocab_size - 1]]
                logits = runner.prefill(tokens, None, state)
                finite = bool((abs(logits) < float("inf")).all())
        except BackendUnavailableError as error:
            untried[target] = f"{target} was not tried: {error.message}"
            progress.note(untried[target])
            continue
        finally:
            progress.finish()
        if not finite:
            raise RingExportError(f"the new {target} graph computes NaN or infinity")
    return untried


def _memory_bytes() -> int | None:
    """Return the physical memory, None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
