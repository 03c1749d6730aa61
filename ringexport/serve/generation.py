"""The events of one request on their way from the worker's thread to the event loop."""

import asyncio
from collections import deque
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


_REST = 3.0
"""Of a hub after a round, in times of what the round took. The worker needs the interpreter, too: a
model that is faster than its streams gets fewer events of more tokens, and is not held up."""
_LONGEST_REST_SECONDS = 0.05


class Hub:
    """Carries the events of many feeds to the event loop, in rounds; a step feeds all of them.

    Make it on the event loop.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[Feed, Event]] = deque()
        self._planned = False
        self._earliest = 0.0

    def send(self, feed: "Feed", event: Event) -> None:
        """Give an event to a feed on the event loop soon; from any thread."""
        self._events.append((feed, event))
        if not self._planned:
            self._planned = True
            self._loop.call_soon_threadsafe(self._plan)

    def _plan(self) -> None:
        self._loop.call_at(max(self._earliest, self._loop.time()), self._run)

    def _run(self) -> None:
        began = self._loop.time()
        self._planned = False  # before the queue is emptied: what comes behind that plans again
        feeds: dict[Feed, None] = {}
        for _ in range(len(self._events)):
            feed, event = self._events.popleft()
            feed.take(event)
            feeds[feed] = None
        for feed in feeds:
            feed.deliver()
        ended = self._loop.time()
        self._earliest = ended + min(_REST * (ended - began), _LONGEST_REST_SECONDS)


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
        self._events: list[Event] = []
        self._woken = asyncio.Event()
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
        self._hub.send(self, event)

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
        if self._overflowed:
            raise SlowReaderError
        events, self._events = self._events, []
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

    def take(self, event: Event) -> None:
        """Take an event over from the hub; `deliver` follows."""
        self._events.append(event)

    def deliver(self) -> None:
        """Pass on what was taken, or wake who waits for it."""
        if self._overflowed or self._pass_on():
            self._events.clear()
            return
        if len(self._events) > self._most:
            self._overflowed = True
            self._events.clear()
            self.cancel()
            self._on_overflow()
        self.wake()

    def _pass_on(self) -> bool:
        direct = self._direct
        if direct is None or self._woken.is_set():
            return False
        pieces = [event for event in self._events if isinstance(event, PieceEvent)]
        try:
            return len(pieces) == len(self._events) and direct(pieces)
        except Exception as error:  # noqa: BLE001 - `events` raises it, in the task of the stream
            self._error = error
            return False


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
