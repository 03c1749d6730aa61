"""Build a bundle: read and check, copy, export, digest, try, publish."""

import importlib
import importlib.metadata
import logging
import os
import shutil
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass
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
    TargetIO,
    ToolInfo,
)
from ringexport.bundle.files import file_entry
from ringexport.checkpoint import CheckpointWeights, RingConfig
from ringexport.errors import BackendUnavailableError, CheckpointError, OutputError, RingExportError
from ringexport.ops.decay import DecayIndex, log_decay
from ringexport.pipeline.request import BuildRequest, resolve, target_directory
from ringexport.progress import NoProgress, Progress
from ringexport.runtime.registry import open_bundle_runner
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
_GRAPH_BYTES = 16 << 20  # generous for the two graphs beside their weights
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
        free_bytes: on the disk of the output.
    """

    build: ResolvedBuild
    architecture: str
    num_parameters: int
    source_bytes: int
    bundle_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildResult:
    """A finished build.

    Attributes:
        path: of the bundle.
        manifest: as written.
        nbytes: of all files.
        seconds: stage to wall time.
        notes: what the user should know.
    """

    path: Path
    manifest: Manifest
    nbytes: int
    seconds: dict[str, float]
    notes: tuple[str, ...]


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
        OutputError: the output is inside the checkpoint or the other way round.
    """
    resolved = resolve(request)
    _check_paths(request)
    with _open_checkpoint(request.checkpoint) as weights:
        parent = request.output.absolute().parent
        while not parent.exists():
            parent = parent.parent
        return BuildEstimate(
            build=resolved,
            architecture=ARCHITECTURE,
            num_parameters=weights.config.num_parameters,
            source_bytes=sum(path.stat().st_size for path in weights.files()),
            bundle_bytes=_bundle_bytes(request, weights),
            free_bytes=shutil.disk_usage(parent).free,
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
    resolved = resolve(request)
    log.debug("%s is resolved to %s", request, resolved)
    _check_paths(request)
    with clock.stage("check"):
        progress.start("checking the checkpoint")
        weights = _open_checkpoint(request.checkpoint)
        progress.finish()
    with (
        weights,
        BundleWriter(request.output, expected_bytes=_bundle_bytes(request, weights)) as writer,
    ):
        with clock.stage("copy"):
            for name in MODEL_FILES:
                if (request.checkpoint / name).is_file():
                    shutil.copyfile(request.checkpoint / name, writer.path(f"model/{name}"))
        targets = {}
        for target in resolved.targets:
            with clock.stage("export"):
                targets[target] = _export(weights, resolved, target, writer, progress)
        with clock.stage("digest"):
            source = _source_info(request, weights, progress)
        manifest = _manifest(resolved, weights.config, source, targets)

        def check(bundle: EngineBundle) -> None:
            with clock.stage("try"):
                _try_targets(bundle, progress, notes)

        start = time.perf_counter()
        complete = writer.commit(manifest, progress=progress, check=check)
        rest = time.perf_counter() - start - clock.seconds.get("try", 0.0)
        clock.seconds["write"] = rest
    return BuildResult(
        path=request.output,
        manifest=complete,
        nbytes=sum(entry.size for entry in complete.files),
        seconds=clock.seconds,
        notes=tuple(notes),
    )


def _check_paths(request: BuildRequest) -> None:
    checkpoint, output = request.checkpoint.resolve(), request.output.resolve()
    if not request.checkpoint.is_dir():
        kind = "is a file" if request.checkpoint.exists() else "does not exist"
        raise CheckpointError(
            f"there is no checkpoint at {request.checkpoint}: it {kind}",
            hint="give the directory that holds config.json and the safetensors files",
        )
    if output == checkpoint or checkpoint in output.parents or output in checkpoint.parents:
        raise OutputError(
            f"the output {request.output} and the checkpoint {request.checkpoint} are inside each"
            " other",
            hint="write the bundle beside the checkpoint, with -o",
        )


def _open_checkpoint(checkpoint: Path) -> CheckpointWeights:
    """Open the weights and make sure that the tokenizer fits them."""
    for name in REQUIRED_FILES:
        if not (checkpoint / name).is_file():
            raise CheckpointError(
                f"the checkpoint {checkpoint} has no {name}",
                hint="copy the complete checkpoint: config, tokenizer and weights",
            )
    weights = CheckpointWeights.open(checkpoint)
    ModelTokenizer.open(checkpoint, vocab_size=weights.config.vocab_size)
    return weights


def _bundle_bytes(request: BuildRequest, weights: CheckpointWeights) -> int:
    """Return what the bundle takes at most: fp32 weights, copied files and graphs."""
    copied = sum(
        (request.checkpoint / name).stat().st_size
        for name in MODEL_FILES
        if (request.checkpoint / name).is_file()
    )
    return 4 * weights.config.num_parameters + copied + _GRAPH_BYTES


class _Exporter(Protocol):
    """`ringexport.graph.export.export_graph`, as far as it is used here."""

    def __call__(
        self,
        weights: CheckpointWeights,
        directory: Path,
        *,
        decay_index: DecayIndex,
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
    export_graph(weights, path, decay_index=form, progress=progress)
    progress.finish()
    config = weights.config
    cache = ("B", config.num_key_value_heads, "S", config.head_dim)
    return TargetInfo(
        directory=directory,
        files={
            "graph": f"{directory}/model.onnx",
            "probe": f"{directory}/probe.onnx",
            "weights": f"{directory}/weights.bin",
        },
        io=TargetIO(
            linear_layers=config.linear_layers,
            softmax_layers=config.softmax_layers,
            shapes={
                "past_state": ("B", config.num_attention_heads, config.head_dim, config.head_dim),
                "past_key": cache,
                "past_value": cache,
                "logits": ("B", "L", config.vocab_size),
            },
        ),
        limits={"context_length": config.context_length},
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


def _try_targets(bundle: EngineBundle, progress: Progress, notes: list[str]) -> None:
    """Run a few tokens through every target before the bundle takes its place."""
    memory = _memory_bytes()
    for target in bundle.targets:
        if memory is not None and _MEMORY_FACTOR * bundle.nbytes > memory:
            notes.append(f"{target} was not tried: this machine has too little memory to load it")
            progress.note(notes[-1])
            continue
        progress.start(f"trying {target}")
        try:
            with closing(open_bundle_runner(bundle, target)) as runner:
                state = runner.new_state(1)
                tokens = [[0, 1, bundle.manifest.model.vocab_size - 1]]
                logits = runner.prefill(tokens, None, state)
                finite = bool((abs(logits) < float("inf")).all())
        except BackendUnavailableError as error:
            notes.append(f"{target} was not tried: {error.message}")
            progress.note(notes[-1])
            continue
        finally:
            progress.finish()
        if not finite:
            raise RingExportError(f"the new {target} graph computes NaN or infinity")


def _memory_bytes() -> int | None:
    """Return the physical memory, None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
