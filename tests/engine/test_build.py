"""Real engines of TensorRT-RTX without a GPU, and the errors of its builder."""

import _thread
import json
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from ringexport.checkpoint.weights import CheckpointWeights
from ringexport.engine.build import (
    ENGINE_FILE,
    INSPECTOR_FILE,
    LAYERS_FILE,
    EngineRequest,
    _inspect,
    _set_options,
    build_engine,
    parse_network,
)
from ringexport.engine.callbacks import make_log
from ringexport.engine.flavor import FLAVORS, TensorRt, open_tensorrt
from ringexport.engine.layers import LayerRow, layer_counts
from ringexport.engine.plugins import PluginLibrary, find_library
from ringexport.engine.profile import BuildOptions, load_profile
from ringexport.engine.table import read_table
from ringexport.engine.target import EngineTarget
from ringexport.errors import BackendUnavailableError, ConfigError, EngineBuildError
from ringexport.graph.lower_tensorrt import export_tensorrt_graph
from ringexport.pipeline.build import build, estimate
from ringexport.pipeline.request import BuildRequest
from tests.engine.progress import Recorder

pytestmark = pytest.mark.trt

ROOT = Path(__file__).parents[2]
NANO = ROOT / "models" / "ring-nano"


@pytest.fixture(scope="module")
def rtx() -> TensorRt:
    try:
        return open_tensorrt(FLAVORS["tensorrt-rtx"])
    except BackendUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def library(host_plugins: Path) -> PluginLibrary:
    return find_library(host_plugins)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano-graph")
    with CheckpointWeights.open(NANO) as weights:
        export_tensorrt_graph(weights, folder)
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def layers(rtx: TensorRt, library: PluginLibrary, graph: Path) -> tuple[LayerRow, ...]:
    return parse_network(rtx, graph, library).layers


def request(
    graph: Path, library: PluginLibrary, target: str = "tensorrt-rtx:sm_89"
) -> EngineRequest:
    parsed = EngineTarget.parse(target)
    assert parsed is not None
    return EngineRequest(
        graph=graph, library=library, target=parsed, profile=load_profile(), context_length=8192
    )


def test_every_contract_op_is_a_plugin_layer(layers: tuple[LayerRow, ...]) -> None:
    plugins = {layer.name: layer.plugin for layer in layers if layer.plugin}
    expected = {f"layers.{i}.linear_attention": "RingLinearAttention" for i in (0, 1, 3, 4)}
    expected |= {f"layers.{i}.attention": "RingAttention" for i in (2, 5)}
    for i in range(1, 6):
        expected |= {f"layers.{i}.mlp.router": "RingRouter"}
        expected |= {f"layers.{i}.mlp.experts": "RingExperts"}
    assert plugins == expected


def test_types_of_the_plugin_layers(layers: tuple[LayerRow, ...]) -> None:
    rows = {layer.name: layer for layer in layers}
    linear = rows["layers.0.linear_attention"]
    assert [tensor.dtype for tensor in linear.inputs] == ["BF16"] * 3 + ["FLOAT", "FLOAT", "INT32"]
    assert [tensor.dtype for tensor in linear.outputs] == ["BF16", "FLOAT"]
    assert linear.outputs[1].name == "present_state.0"
    assert linear.outputs[1].shape == (-1, 4, 64, 64)
    cached = rows["layers.2.attention"]
    assert [tensor.name for tensor in cached.outputs[1:]] == ["present_key.2", "present_value.2"]
    assert {tensor.dtype for tensor in cached.outputs} == {"BF16"}
    router = rows["layers.1.mlp.router"]
    assert [tensor.dtype for tensor in router.inputs] == ["BF16", "FLOAT", "FLOAT"]
    assert router.inputs[1].shape == (32, 256)
    assert [tensor.dtype for tensor in router.outputs] == ["INT32", "FLOAT"]
    experts = rows["layers.1.mlp.experts"]
    assert [tensor.shape for tensor in experts.inputs[3:]] == [(32, 64, 256), (32, 256, 32)]


def test_products_are_bf16_and_norms_have_fp32_statistics(layers: tuple[LayerRow, ...]) -> None:
    products = [layer for layer in layers if layer.kind == "MATRIX_MULTIPLY"]
    assert {tensor.dtype for layer in products for tensor in layer.inputs} == {"BF16"}
    sums = [layer for layer in layers if layer.kind == "REDUCE"]
    assert {tensor.dtype for layer in sums for tensor in layer.inputs} == {"FLOAT"}


def test_one_engine_for_three_architectures(
    rtx: TensorRt, library: PluginLibrary, graph: Path, tmp_path: Path
) -> None:
    progress = Recorder()
    wanted = request(graph, library, "tensorrt-rtx:sm_80+sm_89+sm_120")
    result = build_engine(rtx, wanted, tmp_path, progress=progress)
    assert result.nbytes == (tmp_path / ENGINE_FILE).stat().st_size > 10_000_000
    assert progress.stages[-1].startswith("building the tensorrt-rtx:sm_80+sm_89+sm_120 engine")
    assert progress.advanced > 0
    table = read_table(tmp_path / LAYERS_FILE)
    assert table.target == wanted.target.name
    assert table.engine_bytes == result.nbytes
    assert table.options == {}
    assert table.counts["RingExperts"] == 5
    assert len(json.loads((tmp_path / LAYERS_FILE).read_text())["layers"]) == len(result.layers)
    assert not result.inspected


@pytest.mark.parametrize(
    ("recipe", "target", "counts"),
    [
        ("int8", "tensorrt-rtx:sm_80", {"RingQuantizedProjection": 33, "RingQuantizedExperts": 5}),
        ("fp8-static", "tensorrt-rtx:sm_120", {"QUANTIZE": 38, "RingQuantizedExperts": 5}),
        ("fp8-static", "tensorrt-rtx:sm_80", {"RingQuantizedProjection": 33, "QUANTIZE": 0}),
        ("fp8", "tensorrt-rtx:sm_80+sm_89", {"RingQuantizedProjection": 33, "DEQUANTIZE": 0}),
    ],
)
def test_bundles_of_quantized_recipes(
    host_plugins: Path, tmp_path: Path, recipe: str, target: str, counts: dict[str, int]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "a", "text": "def read(path):\\n    return path.read_text()"}\n')
    result = build(
        BuildRequest(
            checkpoint=NANO,
            output=tmp_path / "bundle",
            recipe=recipe,
            targets=(target,),
            calibration=None if recipe == "fp8" else str(prompts),
            plugin_library=host_plugins,
        )
    )
    found = result.manifest.targets[target]
    assert set(found.files) == {"engine", "layers", "plugins"}
    assert found.limits["decode_rows"] == 64
    assert result.manifest.build.compute_dtype == "bf16"
    assert {"tensorrt_rtx", "ringplugins", "ringplugins_abi"} <= result.manifest.versions.keys()
    assert any("compiled without kernels" in note for note in result.notes)
    table = json.loads((result.path / found.files["layers"]).read_text())
    assert {name: table["counts"].get(name, 0) for name in counts} == counts
    code = "FP8" if target == "tensorrt-rtx:sm_120" else "INT8"
    expected = {
        "RingQuantizedExperts": ["BF16", "INT32", "FLOAT", code, "FLOAT", code, "FLOAT"],
        "RingQuantizedProjection": ["BF16", code, "FLOAT"],
    }
    rows = [row for row in table["layers"] if row["plugin"] in expected]
    for row in rows:
        assert [tensor["dtype"] for tensor in row["inputs"]] == expected[row["plugin"]], row["name"]
    assert sum(row["plugin"] == "RingQuantizedExperts" for row in rows) == 5
    tensors = [one for row in table["layers"] for one in (*row["inputs"], *row["outputs"])]
    assert any(tensor["dtype"] == "FP8" for tensor in tensors) == (code == "FP8")
    assert not list(result.path.rglob("*.onnx"))


@pytest.mark.parametrize("recipe", ["fp8", "int8-weight-only"])
def test_graphs_of_other_recipes_are_read(
    rtx: TensorRt, library: PluginLibrary, tmp_path: Path, recipe: str
) -> None:
    from ringexport.quantize.run import quantize_checkpoint
    from ringexport.quantize.shipped import load_recipe

    quantize_checkpoint(NANO, tmp_path / "checkpoint", load_recipe(recipe))
    folder = tmp_path / "graph"
    folder.mkdir()
    with CheckpointWeights.open(tmp_path / "checkpoint") as weights:
        export_tensorrt_graph(weights, folder)
    counts = layer_counts(parse_network(rtx, folder / "model.onnx", library).layers)
    assert counts["RingQuantizedExperts"] == 5
    wanted = {"fp8": ("RingQuantizedProjection", 33), "int8-weight-only": ("DEQUANTIZE", 47)}
    assert counts[wanted[recipe][0]] == wanted[recipe][1]


def changed_graph(graph: Path, folder: Path) -> Iterator[onnx.ModelProto]:
    model = onnx.load(graph, load_external_data=False)
    (folder / "weights.bin").symlink_to(graph.parent / "weights.bin")
    yield model
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def test_a_wrong_shape_names_the_node(
    rtx: TensorRt, library: PluginLibrary, graph: Path, tmp_path: Path
) -> None:
    for model in changed_graph(graph, tmp_path):
        node = next(node for node in model.graph.node if node.name == "layers.3.linear_attention")
        next(entry for entry in node.attribute if entry.name == "num_heads").i = 3
    with pytest.raises(EngineBuildError) as caught:
        parse_network(rtx, tmp_path / "model.onnx", library)
    message = caught.value.message
    assert "node 'layers.3.linear_attention' (RingLinearAttention)" in message
    assert "past_state has shape" in message or "query has shape" in message
    assert "H=3" in message


def test_a_missing_plugin_is_named(
    rtx: TensorRt, library: PluginLibrary, graph: Path, tmp_path: Path
) -> None:
    for model in changed_graph(graph, tmp_path):
        node = next(node for node in model.graph.node if node.name == "layers.1.mlp.experts")
        node.op_type = "RingOtherExperts"
    with pytest.raises(
        EngineBuildError, match=r"'layers.1.mlp.experts' \(RingOtherExperts\)"
    ) as it:
        parse_network(rtx, tmp_path / "model.onnx", library)
    assert "there is no plugin RingOtherExperts" in it.value.message


def test_missing_weights_are_named(
    rtx: TensorRt, library: PluginLibrary, graph: Path, tmp_path: Path
) -> None:
    """They belong to no node."""
    name = "layers.1.mlp.experts.gate_up_proj"
    for model in changed_graph(graph, tmp_path):
        weight = next(one for one in model.graph.initializer if one.name == name)
        next(one for one in weight.external_data if one.key == "location").value = "gone.bin"
    with pytest.raises(EngineBuildError, match=r"^tensorrt-rtx refuses the graph: ") as caught:
        parse_network(rtx, tmp_path / "model.onnx", library)
    assert name in caught.value.message


def test_a_missing_attribute_is_named(
    rtx: TensorRt, library: PluginLibrary, graph: Path, tmp_path: Path
) -> None:
    for model in changed_graph(graph, tmp_path):
        node = next(node for node in model.graph.node if node.name == "layers.1.mlp.router")
        del node.attribute[0]
    with pytest.raises(EngineBuildError, match=r"layers.1.mlp.router.*attribute \w+ is missing"):
        parse_network(rtx, tmp_path / "model.onnx", library)


def tiny_graph(path: Path) -> Path:
    """A graph without plugins, for options: they cost a fraction of a second here."""
    weight = onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 64])],
        initializer=[weight],
    )
    imports = [helper.make_opsetid("", 23)]
    path.write_bytes(
        helper.make_model(made, opset_imports=imports, ir_version=10).SerializeToString()
    )
    return path


class Stopped(BaseException):
    """What the handler of a signal raises."""


class Stopping(Recorder):
    """Sends the process a signal when the builder starts to work."""

    def start(self, stage: str, total: int | None = None, unit: str = "") -> None:
        super().start(stage, total, unit)
        if total:
            _thread.interrupt_main(signal.SIGTERM)
            time.sleep(1)  # for the thread that gets it


def test_a_signal_ends_a_build(rtx: TensorRt, library: PluginLibrary, tmp_path: Path) -> None:
    """TensorRT swallows what the handler raises inside its callbacks."""

    def stop(number: int, frame: object) -> None:
        del number, frame
        raise Stopped

    progress = Stopping()
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(Stopped):
            build_engine(
                rtx,
                request(tiny_graph(tmp_path / "tiny.onnx"), library),
                tmp_path,
                progress=progress,
            )
    finally:
        signal.signal(signal.SIGTERM, before)
    assert progress.stages[-1] == "building the tensorrt-rtx:sm_89 engine"
    assert not (tmp_path / LAYERS_FILE).exists()


def with_options(wanted: EngineRequest, **options: object) -> EngineRequest:
    profile = replace(wanted.profile, options=BuildOptions(**options))  # type: ignore[arg-type]
    return replace(wanted, profile=profile)


def test_options_reach_the_builder(rtx: TensorRt, library: PluginLibrary, tmp_path: Path) -> None:
    wanted = request(tiny_graph(tmp_path / "tiny.onnx"), library)
    plain = build_engine(rtx, wanted, tmp_path).nbytes
    options = {"workspace_mib": 64, "optimization_level": 3, "weight_streaming": True}
    assert build_engine(rtx, with_options(wanted, **options), tmp_path).nbytes != plain
    assert read_table(tmp_path / LAYERS_FILE).options == options


@pytest.mark.parametrize(
    "option", ["version_compatible", "refit", "weight_streaming", "strip_plan"]
)
def test_an_option_sets_its_flag_alone(rtx: TensorRt, option: str) -> None:
    trt = rtx.module
    config = trt.Builder(make_log(rtx)).create_builder_config()
    before = config.flags
    chosen: dict[str, Any] = {option: True}
    _set_options(rtx, config, BuildOptions(**chosen))
    assert config.flags == before | 1 << int(trt.BuilderFlag.__members__[option.upper()])


def test_level_and_workspace_reach_the_builder(rtx: TensorRt) -> None:
    trt = rtx.module
    config = trt.Builder(make_log(rtx)).create_builder_config()
    _set_options(rtx, config, BuildOptions(optimization_level=1, workspace_mib=7))
    assert config.builder_optimization_level == 1
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 7 << 20


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX")
def test_timings_are_kept_for_the_next_build(
    rtx: TensorRt, library: PluginLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX has the functions of full TensorRT for that; its cache holds nothing."""
    full = replace(rtx, flavor=replace(rtx.flavor, lacks=frozenset()))
    given: list[bytes] = []
    create = rtx.module.IBuilderConfig.create_timing_cache

    def spy(config: object, data: bytes) -> object:
        given.append(data)
        return create(config, data)

    monkeypatch.setattr(rtx.module.IBuilderConfig, "create_timing_cache", spy)
    cache = tmp_path / "new" / "timing.cache"
    wanted = with_options(request(tiny_graph(tmp_path / "tiny.onnx"), library), timing_cache=cache)
    for _ in range(2):
        build_engine(full, wanted, tmp_path)
    kept = cache.read_bytes()
    assert given == [b"", kept]
    cache.write_bytes(b"damaged")
    build_engine(full, wanted, tmp_path)
    assert cache.read_bytes() == kept


@pytest.mark.parametrize("version_compatible", [False, True])
def test_what_the_inspector_says_is_kept(
    rtx: TensorRt,
    library: PluginLibrary,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version_compatible: bool,
) -> None:
    """An engine opens where its GPU is, which is pretended here."""

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, log: object) -> None:
            del log

        def deserialize_cuda_engine(self, data: bytes) -> SimpleNamespace | None:
            assert data == (tmp_path / ENGINE_FILE).read_bytes()
            if self.engine_host_code_allowed != version_compatible:
                return None
            inspector = SimpleNamespace(get_engine_information=lambda kind: f"{kind.name} text")
            return SimpleNamespace(create_engine_inspector=lambda: inspector)

    monkeypatch.setattr(rtx.module, "Runtime", Runtime)
    monkeypatch.setattr("ringexport.engine.build.device_architecture", lambda: 89)
    wanted = request(tiny_graph(tmp_path / "tiny.onnx"), library)
    (tmp_path / ENGINE_FILE).write_bytes(b"engine")
    wanted = with_options(wanted, version_compatible=version_compatible)
    assert _inspect(rtx, wanted, tmp_path, tmp_path / ENGINE_FILE)
    assert (tmp_path / INSPECTOR_FILE).read_text() == "JSON text"


def test_options_that_the_flavour_lacks_are_refused(
    rtx: TensorRt, library: PluginLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = request(tiny_graph(tmp_path / "tiny.onnx"), library)
    with pytest.raises(ConfigError, match=r"tensorrt-rtx \S+ has no option timing_cache"):
        build_engine(rtx, with_options(wanted, timing_cache=tmp_path / "cache"), tmp_path)
    with pytest.raises(ConfigError, match="has no option version_compatible"):
        build_engine(rtx, with_options(wanted, version_compatible=True), tmp_path)
    monkeypatch.delattr(rtx.module.BuilderFlag, "WEIGHT_STREAMING")
    with pytest.raises(ConfigError, match="has no option weight_streaming"):
        build_engine(rtx, with_options(wanted, weight_streaming=True), tmp_path)


def test_a_failed_build_tells_the_cause_alone(
    rtx: TensorRt, library: PluginLibrary, tmp_path: Path
) -> None:
    wanted = request(tiny_graph(tmp_path / "tiny.onnx"), library)
    with pytest.raises(EngineBuildError, match="workspace") as caught:
        build_engine(rtx, with_options(wanted, workspace_mib=1), tmp_path)
    assert "CUDA driver" not in caught.value.message
    assert caught.value.hint == "run again with -v for everything that TensorRT says"


def test_options_that_need_a_gpu_are_refused_without_one(
    rtx: TensorRt, library: PluginLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringexport.engine.build.device_architecture", lambda: None)
    wanted = request(tiny_graph(tmp_path / "tiny.onnx"), library)
    with pytest.raises(BackendUnavailableError, match="option refit only where a GPU is"):
        build_engine(rtx, with_options(wanted, refit=True), tmp_path)


def test_options_are_refused_before_anything_is_written(host_plugins: Path, tmp_path: Path) -> None:
    profile = tmp_path / "cache.toml"
    profile.write_text('[options]\ntiming_cache = "a.cache"\n')
    wanted = BuildRequest(
        checkpoint=NANO,
        output=tmp_path / "bundle",
        targets=("tensorrt-rtx:sm_89",),
        profile=str(profile),
        plugin_library=host_plugins,
    )
    with pytest.raises(ConfigError, match="has no option timing_cache"):
        estimate(wanted)


def test_an_architecture_that_the_version_lacks_is_refused(
    rtx: TensorRt, library: PluginLibrary, tmp_path: Path
) -> None:
    wanted = request(tiny_graph(tmp_path / "tiny.onnx"), library)
    wanted = replace(wanted, target=EngineTarget("tensorrt-rtx", (100,)))
    with pytest.raises(ConfigError, match="builds no engines for sm_100") as caught:
        build_engine(rtx, wanted, tmp_path)
    assert "SM89" in str(caught.value.hint)


def test_a_file_that_is_no_graph_is_refused(
    rtx: TensorRt, library: PluginLibrary, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(EngineBuildError, match="tensorrt-rtx"):
        parse_network(rtx, path, library)
