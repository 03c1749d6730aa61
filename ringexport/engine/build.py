"""ONNX file + plugin library + target + profile -> serialized engine and its layer table."""

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringexport.engine.callbacks import make_log, make_monitor, make_writer
from ringexport.engine.device import device_architecture
from ringexport.engine.flavor import TensorRt
from ringexport.engine.layers import LayerRow, describe_layers, layer_counts
from ringexport.engine.plugin_log import collected_messages
from ringexport.engine.plugins import PluginLibrary
from ringexport.engine.profile import BuildOptions, EngineProfile
from ringexport.engine.table import EngineTable
from ringexport.engine.target import EngineTarget
from ringexport.errors import BackendUnavailableError, ConfigError, EngineBuildError
from ringexport.progress import NoProgress, Progress

__all__ = [
    "ENGINE_FILE",
    "INSPECTOR_FILE",
    "LAYERS_FILE",
    "EngineRequest",
    "EngineResult",
    "ParsedNetwork",
    "build_engine",
    "check_request",
    "parse_network",
]

ENGINE_FILE = "engine.plan"
LAYERS_FILE = "layers.json"
INSPECTOR_FILE = "engine.json"

_FLAGS = {
    "version_compatible": "VERSION_COMPATIBLE",
    "refit": "REFIT",
    "weight_streaming": "WEIGHT_STREAMING",
    "strip_plan": "STRIP_PLAN",
}
_MIB = 1 << 20
_LOG_LINES = 3
_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """What to build.

    Attributes:
        graph: ONNX file; external data lies beside it.
        library: the plugins that the graph needs.
        target: flavour and architectures.
        profile: shape ranges and options.
        context_length: tokens that the model can hold; bounds the profile.
    """

    graph: Path
    library: PluginLibrary
    target: EngineTarget
    profile: EngineProfile
    context_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineResult:
    """What was written.

    Attributes:
        nbytes: of the engine.
        layers: of the parsed network.
        inspected: whether the engine could be opened here, so that INSPECTOR_FILE exists.
    """

    nbytes: int
    layers: tuple[LayerRow, ...]
    inspected: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedNetwork:
    """A graph that TensorRT has read.

    Attributes:
        network: TensorRT's own object.
        layers: its layers.
        builder, parser, log: what it came from; they must outlive the network.
    """

    network: Any
    layers: tuple[LayerRow, ...]
    builder: Any
    parser: Any
    log: Any


def parse_network(tensorrt: TensorRt, graph: Path, library: PluginLibrary) -> ParsedNetwork:
    """Read a graph into a strongly typed network.

    Raises:
        EngineBuildError: names the node that TensorRT or a plugin refuses, and why.
        BackendUnavailableError: the plugin library cannot be loaded.
    """
    trt = tensorrt.module
    library.load(tensorrt)
    log = make_log(tensorrt)
    builder = trt.Builder(log)
    flag = trt.NetworkDefinitionCreationFlag
    # Strongly typed: dtypes are those of the graph. Full TensorRT 11 knows no other kind.
    typed = getattr(flag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log)
    with collected_messages() as said:
        parsed = parser.parse_from_file(str(graph))
    if not parsed:
        raise _parse_error(tensorrt, parser, log, said)
    layers = describe_layers(tensorrt, network)
    return ParsedNetwork(network=network, layers=layers, builder=builder, parser=parser, log=log)


def build_engine(
    tensorrt: TensorRt,
    request: EngineRequest,
    directory: Path,
    *,
    progress: Progress | None = None,
) -> EngineResult:
    """Write ENGINE_FILE and LAYERS_FILE, and INSPECTOR_FILE where the engine can be opened.

    Args:
        tensorrt: the loaded flavour of the target.
        request: what to build.
        directory: existing; files of these names are replaced.
        progress: told about the steps of the builder.

    Raises:
        EngineBuildError: TensorRT refuses the graph or fails; the message names the layer.
        ConfigError: an option or architecture that this version of TensorRT lacks.
        BackendUnavailableError: the flavour cannot build for the target on this machine.
        OSError: a file cannot be written.
    """
    report = progress or NoProgress()
    check_request(tensorrt, request.target, request.profile.options)
    cancelled = threading.Event()
    # TensorRT swallows what a signal raises inside its callbacks, so the thread that gets signals
    # only waits: Ctrl-C ends the wait, and the build at its next step.
    with ThreadPoolExecutor(1, "engine") as pool:
        future = pool.submit(_build, tensorrt, request, directory, report, cancelled)
        try:
            while not future.done():
                wait([future], _POLL_SECONDS)  # a signal need not end a wait without a limit
            return future.result()
        except BaseException:
            cancelled.set()
            raise


def _build(
    tensorrt: TensorRt,
    request: EngineRequest,
    directory: Path,
    report: Progress,
    cancelled: threading.Event,
) -> EngineResult:
    report.start(f"reading the graph with {tensorrt.flavor.name}")
    parsed = parse_network(tensorrt, request.graph, request.library)
    config = parsed.builder.create_builder_config()
    _set_architectures(tensorrt, config, request.target)
    _set_options(tensorrt, config, request.profile.options)
    _add_profiles(parsed, config, request)
    stage = f"building the {request.target.name} engine"
    config.progress_monitor = make_monitor(tensorrt, stage, report, cancelled)
    path = directory / ENGINE_FILE
    with _timing_cache(config, request.profile.options.timing_cache), collected_messages() as said:
        built = _serialize(tensorrt, parsed, config, path)
    parsed.log.errors[:0] = said
    if not built:
        raise _build_error(tensorrt, parsed)
    report.finish()
    inspected = _inspect(tensorrt, request, directory, path)
    result = EngineResult(nbytes=path.stat().st_size, layers=parsed.layers, inspected=inspected)
    _write_layers(tensorrt, request, result, directory / LAYERS_FILE)
    return result


def check_request(tensorrt: TensorRt, target: EngineTarget, options: BuildOptions) -> None:
    """Refuse what this flavour cannot build on this machine, before a graph is written for it.

    Raises:
        ConfigError: an option or architecture that this version of TensorRT lacks.
        BackendUnavailableError: it builds only where a GPU, or the GPU of the target, is.
    """
    _check_device(tensorrt, target)
    _capabilities(tensorrt, target)
    _check_options(tensorrt, options)


def _check_device(tensorrt: TensorRt, target: EngineTarget) -> None:
    if tensorrt.flavor.cross_builds:
        return
    found = device_architecture()
    if (found,) != target.architectures:
        here = "no GPU" if found is None else f"sm_{found}"
        raise BackendUnavailableError(
            f"{tensorrt.flavor.name} builds for the GPU of the machine, which has {here};"
            f" the target is {target.name}",
            hint="build on a machine with that GPU, or use tensorrt-rtx",
        )


def _capabilities(tensorrt: TensorRt, target: EngineTarget) -> list[Any]:
    """Return TensorRT's names for the architectures; none where it builds for its own GPU."""
    if not tensorrt.flavor.cross_builds:
        return []
    names = tensorrt.module.ComputeCapability.__members__
    for number in target.architectures:
        if f"SM{number}" not in names:
            raise ConfigError(
                f"{tensorrt.flavor.name} {tensorrt.version} builds no engines for sm_{number}",
                hint=f"choices: {', '.join(name for name in names if name[2:].isdigit())}",
            )
    return [names[f"SM{number}"] for number in target.architectures]


def _check_options(tensorrt: TensorRt, options: BuildOptions) -> None:
    flavor = tensorrt.flavor
    lacks = flavor.lacks | {
        name for name, flag in _FLAGS.items() if not hasattr(tensorrt.module.BuilderFlag, flag)
    }
    for name in sorted(lacks):
        if getattr(options, name):
            raise ConfigError(
                f"{flavor.name} {tensorrt.version} has no option {name}",
                hint="leave it out of the profile's options",
            )
    for name in sorted(flavor.on_gpu):
        if getattr(options, name) and device_architecture() is None:
            raise BackendUnavailableError(
                f"{flavor.name} builds with the option {name} only where a GPU is",
                hint="leave the option out, or build on a machine with an NVIDIA GPU",
            )


def _set_architectures(tensorrt: TensorRt, config: Any, target: EngineTarget) -> None:
    capabilities = _capabilities(tensorrt, target)
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        config.set_compute_capability(capability, index)


def _set_options(tensorrt: TensorRt, config: Any, options: BuildOptions) -> None:
    trt = tensorrt.module
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layer names in the inspector
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * _MIB)
    for name, flag in _FLAGS.items():
        if getattr(options, name):
            config.set_flag(getattr(trt.BuilderFlag, flag))


def _add_profiles(parsed: ParsedNetwork, config: Any, request: EngineRequest) -> None:
    """Give every input its range of shapes; the names of the dimensions come from the graph."""
    network = parsed.network
    for shapes in request.profile.shapes:
        profile = parsed.builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            dims = tuple(
                extent if extent >= 0 else tensor.get_dimension_name(axis) or "?"
                for axis, extent in enumerate(tensor.shape)
            )
            profile.set_shape(tensor.name, *shapes.shapes(dims, request.context_length))
        if config.add_optimization_profile(profile) < 0:
            raise EngineBuildError(
                f"TensorRT refuses the shape ranges of the profile {shapes.name}"
                f"{_reasons(parsed.log)}"
            )


def _serialize(tensorrt: TensorRt, parsed: ParsedNetwork, config: Any, path: Path) -> bool:
    """Build, and write the engine while it is serialized: it may be larger than free memory."""
    with path.open("wb") as file:
        writer = make_writer(tensorrt, file)
        if writer is None:
            engine = parsed.builder.build_serialized_network(parsed.network, config)
            if engine is not None:
                file.write(memoryview(engine))
            return engine is not None
        built = parsed.builder.build_serialized_network_to_stream(parsed.network, config, writer)
        if writer.error is not None:
            raise writer.error
        return bool(built)


@contextlib.contextmanager
def _timing_cache(config: Any, path: Path | None) -> Iterator[None]:
    """Start from the timings in a file and write them back; a damaged file is replaced."""
    if path is None:
        yield
        return
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=True)
    yield
    found = config.get_timing_cache()
    if found is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(memoryview(found.serialize()))


def _inspect(tensorrt: TensorRt, request: EngineRequest, directory: Path, path: Path) -> bool:
    """Write what the engine inspector says; only a GPU of the target can open the engine."""
    if device_architecture() not in request.target.architectures:
        return False
    trt = tensorrt.module
    runtime = trt.Runtime(make_log(tensorrt))
    if request.profile.options.version_compatible:
        runtime.engine_host_code_allowed = True  # such an engine brings a runtime along
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        return False
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    (directory / INSPECTOR_FILE).write_text(text, encoding="utf-8")
    return True


def _write_layers(
    tensorrt: TensorRt, request: EngineRequest, result: EngineResult, path: Path
) -> None:
    table = EngineTable(
        target=request.target.name,
        versions={tensorrt.flavor.name: tensorrt.version} | request.library.versions(),
        profile=request.profile.name,
        engine_bytes=result.nbytes,
        counts=layer_counts(result.layers),
        options=request.profile.options.to_dict(),
    )
    table.write(path, result.layers)


def _parse_error(tensorrt: TensorRt, parser: Any, log: Any, said: list[str]) -> EngineBuildError:
    """Say which node is refused, in a plugin's own words if it was one."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    if not errors:
        return EngineBuildError(f"{tensorrt.flavor.name} cannot read the graph{_reasons(log)}")
    first = errors[0]
    node = f"node {first.node_name()!r} ({first.node_operator()}) of " if first.node_name() else ""
    reason = first.desc().strip()
    if said:
        reason = said[0]
    elif "Plugin not found" in reason:
        reason = f"there is no plugin {first.node_operator()}"
    return EngineBuildError(
        f"{tensorrt.flavor.name} refuses {node}the graph: {_one_line(reason)}",
        hint="the plugin library and this version of ringexport may not fit each other",
    )


def _build_error(tensorrt: TensorRt, parsed: ParsedNetwork) -> EngineBuildError:
    text = " ".join(parsed.log.errors)
    named = [layer.name for layer in parsed.layers if len(layer.name) > 3 and layer.name in text]
    where = f" at layer {max(named, key=len)!r}" if named else ""
    return EngineBuildError(
        f"{tensorrt.flavor.name} failed to build the engine{where}{_reasons(parsed.log)}",
        hint="run again with -v for everything that TensorRT says",
    )


def _reasons(log: Any) -> str:
    # Without a driver TensorRT adds a line about that to whatever failed.
    told = [line for line in log.errors if "CUDA driver version" not in line] or log.errors
    lines = [_one_line(line) for line in told[:_LOG_LINES]]
    return f": {'; '.join(lines)}" if lines else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())[:400]
