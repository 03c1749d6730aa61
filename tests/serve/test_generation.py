"""How events cross from the worker's thread to the event loop."""

import asyncio
import itertools
import threading
import time
from collections.abc import Awaitable, Callable, Sequence

import pytest

from ringexport.batching import FailedEvent, PieceEvent, Ticket
from ringexport.errors import RingExportError
from ringexport.serve import generation
from ringexport.serve.errors import ApiError
from ringexport.serve.generation import Feed, Hub, SlowReaderError

WAIT = 20.0


def piece(token: int) -> PieceEvent:
    return PieceEvent(text=f"{token} ", token_ids=(token,))


def feed_of(hub: Hub, *, most: int = 1000, pieces: bool = True) -> Feed:
    return Feed(
        hub, most=most, pieces=pieces, on_overflow=lambda: None, on_first_token=lambda: None
    )


def run(test: Callable[[Hub], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(test(Hub()), WAIT)

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def waiter(feed: Feed, direct: Callable[[Sequence[PieceEvent]], bool]) -> asyncio.Task[object]:
    return asyncio.get_running_loop().create_task(feed.events(direct))


def test_every_event_arrives_once_and_in_order() -> None:
    async def test(hub: Hub) -> None:
        feeds = [feed_of(hub, most=10_000) for _ in range(16)]
        found: list[list[int]] = [[] for _ in feeds]

        def taken(tokens: list[int]) -> Callable[[Sequence[PieceEvent]], bool]:
            def direct(pieces: Sequence[PieceEvent]) -> bool:
                tokens.extend(event.token_ids[0] for event in pieces)
                return True

            return direct

        tasks = [waiter(*pair) for pair in zip(feeds, map(taken, found), strict=True)]
        await asyncio.sleep(0)

        def work(part: Sequence[Feed]) -> None:
            for token in range(500):
                for feed in part:
                    feed.on_event(piece(token))

        threads = [threading.Thread(target=work, args=(feeds[start::2],)) for start in range(2)]
        for thread in threads:
            thread.start()
        await until(lambda: all(len(tokens) >= 500 for tokens in found))
        assert found == [list(range(500))] * 16
        for task in tasks:
            task.cancel()

    run(test)


def test_a_round_is_followed_by_a_rest_in_which_tokens_gather() -> None:
    async def test(hub: Hub) -> None:
        rounds: list[tuple[float, int]] = []

        def slow(pieces: Sequence[PieceEvent]) -> bool:
            time.sleep(0.01)
            rounds.append((time.monotonic(), len(pieces)))
            return True

        feed = feed_of(hub)
        task = waiter(feed, slow)
        await asyncio.sleep(0)

        def work() -> None:
            for token in range(60):
                feed.on_event(piece(token))
                time.sleep(0.002)

        thread = threading.Thread(target=work)
        thread.start()
        await until(lambda: sum(count for _, count in rounds) == 60)
        thread.join()
        times = [moment for moment, _ in rounds]
        gaps = [after - before for before, after in itertools.pairwise(times)]
        assert min(gaps) >= 0.01 * (1 + generation._REST) * 0.9  # a round takes 10 ms or more
        assert len(rounds) < 20
        task.cancel()

    run(test)


def test_what_is_not_taken_is_returned_with_the_end() -> None:
    async def test(hub: Hub) -> None:
        feed = feed_of(hub)
        task = waiter(feed, lambda _: False)
        await asyncio.sleep(0)
        feed.on_event(piece(1))
        assert await task == [piece(1)]
        failed = FailedEvent(error=RingExportError("bad luck"))
        for event in (piece(2), failed):
            feed.on_event(event)
        assert await feed.events(lambda _: True) == [piece(2), failed]

    run(test)


def test_an_error_of_the_direct_way_is_raised_in_the_task() -> None:
    async def test(hub: Hub) -> None:
        def broken(_: Sequence[PieceEvent]) -> bool:
            msg = "bug"
            raise ValueError(msg)

        feed = feed_of(hub)
        task = waiter(feed, broken)
        await asyncio.sleep(0)
        feed.on_event(piece(1))
        with pytest.raises(ValueError, match="bug"):
            await task

    run(test)


def test_too_many_waiting_pieces_cancel_their_request_alone() -> None:
    async def test(hub: Hub) -> None:
        cancelled: list[str] = []
        slow, other = feed_of(hub, most=5), feed_of(hub, most=5)
        slow.start(Ticket("slow", lambda: cancelled.append("slow")))
        other.start(Ticket("other", lambda: cancelled.append("other")))
        for token in range(5):
            slow.on_event(piece(token))
            other.on_event(piece(token))
        await asyncio.sleep(0.1)
        assert cancelled == []
        for token in range(5, 9):
            slow.on_event(piece(token))
            await asyncio.sleep(0.06)
        assert cancelled == ["slow"]
        with pytest.raises(SlowReaderError):
            await slow.events()
        assert await other.events() == [piece(token) for token in range(5)]

    run(test)


def test_without_pieces_only_the_end_crosses() -> None:
    async def test(hub: Hub) -> None:
        feed = feed_of(hub, most=1, pieces=False)
        for token in range(50):
            feed.on_event(piece(token))
        feed.on_event(FailedEvent(error=RingExportError("bad luck")))
        with pytest.raises(ApiError):
            await feed.result()

    run(test)
