"""The rows of the running requests: the first ones of a state, without gaps."""

from collections.abc import Sequence

from ringexport.runtime.choosing import Chooser, PendingTokens, TokenChoice
from ringexport.runtime.runner import Runner
from ringexport.runtime.state import DecodeState

__all__ = ["RowPool"]


class RowPool:
    """A state whose rows come and go; a decode step of all of them is one call on neighbours.

    Args:
        runner: makes the state when the first row joins.
        rows: that fit in.

    Attributes:
        used: number of rows in use, which are the first.
    """

    def __init__(self, runner: Runner, rows: int) -> None:
        self._runner = runner
        self._rows = rows
        self._state: DecodeState | None = None
        self._empty_bytes = 0
        self.used = 0

    def join(self, state: DecodeState, row: int = 0) -> None:
        """Take over a row of a state, which does not need it any more, behind the rows in use."""
        if self._state is None:
            self._state = self._runner.new_state(self._rows)
            self._empty_bytes = self._state.nbytes
        self._state.move_rows([self.used], state, [row])
        self.used += 1

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Let all rows go but these; the last ones fill the gaps.

        Returns:
            For each row in use now, the row that it was.
        """
        assert self._state is not None
        order = [row for row in rows if row < len(rows)]
        movers = [row for row in rows if row >= len(rows)]
        gaps = sorted(set(range(len(rows))) - set(order))
        if movers:
            self._state.move_rows(gaps, self._state, movers)
        if self.used > len(rows):
            self._state.reset(range(len(rows), self.used))
        self.used = len(rows)
        if not rows and self._state.nbytes > self._empty_bytes:
            self.drop()
        places = dict(zip(gaps, movers, strict=True))
        return [places.get(row, row) for row in range(len(rows))]

    def drop(self) -> None:
        """Give everything back: what long texts needed, or what an error has left."""
        self._state = None
        self.used = 0

    def positions(self) -> list[int]:
        """Return how many tokens each row in use has seen."""
        return [] if self._state is None else self._state.position[: self.used].tolist()

    def decode(
        self, chooser: Chooser, rows: Sequence[int], choices: Sequence[TokenChoice]
    ) -> PendingTokens:
        """Take a step with `rows`; see `Chooser.choose_decode`."""
        assert self._state is not None
        return chooser.choose_decode(self._state, rows, choices)
