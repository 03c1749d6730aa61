"""What the rendering of one chat template may spend: steps, sizes of values, and a deadline."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

from jinja2.exceptions import TemplateError
from jinja2.utils import Namespace

__all__ = ["MAX_INTEGER", "MAX_SIZE", "MAX_WORK", "Budget", "TemplateLimitError", "shallow_size"]

Value = Any  # whatever a template computes

MAX_SIZE = 4_000_000
"""Units of one value: its characters, and ELEMENT_COST for each element, nested ones included."""
MAX_WORK = 64_000_000
"""Units of one rendering; see `Budget`."""
ELEMENT_COST = 32
STEP_COST = 64
MAX_SECONDS = 10.0
"""A backstop: the units run out first on any machine that is not very slow or overloaded."""
MAX_INTEGER = 2**63


class TemplateLimitError(TemplateError):
    """A template that computes too much, or uses what it must not."""


class Budget:
    """What one rendering may still spend.

    Every primitive that a template can call is bounded by the sizes of its operands, and looks at
    the deadline before it runs; so no single one of them can hang.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new rendering."""
        self._left = MAX_WORK
        self._deadline = time.monotonic() + MAX_SECONDS

    def spend(self, units: int) -> None:
        """Take `units` off: STEP_COST for a step, its size for a value.

        Raises:
            TemplateLimitError: nothing is left, or the time is up.
        """
        self._left -= units
        if self._left < 0:
            raise TemplateLimitError("it loops too often or makes values that are too large")
        if time.monotonic() > self._deadline:
            raise TemplateLimitError(f"it runs longer than {MAX_SECONDS:g} seconds")

    def step(self, *values: Value) -> None:
        """Spend a step on `values`, and their sizes without what they hold."""
        self.spend(STEP_COST + sum(shallow_size(value) for value in values))

    def measured(self, value: Value) -> Value:
        """Return `value` after spending its size.

        Raises:
            TemplateLimitError: the value is too large.
        """
        size = 0
        pending = [value]
        while pending:
            item = pending.pop()
            size += ELEMENT_COST
            if isinstance(item, str | bytes):
                size += len(item)
            elif isinstance(item, int):
                if abs(item) >= MAX_INTEGER:
                    raise TemplateLimitError("it computes an integer of more than 64 bits")
            else:
                pending += _parts(item)
            if size + ELEMENT_COST * len(pending) > MAX_SIZE:
                raise TemplateLimitError(f"it makes a value of more than {MAX_SIZE:,} units")
        self.spend(size)
        return value

    def counted(self, values: Iterable[Value]) -> Iterator[Value]:
        """Yield `values`, spending a step for each."""
        for value in values:
            self.spend(STEP_COST)
            yield value


def shallow_size(value: Value) -> int:
    """Return what it costs to read `value` once, without what its elements hold."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, list | tuple | dict | set | frozenset | range):
        return ELEMENT_COST * len(value)
    return 0


def _parts(value: Value) -> Iterable[Value]:
    """Return what a container holds."""
    if isinstance(value, list | tuple | set | frozenset):
        return value
    if isinstance(value, Namespace):
        value = object.__getattribute__(value, "_Namespace__attrs")
    return [*value, *value.values()] if isinstance(value, dict) else ()
