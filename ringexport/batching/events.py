"""What the owner of a request gets: a ticket, and events in the order in which they happen."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from ringexport.errors import RingExportError
from ringexport.runtime.generation import GenerationResult
from ringexport.runtime.sampling import TokenLogprobs

__all__ = ["Event", "FailedEvent", "FinishedEvent", "OnEvent", "PieceEvent", "Ticket"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceEvent:
    """A request has new tokens, and mostly new text.

    Attributes:
        text: what can be shown now; empty while a character or a stop text may be incomplete.
        token_ids: the chosen tokens, special ones included.
        logprobs: one per token if the request asked for them, else empty.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedEvent:
    """The request has ended, by itself or because it was cancelled; the last event."""

    result: GenerationResult


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedEvent:
    """The request cannot go on; the last event."""

    error: RingExportError


Event = PieceEvent | FinishedEvent | FailedEvent
OnEvent = Callable[[Event], None]


class Ticket:
    """A request that a batching engine has taken on. All methods may be called from any thread.

    Args:
        id: names the request in logs; unique in its engine.
        cancel: called by `cancel`.

    Attributes:
        id: as given.
    """

    def __init__(self, id: str, cancel: Callable[[], None]) -> None:  # noqa: A002 - it is the id
        self.id = id
        self._cancel = cancel
        self._ended = threading.Event()
        self._outcome: GenerationResult | RingExportError | None = None

    @property
    def done(self) -> bool:
        """Whether the request has ended, however it did."""
        return self._ended.is_set()

    def cancel(self) -> None:
        """End the request soon, unless it has ended; its result says "cancelled"."""
        if not self.done:
            self._cancel()

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Wait for the end of the request.

        Args:
            timeout: seconds to wait at most.

        Raises:
            RingExportError: what the request failed with.
            TimeoutError: it has not ended yet.
        """
        if not self._ended.wait(timeout):
            raise TimeoutError(f"request {self.id} has not ended within {timeout} seconds")
        outcome = self._outcome
        if isinstance(outcome, RingExportError):
            raise outcome
        assert outcome is not None
        return outcome

    def resolve(self, outcome: GenerationResult | RingExportError) -> None:
        """End the wait; only the engine calls this, once."""
        self._outcome = outcome
        self._ended.set()
