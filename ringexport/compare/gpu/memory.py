"""What the engine takes of the GPU's memory, planned and measured."""

from dataclasses import asdict, dataclass

import torch

from ringexport.runtime.backends.cuda.state import MemoryPlan

__all__ = ["EngineMemory", "used_bytes"]


def used_bytes(device: torch.device) -> int:
    """Return the bytes of the GPU that are taken by anybody."""
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMemory:
    """Planned and measured bytes.

    Attributes:
        plan: what the engine said that it would take.
        measured: what it took: memory used after prompts and steps, less what was used before.
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
