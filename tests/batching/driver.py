"""Drives a loop step by step, without its thread."""

from collections.abc import Sequence

import numpy as np

from ringexport.batching.events import Event, FailedEvent, FinishedEvent, PieceEvent
from ringexport.batching.loop import Loop
from ringexport.batching.options import BatchingOptions
from ringexport.batching.request import Request
from ringexport.errors import RingExportError
from ringexport.runtime.generation import GenerationResult
from ringexport.runtime.sampling import SamplingParams
from ringexport.runtime.session import Engine

__all__ = ["ERRORS", "Driver", "Fault", "params", "prompt_of", "same"]

ERRORS = [RingExportError("bad luck"), RuntimeError("CUDA error"), MemoryError()]
"""What a runner may fail with."""


def prompt_of(size: int, seed: int = 0) -> list[int]:
    """Return ordinary tokens of the tiny model, none of them special."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, 250, size)]


class Driver:
    """A loop with its requests and their events, in the order in which they happened."""

    def __init__(self, engine: Engine, options: BatchingOptions | None = None) -> None:
        tokenizer = engine.tokenizer
        self.engine = engine
        self.loop = Loop(
            engine.runner,
            options or BatchingOptions(),
            tokenizer.stop_ids | tokenizer.special_ids,
        )
        self.events: list[tuple[Request, Event]] = []

    def add(self, prompt: Sequence[int], params: SamplingParams) -> Request:
        def on_event(event: Event) -> None:
            self.events.append((request, event))

        row = self.engine.row(prompt, params)
        request = Request(f"request-{len(self.loop.waiting)}", row, on_event)
        self.loop.waiting.append(request)
        return request

    def run(self, steps: int = 10_000) -> None:
        for _ in range(steps):
            if not self.loop.busy:
                return
            self.loop.step()
        assert steps < 10_000, "the loop does not end"

    def events_of(self, request: Request) -> list[Event]:
        return [event for owner, event in self.events if owner is request]

    def check(self, request: Request) -> None:
        """Check that the events of an ended request are in order and add up to its result."""
        *pieces, last = self.events_of(request)
        assert all(isinstance(event, PieceEvent) for event in pieces)
        if isinstance(last, FailedEvent):
            return
        assert isinstance(last, FinishedEvent)
        tokens = [token for event in pieces for token in event.token_ids]  # type: ignore[union-attr]
        text = "".join(event.text for event in pieces)  # type: ignore[union-attr]
        assert tuple(tokens) == last.result.token_ids
        assert text == last.result.text or last.result.stop_reason == "cancelled"
        assert request.ticket.result(0) is last.result


def params(count: int = 8, **more: object) -> SamplingParams:
    """Return parameters for exactly `count` tokens."""
    return SamplingParams(max_new_tokens=count, ignore_eos=True, **more)  # type: ignore[arg-type]


def same(found: GenerationResult, expected: GenerationResult) -> bool:
    """Tell whether two results differ in nothing but their timings."""
    names = ("text", "token_ids", "stop_reason", "stop_text", "prompt_tokens", "logprobs")
    return all(getattr(found, name) == getattr(expected, name) for name in names)


class Fault:
    """Fails while `on` and the tokens of a row contain `token`."""

    def __init__(self, kind: str, token: int, times: int, error: Exception) -> None:
        self.kind, self.token, self.left, self.error = kind, token, times, error

    def __call__(self, kind: str, tokens: list[int]) -> None:
        if kind == self.kind and self.token in tokens and self.left:
            self.left -= 1
            raise self.error
