"""Numbers for Prometheus; each server has its own."""

from collections.abc import Callable, Iterator
from dataclasses import fields

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ringexport.batching import BatchingStats

__all__ = ["Metrics"]

GAUGES = ("running", "waiting", "cache_entries", "cache_bytes")
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
HELP = {
    "running": "Requests that are being read or continued.",
    "waiting": "Requests in the queue.",
    "submitted": "Requests that were taken on.",
    "refused": "Requests that found the queue full.",
    "finished": "Requests that ended by themselves.",
    "cancelled": "Requests whose client had gone, or read too slowly.",
    "failed": "Requests that ended with an error of the model.",
    "prompt_tokens": "Tokens of prompts that were read, cached ones included.",
    "cached_tokens": "Tokens of prompts that came from the prefix cache.",
    "generated_tokens": "Tokens that were chosen.",
    "steps": "Turns of the loop that reads prompts and continues requests.",
    "decode_steps": "Calls of the model that gave all running requests a token.",
    "cache_hits": "Prompts of which the prefix cache held a part.",
    "cache_misses": "Prompts of which the prefix cache held nothing.",
    "cache_entries": "States in the prefix cache.",
    "cache_bytes": "Memory of the states in the prefix cache.",
    "cache_evictions": "States that left the prefix cache to make room for others.",
}


class Metrics:
    """Counts requests, and asks the batching engine for its own counts.

    Args:
        stats: called for every scrape.
    """

    def __init__(self, stats: Callable[[], BatchingStats]) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_StatsCollector(stats))
        self._requests = Counter(
            "ringexport_http_requests",
            "Requests that were answered; 499 if the client had gone.",
            ["path", "status"],
            registry=self._registry,
        )
        self._open = Gauge(
            "ringexport_http_requests_open", "Requests in work.", registry=self._registry
        )
        self._seconds = Histogram(
            "ringexport_http_request_seconds",
            "Time from a request to the end of its answer.",
            ["path"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._first_token = Histogram(
            "ringexport_time_to_first_token_seconds",
            "Time from a request to its first token.",
            buckets=SECONDS,
            registry=self._registry,
        )

    def started(self) -> None:
        """Count a request that begins."""
        self._open.inc()

    def ended(self, path: str, status: int, seconds: float) -> None:
        """Count a request that ended; `path` is one of a few."""
        self._open.dec()
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def first_token(self, seconds: float) -> None:
        """Count a first token."""
        self._first_token.observe(seconds)

    def render(self) -> bytes:
        """Return the text that Prometheus reads."""
        return generate_latest(self._registry)


class _StatsCollector(Collector):
    """The counts of a batching engine, at the moment of a scrape."""

    def __init__(self, stats: Callable[[], BatchingStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for field in fields(stats):
            name, value = f"ringexport_{field.name}", getattr(stats, field.name)
            family = GaugeMetricFamily if field.name in GAUGES else CounterMetricFamily
            yield family(name, HELP[field.name], value=value)
