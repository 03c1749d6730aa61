"""Choosing the next token from logits: parameters, and a sampler with its own seeded generator.

The order is fixed: repetition penalty, temperature, top-k, top-p, min-p. Each filter works on
what the one before it left. Weights are float32 and their sums float64; a vocabulary has 150,000
ids. Each token takes one uniform number from the row's own generator, so a row's text does not
depend on the other rows of a batch.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ringexport.errors import ConfigError, RingExportError

__all__ = ["Sampler", "SamplingParams", "TokenLogprobs", "check_largest", "token_logprobs"]

MAX_LOGPROBS = 100
MAX_FLOAT = sys.float_info.max
PENALTY_RANGE = (0.01, 100.0)
BLOCK = 512
INTEGERS = ("max_new_tokens", "top_k", "seed", "logprobs")
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")
FLAGS = ("ignore_eos", "skip_special_tokens")
OPTIONAL = ("seed", "logprobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How text is continued.

    Attributes:
        max_new_tokens: tokens at most; 0 only reads the prompt.
        temperature: divides the logits; 0 takes the most likely token, the lowest id on a tie.
        top_k: keep the k most likely tokens, the lower ids on ties; 0 keeps all.
        top_p: keep the fewest most likely tokens whose probabilities reach this sum; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens that are
            in the prompt or the text; 1 does nothing, 0.01 to 100.
        seed: the same seed gives the same text on the same backend, whatever runs beside it; None
            draws a new one for each call.
        stop: texts that end the generation; they are not part of the text.
        ignore_eos: go on after a stop token.
        skip_special_tokens: leave special tokens out of the text.
        logprobs: how many likely alternatives to report for each token; None reports nothing.

    Raises:
        ConfigError: a value out of range or of another type; the message names it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        _check("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 0, "at least 0")
        _check("temperature", self.temperature, 0 <= self.temperature <= MAX_FLOAT, "at least 0")
        _check("top_k", self.top_k, self.top_k >= 0, "at least 0 (0 keeps all)")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1")
        penalty, (low, high) = self.repetition_penalty, PENALTY_RANGE
        _check("repetition_penalty", penalty, low <= penalty <= high, f"{low:g} to {high:g}")
        _check("seed", self.seed, self.seed is None or self.seed >= 0, "at least 0")
        if not isinstance(self.stop, list | tuple) or not all(
            isinstance(text, str) and text for text in self.stop
        ):
            raise ConfigError(f"stop is {self.stop!r}, expected a list of texts that are not empty")
        wanted = self.logprobs
        fits = wanted is None or 0 <= wanted <= MAX_LOGPROBS
        _check("logprobs", wanted, fits, f"0 to {MAX_LOGPROBS}")


def _check_types(params: SamplingParams) -> None:
    """Refuse values of other types; numpy's numbers are none of Python's, floats no integers."""
    for names, kinds, expected in (
        (INTEGERS, (int,), "an integer"),
        (NUMBERS, (int, float), "a number"),
        (FLAGS, (bool,), "True or False"),
    ):
        for name in names:
            value = getattr(params, name)
            absent = value is None and name in OPTIONAL
            if not absent and (type(value) not in kinds):
                raise ConfigError(f"{name} is {value!r:.80}, expected {expected}")


def _check(name: str, value: float | None, fits: bool, expected: str) -> None:
    """Refuse a value that does not fit or is not finite."""
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(f"{name} is {value!s:.80}, expected {expected}")


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logs of probabilities of the raw logits, before penalty, temperature and filters.

    Attributes:
        token_id: the chosen token.
        logprob: its log probability.
        top: the most likely tokens and their log probabilities, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses the tokens of one row.

    Args:
        params: how to choose.
        vocab_size: width of the logits.
        prompt: ids that count as seen for the repetition penalty.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, prompt: Iterable[int] = ()) -> None:
        self._params = params
        self._rng = np.random.Generator(np.random.PCG64(params.seed))
        self._seen: npt.NDArray[np.bool_] | None = None
        if params.repetition_penalty != 1:
            self._seen = np.zeros(vocab_size, dtype=np.bool_)
            self._seen[np.fromiter(prompt, dtype=np.int64)] = True

    def sample(self, logits: npt.NDArray[np.float32]) -> int:
        """Return the next token's id.

        Args:
            logits: [vocab]; not modified. -inf forbids a token.

        Raises:
            RingExportError: the logits hold NaN, +inf, or nothing finite.
        """
        values = self._penalized(logits)
        best = int(values.argmax())  # of NaN too, if there is one
        check_largest(float(values[best]))
        token = best if self._params.temperature == 0 else self._draw(values)
        if self._seen is not None:
            self._seen[token] = True
        return token

    def _penalized(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.floating]:
        if self._seen is None:
            return logits
        values = logits.astype(np.float64)
        seen = values[self._seen]
        penalty = self._params.repetition_penalty
        values[self._seen] = np.where(seen > 0, seen / penalty, seen * penalty)
        return values

    def _draw(self, values: npt.NDArray[np.floating]) -> int:
        params = self._params
        ids = None if params.top_k == 0 else _top_ids(values, params.top_k)
        weights = _weights(values if ids is None else values[ids], params.temperature)
        if params.top_p < 1:
            kept = _nucleus(weights, params.top_p)
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        if params.min_p > 0:
            kept = np.flatnonzero(weights >= params.min_p * weights.max())
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        place = _place(weights, self._rng.random())
        return place if ids is None else int(ids[place])


def check_largest(logit: float) -> None:
    """Raise RingExportError if the largest logit of a row shows that something is damaged."""
    if not math.isfinite(logit):
        raise RingExportError(
            f"the largest logit is {logit}, expected a finite number",
            hint="the weights or the state are damaged; compare the bundle with the reference",
        )


def _top_ids(values: npt.NDArray[np.floating], count: int) -> npt.NDArray[np.int64]:
    """Return the ids of the `count` largest values, ascending; the lower ids win ties."""
    if count >= len(values):
        return np.arange(len(values))
    bound = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > bound)
    tied = np.flatnonzero(values == bound)[: count - len(above)]
    return np.sort(np.concatenate([above, tied]))


def _weights(values: npt.NDArray[np.floating], temperature: float) -> npt.NDArray[np.float32]:
    """Return probabilities up to a factor, the largest 1; temperatures above 0, however small."""
    limits = np.finfo(np.float32)
    divisor = np.float32(min(max(temperature, float(limits.tiny)), float(limits.max)))
    with np.errstate(over="ignore", under="ignore"):  # -> 0, which is what is meant
        weights: npt.NDArray[np.float32] = (values - values.max()).astype(np.float32, copy=False)
        weights /= divisor
        return np.exp(weights, out=weights)


def _place(weights: npt.NDArray[np.float32], part: float) -> int:
    """Return the index whose share of the sum holds `part`, from 0 up to 1.

    Of the sums up to each index only those of one block are computed.
    """
    starts = np.arange(0, len(weights), BLOCK)
    edges = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    rest = part * edges[-1]
    block = _first_above(edges, rest)
    start = block * BLOCK
    inside = np.cumsum(weights[start : start + BLOCK], dtype=np.float64)
    return start + _first_above(inside, rest - (edges[block - 1] if block else 0.0))


def _first_above(edges: npt.NDArray[np.float64], value: float) -> int:
    """Return the first index whose edge is above `value`; after rounding, the last that rises."""
    found = int(np.searchsorted(edges, value, side="right"))
    return found if found < len(edges) else int(np.searchsorted(edges, edges[-1], side="left"))


def _nucleus(weights: npt.NDArray[np.float32], top_p: float) -> npt.NDArray[np.int64]:
    """Return the indices, ascending, of the fewest largest weights that reach a part of the sum.

    Weights below an equal share of the rest reach less than the rest even together, so that only
    those above it need to be sorted.
    """
    total = float(weights.sum(dtype=np.float64))
    share = np.float32(total * (1 - top_p) / len(weights) * (1 - 1e-6))
    likely = np.flatnonzero(weights >= share)
    order = likely[np.argsort(-weights[likely], kind="stable")]
    before = np.cumsum(weights[order], dtype=np.float64) - weights[order]
    return np.sort(order[before < top_p * total])


def token_logprobs(logits: npt.NDArray[np.float32], token: int, count: int) -> TokenLogprobs:
    """Return the log probability of `token` and the `count` most likely tokens.

    Args:
        logits: [vocab], raw.
        token: the chosen id.
        count: number of alternatives; the lower ids come first on ties.
    """
    values = logits.astype(np.float64)
    values -= values.max()
    with np.errstate(under="ignore"):
        values -= math.log(np.exp(values).sum())
    ids = _top_ids(values, count) if count else np.empty(0, dtype=np.int64)
    best = ids[np.argsort(-values[ids], kind="stable")]
    return TokenLogprobs(
        token_id=token,
        logprob=float(values[token]),
        top=tuple((int(index), float(values[index])) for index in best),
    )
