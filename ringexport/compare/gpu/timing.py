"""Time spans of the GPU's own clock."""

from types import TracebackType
from typing import Any, Self

import torch

__all__ = ["GpuTimer"]


class GpuTimer:
    """Measures what is launched inside a `with` block on the current stream.

    Attributes:
        seconds: after the block, from the start of its first kernel to the end of its last.
    """

    def __init__(self) -> None:
        event: Any = torch.cuda.Event
        self._begin, self._end = event(enable_timing=True), event(enable_timing=True)
        self.seconds = 0.0

    def __enter__(self) -> Self:
        self._begin.record()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.record()
        self._end.synchronize()
        self.seconds = float(self._begin.elapsed_time(self._end)) / 1e3
