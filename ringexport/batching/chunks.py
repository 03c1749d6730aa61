"""Where a prompt is cut into chunks: a function of its tokens alone.

A state can be reused at a cut without changing a bit of what follows only if a prompt that begins
alike is cut at the same places. So each cut depends on nothing but the tokens before it: neither
on the load, nor on what the cache holds, nor on what the prompt goes on with.
"""

from collections.abc import Collection, Sequence

__all__ = ["ChunkRule"]

FIRST_CHUNK = 256
SHORTEST_CHUNK = 16
GROWTH = 8


class ChunkRule:
    """Cuts prompts.

    A chunk ends at the first marker, such as the end of a turn, which makes the turns of a chat
    reusable; without one, when it is long enough. Chunks get longer with the text before them, so
    that a long prompt has few, and still less than an eighth of it lies behind its last cut.

    Args:
        markers: ids after which a chunk should end.
        longest: tokens of a chunk at most.
    """

    def __init__(self, markers: Collection[int], longest: int) -> None:
        self._markers = frozenset(markers)
        self._longest = longest

    def stop(self, tokens: Sequence[int], start: int) -> int:
        """Return where the chunk that begins at `start` ends; at the latest where `tokens` do."""
        low, high = self._bounds(start)
        end = min(start + high, len(tokens))
        for place in range(start + low, end):
            if tokens[place - 1] in self._markers:
                return place
        return end

    def is_cut(self, tokens: Sequence[int], start: int, stop: int) -> bool:
        """Tell whether a longer prompt is cut at `stop` too, where `stop` ended this chunk."""
        low, high = self._bounds(start)
        size = stop - start
        return size == high or (size >= low and tokens[stop - 1] in self._markers)

    def _bounds(self, start: int) -> tuple[int, int]:
        """Return the least tokens of a chunk that ends at a marker, and the most of any."""
        high = min(max(start // GROWTH, FIRST_CHUNK), self._longest)
        return min(max(start // (2 * GROWTH), SHORTEST_CHUNK), high), high
