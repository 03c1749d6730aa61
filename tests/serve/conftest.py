"""Live servers on free ports of this machine: with ring-nano, or a script instead of a model."""

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from ringexport.batching import (
    BatchingEngine,
    BatchingOptions,
    BatchingStats,
    FailedEvent,
    FinishedEvent,
    PieceEvent,
    Ticket,
)
from ringexport.batching.events import OnEvent
from ringexport.cli.main import run_cli
from ringexport.errors import EngineClosedError, RingExportError
from ringexport.runtime.generation import GenerationResult, StopReason, Timings
from ringexport.runtime.registry import RunnerOptions
from ringexport.runtime.sampling import SamplingParams, TokenLogprobs
from ringexport.runtime.session import Engine
from ringexport.serve import ServeOptions, Server, bind, create_app, url_of
from ringexport.serve.service import Batcher

ROOT = Path(__file__).parents[2]
NAME = "nano"


@pytest.fixture(scope="session")
def nano_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / NAME
    assert run_cli(["build", str(ROOT / "models/ring-nano"), "-o", str(path), "-q"]) == 0
    return path


@pytest.fixture(scope="session")
def nano(nano_bundle: Path) -> Iterator[Engine]:
    """The engine of ring-nano; the live server of `nano_url` owns its runner."""
    with Engine.open(nano_bundle, options=RunnerOptions(threads=1)) as engine:
        yield engine


@dataclass
class Running:
    """A server in a thread of this process."""

    url: str
    server: Server
    thread: threading.Thread
    http: httpx.Client

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=30)
        assert not self.thread.is_alive()


@contextmanager
def serving(
    engine: Engine,
    batching: Batcher,
    options: ServeOptions | None = None,
    *,
    send_buffer: int | None = None,
) -> Iterator[Running]:
    options = options or ServeOptions(model_name=NAME, drain_seconds=1.0)
    started = threading.Event()
    with bind("127.0.0.1", 0) as listener, httpx.Client(timeout=20) as client:
        if send_buffer is not None:  # the sockets of connections inherit it
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        app = create_app(engine, batching, options)
        server = Server(app, batching, options, on_start=started.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        running = Running(url_of(listener), server, thread, client)
        thread.start()
        assert started.wait(10)
        try:
            yield running
        finally:
            running.stop()


@pytest.fixture(scope="module")
def nano_url(nano: Engine) -> Iterator[str]:
    """The address of a server with ring-nano."""
    options = BatchingOptions(max_batch=8, max_queue=64, token_budget=256)
    with BatchingEngine(nano, options) as batching, serving(nano, batching) as running:
        yield running.url


@dataclass
class Script:
    """What a scripted model says.

    Attributes:
        text: in pieces of one token each.
        delay: seconds before each token.
        stop_reason: at the end.
        error: raised instead of an end.
    """

    text: str = "Hello there."
    delay: float = 0.0
    stop_reason: StopReason = "stop_token"
    error: RingExportError | None = None


@dataclass
class ScriptedBatching:
    """Says what a script says, in a thread per request.

    Attributes:
        script: of the next requests.
        prompts: texts that were submitted.
        params: that were submitted.
        tickets: that were given out.
        refusal: raised by submit.
    """

    engine: Engine
    script: Script = field(default_factory=Script)
    prompts: list[str] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)
    tickets: list[Ticket] = field(default_factory=list)
    results: list[GenerationResult] = field(default_factory=list)
    refusal: Exception | None = None
    closed: threading.Event = field(default_factory=threading.Event)
    hurry: threading.Event = field(default_factory=threading.Event)

    @property
    def alive(self) -> bool:
        return not self.closed.is_set()

    def submit(
        self, prompt: Sequence[int], params: SamplingParams, *, on_event: OnEvent | None = None
    ) -> Ticket:
        if self.refusal is not None:
            raise self.refusal
        if self.closed.is_set():
            raise EngineClosedError("the engine is closed")
        assert on_event is not None
        self.prompts.append(self.engine.tokenizer.decode(prompt, skip_special_tokens=False))
        self.params.append(params)
        stopped = threading.Event()
        ticket = Ticket(f"t{len(self.tickets)}", stopped.set)
        self.tickets.append(ticket)
        arguments = (self.script, len(prompt), params, on_event, ticket, stopped)
        threading.Thread(target=self._say, args=arguments, daemon=True).start()
        return ticket

    def stats(self) -> BatchingStats:
        running = sum(not ticket.done for ticket in self.tickets)
        return BatchingStats(running=running, finished=len(self.results))

    def close(self, *, drain_seconds: float = 0.0) -> None:
        self.closed.set()
        end = time.monotonic() + drain_seconds
        while time.monotonic() < end and not all(ticket.done for ticket in self.tickets):
            time.sleep(0.01)
        self.hurry.set()

    def _say(
        self,
        script: Script,
        prompt_tokens: int,
        params: SamplingParams,
        on_event: OnEvent,
        ticket: Ticket,
        stopped: threading.Event,
    ) -> None:
        ids = self.engine.tokenizer.encode(script.text)
        decoder = self.engine.tokenizer.decoder()
        said, logs, reason = "", [], script.stop_reason
        for token in ids:
            if script.delay and stopped.wait(script.delay):
                break
            if stopped.is_set() or self.hurry.is_set():
                break
            text = decoder.feed(token)
            said += text
            top = ((token, -0.25), (1, -2.0))[: params.logprobs]
            log = TokenLogprobs(token_id=token, logprob=-0.25, top=top)
            entries = () if params.logprobs is None else (log,)
            logs += entries
            on_event(PieceEvent(text=text, token_ids=(token,), logprobs=entries))
        error = script.error
        if self.hurry.is_set() and not stopped.is_set():
            error = EngineClosedError("the engine was closed")
        if error is not None:
            ticket.resolve(error)
            on_event(FailedEvent(error=error))
            return
        result = GenerationResult(
            text=said,
            token_ids=tuple(ids),
            stop_reason="cancelled" if stopped.is_set() else reason,
            stop_text=None,
            prompt_tokens=prompt_tokens,
            new_tokens=len(ids),
            timings=Timings(
                time_to_first_token_ms=1.0,
                total_ms=2.0,
                prefill_tokens_per_second=1.0,
                tokens_per_second=1.0,
            ),
            logprobs=None if params.logprobs is None else tuple(logs),
        )
        self.results.append(result)
        ticket.resolve(result)
        on_event(FinishedEvent(result=result))


@dataclass
class Scripted(Running):
    batching: ScriptedBatching


Serve = Callable[..., Scripted]


@pytest.fixture(scope="module")
def serve_script(nano: Engine) -> Iterator[Serve]:
    """Start a server with a script instead of a model; stopped after the module's tests."""
    with ExitStack() as stack:

        def start(*, send_buffer: int | None = None, **options: object) -> Scripted:
            batching = ScriptedBatching(nano)
            settings = {"model_name": NAME, "drain_seconds": 1.0, **options}
            made = ServeOptions(**settings)  # type: ignore[arg-type]
            context: AbstractContextManager[Running] = serving(
                nano, batching, made, send_buffer=send_buffer
            )
            running = stack.enter_context(context)
            return Scripted(running.url, running.server, running.thread, running.http, batching)

        yield start


@pytest.fixture(scope="module")
def _shared(serve_script: Serve) -> Scripted:
    return serve_script()


@pytest.fixture
def scripted(_shared: Scripted) -> Scripted:
    """A server whose answers the test writes."""
    batching = _shared.batching
    batching.script, batching.refusal = Script(), None
    for items in (batching.prompts, batching.params, batching.tickets, batching.results):
        items.clear()
    return _shared


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for something that other threads do."""
    end = time.monotonic() + seconds
    for _ in itertools.count():
        if condition():
            return
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
