"""The batching engine: takes requests from any thread, and runs them together on its own."""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from ringexport.batching.events import OnEvent, Ticket
from ringexport.batching.loop import Loop
from ringexport.batching.options import BatchingOptions, BatchingStats
from ringexport.batching.request import Request
from ringexport.errors import (
    ConfigError,
    ContextLengthError,
    EngineClosedError,
    QueueFullError,
    ShapeError,
)
from ringexport.runtime.prompt import split_prompt
from ringexport.runtime.sampling import SamplingParams
from ringexport.runtime.session import Engine

__all__ = ["BatchingEngine"]


class BatchingEngine:
    """Runs many requests on one engine; sequences join and leave between steps.

    One worker thread owns the runner while the batching engine is open: do not use the engine's
    own `generate` beside it.

    Args:
        engine: stays open when this is closed.
        options: limits.

    Attributes:
        engine: as given.
        options: as given.
    """

    def __init__(self, engine: Engine, options: BatchingOptions | None = None) -> None:
        self.engine = engine
        self.options = options or BatchingOptions()
        tokenizer = engine.tokenizer
        markers = tokenizer.stop_ids | tokenizer.special_ids
        self._loop = Loop(engine.runner, self.options, markers)
        self._changed = threading.Condition()
        self._inbox: list[Request] = []
        self._submitted = self._refused = 0
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._work, name="ringexport-batching", daemon=True)
        self._thread.start()

    @property
    def capacity(self) -> int:
        """Requests that can run or wait at once; with one more, `submit` refuses."""
        return self._loop.rows + self.options.max_queue

    @property
    def alive(self) -> bool:
        """Whether requests are taken on: not when it was closed, or its worker has ended."""
        return self._deadline is None and self._thread.is_alive()

    def submit(
        self, prompt: Sequence[int], params: SamplingParams, *, on_event: OnEvent | None = None
    ) -> Ticket:
        """Take on a request.

        Args:
            prompt: token ids, at least one.
            params: how to continue it.
            on_event: told about every token and the end, on the worker's thread, in order; it must
                not block. An exception of it cancels the request and touches no other.

        Raises:
            QueueFullError: too many requests wait already.
            ConfigError: an empty prompt, or more new tokens than the options allow.
            ContextLengthError: a prompt longer than the context.
            ShapeError: a token id out of range.
            EngineClosedError: the engine is closed or closing.
        """
        ids = self._checked(prompt, params)
        row = self.engine.row(ids, params)
        with self._changed:
            if self._deadline is not None:
                raise _closed("the engine takes no requests any more")
            if self._submitted - self._loop.ended >= self.capacity:
                self._refused += 1
                message = f"{self.capacity:,} requests are running or waiting already"
                raise QueueFullError(message, hint="try again later")
            self._submitted += 1
            request = Request(f"request-{self._submitted}", row, on_event)
            self._inbox.append(request)
            self._changed.notify()
        return request.ticket

    def stats(self) -> BatchingStats:
        """Return what has happened so far."""
        with self._changed:
            stats = self._loop.stats()
            waiting = stats.waiting + len(self._inbox)
            return replace(stats, waiting=waiting, submitted=self._submitted, refused=self._refused)

    def close(self, *, drain_seconds: float = 0.0) -> None:
        """Refuse new requests, let those taken on go on for a while, then end the rest.

        A step that has begun is not interrupted. A second close can only shorten the while.

        Args:
            drain_seconds: how long; requests that are left fail with EngineClosedError.
        """
        deadline = time.monotonic() + drain_seconds
        with self._changed:
            self._deadline = deadline if self._deadline is None else min(deadline, self._deadline)
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _work(self) -> None:
        """Run the loop until the engine is closed; the worker's thread."""
        try:
            while self._take_requests():
                self._loop.step()
        finally:
            with self._changed:
                self._deadline = self._deadline or 0.0
                self._loop.waiting.extend(self._inbox)
                self._inbox.clear()
            self._loop.end_all(_closed("the engine was shut down before the request ended"))

    def _take_requests(self) -> bool:
        """Wait for something to do and take it over; False to end."""
        with self._changed:
            while not (self._inbox or self._loop.busy or self._deadline is not None):
                self._changed.wait()
            self._loop.waiting.extend(self._inbox)
            self._inbox.clear()
            if self._deadline is None:
                return True
            return self._loop.busy and time.monotonic() < self._deadline

    def _checked(self, prompt: Sequence[int], params: SamplingParams) -> list[int]:
        """Refuse what could only fail later."""
        kind, ids = split_prompt(prompt)
        if kind != "ids":
            raise ConfigError("the prompt is no token ids", hint="encode it with Engine.encode")
        spec = self.engine.runner.spec
        if len(ids) > spec.context_length:
            raise ContextLengthError(
                f"the prompt has {len(ids):,} tokens, the context of this model holds"
                f" {spec.context_length:,}",
                hint="shorten the prompt",
            )
        if min(ids) < 0 or max(ids) >= spec.vocab_size:
            raise ShapeError(
                f"the prompt has token ids from {min(ids)} to {max(ids)}, the vocabulary has"
                f" {spec.vocab_size} ids, from 0",
                hint="use the tokenizer of the same checkpoint",
            )
        limit = self.options.max_new_tokens_limit
        if limit is not None and params.max_new_tokens > limit:
            raise ConfigError(
                f"max_new_tokens is {params.max_new_tokens}, at most {limit} are allowed here"
            )
        return ids


def _closed(message: str) -> EngineClosedError:
    return EngineClosedError(message, hint="open a new one")
