"""What every request passes: limits of its headers, the key, the log, and the counts."""

import hashlib
import hmac
import ipaddress
import logging
import time
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ringexport.serve.errors import ApiError
from ringexport.serve.metrics import Metrics
from ringexport.serve.options import ServeOptions

__all__ = ["Gate"]

log = logging.getLogger("ringexport.serve.access")

OPEN_PATHS = ("/", "/health")
"""They need no key: the page asks for it, and a load balancer has none."""
KNOWN_PATHS = ("/", "/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions")
CLIENT_GONE = 499
SHOWN = 120


class Gate:
    """ASGI middleware around everything else.

    Args:
        app: what comes behind it.
        options: limits and key.
        metrics: counts every request.
    """

    def __init__(self, app: ASGIApp, *, options: ServeOptions, metrics: Metrics) -> None:
        self._app, self._options, self._metrics = app, options, metrics
        self._key = None if options.api_key is None else _digest(options.api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request and hand it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, started = CLIENT_GONE, time.perf_counter()
        scope["state"] = dict(scope.get("state") or {}, started=started)

        async def record(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.started()
        try:
            problem = self._problem(scope)
            app = self._app if problem is None else problem.response()
            await app(scope, receive, record)
        finally:
            if "outcome" in scope["state"]:
                status = CLIENT_GONE
            self._end(scope, status, time.perf_counter() - started)

    def _problem(self, scope: Scope) -> ApiError | None:
        """Return why a request may not pass."""
        close = {"Connection": "close"}
        limit = self._options.max_header_bytes
        if sum(len(name) + len(value) for name, value in scope["headers"]) > limit:
            message = f"the headers of the request are larger than {limit:,} bytes"
            return ApiError(message, status=431, code="headers_too_large", headers=close)
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
            message = "the request has two lengths: Content-Length and Transfer-Encoding"
            return ApiError(message, code="bad_http", headers=close)
        if self._options.local_only and not _is_local(scope):
            message = (
                "the Host of the request is another machine; without an API key this server answers"
                " only to localhost and to addresses"
            )
            return ApiError(message, status=403, code="host_not_allowed", headers=close)
        if scope["path"] in OPEN_PATHS or self._key is None:
            return None
        if not self._has_key(scope):
            headers = {"WWW-Authenticate": "Bearer", **close}
            message = "the API key is missing or wrong"
            return ApiError(message, status=401, code="invalid_api_key", headers=headers)
        return None

    def _has_key(self, scope: Scope) -> bool:
        """Compare in a time that says nothing about the key, or its length."""
        found = [value for name, value in scope["headers"] if name == b"authorization"]
        kind, _, key = (found[0] if len(found) == 1 else b"").partition(b" ")
        assert self._key is not None
        return hmac.compare_digest(_digest(key.strip()), self._key) and kind.lower() == b"bearer"

    def _end(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"]
        self._metrics.ended(path if path in KNOWN_PATHS else "other", status, seconds)
        client = (scope.get("client") or ("-", 0))[0]
        shown = path[:SHOWN].encode("unicode_escape").decode()
        note = scope["state"].get("outcome", "")
        tail = f" ({note})" if note else ""
        log.info("%s %s %s %d %.3f s%s", client, scope["method"], shown, status, seconds, tail)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _is_local(scope: Scope) -> bool:
    """Tell whether the Host is an address or a name of this machine; browsers always send one."""
    for name, value in scope["headers"]:
        if name != b"host":
            continue
        try:
            host = urlsplit("//" + value.decode("latin-1")).hostname or ""
            if host != "localhost" and not host.endswith(".localhost"):
                ipaddress.ip_address(host)
        except ValueError:
            return False
    return True
