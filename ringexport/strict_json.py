"""Read JSON from files that nobody vouches for: strictly, with a size limit and one-line errors."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, Never

from ringexport.errors import RingExportError
from ringexport.files import read_regular

__all__ = ["parse_object", "read_object"]

_HINT = "download the file again; it may be truncated or an error page"


def read_object(
    path: Path, *, limit_bytes: int, error: type[RingExportError], hint: str | None = _HINT
) -> dict[str, Any]:
    """Read the JSON object in the regular file `path`.

    Args:
        path: the file; a pipe, device or folder is refused instead of waited for.
        limit_bytes: a larger file is refused unread.
        error: the class to raise.
        hint: for text that is not such JSON.

    Raises:
        error: unreadable file or anything that `parse_object` refuses.
    """
    data = read_regular(path, limit_bytes=limit_bytes, error=error)
    return parse_object(data, source=str(path), error=error, hint=hint)


def parse_object(
    data: bytes | str, *, source: str, error: type[RingExportError], hint: str | None = _HINT
) -> dict[str, Any]:
    """Parse one JSON object; NaN, Infinity, repeated keys and non-UTF-8 text are errors.

    Args:
        data: text, or its UTF-8 bytes.
        source: what to call it in messages.
        error: the class to raise.
        hint: for text that is not such JSON.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise error(f"{source} holds the key {repeated!r:.200} more than once", hint=hint)
        return found

    def refuse_constant(text: str) -> Never:
        raise error(f"{source} holds {text}, which is not JSON", hint=hint)

    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse_constant)
    except UnicodeDecodeError as failure:
        raise error(
            f"{source} is not UTF-8 text: bad byte at offset {failure.start}", hint=hint
        ) from failure
    except json.JSONDecodeError as failure:
        raise error(
            f"{source} is not valid JSON: {failure.msg.removesuffix(' at')} at line "
            f"{failure.lineno}, column {failure.colno}",
            hint=hint,
        ) from failure
    except RecursionError as failure:
        raise error(f"{source} is nested too deeply to be read") from failure
    except ValueError as failure:  # an integer of thousands of digits
        raise error(f"{source} cannot be read: {failure!s:.200}") from failure
    if not isinstance(value, dict):
        raise error(f"{source} holds a JSON {type(value).__name__}, expected an object")
    return value
