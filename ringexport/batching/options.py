"""What a batching engine may use, and what it counts."""

from dataclasses import dataclass

from ringexport.errors import ConfigError

__all__ = ["BatchingOptions", "BatchingStats"]

MAX_ROWS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingOptions:
    """Limits of a batching engine.

    Attributes:
        max_batch: requests that run at once, 1 to 128; fewer if the runner holds fewer.
        max_queue: requests that may wait besides; one more is refused with QueueFullError.
        token_budget: prompt tokens that are read between two decode steps; None for as many as suit
            the runner, and more while few requests decode beside those that wait for their first.
        prefix_cache_bytes: memory for states of prompts that may come again; 0 for no cache.
        max_new_tokens_limit: refuse requests that ask for more tokens than this.

    Raises:
        ConfigError: a value out of range.
    """

    max_batch: int = 32
    max_queue: int = 256
    token_budget: int | None = None
    prefix_cache_bytes: int = 256 << 20
    max_new_tokens_limit: int | None = None

    def __post_init__(self) -> None:
        _check("max_batch", self.max_batch, 1, MAX_ROWS)
        _check("max_queue", self.max_queue, 0, None)
        if self.token_budget is not None:
            _check("token_budget", self.token_budget, 1, None)
        _check("prefix_cache_bytes", self.prefix_cache_bytes, 0, None)
        if self.max_new_tokens_limit is not None:
            _check("max_new_tokens_limit", self.max_new_tokens_limit, 0, None)


def _check(name: str, value: int, low: int, high: int | None) -> None:
    if type(value) is not int or value < low or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"{low} to {high}"
        raise ConfigError(f"{name} is {value!r:.80}, expected {expected}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingStats:
    """Counts of a batching engine. The first two are of this moment, the others since it began.

    Attributes:
        running: requests whose prompt is being read or that are being continued.
        waiting: requests in the queue.
        submitted: requests that were taken on.
        refused: requests that found the queue full.
        finished: requests that ended by themselves.
        cancelled: requests that their owner ended.
        failed: requests that ended with an error.
        prompt_tokens: tokens of the prompts that were read, cached ones included.
        cached_tokens: prompt tokens that came from the prefix cache.
        generated_tokens: chosen tokens.
        steps: turns of the loop that did some work.
        decode_steps: calls that advanced all running requests by a token.
        cache_hits: prompts of which the prefix cache held a part.
        cache_misses: prompts of which it held nothing.
        cache_entries: states in the prefix cache, at this moment.
        cache_bytes: their memory, at this moment.
        cache_evictions: states that made room for others.
    """

    running: int = 0
    waiting: int = 0
    submitted: int = 0
    refused: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    decode_steps: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    cache_entries: int = 0
    cache_bytes: int = 0
    cache_evictions: int = 0
