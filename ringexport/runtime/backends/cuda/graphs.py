"""Decode steps captured once per batch bucket and replayed as one CUDA graph each.

A graph serves every context: attention splits its work by the tokens that a row really has, so
that one for 131,072 tokens takes 1 us longer than one for 4,096 (one H200, batch 1).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ringexport.runtime.backends.cuda.network import Network, PackedRows

__all__ = ["BATCH_BUCKETS", "DecodeGraphs", "DecodeStep", "bucket_of"]

BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def bucket_of(size: int, buckets: tuple[int, ...]) -> int:
    """Return the smallest bucket that holds `size`, or `size` itself beyond the last."""
    return next((bucket for bucket in buckets if bucket >= size), size)


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """A captured step and its fixed buffers, for up to as many rows as they have.

    A replay reads `tokens`, `slots` and `position`; writes `logits`; and leaves the greedy choice
    in `tokens` and the next position in `position`, so that replays can follow each other without
    the host. Rows with a slot below 0 are padding.

    Attributes:
        tokens: [B] int64.
        slots: [B] int32.
        position: [B] int32.
        logits: [B, vocab] fp32.
        graph: what to replay.
        launches: kernels of plugins/ in the graph.
        expert_ids: MoE layer -> [B, top_k] int32 chosen in the last replay.
    """

    tokens: Tensor
    slots: Tensor
    position: Tensor
    logits: Tensor
    graph: torch.cuda.CUDAGraph
    launches: int
    expert_ids: dict[int, Tensor]


class DecodeGraphs:
    """Captures steps when they are first needed, or ahead.

    Args:
        network: launches kernels.
        device: of everything.
        capacity: tokens that a row can hold.
        count_launches: tells how many kernels were launched so far.
    """

    def __init__(
        self,
        network: Network,
        device: torch.device,
        capacity: int,
        count_launches: Callable[[], int],
    ) -> None:
        self._network = network
        self._device = device
        self._capacity = capacity
        self._count = count_launches
        self._steps: dict[int, DecodeStep] = {}
        self._pool: Any = None

    def step(self, rows: int) -> DecodeStep:
        """Return the step for `rows` rows."""
        batch = bucket_of(rows, BATCH_BUCKETS)
        if batch not in self._steps:
            self._steps[batch] = self._capture(batch)
        return self._steps[batch]

    def capture_all(self, rows: int) -> None:
        """Capture the steps for up to `rows` rows, the largest first: workspaces do not grow."""
        most = bucket_of(min(rows, BATCH_BUCKETS[-1]), BATCH_BUCKETS)
        for batch in reversed(BATCH_BUCKETS):
            if batch <= most:
                self.step(batch)

    def _capture(self, batch: int) -> DecodeStep:
        device = self._device
        tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        slots = torch.full((batch,), -1, dtype=torch.int32, device=device)
        position = torch.zeros(batch, dtype=torch.int32, device=device)
        logits = torch.empty((batch, self._network.config.vocab_size), device=device)
        rows = PackedRows(slots=slots, position=position, max_context=self._capacity)

        def run() -> None:
            residual = self._network.embed(tokens)
            self._network.run(residual, rows)
            self._network.logits(residual, logits)
            self._network.choose(logits, tokens, next_position=position)

        # Once outside the graph, on padding only: loads kernels and makes the workspaces.
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            run()
            stream.synchronize()
            before = self._count()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                run()
        self._pool = graph.pool()
        expert_ids = dict(self._network.expert_ids)
        launches = self._count() - before
        return DecodeStep(tokens, slots, position, logits, graph, launches, expert_ids)
