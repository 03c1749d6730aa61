"""Read JSON from files that nobody vouches for: strictly, with a size limit and one-line errors."""

import json
import stat
from collections import Counter
from pathlib import Path
from typing import Any, Never

from ringexport.errors import RingExportError

__all__ = ["parse_object", "read_object"]


def read_object(path: Path, *, limit_bytes: int, error: type[RingExportError]) -> dict[str, Any]:
    """Read the JSON object in the regular file `path`.

    Args:
        path: the file; a pipe, device or folder is refused instead of waited for.
        limit_bytes: a larger file is refused unread.
        error: the class to raise.

    Raises:
        error: unreadable file or anything that `parse_object` refuses.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path} is not a regular file")
        if status.st_size > limit_bytes:
            raise error(f"{path} has {status.st_size:,} bytes, expected at most {limit_bytes:,}")
        data = path.read_bytes()
    except OSError as failure:
        raise error(f"cannot read {path}: {failure.strerror or failure}") from failure
    return parse_object(data, source=str(path), error=error)


def parse_object(data: bytes, *, source: str, error: type[RingExportError]) -> dict[str, Any]:
    """Parse one JSON object; NaN, Infinity, repeated keys and non-UTF-8 text are errors.

    Args:
        data: UTF-8 text.
        source: what to call it in messages.
        error: the class to raise.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise error(f"{source} holds the key {repeated!r:.200} more than once")
        return found

    def refuse_constant(text: str) -> Never:
        raise error(f"{source} holds {text}, which is not JSON")

    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse_constant
        )
    except UnicodeDecodeError as failure:
        raise error(f"{source} is not UTF-8 text: bad byte at offset {failure.start}") from failure
    except json.JSONDecodeError as failure:
        raise error(
            f"{source} is not valid JSON: {failure.msg} at line {failure.lineno}, "
            f"column {failure.colno}",
            hint="download the file again; it may be truncated or an error page",
        ) from failure
    except RecursionError as failure:
        raise error(f"{source} is nested too deeply to be read") from failure
    except ValueError as failure:  # an integer of thousands of digits
        raise error(f"{source} cannot be read: {failure!s:.200}") from failure
    if not isinstance(value, dict):
        raise error(f"{source} holds a JSON {type(value).__name__}, expected an object")
    return value
