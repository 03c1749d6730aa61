"""Choosing tokens where the logits are, so that only ids cross to the host.

Whoever generates text asks a `Chooser` to feed a prompt and to choose a token behind it, and then
to feed what was chosen, again and again. A runner on a device may be a chooser itself: its tokens
stay on the device, and the host reads the ids of a step while the next one runs already. Every
other runner gets one that draws with numpy from the logits that the runner returns.
"""

import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ringexport.errors import RingExportError
from ringexport.runtime.runner import Logits, Runner
from ringexport.runtime.sampling import Sampler, SamplingParams, check_largest
from ringexport.runtime.state import DecodeState

__all__ = ["Chooser", "ChosenTokens", "KnownTokens", "PendingTokens", "TokenChoice", "chooser_of"]

SEED_BITS = 63


class TokenChoice:
    """How the tokens of one row are chosen, and what that depends on besides the logits.

    Args:
        params: how to choose.
        vocab_size: width of the logits.
        prompt: ids that count as seen for the repetition penalty, where they are in the vocabulary.

    Attributes:
        params: as given.
        seed: of a device's random numbers, 0 to 2^63 - 1.
        last: the last token that was chosen; None before the first.
        seen: ids that the repetition penalty applies to; empty if there is none.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, prompt: Iterable[int] = ()) -> None:
        self.params = params
        self.last: int | None = None
        self.seen: list[int] = []
        self._penalizes = params.repetition_penalty != 1
        if self._penalizes:
            self.seen = [token for token in prompt if 0 <= token < vocab_size]
        self._vocab_size = vocab_size
        self._sampler: Sampler | None = None
        seed = params.seed
        self.seed = secrets.randbits(SEED_BITS) if seed is None else seed & ((1 << SEED_BITS) - 1)

    @property
    def is_greedy(self) -> bool:
        """Whether the largest raw logit is the choice."""
        return self.params.temperature == 0 and self.params.repetition_penalty == 1

    @property
    def wants_logits(self) -> bool:
        """Whether log probabilities are to be reported."""
        return self.params.logprobs is not None

    def note(self, token: int) -> None:
        """Remember a token that was chosen."""
        self.last = token
        if self._penalizes:
            self.seen.append(token)

    def sample(self, logits: Logits) -> int:
        """Choose on the host, from logits [vocab].

        Raises:
            RingExportError: see `Sampler.sample`.
        """
        if self._sampler is None:
            self._sampler = Sampler(self.params, self._vocab_size, self.seen)
        return self._sampler.sample(logits)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenTokens:
    """The tokens of a step.

    Attributes:
        ids: the chosen token of each row.
        largest: the largest raw logit of each row; not finite if weights or state are damaged, and
            the id then means nothing.
        logits: [vocab] of the rows that want them, by index.
    """

    ids: Sequence[int]
    largest: Sequence[float]
    logits: Mapping[int, Logits] = field(default_factory=dict)

    def check(self, row: int) -> None:
        """Raise RingExportError if the logits of a row are damaged."""
        if not math.isfinite(self.largest[row]):
            check_largest(self.largest[row])


class PendingTokens(Protocol):
    """The tokens of a step that may still run."""

    def result(self) -> ChosenTokens:
        """Wait for them; call it once.

        Raises:
            RingExportError: the step failed.
        """


@runtime_checkable
class Chooser(Protocol):
    """Feeds tokens and chooses the next ones.

    A row's tokens depend on its own logits, params, seed and position only, not on its neighbours.
    Another chooser draws other tokens from the same seed.

    Attributes:
        asynchronous: the results of one step may be read after the next one was started; what was
            chosen is fed without the host. Reading several prompts in one call is faster then.
    """

    asynchronous: bool

    def choose_prefill(
        self,
        tokens: npt.ArrayLike,
        lengths: npt.ArrayLike | None,
        state: DecodeState,
        choices: Sequence[TokenChoice | None],
    ) -> PendingTokens:
        """Feed many tokens as `Runner.prefill` does, and choose one token behind those of each row.

        Args:
            tokens: [B, T].
            lengths: [B], each at least 1, or None for T everywhere.
            state: of B rows.
            choices: one for each row; None chooses nothing, its id is 0 and its largest logit 0.
        """

    def choose_decode(
        self, state: DecodeState, rows: Sequence[int], choices: Sequence[TokenChoice]
    ) -> PendingTokens:
        """Feed the last chosen token of each of `rows`, and choose the next ones.

        Args:
            state: the rows of which have a token from this chooser.
            rows: some rows of the state.
            choices: one for each of `rows`, the ones of their prefill.
        """


def chooser_of(runner: Runner) -> Chooser:
    """Return the runner itself if it chooses tokens, or else one that does so on the host."""
    return runner if isinstance(runner, Chooser) else _HostChooser(runner)


@dataclass(frozen=True, slots=True)
class KnownTokens:
    """Tokens that are there already.

    Attributes:
        tokens: what `result` returns.
    """

    tokens: ChosenTokens

    def result(self) -> ChosenTokens:
        """See `PendingTokens.result`."""
        return self.tokens


class _HostChooser:
    """Draws with numpy from the logits of a runner; the results are there at once."""

    asynchronous = False

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def choose_prefill(
        self,
        tokens: npt.ArrayLike,
        lengths: npt.ArrayLike | None,
        state: DecodeState,
        choices: Sequence[TokenChoice | None],
    ) -> PendingTokens:
        """See `Chooser.choose_prefill`."""
        return _choose(self._runner.prefill(tokens, lengths, state), choices)

    def choose_decode(
        self, state: DecodeState, rows: Sequence[int], choices: Sequence[TokenChoice]
    ) -> PendingTokens:
        """See `Chooser.choose_decode`."""
        tokens = [choice.last or 0 for choice in choices]
        return _choose(self._runner.decode(tokens, state, rows=rows), choices)


def _choose(logits: Logits, choices: Sequence[TokenChoice | None]) -> KnownTokens:
    ids, largest = [0] * len(choices), [0.0] * len(choices)
    kept: dict[int, Logits] = {}
    for row, choice in enumerate(choices):
        if choice is None:
            continue
        try:
            ids[row] = choice.sample(logits[row])
        except RingExportError:
            largest[row] = float(np.max(logits[row]))
        if choice.wants_logits:
            kept[row] = logits[row]
    return KnownTokens(ChosenTokens(ids=ids, largest=largest, logits=kept))
