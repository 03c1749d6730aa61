"""The decode state of TensorRT targets: arrays in GPU memory, and the decode step bound to them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ringexport.runtime.backends.trt_memory import DeviceArray, DeviceGraph, DeviceRuntime
from ringexport.runtime.runner import RunnerSpec
from ringexport.runtime.state import BaseState, StateSnapshot

__all__ = ["DecodeCall", "StateOwner", "TrtState", "grown_capacity"]

Array = npt.NDArray[Any]

FIRST_CAPACITY = 256
"""Tokens that the KV cache of a new state can hold before it grows by doubling."""


class StateOwner(Protocol):
    """What a state needs of the runner that made it.

    Attributes:
        cuda: memory and stream.
        dtypes: of the state arrays, by the name of the input.
    """

    cuda: DeviceRuntime
    dtypes: dict[str, np.dtype[Any]]

    @property
    def spec(self) -> RunnerSpec:
        """Sizes of the state."""

    @property
    def model_digest(self) -> str:
        """Names weights and decay."""

    def array(self, *shape: int, dtype: npt.DTypeLike) -> DeviceArray:
        """Return a zeroed array in GPU memory."""


@dataclass(slots=True, weakref_slot=True, eq=False)
class DecodeCall:
    """A decode step of one state.

    Attributes:
        inputs, logits: fixed buffers.
        graph: the recorded step, None while there is none.
    """

    inputs: dict[str, DeviceArray]
    logits: DeviceArray
    graph: DeviceGraph | None = None


class TrtState(BaseState):
    """State arrays in GPU memory.

    Attributes:
        arrays: graph input name -> array, [B, H, K, V] or [B, Hkv, S, D].
        capacity: S.
        decode_call: what a decode step binds; dropped when the cache moves.
    """

    def __init__(self, owner: StateOwner, batch: int) -> None:
        spec = owner.spec
        super().__init__(owner, spec.layout, batch, context_length=spec.context_length)
        self._owner = owner
        self.capacity = grown_capacity(0, spec.context_length)
        self.arrays: dict[str, DeviceArray] = {}
        for layer, sizes in spec.layout.recurrent.items():
            self.arrays[f"past_state.{layer}"] = owner.array(batch, *sizes, dtype=np.float32)
        for name in self._caches():
            self.arrays[name] = self._cache(name, self.capacity)
        self.decode_call: DecodeCall | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, including room for tokens to come."""
        return self.position.nbytes + sum(array.nbytes for array in self.arrays.values())

    @property
    def model_digest(self) -> str:
        """See `BaseState.model_digest`."""
        return self._owner.model_digest

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` per row in the KV cache, doubling it as often as needed."""
        if tokens <= self.capacity:
            return
        capacity = grown_capacity(tokens, self.context_length)
        self.decode_call = None
        used = int(self.position.max())
        for name in self._caches():
            larger, old = self._cache(name, capacity), self.arrays[name]
            _copy_tokens(self._owner.cuda, larger, old, (slice(None), slice(None)), used)
            self.arrays[name] = larger
        self.capacity = capacity

    def _caches(self) -> Iterator[str]:
        for layer in self.layout.kv_cache:
            yield from (f"past_key.{layer}", f"past_value.{layer}")

    def _cache(self, name: str, capacity: int) -> DeviceArray:
        heads, size = self.layout.kv_cache[int(name.partition(".")[2])]
        dtype = self._owner.dtypes[name]
        return self._owner.array(self.batch, heads, capacity, size, dtype=dtype)

    def _read_rows(self, rows: list[int], tokens: slice) -> dict[str, Array]:
        found = {}
        for name, array in self.arrays.items():
            kind, _, layer = name.partition(".")
            values = np.concatenate(
                [array.read(row=row, shape=(1, *array.shape[1:])) for row in rows]
            )
            if kind == "past_state":
                found[f"recurrent_state.{layer}"] = values
            else:
                part = kind.removeprefix("past_")
                found[f"kv_cache.{layer}.{part}"] = values[:, :, tokens].astype(np.float32)
        return found

    def _write_rows(self, rows: list[int], snapshot: StateSnapshot) -> None:
        used = int(snapshot.position.max(initial=0))
        self.reserve(used)
        for name, array in self.arrays.items():
            kind, _, layer = name.partition(".")
            for index, row in enumerate(rows):
                if kind == "past_state":
                    array.write(snapshot.tensors[f"recurrent_state.{layer}"][index], row=row)
                    continue
                given = snapshot.tensors[f"kv_cache.{layer}.{kind.removeprefix('past_')}"][index]
                whole = array.read(row=row, shape=array.shape[1:])
                whole[:, :used] = given.astype(array.dtype)
                array.write(whole, row=row)

    def _fork(self, rows: list[int]) -> "TrtState":
        other = TrtState(self._owner, len(rows))
        other.reserve(int(self.position[rows].max()))
        cuda = self._owner.cuda
        for name, array in self.arrays.items():
            target = other.arrays[name]
            for index, row in enumerate(rows):
                if name.startswith("past_state."):
                    block = array.row_bytes
                    places = (
                        (target.address + index * block, block),
                        (array.address + row * block, block),
                    )
                    cuda.copy_blocks(*places, block, 1)
                else:
                    used = int(self.position[row])
                    _copy_tokens(
                        cuda, target, array, (slice(index, index + 1), slice(row, row + 1)), used
                    )
        other.position[:] = self.position[rows]
        return other


def grown_capacity(tokens: int, context_length: int) -> int:
    """Return the capacity of a cache that has grown by doubling until it holds `tokens`."""
    capacity = FIRST_CAPACITY
    while capacity < tokens:
        capacity *= 2
    return min(capacity, context_length)


def _copy_tokens(
    cuda: DeviceRuntime,
    target: DeviceArray,
    source: DeviceArray,
    rows: tuple[slice, slice],
    tokens: int,
) -> None:
    """Copy the first tokens of rows [B, Hkv, S, D] between caches of different capacity."""
    _, heads, _, size = source.shape
    wide = [array.shape[2] * size * array.dtype.itemsize for array in (target, source)]
    first = [part.start or 0 for part in rows]
    count = (rows[1].stop or source.shape[0]) - first[1]
    cuda.copy_blocks(
        (target.address + first[0] * target.row_bytes, wide[0]),
        (source.address + first[1] * source.row_bytes, wide[1]),
        tokens * size * source.dtype.itemsize,
        heads * count,
    )
