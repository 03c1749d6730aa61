"""What a target refuses of a recipe, and what is said about how it computes one."""

from collections.abc import Mapping
from pathlib import Path

import onnx
import pytest

from ringexport.checkpoint import CheckpointWeights, RingConfig
from ringexport.errors import ConfigError
from ringexport.graph.export import export_graph
from ringexport.ops.quantization import Granularity, GranularityKind, NumberFormat
from ringexport.ops.schemes import (
    ActivationMode,
    ActivationScheme,
    ModuleScheme,
    WeightScheme,
)
from ringexport.pipeline.target_schemes import check_runnable, computation_notes, max_weight_bytes
from ringexport.quantize.modules import quantizable_modules
from ringexport.quantize.resolve import resolve_recipe
from ringexport.quantize.run import quantize_checkpoint
from ringexport.quantize.shipped import load_recipe

NANO = Path(__file__).parents[2] / "models" / "ring-nano"
OLD, NEW = "tensorrt-rtx:sm_80", "tensorrt-rtx:sm_89"
EXPERTS = "inputs of 480 matrices of experts are quantized per token"
PER_TOKEN = "inputs of 25 modules are quantized per token, not with static scales"
PLAIN = "inputs of 5 modules are not quantized, no kernel fits them"
WHY = "TensorRT has no FP8 before sm_89"
WEIGHTS_ONLY = 'weights = { format = "fp8_e4m3", granularity = "channel" }'


@pytest.fixture(scope="module")
def config() -> RingConfig:
    with CheckpointWeights.open(NANO) as weights:
        return weights.config


def schemes_of(recipe: str, config: RingConfig) -> Mapping[str, ModuleScheme]:
    resolved = resolve_recipe(load_recipe(recipe), config)
    return {name: entry.scheme for name, entry in resolved.quantized.items()}


@pytest.mark.parametrize(
    ("recipe", "targets", "expected"),
    [
        ("fp8", (NEW,), [f"TensorRT: {PLAIN}"]),
        (
            "fp8",
            (OLD,),
            [f"TensorRT: {PLAIN}", f"TensorRT: FP8 weights of 5 modules are stored in bf16: {WHY}"],
        ),
        ("fp8-static", (NEW,), [f"TensorRT: {EXPERTS}"]),
        (
            "fp8-static",
            (OLD,),
            [
                f"TensorRT: {EXPERTS}",
                f"TensorRT: {PER_TOKEN}: {WHY}",
                f"TensorRT: {PLAIN}",
                f"TensorRT: FP8 weights of 5 modules are stored in bf16: {WHY}",
            ],
        ),
        (
            "fp8-static",
            (NEW, f"{OLD}+sm_89"),
            [
                f"TensorRT: {EXPERTS}",
                f"{OLD}+sm_89: {PER_TOKEN}: {WHY}",
                f"{OLD}+sm_89: {PLAIN}",
                f"{OLD}+sm_89: FP8 weights of 5 modules are stored in bf16: {WHY}",
            ],
        ),
        ("int8", (OLD,), [f"TensorRT: {PLAIN}"]),
        ("int8-weight-only", (OLD,), [f"TensorRT: {EXPERTS}"]),
    ],
)
def test_what_tensorrt_computes_is_said(
    config: RingConfig, recipe: str, targets: tuple[str, ...], expected: list[str]
) -> None:
    found = computation_notes(config, schemes_of(recipe, config), targets)
    assert list(found) == expected


def test_fp8_weights_alone_are_dequantized_on_older_gpus(config: RingConfig) -> None:
    weights = WeightScheme(
        format=NumberFormat.FP8_E4M3, granularity=Granularity(GranularityKind.CHANNEL)
    )
    scheme = ModuleScheme(weights=weights)
    schemes = {module.name: scheme for module in quantizable_modules(config)}
    assert computation_notes(config, schemes, [NEW]) == (f"TensorRT: {EXPERTS}",)
    count = len(schemes) - 480
    assert computation_notes(config, schemes, [OLD]) == (
        f"TensorRT: {EXPERTS}",
        f"TensorRT: FP8 weights of {count} modules are stored in bf16: {WHY}",
    )


@pytest.mark.parametrize("recipe", ["fp8", "fp8-static", "int8"])
def test_recipes_run_on_every_tensorrt_target(config: RingConfig, recipe: str) -> None:
    for target in (OLD, NEW, f"{OLD}+sm_89", "tensorrt:sm_86"):
        check_runnable(target, schemes_of(recipe, config), what="it", kv_cache=None)


def test_what_no_kernel_takes_is_refused(config: RingConfig) -> None:
    schemes = schemes_of("fp8-block", config)
    with pytest.raises(ConfigError, match="takes scales per channel") as caught:
        check_runnable(OLD, schemes, what="it", kv_cache=None)
    assert caught.value.hint == "use the recipe fp8, fp8-static or int8"
    with pytest.raises(ConfigError, match="8-bit KV cache"):
        check_runnable(OLD, {}, what="it", kv_cache=NumberFormat.FP8_E4M3)


def test_experts_of_several_formats_in_a_layer(config: RingConfig) -> None:
    """One kernel runs all experts of a layer, so these become bf16 and the others stay."""
    schemes = dict(schemes_of("int8-weight-only", config))
    quantized = [name for name in schemes if name.startswith("model.layers.2.mlp.experts.")]
    del schemes["model.layers.2.mlp.experts.5.up_proj"]
    notes = computation_notes(config, schemes, (NEW,))
    others = sum(".mlp.experts." in name for name in schemes) - (len(quantized) - 1)
    mixed = f"weights of {len(quantized) - 1} matrices of experts are stored in bf16"
    assert notes == (
        f"TensorRT: inputs of {others} matrices of experts are quantized per token",
        f"TensorRT: {mixed}: formats differ within a layer",
    )


def test_experts_that_the_recipe_quantizes_per_tensor(config: RingConfig) -> None:
    """The kernel of the experts quantizes per token, whatever the recipe says."""
    scheme = scheme_of("tensor", NumberFormat.INT8)
    schemes = dict.fromkeys(schemes_of("int8-weight-only", config), scheme)
    assert f"TensorRT: {EXPERTS}" in computation_notes(config, schemes, (OLD,))


def scheme_of(inputs: str | None, number_format: NumberFormat) -> ModuleScheme:
    """Return weights per channel with dynamic inputs, or with inputs as they are."""
    return ModuleScheme(
        weights=WeightScheme(
            format=number_format, granularity=Granularity(GranularityKind.CHANNEL)
        ),
        activations=None
        if inputs is None
        else ActivationScheme(
            format=number_format,
            granularity=Granularity.parse(inputs),
            mode=ActivationMode.DYNAMIC,
        ),
    )


@pytest.mark.parametrize(("recipe", "shared"), [("fp8", 0), ("fp8-static", 5 * 32 * 2)])
def test_static_scales_of_experts_on_the_cpu(config: RingConfig, recipe: str, shared: int) -> None:
    """The experts of a layer read one input in one graph: it can be rounded with one scale."""
    notes = computation_notes(config, schemes_of(recipe, config), ("onnxruntime:cpu",))
    said = f"{shared} modules: experts of a layer share an input, it is rounded with the static"
    assert any(note.startswith(said) for note in notes) == (shared > 0)
    assert any("static scale of the first" in note for note in notes) == (shared > 0)


LAYER = "model.layers.2.mlp.experts."
PLAIN_FP8 = scheme_of(None, NumberFormat.FP8_E4M3)
INT8 = scheme_of("token", NumberFormat.INT8)


@pytest.mark.parametrize(
    ("recipe", "changed", "scheme", "folded", "unrounded"),
    [
        ("fp8", "5.down_proj", ModuleScheme(), 95, 0),
        ("fp8", "5.up_proj", ModuleScheme(), 95, 63),
        ("fp8", "0.gate_proj", PLAIN_FP8, 0, 63),
        ("fp8", "5.down_proj", INT8, 96, 0),
        ("int8-weight-only", "31.gate_proj", ModuleScheme(), 95, 0),
    ],
)
def test_experts_of_several_formats_on_the_cpu(
    config: RingConfig,
    tmp_path: Path,
    recipe: str,
    changed: str,
    scheme: ModuleScheme,
    folded: int,
    unrounded: int,
) -> None:
    """What is said about a layer is what its graph holds, and what its size is estimated from."""
    schemes = {**schemes_of(recipe, config), f"{LAYER}{changed}": scheme}
    notes = computation_notes(config, schemes, ("onnxruntime:cpu",))
    assert (f"{folded} modules: quantized weights are stored dequantized, in fp32" in notes) == (
        folded > 0
    )
    found = f"{unrounded} modules: inputs are not rounded to FP8: schemes of experts differ"
    assert (f"{found} within a layer" in notes) == (unrounded > 0)
    bound = max_weight_bytes(config, schemes)
    unchanged = max_weight_bytes(config, schemes_of(recipe, config))
    assert (bound - unchanged > 2 * folded * 32 * 256) == (folded > 0)

    own = tmp_path / "own.toml"
    rule = f'targets = ["{LAYER}{changed}"]'
    names = {ModuleScheme(): "unquantized", INT8: "int8_w8a8"}
    given = WEIGHTS_ONLY if scheme == PLAIN_FP8 else f'scheme = "{names[scheme]}"'
    own.write_text(f'base = "{recipe}"\n[[rules]]\n{rule}\n{given}\n')
    quantize_checkpoint(NANO, tmp_path / "q", load_recipe(str(own)))
    (tmp_path / "graph").mkdir()
    with CheckpointWeights.open(tmp_path / "q") as weights:
        assert weights.schemes == {name: one for name, one in schemes.items() if one.weights}
        export_graph(weights, tmp_path / "graph")
    assert (tmp_path / "graph" / "weights.bin").stat().st_size <= bound
    model = onnx.load(tmp_path / "graph" / "model.onnx", load_external_data=False)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    plain = kinds["layers.2.mlp.experts.gate_up_proj"] == onnx.TensorProto.FLOAT
    assert plain == (folded > 0)
    is_rounded = "layers.2.mlp.experts.input" in {node.name for node in model.graph.node}
    assert is_rounded == (recipe == "fp8" and unrounded == 0)
