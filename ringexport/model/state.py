"""The decode state of the torch reference and the layout of the tokens of one call."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from ringexport.errors import ConfigError, ContextLengthError, ShapeError

__all__ = ["ReferenceState", "TokenLayout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLayout:
    """Where the tokens of one call sit: padded [B, T] at the borders, packed [N] inside.

    Only attention looks across tokens and unpacks; padding cannot reach anything else.
    """

    batch: int
    width: int  # T
    lengths: Tensor  # int64 [B] on the CPU, real tokens per row
    valid: Tensor | None  # bool [B, T], or None when there is no padding
    flat_index: Tensor  # int64 [N], the real tokens' places in the flattened [B * T]
    position: Tensor  # int64 [N], absolute, in the token's sequence
    max_context: int  # tokens in the longest row after this call

    @classmethod
    def build(
        cls, width: int, lengths: Tensor | None, past: Tensor, padding: str, device: torch.device
    ) -> Self:
        """Lay out rows of `lengths` [B] tokens that follow `past` [B], or raise ShapeError."""
        if padding not in {"right", "left"}:
            raise ConfigError(f"padding is {padding!r}, expected 'right' or 'left'")
        batch = past.shape[0]
        counts = torch.full((batch,), width) if lengths is None else lengths.cpu().long()
        if counts.shape != (batch,) or ((counts < 0) | (counts > width)).any():
            raise ShapeError(f"lengths is {counts.tolist()}, expected [B={batch}] of 0..{width}")
        first = width - counts if padding == "left" else torch.zeros_like(counts)
        order = torch.arange(width) - first[:, None]
        valid = (order >= 0) & (order < counts[:, None])
        return cls(
            batch=batch,
            width=width,
            lengths=counts,
            valid=None if valid.all() else valid.to(device),
            flat_index=valid.flatten().nonzero()[:, 0].to(device),
            position=(past[:, None] + order)[valid].to(device),
            max_context=int((past + counts).max()) if batch else 0,
        )

    def pack(self, padded: Tensor) -> Tensor:
        """Return the real tokens [N, ...] of a padded tensor [B, T, ...]."""
        flat = padded.flatten(0, 1)
        return flat if self.valid is None else flat[self.flat_index]

    def unpack(self, packed: Tensor, fill: float = 0.0) -> Tensor:
        """Return [B, T, ...] of packed tokens [N, ...], with `fill` at the padding."""
        if self.valid is None:
            return packed.view(self.batch, self.width, *packed.shape[1:])
        flat = packed.new_full((self.batch * self.width, *packed.shape[1:]), fill)
        flat.index_copy_(0, self.flat_index, packed)
        return flat.view(self.batch, self.width, *packed.shape[1:])


@dataclass(slots=True, kw_only=True)
class ReferenceState:
    """What a batch of sequences carries from call to call; `ReferenceModel.forward` updates it.

    Dictionaries are by layer. Slot s of a cache holds position s; slots from `position` on are
    spare capacity and mean nothing.
    """

    position: Tensor  # int64 [B] on the CPU, tokens that each row has seen
    recurrent_state: dict[int, Tensor]  # [B, H, K, V] fp32, or fp64 in an fp64 model
    kv_cache: dict[int, tuple[Tensor, Tensor]]  # key and value [B, Hkv, S, D]
    context_length: int  # the most tokens that a row may hold

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.position.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held, with the unused capacity of the caches."""
        caches = [tensor for pair in self.kv_cache.values() for tensor in pair]
        return sum(t.nbytes for t in (self.position, *self.recurrent_state.values(), *caches))

    def snapshot(self, rows: Sequence[int] | None = None) -> "ReferenceState":
        """Return an independent copy, or one of these rows in this order; no slack in its cache."""
        index = list(range(self.batch) if rows is None else rows)
        position = self.position[index]
        used = max(position.tolist(), default=0)
        cache = {
            layer: (key[index, :, :used], value[index, :, :used])
            for layer, (key, value) in self.kv_cache.items()
        }
        recurrent = {layer: state[index] for layer, state in self.recurrent_state.items()}
        return replace(self, position=position, recurrent_state=recurrent, kv_cache=cache)

    def restore(self, snapshot: "ReferenceState") -> None:
        """Return to a snapshot bit by bit; it stays usable. ShapeError: another model or batch."""
        got, expected = ((s.batch, *s.recurrent_state, *s.kv_cache) for s in (snapshot, self))
        if got != expected:
            raise ShapeError(f"the snapshot's rows and layers are {got}, expected {expected}")
        same = snapshot.snapshot()
        self.position, self.kv_cache = same.position, same.kv_cache
        self.recurrent_state = same.recurrent_state

    def check_room(self, layout: TokenLayout) -> None:
        """Raise ContextLengthError if a row would pass the context."""
        if layout.max_context > self.context_length:
            row = int((self.position + layout.lengths).argmax())
            counts = f"{layout.max_context} tokens, the context is {self.context_length}"
            raise ContextLengthError(f"row {row} would hold {counts}", hint="send fewer tokens")

    def append(
        self, layer: int, layout: TokenLayout, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write packed key and value [N, Hkv, D]; return both caches [B, Hkv, max_context, D]."""
        used, (keys, values) = layout.max_context, self.kv_cache[layer]
        capacity = keys.shape[2]
        if capacity < used:
            size = max(used, min(max(2 * capacity, 64), self.context_length))
            # Zeros, not uninitialised: masked slots are multiplied too, by 0.
            more = keys.new_zeros(*keys.shape[:2], size - capacity, keys.shape[3])
            keys, values = torch.cat((keys, more), dim=2), torch.cat((values, more), dim=2)
            self.kv_cache[layer] = (keys, values)
        row = layout.flat_index // layout.width
        keys[row, :, layout.position] = key.to(keys.dtype)
        values[row, :, layout.position] = value.to(values.dtype)
        return keys[:, :, :used], values[:, :, :used]
