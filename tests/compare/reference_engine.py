"""A stand-in for the fast engine on the CPU: the reference in bf16 behind its interface."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ringexport.compare.gpu.reference import PackedReference
from ringexport.model.state import ReferenceState
from ringexport.runtime.backends.cuda.runner import CudaOptions, CudaRunner
from ringexport.runtime.backends.cuda.state import MemoryPlan, StatePool
from ringexport.runtime.backends.cuda.weights import DeviceWeights
from ringexport.runtime.runner import BaseRunner, RunnerSpec
from ringexport.runtime.state import BaseState, StateLayout

__all__ = ["ReferenceEngine"]


class EngineState(BaseState):
    """A state of the reference, and the slots of the pool that its recurrent part is copied to."""

    def __init__(self, owner: "ReferenceEngine", inner: ReferenceState, slots: list[int]) -> None:
        layout = owner.spec.layout
        context_length = owner.spec.context_length
        super().__init__(owner, layout, inner.batch, context_length=context_length)
        self.inner, self.slots = inner, slots

    nbytes = model_digest = property(lambda _: None)  # type: ignore[assignment]

    def _not_used(self, *_: Any) -> Any:
        raise NotImplementedError

    _read_rows = _write_rows = _copy_rows = _fork = _clear_rows = _not_used


class ReferenceEngine(CudaRunner):
    """What the measurements of the fast engine use of it, without a GPU.

    Attributes:
        wrong: factor on the logits, to see that errors are found.
    """

    wrong = 1.0

    def __init__(
        self,
        weights: DeviceWeights,
        library: Any,
        *,
        model_digest: Any,
        options: CudaOptions | None = None,
    ) -> None:
        del library
        options, config = options or CudaOptions(), weights.config
        capacity = options.max_context or config.context_length
        spec = RunnerSpec(
            name="cuda",
            vocab_size=config.vocab_size,
            context_length=capacity,
            layout=StateLayout(recurrent={}, kv_cache={}),
            max_batch=options.max_batch,
        )
        BaseRunner.__init__(self, spec, model_digest)
        device = torch.device("cpu")
        self.pool = StatePool(config, device, slots=options.max_batch, capacity=capacity)
        self.plan = MemoryPlan(
            weights=1, recurrent_state=1, kv_cache=1, workspace=1, slots=1, capacity=capacity
        )
        self.network: Any = SimpleNamespace(expert_ids={})
        self._model = PackedReference(weights).in_dtype(torch.bfloat16)
        self._replayed = 0
        position = torch.zeros(options.max_batch, dtype=torch.int32)
        graph = SimpleNamespace(replay=self._replay)
        self._step = SimpleNamespace(
            expert_ids={}, position=position, graph=graph, launches=3, tokens=position
        )
        self.graphs: Any = SimpleNamespace(step=lambda *_: self._step)

    def replay(self, tokens: Any, state: Any, rows: Sequence[int], *, steps: int) -> Any:
        if not steps:
            return tokens
        logits = self.decode(tokens, state)
        for _ in range(steps - 1):
            self._replay()
        state.position[list(rows)] += steps - 1
        return logits.argmax(-1)

    def _replay(self) -> None:
        self._replayed += 1

    def _new_state(self, batch: int) -> Any:
        return EngineState(self, self._model.new_state(batch), list(range(batch)))

    def _prefill_chunk(self, tokens: Any, lengths: Any, state: Any, every_position: bool) -> Any:
        logits = self._forward(tokens, lengths, state, every_position=every_position)
        self.network.expert_ids = dict(self._step.expert_ids)
        return logits

    def _decode(self, tokens: Any, state: Any) -> Any:
        return self._forward(tokens[:, None], None, state)

    def _forward(self, tokens: Any, lengths: Any, state: Any, **options: Any) -> Any:
        counts = None if lengths is None else torch.from_numpy(np.asarray(lengths))
        inner: ReferenceState = state.inner
        logits = self._model.forward(torch.from_numpy(tokens.copy()), counts, inner, **options)
        for layer, values in inner.recurrent_state.items():
            self.pool.recurrent_state[layer][state.slots] = values
        state.position[:] = inner.position.numpy()
        chosen = self._model.own_choices
        self._step.expert_ids = {layer: ids.to(torch.int32) for layer, ids in chosen.items()}
        return logits.float().numpy() * np.float32(self.wrong)

    def _close(self) -> None:
        pass
