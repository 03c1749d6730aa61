"""What a chat model writes becomes reasoning, content and tool calls, piece by piece."""

import json
import uuid
from dataclasses import dataclass
from typing import Any, Never

__all__ = ["Part", "ReplyParser", "ToolCall"]

THINK, THINK_END = "<think>", "</think>"
CALL, CALL_END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A function that the model wants called.

    Attributes:
        id: new for each call.
        name: of the function.
        arguments: a JSON object as text.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of a reply; one of the three is set."""

    content: str = ""
    reasoning: str = ""
    call: ToolCall | None = None


class ReplyParser:
    """Splits the text of a reply; text that is only nearly a call stays content.

    Args:
        thinking: the prompt has opened the reasoning already.
        tools: look for calls.
    """

    def __init__(self, *, thinking: bool, tools: bool) -> None:
        self._mode = "reasoning" if thinking else "start"
        self._tools = tools
        self._held = ""
        self._trim = True  # newlines at the beginning of reasoning and content are no text
        self._called = False

    def feed(self, text: str) -> list[Part]:
        """Return what the text completes."""
        if self._mode == "content" and not (self._tools or self._trim):
            return [_content(text)] if text else []  # nothing is ever held back here
        self._held += text
        parts: list[Part] = []
        while self._step(parts):
            pass
        return parts

    def flush(self) -> list[Part]:
        """Return what was held back, at the end of the reply."""
        held, self._held = self._held, ""
        if self._mode == "reasoning":
            held = held.rstrip("\n")
            return [Part(reasoning=held)] if held else []
        if self._mode == "call":
            call = _parse(held)
            return [_content(CALL + held) if call is None else Part(call=call)]
        if self._called and not held.strip():
            return []
        return [_content(held)] if held else []

    def _step(self, parts: list[Part]) -> bool:
        """Take the next piece off the held text; return whether another may follow."""
        steps = {
            "start": self._start,
            "reasoning": self._reasoning,
            "content": self._content,
            "call": self._call,
        }
        return bool(self._held) and steps[self._mode](parts)

    def _start(self, parts: list[Part]) -> bool:
        del parts
        text = self._held.lstrip()
        if text.startswith(THINK):
            self._mode, self._held = "reasoning", text[len(THINK) :]
            return True
        if THINK.startswith(text):
            return False
        self._mode = "content"
        self._trim = False
        return True

    def _reasoning(self, parts: list[Part]) -> bool:
        text, found = self._until(THINK_END)
        if text:
            parts.append(Part(reasoning=text))
        if found:
            self._mode, self._trim = "content", True
        return found

    def _content(self, parts: list[Part]) -> bool:
        if self._tools:
            text, found = self._until(CALL)
        else:
            text, found, self._held = self._trimmed(self._held), False, ""
        if text:
            parts.append(_content(text))
        if found:
            self._mode = "call"
        return found

    def _call(self, parts: list[Part]) -> bool:
        end = self._held.find(CALL_END)
        if end < 0:
            return False
        inside, self._held = self._held[:end], self._held[end + len(CALL_END) :]
        call = _parse(inside)
        parts.append(_content(CALL + inside + CALL_END) if call is None else Part(call=call))
        self._called = self._called or call is not None
        self._mode = "content"
        return True

    def _until(self, marker: str) -> tuple[str, bool]:
        """Take the text before a marker, without the newlines around it; hold back the rest."""
        start = self._held.find(marker)
        if start >= 0:
            text, self._held = self._held[:start], self._held[start + len(marker) :]
            return self._trimmed(text.rstrip()), True
        end = len(self._held) - _overlap(self._held, marker)
        end = len(self._held[:end].rstrip())
        text, self._held = self._held[:end], self._held[end:]
        return self._trimmed(text), False

    def _trimmed(self, text: str) -> str:
        if self._trim:
            text = text.lstrip("\n")
            self._trim = not text
        return text


def _content(text: str) -> Part:
    return Part(content=text)


def _overlap(text: str, marker: str) -> int:
    """Return the length of the longest end of the text that the marker begins with."""
    for size in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0


def _loads(text: str) -> Any:
    """Return the value of strict JSON, which every client can read."""

    def refuse(constant: str) -> Never:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def _parse(text: str) -> ToolCall | None:
    """Return the call in the text between the markers, None if it is none."""
    try:
        data = _loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or not isinstance(data.get("name"), str) or not data["name"]:
        return None
    arguments = data.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = _loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except ValueError:  # a number that is too large for a float
        return None
    identity = f"call_{uuid.uuid4().hex[:24]}"
    return ToolCall(id=identity, name=data["name"], arguments=text)
