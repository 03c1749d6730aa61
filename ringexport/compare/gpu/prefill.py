"""Time prompts: from tokens on the host to the logits of the last token on the host."""

import statistics
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch

from ringexport.runtime.runner import Runner

__all__ = ["PrefillSpeed", "measure_prefill"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillSpeed:
    """Prompts of random tokens, read together.

    Attributes:
        batch: prompts.
        tokens: of each.
        ms: milliseconds until the logits are on the host, median of runs.
        spread: (slowest - fastest) / median of the runs.
    """

    batch: int
    tokens: int
    ms: float
    spread: float

    @property
    def tokens_per_s(self) -> float:
        """Of all prompts."""
        return self.batch * self.tokens / self.ms * 1e3

    def to_dict(self) -> dict[str, float]:
        """Return JSON values."""
        return asdict(self) | {"tokens_per_s": self.tokens_per_s}


def measure_prefill(runner: Runner, *, batch: int, tokens: int, repeat: int = 3) -> PrefillSpeed:
    """Time `repeat` runs after one that warms up, each from an empty state.

    Args:
        runner: with room for `batch` rows of `tokens` tokens.
        batch: prompts.
        tokens: of each.
        repeat: runs.
    """
    rng = np.random.default_rng(tokens)
    ids = rng.integers(0, runner.spec.vocab_size, (batch, tokens), dtype=np.int64)
    times = []
    for _ in range(repeat + 1):
        state = runner.new_state(batch)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        runner.prefill(ids, None, state)
        times.append(time.perf_counter() - begin)
        del state
    middle = statistics.median(times[1:])
    spread = (max(times[1:]) - min(times[1:])) / middle
    return PrefillSpeed(batch=batch, tokens=tokens, ms=middle * 1e3, spread=spread)
