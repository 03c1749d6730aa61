"""Reading JSON that clients sent: every field by its type, and no field unread."""

import difflib
from typing import Any

from ringexport.serve.errors import ApiError

__all__ = ["Fields"]

Json = Any  # what json.loads returns; every use narrows it
SHOWN = 80
WHOLE = "the request"


class Fields:
    """The fields of one JSON object; null counts as left out.

    Args:
        data: the object.
        path: where it is in the request, such as "messages[0]"; empty for the request itself.

    Raises:
        ApiError: it is no object; so do all methods for fields of another type or range.
    """

    def __init__(self, data: Json, path: str = "") -> None:
        self.path = path
        if not isinstance(data, dict):
            raise self._wrong(data, path or WHOLE, "an object")
        self._data = data
        self._read: set[str] = set()

    def where(self, name: str) -> str:
        """Return the path of a field."""
        return f"{self.path}.{name}" if self.path else name

    def get(self, name: str) -> Json:
        """Return a field of any type."""
        self._read.add(name)
        return self._data.get(name)

    def text(self, name: str, *, most: int | None = None) -> str | None:
        """Return a text of at most so many characters."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self._wrong(value, self.where(name), "a string")
        if most is not None and len(value) > most:
            raise self.error(name, f"has {len(value):,} characters, expected at most {most:,}")
        return value

    def flag(self, name: str) -> bool | None:
        """Return true or false."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(value, self.where(name), "true or false")
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        """Return a whole number in a range."""
        value = self.get(name)
        if value is None:
            return None
        if type(value) is not int:
            raise self._wrong(value, self.where(name), "an integer")
        if not low <= value <= high:
            raise self._wrong(value, self.where(name), f"{low} to {high}")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        """Return a number in a range."""
        value = self.get(name)
        if value is None:
            return None
        if type(value) not in (int, float):
            raise self._wrong(value, self.where(name), "a number")
        if not low <= value <= high:
            raise self._wrong(value, self.where(name), f"{low:g} to {high:g}")
        return float(value)

    def choice(self, name: str, choices: tuple[str, ...]) -> str | None:
        """Return one of a few texts."""
        value = self.get(name)
        if value is not None and value not in choices:
            raise self._wrong(value, self.where(name), " or ".join(map(repr, choices)))
        return None if value is None else str(value)

    def items(self, name: str, *, most: int) -> list[Json] | None:
        """Return a list of at most so many items."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self._wrong(value, self.where(name), "a list")
        if len(value) > most:
            raise self.error(name, f"has {len(value):,} items, expected at most {most:,}")
        return value

    def object(self, name: str) -> "Fields | None":
        """Return an object."""
        value = self.get(name)
        return None if value is None else Fields(value, self.where(name))

    def only(self, name: str, allowed: tuple[Json, ...], why: str) -> None:
        """Refuse a field that does something that is not supported.

        Args:
            name: of the field.
            allowed: values that ask for nothing.
            why: what is not supported.
        """
        value = self.get(name)
        if value is not None and not any(
            value == item and type(value) is type(item) for item in allowed
        ):
            raise self.error(name, f"is not supported: {why}", code="unsupported_parameter")

    def end(self) -> None:
        """Refuse fields that nobody has read."""
        unknown = sorted(self._data.keys() - self._read)
        if not unknown:
            return
        name = unknown[0]
        near = difflib.get_close_matches(name[:SHOWN], self._read, n=1)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        place = f" in {self.path}" if self.path else ""
        raise ApiError(
            f"there is no field {name!r:.{SHOWN}}{place}{guess}",
            param=self.where(name[:SHOWN]),
            code="unknown_parameter",
        )

    def error(self, name: str, problem: str, *, code: str | None = None) -> ApiError:
        """Return an error about a field."""
        return ApiError(f"{self.where(name)} {problem}", param=self.where(name), code=code)

    def required(self, name: str, kind: str) -> ApiError:
        """Return the error for a field that is missing."""
        return self.error(name, f"is missing, expected {kind}")

    def _wrong(self, value: Json, where: str, expected: str) -> ApiError:
        kind = {dict: "an object", list: "a list", bool: str(value).lower(), type(None): "null"}
        shown = kind.get(type(value)) or _shown(value)
        param = None if where == WHOLE else where
        return ApiError(f"{where} is {shown}, expected {expected}", param=param)


def _shown(value: str | int | float) -> str:  # noqa: PYI041 - JSON tells them apart
    """Return the beginning of a value; integers may have thousands of digits."""
    if isinstance(value, int) and abs(value) > 1 << 64:
        return "a very large number"
    return repr(value[:SHOWN] if isinstance(value, str) else value)
