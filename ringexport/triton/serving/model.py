"""The streaming model: one batching engine per instance, a decoupled reply per request."""

import contextlib
import gc
import threading
import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ringexport.batching import BatchingEngine, BatchingOptions
from ringexport.batching.request import guarded
from ringexport.errors import CheckpointError, ConfigError
from ringexport.runtime.generation import GenerationResult
from ringexport.runtime.registry import RunnerOptions
from ringexport.runtime.session import Engine
from ringexport.triton.serving.numpy_check import check_numpy
from ringexport.triton.serving.replies import OnEnd, Outbox, Reply, turn_ended
from ringexport.triton.serving.requests import Wanted, read_request
from ringexport.triton.serving.sessions import SessionTable, Turn
from ringexport.triton.serving.settings import ServingSettings

__all__ = ["StreamingModel"]

Api = Any  # triton_python_backend_utils, which exists only inside of Triton
Request = Any  # its InferenceRequest

_POLL_SECONDS = 0.2
_SWEEP_SECONDS = 1.0
_MIB = 1 << 20


class StreamingModel:
    """What the generated model.py forwards to.

    Args:
        api: the module triton_python_backend_utils.
        args: what Triton gives to `initialize`.

    Raises:
        RingExportError: the bundle or a parameter cannot be used.
    """

    def __init__(self, api: Api, args: Mapping[str, str]) -> None:
        check_numpy(api)
        settings = ServingSettings.from_args(args)
        self._api = api
        self._settings = settings
        device = "cuda" if args.get("model_instance_kind") == "GPU" else "cpu"
        self._engine = Engine.open(
            settings.bundle,
            settings.backend,
            options=RunnerOptions(
                threads=settings.threads,
                spin=False,
                device=device,
                max_batch=settings.max_batch,
            ),
            verify=False,
        )
        options = BatchingOptions(
            max_batch=settings.max_batch,
            max_queue=settings.max_queue,
            token_budget=settings.token_budget,
            prefix_cache_bytes=settings.prefix_cache_mib * _MIB,
            max_new_tokens_limit=settings.max_new_tokens_limit,
        )
        self._batching = BatchingEngine(self._engine, options)
        self._sessions = SessionTable(
            limit=settings.max_sessions, idle_seconds=settings.session_idle_seconds
        )
        self._outbox = Outbox(api)
        self._live: set[Reply] = set()
        self._live_lock = threading.Lock()
        self._sweep_at: float | None = None
        self._closing = threading.Event()
        self._watch = threading.Thread(target=self._run_watch, name="ringexport-watch", daemon=True)
        self._watch.start()
        api.Logger.log_info(
            f"ringexport: {args.get('model_instance_name')} serves {settings.bundle} with"
            f" {self._engine.runner.spec.name}"
        )

    def execute(self, requests: Iterable[Request]) -> None:
        """Take on requests; their responses follow on other threads."""
        for request in requests:
            self._take_on(request)

    def close(self) -> None:
        """Let running requests end for a while, and give everything back."""
        self._batching.close(drain_seconds=float(self._settings.drain_seconds))
        self._closing.set()
        self._watch.join()
        self._outbox.close()
        self._engine.close()

    def _take_on(self, request: Request) -> None:
        """Start to answer a request; whatever goes wrong with it is the end of it alone."""
        reply = Reply(self._api, request.get_response_sender(), self._outbox)
        error = guarded(partial(self._start, request, reply))
        if error is not None:
            if isinstance(error, CheckpointError) and self._sweep_at is None:
                self._sweep_at = time.monotonic() + _SWEEP_SECONDS
            reply.fail(error)

    def _start(self, request: Request, reply: Reply) -> None:
        session_id, start, end = self._sequence(request)
        wanted = read_request(partial(self._read, request), self._engine)
        reply.stream = wanted.stream
        if session_id is None:
            self._submit(wanted, None, reply)
            return
        turn = self._sessions.begin(session_id, start=start, last=end)
        turn.cancel = reply.cancel
        try:
            self._submit(wanted, turn, reply)
        except BaseException:
            turn.abort()
            raise

    def _submit(self, wanted: Wanted, turn: Turn | None, reply: Reply) -> None:
        if wanted.prompt is None:
            if turn is None or not turn.last:
                raise ConfigError(
                    "the request has no prompt",
                    hint="give text_input, input_ids or messages",
                )
            turn.abort()
            reply.end_session()
            return
        history = () if turn is None else turn.history
        if wanted.whole and history:
            raise ConfigError(
                "messages hold a whole chat, but the session has text already",
                hint="set the start flag, or continue the session with text_input",
            )
        prompt = [*history, *wanted.prompt]
        reply.prompt_tokens = len(prompt)
        reply.on_end = partial(self._ended, reply, turn_ended(turn, prompt))
        with self._live_lock:
            self._live.add(reply)
        try:
            reply.ticket = self._batching.submit(prompt, wanted.params, on_event=reply.on_event)
        except BaseException:
            self._forget(reply)
            raise

    def _ended(self, reply: Reply, tell_session: OnEnd, result: GenerationResult | None) -> None:
        self._forget(reply)
        tell_session(result)

    def _forget(self, reply: Reply) -> None:
        with self._live_lock:
            self._live.discard(reply)

    def _read(self, request: Request, name: str) -> npt.NDArray[Any] | None:
        tensor = self._api.get_input_tensor_by_name(request, name)
        return None if tensor is None else np.asarray(tensor.as_numpy())

    def _sequence(self, request: Request) -> tuple[int | str | None, bool, bool]:
        """Return correlation id, None for a request that stands alone, start and end flag."""
        flags = request.flags()
        start = bool(flags & self._api.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START)
        end = bool(flags & self._api.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END)
        return request.correlation_id() or None, start, end

    def _run_watch(self) -> None:
        """Cancel what clients have cancelled, and forget idle sessions, until `close`."""
        while not self._closing.wait(_POLL_SECONDS):
            self._sessions.expire()
            self._sweep()
            with self._live_lock:
                live = list(self._live)
            for reply in live:
                with contextlib.suppress(self._api.TritonModelException):
                    reply.poll()

    def _sweep(self) -> None:
        """Free requests that a chat template refused.

        Its errors hold their frames in a cycle, and Triton unloads a model only when all requests
        are freed.
        """
        if self._sweep_at is not None and time.monotonic() >= self._sweep_at:
            self._sweep_at = None
            gc.collect()
