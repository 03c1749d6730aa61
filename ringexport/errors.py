"""The exceptions of ringexport and the exit code that each one ends the command line with.

::

    RingExportError
        ConfigError                  config.json, recipe or option that cannot be used
        CheckpointError              weights, tokenizer or template that cannot be used
            MissingTensorError
            UnknownTensorError
        ShapeError                   a tensor whose named dimensions do not fit
        ContextLengthError           more tokens than the model or the state can hold
        CalibrationError             calibration stats that are missing, damaged or of another model
        QuantizationError            weights or a recipe that cannot be quantized
        GraphError                   a graph that breaks a contract
        EngineBuildError             an engine builder that failed
        BundleError                  an engine bundle that cannot be used
            VersionError
            DigestError
        BackendUnavailableError      a target that cannot run here
        ToleranceExceededError       a comparison that failed
        OutputError                  an output that cannot be written
        QueueFullError               more requests at once than may wait
        EngineClosedError            a request to an engine that was shut down

Every message says what is wrong, where, and what was expected; ``hint`` says what to do about it.
"""

from typing import ClassVar

__all__ = [
    "BackendUnavailableError",
    "BundleError",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "ContextLengthError",
    "DigestError",
    "EngineBuildError",
    "EngineClosedError",
    "GraphError",
    "MissingTensorError",
    "OutputError",
    "QuantizationError",
    "QueueFullError",
    "RingExportError",
    "ShapeError",
    "ToleranceExceededError",
    "UnknownTensorError",
    "VersionError",
]


class RingExportError(Exception):
    """Base of every error that ringexport raises on purpose.

    Attributes:
        message: one sentence, without the hint.
        hint: what the user can do about it, or None.
        exit_code: what the command line ends with (docs/cli.md lists them).
    """

    exit_code: ClassVar[int] = 70

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class ConfigError(RingExportError):
    """A config.json, recipe or option that cannot be used."""

    exit_code = 3


class CheckpointError(RingExportError):
    """Weights, tokenizer or chat template that cannot be used."""

    exit_code = 3


class MissingTensorError(CheckpointError):
    """The checkpoint lacks tensors that the config calls for."""


class UnknownTensorError(CheckpointError):
    """The checkpoint holds tensors that the config does not explain."""


class ShapeError(RingExportError):
    """A tensor whose shape, dtype or values do not fit what an operation needs."""

    exit_code = 3


class ContextLengthError(ShapeError):
    """More tokens than the model's context or the decode state can hold."""


class CalibrationError(RingExportError):
    """Calibration stats that are missing, damaged or of another model."""

    exit_code = 3


class QuantizationError(RingExportError):
    """Weights that cannot be quantized, or a recipe that does not fit the model."""

    exit_code = 3


class GraphError(RingExportError):
    """A graph that breaks a contract, before or after a pass."""

    exit_code = 5


class EngineBuildError(RingExportError):
    """An engine builder that failed."""

    exit_code = 5


class BundleError(RingExportError):
    """An engine bundle that cannot be used."""

    exit_code = 3


class VersionError(BundleError):
    """A bundle or state file in a format that this version does not read."""


class DigestError(BundleError):
    """A bundle whose files differ from what its manifest says."""


class BackendUnavailableError(RingExportError):
    """A target or backend that cannot run on this machine."""

    exit_code = 4


class ToleranceExceededError(RingExportError):
    """A comparison whose result is outside its bound."""

    exit_code = 1


class OutputError(RingExportError):
    """An output that cannot be written: permissions, disk full, existing file."""

    exit_code = 6


class QueueFullError(RingExportError):
    """More requests at once than may wait; later there is room again."""


class EngineClosedError(RingExportError):
    """A request that an engine refused, or gave up, because it was shut down."""
