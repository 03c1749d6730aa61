"""Load a server over HTTP and compare every answer with its solo run; part of serving.py.

Clients stream prompts of mixed lengths; 10 % hang up in the middle, 5 % send nonsense. A wrong
answer, a request that is lost, and memory that grows are problems. Afterwards it measures how
throughput grows with clients.
"""

import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tables import markdown

from ringexport import Engine, SamplingParams

__all__ = ["measure"]

ROOT = Path(__file__).parents[1]
SEED = 6
TASKS = 64
CANCELLED, MALFORMED = 0.10, 0.05
SETTLE_SECONDS = 30.0
MARGIN = 1e-5
MEMORY_GROWTH = 0.05
"""Of the resident memory, from the first half minute to the end; noise of the allocator."""
SPEED_TOKENS = 96
SPEED_PROMPT = "def read_config(path):\n    " * 4
WORDS = [
    "river",
    "config",
    "return",
    "value",
    "while",
    "open",
    "table",
    "north",
    "light",
    "under",
    "import",
    "class",
    "never",
]
MALFORMED_BODIES = (
    b"{",
    b"[]",
    b'{"prompt": 7}',
    b'{"prompt": "x", "temperature": "hot"}',
    b'{"prompt": "x", "n": 5}',
    b'{"prompt": "x", "max_tokens": -1}',
    b"\xff\xfe\xfd",
)


@dataclass(frozen=True)
class Task:
    """A request and the text of its solo run."""

    body: dict[str, Any]
    expected: str


@dataclass
class Tally:
    """What happened."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: int = 0


def make_tasks(bundle: Path) -> tuple[list[Task], str]:
    """Return requests of mixed lengths, each run alone as `ringexport run` does, and a remark.

    The number of rows in a batch changes the last bits of logits. Texts that hang on such bits
    (a draw next to the border of two tokens) have no one right answer; they are left out.
    """
    rng = random.Random(SEED)
    tasks: list[Task] = []
    seed = 0
    with Engine.open(bundle) as engine:
        while len(tasks) < TASKS:
            seed += 1
            words = int(2 ** rng.uniform(1, 9.6))
            prompt = " ".join(rng.choice(WORDS) for _ in range(words))
            body = {
                "prompt": prompt,
                "max_tokens": int(2 ** rng.uniform(3, 7)),
                "temperature": 0.0 if seed % 2 else 0.8,
                "seed": seed,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            params = SamplingParams(
                max_new_tokens=body["max_tokens"], temperature=body["temperature"], seed=seed
            )
            result = engine.generate(prompt, params)
            if margin(engine, prompt, params, result.token_ids) > MARGIN:
                tasks.append(Task(body, result.text))
    return tasks, f"{seed - TASKS} of {seed} texts were left out: they hang on the last bits"


def margin(engine: Engine, prompt: str, params: SamplingParams, tokens: tuple[int, ...]) -> float:
    """Return how far, in probability, the closest choice of a token was from another one."""
    state, rng = engine.runner.new_state(1), np.random.Generator(np.random.PCG64(params.seed))
    logits = engine.runner.prefill([engine.encode(prompt)], None, state)[0]
    closest = 1.0
    for token in tokens:
        values = logits.astype(np.float64) / (params.temperature or 1.0)
        powers = np.exp(values - values.max())
        edges = np.cumsum(powers) / powers.sum()
        if params.temperature == 0:
            first, second = np.sort(powers / powers.sum())[-2:][::-1]
            closest = min(closest, float(first - second))
        else:
            drawn, low = rng.random(), edges[token - 1] if token else 0.0
            closest = min(closest, float(drawn - low), float(edges[token] - drawn))
        logits = engine.runner.decode([token], state)[0]
    return closest


@contextmanager
def server(bundle: Path, clients: int) -> Iterator[tuple[str, int, int]]:
    """Start `ringexport serve` and yield host, port and process id."""
    options = ["--port", "0", "--max-batch", str(min(clients, 128)), "--drain", "5", "-q"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ringexport", "serve", str(bundle), *options],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip().rpartition("//")[2]
        host, _, port = address.partition(":")
        yield host, int(port), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        if process.wait(timeout=60) != 0:
            raise SystemExit(f"the server ended with {process.returncode}")


async def post(host: str, port: int, data: bytes) -> tuple[Any, Any]:
    """Send a request and return the streams."""
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    writer.write(head.encode() + data)
    await writer.drain()
    return reader, writer


async def one_request(
    address: tuple[str, int], task: Task, tally: Tally, *, hang_up_after: int | None = None
) -> None:
    """Stream an answer and compare it; or hang up after some chunks."""
    started = time.perf_counter()
    reader, writer = await post(*address, json.dumps(task.body).encode())
    text, usage, done, first, seen = [], None, False, 0.0, 0
    status = (await reader.readline()).split()[1:2]
    while line := await reader.readline():
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            done = True
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            tally.problems.append(f"error in a stream: {chunk['error']}")
            break
        first = first or time.perf_counter()
        usage = chunk.get("usage") or usage
        text += [choice["text"] for choice in chunk["choices"]]
        seen += 1
        if hang_up_after is not None and seen > hang_up_after:
            writer.transport.abort()
            tally.counts["cancelled"] += 1
            return
    writer.close()
    tally.first_token.append(first - started)
    tally.whole.append(time.perf_counter() - started)
    if status != [b"200"] or not done or usage is None:
        tally.problems.append(f"lost: status {status}, done {done}")
    elif "".join(text) != task.expected:
        tally.problems.append(f"wrong: {''.join(text)!r} instead of {task.expected!r}")
    else:
        tally.counts["right"] += 1
        tally.tokens += usage["completion_tokens"]


async def one_nonsense(address: tuple[str, int], data: bytes, tally: Tally) -> None:
    """Send what is no request; only status 400 is right."""
    reader, writer = await post(*address, data)
    answer = await reader.read()
    writer.close()
    body = answer.partition(b"\r\n\r\n")[2]
    if answer[9:12] != b"400" or "error" not in json.loads(body):
        tally.problems.append(f"nonsense {data!r} got {answer[:80]!r}")
    tally.counts["malformed"] += 1


async def client(
    number: int, address: tuple[str, int], tasks: list[Task], end: float, tally: Tally
) -> None:
    """Ask until the time is over."""
    rng = random.Random(SEED * 1000 + number)
    while time.monotonic() < end:
        chance, task = rng.random(), rng.choice(tasks)
        try:
            if chance < MALFORMED:
                await one_nonsense(address, rng.choice(MALFORMED_BODIES), tally)
            elif chance < MALFORMED + CANCELLED:
                await one_request(address, task, tally, hang_up_after=rng.randrange(8))
            else:
                await one_request(address, task, tally)
        except OSError as error:
            tally.problems.append(f"lost: {error}")


def resident(pid: int) -> int:
    """Return the bytes of memory that a process holds."""
    pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


async def watch_memory(pid: int, end: float, samples: list[tuple[float, int]]) -> None:
    """Sample the memory of the server."""
    while time.monotonic() < end:
        samples.append((time.monotonic(), resident(pid)))
        await asyncio.sleep(1)


async def load(
    address: tuple[str, int], pid: int, tasks: list[Task], clients: int, seconds: float
) -> tuple[Tally, list[tuple[float, int]]]:
    """Run all clients for a while."""
    tally, samples = Tally(), []
    end = time.monotonic() + seconds
    watcher = asyncio.create_task(watch_memory(pid, end, samples))
    await asyncio.gather(*(client(n, address, tasks, end, tally) for n in range(clients)))
    await watcher
    return tally, samples


async def throughput(address: tuple[str, int], clients: int, seconds: float) -> float:
    """Return new tokens per second of so many clients that ask for the same length."""
    body = {
        "prompt": SPEED_PROMPT,
        "max_tokens": SPEED_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    counts: list[int] = []
    end = time.monotonic() + seconds

    async def ask() -> None:
        while time.monotonic() < end:
            reader, writer = await post(*address, json.dumps(body).encode())
            lines = (await reader.read()).splitlines()
            last = next(line for line in lines if b'"choices":[]' in line)
            counts.append(json.loads(last[6:])["usage"]["completion_tokens"])
            writer.close()

    started = time.monotonic()
    await asyncio.gather(*(ask() for _ in range(clients)))
    return sum(counts) / (time.monotonic() - started)


async def settled(address: tuple[str, int]) -> dict[str, float]:
    """Return the server's counts when nothing runs any more."""
    for _ in range(200):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        text = (await reader.read()).decode()
        writer.close()
        lines = [line.split() for line in text.splitlines() if line.startswith("ringexport_")]
        found = {line[0]: float(line[1]) for line in lines if len(line) == 2}
        if found["ringexport_running"] == found["ringexport_waiting"] == 0:
            return found
        await asyncio.sleep(0.1)
    raise SystemExit("requests still run 20 seconds after the last client has gone")


def percentile(values: list[float], share: float) -> str:
    """Return a percentile in milliseconds."""
    return f"{1e3 * sorted(values)[min(len(values) - 1, int(share * len(values)))]:.0f} ms"


def growth(samples: list[tuple[float, int]], settle: float) -> tuple[float, float]:
    """Return the memory after it settled, and at the end, in MB."""
    start = samples[0][0] + settle
    early = [size for when, size in samples if start <= when < start + settle / 3] or [
        samples[0][1]
    ]
    late = [size for _, size in samples[-max(3, len(early)) :]]
    return statistics.median(early) / 1e6, statistics.median(late) / 1e6


def measure(bundle: Path, *, seconds: float, clients: int, speed_seconds: float) -> str:
    """Run everything and return two tables.

    Raises:
        SystemExit: a problem, with the tables.
    """
    tasks, remark = make_tasks(bundle)
    with server(bundle, clients) as (host, port, pid):
        address = (host, port)
        tally, samples = asyncio.run(load(address, pid, tasks, clients, seconds))
        counts = asyncio.run(settled(address))
        table = report(tally, samples, counts, seconds)
        speeds = speed_table(address, speed_seconds)
    name = f"{clients} clients for {seconds:.0f} s"
    text = f"{speeds}\n\n{name}; {remark}:\n\n{table}"
    if tally.problems:
        raise SystemExit(f"{text}\n\n{len(tally.problems)} problems: {tally.problems[:5]}")
    return text


def speed_table(address: tuple[str, int], seconds: float) -> str:
    """Measure tokens per second of 1, 4 and 16 clients."""
    asyncio.run(throughput(address, 1, min(2.0, seconds)))
    speeds = {n: asyncio.run(throughput(address, n, seconds)) for n in (1, 4, 16)}
    rows = [(n, f"{speed:,.0f}", f"{speed / speeds[1]:.2f}x") for n, speed in speeds.items()]
    return markdown(("streaming clients over HTTP", "new tokens/s", "of one client"), rows)


def report(
    tally: Tally,
    samples: list[tuple[float, int]],
    counts: dict[str, float],
    seconds: float,
) -> str:
    """Return what happened; note memory that grew and counts that disagree."""
    settle = min(SETTLE_SECONDS, seconds / 3)
    early, late = growth(samples, settle)
    if late > early * (1 + MEMORY_GROWTH):
        tally.problems.append(f"memory grew from {early:.0f} to {late:.0f} MB")
    ended = sum(counts[f"ringexport_{name}_total"] for name in ("finished", "cancelled", "failed"))
    if ended != counts["ringexport_submitted_total"]:
        tally.problems.append(f"{ended} of {counts['ringexport_submitted_total']} requests ended")
    if counts["ringexport_failed_total"]:
        tally.problems.append(f"{counts['ringexport_failed_total']} requests failed")
    rows = [
        ("answers compared with their solo run, all equal", tally.counts["right"]),
        ("hung up in the middle", tally.counts["cancelled"]),
        ("malformed, all refused with status 400", tally.counts["malformed"]),
        ("problems", len(tally.problems)),
        ("first token, median", percentile(tally.first_token, 0.5)),
        ("first token, p99", percentile(tally.first_token, 0.99)),
        ("whole answer, median", percentile(tally.whole, 0.5)),
        ("whole answer, p99", percentile(tally.whole, 0.99)),
        ("requests per second", f"{tally.counts.total() / seconds:.1f}"),
        ("new tokens per second, finished answers", f"{tally.tokens / seconds:.0f}"),
        (f"memory of the server after {settle:.0f} s", f"{early:.0f} MB"),
        ("memory of the server at the end", f"{late:.0f} MB"),
    ]
    return markdown(("measured", "value"), rows)
