"""Generated text in the shape of OpenAI's answers: whole, or chunk by chunk.

Chunks are JSON. Nearly all differ only in their text, so that the rest of such a chunk is encoded
once for each answer.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ringexport.batching import PieceEvent
from ringexport.runtime.generation import GenerationResult
from ringexport.runtime.sampling import TokenLogprobs
from ringexport.runtime.tokenizer import ModelTokenizer
from ringexport.serve.errors import encode_json
from ringexport.serve.parsing import THINK_END, Part, ReplyParser

__all__ = ["ChatReply", "CompletionReply", "Reply"]

Json = Any
_MARK = "the text"
FINISH = {"stop_token": "stop", "stop_text": "stop", "length": "length", "context": "length"}


class Reply(Protocol):
    """One answer on its way to a client."""

    def head(self) -> list[bytes]:
        """Return the chunks before the first token."""

    def chunks(self, events: Sequence[PieceEvent]) -> list[bytes]:
        """Return the chunks for new tokens, possibly none."""

    def tail(self, result: GenerationResult) -> list[bytes]:
        """Return the chunks after the last token."""

    def whole(self, result: GenerationResult) -> Json:
        """Return the answer of a request that does not stream."""


class _Envelope:
    """What all answers to a request have in common."""

    def __init__(self, prefix: str, kind: str, model: str, *, include_usage: bool = False) -> None:
        self._fields = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        self._include_usage = include_usage

    def chunk(self, choice: Json) -> bytes:
        """Return a chunk with one choice."""
        fields = {**self._fields, "choices": [choice]}
        return encode_json(fields | {"usage": None} if self._include_usage else fields)

    def usage_chunks(self, usage: Json) -> list[bytes]:
        """Return the chunk with the numbers of tokens, if it is wanted."""
        if not self._include_usage:
            return []
        return [encode_json({**self._fields, "choices": [], "usage": usage})]

    def whole(self, choice: Json, usage: Json) -> Json:
        """Return an answer with one choice."""
        return {**self._fields, "choices": [choice], "usage": usage}


class _TextChunk:
    """A chunk of which only the text changes.

    Args:
        make: returns the chunk with a text.
    """

    def __init__(self, make: Callable[[str], bytes]) -> None:
        # The last one: the model may be called so, too.
        self._before, _, self._after = make(_MARK).rpartition(encode_json(_MARK))

    def encode(self, text: str) -> bytes:
        """Return the chunk with a text."""
        return b"%b%b%b" % (self._before, encode_json(text), self._after)


class _Sent:
    """Remembers how much of a text was sent as pieces; the result may end with a bit more."""

    def __init__(self) -> None:
        self._count = 0

    def take(self, events: Sequence[PieceEvent]) -> str:
        text = "".join([event.text for event in events])
        self._count += len(text)
        return text

    def rest(self, result: GenerationResult) -> str:
        return result.text[self._count :]


class ChatReply:
    """An answer to /v1/chat/completions.

    Args:
        tokenizer: of the model.
        model: its name.
        thinking: the prompt has opened the reasoning already.
        tools: whether the model may call functions.
        stream: make chunks.
        include_usage: end a stream with the numbers of tokens.
    """

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        model: str,
        *,
        thinking: bool,
        tools: bool,
        stream: bool,
        include_usage: bool,
    ) -> None:
        kind = "chat.completion.chunk" if stream else "chat.completion"
        self._tokenizer = tokenizer
        self._envelope = _Envelope("chatcmpl", kind, model, include_usage=include_usage)
        self._parser = ReplyParser(thinking=thinking, tools=tools)
        self._thinking = thinking
        self._sent = _Sent()
        self._calls = 0
        self._content = _TextChunk(lambda text: self._chunk({"content": text}))
        self._reasoning = _TextChunk(lambda text: self._chunk({"reasoning_content": text}))

    def head(self) -> list[bytes]:
        """Return the chunk that names the role."""
        return [self._chunk({"role": "assistant", "content": ""})]

    def chunks(self, events: Sequence[PieceEvent]) -> list[bytes]:
        """Return the chunks for new tokens."""
        parts = self._parser.feed(self._sent.take(events))
        entries = _logprobs_of(events)
        if not entries:
            return [self._part(part) for part in parts]
        delta = self._delta(parts[0]) if parts else {}
        logprobs = {"content": self._logprobs(entries)}
        return [self._chunk(delta, logprobs=logprobs), *map(self._part, parts[1:])]

    def tail(self, result: GenerationResult) -> list[bytes]:
        """Return the rest of the text, the reason of the end, and the numbers of tokens."""
        parts = self._parser.feed(self._sent.rest(result)) + self._parser.flush()
        found = [self._part(part) for part in parts]
        found.append(self._chunk({}, finish=self._finish(result)))
        return found + self._envelope.usage_chunks(self._usage(result))

    def whole(self, result: GenerationResult) -> Json:
        """Return the whole answer."""
        parts = self._parser.feed(result.text) + self._parser.flush()
        content = "".join([part.content for part in parts])
        reasoning = "".join([part.reasoning for part in parts])
        calls = [_call(part) for part in parts if part.call is not None]
        self._calls = len(calls)
        message: Json = {"role": "assistant", "content": content or (None if calls else "")}
        if reasoning or self._thinking:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        choice: Json = {"index": 0, "message": message, "finish_reason": self._finish(result)}
        logs = result.logprobs
        choice["logprobs"] = None if logs is None else {"content": self._logprobs(logs)}
        return self._envelope.whole(choice, self._usage(result))

    def _part(self, part: Part) -> bytes:
        if part.call is not None:
            return self._chunk(self._delta(part))
        if part.reasoning:
            return self._reasoning.encode(part.reasoning)
        return self._content.encode(part.content)

    def _delta(self, part: Part) -> Json:
        if part.call is not None:
            self._calls += 1
            return {"tool_calls": [{"index": self._calls - 1, **_call(part)}]}
        if part.reasoning:
            return {"reasoning_content": part.reasoning}
        return {"content": part.content}

    def _chunk(self, delta: Json, *, finish: str | None = None, logprobs: Json = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return self._envelope.chunk(choice | {"logprobs": logprobs} if logprobs else choice)

    def _finish(self, result: GenerationResult) -> str:
        finish = FINISH[result.stop_reason]
        return "tool_calls" if self._calls and finish == "stop" else finish

    def _usage(self, result: GenerationResult) -> Json:
        count = self._reasoning_tokens(result) if self._thinking else 0
        return _usage(result) | {"completion_tokens_details": {"reasoning_tokens": count}}

    def _reasoning_tokens(self, result: GenerationResult) -> int:
        """Return how many tokens there are up to the end of the reasoning, or at all."""
        decoder, tail = self._tokenizer.decoder(skip_special_tokens=False), ""
        for count, token in enumerate(result.token_ids, start=1):
            tail += decoder.feed(token)
            if THINK_END in tail:
                return count
            tail = tail[1 - len(THINK_END) :]
        return result.new_tokens

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> list[Json]:
        kept = [entry for entry in entries if entry.token_id not in self._tokenizer.stop_ids]
        return [
            self._token(entry.token_id, entry.logprob)
            | {"top_logprobs": [self._token(index, value) for index, value in entry.top]}
            for entry in kept
        ]

    def _token(self, index: int, logprob: float) -> dict[str, Json]:
        data = self._tokenizer.token_bytes(index)
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": _finite(logprob), "bytes": list(data)}


class CompletionReply:
    """An answer to /v1/completions; see `ChatReply`."""

    def __init__(self, tokenizer: ModelTokenizer, model: str, *, include_usage: bool) -> None:
        self._tokenizer = tokenizer
        self._envelope = _Envelope("cmpl", "text_completion", model, include_usage=include_usage)
        self._sent = _Sent()
        self._decoder = tokenizer.decoder()
        self._offset = 0
        self._text_chunk = _TextChunk(
            lambda text: self._envelope.chunk(self._choice(text, None, None))
        )

    def head(self) -> list[bytes]:
        """Return nothing: the first chunk has text."""
        return []

    def chunks(self, events: Sequence[PieceEvent]) -> list[bytes]:
        """Return the chunk for new tokens."""
        text = self._sent.take(events)
        entries = _logprobs_of(events)
        if entries:
            return [self._envelope.chunk(self._choice(text, None, entries))]
        return [self._text_chunk.encode(text)] if text else []

    def tail(self, result: GenerationResult) -> list[bytes]:
        """Return the rest of the text, the reason of the end, and the numbers of tokens."""
        choice = self._choice(self._sent.rest(result), FINISH[result.stop_reason], None)
        return [self._envelope.chunk(choice), *self._envelope.usage_chunks(_usage(result))]

    def whole(self, result: GenerationResult) -> Json:
        """Return the whole answer."""
        choice = self._choice(result.text, FINISH[result.stop_reason], result.logprobs)
        return self._envelope.whole(choice, _usage(result))

    def _choice(
        self, text: str, finish: str | None, logprobs: Sequence[TokenLogprobs] | None
    ) -> Json:
        logs = None if logprobs is None else self._logprobs(logprobs)
        return {"index": 0, "text": text, "finish_reason": finish, "logprobs": logs}

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> Json:
        kept = [entry for entry in entries if entry.token_id not in self._tokenizer.stop_ids]
        tokens = [self._text(entry.token_id) for entry in kept]
        offsets = []
        for entry in kept:
            offsets.append(self._offset)
            self._offset += len(self._decoder.feed(entry.token_id))
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(entry.logprob) for entry in kept],
            "top_logprobs": [
                {self._text(index): _finite(value) for index, value in entry.top} for entry in kept
            ],
            "text_offset": offsets,
        }

    def _text(self, index: int) -> str:
        """Return the text of a token; one that splits a character has bytes, as OpenAI writes them.

        Alternatives are told apart by their text alone.
        """
        text = self._tokenizer.token_text(index)
        if text is not None:
            return text
        data = self._tokenizer.token_bytes(index)
        return "bytes:" + "".join([f"\\x{byte:02x}" for byte in data])


def _logprobs_of(events: Sequence[PieceEvent]) -> list[TokenLogprobs]:
    """Return the entries of events, of which all have some or none has."""
    if not (events and events[0].logprobs):
        return []
    return [entry for event in events for entry in event.logprobs]


def _call(part: Part) -> dict[str, Json]:
    assert part.call is not None
    function = {"name": part.call.name, "arguments": part.call.arguments}
    return {"id": part.call.id, "type": "function", "function": function}


def _finite(logprob: float) -> float:
    """Return a number that JSON has; OpenAI writes -9999 for impossible tokens, too."""
    return max(logprob, -9999.0)


def _usage(result: GenerationResult) -> dict[str, Json]:
    return {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.new_tokens,
        "total_tokens": result.prompt_tokens + result.new_tokens,
        "prompt_tokens_details": {"cached_tokens": result.cached_tokens},
    }
