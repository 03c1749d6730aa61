"""Errors as clients see them: OpenAI's form, and nothing about the inside of the server."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from ringexport.errors import (
    CheckpointError,
    ConfigError,
    ContextLengthError,
    EngineClosedError,
    QueueFullError,
    RingExportError,
    ShapeError,
)

__all__ = ["ApiError", "JsonReply", "encode_json", "translated"]

RETRY_SECONDS = 2
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        message: one sentence for the client.
        status: of HTTP.
        param: the field that is wrong, as a path such as "messages[0].role".
        code: what programs tell errors apart by.
        headers: of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kind = KINDS.get(self.status, "invalid_request_error")
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}

    def response(self) -> Response:
        """Return the answer."""
        return JsonReply(self.body, status_code=self.status, headers=self.headers)


class JsonReply(Response):
    """An answer in JSON; half surrogate pairs become escapes, which UTF-8 cannot hold."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the bytes of the body."""
        return encode_json(content)


def encode_json(value: Any) -> bytes:
    """Return JSON as UTF-8, on one line."""
    return _encode(value).encode("utf-8", "backslashreplace")


def translated(error: RingExportError) -> ApiError:
    """Return what a client is told about an error; only what it can change itself is told."""
    retry = {"Retry-After": str(RETRY_SECONDS)}
    if isinstance(error, QueueFullError):
        message = "too many requests are waiting; try again later"
        return ApiError(message, status=429, code="queue_full", headers=retry)
    if isinstance(error, EngineClosedError):
        message = "the server is shutting down"
        return ApiError(message, status=503, code="shutting_down", headers=retry)
    if isinstance(error, ContextLengthError):
        message = "the prompt is longer than the context of the model"
        return ApiError(message, code="context_length_exceeded")
    if isinstance(error, ConfigError | ShapeError):
        return ApiError(error.message)
    if isinstance(error, CheckpointError):
        message = "the chat template of the model cannot be used with these messages"
        return ApiError(message, param="messages", code="chat_template")
    return ApiError("the model failed on this request", status=500, code="model_failed")
