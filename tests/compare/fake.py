"""A runner whose logits are a table: what comes next depends on the last token and the state."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ringexport.runtime.runner import RunnerSpec
from ringexport.runtime.state import StateLayout, StateSnapshot

Array = npt.NDArray[Any]


class FakeState:
    """Counts tokens and adds them up."""

    def __init__(self, batch: int) -> None:
        self.position = np.zeros(batch, dtype=np.int64)
        self.total = np.zeros(batch, dtype=np.int64)

    def snapshot(self) -> StateSnapshot:
        tensors = {"recurrent_state.0": self.total[:, None].astype(np.float32)}
        return StateSnapshot(position=self.position.copy(), tensors=tensors)


class FakeRunner:
    """Knows `ProbeRunner` well enough for the comparisons.

    Args:
        table: [vocab, vocab] logits after each token.
        context_length: tokens that a row can hold.
        shift: added to everything that `probe` shows of the layers, by name.
    """

    def __init__(
        self,
        table: Array,
        *,
        context_length: int = 64,
        shift: Mapping[str, float] | None = None,
    ) -> None:
        self.table = table.astype(np.float32)
        self.shift = dict(shift or {})
        self.fed: list[list[int]] = []
        self.model_digest = "0" * 64
        self.spec = RunnerSpec(
            name="fake",
            vocab_size=len(table),
            context_length=context_length,
            layout=StateLayout(recurrent={}, kv_cache={}),
        )

    def new_state(self, batch: int) -> Any:
        self.fed.append([])
        return FakeState(batch)

    def load_state(self, path: Path) -> Any:
        raise NotImplementedError

    def prefill(
        self,
        tokens: npt.ArrayLike,
        lengths: npt.ArrayLike | None,
        state: Any,
        *,
        every_position: bool = False,
    ) -> Array:
        assert lengths is None
        ids = np.asarray(tokens)
        self.fed[-1] += ids[0].tolist()
        state.position += ids.shape[1]
        state.total += ids.sum(axis=1)
        assert state.position.max() <= self.spec.context_length
        logits = self.table[ids]
        return cast("Array", logits if every_position else logits[:, -1])

    def decode(self, tokens: npt.ArrayLike, state: Any) -> Array:
        return self.prefill(np.asarray(tokens)[:, None], None, state)

    def probe(
        self, tokens: npt.ArrayLike, lengths: npt.ArrayLike | None, state: Any
    ) -> dict[str, Array]:
        ids = np.asarray(tokens)
        logits = self.prefill(ids, lengths, state, every_position=True)
        hidden = np.stack([ids + 1.0, ids * 0.5], axis=-1)
        probes: dict[str, Array] = {
            "hidden.0": hidden,
            "expert_ids.0": np.stack([ids % 4, ids % 3 + 4], axis=-1),
            "hidden.final": hidden * 2,
            "logits": logits,
        }
        for name, shift in self.shift.items():
            probes[name] = probes[name] + np.asarray(shift).astype(probes[name].dtype)
        return probes

    def close(self) -> None:
        """Nothing to give back."""
