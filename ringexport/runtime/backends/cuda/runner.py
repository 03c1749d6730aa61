"""The fast engine as a runner: slots of state in GPU memory, decode under CUDA graphs."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ringexport.kernels.library import KernelLibrary
from ringexport.ops.rotary import rotary_tables
from ringexport.runtime.backends.cuda.choosing import DeviceChooser
from ringexport.runtime.backends.cuda.graphs import (
    BATCH_BUCKETS,
    DecodeGraphs,
    DecodeStep,
    bucket_of,
)
from ringexport.runtime.backends.cuda.kernels import Kernels, Rotary
from ringexport.runtime.backends.cuda.network import Crossovers, Network, PackedRows
from ringexport.runtime.backends.cuda.plan import LOGIT_ROWS, plan_memory
from ringexport.runtime.backends.cuda.state import StatePool
from ringexport.runtime.backends.cuda.transfers import uploaded
from ringexport.runtime.backends.cuda.weights import DeviceWeights
from ringexport.runtime.choosing import ChosenTokens, KnownTokens, PendingTokens, TokenChoice
from ringexport.runtime.runner import BaseRunner, Logits, RunnerSpec, Tokens, memory_guard
from ringexport.runtime.state import BaseState, DecodeState, StateLayout, StateSnapshot

__all__ = ["CudaOptions", "CudaRunner", "CudaState"]

Array = npt.NDArray[Any]
_TOKEN_BUDGET = 2048
"""Reading so many prompt tokens takes about as long as a decode step of a large batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaOptions:
    """How to run the engine.

    Attributes:
        max_batch: sequences whose state fits at a time.
        max_context: tokens of each, None for the model's context.
        prefill_chunk: tokens per row that are computed at once.
        prefill_tokens: tokens of all rows that are computed at once.
        fp8_cache: keep the KV cache in FP8-E4M3 instead of bf16; None: as the weights say.
        chained: programmatic dependent launch.
        crossovers: which way to compute is used up to how many rows.
        capture_ahead: capture the graphs of all batch sizes now, not when they are first needed.
    """

    max_batch: int = 16
    max_context: int | None = None
    prefill_chunk: int = 32768
    prefill_tokens: int = 32768
    fp8_cache: bool | None = None
    chained: bool = True
    crossovers: Crossovers = field(default_factory=Crossovers)
    capture_ahead: bool = False


class CudaState(BaseState):
    """Slots of the runner's pool; they go back when the state is collected.

    Attributes:
        slots: of each row; -1 for a row that was never used or was reset, which is empty.
    """

    def __init__(self, owner: "CudaRunner", batch: int) -> None:
        spec = owner.spec
        super().__init__(owner, spec.layout, batch, context_length=spec.context_length)
        self._owner = owner
        self.slots = [-1] * batch
        self._finalizer = weakref.finalize(self, owner.pool.give_back, self.slots)

    @property
    def nbytes(self) -> int:
        """Bytes of a slot for each row, whether it has taken it already or not."""
        pool = self._owner.pool
        tensors = [*pool.recurrent_state.values(), *pool.keys.values(), *pool.values.values()]
        return sum(tensor[0].nbytes for tensor in tensors) * self.batch

    def hold(self, rows: Sequence[int]) -> list[int]:
        """Return the slots of rows, after taking one for each row that has none.

        Raises:
            RingExportError: not so many are free.
        """
        missing = [row for row in rows if self.slots[row] < 0]
        if missing:
            taken = self._owner.pool.take(len(missing))
            for row, slot in zip(missing, taken, strict=True):
                self.slots[row] = slot
        return [self.slots[row] for row in rows]

    @property
    def model_digest(self) -> str:
        """See `BaseState.model_digest`."""
        return self._owner.model_digest

    def _read_rows(self, rows: list[int], tokens: slice) -> dict[str, Array]:
        pool, slots = self._owner.pool, self.hold(rows)
        found = {
            f"recurrent_state.{layer}": tensor[slots].cpu().numpy()
            for layer, tensor in pool.recurrent_state.items()
        }
        for part, caches in (("key", pool.keys), ("value", pool.values)):
            for layer, cache in caches.items():
                copied = cache[slots, :, tokens].float().cpu().numpy()
                found[f"kv_cache.{layer}.{part}"] = copied
        return found

    def _write_rows(self, rows: list[int], snapshot: StateSnapshot) -> None:
        pool, slots = self._owner.pool, self.hold(rows)
        used = int(snapshot.position.max(initial=0))
        for layer, tensor in pool.recurrent_state.items():
            values = torch.from_numpy(snapshot.tensors[f"recurrent_state.{layer}"])
            tensor[slots] = values.to(tensor.device, tensor.dtype)
        for part, caches in (("key", pool.keys), ("value", pool.values)):
            for layer, cache in caches.items():
                values = torch.from_numpy(snapshot.tensors[f"kv_cache.{layer}.{part}"])
                cache[slots, :, :used] = values.to(cache.device, cache.dtype)

    def _copy_rows(self, rows: list[int], source: "CudaState", source_rows: list[int]) -> None:
        used = int(source.position[source_rows].max())
        self._owner.copy_slots(source.hold(source_rows), self.hold(rows), used)

    def _move_rows(self, rows: list[int], source: "CudaState", source_rows: list[int]) -> None:
        for row, origin in zip(rows, source_rows, strict=True):
            self.slots[row], source.slots[origin] = source.slots[origin], self.slots[row]

    def _clear_rows(self, rows: list[int]) -> None:
        self._owner.pool.give_back([self.slots[row] for row in rows])
        for row in rows:
            self.slots[row] = -1

    def _fork(self, rows: list[int]) -> "CudaState":
        other = CudaState(self._owner, len(rows))
        other._copy_rows(list(range(len(rows))), self, rows)
        other.position[:] = self.position[rows]
        return other


class CudaRunner(BaseRunner[CudaState]):
    """Runs packed weights with the kernels of plugins/, and chooses tokens itself: see `Chooser`.

    Args:
        weights: on the GPU.
        library: the loaded kernel library.
        model_digest: see `BaseRunner`.
        options: sizes and formats.

    Raises:
        RingExportError: weights, state and cache do not fit into the GPU's memory.
    """

    asynchronous = True

    def __init__(
        self,
        weights: DeviceWeights,
        library: KernelLibrary,
        *,
        model_digest: Callable[[], str],
        options: CudaOptions | None = None,
    ) -> None:
        options = options or CudaOptions()
        config, device = weights.config, weights["embedding"].device
        capacity = min(options.max_context or config.context_length, config.context_length)
        layout = StateLayout(
            recurrent=dict.fromkeys(
                config.linear_layers, (config.num_attention_heads, config.head_dim, config.head_dim)
            ),
            kv_cache=dict.fromkeys(
                config.softmax_layers, (config.num_key_value_heads, config.head_dim)
            ),
        )
        spec = RunnerSpec(
            name="cuda",
            vocab_size=config.vocab_size,
            context_length=capacity,
            layout=layout,
            max_batch=options.max_batch,
            prefill_chunk=options.prefill_chunk,
            token_budget=_TOKEN_BUDGET,
        )
        super().__init__(spec, model_digest)
        self._device = device
        self._options = options
        fp8_cache = weights.fp8_cache if options.fp8_cache is None else options.fp8_cache
        cache_dtype = torch.float8_e4m3fn if fp8_cache else torch.bfloat16
        self.plan = plan_memory(
            weights, library, options, capacity=capacity, cache_dtype=cache_dtype
        )
        self.plan.check(torch.cuda.mem_get_info(device)[0] + weights.nbytes)
        self.pool = StatePool(
            config, device, slots=options.max_batch, capacity=capacity, cache_dtype=cache_dtype
        )
        cos, sin = rotary_tables(config.inv_freq(), config.attention_factor, capacity)
        rotary = Rotary(torch.from_numpy(cos).to(device), torch.from_numpy(sin).to(device))
        self.kernels = Kernels(library, device, config.rms_norm_eps, chained=options.chained)
        self.network = Network(weights, self.kernels, self.pool, rotary, options.crossovers)
        self.graphs = DecodeGraphs(self.network, device, capacity, lambda: self.kernels.launches)
        if options.capture_ahead:
            self.graphs.capture_all(options.max_batch)
        self._chooser = DeviceChooser(self.network, self.graphs, options.max_batch, device)

    def choose_prefill(
        self,
        tokens: npt.ArrayLike,
        lengths: npt.ArrayLike | None,
        state: DecodeState,
        choices: Sequence[TokenChoice | None],
    ) -> PendingTokens:
        """See `Chooser.choose_prefill`."""
        own = self._check_state(state)
        ids, sizes = self._check_tokens(tokens, lengths, own)
        chunk = self.spec.prefill_chunk
        last: torch.Tensor | None = None
        for start in range(0, int(sizes.max()), chunk):
            part = np.clip(sizes - start, 0, chunk)
            for rows in _groups(part, self._options.prefill_tokens):
                with memory_guard(f"the activations of {int(part[rows].sum()):,} tokens"):
                    residual, _ = self._prefill_rows(ids[:, start:], part, own, rows)
                own.position[rows] += part[rows]
                ends = uploaded(np.cumsum(part[rows]) - 1, self._device)
                last = residual.new_zeros((len(ids), residual.shape[1])) if last is None else last
                last[uploaded(rows, self._device)] = residual[ends]
        if last is None or all(choice is None for choice in choices):
            return KnownTokens(ChosenTokens(ids=[0] * len(ids), largest=[0.0] * len(ids)))
        logits = last.new_empty((len(last), self.spec.vocab_size))
        self.network.logits(last, logits)
        return self._chooser.first(logits, own.slots, own.position, choices)

    def choose_decode(
        self, state: DecodeState, rows: Sequence[int], choices: Sequence[TokenChoice]
    ) -> PendingTokens:
        """See `Chooser.choose_decode`."""
        own, chosen = self._check_state(state), list(rows)
        position = own.position[chosen]
        if int(position.max()) >= self.spec.context_length:
            self._check_context(own, np.isin(np.arange(own.batch), chosen).astype(np.int64))
        tokens = self._chooser.step(own.hold(chosen), position, choices)
        own.position[chosen] = position + 1
        return tokens

    def copy_slots(self, old: Sequence[int], new: Sequence[int], tokens: int) -> None:
        """Copy slots with the first `tokens` tokens of their caches, and their last token."""
        self.pool.copy(list(old), list(new), tokens)
        self._chooser.copy(old, new)

    def _new_state(self, batch: int) -> CudaState:
        return CudaState(self, batch)

    def _prefill_chunk(
        self, tokens: Tokens, lengths: Tokens, state: CudaState, every_position: bool
    ) -> Logits:
        vocab = self.spec.vocab_size
        shape = (*tokens.shape, vocab) if every_position else (len(tokens), vocab)
        result: Logits = np.zeros(shape, dtype=np.float32)
        for rows in _groups(lengths, self._options.prefill_tokens):
            residual, rows_of_token = self._prefill_rows(
                tokens, lengths, state, rows, every_position=every_position
            )
            if every_position:
                result[rows_of_token] = self._logits(residual)
            else:
                last = np.cumsum(lengths[rows]) - 1
                chosen = residual[torch.from_numpy(last).to(self._device)]
                result[rows] = self._logits(chosen)
            state.position[rows] += lengths[rows]
        return result

    def _prefill_rows(
        self,
        tokens: Tokens,
        lengths: Tokens,
        state: CudaState,
        rows: list[int],
        *,
        every_position: bool = False,
    ) -> tuple[torch.Tensor, tuple[Tokens, Tokens]]:
        """Feed some rows packed; return their residual stream and the (row, column) of tokens.

        Without `every_position` only the last token of each row holds its result.
        """
        sizes = lengths[rows]
        starts = np.cumsum(sizes) - sizes
        slots = np.array(state.hold(rows), dtype=np.int32)
        position = state.position[rows]
        column = np.concatenate([np.arange(size) for size in sizes])
        row_of = np.repeat(np.arange(len(rows)), sizes)
        packed = PackedRows(
            slots=self._int32(slots),
            position=self._int32(position),
            max_context=int((position + sizes).max()),
            token_slots=self._int32(slots[row_of]),
            token_position=self._int32(position[row_of] + column),
            starts=self._int32(starts),
            lengths=self._int32(sizes),
            host_rows=tuple(
                (int(slot), int(past), int(start), int(size))
                for slot, past, start, size in zip(slots, position, starts, sizes, strict=True)
            ),
            last_only=not every_position,
        )
        where = np.asarray(rows)[row_of], column
        ids = uploaded(tokens[where], self._device)
        residual = self.network.embed(ids)
        self.network.run(residual, packed)
        return residual, where

    def _logits(self, residual: torch.Tensor) -> Logits:
        """Return the logits of [N, D] on the host, some rows at a time."""
        parts = []
        for start in range(0, len(residual), LOGIT_ROWS):
            some = residual[start : start + LOGIT_ROWS].contiguous()
            out = some.new_empty((len(some), self.spec.vocab_size))
            self.network.logits(some, out)
            parts.append(out.cpu().numpy())
        return np.concatenate(parts)

    def _decode(self, tokens: Tokens, state: CudaState) -> Logits:
        return self._decode_rows(tokens, state, list(range(state.batch)))

    def _decode_rows(self, tokens: Tokens, state: CudaState, rows: list[int]) -> Logits:
        parts = []
        for start in range(0, len(rows), BATCH_BUCKETS[-1]):
            some = rows[start : start + BATCH_BUCKETS[-1]]
            step = self._run_steps(tokens[start : start + len(some)], state, some, 1)
            parts.append(step.logits[: len(some)].cpu().numpy())
        return np.concatenate(parts)

    def replay(
        self, tokens: Tokens, state: CudaState, rows: Sequence[int], *, steps: int
    ) -> Tokens:
        """Feed a token to each row, then the greedy choices, `steps` tokens in all, on the GPU.

        Returns:
            [B] int64 the greedy choices after the last token.
        """
        parts = []
        for start in range(0, len(rows), BATCH_BUCKETS[-1]):
            some = rows[start : start + BATCH_BUCKETS[-1]]
            step = self._run_steps(tokens[start : start + len(some)], state, some, steps)
            parts.append(step.tokens[: len(some)].cpu().numpy())
        return np.concatenate(parts)

    def _run_steps(
        self, tokens: Tokens, state: CudaState, rows: Sequence[int], steps: int
    ) -> DecodeStep:
        """Start steps of which each feeds the greedy choices of the one before; see `replay`."""
        self._chooser.forget()
        count, position = len(rows), state.position[list(rows)]
        step = self.graphs.step(count)
        fill = np.zeros((3, bucket_of(count, BATCH_BUCKETS)), dtype=np.int64)
        fill[1] = -1
        fill[0, :count], fill[1, :count], fill[2, :count] = tokens, state.hold(rows), position
        on_device = uploaded(fill, self._device)
        for target, values in zip((step.tokens, step.slots, step.position), on_device, strict=True):
            target.copy_(values)
        for _ in range(steps):
            step.graph.replay()
        state.position[list(rows)] += steps
        return step

    def _int32(self, values: npt.NDArray[Any]) -> torch.Tensor:
        return uploaded(values, self._device, np.int32)

    def _close(self) -> None:
        del self._chooser, self.graphs, self.network, self.kernels
        torch.cuda.empty_cache()


def _groups(lengths: Tokens, most: int) -> list[list[int]]:
    """Split the rows that have tokens into groups of at most `most` tokens, a row at least."""
    groups: list[list[int]] = []
    held = 0
    for row, size in enumerate(lengths):
        if not size:
            continue
        if not groups or held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(row)
        held += int(size)
    return groups
