"""What a target makes of quantized modules: refusals with alternatives, and honest notes."""

from collections.abc import Iterable, Mapping

from ringexport.checkpoint import RingConfig
from ringexport.engine.target import EngineTarget
from ringexport.errors import ConfigError
from ringexport.ops.plugin_ops import experts_fit_plugin, projection_fits_plugin
from ringexport.ops.projection import int8_block_size
from ringexport.ops.quantization import GranularityKind, NumberFormat
from ringexport.ops.schemes import ActivationMode, ActivationScheme, ModuleScheme, StateFormat
from ringexport.pipeline.packed import check_packed, is_packed
from ringexport.quantize.modules import quantizable_modules

__all__ = [
    "FP8_ARCHITECTURE",
    "check_model",
    "check_runnable",
    "computation_notes",
    "max_engine_bytes",
    "max_weight_bytes",
]

FP8_ARCHITECTURE = 89
"""The first for which TensorRT compiles FP8, in whatever layer."""

_PER_ROW = frozenset({GranularityKind.TENSOR, GranularityKind.CHANNEL})
_HEAD_DIMS = (64, 128)
_ENGINE_BYTES_PER_LAYER = 8 << 20
_PLAIN_BYTES = 4
_INT8_BYTES, _FP8_BYTES = 1.3, 1.05  # codes and their scales, per element


def check_runnable(
    target: str,
    schemes: Mapping[str, ModuleScheme],
    *,
    what: str,
    kv_cache: NumberFormat | None,
    state: StateFormat = StateFormat.FP32,
) -> None:
    """Refuse what a target cannot run.

    Args:
        target: name.
        schemes: of the quantized modules.
        what: is to be built, for the message.
        kv_cache: format of the KV cache, None where it is not to be quantized.
        state: format of the recurrent state.

    Raises:
        ConfigError: names what the target lacks, and the alternatives.
    """
    if is_packed(target):
        check_packed(target, schemes, what=what, kv_cache=kv_cache, state=state)
        return
    quantized = next((name for name, scheme in schemes.items() if scheme.weights is not None), None)
    if target == "onnxruntime:cuda" and quantized is not None:
        raise ConfigError(
            f"{what} quantizes {quantized}, and the target {target} runs no quantized modules",
            hint="use the recipe bf16 or fp32, or a cuda:sm_.. target",
        )
    engine = EngineTarget.parse(target)
    is_tensorrt = engine is not None
    cache = "bf16" if is_tensorrt else "fp32"
    if kv_cache is not None:
        raise ConfigError(
            f"{what} has an 8-bit KV cache, and that of the target {target} is {cache}",
            hint="use the recipe fp8, or a recipe file with base = 'fp8-all' and kv_cache = 'none'",
        )
    if state is not StateFormat.FP32:
        raise ConfigError(
            f"{what} keeps the recurrent state in {state}, and that of the target {target} is fp32",
            hint="leave out recurrent_state; ringexport eval measures its drift on a checkpoint",
        )
    for name, scheme in schemes.items():
        if engine is not None:
            _check_tensorrt(engine, name, scheme, what)
        inputs = scheme.activations
        if (
            inputs is not None
            and inputs.format is NumberFormat.FP8_E4M3
            and _is_dynamic_tensor(inputs)
        ):
            raise ConfigError(
                f"{what} quantizes the input of {name} per {inputs.granularity}, which the target "
                f"{target} does not run",
                hint="use activations per token",
            )


def _check_tensorrt(engine: EngineTarget, name: str, scheme: ModuleScheme, what: str) -> None:
    """Refuse a module that neither the plugins nor TensorRT's own layers run."""
    target = engine.name
    older = [number for number in engine.architectures if number < FP8_ARCHITECTURE]
    parts = [part for part in (scheme.weights, scheme.activations) if part is not None]
    if older and any(part.format is NumberFormat.FP8_E4M3 for part in parts):
        raise ConfigError(
            f"{what} quantizes {name} to FP8, and the target {target} is for sm_{older[0]}:"
            f" TensorRT has FP8 from sm_{FP8_ARCHITECTURE} on",
            hint="use the recipe int8 or bf16, or a target cuda:sm_..",
        )
    if scheme.weights is not None and scheme.weights.granularity.kind not in _PER_ROW:
        raise ConfigError(
            f"{what} quantizes the weights of {name} per {scheme.weights.granularity}, and the"
            f" target {target} takes scales per channel",
            hint="use the recipe fp8, fp8-static or int8",
        )
    if scheme.activations is not None and scheme.activations.granularity.kind not in {
        GranularityKind.TENSOR,
        GranularityKind.TOKEN,
    }:
        raise ConfigError(
            f"{what} quantizes the input of {name} per {scheme.activations.granularity}, and the"
            f" target {target} takes scales per token",
            hint="use activations per token, or static ones per tensor",
        )


def computation_notes(
    config: RingConfig, schemes: Mapping[str, ModuleScheme], targets: Iterable[str]
) -> tuple[str, ...]:
    """Say how the targets compute these modules, where it is not what the scheme says."""
    families = {
        EngineTarget.parse(target) is not None for target in targets if not is_packed(target)
    }
    notes: tuple[str, ...] = ()
    if False in families:
        notes += _onnxruntime_notes(config, schemes)
    if True in families:
        notes += _tensorrt_notes(config, schemes)
    return notes


def _tensorrt_notes(config: RingConfig, schemes: Mapping[str, ModuleScheme]) -> tuple[str, ...]:
    experts = plain = 0
    for module in quantizable_modules(config):
        scheme = schemes.get(module.name, ModuleScheme())
        if scheme.weights is None:
            continue
        inputs = scheme.activations
        dynamic = inputs is not None and inputs.mode is ActivationMode.DYNAMIC
        if ".mlp.experts." in module.name:
            experts += not dynamic
        elif dynamic:
            plain += not projection_fits_plugin(module.shape[1], module.shape[0])
    notes = []
    if experts:
        notes.append(f"TensorRT: inputs of {experts} matrices of experts are quantized per token")
    if plain:
        notes.append(
            f"TensorRT: inputs of {plain} modules are not quantized, their sizes fit no kernel"
        )
    return tuple(notes)


def _onnxruntime_notes(config: RingConfig, schemes: Mapping[str, ModuleScheme]) -> tuple[str, ...]:
    int8, folded, rounded, experts = 0, 0, 0, 0
    for module in quantizable_modules(config):
        scheme = schemes.get(module.name, ModuleScheme())
        if scheme.weights is None:
            continue
        native = _is_native(scheme, module.shape)
        folded += not native
        if scheme.weights.format is NumberFormat.INT8:
            int8 += native
        elif scheme.activations is not None:
            rounded += 1
            experts += ".experts." in module.name and module.name.endswith("down_proj")
    notes = []
    if int8:
        notes.append(
            f"{int8} modules: int8 products; inputs are quantized to int8 per block of at most 64"
        )
    if rounded:
        notes.append(
            f"{rounded} modules: weights FP8, inputs rounded to FP8, products computed in fp32"
            + (f"; the inputs of the {experts} down_proj of experts not" if experts else "")
        )
    if folded:
        notes.append(f"{folded} modules: quantized weights are stored dequantized, in fp32")
    return tuple(notes)


def check_model(target: str, config: RingConfig) -> None:
    """Refuse a model whose sizes the kernels of plugins/ do not take, for targets that use them.

    Raises:
        ConfigError: names the size and what it could be.
    """
    if EngineTarget.parse(target) is None and not is_packed(target):
        return
    problem = None
    if config.head_dim not in _HEAD_DIMS:
        problem = f"head_dim {config.head_dim}, expected {' or '.join(map(str, _HEAD_DIMS))}"
    elif not experts_fit_plugin(config.hidden_size, config.moe_intermediate_size):
        problem = (
            f"hidden_size {config.hidden_size} and moe_intermediate_size"
            f" {config.moe_intermediate_size}, expected multiples of 128 and 32"
        )
    if problem is not None:
        raise ConfigError(
            f"the target {target} has no kernels for {problem}",
            hint="build such a model for onnxruntime:cpu",
        )


def max_engine_bytes(config: RingConfig) -> int:
    """Return what an engine takes at most: weights in bf16, and code for every layer."""
    return 2 * config.num_parameters + _ENGINE_BYTES_PER_LAYER * (config.num_hidden_layers + 2)


def max_weight_bytes(config: RingConfig, schemes: Mapping[str, ModuleScheme]) -> int:
    """Return what all weights take in a graph of onnxruntime:cpu at most."""
    total = _PLAIN_BYTES * config.num_parameters
    for module in quantizable_modules(config):
        scheme = schemes.get(module.name)
        if scheme is None or scheme.weights is None or not _is_native(scheme, module.shape):
            continue
        int8 = scheme.weights.format is NumberFormat.INT8
        saved = _PLAIN_BYTES - (_INT8_BYTES if int8 else _FP8_BYTES)
        total -= int(saved * module.shape[0] * module.shape[1])
    return total


def _is_native(scheme: ModuleScheme, shape: tuple[int, int]) -> bool:
    """Tell whether the graph keeps the codes of a module."""
    weights = scheme.weights
    if weights is None or weights.granularity.kind not in _PER_ROW:
        return False
    return weights.format is not NumberFormat.INT8 or int8_block_size(shape[1]) is not None


def _is_dynamic_tensor(inputs: ActivationScheme) -> bool:
    kind = inputs.granularity.kind
    return kind is GranularityKind.TENSOR and inputs.mode is ActivationMode.DYNAMIC
