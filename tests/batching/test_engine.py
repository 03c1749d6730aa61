import threading
import time
from collections.abc import Iterator

import pytest

from ringexport.batching import (
    BatchingEngine,
    BatchingOptions,
    Event,
    FailedEvent,
    FinishedEvent,
    PieceEvent,
)
from ringexport.errors import (
    ConfigError,
    ContextLengthError,
    EngineClosedError,
    QueueFullError,
    ShapeError,
)
from ringexport.runtime.sampling import SamplingParams
from ringexport.runtime.session import Engine
from tests.batching.driver import prompt_of
from tests.runners import FakeRunner, no_fault

PROMPTS = ["the rain", "a", "日本 and then some more text", "x y", "the sea " * 60, "b" * 300]
WAIT = 60.0


def params(count: int = 8, **more: object) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, ignore_eos=True, **more)  # type: ignore[arg-type]


class Gate:
    """Holds a `FakeRunner` before its next decode step."""

    def __init__(self, runner: FakeRunner) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        runner.fault = self._wait

    def _wait(self, kind: str, _tokens: list[int]) -> None:
        if kind == "decode":
            self.reached.set()
            assert self.open.wait(WAIT)


@pytest.fixture
def gate(runner: FakeRunner) -> Iterator[Gate]:
    held = Gate(runner)
    yield held
    held.open.set()


def test_texts_equal_those_of_each_prompt_alone(engine: Engine) -> None:
    cases = [(text, params(24 - index)) for index, text in enumerate(PROMPTS * 3)]
    cases += [
        (text, params(16, temperature=1.0, seed=index, logprobs=2))
        for index, text in enumerate(PROMPTS)
    ]
    expected = [engine.generate(prompt, choice) for prompt, choice in cases]
    with BatchingEngine(engine, BatchingOptions(max_batch=7, token_budget=64)) as batching:
        tickets = [batching.submit(engine.encode(prompt), choice) for prompt, choice in cases]
        found = [ticket.result(WAIT) for ticket in tickets]
    assert [one.text for one in found] == [one.text for one in expected]
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert len({ticket.id for ticket in tickets}) == len(tickets)
    assert all(one.logprobs is not None for one in found[-len(PROMPTS) :])


def test_events_come_in_order_on_the_worker(fake: Engine) -> None:
    events: list[Event] = []
    threads: set[str] = set()

    def on_event(event: Event) -> None:
        events.append(event)
        threads.add(threading.current_thread().name)

    with BatchingEngine(fake) as batching:
        result = batching.submit([1, 2], params(5), on_event=on_event).result(WAIT)
    *pieces, last = events
    assert len(pieces) == 5
    assert all(isinstance(piece, PieceEvent) for piece in pieces)
    assert last == FinishedEvent(result=result)
    assert threads == {"ringexport-batching"}


@pytest.mark.parametrize(
    ("prompt", "choice", "error", "message"),
    [
        ([], params(), ConfigError, "empty"),
        ("text", params(), ConfigError, "str"),
        ([{"role": "user"}], params(), ConfigError, "no token ids"),
        ([384], params(), ShapeError, "384"),
        ([1, -1], params(), ShapeError, "-1"),
        ([1] * 4097, params(), ContextLengthError, "4,097 tokens"),
        ([1], params(51), ConfigError, "at most 50"),
    ],
)
def test_bad_requests_are_refused_at_once(
    fake: Engine, prompt: list[int], choice: SamplingParams, error: type[Exception], message: str
) -> None:
    with BatchingEngine(fake, BatchingOptions(max_new_tokens_limit=50)) as batching:
        with pytest.raises(error, match=message):
            batching.submit(prompt, choice)
        assert batching.stats().submitted == 0
        assert batching.submit([1], params(50)).result(WAIT).new_tokens == 50


def test_a_full_queue_refuses_and_has_room_again(fake: Engine, gate: Gate) -> None:
    with BatchingEngine(fake, BatchingOptions(max_batch=2, max_queue=3)) as batching:
        tickets = [batching.submit([1, n], params(4)) for n in range(5)]
        assert gate.reached.wait(WAIT)
        with pytest.raises(QueueFullError, match="5 requests"):
            batching.submit([1], params(4))
        stats = batching.stats()
        assert (stats.running + stats.waiting, stats.refused) == (5, 1)
        assert stats.running in {1, 2}  # the first may be held before the second is submitted
        gate.open.set()
        for ticket in tickets:
            ticket.result(WAIT)
            assert ticket.done
        tickets = [batching.submit([2, n], params(4)) for n in range(5)]
        assert [ticket.result(WAIT).new_tokens for ticket in tickets] == [4] * 5
        assert (batching.stats().running, batching.stats().finished) == (0, 10)


def test_result_waits_no_longer_than_asked(fake: Engine, gate: Gate) -> None:
    with BatchingEngine(fake) as batching:
        ticket = batching.submit([1], params(4))
        with pytest.raises(TimeoutError, match="request-1"):
            ticket.result(0.01)
        assert not ticket.done
        gate.open.set()
        assert ticket.result(WAIT).new_tokens == 4


def test_closing_ends_what_is_left_with_an_error(fake: Engine, gate: Gate) -> None:
    events: list[Event] = []
    batching = BatchingEngine(fake, BatchingOptions(max_batch=1))
    tickets = [batching.submit([1], params(400), on_event=events.append) for _ in range(3)]
    assert gate.reached.wait(WAIT)
    closer = threading.Thread(target=batching.close)
    closer.start()
    while batching._deadline is None:
        time.sleep(0.001)
    with pytest.raises(EngineClosedError, match="takes no requests"):
        batching.submit([1], params(4))
    gate.open.set()
    closer.join(WAIT)
    for ticket in tickets:
        with pytest.raises(EngineClosedError, match="shut down"):
            ticket.result(WAIT)
    assert sum(isinstance(event, FailedEvent) for event in events) == 3
    batching.close()


def test_closing_can_wait_for_what_runs(fake: Engine) -> None:
    batching = BatchingEngine(fake, BatchingOptions(max_batch=2))
    tickets = [batching.submit([1, n], params(50)) for n in range(6)]
    batching.close(drain_seconds=WAIT)
    assert [ticket.result(0).new_tokens for ticket in tickets] == [50] * 6
    with pytest.raises(EngineClosedError):
        batching.submit([1], params(4))


def test_draining_ends_in_time(fake: Engine, runner: FakeRunner) -> None:
    def slow(kind: str, _tokens: list[int]) -> None:
        if kind == "decode":
            time.sleep(0.005)

    runner.fault = slow
    batching = BatchingEngine(fake)
    ticket = batching.submit([1], params(4000))
    start = time.monotonic()
    batching.close(drain_seconds=0.1)
    assert 0.09 < time.monotonic() - start < 30
    with pytest.raises(EngineClosedError):
        ticket.result(0)


def test_an_owner_can_close_and_cancel_from_its_callback(fake: Engine) -> None:
    batching, ready = BatchingEngine(fake), threading.Event()

    def on_event(event: Event) -> None:
        if isinstance(event, PieceEvent) and ready.wait(WAIT):
            cancelled.cancel()

    cancelled = batching.submit([1], params(4000), on_event=on_event)
    ready.set()
    assert cancelled.result(WAIT).stop_reason == "cancelled"
    batching.submit([1], params(4000), on_event=lambda _: batching.close())
    batching._thread.join(WAIT)
    assert not batching._thread.is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_loop_ends_all_requests(fake: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    batching = BatchingEngine(fake)

    def broken() -> None:
        raise AssertionError

    monkeypatch.setattr(batching._loop, "step", broken)
    assert batching.alive
    ticket = batching.submit([1], params(4))
    with pytest.raises(EngineClosedError):
        ticket.result(WAIT)
    with pytest.raises(EngineClosedError):
        batching.submit([1], params(4))
    assert not batching.alive
    batching._thread.join(WAIT)


def test_a_closed_engine_is_not_alive(fake: Engine) -> None:
    with BatchingEngine(fake) as batching:
        assert batching.alive
    assert not batching.alive


@pytest.mark.parametrize("seed", range(3))
def test_many_threads_submit_and_cancel(fake: Engine, runner: FakeRunner, seed: int) -> None:
    expected = {n: fake.generate(prompt_of(n + 1, n), params(n + 1)).token_ids for n in range(12)}
    runner.fault = no_fault
    wrong: list[object] = []

    def client(number: int) -> None:
        for turn in range(12):
            n = (number * 7 + turn * 5 + seed) % 12
            ticket = batching.submit(prompt_of(n + 1, n), params(n + 1))
            if (turn + number) % 4 == 0:
                ticket.cancel()
            result = ticket.result(WAIT)
            whole = result.stop_reason != "cancelled"
            if result.token_ids != expected[n][: None if whole else result.new_tokens]:
                wrong.append((n, result))

    with BatchingEngine(fake, BatchingOptions(max_batch=5)) as batching:
        threads = [threading.Thread(target=client, args=(number,)) for number in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        stats = batching.stats()
    assert not wrong
    assert stats.submitted == 120 == stats.finished + stats.cancelled
    assert stats.running == stats.waiting == stats.failed == 0
