"""Rotary frequencies, and YaRN, which stretches them beyond the trained context."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ringexport.checkpoint.fields import Fields, show
from ringexport.errors import ConfigError

__all__ = ["MAX_CONTEXT_TOKENS", "YarnConfig", "inverse_frequencies"]

MAX_CONTEXT_TOKENS = 1 << 27
_KNOWN_KEYS = frozenset(
    {
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "factor",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "rope_type",
        "truncate",
        "type",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnConfig:
    """YaRN scaling of the rotary frequencies (arXiv 2309.00071, as in transformers).

    Attributes:
        factor: context multiplier, >= 1.
        original_max_position_embeddings: trained context in tokens.
        beta_fast, beta_slow: rotations within the trained context above which a frequency is
            kept, and below which it is divided by `factor`; a linear ramp lies between.
        attention_factor: factor on cos and sin.
        truncate: round the ends of the ramp outwards to whole dimensions.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float
    truncate: bool = True

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str) -> Self | None:
        """Read a ``rope_scaling`` object; type "default" gives None.

        Raises:
            ConfigError: another kind of scaling, a missing, unknown or absurd value.
        """
        fields = Fields(values, source)
        fields.require([("rope_type", "type")])
        kinds = {show(values[key]) for key in ("rope_type", "type") if key in values}
        if kinds not in ({"'yarn'"}, {"'default'"}):
            raise ConfigError(
                f"{source}: rope type {' and '.join(sorted(kinds))}, expected 'yarn'",
                hint="remove rope_scaling for the trained context, or use YaRN",
            )
        fields.refuse_unknown(_KNOWN_KEYS)
        if kinds == {"'default'"}:
            return None
        fields.require(["factor", "original_max_position_embeddings"])
        factor = fields.number("factor", 1.0, 1024.0)
        original = fields.integer("original_max_position_embeddings", 1, MAX_CONTEXT_TOKENS)
        beta_fast = _optional(fields, "beta_fast", 32.0)
        beta_slow = _optional(fields, "beta_slow", 1.0)
        if beta_fast <= beta_slow:
            raise ConfigError(
                f"{source}: beta_fast is {beta_fast:g}, expected more than beta_slow {beta_slow:g}"
            )
        if factor * original > MAX_CONTEXT_TOKENS:
            raise ConfigError(
                f"{source}: factor {factor:g} x {original} tokens is "
                f"{factor * original:.0f}, expected at most {MAX_CONTEXT_TOKENS}"
            )
        return cls(
            factor=factor,
            original_max_position_embeddings=original,
            beta_fast=beta_fast,
            beta_slow=beta_slow,
            attention_factor=_attention_factor(fields, factor),
            truncate=fields.flag("truncate") if "truncate" in fields else True,
        )

    @property
    def context_length(self) -> int:
        """Tokens that the stretched model can hold: trained context times factor."""
        return int(self.original_max_position_embeddings * self.factor)


def inverse_frequencies(
    rotary_dim: int, theta: float, yarn: YarnConfig | None
) -> npt.NDArray[np.float64]:
    """Return the frequencies [rotary_dim / 2], fp64, radians per token, fastest first.

    Source: transformers `modeling_rope_utils.py`, `_compute_default_rope_parameters` and
    `_compute_yarn_parameters`.
    """
    frequencies = theta ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
    if yarn is None:
        return np.asarray(frequencies)
    low, high = (
        _correction_dim(rotations, rotary_dim, theta, yarn.original_max_position_embeddings)
        for rotations in (yarn.beta_fast, yarn.beta_slow)
    )
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    width = max(high - low, 0.001)
    ramp = np.clip((np.arange(rotary_dim // 2, dtype=np.float64) - low) / width, 0.0, 1.0)
    return np.asarray(frequencies * (1.0 - ramp) + frequencies / yarn.factor * ramp)


def _correction_dim(rotations: float, rotary_dim: int, theta: float, context: int) -> float:
    """Return the (fractional) frequency index that turns `rotations` times in `context` tokens."""
    return rotary_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))


def _attention_factor(fields: Fields, factor: float) -> float:
    if fields.raw("attention_factor") is not None:
        return fields.number("attention_factor", 1e-3, 1e3)
    mscale = _optional(fields, "mscale", 0.0)
    mscale_all_dim = _optional(fields, "mscale_all_dim", 0.0)
    if mscale and mscale_all_dim:
        return _magnitude(factor, mscale) / _magnitude(factor, mscale_all_dim)
    return _magnitude(factor, 1.0)


def _magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def _optional(fields: Fields, key: str, default: float) -> float:
    """Read a positive number; null and 0 mean the default, as in transformers."""
    return fields.number(key, 0.0, 1e6) or default if fields.raw(key) is not None else default
