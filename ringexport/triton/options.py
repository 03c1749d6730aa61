"""What a model repository is to look like."""

import re
from dataclasses import dataclass

from ringexport.errors import ConfigError

__all__ = ["TritonOptions", "model_name"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_MAX_BATCH = 128
_MAX_INSTANCES = 64
_MAX_SESSIONS = 1_000_000
_MAX_IDLE_SECONDS = 30 * 24 * 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonOptions:
    """How the models of a repository serve.

    Attributes:
        name: of the streaming model; None for that of the bundle's directory.
        reference: name the bundle by its absolute path instead of copying it.
        backend: name of a backend, or "auto".
        threads: threads per operation of CPU backends, None for the backend's choice.
        instances: processes that each load the model; on every GPU that `gpus` names.
        gpus: numbers of GPUs, none for the CPU.
        max_batch: requests that an instance runs at once, 1 to 128.
        max_sessions: sessions that an instance keeps; 0 for requests that stand alone only.
        session_idle_seconds: sessions that are idle for longer are forgotten.
        plan_context: tokens of a sequence of the TensorRT variant; None for what the engine has,
            at most 4096.

    Raises:
        ConfigError: a value out of range; the message names it.
    """

    name: str | None = None
    reference: bool = False
    backend: str = "auto"
    threads: int | None = None
    instances: int = 1
    gpus: tuple[int, ...] = ()
    max_batch: int = 32
    max_sessions: int = 256
    session_idle_seconds: int = 600
    plan_context: int | None = None

    def __post_init__(self) -> None:
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"the model name {self.name!r:.80} cannot be used,"
                " expected letters, digits, '_', '.' and '-'",
                hint="choose another --name",
            )
        _check("instances", self.instances, 1, _MAX_INSTANCES)
        _check("max_batch", self.max_batch, 1, _MAX_BATCH)
        _check("max_sessions", self.max_sessions, 0, _MAX_SESSIONS)
        _check("session_idle_seconds", self.session_idle_seconds, 1, _MAX_IDLE_SECONDS)
        for number in self.gpus:
            _check("a GPU's number", number, 0, _MAX_INSTANCES)
        if len(set(self.gpus)) != len(self.gpus):
            raise ConfigError(
                f"gpus names a GPU twice: {list(self.gpus)}",
                hint="more than one process per GPU: --instances",
            )
        if self.plan_context is not None:
            _check("plan_context", self.plan_context, 1, None)

    @property
    def sticky(self) -> bool:
        """Whether Triton has to bring all requests of a session to the same instance."""
        return self.max_sessions > 0 and self.instances * max(len(self.gpus), 1) > 1


def _check(name: str, value: int, low: int, high: int | None) -> None:
    if value < low or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"{low} to {high:,}"
        raise ConfigError(f"{name} is {value}, expected {expected}")


def model_name(directory_name: str) -> str:
    """Return a model name that is as near to the name of a directory as Triton allows."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", directory_name).lstrip(".-")[:100]
    return name or "ringexport"
