"""Gates: limits on how far a quantized model may be from its reference, and their verdict."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from types import MappingProxyType
from typing import Self

from ringexport.compare.perplexity import PairScore
from ringexport.errors import ConfigError

__all__ = ["Gate", "GateVerdict", "check_gate"]

_NUMBER = re.compile(r"(\d{1,9}(?:\.\d{1,12})?|\.\d{1,12})(%?)")
_EXAMPLE = "ppl=0.5%,kl=0.005,top1=97%"
_WORDS: Mapping[str, str] = MappingProxyType(
    {"ppl": "perplexity change", "kl": "KL mean", "top1": "top-1 agreement"}
)
_SHARES = frozenset({"ppl", "top1"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Limits; None where there is none.

    Attributes:
        ppl: the perplexity may grow by at most this share.
        kl: mean KL divergence from the reference at most, nats per token.
        top1: share of tokens whose best guess is the reference's, at least.
    """

    ppl: float | None = None
    kl: float | None = None
    top1: float | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read limits such as "ppl=0.5%,kl=0.005,top1=97%", in any order, some left out.

        Raises:
            ConfigError: an unknown or repeated name, or a value that is no limit.
        """
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            _check_name(name, text)
            if not equals:
                raise ConfigError(f"the gate {text[:80]!r} has no value for {name}", hint=_hint())
            if name in limits:
                raise ConfigError(f"the gate {text[:80]!r} holds {name} more than once")
            limits[name] = _limit(name, value)
        return cls(**limits)

    def __str__(self) -> str:
        """Return the text that `parse` reads."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return ",".join(
            f"{name}={_exact(name, value)}" for name, value in values.items() if value is not None
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GateVerdict:
    """What a gate says of a score.

    Attributes:
        gate: the limits.
        failures: one sentence per limit that is not met.
        missed: the names of these limits.
        excess: how many times over the limit the worst of them is, 0 if all are met.
    """

    gate: Gate
    failures: tuple[str, ...]
    missed: tuple[str, ...]
    excess: float

    @property
    def passed(self) -> bool:
        """Whether every limit is met."""
        return not self.failures


def check_gate(gate: Gate, score: PairScore) -> GateVerdict:
    """Compare a score with the limits; a number that is not finite meets none."""
    found = {
        "ppl": score.perplexity_change,
        "kl": score.kl_mean,
        "top1": score.top1_agreement,
    }
    failures, missed_names, excess = [], [], 0.0
    for name, value in found.items():
        limit = getattr(gate, name)
        if limit is None:
            continue
        at_least = name == "top1"
        if math.isfinite(value) and (value >= limit if at_least else value <= limit):
            continue
        sense = "below" if at_least else "above"
        failures.append(f"{_WORDS[name]} {_show(name, value)} is {sense} {_exact(name, limit)}")
        missed_names.append(name)
        missed, room = (1 - value, 1 - limit) if at_least else (value, limit)
        excess = max(excess, missed / room if room > 0 and math.isfinite(missed) else math.inf)
    return GateVerdict(
        gate=gate, failures=tuple(failures), missed=tuple(missed_names), excess=excess
    )


def _check_name(name: str, text: str) -> None:
    if name in _WORDS:
        return
    nearest = get_close_matches(name[:100], _WORDS, n=1, cutoff=0.3)
    raise ConfigError(
        f"the gate {text[:80]!r} holds {name[:80]!r}, expected {', '.join(_WORDS)}",
        hint=f"did you mean {nearest[0]!r}? {_hint()}" if nearest else _hint(),
    )


def _limit(name: str, value: str) -> float:
    found = _NUMBER.fullmatch(value)
    number = float(found[1]) / (100 if found[2] else 1) if found else math.nan
    if found is None or (name == "kl" and found[2]):
        kind = "a number or a percentage" if name in _SHARES else "a number of nats"
        raise ConfigError(f"{name} of the gate is {value[:80]!r}, expected {kind}", hint=_hint())
    if name in _SHARES and number > 1:
        raise ConfigError(
            f"{name} of the gate is {value[:80]!r}, expected at most 1 or 100%",
            hint=f"write {name}={value}% for percent",
        )
    return number


def _show(name: str, value: float) -> str:
    return f"{100 * value:.6g}%" if name in _SHARES else f"{value:.6g}"


def _exact(name: str, value: float) -> str:
    """Write a limit without an exponent, which `parse` does not read."""
    percent = name in _SHARES
    digits = f"{100 * value if percent else value:.12f}".rstrip("0").rstrip(".")
    return f"{digits}%" if percent else digits


def _hint() -> str:
    return f"write it like {_EXAMPLE}"
