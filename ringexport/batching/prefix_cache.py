"""States of prompts that may come again: a tree of chunks, the least recently used leave first.

A node stands for all tokens from the start of a prompt to the end of its chunk. It holds the
recurrent state at its end, whose size does not depend on the number of tokens, and the keys and
values of its own chunk only; those of a whole prefix are the ones along its path.

Nodes are found by their chunk's tokens below their parent: a dictionary compares the tokens
themselves after their hashes.
"""

from collections import OrderedDict
from collections.abc import Sequence

from ringexport.batching.chunks import ChunkRule
from ringexport.runtime.state import DecodeState, StateSnapshot

__all__ = ["PrefixCache", "PrefixNode"]

TOKEN_BYTES = 40
"""Of a token as a Python number in the key of its node, about."""


class PrefixNode:
    """A cached prefix.

    Attributes:
        parent: the prefix without the last chunk; None for the root.
        chunk: the tokens of the last chunk.
        end: number of tokens.
        part: the state at the end, with the keys and values of the last chunk; None for the root.
        children: longer prefixes by their next chunk.
    """

    __slots__ = ("children", "chunk", "end", "parent", "part")

    def __init__(
        self,
        parent: "PrefixNode | None" = None,
        chunk: tuple[int, ...] = (),
        part: StateSnapshot | None = None,
    ) -> None:
        self.parent = parent
        self.chunk = chunk
        self.part = part
        self.end: int = len(chunk) + (parent.end if parent is not None else 0)
        self.children: dict[tuple[int, ...], PrefixNode] = {}

    @property
    def nbytes(self) -> int:
        """Memory of the node."""
        return TOKEN_BYTES * len(self.chunk) + (0 if self.part is None else self.part.nbytes)

    def path(self) -> "list[PrefixNode]":
        """Return the nodes from the first chunk to this one."""
        nodes: list[PrefixNode] = []
        node: PrefixNode | None = self
        while node is not None and node.part is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def snapshot(self) -> StateSnapshot:
        """Return the whole state at the end of the prefix."""
        return StateSnapshot.joined([node.part for node in self.path() if node.part is not None])


class PrefixCache:
    """Finds and keeps prefixes within a number of bytes. Not for several threads.

    Args:
        rule: how prompts are cut.
        limit_bytes: memory of all nodes; 0 keeps nothing.

    Attributes:
        root: the empty prefix.
        nbytes: memory of all nodes.
        evictions: nodes that made room for others.
    """

    def __init__(self, rule: ChunkRule, limit_bytes: int) -> None:
        self._rule = rule
        self._limit = limit_bytes
        self._used: OrderedDict[PrefixNode, None] = OrderedDict()
        self.root = PrefixNode()
        self.nbytes = 0
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._used)

    def find(self, tokens: Sequence[int], start: PrefixNode | None = None) -> PrefixNode:
        """Return the longest prefix that leaves at least one token to be read.

        Args:
            tokens: a prompt.
            start: a prefix of it to begin at; None for the root.
        """
        node = start or self.root
        while True:
            stop = self._rule.stop(tokens, node.end)
            child = node.children.get(tuple(tokens[node.end : stop]))
            if child is None or stop >= len(tokens):
                self._touch(node)
                return node
            node = child

    def add(
        self, node: PrefixNode, tokens: Sequence[int], stop: int, state: DecodeState
    ) -> PrefixNode | None:
        """Keep the prefix that ends at `stop`, one chunk behind `node`.

        Args:
            node: as `find` or `add` returned it.
            tokens: the prompt.
            stop: as the rule returned it.
            state: of one row, which has read the prompt up to there.

        Returns:
            The new prefix, or the one that was there already; None if `stop` is no cut, if there
            is no room beside its path, or if `node` itself had to make room meanwhile.
        """
        if not self._rule.is_cut(tokens, node.end, stop) or not self._holds(node):
            return None
        chunk = tuple(tokens[node.end : stop])
        found = node.children.get(chunk)
        if found is None:
            found = PrefixNode(node, chunk, state.snapshot_rows([0], start=node.end))
            self._touch(node)
            if not self._make_room(found):
                return None
            node.children[chunk] = found
            self._used[found] = None
            self.nbytes += found.nbytes
        self._touch(found)
        return found

    def _holds(self, node: PrefixNode) -> bool:
        return node is self.root or node in self._used

    def _touch(self, node: PrefixNode) -> None:
        """Mark a path as used, its end first: a node is never older than those below it."""
        if self._holds(node):
            for one in reversed(node.path()):
                self._used.move_to_end(one)

    def _make_room(self, new: PrefixNode) -> bool:
        """Evict the least recently used nodes, which are leaves, but none on the path of `new`."""
        if sum(node.nbytes for node in new.path()) > self._limit:
            return False
        while self.nbytes + new.nbytes > self._limit:
            oldest, _ = self._used.popitem(last=False)
            assert oldest.parent is not None
            del oldest.parent.children[oldest.chunk]
            self.nbytes -= oldest.nbytes
            self.evictions += 1
        return True
