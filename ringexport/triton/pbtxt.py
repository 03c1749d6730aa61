"""Write protobuf text format, which config.pbtxt is in, without protobuf."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Union

__all__ = ["EnumName", "Message", "Value", "to_pbtxt"]


class EnumName(str):
    """The name of an enum's value, which is written without quotes."""

    __slots__ = ()


Value = Union[str, int, bool, "Message", Sequence["Value"]]
"""A message is a mapping; a sequence stands for a repeated field."""

Message = Mapping[str, Value]


def to_pbtxt(message: Message) -> str:
    """Return the text of a message, a field a line.

    Args:
        message: field name to value; an empty sequence leaves its field out.
    """
    return "\n".join(_lines(message)) + "\n"


def _lines(message: Message) -> Iterator[str]:
    for name, value in message.items():
        if isinstance(value, Sequence) and not isinstance(value, str):
            yield from _repeated(name, value)
        else:
            yield from _field(name, value)


def _repeated(name: str, values: Sequence[Value]) -> Iterator[str]:
    if values and all(isinstance(value, str | int) for value in values):
        yield f"{name}: [ {', '.join(_scalar(value) for value in values)} ]"
        return
    for value in values:
        yield from _field(name, value)


def _field(name: str, value: Value) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield f"{name}: {_scalar(value)}"
        return
    inner = list(_lines(value))
    if not inner:
        yield f"{name} {{ }}"
        return
    yield f"{name} {{"
    yield from (f"  {line}" for line in inner)
    yield "}"


def _scalar(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, EnumName | int):
        return str(value)
    return json.dumps(value, ensure_ascii=False)
