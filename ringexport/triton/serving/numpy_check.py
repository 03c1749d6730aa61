"""Tell whether this Triton server and this numpy understand each other, before a request comes.

A Python backend that was built for numpy 1 reads wrong item sizes from arrays of numpy 2: texts end
the process, and arrays of several numbers hold the first one everywhere.
"""

import ctypes
from typing import Any

import numpy as np

from ringexport.errors import BackendUnavailableError

__all__ = ["check_numpy"]

Api = Any  # triton_python_backend_utils, which exists only inside of Triton

_CPU = 1
_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    """DLManagedTensor of DLPack 0.8."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("type_code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", _DELETER),
    )


class _Probe:
    """Four numbers that DLPack hands over without numpy; must outlive whoever takes them."""

    def __init__(self) -> None:
        self.values = (ctypes.c_int64 * 4)(1, 2, 3, 4)
        self._shape = (ctypes.c_int64 * 1)(4)
        self._managed = _Managed(
            data=ctypes.cast(self.values, ctypes.c_void_p),
            device=(ctypes.c_int32 * 2)(_CPU, 0),
            ndim=1,
            bits=64,
            lanes=1,
            shape=ctypes.cast(self._shape, ctypes.POINTER(ctypes.c_int64)),
            deleter=_DELETER(lambda _: None),
        )

    def __dlpack__(self, **_: object) -> object:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self._managed), b"dltensor", None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_CPU, 0)


_PROBE = _Probe()


def check_numpy(api: Api) -> None:
    """Check that an array comes out of Triton as it went in.

    Args:
        api: the module triton_python_backend_utils.

    Raises:
        BackendUnavailableError: it does not.
    """
    back = np.asarray(api.Tensor.from_dlpack("probe", _PROBE).as_numpy())
    if back.tolist() != list(_PROBE.values):
        raise BackendUnavailableError(
            f"the Python backend of this Triton server cannot use numpy {np.__version__}:"
            " it was built for numpy 1",
            hint="use a newer tritonserver, or install numpy 1.26 in the Python of this one",
        )
