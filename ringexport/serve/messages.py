"""Messages and tools of a chat, as clients send them and as the template takes them."""

import json
import re
from typing import Any

from ringexport.serve.errors import ApiError
from ringexport.serve.fields import Fields, Json

__all__ = ["read_messages", "read_tools"]

ROLES = ("system", "developer", "user", "assistant", "tool")
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MAX_PARTS = 1000
MAX_CALLS = 128
Message = dict[str, Any]


def read_messages(fields: Fields, *, most: int) -> list[Message]:
    """Return the messages of a request.

    Raises:
        ApiError: none, too many, or one that cannot be used.
    """
    items = fields.items("messages", most=most)
    if not items:
        raise fields.required("messages", "at least one message")
    return [_message(Fields(item, f"messages[{index}]")) for index, item in enumerate(items)]


def _message(fields: Fields) -> Message:
    role = fields.choice("role", ROLES)
    if role is None:
        raise fields.required("role", " or ".join(map(repr, ROLES)))
    message: Message = {"role": role}
    content = _content(fields)
    name = fields.text("name", most=200)
    if name is not None:
        message["name"] = name
    if role == "assistant":
        message |= _assistant(fields)
    elif role == "tool":
        identity = fields.text("tool_call_id", most=200)
        if identity is not None:
            message["tool_call_id"] = identity
    if content is None and not message.get("tool_calls"):
        raise fields.required("content", "a string")
    fields.end()
    return {**message, "content": content or ""}


def _assistant(fields: Fields) -> Message:
    """Return what only the model's own messages have."""
    found: Message = {}
    reasoning = fields.text("reasoning_content")
    if reasoning is not None:
        found["reasoning_content"] = reasoning
    for name in ("refusal", "audio", "function_call"):
        fields.only(name, (), "leave it out of the message")
    fields.only("annotations", ([],), "leave it out of the message")
    calls = fields.items("tool_calls", most=MAX_CALLS)
    if calls:
        path = fields.where("tool_calls")
        found["tool_calls"] = [
            _call(Fields(item, f"{path}[{index}]")) for index, item in enumerate(calls)
        ]
    return found


def _call(fields: Fields) -> Message:
    identity = fields.text("id", most=200)
    fields.only("index", tuple(range(MAX_CALLS)), "expected a small number")
    fields.choice("type", ("function",))
    function = fields.object("function")
    if function is None:
        raise fields.required("function", "an object")
    fields.end()
    name, arguments = _name(function), function.text("arguments")
    function.end()
    try:
        parsed = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise function.error("arguments", "is no JSON object in a string")
    call = {"name": name, "arguments": arguments or "{}"}
    return {"id": identity, "type": "function", "function": call}


def _content(fields: Fields) -> str | None:
    """Return the text of a message: a string, or parts that are all text."""
    value = fields.get("content")
    if not isinstance(value, list):
        return fields.text("content")
    parts = fields.items("content", most=MAX_PARTS) or []
    texts = []
    for index, item in enumerate(parts):
        part = Fields(item, f"{fields.where('content')}[{index}]")
        kind = part.text("type")
        if kind != "text":
            raise part.error("type", "is not supported: the model reads only text")
        text = part.text("text")
        if text is None:
            raise part.required("text", "a string")
        part.end()
        texts.append(text)
    return "\n".join(texts)


def read_tools(fields: Fields, *, most: int) -> list[dict[str, Json]] | None:
    """Return the functions that the model may call; None without any, or with none allowed.

    Raises:
        ApiError: something that is no function, or a choice that is not left to the model.
    """
    items = fields.items("tools", most=most)
    choice = fields.get("tool_choice")
    tools = [_tool(Fields(item, f"tools[{index}]")) for index, item in enumerate(items or [])]
    if choice not in (None, "auto", "none"):
        raise fields.error(
            "tool_choice",
            "must be 'auto' or 'none': the model cannot be made to call a function",
            code="unsupported_parameter",
        )
    fields.only("parallel_tool_calls", (True,), "the model decides how many calls it makes")
    fields.only("functions", ([],), "describe functions in tools")
    fields.only("function_call", ("none",), "use tool_choice")
    return None if choice == "none" or not tools else tools


def _tool(fields: Fields) -> dict[str, Json]:
    if fields.choice("type", ("function",)) is None:
        raise fields.required("type", "'function'")
    function = fields.object("function")
    if function is None:
        raise fields.required("function", "an object")
    fields.end()
    found: dict[str, Json] = {"name": _name(function)}
    description = function.text("description")
    if description is not None:
        found["description"] = description
    parameters = function.object("parameters")
    if parameters is not None:
        found["parameters"] = function.get("parameters")
    function.only("strict", (False,), "arguments are not constrained by their schema")
    function.end()
    return {"type": "function", "function": found}


def _name(fields: Fields) -> str:
    name = fields.text("name")
    if name is None or not NAME.fullmatch(name):
        raise ApiError(
            f"{fields.where('name')} must be 1 to 64 letters, digits, '_', '.' or '-'",
            param=fields.where("name"),
        )
    return name
