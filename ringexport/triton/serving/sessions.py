"""Sessions by correlation id: what each has said so far, a bounded number, an idle time-out."""

import threading
import time
from collections.abc import Callable, Sequence

from ringexport.errors import ConfigError, RingExportError

__all__ = ["SessionBusyError", "SessionLimitError", "SessionTable", "Turn", "UnknownSessionError"]

SessionId = int | str


class UnknownSessionError(RingExportError):
    """A session that was never started, has ended, or was idle for too long."""


class SessionBusyError(RingExportError):
    """A session whose last request is still being answered."""


class SessionLimitError(RingExportError):
    """No room for one more session; later there is."""


class Turn:
    """One request of a session, from its start until `finish` or `abort`.

    Attributes:
        session_id: which session it belongs to.
        history: tokens of the earlier turns, the model's own included.
        cancel: called if the session is started anew before this turn has ended.
    """

    def __init__(
        self, table: "SessionTable", session_id: SessionId, history: Sequence[int], *, last: bool
    ) -> None:
        self.session_id = session_id
        self.history = tuple(history)
        self.cancel: Callable[[], None] = _nothing
        self.last = last
        self._table = table

    def finish(self, tokens: Sequence[int]) -> None:
        """End the turn; the session has now seen `tokens`, its history included."""
        self._table.release(self, tokens)

    def abort(self) -> None:
        """End the turn; the session is as it was before."""
        self._table.release(self, None)


def _nothing() -> None:
    """Stand in until there is something to cancel."""


class _Session:
    """What the table keeps of a session."""

    __slots__ = ("tokens", "turn", "used")

    def __init__(self) -> None:
        self.tokens: tuple[int, ...] | None = None
        self.turn: Turn | None = None
        self.used = 0.0


class SessionTable:
    """All sessions of an instance. Its methods may be called from any thread.

    Args:
        limit: number of sessions.
        idle_seconds: a session that no request has used for so long is forgotten.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        *,
        limit: int,
        idle_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = limit
        self._idle_seconds = idle_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._sessions: dict[SessionId, _Session] = {}

    def __len__(self) -> int:
        with self._lock:
            return len(self._sessions)

    def begin(self, session_id: SessionId, *, start: bool, last: bool) -> Turn:
        """Start a turn.

        Args:
            session_id: which session.
            start: forget what the session has seen, and cancel its running turn, if it exists.
            last: the session ends with this turn.

        Raises:
            ConfigError: sessions are turned off.
            UnknownSessionError: no such session, and `start` is not set.
            SessionBusyError: its last turn runs, and `start` is not set.
            SessionLimitError: it would be one session too many.
        """
        if self._limit == 0:
            raise ConfigError(
                "this model keeps no sessions, but the request has a correlation id",
                hint="set the parameter max_sessions in config.pbtxt",
            )
        with self._lock:
            self._expire()
            before = self._sessions.get(session_id)
            session = self._started(session_id, before) if start else self._known(session_id)
            turn = Turn(self, session_id, session.tokens or (), last=last)
            session.turn = turn
            running = before.turn if start and before is not None else None
        if running is not None:
            running.cancel()
        return turn

    def expire(self) -> int:
        """Forget idle sessions and return how many."""
        with self._lock:
            return self._expire()

    def release(self, turn: Turn, tokens: Sequence[int] | None) -> None:
        """End a turn; one whose session was started anew, or has ended, changes nothing.

        Args:
            turn: the turn.
            tokens: what the session has seen now; None for what it had seen before.
        """
        with self._lock:
            session = self._sessions.get(turn.session_id)
            if session is None or session.turn is not turn:
                return
            session.turn = None
            session.used = self._clock()
            if tokens is not None:
                session.tokens = tuple(tokens)
            if turn.last or session.tokens is None:
                del self._sessions[turn.session_id]

    def _started(self, session_id: SessionId, before: _Session | None) -> _Session:
        if before is None and len(self._sessions) >= self._limit:
            raise SessionLimitError(
                f"there are {self._limit} sessions, as many as this model keeps",
                hint="end sessions that are over, wait, or set the parameter max_sessions",
            )
        session = self._sessions[session_id] = _Session()
        return session

    def _known(self, session_id: SessionId) -> _Session:
        session = self._sessions.get(session_id)
        if session is None:
            raise UnknownSessionError(
                f"there is no session {session_id}: it was not started, has ended, or was idle"
                f" for more than {self._idle_seconds:g} seconds",
                hint="set the start flag, and send the whole text",
            )
        if session.turn is not None:
            raise SessionBusyError(
                f"the last request of session {session_id} is still being answered",
                hint="wait for its last response, or start the session anew",
            )
        return session

    def _expire(self) -> int:
        oldest = self._clock() - self._idle_seconds
        idle = [
            session_id
            for session_id, session in self._sessions.items()
            if session.turn is None and session.used < oldest
        ]
        for session_id in idle:
            del self._sessions[session_id]
        return len(idle)
