"""uvicorn's HTTP protocol with a time limit for heads, errors in JSON, and a way to hang up."""

import asyncio
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from ringexport.serve.errors import ApiError, encode_json
from ringexport.serve.streaming import ABORT, WRITER

__all__ = ["HttpProtocol"]


class HttpProtocol(H11Protocol):
    """One connection.

    Args:
        args, kwargs: of uvicorn's protocol.
        head_seconds: in which the head of a request must have arrived.
    """

    def __init__(self, *args: Any, head_seconds: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_seconds = head_seconds
        self._head_since: float | None = None
        inner = self.app

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            extensions = scope.setdefault("extensions", {})
            extensions[ABORT] = self.transport.abort
            if scope["http_version"] == "1.1":
                extensions[WRITER] = _ChunkWriter(self)
            await inner(scope, receive, send)

        self.app = app

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to wait for the head of the first request."""
        super().connection_made(transport)
        self._head_since = self.loop.time()
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes, and note whether they begin a head that is not complete."""
        waits = self._idle()
        super().data_received(data)
        if not (waits and self._idle()):
            self._head_since = None
        elif self._head_since is None:
            self._head_since = self.loop.time()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP; in the middle of an answer only hang up."""
        del msg
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        body = encode_json(ApiError("this is no HTTP/1.1 request", code="bad_http").body)
        headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body)):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _idle(self) -> bool:
        cycle = getattr(self, "cycle", None)  # None until the first request
        return cycle is None or cycle.response_complete

    def _watch_head(self) -> None:
        """Hang up on a client that sends its head byte by byte, or nothing."""
        if self.transport.is_closing():
            return
        since = self._head_since
        if since is not None and self.loop.time() - since > self._head_seconds:
            self.transport.abort()
            return
        self.loop.call_later(self._head_seconds / 4, self._watch_head)


class _ChunkWriter:
    """A `BodyWriter` for the request in work.

    It writes the chunks of HTTP/1.1 itself: what has no length is sent in chunks there, and h11
    remembers nothing about those that it has sent.
    """

    def __init__(self, connection: HttpProtocol) -> None:
        self._flow, self._transport = connection.flow, connection.transport
        self._cycle = connection.cycle

    @property
    def ready(self) -> bool:
        """Whether the reader keeps up, and is still there."""
        lost = self._cycle.disconnected or self._transport.is_closing()
        return not (lost or self._flow.write_paused)

    def write(self, data: bytes) -> None:
        """Write one chunk."""
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
