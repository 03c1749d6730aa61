"""Small copies between host and GPU that do not wait for what the GPU is doing."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["sent", "uploaded"]


def uploaded(values: npt.ArrayLike, device: torch.device, dtype: type[Any] = np.int64) -> Tensor:
    """Return values as an array of a type on a device.

    A copy from ordinary memory would wait for the device; one from pinned memory does not, and
    torch keeps that memory until the copy is done.
    """
    host = torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))
    if device.type != "cuda":
        return host.clone()
    return host.pin_memory().to(device, non_blocking=True)


def sent(values: Tensor) -> Tensor:
    """Start to copy a tensor to pinned memory of the host; an event tells when it has arrived."""
    target = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return target.copy_(values, non_blocking=True)
