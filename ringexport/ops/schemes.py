"""How one module is quantized: number format, granularity and observer of weights and inputs."""

from dataclasses import dataclass
from enum import StrEnum

from ringexport.errors import ConfigError
from ringexport.ops.quantization import Granularity, GranularityKind, NumberFormat

__all__ = [
    "ActivationMode",
    "ActivationScheme",
    "KvCacheScheme",
    "ModuleScheme",
    "StateFormat",
    "WeightObserver",
    "WeightScheme",
]


class WeightObserver(StrEnum):
    """How the scale of a weight tile is chosen.

    ABSMAX: the largest magnitude becomes the largest code.
    MSE: the scale, out of a fixed list around that one, with the smallest squared error.
    """

    ABSMAX = "absmax"
    MSE = "mse"


class StateFormat(StrEnum):
    """The format of the recurrent state; all but fp32 are experiments."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    FP8_E4M3 = "fp8_e4m3"
    INT8 = "int8"


class ActivationMode(StrEnum):
    """Where the scale of a module's input comes from: calibration, or the input itself."""

    STATIC = "static"
    DYNAMIC = "dynamic"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightScheme:
    """How a weight matrix [out, in] is quantized, always symmetric.

    Raises:
        ConfigError: granularity "token", which weights do not have.
    """

    format: NumberFormat
    granularity: Granularity
    observer: WeightObserver = WeightObserver.ABSMAX

    def __post_init__(self) -> None:
        if self.granularity.kind is GranularityKind.TOKEN:
            raise ConfigError(
                "weights cannot be quantized per token", hint="their rows are 'channel'"
            )

    def __str__(self) -> str:
        """Return a short form for tables."""
        suffix = "" if self.observer is WeightObserver.ABSMAX else f" {self.observer}"
        return f"{self.format} {self.granularity}{suffix}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationScheme:
    """How a module's input [tokens, in] is quantized, always symmetric.

    Raises:
        ConfigError: a combination that no engine runs: static scales exist per tensor only,
            dynamic ones per tensor, per token, or per group within a token.
    """

    format: NumberFormat
    granularity: Granularity
    mode: ActivationMode

    def __post_init__(self) -> None:
        allowed = {GranularityKind.TENSOR}
        if self.mode is ActivationMode.DYNAMIC:
            allowed |= {GranularityKind.TOKEN, GranularityKind.GROUP}
        if self.granularity.kind not in allowed:
            raise ConfigError(
                f"{self.mode} activations cannot be quantized per {self.granularity}, expected "
                f"{' or '.join(sorted(kind.value for kind in allowed))}"
            )

    def __str__(self) -> str:
        """Return a short form for tables."""
        return f"{self.format} {self.granularity} {self.mode}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleScheme:
    """How one module is quantized; neither weights nor activations means it stays as it is.

    Raises:
        ConfigError: quantized activations with weights that are not, or that have another format.
    """

    weights: WeightScheme | None = None
    activations: ActivationScheme | None = None

    def __post_init__(self) -> None:
        if self.activations is None:
            return
        if self.weights is None:
            raise ConfigError("activations cannot be quantized where weights are not")
        if self.weights.format is not self.activations.format:
            raise ConfigError(
                f"weights in {self.weights.format} and activations in {self.activations.format} "
                "cannot be multiplied, expected one format"
            )

    @property
    def needs_stats(self) -> bool:
        """Whether a scale has to come from calibration."""
        return self.activations is not None and self.activations.mode is ActivationMode.STATIC


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCacheScheme:
    """How keys and values of softmax layers are cached: one static scale each per layer."""

    format: NumberFormat
