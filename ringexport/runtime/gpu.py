"""Whether this machine has an NVIDIA GPU, asked of the driver: no CUDA package is needed."""

import ctypes

__all__ = ["has_gpu"]


def has_gpu() -> bool:
    """Tell whether there is a driver and a GPU that it can use."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return False
    return count.value > 0
