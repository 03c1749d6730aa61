"""The runner protocol, and the base class that checks every call once for all backends."""

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from ringexport.errors import ContextLengthError, RingExportError, ShapeError
from ringexport.runtime.state import BaseState, DecodeState, StateLayout, read_state_file

__all__ = [
    "BaseRunner",
    "Logits",
    "ProbeRunner",
    "Runner",
    "RunnerSpec",
    "StateT",
    "Tokens",
    "memory_guard",
]

log = logging.getLogger(__name__)

Logits = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]
StateT = TypeVar("StateT", bound=BaseState)
DEFAULT_PREFILL_CHUNK = 4096
_OUT_OF_MEMORY = re.compile("can't allocate memory|out of memory|bad_alloc", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerSpec:
    """What a runner is and what it can hold.

    Attributes:
        name: backend name, such as "onnxruntime:cpu".
        vocab_size: token ids are 0..vocab_size-1, and logits have this many columns.
        context_length: tokens that one row can hold.
        layout: sizes of the state.
        max_batch: rows per state, None for no limit.
        prefill_chunk: tokens per row that are computed at once.
        token_budget: prompt tokens to read between two decode steps when others wait for theirs.
    """

    name: str
    vocab_size: int
    context_length: int
    layout: StateLayout
    max_batch: int | None = None
    prefill_chunk: int = DEFAULT_PREFILL_CHUNK
    token_budget: int = 512

    def __post_init__(self) -> None:
        if self.prefill_chunk < 1:
            raise ShapeError(f"prefill_chunk is {self.prefill_chunk}, expected at least 1")


class Runner(Protocol):
    """A loaded model. Everything it remembers between calls is in the state it is given."""

    @property
    def spec(self) -> RunnerSpec:
        """What it is and what it can hold."""

    @property
    def model_digest(self) -> str:
        """Names weights and decay; a state file carries it."""

    def new_state(self, batch: int) -> DecodeState:
        """Return an empty state of `batch` rows."""

    def load_state(self, path: Path) -> DecodeState:
        """Return the state in a file that `DecodeState.save` wrote."""

    def prefill(
        self,
        tokens: npt.ArrayLike,
        lengths: npt.ArrayLike | None,
        state: DecodeState,
        *,
        every_position: bool = False,
    ) -> Logits:
        """Feed many tokens; see `BaseRunner.prefill`."""

    def decode(
        self, tokens: npt.ArrayLike, state: DecodeState, *, rows: Sequence[int] | None = None
    ) -> Logits:
        """Feed one token per row; see `BaseRunner.decode`."""

    def close(self) -> None:
        """Give everything back; later calls fail, a second close does nothing."""

    def __enter__(self) -> Self:
        """Return the runner, to be closed at the end of the block."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the runner."""


class ProbeRunner(Runner, Protocol):
    """A runner that can also show what happens inside."""

    def probe(
        self, tokens: npt.ArrayLike, lengths: npt.ArrayLike | None, state: DecodeState
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Feed tokens like `prefill` and return what the layers computed.

        Returns:
            "hidden.{i}" [B, T, D] after layer i, "hidden.final" [B, T, D], "expert_ids.{i}"
            [B, T, k] of the MoE layers, "logits" [B, T, vocab]; 0 at padding, expert ids -1.
        """


class BaseRunner(ABC, Generic[StateT]):
    """Checks arguments, splits prompts into chunks, and leaves the raw steps to the backend.

    After an exception other than those listed, the states of the call may be half advanced:
    restore a snapshot or make new ones.

    Args:
        spec: what the runner is.
        model_digest: called once, when a state is first saved or loaded.
    """

    def __init__(self, spec: RunnerSpec, model_digest: Callable[[], str]) -> None:
        self._spec = spec
        self._find_digest = model_digest
        self._digest: str | None = None
        self._closed = False

    @property
    def spec(self) -> RunnerSpec:
        """What the runner is and what it can hold."""
        return self._spec

    @property
    def model_digest(self) -> str:
        """SHA-256 in hex over weights, config, decay and recipe; a state file carries it."""
        if self._digest is None:
            self._digest = self._find_digest()
        return self._digest

    def new_state(self, batch: int) -> StateT:
        """Return an empty state of `batch` rows.

        Raises:
            ShapeError: fewer than one row, or more than the runner can hold.
        """
        self._check_open()
        limit = self._spec.max_batch
        if batch < 1 or (limit is not None and batch > limit):
            wanted = "at least 1" if limit is None else f"1 to {limit}"
            raise ShapeError(f"a batch of {batch} rows was asked for, expected {wanted}")
        with memory_guard(f"the decode state of {batch:,} row(s)"):
            return self._new_state(batch)

    def load_state(self, path: Path) -> StateT:
        """Return the state in a file that `save` of a state of the same model wrote.

        Raises:
            BundleError, VersionError, DigestError, ShapeError: see `BaseState.load`.
        """
        snapshot = read_state_file(path, model_digest=self.model_digest).snapshot
        state = self.new_state(snapshot.batch)
        state.restore(snapshot)
        return state

    def prefill(
        self,
        tokens: npt.ArrayLike,
        lengths: npt.ArrayLike | None,
        state: DecodeState,
        *,
        every_position: bool = False,
    ) -> Logits:
        """Feed `lengths[b]` tokens to each row b and return the logits after the last of them.

        Args:
            tokens: [B, T] integers, right padded; what the padding holds does not matter.
            lengths: [B] integers from 0 to T, or None for T everywhere. A row of length 0 does
                not change, and its logits are zero.
            state: made by this runner; advanced in place.
            every_position: return the logits of all positions instead of the last.

        Returns:
            [B, vocab] fp32, or [B, T, vocab] with zeros at padded positions.

        Raises:
            ShapeError: wrong shapes, ids out of range, a state of another runner or batch.
            ContextLengthError: a row would hold more tokens than the context.
        """
        own = self._check_state(state)
        ids, sizes = self._check_tokens(tokens, lengths, own)
        batch, width = ids.shape
        vocab = self._spec.vocab_size
        shape = (batch, width, vocab) if every_position else (batch, vocab)
        with memory_guard(f"logits of shape {list(shape)}"):
            result: Logits = np.zeros(shape, dtype=np.float32)
        chunk = self._spec.prefill_chunk
        for start in range(0, int(sizes.max(initial=0)), chunk):
            part = np.clip(sizes - start, 0, chunk)
            stop = start + int(part.max())
            with memory_guard(
                f"the state and activations of {batch:,} row(s), {stop:,} tokens each"
            ):
                logits = self._prefill_chunk(ids[:, start:stop], part, own, every_position)
            if every_position:
                result[:, start:stop] = logits
            else:
                result[part > 0] = logits[part > 0]
        return result

    def decode(
        self, tokens: npt.ArrayLike, state: DecodeState, *, rows: Sequence[int] | None = None
    ) -> Logits:
        """Feed one token to each row and return the logits after it.

        Args:
            tokens: [B] integers, or one for each of `rows`.
            state: made by this runner; advanced in place.
            rows: feed only these rows of the state; the others do not change. Neighbours in
                ascending order are the fastest.

        Returns:
            [B, vocab] fp32, or [len(rows), vocab].

        Raises:
            ShapeError, ContextLengthError: as for `prefill`; also a row that comes twice.
        """
        own = self._check_state(state)
        ids = _integers("tokens", tokens, 1)
        if rows is None:
            self._check_batch(ids, own)
        chosen = self._check_rows(rows, ids, own)
        position = own.position if chosen is None else own.position[chosen]
        if int(position.max()) >= self._spec.context_length:
            sizes = np.zeros_like(own.position)
            sizes[slice(None) if chosen is None else chosen] = 1
            self._check_context(own, sizes)
        if ids.min() < 0 or ids.max() >= self._spec.vocab_size:
            self._check_ids(ids[:, None], np.ones_like(ids))
        with memory_guard(f"the state of {len(ids):,} row(s)"):
            return self._decode(ids, own) if chosen is None else self._decode_rows(ids, own, chosen)

    def close(self) -> None:
        """Give everything back; later calls fail, a second close does nothing."""
        if not self._closed:
            self._closed = True
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def _new_state(self, batch: int) -> StateT:
        """Make an empty state."""

    @abstractmethod
    def _prefill_chunk(
        self, tokens: Tokens, lengths: Tokens, state: StateT, every_position: bool
    ) -> Logits:
        """Feed checked tokens [B, T], T <= prefill_chunk, of which at least one row has T.

        Returns:
            [B, vocab] (rows of length 0 are ignored) or [B, T, vocab] with zeros at padding.
        """

    @abstractmethod
    def _decode(self, tokens: Tokens, state: StateT) -> Logits:
        """Feed checked tokens [B] to all rows."""

    def _decode_rows(self, tokens: Tokens, state: StateT, rows: list[int]) -> Logits:
        """Feed checked tokens to some rows; a backend that can do so in place overrides this."""
        part = state.fork(rows)
        logits = self._decode(tokens, part)
        state.restore_rows(rows, part.snapshot())
        return logits

    @abstractmethod
    def _close(self) -> None:
        """Give back what the backend holds."""

    def _check_open(self) -> None:
        if self._closed:
            raise RingExportError(
                f"the {self._spec.name} runner is closed", hint="open the bundle again"
            )

    def _check_state(self, state: DecodeState) -> StateT:
        self._check_open()
        if not isinstance(state, BaseState) or state.owner is not self:
            raise ShapeError(
                f"the state was not made by this {self._spec.name} runner",
                hint="make it with new_state(), or take it over with snapshot() and restore()",
            )
        return state  # type: ignore[return-value]  # the owner made it

    def _check_tokens(
        self, tokens: npt.ArrayLike, lengths: npt.ArrayLike | None, state: StateT
    ) -> tuple[Tokens, Tokens]:
        """Check what `prefill` is given; return ids [B, T] with 0 in the padding, and lengths."""
        ids = _integers("tokens", tokens, 2)
        self._check_batch(ids, state)
        sizes = self._check_lengths(lengths, ids)
        self._check_context(state, sizes)
        return self._check_ids(ids, sizes), sizes

    def _check_batch(self, ids: Tokens, state: StateT) -> None:
        if len(ids) != state.batch:
            raise ShapeError(f"tokens have {len(ids)} rows, the state has {state.batch}")

    def _check_rows(
        self, rows: Sequence[int] | None, ids: Tokens, state: StateT
    ) -> list[int] | None:
        """Check what `decode` is given; None means all rows in their order."""
        if rows is None:
            return None
        chosen = [int(row) for row in rows]
        if len(ids) != len(chosen) or len(set(chosen)) != len(chosen) or not chosen:
            raise ShapeError(f"{len(ids)} tokens were given for the rows {chosen}")
        for row in chosen:
            if not 0 <= row < state.batch:
                raise ShapeError(f"row {row} of a state with {state.batch} rows does not exist")
        return None if chosen == list(range(state.batch)) else chosen

    def _check_lengths(self, lengths: npt.ArrayLike | None, ids: Tokens) -> Tokens:
        batch, width = ids.shape
        if lengths is None:
            return np.full(batch, width, dtype=np.int64)
        sizes = _integers("lengths", lengths, 1)
        if len(sizes) != batch:
            raise ShapeError(f"lengths has {len(sizes)} rows, tokens have {batch}")
        wrong = np.flatnonzero((sizes < 0) | (sizes > width))
        if len(wrong):
            row = wrong[0]
            raise ShapeError(f"the length of row {row} is {sizes[row]}, expected 0 to {width}")
        return sizes

    def _check_context(self, state: StateT, sizes: Tokens) -> None:
        limit = self._spec.context_length
        if int(sizes.max(initial=0)) > limit:
            raise ContextLengthError(
                f"the prompt has {sizes.max():,} tokens, the context of this model holds {limit:,}",
                hint="shorten the prompt",
            )
        total = state.position + sizes
        row = int(total.argmax())
        if total[row] > limit:
            raise ContextLengthError(
                f"row {row} holds {state.position[row]} tokens and {sizes[row]} more were given,"
                f" {total[row]} in all; the context holds {limit}",
                hint="shorten the prompt, or start from a new state",
            )

    def _check_ids(self, ids: Tokens, sizes: Tokens) -> Tokens:
        """Check the ids in use, and return them with 0 in the padding."""
        used = np.arange(ids.shape[1]) < sizes[:, None]
        wrong = np.argwhere(used & ((ids < 0) | (ids >= self._spec.vocab_size)))
        if len(wrong):
            row, column = wrong[0]
            raise ShapeError(
                f"token id {ids[row, column]} in row {row}, position {column} is out of range:"
                f" the vocabulary has {self._spec.vocab_size} ids, from 0",
                hint="use the tokenizer of the same checkpoint",
            )
        return np.where(used, ids, 0)


@contextmanager
def memory_guard(what: str) -> Iterator[None]:
    """Say what was being allocated when memory ran out.

    Args:
        what: for the message "not enough memory for ...".

    Raises:
        RingExportError: instead of MemoryError.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch raises RuntimeError, and a subclass of it for GPUs.
        if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        raise RingExportError(
            f"not enough memory for {what}",
            hint="use fewer or shorter prompts at a time, or a machine with more memory",
        ) from error


def _integers(name: str, values: npt.ArrayLike, rank: int) -> Tokens:
    """Return `values` as int64 of the wanted rank, without rounding anything."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ShapeError(f"{name} are rows of different lengths, expected an array") from error
    if array.ndim != rank:
        raise ShapeError(f"{name} has shape {list(array.shape)}, expected {rank} dimensions")
    if array.dtype == np.int64:
        return array
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ShapeError(f"{name} is of type {array.dtype}, expected integers")
    return array.astype(np.int64)
