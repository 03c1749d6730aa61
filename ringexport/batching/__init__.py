"""Continuous batching over the runner protocol: many requests share one model, step by step."""

from ringexport.batching.engine import BatchingEngine
from ringexport.batching.events import Event, FailedEvent, FinishedEvent, PieceEvent, Ticket
from ringexport.batching.options import BatchingOptions, BatchingStats

__all__ = [
    "BatchingEngine",
    "BatchingOptions",
    "BatchingStats",
    "Event",
    "FailedEvent",
    "FinishedEvent",
    "PieceEvent",
    "Ticket",
]
