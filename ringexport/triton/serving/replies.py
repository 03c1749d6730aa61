"""The way back: events of the batching engine become responses, on a thread of their own.

The batching engine must never wait for a client. It leaves its events with the `Reply`, and the
`Outbox` sends what has come together since the last time.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ringexport.batching.events import Event, FailedEvent, PieceEvent, Ticket
from ringexport.errors import (
    CheckpointError,
    ConfigError,
    EngineClosedError,
    QueueFullError,
    RingExportError,
    ShapeError,
)
from ringexport.runtime.generation import GenerationResult
from ringexport.triton.serving.sessions import (
    SessionBusyError,
    SessionLimitError,
    Turn,
    UnknownSessionError,
)

__all__ = ["OnEnd", "Outbox", "Reply", "turn_ended"]

Api = Any  # triton_python_backend_utils, which exists only inside of Triton
Sender = Any  # its InferenceResponseSender
OnEnd = Callable[[GenerationResult | None], None]
End = GenerationResult | RingExportError | str
"""How a request ends; a text is the finish reason of one that there is nothing to compute for."""

SESSION_END = "session_end"

_CODES: tuple[tuple[str, tuple[type[RingExportError], ...]], ...] = (
    ("NOT_FOUND", (UnknownSessionError,)),
    ("UNAVAILABLE", (QueueFullError, EngineClosedError, SessionLimitError, SessionBusyError)),
    ("INVALID_ARG", (ConfigError, ShapeError, CheckpointError)),
)


class Reply:
    """Everything that goes back to one request.

    Args:
        api: the module triton_python_backend_utils.
        sender: of the request.
        outbox: sends it.

    Attributes:
        stream: a response for each piece, instead of one at the end.
        prompt_tokens: reported to the client.
        on_end: called once, before the last response can be sent, with the result if there is one.
        ticket: of the batching engine, once that has taken the request on.
    """

    def __init__(self, api: Api, sender: Sender, outbox: "Outbox") -> None:
        self.stream = False
        self.prompt_tokens = 0
        self.on_end: OnEnd = _nothing
        self.ticket: Ticket | None = None
        self._api = api
        self._sender = sender
        self._outbox = outbox
        self._lock = threading.Lock()
        # Triton dies if a request is asked whether it is cancelled while its last response is sent.
        self._sender_lock = threading.Lock()
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._count = 0
        self._end: End | None = None
        self._queued = False
        self._closed = False

    def on_event(self, event: Event) -> None:
        """Take an event of the batching engine; never waits."""
        if isinstance(event, PieceEvent):
            with self._lock:
                self._texts.append(event.text)
                self._ids += event.token_ids
            if not self.stream:
                return
        elif isinstance(event, FailedEvent):
            self.on_end(None)
            self._end = event.error
        else:
            self.on_end(event.result)
            self._end = event.result
        self._enqueue()

    def fail(self, error: RingExportError) -> None:
        """End the request, which never ran, with an error.

        Triton unloads a model only when all requests are freed, so the error may not hold frames.
        """
        self._end = error.with_traceback(None)
        error.__cause__ = error.__context__ = None
        self._enqueue()

    def end_session(self) -> None:
        """Answer a request that only ends its session."""
        self._end = SESSION_END
        self._enqueue()

    def cancel(self) -> None:
        """End the request soon; nothing happens if it has not been taken on, or has ended."""
        ticket = self.ticket
        if ticket is not None:
            ticket.cancel()

    def poll(self) -> None:
        """Cancel the request if its client has."""
        with self._sender_lock:
            if self._closed or not self._sender.is_cancelled():
                return
        self.cancel()

    def send(self) -> None:
        """Send what has come together; only the outbox calls this."""
        with self._lock:
            texts, ids, end = self._texts, self._ids, self._end
            self._texts, self._ids, self._queued = [], [], False
            self._count += len(ids)
        with self._sender_lock:
            if self._closed:
                return
            if end is None:
                self._sender.send(self._response(texts, ids))
                return
            self._closed = True
            try:
                self._sender.send(
                    self._last_response(texts, ids, end),
                    flags=self._api.TRITONSERVER_RESPONSE_COMPLETE_FINAL,
                )
            finally:  # not when the garbage collector comes: Triton waits for it to unload
                self._sender = self.ticket = None
                self.on_end = _nothing

    def _enqueue(self) -> None:
        with self._lock:
            if self._queued:
                return
            self._queued = True
        self._outbox.put(self)

    def _last_response(self, texts: Sequence[str], ids: Sequence[int], end: End) -> object:
        if isinstance(end, str):
            return self._response(texts, ids, end)
        if isinstance(end, RingExportError):
            return self._error(_code(end), self._told(end))
        if end.stop_reason == "cancelled":
            return self._error("CANCELLED", "the request was cancelled")
        return self._response(texts, ids, end.stop_reason, cached=end.cached_tokens)

    def _told(self, error: RingExportError) -> str:
        """Return what the client is told; paths of the server are for its log alone."""
        if not isinstance(error, CheckpointError):
            return str(error)
        self._api.Logger.log_warn(f"a request was refused: {error}")
        return "the chat template of the model cannot be used with these messages"

    def _error(self, code: str, message: str) -> object:
        kind = self._api.TritonError
        return self._api.InferenceResponse(error=kind(message, getattr(kind, code)))

    def _response(
        self, texts: Sequence[str], ids: Sequence[int], finish_reason: str = "", cached: int = 0
    ) -> object:
        tensor = self._api.Tensor
        return self._api.InferenceResponse(
            output_tensors=[
                tensor("text_output", _string("".join(texts))),
                tensor("token_ids", np.array(ids, dtype=np.int64)),
                tensor("finish_reason", _string(finish_reason)),
                tensor("prompt_tokens", np.array([self.prompt_tokens], dtype=np.int32)),
                tensor("completion_tokens", np.array([self._count], dtype=np.int32)),
                tensor("cached_tokens", np.array([cached], dtype=np.int32)),
            ]
        )


def _nothing(result: GenerationResult | None) -> None:
    """Tell nobody."""
    del result


def turn_ended(turn: Turn | None, prompt: Sequence[int]) -> OnEnd:
    """Return what tells a session about the end of its turn.

    Args:
        turn: None for a request without a session.
        prompt: tokens that the engine was given, the session's history included.
    """

    def ended(result: GenerationResult | None) -> None:
        if turn is None:
            return
        if result is None:
            turn.abort()
        else:
            turn.finish((*prompt, *result.token_ids))

    return ended


class Outbox:
    """One thread that sends responses.

    Args:
        api: the module triton_python_backend_utils.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        self._queue: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="ringexport-outbox", daemon=True)
        self._thread.start()

    def put(self, reply: Reply) -> None:
        """Have a reply send what it has."""
        self._queue.put(reply)

    def close(self) -> None:
        """Send what is waiting, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (reply := self._queue.get()) is not None:
            try:
                reply.send()
            except self._api.TritonModelException as error:  # the other replies go on
                reply.cancel()
                self._api.Logger.log_warn(f"a response could not be sent: {error}")


def _code(error: RingExportError) -> str:
    for code, kinds in _CODES:
        if isinstance(error, kinds):
            return code
    return "INTERNAL"


def _string(text: str) -> np.ndarray[Any, np.dtype[np.object_]]:
    return np.array([text.encode()], dtype=np.object_)
