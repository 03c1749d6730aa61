"""The events of one request on their way from the worker's thread to the event loop."""

import asyncio
import threading
from collections.abc import Callable, Sequence

from ringexport.batching import Event, FinishedEvent, PieceEvent, Ticket
from ringexport.runtime.generation import GenerationResult
from ringexport.serve.errors import ApiError, translated

__all__ = ["ClientGoneError", "Direct", "Feed", "Hub", "SlowReaderError", "finished"]

Direct = Callable[[Sequence[PieceEvent]], bool]
"""Takes pieces, on the event loop; False if somebody has to wait before they can be taken."""


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class SlowReaderError(Exception):
    """The client reads much slower than the model writes."""


_PAUSE_SECONDS = 0.01
"""Between two rounds of a hub. Fast steps share a round: with 128 streams and a step every 7 ms, a
round for each step would take a whole core."""


class Hub:
    """Wakes many feeds with one call of the event loop; a step of the model feeds all of them.

    Make it on the event loop.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._calls: list[Callable[[], None]] = []
        self._earliest = 0.0

    def call(self, function: Callable[[], None]) -> None:
        """Call a function on the event loop soon; from any thread."""
        with self._lock:
            self._calls.append(function)
            if len(self._calls) > 1:
                return
        self._loop.call_soon_threadsafe(self._plan)

    def _plan(self) -> None:
        self._loop.call_at(max(self._earliest, self._loop.time()), self._run)

    def _run(self) -> None:
        self._earliest = self._loop.time() + _PAUSE_SECONDS
        with self._lock:
            calls, self._calls = self._calls, []
        for function in calls:
            function()


class Feed:
    """Collects the events of a request without ever making the worker wait.

    Make it on the event loop; `on_event` is called on the worker's thread, all else on the loop.

    Args:
        hub: of the event loop.
        most: pieces that may wait; with one more the request is cancelled.
        pieces: whether pieces are wanted; without them only the end is.
        on_overflow: called on the event loop when too many pieces wait.
        on_first_token: called by the worker when the first token is there.
    """

    def __init__(
        self,
        hub: Hub,
        *,
        most: int,
        pieces: bool,
        on_overflow: Callable[[], None],
        on_first_token: Callable[[], None],
    ) -> None:
        self._hub = hub
        self._most, self._wanted = most, pieces
        self._on_overflow, self._on_first_token = on_overflow, on_first_token
        self._has_token = False
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._woken = asyncio.Event()
        self._scheduled = False
        self._overflowed = False
        self._abandoned = False
        self._ticket: Ticket | None = None
        self._direct: Direct | None = None
        self._error: Exception | None = None

    def start(self, ticket: Ticket) -> None:
        """Remember what to cancel."""
        self._ticket = ticket

    def on_event(self, event: Event) -> None:
        """Take an event over from the worker."""
        if isinstance(event, PieceEvent):
            if not self._has_token:
                self._has_token = True
                self._on_first_token()
            if not self._wanted:
                return
        with self._lock:
            if self._overflowed:
                return
            self._overflowed = len(self._events) >= self._most
            if self._overflowed:
                self._events.clear()
            else:
                self._events.append(event)
            if self._scheduled and not self._overflowed:
                return
            self._scheduled = True
        self._hub.call(self._overflow if self._overflowed else self._arrived)

    async def events(self, direct: Direct | None = None) -> list[Event]:
        """Wait for new events; there may be none if `wake` was called.

        Args:
            direct: takes pieces while this waits, which saves the way through a task; what it does
                not take, and the end, is returned.

        Raises:
            ClientGoneError, SlowReaderError: there is no sense in going on.
            Exception: what `direct` has raised.
        """
        self._direct = direct
        try:
            await self._woken.wait()
        finally:
            self._direct = None
        self._woken.clear()
        if self._error is not None:
            raise self._error
        if self._abandoned:
            raise ClientGoneError
        with self._lock:
            events, self._events, self._scheduled = self._events, [], False
        if self._overflowed:
            raise SlowReaderError
        return events

    async def result(self) -> GenerationResult:
        """Wait for the end.

        Raises:
            ApiError: the request failed.
            ClientGoneError: the client has gone.
        """
        while True:
            for event in await self.events():
                if not isinstance(event, PieceEvent):
                    return finished(event)

    def wake(self) -> None:
        """End the wait for events."""
        self._woken.set()

    def abandon(self) -> None:
        """Stop waiting: the client has gone."""
        self._abandoned = True
        self.wake()

    def cancel(self) -> None:
        """End the request, if it has not ended."""
        if self._ticket is not None:
            self._ticket.cancel()

    def _arrived(self) -> None:
        """Pass new pieces on, or wake who waits for them."""
        direct = self._direct
        if direct is None or self._woken.is_set():
            self.wake()
            return
        with self._lock:
            events, self._events, self._scheduled = self._events, [], False
        pieces = [event for event in events if isinstance(event, PieceEvent)]
        try:
            taken = len(pieces) == len(events) and direct(pieces)
        except Exception as error:  # noqa: BLE001 - `events` raises it, in the task of the stream
            self._error, taken = error, False
        if not taken:
            with self._lock:
                self._events, self._scheduled = events + self._events, True
            self.wake()

    def _overflow(self) -> None:
        self.wake()
        self.cancel()
        self._on_overflow()


def finished(event: Event) -> GenerationResult:
    """Return the result of a last event.

    Raises:
        ApiError: the request failed, or was cancelled by the server.
    """
    if not isinstance(event, FinishedEvent):
        assert not isinstance(event, PieceEvent)
        raise translated(event.error)
    if event.result.stop_reason == "cancelled":
        raise ApiError("the request was cancelled", status=500, code="cancelled")
    return event.result
