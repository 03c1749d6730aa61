"""JSON to frozen dataclasses and back: strict types, no unknown keys, messages with the place."""

import dataclasses
import difflib
import json
import math
import types
from collections.abc import Callable
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ringexport import strict_json
from ringexport.errors import BundleError

__all__ = ["decode", "encode", "parse_object"]

T = TypeVar("T")
Json = Any  # what json.loads returns; every use narrows it


def parse_object(text: str, *, source: str) -> dict[str, Json]:
    """Parse a JSON object; duplicate keys, NaN and anything but an object are errors.

    Raises:
        BundleError: the text is not such an object; the message starts with `source`.
    """
    return strict_json.parse_object(text, source=source, error=BundleError, hint=None)


def encode(value: object) -> str:
    """Write a dataclass as canonical JSON: sorted keys, two spaces, a newline at the end.

    The same value always gives the same bytes.
    """
    plain = _plain(value)
    text = json.dumps(plain, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return text + "\n"


def _plain(value: object) -> Json:
    """Turn dataclasses into dictionaries, leaving out fields that are None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: _plain(item) for name, item in items if item is not None}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def decode(cls: type[T], value: Json, where: str) -> T:
    """Build the dataclass `cls` from parsed JSON.

    Args:
        cls: a dataclass whose fields are str, int, float, bool, tuple[X, ...], dict[str, X],
            other dataclasses, or unions of these.
        value: the parsed JSON.
        where: the place, for messages, such as "manifest.json: targets".

    Raises:
        BundleError: missing, unknown or wrongly typed keys.
    """
    result: T = _decode(cls, value, where)
    return result


def _decode(kind: Any, value: Json, where: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_dataclass(kind, value, where)
    origin = get_origin(kind)
    container: Callable[[Any, Json, str], Any] | None = {
        tuple: _decode_tuple,
        dict: _decode_dict,
        Union: _decode_union,
        types.UnionType: _decode_union,
    }.get(origin)
    if container is not None:
        return container(kind, value, where)
    return _decode_scalar(kind, value, where)


def _decode_dataclass(cls: type, value: Json, where: str) -> Any:
    if not isinstance(value, dict):
        raise BundleError(f"{where} is a {_kind(value)}, expected an object")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in value:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(fields)}"
            raise BundleError(f"{where} has an unknown key {key!r}", hint=hint)
    for name, field in fields.items():
        if name not in value and field.default is dataclasses.MISSING:
            raise BundleError(f"{where} lacks the key {name!r}")
    return cls(**{name: _decode(hints[name], value[name], f"{where}.{name}") for name in value})


def _decode_tuple(kind: Any, value: Json, where: str) -> Any:
    if not isinstance(value, list):
        raise BundleError(f"{where} is a {_kind(value)}, expected a list")
    inner = get_args(kind)[0]
    return tuple(_decode(inner, item, f"{where}[{index}]") for index, item in enumerate(value))


def _decode_dict(kind: Any, value: Json, where: str) -> Any:
    if not isinstance(value, dict):
        raise BundleError(f"{where} is a {_kind(value)}, expected an object")
    inner = get_args(kind)[1]
    return {key: _decode(inner, item, f"{where}.{key}") for key, item in value.items()}


def _decode_union(kind: Any, value: Json, where: str) -> Any:
    for option in get_args(kind):
        if option is not type(None) and _kind(value) == _kind_of_type(option):
            return _decode(option, value, where)
    names = " or ".join(_kind_of_type(item) for item in get_args(kind) if item is not type(None))
    raise BundleError(f"{where} is a {_kind(value)}, expected {names}")


def _decode_scalar(kind: type, value: Json, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**53 else math.inf
    if type(value) is not kind:
        raise BundleError(f"{where} is a {_kind(value)}, expected {_kind_of_type(kind)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise BundleError(f"{where} is out of range")
    return value


_NAMES = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
    list: "list",
    tuple: "list",
    dict: "object",
}


def _kind(value: Json) -> str:
    return _NAMES.get(type(value), "value")


def _kind_of_type(kind: Any) -> str:
    return _NAMES.get(get_origin(kind) or kind, "object")
