"""Server-sent events: a reply chunk by chunk, to readers of any speed."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ringexport.batching import Event, PieceEvent
from ringexport.serve.errors import ApiError, encode_json
from ringexport.serve.generation import (
    ClientGoneError,
    Direct,
    Feed,
    SlowReaderError,
    finished,
)
from ringexport.serve.options import ServeOptions
from ringexport.serve.replies import Reply

__all__ = ["ABORT", "WRITER", "BodyWriter", "EventStream", "wait_for_disconnect"]

log = logging.getLogger(__name__)

ABORT = "ringexport.abort"
"""Extension of the ASGI scope: a function that drops the connection, and what is left to send."""

WRITER = "ringexport.writer"
"""Another one: a `BodyWriter`, where the server has one."""

HEARTBEAT = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"


class BodyWriter(Protocol):
    """Writes parts of a streamed body past all that is between; `send` does it in many steps."""

    @property
    def ready(self) -> bool:
        """Whether the reader keeps up."""

    def write(self, data: bytes) -> None:
        """Write a part behind what was sent."""


class EventStream(Response):
    """The answer to a request that streams.

    Args:
        feed: of the request, which runs already.
        reply: makes the chunks.
        options: how long to wait.
    """

    media_type = "text/event-stream"

    def __init__(self, feed: Feed, reply: Reply, options: ServeOptions) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._feed, self._reply, self._options = feed, reply, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; whatever ends it early cancels the request."""
        watcher = asyncio.create_task(wait_for_disconnect(receive, self._feed))
        pulse = _Pulse(self._options, on_silence=self._feed.wake, on_stall=lambda: abort(scope))
        writer = scope.get("extensions", {}).get(WRITER)
        direct = None if writer is None else partial(self._write, writer, pulse)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for data in self._data(direct):
                pulse.begin()
                await send({"type": "http.response.body", "body": data, "more_body": True})
                pulse.end()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientGoneError:
            scope.setdefault("state", {})["outcome"] = "disconnected"
        except SlowReaderError:
            scope.setdefault("state", {})["outcome"] = "slow reader"
            abort(scope)
            await asyncio.sleep(0)  # in which the server takes note
        finally:
            pulse.stop()
            watcher.cancel()
            self._feed.cancel()

    def _write(self, writer: BodyWriter, pulse: "_Pulse", pieces: Sequence[PieceEvent]) -> bool:
        """Write pieces at once, unless the reader is behind."""
        if not writer.ready:
            return False
        if data := _events(self._reply.chunks(pieces)):
            writer.write(data)
            pulse.end()
        return True

    async def _data(self, direct: Direct | None) -> AsyncIterator[bytes]:
        """Yield what to send, but for what `direct` takes meanwhile.

        An error while generating is the last event of its stream.
        """
        try:
            if head := self._reply.head():
                yield _events(head)
            while True:
                events = await self._feed.events(direct)
                if not events:
                    yield HEARTBEAT
                    continue
                if data := self._progress(events):
                    yield data
                if not isinstance(events[-1], PieceEvent):
                    yield _events(self._reply.tail(finished(events[-1]))) + DONE
                    return
        except ApiError as error:
            yield _events([encode_json(error.body)])

    def _progress(self, events: list[Event]) -> bytes:
        pieces = [event for event in events if isinstance(event, PieceEvent)]
        return _events(self._reply.chunks(pieces)) if pieces else b""


class _Pulse:
    """Notices streams in which nothing happens, with one timer for all of their chunks.

    Args:
        options: times.
        on_silence: called when nothing was sent for a while.
        on_stall: called when the reader has taken nothing for a while.
    """

    def __init__(
        self,
        options: ServeOptions,
        *,
        on_silence: Callable[[], None],
        on_stall: Callable[[], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._heartbeat, self._stall = options.heartbeat_seconds, options.stall_seconds
        self._on_silence, self._on_stall = on_silence, on_stall
        self._period = min(self._heartbeat, self._stall) / 2
        self._last = self._loop.time()
        self._timer = self._loop.call_later(self._period, self._check)
        self._sending = False

    def begin(self) -> None:
        """Note that a chunk is offered."""
        self._last = self._loop.time()
        self._sending = True

    def end(self) -> None:
        """Note that it was taken."""
        self._last = self._loop.time()
        self._sending = False

    def stop(self) -> None:
        """Give the timer back."""
        self._timer.cancel()

    def _check(self) -> None:
        silence = self._loop.time() - self._last
        if self._sending and silence > self._stall:
            self._on_stall()
        elif not self._sending and silence > self._heartbeat:
            self._on_silence()
        self._timer = self._loop.call_later(self._period, self._check)


async def wait_for_disconnect(receive: Receive, feed: Feed) -> None:
    """Tell the feed when the client goes; the body of the request has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
    feed.abandon()


def abort(scope: Scope) -> None:
    """Drop the connection with what it has not taken, where the server can."""
    found = scope.get("extensions", {}).get(ABORT)
    if found is not None:
        found()


def _events(chunks: Sequence[bytes]) -> bytes:
    return b"".join([b"data: %b\n\n" % chunk for chunk in chunks])
