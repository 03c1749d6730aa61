"""What the engine takes of the GPU's memory, planned and measured."""

from dataclasses import asdict, dataclass

import numpy as np
import torch

from ringexport.runtime.backends.cuda.runner import CudaRunner
from ringexport.runtime.backends.cuda.state import MemoryPlan

__all__ = ["EngineMemory", "forget_peak", "measure_memory", "used_bytes"]


def used_bytes(device: torch.device) -> int:
    """Return the bytes of the GPU that are taken by anybody."""
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


def forget_peak() -> None:
    """Give back what torch holds without need, and measure the most that is taken from now on."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMemory:
    """Planned and measured bytes.

    Attributes:
        plan: what the engine said that it would take.
        measured: the most that it took at a time.
    """

    plan: MemoryPlan
    measured: int

    @property
    def difference(self) -> float:
        """Measured over planned, less 1."""
        return self.measured / self.plan.total - 1

    def to_dict(self) -> dict[str, object]:
        """Return JSON values."""
        return {
            "planned_bytes": asdict(self.plan) | {"total": self.plan.total},
            "measured_bytes": self.measured,
            "difference": self.difference,
        }


def measure_memory(runner: CudaRunner, before: int) -> EngineMemory:
    """Read prompts of as many tokens as the engine computes at once, decode, and measure.

    Torch knows the most that it held since `forget_peak`; what else the process takes, such as
    code of kernels, only grows.

    Args:
        runner: all its slots are free.
        before: bytes of the GPU that were taken before its weights came.
    """
    spec, device = runner.spec, next(iter(runner.pool.recurrent_state.values())).device
    rows = runner.plan.slots
    length = min(spec.context_length - 1, -(-spec.prefill_chunk // rows))
    tokens = np.random.default_rng(0).integers(0, spec.vocab_size, (rows, length))
    state = runner.new_state(rows)
    runner.prefill(tokens, None, state)
    runner.decode(tokens[:, 0], state)
    others = used_bytes(device) - torch.cuda.memory_reserved(device) - before
    measured = others + torch.cuda.max_memory_reserved(device)
    return EngineMemory(plan=runner.plan, measured=measured)
