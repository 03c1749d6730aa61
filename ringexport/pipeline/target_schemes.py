"""What a target makes of quantized modules: refusals with alternatives, and honest notes."""

from collections.abc import Mapping

from ringexport.checkpoint import RingConfig
from ringexport.errors import ConfigError
from ringexport.ops.projection import int8_block_size
from ringexport.ops.quantization import GranularityKind, NumberFormat
from ringexport.ops.schemes import ActivationMode, ActivationScheme, ModuleScheme, StateFormat
from ringexport.quantize.modules import quantizable_modules

__all__ = ["check_runnable", "computation_notes", "max_weight_bytes"]

_PER_ROW = frozenset({GranularityKind.TENSOR, GranularityKind.CHANNEL})
_PLAIN_BYTES = 4
_INT8_BYTES, _FP8_BYTES = 1.3, 1.05  # codes and their scales, per element


def check_runnable(
    target: str,
    schemes: Mapping[str, ModuleScheme],
    *,
    what: str,
    kv_cache: bool,
    state: StateFormat = StateFormat.FP32,
) -> None:
    """Refuse what the graph of a target cannot express.

    Args:
        target: name.
        schemes: of the quantized modules.
        what: is to be built, for the message.
        kv_cache: whether the KV cache is to be quantized.
        state: format of the recurrent state.

    Raises:
        ConfigError: names what the target lacks, and the alternatives.
    """
    if kv_cache:
        raise ConfigError(
            f"{what} has an 8-bit KV cache, and that of the target {target} is fp32",
            hint="use the recipe fp8, or a recipe file with base = 'fp8-all' and kv_cache = 'none'",
        )
    if state is not StateFormat.FP32:
        raise ConfigError(
            f"{what} keeps the recurrent state in {state}, and that of the target {target} is fp32",
            hint="leave out recurrent_state; ringexport eval measures its drift on a checkpoint",
        )
    for name, scheme in schemes.items():
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


def computation_notes(config: RingConfig, schemes: Mapping[str, ModuleScheme]) -> tuple[str, ...]:
    """Say how onnxruntime:cpu computes these modules, where it is not what the scheme says."""
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
