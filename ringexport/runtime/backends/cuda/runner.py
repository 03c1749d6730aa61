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
from ringexport.runtime.backends.cuda.graphs import BATCH_BUCKETS, DecodeGraphs, bucket_of
from ringexport.runtime.backends.cuda.kernels import Kernels, Rotary
from ringexport.runtime.backends.cuda.network import Crossovers, Network, PackedRows
from ringexport.runtime.backends.cuda.state import MemoryPlan, StatePool
from ringexport.runtime.backends.cuda.weights import DeviceWeights
from ringexport.runtime.runner import BaseRunner, Logits, RunnerSpec, Tokens
from ringexport.runtime.state import BaseState, StateLayout, StateSnapshot

__all__ = ["CudaOptions", "CudaRunner", "CudaState"]

Array = npt.NDArray[Any]
_LOGIT_ROWS = 64


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
    """

    max_batch: int = 16
    max_context: int | None = None
    prefill_chunk: int = 8192
    prefill_tokens: int = 32768
    fp8_cache: bool | None = None
    chained: bool = True
    crossovers: Crossovers = field(default_factory=Crossovers)


class CudaState(BaseState):
    """Slots of the runner's pool; they go back when the state is collected."""

    def __init__(self, owner: "CudaRunner", slots: list[int]) -> None:
        spec = owner.spec
        super().__init__(owner, spec.layout, len(slots), context_length=spec.context_length)
        self._owner = owner
        self.slots = slots
        self._finalizer = weakref.finalize(self, owner.pool.give_back, slots)

    @property
    def nbytes(self) -> int:
        """Bytes of the slots."""
        pool = self._owner.pool
        tensors = [*pool.recurrent_state.values(), *pool.keys.values(), *pool.values.values()]
        return sum(tensor[0].nbytes for tensor in tensors) * self.batch

    @property
    def model_digest(self) -> str:
        """See `BaseState.model_digest`."""
        return self._owner.model_digest

    def _read_rows(self, rows: list[int], tokens: slice) -> dict[str, Array]:
        pool, slots = self._owner.pool, [self.slots[row] for row in rows]
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
        pool, slots = self._owner.pool, [self.slots[row] for row in rows]
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
        old = [source.slots[row] for row in source_rows]
        self._owner.pool.copy(old, [self.slots[row] for row in rows], used)

    def _clear_rows(self, rows: list[int]) -> None:
        self._owner.pool.reset([self.slots[row] for row in rows])

    def _fork(self, rows: list[int]) -> "CudaState":
        other = CudaState(self._owner, self._owner.pool.take(len(rows)))
        other._copy_rows(list(range(len(rows))), self, rows)
        other.position[:] = self.position[rows]
        return other


class CudaRunner(BaseRunner[CudaState]):
    """Runs packed weights with the kernels of plugins/.

    Args:
        weights: on the GPU.
        library: the loaded kernel library.
        model_digest: see `BaseRunner`.
        options: sizes and formats.

    Raises:
        RingExportError: weights, state and cache do not fit into the GPU's memory.
    """

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
        )
        super().__init__(spec, model_digest)
        self._device = device
        self._options = options
        fp8_cache = weights.fp8_cache if options.fp8_cache is None else options.fp8_cache
        cache_dtype = torch.float8_e4m3fn if fp8_cache else torch.bfloat16
        self.plan = _plan(weights, options, capacity, cache_dtype)
        self.plan.check(torch.cuda.mem_get_info(device)[0] + weights.nbytes)
        self.pool = StatePool(
            config, device, slots=options.max_batch, capacity=capacity, cache_dtype=cache_dtype
        )
        cos, sin = rotary_tables(config.inv_freq(), config.attention_factor, capacity)
        rotary = Rotary(torch.from_numpy(cos).to(device), torch.from_numpy(sin).to(device))
        self.kernels = Kernels(library, device, config.rms_norm_eps, chained=options.chained)
        self.network = Network(weights, self.kernels, self.pool, rotary, options.crossovers)
        self.graphs = DecodeGraphs(self.network, device, lambda: self.kernels.launches)

    def _new_state(self, batch: int) -> CudaState:
        return CudaState(self, self.pool.take(batch))

    def _prefill_chunk(
        self, tokens: Tokens, lengths: Tokens, state: CudaState, every_position: bool
    ) -> Logits:
        vocab = self.spec.vocab_size
        shape = (*tokens.shape, vocab) if every_position else (len(tokens), vocab)
        result: Logits = np.zeros(shape, dtype=np.float32)
        for rows in _groups(lengths, self._options.prefill_tokens):
            residual, rows_of_token = self._prefill_rows(tokens, lengths, state, rows)
            if every_position:
                result[rows_of_token] = self._logits(residual)
            else:
                last = np.cumsum(lengths[rows]) - 1
                chosen = residual[torch.from_numpy(last).to(self._device)]
                result[rows] = self._logits(chosen)
            state.position[rows] += lengths[rows]
        return result

    def _prefill_rows(
        self, tokens: Tokens, lengths: Tokens, state: CudaState, rows: list[int]
    ) -> tuple[torch.Tensor, tuple[Tokens, Tokens]]:
        """Feed some rows packed; return their residual stream and the (row, column) of tokens."""
        sizes = lengths[rows]
        starts = np.cumsum(sizes) - sizes
        slots = np.array([state.slots[row] for row in rows], dtype=np.int32)
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
        )
        where = np.asarray(rows)[row_of], column
        ids = torch.from_numpy(tokens[where]).to(self._device)
        residual = self.network.embed(ids)
        self.network.run(residual, packed)
        return residual, where

    def _logits(self, residual: torch.Tensor) -> Logits:
        """Return the logits of [N, D] on the host, some rows at a time."""
        parts = []
        for start in range(0, len(residual), _LOGIT_ROWS):
            some = residual[start : start + _LOGIT_ROWS].contiguous()
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
            parts.append(self.replay(tokens[start : start + len(some)], state, some, steps=1))
        return np.concatenate(parts)

    def replay(
        self, tokens: Tokens, state: CudaState, rows: Sequence[int], *, steps: int
    ) -> Logits:
        """Feed a token to each row, then the greedy choices, `steps` tokens in all, on the GPU.

        Returns:
            [B, vocab] fp32 logits after the last token.
        """
        count, position = len(rows), state.position[list(rows)]
        step = self.graphs.step(count, int(position.max()) + steps)
        batch = bucket_of(count, BATCH_BUCKETS)
        fill = np.zeros(batch, dtype=np.int64)
        fill[:count] = tokens
        step.tokens.copy_(torch.from_numpy(fill))
        fill[:count] = position
        step.position.copy_(torch.from_numpy(fill))
        fill[:] = -1
        fill[:count] = [state.slots[row] for row in rows]
        step.slots.copy_(torch.from_numpy(fill))
        for _ in range(steps):
            step.graph.replay()
        state.position[list(rows)] += steps
        logits: Logits = step.logits[:count].cpu().numpy()
        return logits

    def _int32(self, values: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int32)).to(self._device)

    def _close(self) -> None:
        del self.graphs, self.network, self.kernels
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


def _plan(
    weights: DeviceWeights, options: CudaOptions, capacity: int, cache_dtype: torch.dtype
) -> MemoryPlan:
    config = weights.config
    recurrent, cache = StatePool.bytes_per_slot(config, capacity, cache_dtype)
    widest = max(4 * config.linear_dim, config.hidden_size * 4)
    experts = config.num_experts_per_tok * (config.moe_intermediate_size * 6 + config.hidden_size)
    tokens = min(options.prefill_tokens, options.prefill_chunk * options.max_batch)
    workspace = tokens * (2 * widest + 12 * config.hidden_size + experts * 2)
    logits = 2 * min(options.max_batch, BATCH_BUCKETS[-1]) * config.vocab_size * 4
    return MemoryPlan(
        weights=weights.nbytes,
        recurrent_state=recurrent * options.max_batch,
        kv_cache=cache * options.max_batch,
        workspace=workspace + logits,
        slots=options.max_batch,
        capacity=capacity,
    )
