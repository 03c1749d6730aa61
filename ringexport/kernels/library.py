"""Load the kernel library and call its ops; field names are those of plugins/include/ringkernels.

The library describes its own parameter structs, so nothing here repeats a header.
"""

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from ringexport.errors import BackendUnavailableError, ShapeError
from ringexport.files import is_truncated_library

__all__ = ["DEFAULT_LIBRARY", "DType", "KernelCall", "KernelLibrary", "Prologue", "ScaleKind"]

OPS = {
    "attention_decode": "AttentionDecodeParams",
    "attention_prefill": "AttentionPrefillParams",
    "experts": "ExpertsParams",
    "group_norm_gate": "GroupNormGateParams",
    "linear_attention_decode": "LinearAttentionDecodeParams",
    "linear_attention_prefill": "LinearAttentionPrefillParams",
    "projection": "ProjectionParams",
    "qk_norm_rotary": "QkNormRotaryParams",
    "quantize": "QuantizeParams",
    "rms_norm": "RmsNormParams",
    "router": "RouterParams",
    "sample": "SampleParams",
    "embed": "EmbedParams",
}
BUILD_HINT = "build it with: make plugins, in a clone of the repository"
DEFAULT_LIBRARY = Path("build") / "plugins" / "libringkernels.so"
"""Where `BUILD_HINT` puts the library, seen from the repository."""

_SCALARS: dict[str, type[Any]] = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "DType": ctypes.c_int32,
    "ScaleKind": ctypes.c_int32,
    "Prologue": ctypes.c_int32,
}
_MESSAGE_BYTES = 256


class DType:
    """Number formats of ringkernels/types.h."""

    FLOAT32, FLOAT16, BFLOAT16, FP8_E4M3, INT8 = range(5)


class ScaleKind:
    """Which elements share a scale, as in ringkernels/types.h."""

    NONE, TENSOR, CHANNEL, BLOCK128 = range(4)


class Prologue:
    """What a projection computes of its input first, as in ringkernels/projection.h."""

    NONE, RMS_NORM, GROUP_NORM_GATE = range(3)


class KernelCall:
    """One op with its parameters, ready to launch, which checks them; launch it as often as needed.

    Attributes:
        op: name of the op.
    """

    def __init__(self, library: "KernelLibrary", op: str, fields: dict[str, Any]) -> None:
        self.op = op
        self._kept = fields  # tensors stay alive as long as the call
        self._params = library.pack(op, fields)
        self._address = ctypes.byref(self._params)
        self._launch = library.function(op, "launch")

    def launch(self, stream: int = 0) -> None:
        """Start the kernel on a CUDA stream (its handle as an integer).

        Raises:
            ShapeError: a parameter that the kernel refuses; it names the field.
        """
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        if self._launch(self._address, ctypes.c_void_p(stream), message, _MESSAGE_BYTES):
            raise ShapeError(f"{self.op}: {message.value.decode()}")


class KernelLibrary:
    """The loaded library; open one per process and pass it on."""

    def __init__(self, handle: ctypes.CDLL, structs: dict[str, type[ctypes.Structure]]) -> None:
        self._handle = handle
        self._structs = structs

    @classmethod
    def open(cls, path: Path) -> Self:
        """Load a library that `BUILD_HINT` built.

        Raises:
            BackendUnavailableError: it is missing or cannot be loaded, or is of another version.
        """
        try:
            if path.is_file() and is_truncated_library(path):
                raise BackendUnavailableError(
                    f"the kernel library {path} is truncated",
                    hint=f"copy it again, or {BUILD_HINT}",
                )
            handle = ctypes.CDLL(str(path.absolute()))  # a bare name is sought elsewhere
            describe = handle.ring_layout
        except (OSError, AttributeError) as error:
            raise BackendUnavailableError(
                f"the kernel library {path} cannot be loaded: {error}", hint=BUILD_HINT
            ) from error
        describe.restype = ctypes.c_char_p
        layout = json.loads(describe())
        structs = {name: _structure(name, fields) for name, fields in layout.items()}
        library = cls(handle, structs)
        for op, name in OPS.items():
            try:
                size = int(library.function(op, "params_bytes")())
            except AttributeError as error:
                raise BackendUnavailableError(
                    f"the kernel library {path} is of another version: it has no op {op}",
                    hint=BUILD_HINT,
                ) from error
            if name not in structs or ctypes.sizeof(structs[name]) != size:
                raise BackendUnavailableError(
                    f"the kernel library {path} lays out {name} in {size} bytes, which this "
                    "version of ringexport does not understand",
                    hint=BUILD_HINT,
                )
        return library

    def function(self, op: str, verb: str) -> Callable[..., Any]:
        """Return ring_<op>_<verb> with its return type set."""
        found = getattr(self._handle, f"ring_{op}_{verb}")
        found.restype = ctypes.c_size_t if verb.endswith("_bytes") else ctypes.c_int
        return found  # type: ignore[no-any-return]

    def pack(self, op: str, fields: dict[str, Any]) -> ctypes.Structure:
        """Fill the op's Params; what is not given is zero or null.

        Args:
            op: name of the op.
            fields: numbers, or tensors (anything with `data_ptr()`) and addresses for pointers.

        Raises:
            ShapeError: a field that the op does not have, or a value that does not fit it.
        """
        struct = self._structs[OPS[op]]
        params = struct()
        for name, value in fields.items():
            if not hasattr(struct, name):
                names = ", ".join(field[0] for field in struct._fields_)
                raise ShapeError(f"{op} has no parameter {name!r}", hint=names)
            number = value.data_ptr() if hasattr(value, "data_ptr") else value
            try:
                setattr(params, name, number)
            except TypeError as error:
                raise ShapeError(f"{op}: {name} cannot be {value!r:.60}") from error
        return params

    def call(self, op: str, **fields: Any) -> KernelCall:
        """Check parameters and return a call that can be launched; see `pack` for `fields`.

        Raises:
            ShapeError: a parameter that the op refuses; the message names the field.
        """
        call = KernelCall(self, op, fields)
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        if self.function(op, "validate")(call._address, message, _MESSAGE_BYTES):  # noqa: SLF001
            raise ShapeError(f"{op}: {message.value.decode()}")
        return call

    def workspace_bytes(self, op: str, **fields: Any) -> int:
        """Return how large `workspace` must be for these sizes; pointers may be missing."""
        params = self.pack(op, fields)
        return int(self.function(op, "workspace_bytes")(ctypes.byref(params)))


def _structure(name: str, fields: list[list[str]]) -> type[ctypes.Structure]:
    kinds = [(field, ctypes.c_void_p if "*" in kind else _SCALARS[kind]) for field, kind in fields]
    return type(name, (ctypes.Structure,), {"_fields_": kinds})
