"""Reading the body of a request: of a limited size, in a limited time, and only JSON."""

import asyncio
import json
from typing import Any, Never

from starlette.requests import ClientDisconnect, Request

from ringexport.serve.errors import ApiError
from ringexport.serve.generation import ClientGoneError
from ringexport.serve.options import ServeOptions

__all__ = ["read_json"]

CLOSE = {"Connection": "close"}
DISCARDED = 8
"""Times the limit: so much of a body that is too large is read, so that the answer arrives."""
MOST_COMMAS = 1_000_000
"""More values than this would hold up everybody else's answers while they are parsed."""


async def read_json(request: Request, options: ServeOptions) -> Any:
    """Return the JSON value in the body.

    Raises:
        ApiError: it is too large, too slow, of another type, or no JSON.
        ClientGoneError: the client has gone.
    """
    _check_headers(request, options)
    try:
        async with asyncio.timeout(options.body_seconds):
            data = await _read(request, options.max_body_bytes)
    except TimeoutError as error:
        message = f"the body did not arrive within {options.body_seconds:g} seconds"
        raise ApiError(message, status=408, headers=CLOSE) from error
    except ClientDisconnect as error:
        raise ClientGoneError from error
    return _parse(data)


def _check_headers(request: Request, options: ServeOptions) -> None:
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        message = "the Content-Type of the request must be application/json"
        raise ApiError(message, status=415, code="content_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        message = "a compressed body is not supported"
        raise ApiError(message, status=415, code="content_encoding", headers=CLOSE)
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length[:20]) > DISCARDED * options.max_body_bytes:
        raise _too_large(options.max_body_bytes)


async def _read(request: Request, limit: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= limit:
            parts.append(part)
        else:
            parts.clear()
        if size > DISCARDED * limit:
            break
    if size > limit:
        raise _too_large(limit)
    return b"".join(parts)


def _too_large(limit: int) -> ApiError:
    message = f"the body of the request is larger than {limit:,} bytes"
    return ApiError(message, status=413, code="request_too_large", headers=CLOSE)


def _parse(data: bytes) -> Any:
    def refuse(text: str) -> Never:
        raise ApiError(f"the body holds {text}, which is not JSON", code="invalid_json")

    if data.count(b",") > MOST_COMMAS:
        message = f"the body holds more than {MOST_COMMAS:,} commas, too many values for a request"
        raise ApiError(message, status=413, code="request_too_large")
    try:
        return json.loads(data.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        message = f"the body is not UTF-8 text: bad byte at offset {error.start}"
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        message = f"the body is not valid JSON: {what} at character {error.pos}"
    except RecursionError:
        message = "the body is nested too deeply"
    except ValueError:  # an integer of thousands of digits
        message = "the body holds a number that is too long"
    raise ApiError(message, code="invalid_json")
