"""Serving without a server: parameters, replies and the check of numpy, with a made-up Triton."""

import gc
import json
import threading
import time
import weakref
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ringexport.batching import FailedEvent, FinishedEvent, PieceEvent
from ringexport.errors import (
    BackendUnavailableError,
    CheckpointError,
    ConfigError,
    QueueFullError,
    RingExportError,
    ShapeError,
)
from ringexport.runtime.generation import GenerationResult, StopReason, Timings
from ringexport.triton.serving.model import StreamingModel
from ringexport.triton.serving.numpy_check import check_numpy
from ringexport.triton.serving.replies import Outbox, Reply, turn_ended
from ringexport.triton.serving.sessions import (
    SessionBusyError,
    SessionLimitError,
    SessionTable,
    UnknownSessionError,
)
from ringexport.triton.serving.settings import ServingSettings

FINAL = 1


class TritonError:
    INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, CANCELLED = range(5)

    def __init__(self, message: str, code: int) -> None:
        self.message = message
        self.code = code


class SendError(Exception):
    pass


class Request(SimpleNamespace):
    """Can be watched by weakref."""


@dataclass
class Sender:
    """Keeps what is sent."""

    broken: bool = False
    cancelled: bool = False
    sent: list[tuple[Any, int]] = field(default_factory=list)

    def send(self, response: Any = None, flags: int = 0) -> None:
        if self.broken:
            raise SendError("the client has gone")
        self.sent.append((response, flags))

    def is_cancelled(self) -> bool:
        return self.cancelled


@dataclass
class Response:
    output_tensors: list[tuple[str, np.ndarray]] = field(default_factory=list)
    error: TritonError | None = None


WARNINGS: list[str] = []
API = SimpleNamespace(
    TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL,
    TRITONSERVER_REQUEST_FLAG_SEQUENCE_START=1,
    TRITONSERVER_REQUEST_FLAG_SEQUENCE_END=2,
    TritonModelException=SendError,
    TritonError=TritonError,
    InferenceResponse=Response,
    Tensor=lambda name, array: (name, array),
    Logger=SimpleNamespace(log_warn=WARNINGS.append),
)


def result(reason: StopReason = "length") -> GenerationResult:
    timings = Timings(
        time_to_first_token_ms=1, total_ms=1, prefill_tokens_per_second=1, tokens_per_second=1
    )
    return GenerationResult(
        text="ab",
        token_ids=(1, 2),
        stop_reason=reason,
        stop_text=None,
        prompt_tokens=3,
        new_tokens=2,
        timings=timings,
        cached_tokens=2,
    )


def values(response: Response) -> dict[str, Any]:
    return {name: array.tolist() for name, array in response.output_tensors}


def test_pieces_that_wait_are_sent_together() -> None:
    outbox, sender = Outbox(API), Sender()
    reply = Reply(API, sender, outbox)
    reply.stream, reply._queued = True, True  # as if the outbox were busy with another reply
    reply.on_event(PieceEvent(text="a", token_ids=(1,)))
    reply.on_event(PieceEvent(text="b", token_ids=(2,)))
    reply.send()
    reply.on_event(FinishedEvent(result=result()))
    outbox.close()
    first, last = sender.sent
    assert first[1] == 0
    assert values(first[0])["text_output"] == [b"ab"]
    assert values(first[0])["token_ids"] == [1, 2]
    assert last[1] == FINAL
    assert values(last[0])["finish_reason"] == [b"length"]
    assert values(last[0])["completion_tokens"] == [2]
    assert values(last[0])["cached_tokens"] == [2]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), TritonError.INVALID_ARG),
        (ShapeError("x"), TritonError.INVALID_ARG),
        (QueueFullError("x"), TritonError.UNAVAILABLE),
        (SessionLimitError("x"), TritonError.UNAVAILABLE),
        (SessionBusyError("x"), TritonError.UNAVAILABLE),
        (UnknownSessionError("x"), TritonError.NOT_FOUND),
        (RingExportError("x"), TritonError.INTERNAL),
    ],
)
def test_errors_get_the_code_of_their_kind(error: RingExportError, code: int) -> None:
    outbox, sender = Outbox(API), Sender()
    Reply(API, sender, outbox).on_event(FailedEvent(error=error))
    outbox.close()
    [(response, flags)] = sender.sent
    assert flags == FINAL
    assert response.error.code == code


def test_a_client_learns_no_path_of_the_server() -> None:
    outbox, sender = Outbox(API), Sender()
    Reply(API, sender, outbox).fail(CheckpointError("the template in /srv/secret fails"))
    outbox.close()
    [(response, flags)] = sender.sent
    assert flags == FINAL
    assert response.error.code == TritonError.INVALID_ARG
    assert "chat template" in response.error.message
    assert "secret" not in response.error.message
    assert "/srv/secret" in WARNINGS[-1]


def _fail(reply: Reply) -> None:
    try:
        int(f"no number: {reply}")
    except ValueError as error:
        failure = ConfigError(str(error))
        failure.__context__ = error  # whose traceback holds this frame, and with it the reply
        reply.fail(failure)


def test_an_answered_request_is_freed_at_once() -> None:
    """Triton unloads a model only when nothing holds its requests."""
    outbox, sender = Outbox(API), Sender()
    reply = Reply(API, sender, outbox)
    reply.on_end = partial(print, reply)  # as the model does, which names the reply
    freed = weakref.ref(reply)
    gc.disable()
    try:
        _fail(reply)
        outbox.close()
        assert sender.sent
        del reply
        assert freed() is None
    finally:
        gc.enable()


def test_a_request_that_a_template_refused_is_freed_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of templates hold their own frames, and with them those of the request."""
    model = StreamingModel.__new__(StreamingModel)
    model._api, model._outbox, model._live = API, Outbox(API), set()
    model._sessions = SessionTable(limit=4, idle_seconds=60)
    monkeypatch.setattr(model, "_engine", SimpleNamespace(), raising=False)
    model._live_lock, model._closing, model._sweep_at = threading.Lock(), threading.Event(), None

    def refuse(*_: object) -> None:
        inner = ValueError("of the template")
        inner.args = (inner,)
        try:
            raise inner
        except ValueError as error:
            raise CheckpointError("the chat template cannot be used") from error

    monkeypatch.setattr(model, "_read", refuse)
    sender = Sender()
    request = Request(get_response_sender=lambda: sender, flags=lambda: 0, correlation_id=lambda: 0)
    freed = weakref.ref(request)
    watch = threading.Thread(target=model._run_watch)
    gc.disable()
    try:
        watch.start()
        model.execute([request])
        del request
        assert freed() is not None, "no cycle, then"
        deadline = time.monotonic() + 20
        while freed() is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert freed() is None
    finally:
        gc.enable()
        model._closing.set()
        watch.join()
        model._outbox.close()


def test_a_bug_in_a_request_is_answered_and_leaves_its_session() -> None:
    model = StreamingModel.__new__(StreamingModel)
    model._api, model._outbox = API, Outbox(API)
    model._sessions = SessionTable(limit=4, idle_seconds=60)
    model._engine = SimpleNamespace(tokenizer=None)  # type: ignore[assignment]
    sender = Sender()
    request = SimpleNamespace(
        get_response_sender=lambda: sender, flags=lambda: 1, correlation_id=lambda: 7
    )
    model._read = lambda _, name: np.array(["x"]) if name == "text_input" else None  # type: ignore[method-assign]
    model.execute([request])
    model._engine = SimpleNamespace(  # type: ignore[assignment]
        tokenizer=SimpleNamespace(encode=lambda _: [1])
    )
    model.execute([request])  # there is no batching engine either
    model._outbox.close()
    assert [flags for _, flags in sender.sent] == [FINAL, FINAL]
    assert all("internal error" in response.error.message for response, _ in sender.sent)
    assert len(model._sessions) == 0


def test_a_whole_chat_does_not_go_behind_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    model = StreamingModel.__new__(StreamingModel)
    model._api, model._outbox = API, Outbox(API)
    model._sessions = SessionTable(limit=4, idle_seconds=60)
    model._sessions.begin(7, start=True, last=False).finish([1, 2])
    tokenizer = SimpleNamespace(encode=lambda _: [3])
    engine = SimpleNamespace(tokenizer=tokenizer, chat_prompt=lambda _, **__: "x")
    monkeypatch.setattr(model, "_engine", engine, raising=False)
    chat = np.array(['[{"role": "user", "content": "a"}]'])
    monkeypatch.setattr(model, "_read", lambda _, name: chat if name == "messages" else None)
    sender = Sender()
    request = SimpleNamespace(
        get_response_sender=lambda: sender, flags=lambda: 0, correlation_id=lambda: 7
    )
    model.execute([request])
    model._outbox.close()
    [(response, _)] = sender.sent
    assert response.error.code == TritonError.INVALID_ARG
    assert "messages hold a whole chat" in response.error.message
    assert model._sessions.begin(7, start=False, last=False).history == (1, 2)


def test_the_session_knows_before_the_client() -> None:
    table = SessionTable(limit=1, idle_seconds=1)
    turn = table.begin(1, start=True, last=False)
    outbox, sender = Outbox(API), Sender()
    reply = Reply(API, sender, outbox)
    reply._queued = True
    reply.on_end = turn_ended(turn, [5])
    reply.on_event(FinishedEvent(result=result("cancelled")))
    assert sender.sent == []
    assert table.begin(1, start=False, last=False).history == (5, 1, 2)
    reply.send()
    outbox.close()
    assert sender.sent[0][0].error.code == TritonError.CANCELLED


def test_a_reply_that_cannot_be_sent_stops_no_other() -> None:
    outbox, broken, sender = Outbox(API), Sender(broken=True), Sender()
    Reply(API, broken, outbox).on_event(FinishedEvent(result=result()))
    Reply(API, sender, outbox).on_event(FinishedEvent(result=result()))
    outbox.close()
    assert len(sender.sent) == 1
    assert "the client has gone" in WARNINGS[-1]


def test_nobody_asks_for_cancellation_while_the_last_response_is_sent() -> None:
    sending, asked = threading.Event(), threading.Event()

    class SlowSender(Sender):
        def send(self, response: Any = None, flags: int = 0) -> None:
            sending.set()
            assert not asked.wait(0.2)
            super().send(response, flags)

        def is_cancelled(self) -> bool:
            asked.set()
            return False

    outbox, sender = Outbox(API), SlowSender()
    reply = Reply(API, sender, outbox)
    reply.on_event(FinishedEvent(result=result()))
    assert sending.wait(10)
    reply.poll()
    outbox.close()
    assert not asked.is_set()
    assert len(sender.sent) == 1


def settings(**parameters: str) -> ServingSettings:
    config = {"parameters": {key: {"string_value": value} for key, value in parameters.items()}}
    args = {"model_config": json.dumps(config), "model_repository": "/r/m", "model_version": "1"}
    return ServingSettings.from_args(args)


def test_parameters_are_read() -> None:
    found = settings(bundle="bundle", threads="", max_batch="4", max_sessions="0", max_queue="1")
    assert found.bundle == Path("/r/m/1/bundle")
    assert (found.threads, found.max_batch, found.max_sessions, found.max_queue) == (None, 4, 0, 1)
    assert settings(bundle="/b", threads="3", FORCE_CPU_ONLY_INPUT_TENSORS="yes").threads == 3
    assert settings(bundle="/b").bundle == Path("/b")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "no parameter 'bundle'"),
        ({"bundle": "b", "max_batch": "many"}, "max_batch is 'many'"),
        ({"bundle": "b", "threads": "-1"}, "threads is '-1'"),
    ],
)
def test_bad_parameters_are_named(parameters: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**parameters)


class DlpackTensor:
    """A tensor that reads DLPack as Triton does, and garbles it if `broken`."""

    broken = False

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    @classmethod
    def from_dlpack(cls, name: str, producer: Any) -> "DlpackTensor":
        del name
        return cls(np.from_dlpack(producer))

    def as_numpy(self) -> np.ndarray:
        return np.broadcast_to(self._array[:1], 4) if self.broken else self._array


def test_a_python_backend_of_another_numpy_is_refused() -> None:
    check_numpy(SimpleNamespace(Tensor=DlpackTensor))
    broken = type("Broken", (DlpackTensor,), {"broken": True})
    with pytest.raises(BackendUnavailableError, match="built for numpy 1"):
        check_numpy(SimpleNamespace(Tensor=broken))
