"""Streaming clients for a server under load, cheap enough that one process drives 128 of them."""

import asyncio
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["BATCH", "LOADS", "STEP_CONTEXT", "Outcome", "Work", "drive"]

BATCH = 128
LOADS = ((512, 256), (256, 768))
"""Prompt tokens and new tokens of the requests to a GPU."""
STEP_CONTEXT = 640
"""Tokens that a row of either has on average while it is continued."""


@dataclass(frozen=True)
class Work:
    """What each of the clients does again and again.

    Attributes:
        clients: at once.
        prompt_tokens: of each request, random ids.
        new_tokens: of each answer.
        vocab_size: ids are drawn below it.
        sampling: more fields of the requests; OpenAI's default is temperature 1.
    """

    clients: int
    prompt_tokens: int
    new_tokens: int
    vocab_size: int
    sampling: dict[str, Any] = field(default_factory=dict)

    def bodies(self, seed: int) -> Iterator[bytes]:
        """Yield requests without end."""
        state = seed * 7919 + 1
        while True:
            ids = []
            for _ in range(self.prompt_tokens):
                state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
                ids.append((state >> 33) % self.vocab_size)
            body = {"prompt": ids, "max_tokens": self.new_tokens, "ignore_eos": True}
            more = {"stream": True, "stream_options": {"include_usage": True}, **self.sampling}
            yield json.dumps(body | more).encode()


@dataclass
class Outcome:
    """What the clients saw.

    Attributes:
        first_token: seconds from request to first event, per answer.
        events: of all answers.
        tokens: of all answers that ended, as the server counted them.
        answers: that ended.
        seconds: from the first request to the end of the last answer.
    """

    first_token: list[float] = field(default_factory=list)
    events: int = 0
    tokens: int = 0
    answers: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """New tokens per second over all, prompts and the last answers' stragglers included."""
        return self.tokens / self.seconds

    def first_token_ms(self, share: float) -> float:
        """Return a quantile of the time to the first token."""
        times = sorted(self.first_token)
        return 1e3 * times[min(len(times) - 1, int(share * len(times)))]

    @property
    def median_ms(self) -> float:
        """Median time to the first token."""
        return 1e3 * statistics.median(self.first_token)


class _Rounds:
    """All clients ask equally often, so that the server is never measured with some of them only.

    Args:
        seconds: after which no round begins any more; there is always one.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._count = 1

    def goes_on(self, answers: int) -> bool:
        """Tell whether a client with so many answers asks again: as the first one with them did."""
        if answers == self._count and time.monotonic() < self._end:
            self._count += 1
        return answers < self._count


class _Client(asyncio.Protocol):
    """One connection, which is kept for all of its requests."""

    def __init__(self, bodies: Iterator[bytes], outcome: Outcome, rounds: _Rounds) -> None:
        self._bodies, self._outcome, self._rounds = bodies, outcome, rounds
        self._answers = 0
        self._tail = b""
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._ask()

    def data_received(self, data: bytes) -> None:
        if not self._has_first and b"data: " in data:
            self._has_first = True
            self._outcome.first_token.append(time.perf_counter() - self._asked)
        self._outcome.events += data.count(b"data: ")
        self._tail = (self._tail + data)[-1024:]
        if self._tail.endswith(b"0\r\n\r\n"):
            self._ended()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(exc)

    def _ask(self) -> None:
        body = next(self._bodies)
        self._has_first, self._tail = False, b""
        self._asked = time.perf_counter()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._transport.write(head.encode() + body)

    def _ended(self) -> None:
        found = self._tail.rpartition(b'"completion_tokens":')[2]
        if b"data: [DONE]" not in self._tail or not found:
            raise SystemExit(f"an answer ended with {self._tail!r}")
        self._outcome.tokens += int(found.split(b",")[0].split(b"}")[0])
        self._outcome.answers += 1
        self._answers += 1
        if self._rounds.goes_on(self._answers):
            self._ask()
        else:
            self._transport.close()


async def drive(host: str, port: int, work: Work, seconds: float) -> Outcome:
    """Run all clients; each asks again when its answer has ended, in rounds that begin in time."""
    loop, outcome, rounds = asyncio.get_running_loop(), Outcome(), _Rounds(seconds)
    began, clients = time.monotonic(), []
    for number in range(work.clients):
        bodies = work.bodies(number)
        _, client = await loop.create_connection(
            lambda bodies=bodies: _Client(bodies, outcome, rounds), host, port
        )
        clients.append(client)
    lost = [found for found in await asyncio.gather(*(one.closed for one in clients)) if found]
    if lost:
        raise SystemExit(f"{len(lost)} connections were lost: {lost[0]!r}")
    outcome.seconds = time.monotonic() - began
    return outcome
