"""Text that comes out piece by piece: nothing is shown that a stop text could take back."""

from collections.abc import Sequence

__all__ = ["StopMatcher"]


class StopMatcher:
    """Passes text on until a stop text is complete, holding back what could become one.

    Args:
        stop_texts: not empty ones; the one that is complete first ends the text, of several
            the longest.

    Attributes:
        matched: the stop text that was found, None before that.
    """

    def __init__(self, stop_texts: Sequence[str]) -> None:
        self._stop_texts = tuple(stop_texts)
        self._longest = max(map(len, self._stop_texts), default=0)
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Return what can be shown now. After a match nothing more is."""
        if self.matched is not None:
            return ""
        if not self._stop_texts:
            return text
        text = self._held + text
        places = [(text.find(stop), stop) for stop in self._stop_texts]
        found = [(start + len(stop), start, stop) for start, stop in places if start >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start]
        kept = self._undecided(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """Return what was held back, at the end of a text without a stop text."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Return the length of the longest end of `text` that a stop text begins with."""
        for size in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop_texts):
                return size
        return 0
