import gc
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringexport.batching.events import FailedEvent, PieceEvent
from ringexport.batching.options import BatchingOptions
from ringexport.batching.request import Request
from ringexport.errors import ConfigError, RingExportError
from ringexport.runtime.sampling import SamplingParams
from ringexport.runtime.session import Engine
from ringexport.runtime.tokenizer import ModelTokenizer
from tests.batching.driver import ERRORS, Driver, Fault, params, prompt_of, same
from tests.device_runner import DeviceRunner
from tests.runners import FakeRunner, no_fault


def test_results_are_those_of_each_request_alone(fake: Engine) -> None:
    driver = Driver(fake, BatchingOptions(max_batch=5, token_budget=64))
    cases = [
        (prompt_of(3), params(12)),
        (prompt_of(300, 1), params(30, temperature=1.0, seed=3)),
        (prompt_of(1, 2), params(1)),
        (prompt_of(70, 3), params(5, repetition_penalty=1.5)),
        (prompt_of(70, 3), params(0)),
        (prompt_of(9, 4), params(9, logprobs=3)),
        (prompt_of(9, 5), SamplingParams(max_new_tokens=60)),
        (prompt_of(4093, 6), params(50)),
        (prompt_of(4096, 7), params(50)),
    ]
    requests = [driver.add(*case) for case in cases]
    driver.run()
    for request, (prompt, choice) in zip(requests, cases, strict=True):
        driver.check(request)
        assert same(request.ticket.result(0), fake.generate(prompt, choice))
    assert [requests[index].ticket.result(0).stop_reason for index in (7, 8)] == ["context"] * 2
    stats = driver.loop.stats()
    assert (stats.finished, stats.cancelled, stats.failed) == (9, 0, 0)
    assert stats.generated_tokens == sum(r.ticket.result(0).new_tokens for r in requests)
    assert stats.prompt_tokens == sum(len(prompt) for prompt, _ in cases)


def test_stop_texts_end_a_request(fake: Engine) -> None:
    whole = fake.generate(prompt_of(5), params(40))
    stop = whole.text[10:13]
    driver = Driver(fake)
    request = driver.add(prompt_of(5), params(40, stop=[stop]))
    other = driver.add(prompt_of(5), params(40))
    driver.run()
    driver.check(request)
    assert same(request.ticket.result(0), fake.generate(prompt_of(5), params(40, stop=[stop])))
    assert request.ticket.result(0).stop_reason == "stop_text"
    assert same(other.ticket.result(0), whole)


def test_logprobs_come_with_the_pieces(fake: Engine) -> None:
    driver = Driver(fake)
    request = driver.add(prompt_of(5), params(4, logprobs=2))
    driver.run()
    pieces = [event for event in driver.events_of(request) if isinstance(event, PieceEvent)]
    assert [len(piece.logprobs) for piece in pieces] == [1] * 4
    assert tuple(p.logprobs[0] for p in pieces) == request.ticket.result(0).logprobs
    assert all(piece.logprobs[0].top[0][0] == piece.token_ids[0] for piece in pieces)


def test_running_rows_are_decoded_in_one_call(fake: Engine, runner: FakeRunner) -> None:
    driver = Driver(fake, BatchingOptions(max_batch=128))
    for seed in range(128):
        driver.add(prompt_of(2, seed), params(6))
    driver.run()
    assert [rows for kind, rows in runner.calls if kind == "decode"] == [128] * 5


def test_a_long_prompt_stalls_nobody(tokenizer: ModelTokenizer) -> None:
    runner = FakeRunner(context_length=1 << 17)
    driver = Driver(Engine(runner, tokenizer), BatchingOptions(token_budget=512))
    early = driver.add(prompt_of(10), params(300))
    driver.run(2)
    long = driver.add(prompt_of(100_000), params(2))
    late = [driver.add(prompt_of(40, seed), params(20)) for seed in range(8)]
    for _ in range(25):
        before = len(runner.calls), early.row.result().new_tokens
        driver.loop.step()
        read = sum(size for kind, size in runner.calls[before[0] :] if kind == "prefill")
        assert read <= 512
        assert early.row.result().new_tokens == before[1] + 1
    assert all(request.ticket.done for request in late)
    assert not long.ticket.done
    driver.run()
    assert long.ticket.result(0).new_tokens == 2


def test_two_long_prompts_are_read_in_turn(fake: Engine) -> None:
    driver = Driver(fake, BatchingOptions(token_budget=256))
    requests = [driver.add(prompt_of(2000, seed), params(1)) for seed in range(2)]
    for _ in range(6):
        driver.loop.step()
        assert abs(requests[0].read - requests[1].read) <= 256
    driver.run()


def test_rows_are_limited_and_the_others_wait_their_turn(fake: Engine, runner: FakeRunner) -> None:
    driver = Driver(fake, BatchingOptions(max_batch=3))
    requests = [driver.add(prompt_of(2, seed), params(4)) for seed in range(10)]
    driver.loop.step()
    assert (driver.loop.stats().running, driver.loop.stats().waiting) == (3, 7)
    driver.run()
    ends = [owner for owner, event in driver.events if not isinstance(event, PieceEvent)]
    assert ends == requests
    assert max(rows for kind, rows in runner.calls if kind == "decode") == 3


def test_a_runner_may_hold_fewer_rows(tokenizer: ModelTokenizer) -> None:
    runner = FakeRunner(max_batch=3)
    driver = Driver(Engine(runner, tokenizer), BatchingOptions(max_batch=8))
    requests = [driver.add(prompt_of(2, seed), params(4)) for seed in range(5)]
    driver.run()
    assert all(request.ticket.result(0).new_tokens == 4 for request in requests)
    assert max(rows for kind, rows in runner.calls if kind == "decode") == 3


@pytest.mark.parametrize("when", ["waiting", "reading", "running"])
def test_cancelled_requests_leave_and_the_others_go_on(fake: Engine, when: str) -> None:
    driver = Driver(fake, BatchingOptions(max_batch=3, token_budget=16))
    others = [driver.add(prompt_of(9, seed), params(12)) for seed in range(2)]
    victim = driver.add(prompt_of(200, 7) if when != "running" else [5], params(100))
    driver.run({"waiting": 0, "reading": 5, "running": 9}[when])
    assert victim.phase == when
    victim.ticket.cancel()
    driver.loop.step()
    assert victim.ticket.result(0).stop_reason == "cancelled"
    driver.run()
    for seed, request in enumerate(others):
        assert same(request.ticket.result(0), fake.generate(prompt_of(9, seed), params(12)))
    assert driver.loop.stats().cancelled == 1
    victim.ticket.cancel()
    assert len([owner for owner, _ in driver.events if owner is victim]) >= 1


def test_an_owner_that_fails_is_cancelled_alone(
    fake: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    driver = Driver(fake)
    other = driver.add(prompt_of(4), params(9))
    calls: list[object] = []

    def broken(event: object) -> None:
        calls.append(event)
        if len(calls) == 3:
            msg = "the client is gone"
            raise ConnectionError(msg)

    victim = Request("victim", fake.row(prompt_of(4, 1), params(50)), broken)
    driver.loop.waiting.append(victim)
    driver.run()
    assert victim.ticket.result(0).stop_reason == "cancelled"
    assert len(calls) == 3
    assert same(other.ticket.result(0), fake.generate(prompt_of(4), params(9)))
    assert "the client is gone" in caplog.text


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_prompt_that_fails_touches_no_other(
    fake: Engine, runner: FakeRunner, error: Exception
) -> None:
    runner.fault = Fault("prefill", 299, 99, error)
    driver = Driver(fake, BatchingOptions(token_budget=64))
    others = [driver.add(prompt_of(30, seed), params(20)) for seed in range(3)]
    driver.run(4)
    victim = driver.add([*prompt_of(300, 8), 299, *prompt_of(30, 9)], params(20))
    driver.run()
    with pytest.raises(RingExportError, match=r"bad luck|CUDA error|not enough memory"):
        victim.ticket.result(0)
    driver.check(victim)
    for seed, request in enumerate(others):
        assert same(request.ticket.result(0), fake.generate(prompt_of(30, seed), params(20)))


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("victim", [0, 2, 4])
def test_a_step_that_fails_once_costs_nothing_but_time(
    fake: Engine, runner: FakeRunner, error: Exception, victim: int
) -> None:
    prompts = [prompt_of(9, seed) for seed in range(5)]
    expected = [fake.generate(prompt, params(20)) for prompt in prompts]
    prompts[victim][0] = 299
    expected[victim] = fake.generate(prompts[victim], params(20))
    driver = Driver(fake)
    requests = [driver.add(prompt, params(20)) for prompt in prompts]
    driver.run(7)
    runner.fault = Fault("decode", 299, 1, error)
    driver.run()
    for request, result in zip(requests, expected, strict=True):
        driver.check(request)
        assert same(request.ticket.result(0), result)


def test_a_request_that_fails_every_step_fails_alone(fake: Engine, runner: FakeRunner) -> None:
    driver = Driver(fake)
    prompts = [prompt_of(9, seed) for seed in range(5)]
    expected = [fake.generate(prompt, params(20)) for prompt in prompts]
    prompts[2][0] = 299
    requests = [driver.add(prompt, params(20)) for prompt in prompts]
    driver.run(4)
    runner.fault = Fault("decode", 299, 99, RuntimeError("poison"))
    driver.run()
    for index, request in enumerate(requests):
        if index == 2:
            with pytest.raises(RingExportError, match="poison"):
                request.ticket.result(0)
        else:
            assert same(request.ticket.result(0), expected[index])


@pytest.mark.parametrize("kind", ["prefill", "decode", "new_state"])
def test_a_runner_that_is_broken_ends_all_requests_cleanly(
    fake: Engine, runner: FakeRunner, kind: str
) -> None:
    driver = Driver(fake, BatchingOptions(max_batch=4))
    requests = [driver.add(prompt_of(9, seed), params(20)) for seed in range(9)]
    driver.run(3)

    def broken(found: str, _tokens: list[int]) -> None:
        if found == kind:
            msg = "the device is lost"
            raise RuntimeError(msg)

    runner.fault = broken
    driver.run()
    assert all(request.ticket.done for request in requests)
    runner.fault = no_fault
    again = driver.add(prompt_of(9), params(20))
    driver.run()
    assert same(again.ticket.result(0), fake.generate(prompt_of(9), params(20)))


def test_logits_that_are_not_finite_fail_their_request(
    fake: Engine, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(fake)
    requests = [driver.add(prompt_of(4, seed), params(9)) for seed in range(3)]
    driver.run(2)
    plain = runner.decode

    def damaged(*args: object, **kwargs: object) -> object:
        logits = plain(*args, **kwargs)  # type: ignore[arg-type]
        logits[1] = float("nan")
        return logits

    monkeypatch.setattr(runner, "decode", damaged)
    driver.loop.step()
    monkeypatch.undo()
    driver.run()
    with pytest.raises(RingExportError, match="expected a finite number"):
        requests[1].ticket.result(0)
    for seed in (0, 2):
        found = requests[seed].ticket.result(0)
        assert same(found, fake.generate(prompt_of(4, seed), params(9)))


Action = tuple[str, int, int, int]
ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "add", "cancel", "step", "steps", "fault"]),
        st.integers(1, 90),
        st.integers(0, 12),
        st.integers(0, 5),
    ),
    max_size=40,
)


class Schedule:
    """Does what the actions say, and remembers the requests."""

    def __init__(self, engine: Engine, runner: FakeRunner, options: BatchingOptions) -> None:
        self.driver = Driver(engine, options)
        self.runner = runner
        self.requests: list[Request] = []
        self.faults = 0

    def act(self, kind: str, size: int, count: int, seed: int) -> None:
        if kind == "add":
            choice = params(count, temperature=float(seed % 2), seed=seed)
            self.requests.append(self.driver.add(prompt_of(size, seed), choice))
        elif kind == "cancel" and self.requests:
            self.requests[seed % len(self.requests)].ticket.cancel()
        elif kind == "fault":
            self.runner.fault = self._fail_once
        else:
            self.driver.run(1 if kind == "step" else size)

    def _fail_once(self, kind: str, _tokens: list[int]) -> None:
        if kind == "decode":
            self.runner.fault = no_fault
            self.faults += 1
            msg = "once"
            raise RuntimeError(msg)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    actions=ACTIONS,
    rows=st.integers(1, 6),
    budget=st.none() | st.integers(1, 80),
    cache=st.booleans(),
    kind=st.sampled_from([FakeRunner, DeviceRunner]),
)
def test_any_schedule_gives_the_results_of_each_request_alone(
    tokenizer: ModelTokenizer,
    actions: list[Action],
    rows: int,
    budget: int | None,
    cache: bool,
    kind: type[FakeRunner],
) -> None:
    runner = kind()
    engine = Engine(runner, tokenizer)
    options = BatchingOptions(
        max_batch=rows, token_budget=budget, prefix_cache_bytes=20_000 if cache else 0
    )
    schedule = Schedule(engine, runner, options)
    for action in actions:
        schedule.act(*action)
    schedule.driver.run()
    runner.fault = no_fault
    for request in schedule.requests:
        schedule.driver.check(request)
        if isinstance(schedule.driver.events_of(request)[-1], FailedEvent):
            assert schedule.faults > 1  # a second fault hit the step that it took alone
            continue
        found = request.ticket.result(0)
        expected = engine.generate(request.row.prompt, request.row.params)
        if found.stop_reason == "cancelled":
            assert request.cancelled
            assert found.token_ids == expected.token_ids[: found.new_tokens]
        else:
            assert same(found, expected)
    stats = schedule.driver.loop.stats()
    assert stats.finished + stats.cancelled + stats.failed == len(schedule.requests)
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.cache_bytes <= options.prefix_cache_bytes


def test_memory_stays_flat(fake: Engine) -> None:
    driver = Driver(fake, BatchingOptions(max_batch=4, prefix_cache_bytes=50_000))

    def serve(start: int) -> int:
        for seed in range(start, start + 30):
            driver.add(prompt_of(100, seed), params(3))
        driver.run()
        driver.events.clear()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        serve(0)
        serve(60)
        before = serve(120)
        after = max(serve(start) for start in (180, 240))
    finally:
        tracemalloc.stop()
    assert after < before + 20_000


@pytest.mark.parametrize(
    "call",
    [
        lambda: BatchingOptions(max_batch=0),
        lambda: BatchingOptions(max_batch=129),
        lambda: BatchingOptions(token_budget=0),
        lambda: BatchingOptions(max_queue=-1),
        lambda: BatchingOptions(prefix_cache_bytes=True),
        lambda: BatchingOptions(max_new_tokens_limit=1.5),  # type: ignore[arg-type]
    ],
)
def test_bad_options_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        call()
