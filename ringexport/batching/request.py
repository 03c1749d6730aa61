"""One request on its way through the loop."""

import logging
from collections.abc import Callable
from typing import Literal, TypeVar

from ringexport.batching.events import (
    Event,
    FailedEvent,
    FinishedEvent,
    OnEvent,
    PieceEvent,
    Ticket,
)
from ringexport.batching.prefix_cache import PrefixNode
from ringexport.errors import RingExportError
from ringexport.runtime.choosing import ChosenTokens
from ringexport.runtime.generation import GenerationResult, Row
from ringexport.runtime.state import DecodeState

__all__ = ["Request", "as_own_error", "guarded"]

log = logging.getLogger(__name__)

T = TypeVar("T")


def guarded(action: Callable[[], T]) -> T | RingExportError:
    """Return what `action` returns, or what it fails with.

    One request must not take the others down: backends and callbacks of users can raise anything.
    """
    try:
        return action()
    except Exception as error:  # noqa: BLE001 - it is logged
        return as_own_error(error)


def as_own_error(error: Exception) -> RingExportError:
    """Return what a request fails with after an exception, which is logged if nobody expects it."""
    if isinstance(error, RingExportError):
        return error
    log.error("a request failed with an error that nobody expected", exc_info=error)
    text = f"{type(error).__name__}: {error}"
    return RingExportError(f"internal error: {text:.400}", hint="this is a bug; report it")


class Request:
    """A prompt that is read chunk by chunk, and then continued.

    Args:
        id: names it.
        row: chooses the tokens.
        on_event: told about tokens and the end.

    Attributes:
        row: as given.
        ticket: for the owner.
        phase: where it is in the loop.
        cancelled: set from any thread; the loop ends the request at its next step.
        tokens: what the state must have seen before the next token can be chosen: the prompt, and
            after a lost state also the tokens that were generated.
        read: how many of them it has seen.
        state: of one row, while the prompt is read.
        node: the cached prefix that has the `read` tokens; None if the cache does not follow.
        suspect: its state was lost in a failed step; it takes its next step alone.
        steps: tokens that were chosen, or are being chosen by steps that were started.
        attempt: how often its state was lost; steps of earlier attempts do not count any more.
    """

    def __init__(self, id: str, row: Row, on_event: OnEvent | None = None) -> None:  # noqa: A002
        self.row = row
        self.ticket = Ticket(id, self._cancel)
        self.phase: Literal["waiting", "reading", "running", "ended"] = "waiting"
        self.cancelled = False
        self.tokens = row.prompt
        self.read = 0
        self.state: DecodeState | None = None
        self.node: PrefixNode | None = None
        self.suspect = False
        self.steps = self.attempt = 0
        self._on_event = on_event

    def rewind(self) -> None:
        """Begin anew with a state that is empty, after the present one was lost."""
        self.tokens = self.row.prompt + self.row.token_ids
        self.read, self.state, self.node = 0, None, None
        self.suspect = True
        self.steps = len(self.row.token_ids)
        self.attempt += 1
        self.phase = "reading"

    def accept(self, chosen: ChosenTokens, index: int, *, context_full: bool) -> None:
        """Take over the next token and tell the owner.

        Args:
            chosen: the tokens of a step.
            index: which of them is this request's.
            context_full: the chosen token cannot be fed any more.

        Raises:
            RingExportError: logits that are not finite.
        """
        row = self.row
        text = row.accept(chosen, index)
        if context_full and row.stop_reason is None:
            text += row.finish("context")
        logprobs = tuple(row.logprobs[-1:])
        self.tell(PieceEvent(text=text, token_ids=(chosen.ids[index],), logprobs=logprobs))

    def end(self, outcome: GenerationResult | RingExportError) -> None:
        """Give the owner the result or the error; the last thing that happens."""
        if isinstance(outcome, RingExportError):
            self.tell(FailedEvent(error=outcome))
        else:
            self.tell(FinishedEvent(result=outcome))
        self.ticket.resolve(outcome)

    def tell(self, event: Event) -> None:
        """Give the owner an event; an owner who fails is not asked again."""
        if self._on_event is None:
            return
        try:
            self._on_event(event)
        except Exception as error:  # noqa: BLE001 - it is logged
            as_own_error(error)
            self._on_event = None
            self.cancelled = True

    def _cancel(self) -> None:
        self.cancelled = True
