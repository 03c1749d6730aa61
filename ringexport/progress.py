"""How long work reports its progress, without knowing who shows it."""

from typing import Protocol

__all__ = ["NoProgress", "Progress"]


class Progress(Protocol):
    """Receiver of progress. One stage is open at a time; `start` ends an open one."""

    def start(self, stage: str, total: int | None = None, unit: str = "") -> None:
        """Open a stage.

        Args:
            stage: what is being done, a short noun phrase for people.
            total: how many units it has, None if nobody knows.
            unit: "bytes", "tensors", "tokens" or another plural noun.
        """

    def advance(self, amount: int = 1) -> None:
        """Count `amount` more units of the open stage as done."""

    def note(self, message: str) -> None:
        """Say one thing that a person who watches would like to know."""

    def finish(self) -> None:
        """Close the open stage, if there is one."""


class NoProgress:
    """A `Progress` that shows nothing."""

    def start(self, stage: str, total: int | None = None, unit: str = "") -> None:
        """Ignore the stage."""

    def advance(self, amount: int = 1) -> None:
        """Ignore the amount."""

    def note(self, message: str) -> None:
        """Ignore the message."""

    def finish(self) -> None:
        """Do nothing."""
