"""Slots of decode state in GPU memory, planned up front: recurrent states and KV caches."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ringexport.checkpoint import RingConfig
from ringexport.errors import RingExportError
from ringexport.kernels.library import DType
from ringexport.runtime.backends.cuda.transfers import uploaded

__all__ = ["MemoryPlan", "StatePool"]

_FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What an engine takes of GPU memory, in bytes.

    Attributes:
        weights: packed weights.
        recurrent_state: of all slots.
        kv_cache: of all slots at full capacity.
        workspace: activations and kernel workspaces at the largest step.
        slots: sequences that fit at a time.
        capacity: tokens of each.
    """

    weights: int
    recurrent_state: int
    kv_cache: int
    workspace: int
    slots: int
    capacity: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.recurrent_state + self.kv_cache + self.workspace

    def check(self, available: int) -> None:
        """Raise RingExportError with the numbers if the plan does not fit."""
        if self.total <= available:
            return
        parts = ", ".join(
            f"{name.replace('_', ' ')} {getattr(self, name) / 1e9:.2f} GB"
            for name in ("weights", "recurrent_state", "kv_cache", "workspace")
        )
        raise RingExportError(
            f"{self.slots} sequences of {self.capacity:,} tokens need {self.total / 1e9:.2f} GB of "
            f"GPU memory, {available / 1e9:.2f} GB are free: {parts}",
            hint="lower the batch or the context, or use an 8-bit KV cache",
        )


class StatePool:
    """All slots; a state owns some of them and gives them back.

    Attributes:
        recurrent_state: linear layer -> [slots, H, K, K] fp32.
        keys: softmax layer -> [slots, KV, capacity, K].
        values: like `keys`.
        capacity: tokens a slot can hold.
    """

    def __init__(
        self,
        config: RingConfig,
        device: torch.device,
        *,
        slots: int,
        capacity: int,
        cache_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        heads, size = config.num_attention_heads, config.head_dim
        self.capacity = capacity
        self.recurrent_state = {
            layer: torch.zeros((slots, heads, size, size), device=device)
            for layer in config.linear_layers
        }
        cache = (slots, config.num_key_value_heads, capacity, size)
        self.keys = {
            layer: torch.zeros(cache, dtype=cache_dtype, device=device)
            for layer in config.softmax_layers
        }
        self.values = {layer: torch.zeros_like(key) for layer, key in self.keys.items()}
        self._free = list(range(slots - 1, -1, -1))
        self._cache_dtype = cache_dtype

    @staticmethod
    def bytes_per_slot(
        config: RingConfig, capacity: int, cache_dtype: torch.dtype
    ) -> tuple[int, int]:
        """Return the bytes of recurrent state and of KV cache of one slot."""
        heads, size = config.num_attention_heads, config.head_dim
        recurrent = len(config.linear_layers) * heads * size * size * 4
        row = config.num_key_value_heads * size * cache_dtype.itemsize
        return recurrent, len(config.softmax_layers) * 2 * capacity * row

    @property
    def free(self) -> int:
        """Slots that nobody owns."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Return `count` zeroed slots.

        Raises:
            RingExportError: not so many are free.
        """
        if count > len(self._free):
            raise RingExportError(
                f"{count} more sequences were asked for, {len(self._free)} slots are free",
                hint="close other sessions, or open the engine with a larger batch",
            )
        taken = [self._free.pop() for _ in range(count)]
        self.reset(taken)
        return taken

    def give_back(self, slots: list[int]) -> None:
        """Return slots that `take` gave out; negative ones are none."""
        self._free.extend(slot for slot in reversed(slots) if slot >= 0)

    def reset(self, slots: list[int]) -> None:
        """Zero the recurrent state; stale cache entries are never read."""
        index = uploaded(slots, next(iter(self.recurrent_state.values())).device)
        for state in self.recurrent_state.values():
            state.index_fill_(0, index, 0.0)

    def copy(self, source: list[int], target: list[int], tokens: int) -> None:
        """Copy slots with the first `tokens` tokens of their caches."""
        caches = [*self.keys.values(), *self.values.values()]
        for old, new in zip(source, target, strict=True):
            for state in self.recurrent_state.values():
                state[new].copy_(state[old])
            for cache in caches:
                cache[new, :, :tokens].copy_(cache[old, :, :tokens])

    def cache_fields(self, layer: int, kv_scale: Tensor) -> dict[str, object]:
        """Return the fields of kernels that read or write the cache of a softmax layer."""
        fields: dict[str, object] = {
            "key_cache": self.keys[layer],
            "value_cache": self.values[layer],
            "capacity": self.capacity,
            "cache_dtype": DType.BFLOAT16,
        }
        if self._cache_dtype == _FP8:
            fields |= {
                "cache_dtype": DType.FP8_E4M3,
                "key_scale": kv_scale[0:1],
                "value_scale": kv_scale[1:2],
            }
        return fields

    def cached(self, layer: int, slot: int, tokens: int, kv_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [KV, tokens, K] of a slot in bf16.

        Args:
            layer: a softmax layer.
            slot: whose cache.
            tokens: from the first on.
            kv_scale: [2] scales of cached keys and values, for an 8-bit cache.
        """
        found = [cache[layer][slot, :, :tokens] for cache in (self.keys, self.values)]
        if self._cache_dtype == _FP8:
            scales = kv_scale.to(torch.bfloat16)
            found = [part.to(torch.bfloat16) * scales[i] for i, part in enumerate(found)]
        return found[0], found[1]
