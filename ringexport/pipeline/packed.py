"""The `cuda` targets of a build: weights packed for the kernel library."""

from collections.abc import Mapping
from dataclasses import dataclass

from ringexport.bundle import BundleWriter, TargetInfo
from ringexport.checkpoint import CheckpointWeights, RingConfig
from ringexport.errors import ConfigError
from ringexport.ops.decay import DecayIndex
from ringexport.ops.quantization import NumberFormat
from ringexport.ops.schemes import ModuleScheme, StateFormat
from ringexport.packing.layout import MatrixFormat, packed_tensors
from ringexport.packing.writer import WEIGHTS_FILE, formats_of, write_packed
from ringexport.pipeline.request import target_directory
from ringexport.pipeline.target_io import target_io
from ringexport.progress import Progress
from ringexport.quantize.resolve import resolve_recipe
from ringexport.quantize.shipped import load_recipe

__all__ = [
    "PackedRecipe",
    "check_packed",
    "export_packed",
    "is_packed",
    "max_packed_bytes",
    "packed_recipe",
]

_PREFIX = "cuda:"


def is_packed(target: str) -> bool:
    """Say whether a target runs packed weights."""
    return target.startswith(_PREFIX)


def check_packed(
    target: str,
    schemes: Mapping[str, ModuleScheme],
    *,
    what: str,
    kv_cache: NumberFormat | None,
    state: StateFormat,
) -> None:
    """Refuse what the kernels do not run.

    Args:
        target: name.
        schemes: of the quantized modules.
        what: is to be built, for the message.
        kv_cache: format of the KV cache, None for bf16.
        state: format of the recurrent state.

    Raises:
        ConfigError: names what the target lacks, and the alternatives.
    """
    if kv_cache is NumberFormat.INT8:
        raise ConfigError(
            f"{what} has an INT8 KV cache, and that of the target {target} is bf16 or FP8",
            hint="use kv_cache = 'fp8' or 'none'",
        )
    if state is not StateFormat.FP32:
        raise ConfigError(
            f"{what} keeps the recurrent state in {state}, and that of the target {target} is fp32",
            hint="leave out recurrent_state",
        )
    for name, scheme in schemes.items():
        MatrixFormat.of(scheme, name)


def max_packed_bytes(config: RingConfig, schemes: Mapping[str, ModuleScheme]) -> int:
    """Return the bytes of the packed weights."""
    formats = formats_of(config, dict(schemes))
    return sum(tensor.nbytes for tensor in packed_tensors(config, formats))


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRecipe:
    """A recipe applied to a config as the kernels run it.

    Attributes:
        name: of the recipe.
        formats: of every packed matrix.
        fp8_cache: the KV cache is FP8-E4M3 instead of bf16.
    """

    name: str
    formats: Mapping[str, MatrixFormat]
    fp8_cache: bool


def packed_recipe(name: str, config: RingConfig) -> PackedRecipe:
    """Apply a recipe, without weights.

    Args:
        name: of a shipped recipe, or the path of a TOML file.
        config: of the model.

    Raises:
        ConfigError: no such recipe, or one that the kernels do not run.
    """
    resolved = resolve_recipe(load_recipe(name), config)
    schemes = {module: entry.scheme for module, entry in resolved.quantized.items()}
    recipe = resolved.recipe
    kv_cache = None if recipe.kv_cache is None else recipe.kv_cache.format
    check_packed(
        "cuda", schemes, what=f"recipe {name}", kv_cache=kv_cache, state=recipe.recurrent_state
    )
    return PackedRecipe(
        name=recipe.name, formats=formats_of(config, schemes), fp8_cache=kv_cache is not None
    )


def export_packed(
    weights: CheckpointWeights,
    target: str,
    decay_index: str,
    writer: BundleWriter,
    progress: Progress,
) -> TargetInfo:
    """Write the packed weights of one target and describe it.

    Raises:
        ConfigError: modules that the kernels run together have different formats.
        CheckpointError: a weight cannot be read, or holds NaN or infinity.
    """
    path = f"{target_directory(target)}/{WEIGHTS_FILE}"
    folder = writer.path(path).parent
    write_packed(weights, folder, decay_index=DecayIndex(decay_index), progress=progress)
    return TargetInfo(
        directory=target_directory(target),
        files={"weights": path},
        io=target_io(weights.config),
        limits={"context_length": weights.config.context_length},
    )
