"""From a checked request to a running one."""

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from ringexport.batching import BatchingStats, Ticket
from ringexport.batching.events import OnEvent
from ringexport.errors import RingExportError
from ringexport.runtime.sampling import SamplingParams
from ringexport.runtime.session import Engine
from ringexport.serve.errors import ApiError, JsonReply, translated
from ringexport.serve.generation import Feed, Hub
from ringexport.serve.metrics import Metrics
from ringexport.serve.options import ServeOptions
from ringexport.serve.parsing import CALL, CALL_END, THINK, THINK_END
from ringexport.serve.replies import ChatReply, CompletionReply, Reply
from ringexport.serve.requests import ChatRequest, CompletionRequest, Wanted
from ringexport.serve.streaming import EventStream, abort, wait_for_disconnect

__all__ = ["Batcher", "Service"]


class Batcher(Protocol):
    """What a server needs of `ringexport.batching.BatchingEngine`."""

    @property
    def alive(self) -> bool:
        """Whether requests are taken on."""

    def submit(
        self, prompt: Sequence[int], params: SamplingParams, *, on_event: OnEvent | None = None
    ) -> Ticket:
        """Take on a request."""

    def stats(self) -> BatchingStats:
        """Return what has happened so far."""

    def close(self, *, drain_seconds: float = 0.0) -> None:
        """End what runs."""


class Service:
    """Answers requests with one engine.

    Args:
        engine: for its tokenizer, template and sizes; nothing is generated with it directly.
        batching: runs the requests.
        options: limits.
        metrics: told about first tokens.

    Attributes:
        context: tokens that the model can hold.
        draining: no new requests are taken on.
    """

    def __init__(
        self, engine: Engine, batching: Batcher, options: ServeOptions, metrics: Metrics
    ) -> None:
        self._engine, self._batching = engine, batching
        self._options, self._metrics = options, metrics
        self._hub: Hub | None = None  # made on the event loop
        self._render_lock = threading.Lock()  # a template is rendered in one sandbox
        self.context = engine.runner.spec.context_length
        self.draining = False
        markers = (THINK, THINK_END, CALL, CALL_END)
        special = engine.tokenizer.special_ids
        ids = [engine.tokenizer.encode(marker) for marker in markers]
        self._markers_are_special = any(len(each) == 1 and each[0] in special for each in ids)
        engine.tokenizer.least_tokens("")  # looks through the vocabulary now, not in a request

    async def chat(self, request: Request, chat: ChatRequest) -> Response:
        """Answer a chat.

        Raises:
            ApiError: the request cannot be taken on, or has failed.
            ClientGoneError: nobody waits for the answer.
        """
        self._check_model(chat.wanted)
        ids, thinking = await asyncio.to_thread(self._chat_ids, chat)
        wanted = chat.wanted
        if self._markers_are_special:
            wanted = replace(wanted, params=replace(wanted.params, skip_special_tokens=False))
        reply = ChatReply(
            self._engine.tokenizer,
            self._options.model_name,
            thinking=thinking,
            tools=chat.tools is not None,
            stream=wanted.stream,
            include_usage=wanted.include_usage,
        )
        return await self._answer(request, ids, wanted, reply)

    async def complete(self, request: Request, completion: CompletionRequest) -> Response:
        """Continue a text; see `chat`."""
        wanted = completion.wanted
        self._check_model(wanted)
        prompt = completion.prompt
        if isinstance(prompt, str):  # only text takes long
            ids = await asyncio.to_thread(self._prompt_ids, prompt)
        else:
            ids = self._prompt_ids(prompt)
        reply = CompletionReply(
            self._engine.tokenizer, self._options.model_name, include_usage=wanted.include_usage
        )
        return await self._answer(request, ids, wanted, reply)

    async def _answer(
        self, request: Request, ids: list[int], wanted: Wanted, reply: Reply
    ) -> Response:
        feed = self._submit(request.scope, ids, wanted)
        if wanted.stream:
            return EventStream(feed, reply, self._options)
        watcher = asyncio.create_task(wait_for_disconnect(request.receive, feed))
        try:
            return JsonReply(reply.whole(await feed.result()))
        finally:
            watcher.cancel()
            feed.cancel()

    def _submit(self, scope: Scope, ids: list[int], wanted: Wanted) -> Feed:
        started = scope.get("state", {}).get("started", time.perf_counter())
        self._hub = self._hub or Hub()
        feed = Feed(
            self._hub,
            most=self._options.max_pending_tokens,
            pieces=wanted.stream,
            on_overflow=lambda: abort(scope),
            on_first_token=lambda: self._metrics.first_token(time.perf_counter() - started),
        )
        try:
            feed.start(self._batching.submit(ids, wanted.params, on_event=feed.on_event))
        except RingExportError as error:
            raise translated(error) from error
        return feed

    def _chat_ids(self, chat: ChatRequest) -> tuple[list[int], bool]:
        """Return the prompt, and whether it ends in the middle of reasoning."""
        if self._engine.tokenizer.chat_template is None:
            message = "the model has no chat template; continue texts with /v1/completions"
            raise ApiError(message, code="chat_template")
        # As one text, since tokens may span messages, and as templates trim them.
        said = "".join(one["content"].strip() for one in chat.messages if one["role"] == "user")
        self._check_length(self._engine.tokenizer.least_tokens(said), at_least=True)
        try:
            with self._render_lock:
                text = self._engine.chat_prompt(
                    chat.messages, thinking=chat.thinking, tools=chat.tools
                )
        except RingExportError as error:
            raise translated(error) from error
        return self._prompt_ids(text), text.rstrip().endswith(THINK)

    def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        tokenizer = self._engine.tokenizer
        if isinstance(prompt, str):
            self._check_length(tokenizer.least_tokens(prompt), at_least=True)
        try:
            ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        except RingExportError as error:
            raise translated(error) from error
        self._check_length(len(ids))
        vocabulary = self._engine.runner.spec.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
            message = f"the prompt holds a token id out of range: ids are 0 to {vocabulary - 1:,}"
            raise ApiError(message, param="prompt")
        return ids

    def _check_length(self, tokens: int, *, at_least: bool = False) -> None:
        """Refuse a prompt of so many tokens, or of so many or more, if it is too long."""
        most = min(self.context, self._options.max_prompt_tokens or self.context)
        if tokens > most:
            count = f"{tokens:,} tokens" + (" or more" if at_least else "")
            message = f"the prompt has {count}, this server allows {most:,}"
            raise ApiError(message, code="context_length_exceeded")

    def _check_model(self, wanted: Wanted) -> None:
        if self.draining:
            raise ApiError(
                "the server is shutting down",
                status=503,
                code="shutting_down",
                headers={"Retry-After": "5"},
            )
        if wanted.model not in (None, self._options.model_name):
            raise ApiError(
                f"there is no model {wanted.model!r:.80}, this server has"
                f" {self._options.model_name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )
