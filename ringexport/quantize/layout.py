"""Decide before anything is written which tensor of the output lies where: all bytes are known."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from ringexport.checkpoint import CheckpointWeights
from ringexport.ops.schemes import ModuleScheme, WeightScheme
from ringexport.quantize.compressed_tensors import is_packed
from ringexport.quantize.resolve import ResolvedRecipe

__all__ = ["OutputShard", "OutputTensor", "OutputUnit", "plan_shards", "shard_header"]

Dtype = np.dtype[Any]
_F32 = np.dtype(np.float32)
_I32 = np.dtype(np.int32)
_I64 = np.dtype(np.int64)
_CODES: Mapping[Dtype, str] = {
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float16): "F16",
    _F32: "F32",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(np.int8): "I8",
    np.dtype(np.int32): "I32",
    np.dtype(np.int64): "I64",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputTensor:
    """One tensor of the output.

    Attributes:
        name, dtype, shape: as written.
    """

    name: str
    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Stored size."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputUnit:
    """What one tensor of the source becomes; units are never split over files.

    Attributes:
        source: name of the tensor in the source.
        module: its name without ".weight".
        shape: of the source.
        scheme: None where the tensor is copied.
        packed: whether codes are written four to an int32, and the shape after the scale.
        tensors: what is written: the tensor itself, then its weight_scale, if it has one, then
            the weight_shape of a packed one.
        constants: fp32 scalars written after them, name -> value: scales from calibration.
        source_bytes: what is read.
    """

    source: str
    module: str
    shape: tuple[int, ...]
    scheme: WeightScheme | None
    packed: bool
    tensors: tuple[OutputTensor, ...]
    constants: Mapping[str, float]
    source_bytes: int

    @property
    def outputs(self) -> tuple[OutputTensor, ...]:
        """Everything that is written, in its order."""
        extra = (OutputTensor(name=name, dtype=_F32, shape=(1,)) for name in self.constants)
        return self.tensors + tuple(extra)

    @property
    def nbytes(self) -> int:
        """What is written."""
        return sum(tensor.nbytes for tensor in self.outputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputShard:
    """One safetensors file of the output."""

    name: str
    units: tuple[OutputUnit, ...]

    @property
    def outputs(self) -> tuple[OutputTensor, ...]:
        """Every tensor of the file, in its order."""
        return tuple(tensor for unit in self.units for tensor in unit.outputs)

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        data = sum(unit.nbytes for unit in self.units)
        return len(shard_header(self.outputs)) + data

    @property
    def source_bytes(self) -> int:
        """What is read to write it."""
        return sum(unit.source_bytes for unit in self.units)


def plan_shards(
    weights: CheckpointWeights,
    resolved: ResolvedRecipe,
    constants: Mapping[str, Mapping[str, float]],
    max_shard_bytes: int,
) -> tuple[OutputShard, ...]:
    """Distribute the output over files of at most `max_shard_bytes` (one tensor may be larger).

    Args:
        weights: the source.
        resolved: scheme of each module.
        constants: source tensor -> fp32 scalars that are written after it, by full name.
        max_shard_bytes: of tensor data per file.
    """
    groups: list[list[OutputUnit]] = [[]]
    size = 0
    schemes = {name: entry.scheme for name, entry in resolved.quantized.items()}
    for name in weights.names():
        unit = _unit(weights, schemes, name, constants.get(name, {}))
        if groups[-1] and size + unit.nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(unit)
        size += unit.nbytes
    if len(groups) == 1:
        return (OutputShard(name="model.safetensors", units=tuple(groups[0])),)
    return tuple(
        OutputShard(name=f"model-{number:05d}-of-{len(groups):05d}.safetensors", units=tuple(group))
        for number, group in enumerate(groups, start=1)
    )


def shard_header(tensors: Sequence[OutputTensor]) -> bytes:
    """Return the first bytes of a safetensors file, up to the data, a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _unit(
    weights: CheckpointWeights,
    schemes: Mapping[str, ModuleScheme],
    name: str,
    constants: Mapping[str, float],
) -> OutputUnit:
    info = weights.info(name)
    module = name.removesuffix(".weight")
    chosen = schemes.get(module, ModuleScheme())
    scheme, packed = chosen.weights, is_packed(chosen)
    tensors: tuple[OutputTensor, ...]
    if scheme is None:
        tensors = (OutputTensor(name=name, dtype=info.dtype, shape=info.shape),)
    else:
        shape = scheme.granularity.scale_shape(info.shape)
        values = OutputTensor(name=name, dtype=scheme.format.dtype, shape=info.shape)
        tensors = (values, OutputTensor(name=f"{module}.weight_scale", dtype=_F32, shape=shape))
        if packed:
            words = (info.shape[0], -(-info.shape[1] // 4))
            tensors = (
                OutputTensor(name=f"{module}.weight_packed", dtype=_I32, shape=words),
                tensors[1],
                OutputTensor(name=f"{module}.weight_shape", dtype=_I64, shape=(2,)),
            )
    return OutputUnit(
        source=name,
        module=module,
        shape=info.shape,
        scheme=scheme,
        packed=packed,
        tensors=tensors,
        constants=constants,
        source_bytes=info.nbytes,
    )
