"""Teacher forcing: feed a text and hand out the logits that predict each next token."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ringexport.errors import ConfigError, ToleranceExceededError
from ringexport.runtime.runner import Logits, Runner

__all__ = ["Predictions", "num_predictions", "predict"]

DEFAULT_CHUNK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """Logits [N, vocab] fp32 and the tokens [N] int64 that really came next."""

    logits: Logits
    targets: npt.NDArray[np.int64]


def predict(
    runner: Runner, tokens: npt.ArrayLike, *, window: int | None = None, chunk: int = DEFAULT_CHUNK
) -> Iterator[Predictions]:
    """Predict every token of a text but the first, from all tokens before it in its window.

    The state is carried from chunk to chunk. A text longer than a window is cut: each window
    starts with an empty state and the last token of the one before.

    Args:
        runner: used with a state of one row.
        tokens: [N] integers.
        window: tokens per window, 2 to the context length; None for the context length.
        chunk: positions whose logits are in memory at a time.

    Raises:
        ConfigError: a window that the runner cannot hold.
        ToleranceExceededError: the logits are not finite.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    limit = runner.spec.context_length
    size = limit if window is None else window
    if not 2 <= size <= limit:
        raise ConfigError(f"a window of {size} tokens was asked for, expected 2 to {limit}")
    for start in range(0, max(0, len(ids) - 1), size - 1):
        part = ids[start : start + size]
        state = runner.new_state(1)
        for first in range(0, len(part) - 1, chunk):
            last = min(first + chunk, len(part) - 1)
            logits = runner.prefill(part[None, first:last], None, state, every_position=True)
            if not np.isfinite(logits).all():
                raise ToleranceExceededError(
                    f"{runner.spec.name} computes NaN or infinity for the tokens from"
                    f" {start + first} on",
                    hint="ringexport compare shows in which layer it begins",
                )
            yield Predictions(logits=logits[0], targets=part[first + 1 : last + 1])


def num_predictions(num_tokens: int) -> int:
    """Return how many tokens `predict` predicts in a text of `num_tokens` tokens."""
    return max(0, num_tokens - 1)
