"""Measure serving with ring-nano and write the tables into docs/performance.md.

    python benchmarks/serving.py [--bundle DIRECTORY] [--seconds 120] [--clients 64] [--print-only]

First the batching engine alone: throughput of many requests at once, and what the prefix cache
saves; each figure is the best of some repetitions. Then the server over HTTP under load, where
every answer is compared with its solo run. Run it on a machine that does nothing else.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import serving_load
from tables import markdown, replace

from ringexport import Engine, SamplingParams
from ringexport.batching import BatchingEngine, BatchingOptions, Event, PieceEvent
from ringexport.compare.conditions import measurement_conditions
from ringexport.runtime.registry import RunnerOptions

MODEL = Path(__file__).parents[1] / "models" / "ring-nano"
REPEATS = 3
NEW_TOKENS = 128
CLIENTS = (1, 2, 4, 8, 16, 32, 64)
SHARED_TOKENS = 2000
QUESTIONS = 20
TEXT = "The traveller came to a village at the foot of the mountains, and asked for the way. "


@contextmanager
def batching(engine: Engine, *, cache: bool) -> Iterator[BatchingEngine]:
    """Open a batching engine for as many requests as the largest measurement has."""
    cache_bytes = BatchingOptions().prefix_cache_bytes if cache else 0
    options = BatchingOptions(max_batch=max(CLIENTS), prefix_cache_bytes=cache_bytes)
    with BatchingEngine(engine, options) as opened:
        yield opened


def tokens_per_second(opened: BatchingEngine, clients: int) -> float:
    """Return generated tokens over wall time, prompts included, of requests sent at once."""
    params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    prompts = [opened.engine.encode(f"{number}. {TEXT}") for number in range(clients)]
    start = time.perf_counter()
    tickets = [opened.submit(prompt, params) for prompt in prompts]
    tokens = sum(ticket.result().new_tokens for ticket in tickets)
    return tokens / (time.perf_counter() - start)


def throughput(engine: Engine) -> dict[int, float]:
    """Return number of requests at once -> tokens per second."""
    best = dict.fromkeys(CLIENTS, 0.0)
    with batching(engine, cache=False) as opened:
        tokens_per_second(opened, 1)
        for _ in range(REPEATS):
            for clients in CLIENTS:
                best[clients] = max(best[clients], tokens_per_second(opened, clients))
    return best


def first_token_ms(opened: BatchingEngine, prompt: list[int]) -> float:
    """Return the time from the request to its first token."""
    arrived: list[float] = []

    def on_event(event: Event) -> None:
        if isinstance(event, PieceEvent):
            arrived.append(time.perf_counter())

    start = time.perf_counter()
    opened.submit(prompt, SamplingParams(max_new_tokens=1), on_event=on_event).result()
    return 1e3 * (arrived[0] - start)


def prefix_questions(engine: Engine) -> list[list[int]]:
    """Return prompts that share their first SHARED_TOKENS tokens."""
    text = "".join(f"{number}. {TEXT}" for number in range(SHARED_TOKENS))
    shared = engine.encode(text)[:SHARED_TOKENS]
    asked = [f" Question {n}: how long is the way to house {n}?" for n in range(QUESTIONS)]
    return [shared + engine.encode(text) for text in asked]


def prefix_cache(engine: Engine) -> tuple[float, float, float]:
    """Return the times to the first token: first question, median of the others, and no cache."""
    prompts = prefix_questions(engine)
    first, others, without = [], [], []
    for _ in range(REPEATS):
        with batching(engine, cache=True) as opened:
            times = [first_token_ms(opened, prompt) for prompt in prompts]
        first.append(times[0])
        others.append(statistics.median(times[1:]))
        with batching(engine, cache=False) as opened:
            without.append(statistics.median(first_token_ms(opened, p) for p in prompts[:5]))
    return min(first), min(others), min(without)


def engine_tables(bundle: Path) -> str:
    """Return the tables of the batching engine alone."""
    with Engine.open(bundle, options=RunnerOptions()) as engine:
        speeds = throughput(engine)
        first, others, without = prefix_cache(engine)
    rows = [(n, f"{speed:,.0f}", f"{speed / speeds[1]:.2f}x") for n, speed in speeds.items()]
    times = [
        ("first question", f"{first:.1f}", ""),
        ("the others, median", f"{others:.1f}", f"{first / others:.1f}x"),
        ("without a cache, median", f"{without:.1f}", f"{first / without:.1f}x"),
    ]
    return "\n\n".join(
        [
            f"The engine alone, {NEW_TOKENS} tokens each, prompts included:",
            markdown(("requests at once", "tokens/s", "of one request"), rows),
            f"{QUESTIONS} questions about the same {SHARED_TOKENS:,} tokens:",
            markdown(("first token of", "ms", "faster"), times),
            f"The server, {serving_load.SPEED_TOKENS} tokens an answer:",
        ]
    )


def conditions(load_before: str) -> str:
    """Return under which conditions it was measured; the load at the end has our own part in it."""
    found = measurement_conditions(None)
    found["load"] = f"{load_before} at the start and {found['load']} at the end"
    return "Conditions: " + ", ".join(f"{name} {value}" for name, value in found.items()) + "."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bundle", type=Path, help="default: ring-nano, built for the purpose")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--speed-seconds", type=float, default=15.0)
    parser.add_argument("--print-only", action="store_true", help="leave docs/ as it is")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bundle = arguments.bundle
        if bundle is None:
            bundle = Path(scratch) / "ring-nano"
            command = [sys.executable, "-m", "ringexport", "build", MODEL, "-o", bundle, "-q"]
            subprocess.run([*map(str, command)], check=True)
        load = measurement_conditions(None)["load"]
        tables = [
            engine_tables(bundle),
            serving_load.measure(
                bundle,
                seconds=arguments.seconds,
                clients=arguments.clients,
                speed_seconds=arguments.speed_seconds,
            ),
        ]
    text = "\n\n".join([conditions(load), *tables])
    print(text)
    if not arguments.print_only:
        replace("performance.md", "serving", text)


if __name__ == "__main__":
    main()
