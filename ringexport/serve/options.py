"""What a server allows, and how long it waits."""

import math
from dataclasses import dataclass, field

from ringexport.errors import ConfigError

__all__ = ["ServeOptions"]

MAX_NAME = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Limits of a server; times are in seconds.

    Attributes:
        model_name: what clients call the model.
        api_key: what clients have to send as a bearer token; None lets everybody in.
        local_only: refuse requests whose Host is a name of another machine. A web page can make its
            own name lead to this machine, and would then be let in like programs that run here.
        thinking: whether a chat whose request does not say lets the model think first.
        max_new_tokens: the most that a request may ask for; None for what the context holds.
        max_prompt_tokens: the longest prompt; None for what the context holds.
        max_body_bytes: the largest body of a request.
        max_header_bytes: names and values of all headers of a request.
        max_messages: the longest chat.
        max_tools: functions that a request may describe.
        max_pending_tokens: tokens that may wait for a slow reader before its request is ended.
        body_seconds: in which a body, and before it the headers, must have arrived.
        stall_seconds: after which a reader that takes nothing is cut off.
        heartbeat_seconds: after which a silent stream sends a comment.
        drain_seconds: that requests have to end in when the server is told to.

    Raises:
        ConfigError: a value out of range.
    """

    model_name: str = "ringexport"
    api_key: str | None = field(default=None, repr=False)
    local_only: bool = False
    thinking: bool = True
    max_new_tokens: int | None = None
    max_prompt_tokens: int | None = None
    max_body_bytes: int = 8 << 20
    max_header_bytes: int = 8192
    max_messages: int = 1000
    max_tools: int = 128
    max_pending_tokens: int = 1024
    body_seconds: float = 30.0
    stall_seconds: float = 30.0
    heartbeat_seconds: float = 15.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not (0 < len(self.model_name) <= MAX_NAME and self.model_name.isprintable()):
            raise ConfigError(
                f"the model's name is {self.model_name!r:.80}, expected 1 to {MAX_NAME} printable"
                " characters",
                hint="give another --model-name, or none for the name of the bundle",
            )
        if self.api_key is not None and not _usable(self.api_key):
            raise ConfigError(  # without the key itself
                "the API key cannot be used, expected printable ASCII characters without spaces",
                hint="make one with: python -c 'import secrets; print(secrets.token_urlsafe())'",
            )
        for name in ("max_new_tokens", "max_prompt_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, expected at least 1")
        for name in ("body", "stall", "heartbeat", "drain"):
            seconds = getattr(self, f"{name}_seconds")
            if not 0 <= seconds < math.inf:
                raise ConfigError(f"{name}_seconds is {seconds}, expected a number from 0 on")


def _usable(key: str) -> bool:
    return bool(key) and key.isascii() and key.isprintable() and " " not in key
