"""What a target refuses of a recipe, and what is said about how it computes one."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from ringexport.checkpoint import CheckpointWeights, RingConfig
from ringexport.errors import ConfigError
from ringexport.ops.quantization import Granularity, GranularityKind, NumberFormat
from ringexport.ops.schemes import ModuleScheme, WeightScheme
from ringexport.pipeline.target_schemes import check_runnable, computation_notes
from ringexport.quantize.modules import quantizable_modules
from ringexport.quantize.resolve import resolve_recipe
from ringexport.quantize.shipped import load_recipe

NANO = Path(__file__).parents[2] / "models" / "ring-nano"
OLD, NEW = "tensorrt-rtx:sm_80", "tensorrt-rtx:sm_89"
EXPERTS = "inputs of 480 matrices of experts are quantized per token"
PER_TOKEN = "inputs of 25 modules are quantized per token, not with static scales"
PLAIN = "inputs of 5 modules are not quantized, no kernel fits them"
WHY = "TensorRT has no FP8 before sm_89"


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
