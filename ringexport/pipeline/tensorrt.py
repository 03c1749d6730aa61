"""TensorRT targets of a build: what they need is checked first, then graph, engine and plugins."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from ringexport.bundle import BundleWriter, ResolvedBuild, TargetInfo
from ringexport.checkpoint import CheckpointWeights, RingConfig
from ringexport.engine.build import (
    ENGINE_FILE,
    INSPECTOR_FILE,
    LAYERS_FILE,
    EngineRequest,
    build_engine,
    check_request,
)
from ringexport.engine.flavor import FLAVORS, TensorRt, open_tensorrt
from ringexport.engine.plugins import NO_KERNELS, PLUGIN_LIBRARY_FILE, PluginLibrary, find_library
from ringexport.engine.profile import SHIPPED, EngineProfile, load_profile
from ringexport.engine.target import EngineTarget
from ringexport.errors import ConfigError, OutputError
from ringexport.ops.decay import DecayIndex
from ringexport.pipeline.request import BuildRequest, target_directory
from ringexport.pipeline.target_io import target_io
from ringexport.pipeline.target_schemes import check_model
from ringexport.progress import Progress

__all__ = ["TensorRtTarget", "prepare_tensorrt"]

_GRAPH_FOLDER = ".graph"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRtTarget:
    """One TensorRT target, ready to be built.

    Attributes:
        target: flavour and architectures.
        tensorrt: the loaded flavour.
        library: the plugins.
        profile: shape ranges and options of the engine.
    """

    target: EngineTarget
    tensorrt: TensorRt
    library: PluginLibrary
    profile: EngineProfile

    def export(
        self,
        weights: CheckpointWeights,
        decay_index: str,
        writer: BundleWriter,
        progress: Progress,
    ) -> TargetInfo:
        """Write engine, layer table and plugin library, and describe them.

        Raises:
            EngineBuildError, GraphError: the graph or the engine cannot be built.
        """
        # Imported here: looking at a bundle must not need onnx.
        from ringexport.graph.export import GRAPH_FILE  # noqa: PLC0415
        from ringexport.graph.lower_tensorrt import export_tensorrt_graph  # noqa: PLC0415

        directory = target_directory(self.target.name)
        folder = writer.path(f"{directory}/{ENGINE_FILE}").parent
        graph = folder / _GRAPH_FOLDER
        graph.mkdir()
        export_tensorrt_graph(
            weights,
            graph,
            decay_index=DecayIndex(decay_index),
            has_fp8=self.target.has_fp8,
            progress=progress,
        )
        context = weights.config.context_length
        request = EngineRequest(
            graph=graph / GRAPH_FILE,
            library=self.library,
            target=self.target,
            profile=self.profile,
            context_length=context,
        )
        result = build_engine(self.tensorrt, request, folder, progress=progress)
        shutil.rmtree(graph)
        self._copy_library(folder / PLUGIN_LIBRARY_FILE)
        files = {"engine": ENGINE_FILE, "layers": LAYERS_FILE, "plugins": PLUGIN_LIBRARY_FILE}
        if result.inspected:
            files["inspector"] = INSPECTOR_FILE
        return TargetInfo(
            directory=directory,
            files={role: f"{directory}/{name}" for role, name in files.items()},
            io=target_io(weights.config),
            limits={"context_length": context} | self.profile.limits(context),
        )

    def versions(self) -> dict[str, str]:
        """Return what the manifest says about libraries that shaped the engine."""
        name = self.tensorrt.flavor.name.replace("-", "_")
        return {name: self.tensorrt.version} | self.library.versions()

    def notes(self) -> list[str]:
        """Return what the user should know."""
        name, found = self.target.name, []
        missing = self.library.lacks(self.target.architectures)
        if self.library.kernels == NO_KERNELS:
            found.append(f"{name} cannot run: its plugin library was compiled without kernels")
        elif missing:
            where = ", ".join(f"sm_{number}" for number in missing)
            found.append(
                f"{name} cannot run on {where}: its plugin library has kernels for"
                f" {self.library.kernels} only; `make plugins ARCHITECTURES=...` builds others"
            )
        if self.profile.options.strip_plan:
            found.append(f"{name} has no weights (option strip_plan): refit it before it runs")
        return found

    def _copy_library(self, path: Path) -> None:
        try:
            shutil.copyfile(self.library.path, path)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error


def prepare_tensorrt(
    request: BuildRequest, resolved: ResolvedBuild, config: RingConfig
) -> dict[str, TensorRtTarget]:
    """Return the TensorRT targets of a build by name, after checking all that they need.

    Raises:
        ConfigError: an unknown profile, one that no target uses, an option that TensorRT lacks, or
            a model whose sizes the kernels do not take.
        BackendUnavailableError: TensorRT, its GPU or the plugin library is missing.
        VersionError: the plugin library is of another version.
    """
    parsed = [EngineTarget.parse(name) for name in resolved.targets]
    targets = [target for target in parsed if target is not None]
    if not targets and request.profile is not None:
        raise ConfigError(
            f"an engine profile is given, and no TensorRT engine is built for"
            f" {', '.join(resolved.targets)}",
            hint="leave out --profile, or choose a target such as tensorrt:sm_90",
        )
    if not targets:
        return {}
    profile = load_profile(SHIPPED if request.profile is None else request.profile)
    for target in targets:
        check_model(target.name, config)
    library = find_library(request.plugin_library)
    found = {}
    for target in targets:
        tensorrt = open_tensorrt(FLAVORS[target.flavor])
        check_request(tensorrt, target, profile.options)
        found[target.name] = TensorRtTarget(
            target=target, tensorrt=tensorrt, library=library, profile=profile
        )
    return found
