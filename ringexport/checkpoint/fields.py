"""Typed, range-checked reads of single config values, with one form of message for all of them."""

import math
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from ringexport.errors import ConfigError

__all__ = ["Fields", "show"]


def show(value: object) -> str:
    """Return `value` as an error message shows it: its repr, cut to 80 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, deep nesting
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else text[:77] + "..."


class Fields:
    """The values of one JSON object; every method raises ConfigError naming `source` and key."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self._source = source

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def raw(self, key: str) -> Any:
        """Return the value as it is, None where the key is absent."""
        return self._values.get(key)

    def require(self, keys: Collection[str | tuple[str, ...]]) -> None:
        """Check that all `keys` are present; of a tuple, one is enough."""
        missing = [
            " or ".join(names)
            for names in ((key,) if isinstance(key, str) else key for key in keys)
            if not any(name in self._values for name in names)
        ]
        if missing:
            raise ConfigError(
                f"{self._source} lacks {', '.join(missing)}",
                hint="a default would silently give a different model, so none is assumed; "
                "use the config.json published with the weights",
            )

    def refuse_unknown(self, known: Collection[str]) -> None:
        """Check that no key is outside `known`; the hint names the nearest known one."""
        unknown = [key for key in self._values if key not in known]
        if not unknown:
            return
        nearest = get_close_matches(unknown[0][:100], sorted(known), n=1)
        others = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ConfigError(
            f"{self._source} holds the unknown key {show(unknown[0])}{others}",
            hint=f"did you mean {nearest[0]!r}?"
            if nearest
            else "unknown keys are refused because they may change the model; remove the key "
            "if it does not",
        )

    def integer(self, key: str, low: int, high: int) -> int:
        """Return an int of low..high; bools and floats are refused."""
        value = self._values[key]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.bad(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float) -> float:
        """Return a finite number of low..high as float; bools are refused."""
        value = self._values[key]
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
            or not math.isfinite(value)
        ):
            raise self.bad(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str) -> bool:
        """Return a bool; 0 and 1 are refused."""
        value = self._values[key]
        if not isinstance(value, bool):
            raise self.bad(key, "true or false")
        return value

    def choice(self, key: str, choices: Collection[str]) -> str:
        """Return one of the strings in `choices`."""
        value = self._values[key]
        if not isinstance(value, str) or value not in choices:
            raise self.bad(key, " or ".join(repr(str(choice)) for choice in choices))
        return value

    def bad(self, key: str, expected: str, hint: str | None = None) -> ConfigError:
        """Return the error for a value of `key` that is not what was `expected`."""
        return ConfigError(
            f"{self._source}: {key} is {show(self._values.get(key))}, expected {expected}",
            hint=hint,
        )
