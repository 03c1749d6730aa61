"""A runner that chooses tokens itself, as one on a GPU does, without a GPU."""

import weakref
from typing import Any

import numpy as np

from ringexport.runtime.choosing import ChosenTokens, TokenChoice
from tests.runners import FakeRunner, FakeState

__all__ = ["DeviceRunner"]


class DeviceRunner(FakeRunner):
    """A `FakeRunner` that chooses tokens itself, like a GPU: from a seed and a position.

    Attributes:
        outstanding: steps whose tokens nobody has asked for yet.
    """

    asynchronous = True

    def __init__(self, *, context_length: int = 4096, max_batch: int | None = None) -> None:
        super().__init__(context_length=context_length, max_batch=max_batch)
        self._last: weakref.WeakKeyDictionary[TokenChoice, int] = weakref.WeakKeyDictionary()
        self.outstanding = 0

    def choose_prefill(self, tokens: Any, lengths: Any, state: Any, choices: Any) -> Any:
        logits = self.prefill(tokens, lengths, state)
        return self._chosen(logits, state, range(state.batch), choices)

    def choose_decode(self, state: Any, rows: Any, choices: Any) -> Any:
        tokens = [self._last[choice] for choice in choices]
        logits = self.decode(tokens, state, rows=list(rows))
        return self._chosen(logits, state, rows, choices)

    def _chosen(self, logits: Any, state: FakeState, rows: Any, choices: Any) -> "DeviceTokens":
        ids, kept = [0] * len(choices), {}
        for index, (row, choice) in enumerate(zip(rows, choices, strict=True)):
            if choice is None:
                continue
            ids[index] = self._draw(logits[index], choice, state.tokens[row])
            self._last[choice] = ids[index]
            if choice.wants_logits:
                kept[index] = logits[index]
        self.outstanding += 1
        largest = [float(row.max()) for row in logits]
        return DeviceTokens(self, ChosenTokens(ids=ids, largest=largest, logits=kept))

    def _draw(self, logits: Any, choice: TokenChoice, fed: list[int]) -> int:
        values = logits.astype(np.float64)
        values[fed] /= choice.params.repetition_penalty  # all of these logits are positive
        if choice.params.temperature == 0:
            return int(values.argmax())
        noise = np.random.default_rng([choice.seed, len(fed)]).gumbel(size=len(values))
        return int((values / choice.params.temperature + noise).argmax())


class DeviceTokens:
    """Tokens of a `DeviceRunner`; a fault of the kind "result" comes when they are asked for."""

    def __init__(self, runner: DeviceRunner, tokens: ChosenTokens) -> None:
        self._runner, self._tokens = runner, tokens

    def result(self) -> ChosenTokens:
        self._runner.outstanding -= 1
        self._runner.fault("result", list(self._tokens.ids))
        return self._tokens
