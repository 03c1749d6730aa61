"""Which GPU is in this machine, asked of the driver; no CUDA package is needed for that."""

import ctypes

__all__ = ["device_architecture"]

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


def device_architecture(index: int = 0) -> int | None:
    """Return the compute capability of a GPU times ten, such as 89; None without GPU or driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, value = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index):
        return None
    numbers = []
    for attribute in (_MAJOR, _MINOR):
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        numbers.append(value.value)
    return 10 * numbers[0] + numbers[1]
