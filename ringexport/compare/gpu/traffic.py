"""What a decode step has to move, how fast this GPU reads, and how many experts it should hit."""

import statistics

import torch

from ringexport.checkpoint import RingConfig
from ringexport.compare.gpu.timing import GpuTimer
from ringexport.packing.layout import matrices
from ringexport.runtime.backends.cuda.state import StatePool
from ringexport.runtime.backends.cuda.weights import DeviceWeights

__all__ = ["expected_experts", "measure_read_rate", "moved_bytes"]

_READ_BYTES = 2 << 30
_RUNS = 15


def moved_bytes(
    weights: DeviceWeights,
    *,
    batch: int,
    context: int,
    experts_hit: float,
    cache_dtype: torch.dtype,
) -> float:
    """Return the bytes that a decode step has to move: weights once, caches read, states both ways.

    Args:
        weights: of the engine.
        batch: rows.
        context: tokens that each row holds.
        experts_hit: distinct experts chosen in a layer, on average.
        cache_dtype: of the KV cache.
    """
    config, total = weights.config, 0.0
    for matrix in matrices(config):
        nbytes = weights.matrix(matrix.name).nbytes
        total += nbytes * experts_hit / matrix.experts if matrix.experts > 1 else nbytes
    total += sum(weights[f"layers.{layer}.router"].nbytes for layer in config.moe_layers)
    state, cache = StatePool.bytes_per_slot(config, context, cache_dtype)
    return total + batch * (2 * state + cache)


def expected_experts(config: RingConfig, batch: int) -> float:
    """Return the distinct experts that `batch` tokens hit in a layer if routing is uniform."""
    missed = 1 - config.num_experts_per_tok / config.num_experts
    return float(config.num_experts * (1 - missed**batch))


def measure_read_rate(device: torch.device) -> float:
    """Return bytes a second of a read without writes: the maximum of 2 GiB, median of runs."""
    values = torch.empty(_READ_BYTES // 4, device=device).normal_()
    found = torch.empty((), device=device)
    seconds = []
    for _ in range(_RUNS + 1):
        with GpuTimer() as timer:
            torch.amax(values, dim=0, out=found)
        seconds.append(timer.seconds)
    return _READ_BYTES / statistics.median(seconds[1:])
