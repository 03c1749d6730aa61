"""Measure first-token time and decode speed of runners on equal terms."""

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ringexport.errors import ConfigError, ToleranceExceededError
from ringexport.progress import NoProgress, Progress
from ringexport.runtime.runner import Logits, Runner

__all__ = ["AGREEMENT_TOKENS", "BenchConfig", "Speed", "check_agreement", "greedy", "measure"]

_PROMPT = 64
_COUNT = 32
AGREEMENT_TOKENS = _PROMPT + _COUNT
"""That `check_agreement` puts into a row."""
_ROUNDED = "cuda"
"""Beginning of the names of runners that compute in bf16 or less."""
_NEAR_TIE = 0.05
"""Of the logits' standard deviation. bf16 moves each logit of ring-nano by 0.006 of it, so that a
difference of two moves by 0.025 at three standard deviations; 8 bits by about twice that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """What is measured.

    Attributes:
        batch: rows that are decoded at once.
        prefill: prompt lengths in tokens whose first-token time is measured, with one row.
        context: tokens in the state when decoding starts; each number is measured.
        decode: decoded tokens per run.
        repeat: runs; the median counts. One more run warms up.
    """

    batch: tuple[int, ...] = (1,)
    prefill: tuple[int, ...] = (128, 2000)
    context: tuple[int, ...] = (128,)
    decode: int = 64
    repeat: int = 3

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max((*self.prefill, max(self.context) + self.decode))

    def check(self, context_length: int) -> None:
        """Refuse numbers that cannot be measured.

        Raises:
            ConfigError: a number below 1, or more tokens than the context holds.
        """
        numbers = (*self.batch, *self.prefill, *self.context, self.decode, self.repeat)
        if not self.batch or not self.context or min(numbers) < 1:
            raise ConfigError("bench needs positive numbers of rows, tokens and runs")
        if self.longest > context_length:
            raise ConfigError(
                f"bench would use {self.longest} tokens, the context holds {context_length}",
                hint="give smaller --prefill, --context or --decode",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What was measured for one runner.

    Attributes:
        name: of the runner.
        first_token_ms: prompt length to median time until its last logits, one row.
        decode_tokens_per_s: context to batch to median speed, all rows together.
        spread: (slowest - fastest) / median of the first decode runs.
    """

    name: str
    first_token_ms: dict[int, float]
    decode_tokens_per_s: dict[int, dict[int, float]]
    spread: float

    def to_dict(self) -> dict[str, object]:
        """Return JSON values."""
        return {
            "backend": self.name,
            "first_token_ms": {str(key): value for key, value in self.first_token_ms.items()},
            "decode_tokens_per_s": {
                str(context): {str(batch): value for batch, value in speeds.items()}
                for context, speeds in self.decode_tokens_per_s.items()
            },
            "spread": self.spread,
        }


def prompt_tokens(length: int, vocab_size: int) -> npt.NDArray[np.int64]:
    """Return `length` token ids that are the same on every machine, [length] int64."""
    return np.random.default_rng(20261121).integers(0, vocab_size, length, dtype=np.int64)


def greedy(
    runner: Runner, prompt: npt.NDArray[np.int64], count: int
) -> tuple[list[int], list[Logits]]:
    """Return the `count` most likely tokens after `prompt`, one by one, and the logits of each."""
    state = runner.new_state(1)
    logits = [runner.prefill(prompt[None], None, state)[0]]
    while len(logits) < count:
        logits.append(runner.decode([int(logits[-1].argmax())], state)[0])
    return [int(one.argmax()) for one in logits], logits


def check_agreement(runners: Sequence[Runner], count: int = _COUNT) -> int:
    """Check that all runners decode the same text, greedily; returns the tokens compared.

    The fast engine computes in bf16 or 8 bits: it may choose another of two tokens that are nearly
    equally likely, and is compared up to there, since what follows is another text.

    Raises:
        ToleranceExceededError: two runners disagree, so their speeds cannot be compared.
    """
    prompt = prompt_tokens(_PROMPT, runners[0].spec.vocab_size)
    expected, logits = greedy(runners[0], prompt, count)
    compared = count
    for runner in runners[1:]:
        found, others = greedy(runner, prompt, count)
        place = next((i for i in range(count) if found[i] != expected[i]), count)
        if place == count:
            continue
        rounded = any(one.spec.name.startswith(_ROUNDED) for one in (runner, runners[0]))
        choices = expected[place], found[place]
        if rounded and all(_near_tie(one[place], choices) for one in (logits, others)):
            compared = min(compared, place)
            continue
        raise ToleranceExceededError(
            f"{runner.spec.name} and {runners[0].spec.name} disagree at greedy token {place}:"
            f" {found[place]} and {expected[place]}; no speed is reported for wrong results",
            hint="ringexport compare shows where they part",
        )
    return compared


def _near_tie(logits: Logits, choices: tuple[int, int]) -> bool:
    gap = abs(float(logits[choices[0]]) - float(logits[choices[1]]))
    return gap <= _NEAR_TIE * float(logits.std())


def measure(runner: Runner, config: BenchConfig, *, progress: Progress | None = None) -> Speed:
    """Measure one runner.

    Args:
        runner: warm or cold; one run of each kind is not counted.
        config: what to measure.
        progress: told about the runs.

    Raises:
        ConfigError: the runner cannot hold what `config` asks for.
    """
    progress = progress or NoProgress()
    config.check(runner.spec.context_length)
    total = (len(config.prefill) + len(config.context) * len(config.batch)) * (config.repeat + 1)
    progress.start(f"measuring {runner.spec.name}", total, "runs")
    first_token_ms = {}
    for length in config.prefill:
        times = [_time_prefill(runner, length, progress) for _ in range(config.repeat + 1)]
        first_token_ms[length] = 1000 * statistics.median(times[1:])
    speeds: dict[int, dict[int, float]] = {context: {} for context in config.context}
    spreads = []
    for context, batch in itertools.product(config.context, config.batch):
        shape = (batch, context, config.decode)
        times = [_time_decode(runner, shape, progress) for _ in range(config.repeat + 1)]
        middle = statistics.median(times[1:])
        spreads.append((max(times[1:]) - min(times[1:])) / middle)
        speeds[context][batch] = batch * config.decode / middle
    progress.finish()
    return Speed(
        name=runner.spec.name,
        first_token_ms=first_token_ms,
        decode_tokens_per_s=speeds,
        spread=spreads[0],
    )


def _time_prefill(runner: Runner, length: int, progress: Progress) -> float:
    tokens = prompt_tokens(length, runner.spec.vocab_size)[None]
    state = runner.new_state(1)
    start = time.perf_counter()
    runner.prefill(tokens, None, state)
    elapsed = time.perf_counter() - start
    progress.advance()
    return elapsed


def _time_decode(runner: Runner, shape: tuple[int, int, int], progress: Progress) -> float:
    """Decode (rows, tokens in the state, tokens to decode) and return the seconds."""
    batch, context, decode = shape
    prompt = np.tile(prompt_tokens(context, runner.spec.vocab_size), (batch, 1))
    state = runner.new_state(batch)
    tokens = runner.prefill(prompt, None, state).argmax(axis=-1)
    start = time.perf_counter()
    for _ in range(decode):
        tokens = runner.decode(tokens, state).argmax(axis=-1)
    elapsed = time.perf_counter() - start
    progress.advance()
    return elapsed
