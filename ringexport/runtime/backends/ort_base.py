"""What runners of ONNX graphs share, wherever their state lies: which rows share a call, and when.

GroupQueryAttention limits how rows may share a call: several tokens on top of cached ones need a
call of one row; fresh rows, or one token per row, may be ragged.
"""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ringexport.errors import BundleError, ShapeError
from ringexport.runtime.backends.ort_session import (
    DTYPES,
    OrtOptions,
    Session,
    open_session,
    resolved_shape,
    state_inputs,
)
from ringexport.runtime.runner import BaseRunner, Logits, RunnerSpec, Tokens
from ringexport.runtime.state import BaseState

__all__ = ["BoundCall", "OrtRunnerBase", "graph_inputs", "row_groups"]

Array = npt.NDArray[Any]

MAX_PADDED_TOKENS = 8192
"""Tokens, padding included, of one call with several rows; more rows go one by one."""


class BoundCall(Protocol):
    """A call whose inputs and outputs are bound."""

    @property
    def rows(self) -> slice:
        """Rows of the state."""

    def run(self) -> Logits:
        """Run it and return the logits [B, L, vocab], which the next run overwrites."""

    def refresh(self, tokens: Tokens, position: npt.NDArray[np.int64]) -> None:
        """Replace the tokens [B] of a decode step, and the positions."""


StateT = TypeVar("StateT", bound=BaseState)


class OrtRunnerBase(BaseRunner[StateT]):
    """Runs model.onnx of a bundle's target.

    Args:
        directory: holds model.onnx, its external data, and probe.onnx.
        context_length: tokens that a row can hold.
        model_digest: see `BaseRunner`.
        options: how to run it.
        provider_options: of the execution provider.
        initializers: see `open_session`.

    Raises:
        BackendUnavailableError: this onnxruntime has no such execution provider.
        BundleError: the graph cannot be loaded, or is no graph of ringexport.
    """

    def __init__(
        self,
        directory: Path,
        *,
        context_length: int,
        model_digest: Callable[[], str],
        options: OrtOptions,
        provider_options: dict[str, str] | None = None,
        initializers: dict[str, Any] | None = None,
    ) -> None:
        self._options = options
        self._initializers = initializers
        self._provider_options = provider_options
        self._directory = directory
        self._session: Session = self._open("model.onnx")
        self._probe_session: Session = None
        self.dtypes, layout = state_inputs(self._session)
        outputs = {output.name: output.shape for output in self._session.get_outputs()}
        vocab_size = outputs.get("logits", [None])[-1]
        if not isinstance(vocab_size, int):
            raise BundleError(f"{directory / 'model.onnx'} has no output logits of known width")
        spec = RunnerSpec(
            name=f"onnxruntime:{options.provider}",
            vocab_size=vocab_size,
            context_length=context_length,
            layout=layout,
            prefill_chunk=options.prefill_chunk,
        )
        super().__init__(spec, model_digest)

    def probe(
        self, tokens: npt.ArrayLike, lengths: npt.ArrayLike | None, state: StateT
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Feed tokens like `prefill` and return what the layers computed; see `ProbeRunner`.

        Raises:
            ShapeError, ContextLengthError: as for `prefill`; also T beyond prefill_chunk.
            BundleError: probe.onnx cannot be loaded.
        """
        ids, sizes = self._check_tokens(tokens, lengths, self._check_state(state))
        batch, width = ids.shape
        if width > self.spec.prefill_chunk:
            raise ShapeError(
                f"{width} tokens per row were given, a probe takes {self.spec.prefill_chunk}",
                hint="probe several calls of fewer tokens",
            )
        if self._probe_session is None:
            self._probe_session = self._open("probe.onnx")
        self._reserve(state, int((state.position + sizes).max()))
        found: dict[str, Array] = {}
        for row in np.flatnonzero(sizes):
            rows, length = slice(row, row + 1), int(sizes[row])
            index = np.arange(length)[None]
            parts = self._probe_outputs(length)
            call = self._bind(state, rows, ids[rows, :length], index, probes=parts)
            parts["logits"] = call.run()
            state.position[row] += length
            for name, part in parts.items():
                values = part if part.dtype == np.int64 else part.astype(np.float32)
                fill = -1 if name.startswith("expert_ids.") else 0
                whole = np.full((batch, width, part.shape[-1]), fill, dtype=values.dtype)
                found.setdefault(name, whole)[rows, :length] = values
        return found

    def _probe_outputs(self, length: int) -> dict[str, Array]:
        """Return empty arrays for what the probe graph puts out for one row."""
        sizes = {"B": 1, "T": length, "L": length, "N": length}
        return {
            output.name: np.empty(resolved_shape(output.shape, sizes), DTYPES[output.type])
            for output in self._probe_session.get_outputs()
            if output.name.startswith(("hidden.", "expert_ids."))
        }

    def _prefill_chunk(
        self, tokens: Tokens, lengths: Tokens, state: StateT, every_position: bool
    ) -> Logits:
        batch, width = tokens.shape
        vocab = self.spec.vocab_size
        self._reserve(state, int((state.position + lengths).max()))
        shape = (batch, width, vocab) if every_position else (batch, 1, vocab)
        result: Logits = np.zeros(shape, dtype=np.float32)
        for rows in row_groups(lengths, state.position):
            sizes = lengths[rows]
            longest = int(sizes.max())
            index = (
                np.tile(np.arange(longest), (len(sizes), 1))
                if every_position
                else sizes[:, None] - 1
            )
            logits = self._bind(state, rows, tokens[rows, :longest], index, sizes).run()
            state.position[rows] += sizes
            result[rows, : index.shape[1]] = logits
        if every_position:
            result[np.arange(width) >= lengths[:, None]] = 0
            return result
        return result[:, 0]

    def _decode(self, tokens: Tokens, state: StateT) -> Logits:
        return self._decode_slice(tokens, state, slice(0, state.batch))

    def _decode_rows(self, tokens: Tokens, state: StateT, rows: list[int]) -> Logits:
        if rows != list(range(rows[0], rows[0] + len(rows))):
            return super()._decode_rows(tokens, state, rows)
        return self._decode_slice(tokens, state, slice(rows[0], rows[0] + len(rows)))

    def _decode_slice(self, tokens: Tokens, state: StateT, rows: slice) -> Logits:
        self._reserve(state, int(state.position[rows].max()) + 1)
        call = self._decode_call(state, rows)
        call.refresh(tokens, state.position[rows])
        logits = call.run()
        state.position[rows] += 1
        return logits[:, 0].copy()

    def _open(self, name: str) -> Session:
        return open_session(
            self._directory / name,
            self._options,
            provider_options=self._provider_options,
            initializers=self._initializers,
        )

    @abstractmethod
    def _reserve(self, state: StateT, tokens: int) -> None:
        """Make room for `tokens` per row in the KV cache, doubling it as often as needed."""

    @abstractmethod
    def _bind(
        self,
        state: StateT,
        rows: slice,
        tokens: Tokens,
        logits_index: Tokens,
        lengths: Tokens | None = None,
        *,
        probes: dict[str, Array] | None = None,
    ) -> BoundCall:
        """Bind a call for contiguous rows.

        Args:
            state: whose tensors are inputs and outputs at once.
            rows: of the state.
            tokens: [B, T].
            logits_index: [B, L] positions whose logits are wanted.
            lengths: [B] tokens of each row; None means that no row is padded.
            probes: host arrays for the outputs of the probe graph, which is then run.
        """

    @abstractmethod
    def _decode_call(self, state: StateT, rows: slice) -> BoundCall:
        """Return the call of a decode step, bound once per state and rows while the cache lasts."""

    def _close(self) -> None:
        self._session = None
        self._probe_session = None


def graph_inputs(
    tokens: Tokens,
    position: npt.NDArray[np.int64],
    logits_index: Tokens,
    lengths: Tokens | None = None,
) -> dict[str, Array]:
    """Return the inputs of a call but for the state: contiguous copies in the graph's dtypes.

    Args:
        tokens: [B, T].
        position: [B] tokens that each row has seen.
        logits_index: [B, L].
        lengths: [B] tokens of each row; None means that no row is padded.
    """
    batch, width = tokens.shape
    sizes = np.full(batch, width) if lengths is None else lengths
    return {
        "tokens": np.array(tokens, dtype=np.int64, order="C"),
        "lengths": np.array(sizes, dtype=np.int32),
        "position": np.array(position, dtype=np.int32),
        "logits_index": np.array(logits_index, dtype=np.int64, order="C"),
    }


def row_groups(lengths: Tokens, position: Tokens) -> list[slice]:
    """Split rows into contiguous groups that may share a call; rows of length 0 are in none."""
    active = np.flatnonzero(lengths)
    longest = int(lengths.max())
    padded = len(lengths) * longest
    together = (
        len(active) == len(lengths)
        and (longest == 1 or not position.any())
        and padded <= min(MAX_PADDED_TOKENS, 2 * int(lengths.sum()))
    )
    if together:
        return [slice(0, len(lengths))]
    return [slice(int(row), int(row) + 1) for row in active]
