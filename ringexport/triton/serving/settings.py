"""The `parameters` of config.pbtxt, checked."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ringexport.errors import ConfigError

__all__ = ["ServingSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingSettings:
    """How an instance of the streaming model serves.

    Attributes:
        bundle: absolute path of the bundle.
        backend: name of a backend, or "auto".
        threads: threads per operation of CPU backends, None for the backend's choice.
        max_batch: requests that run at once.
        max_queue: requests that may wait besides.
        token_budget: prompt tokens that are read between two decode steps.
        prefix_cache_mib: memory for states of prompts and sessions that may go on.
        max_new_tokens_limit: refuse requests that ask for more; None for no limit.
        max_sessions: sessions that are kept.
        session_idle_seconds: sessions that are idle for longer are forgotten.
        drain_seconds: how long running requests may go on when the model is unloaded.
    """

    bundle: Path
    backend: str = "auto"
    threads: int | None = None
    max_batch: int = 32
    max_queue: int = 256
    token_budget: int = 512
    prefix_cache_mib: int = 256
    max_new_tokens_limit: int | None = None
    max_sessions: int = 256
    session_idle_seconds: int = 600
    drain_seconds: int = 10

    @classmethod
    def from_args(cls, args: Mapping[str, str]) -> "ServingSettings":
        """Read the arguments that Triton gives to `initialize`.

        Raises:
            ConfigError: a parameter that is missing or cannot be used.
        """
        entries = json.loads(args["model_config"]).get("parameters", {})
        given = {key: str(entry.get("string_value", "")) for key, entry in entries.items()}
        if not given.get("bundle"):
            raise ConfigError(
                "config.pbtxt has no parameter 'bundle'",
                hint="write the repository again with: ringexport triton",
            )
        numbers = {
            name: _number(name, given[name])
            for name, field in cls.__dataclass_fields__.items()
            if "int" in str(field.type) and given.get(name)
        }
        version = Path(args["model_repository"]) / args["model_version"]
        return cls(
            bundle=version / given["bundle"],
            backend=given.get("backend") or "auto",
            **numbers,
        )


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise ConfigError(f"the parameter {name} is {text[:40]!r}, expected a number from 0 on")
    return int(text)
