"""Results of comparisons as plain data; the command line draws them."""

import math
from dataclasses import dataclass

from ringexport.compare.tolerances import Tolerance
from ringexport.errors import ToleranceExceededError

__all__ = ["Comparison", "Row"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One number of a comparison.

    Attributes:
        kind: "hidden", "experts", "state" or "logits".
        name: layer, tensor or way.
        metric: what the value is.
        value: the number; NaN if no number describes the difference.
        bound: its limit with the sense, such as "<= 0.0001"; None if it is only shown.
        passed: whether the value is within the bound; None if there is none.
        note: why there is no number, or None.
    """

    kind: str
    name: str
    metric: str
    value: float
    bound: str | None = None
    passed: bool | None = None
    note: str | None = None

    @classmethod
    def judge(
        cls, kind: str, name: str, value: float, tolerance: Tolerance, note: str | None = None
    ) -> "Row":
        """Make a row with the verdict of a tolerance."""
        return cls(
            kind=kind,
            name=name,
            metric=tolerance.metric,
            value=value,
            bound=f"{tolerance.sense.value} {tolerance.bound:g}",
            passed=tolerance.accepts(value),
            note=note,
        )

    @classmethod
    def show(cls, kind: str, name: str, value: float, metric: str) -> "Row":
        """Make a row without a bound."""
        return cls(kind=kind, name=name, metric=metric, value=value)

    def to_dict(self) -> dict[str, object]:
        """Return JSON values; a value that is no number becomes null."""
        return {
            "kind": self.kind,
            "name": self.name,
            "metric": self.metric,
            "value": self.value if math.isfinite(self.value) else None,
            "bound": self.bound,
            "passed": self.passed,
            "note": self.note,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All rows of one comparison.

    Attributes:
        found, expected: names of the runners.
        tokens: how many were fed.
        rows: in the order of the layers, then states, then logits.
    """

    found: str
    expected: str
    tokens: int
    rows: tuple[Row, ...]

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that are out of bounds."""
        return tuple(row for row in self.rows if row.passed is False)

    @property
    def passed(self) -> bool:
        """Whether no row is out of bounds."""
        return not self.failures

    def check(self) -> None:
        """Raise if a row is out of bounds.

        Raises:
            ToleranceExceededError: names the first such row.
        """
        if self.passed:
            return
        first = self.failures[0]
        raise ToleranceExceededError(
            f"{len(self.failures)} of {len(self.rows)} numbers are out of bounds, first"
            f" {first.kind} {first.name}: {first.metric} {first.value:.3g}, bound {first.bound}",
            hint="two builds differ this much if recipe, decay index or checkpoint differ;"
            " ringexport inspect shows them",
        )

    def to_dict(self) -> dict[str, object]:
        """Return JSON values."""
        return {
            "found": self.found,
            "expected": self.expected,
            "tokens": self.tokens,
            "passed": self.passed,
            "rows": [row.to_dict() for row in self.rows],
        }
