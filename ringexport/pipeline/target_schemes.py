"""What a target makes of quantized modules: refusals with alternatives, and honest notes."""

from collections.abc import Iterable, Iterator, Mapping

from ringexport.checkpoint import RingConfig
from ringexport.engine.target import FP8_ARCHITECTURE, EngineTarget
from ringexport.errors import ConfigError
from ringexport.ops.plugin_ops import (
    ProjectionForm,
    experts_fit_plugin,
    is_per_row,
    projection_form,
)
from ringexport.ops.projection import int8_block_size
from ringexport.ops.quantization import GranularityKind, NumberFormat
from ringexport.ops.schemes import ActivationMode, ActivationScheme, ModuleScheme, StateFormat
from ringexport.pipeline.packed import check_packed, is_packed
from ringexport.quantize.modules import quantizable_modules

__all__ = [
    "check_model",
    "check_runnable",
    "computation_notes",
    "max_engine_bytes",
    "max_weight_bytes",
]

_HEAD_DIMS = (64, 128)
_EXPERTS = ".mlp.experts."
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
            _check_tensorrt(engine.name, name, scheme, what)
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


def _check_tensorrt(target: str, name: str, scheme: ModuleScheme, what: str) -> None:
    """Refuse a module that neither the plugins nor TensorRT's own layers run."""
    if scheme.weights is not None and not is_per_row(scheme):
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
    engines = [EngineTarget.parse(target) for target in targets if not is_packed(target)]
    tensorrt = [engine for engine in engines if engine is not None]
    notes = _onnxruntime_notes(config, schemes) if None in engines else ()
    found = {engine.name: _engine_notes(config, schemes, engine) for engine in tensorrt}
    for note in dict.fromkeys(note for given in found.values() for note in given):
        names = [name for name, given in found.items() if note in given]
        who = "TensorRT" if len(names) == len(found) else ", ".join(names)
        notes += (f"{who}: {note}",)
    return notes


def _engine_notes(
    config: RingConfig, schemes: Mapping[str, ModuleScheme], engine: EngineTarget
) -> list[str]:
    experts = mixed = per_token = plain = dequantized = 0
    mixed_layers = _mixed_layers(config, schemes)
    for module in quantizable_modules(config):
        scheme = schemes.get(module.name, ModuleScheme())
        if scheme.weights is None:
            continue
        inputs = scheme.activations
        is_static = inputs is not None and inputs.mode is ActivationMode.STATIC
        layer, is_expert, _ = module.name.partition(_EXPERTS)
        if is_expert:
            is_per_token = inputs is not None and inputs.granularity.kind is GranularityKind.TOKEN
            mixed += layer in mixed_layers
            experts += layer not in mixed_layers and not is_per_token
            continue
        form = projection_form(scheme, module.shape[1], module.shape[0], has_fp8=engine.has_fp8)
        is_dequantized = form is ProjectionForm.DEQUANTIZED
        per_token += is_static and form is ProjectionForm.PER_TOKEN
        plain += inputs is not None and (is_dequantized or form is ProjectionForm.WEIGHT_ONLY)
        dequantized += is_dequantized
    older = f"TensorRT has no FP8 before sm_{FP8_ARCHITECTURE}"
    notes = []
    if experts:
        notes.append(f"inputs of {experts} matrices of experts are quantized per token")
    if mixed:
        notes.append(
            f"weights of {mixed} matrices of experts are stored in bf16: formats differ within a"
            " layer"
        )
    if per_token:
        notes.append(
            f"inputs of {per_token} modules are quantized per token, not with static scales:"
            f" {older}"
        )
    if plain:
        notes.append(f"inputs of {plain} modules are not quantized, no kernel fits them")
    if dequantized:
        notes.append(f"FP8 weights of {dequantized} modules are stored in bf16: {older}")
    return notes


def _mixed_layers(config: RingConfig, schemes: Mapping[str, ModuleScheme]) -> frozenset[str]:
    """Return the layers whose experts are not all in one format: one kernel runs all of a layer.

    Weights that do not have scales per row count as not quantized: no such kernel takes them.
    """
    formats: dict[str, set[NumberFormat | None]] = {}
    for layer, _, scheme in _expert_schemes(config, schemes):
        found = scheme.weights.format if scheme.weights and is_per_row(scheme) else None
        formats.setdefault(layer, set()).add(found)
    return frozenset(layer for layer, several in formats.items() if len(several) > 1)


def _unrounded_layers(config: RingConfig, schemes: Mapping[str, ModuleScheme]) -> frozenset[str]:
    """Return the layers whose experts do not agree on how their shared input is rounded."""
    inputs: dict[str, set[ActivationScheme | None]] = {}
    for layer, name, scheme in _expert_schemes(config, schemes):
        if not name.endswith("down_proj"):
            inputs.setdefault(layer, set()).add(scheme.activations)
    return frozenset(layer for layer, found in inputs.items() if len(found) > 1)


def _expert_schemes(
    config: RingConfig, schemes: Mapping[str, ModuleScheme]
) -> Iterator[tuple[str, str, ModuleScheme]]:
    """Yield layer, name within it and scheme of each matrix of an expert."""
    for module in quantizable_modules(config):
        layer, is_expert, name = module.name.partition(_EXPERTS)
        if is_expert:
            yield layer, name, schemes.get(module.name, ModuleScheme())


def _onnxruntime_notes(config: RingConfig, schemes: Mapping[str, ModuleScheme]) -> tuple[str, ...]:
    int8 = folded = rounded = plain = experts = shared = 0
    native_modules = _native_modules(config, schemes)
    unrounded_layers = _unrounded_layers(config, schemes)
    for module in quantizable_modules(config):
        scheme = schemes.get(module.name, ModuleScheme())
        if scheme.weights is None:
            continue
        native = module.name in native_modules
        folded += not native
        if scheme.weights.format is NumberFormat.INT8:
            int8 += native
        elif scheme.activations is not None:
            layer, is_expert, _ = module.name.partition(_EXPERTS)
            is_down = bool(is_expert) and module.name.endswith("down_proj")
            differ = bool(is_expert) and not is_down and layer in unrounded_layers
            rounded += not differ
            plain += differ
            experts += is_down
            is_static = scheme.activations.mode is ActivationMode.STATIC
            shared += bool(is_expert) and is_static and not (is_down or differ)
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
    if shared:
        notes.append(
            f"{shared} modules: experts of a layer share an input, it is rounded with the static"
            " scale of the first"
        )
    if plain:
        notes.append(
            f"{plain} modules: inputs are not rounded to FP8: schemes of experts differ within a"
            " layer"
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
    native_modules = _native_modules(config, schemes)
    for module in quantizable_modules(config):
        weights = schemes.get(module.name, ModuleScheme()).weights
        if weights is None or module.name not in native_modules:
            continue
        int8 = weights.format is NumberFormat.INT8
        saved = _PLAIN_BYTES - (_INT8_BYTES if int8 else _FP8_BYTES)
        total -= int(saved * module.shape[0] * module.shape[1])
    return total


def _native_modules(config: RingConfig, schemes: Mapping[str, ModuleScheme]) -> frozenset[str]:
    """Return the modules whose codes a graph of onnxruntime:cpu keeps.

    One op runs the experts of a layer: it takes the codes of all of them or of none.
    """
    mixed_layers = _mixed_layers(config, schemes)
    expert_block = int8_block_size(config.hidden_size, config.moe_intermediate_size)
    native = set()
    for module in quantizable_modules(config):
        scheme = schemes.get(module.name, ModuleScheme())
        if scheme.weights is None or not is_per_row(scheme):
            continue
        layer, is_expert, _ = module.name.partition(_EXPERTS)
        block = expert_block if is_expert else int8_block_size(module.shape[1])
        fits = scheme.weights.format is not NumberFormat.INT8 or block is not None
        if fits and not (is_expert and layer in mixed_layers):
            native.add(module.name)
    return frozenset(native)


def _is_dynamic_tensor(inputs: ActivationScheme) -> bool:
    kind = inputs.granularity.kind
    return kind is GranularityKind.TENSOR and inputs.mode is ActivationMode.DYNAMIC
