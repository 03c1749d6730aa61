"""Write the packed engine of a checkpoint: one safetensors file, streamed tensor by tensor."""

import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ringexport.checkpoint import CheckpointWeights, RingConfig
from ringexport.checkpoint.names import expected_tensors
from ringexport.errors import ConfigError
from ringexport.ops.decay import DecayIndex, log_decay
from ringexport.ops.quantization import Quantized
from ringexport.ops.schemes import ModuleScheme
from ringexport.packing.layout import (
    BLOCK,
    Matrix,
    MatrixFormat,
    PackedTensor,
    matrices,
    packed_tensors,
)
from ringexport.progress import NoProgress, Progress

__all__ = ["WEIGHTS_FILE", "formats_of", "write_packed"]

WEIGHTS_FILE = "weights.safetensors"

Array = npt.NDArray[np.generic]
_DTYPE_NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.int8): "I8",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
}
_BLOCK_BYTES = 1 << 24


def formats_of(config: RingConfig, schemes: dict[str, ModuleScheme]) -> dict[str, MatrixFormat]:
    """Return the format of every packed matrix.

    Args:
        config: of the model.
        schemes: of the quantized modules of the checkpoint.

    Raises:
        ConfigError: a scheme that the kernels do not run, or modules that share a matrix (or an
            expert and its layer's shared expert, which run in one kernel) in different formats.
    """
    formats = {}
    for matrix in matrices(config):
        modules = [module for unit in matrix.modules for module in unit]
        found = {
            module: MatrixFormat.of(schemes.get(module, ModuleScheme()), module)
            for module in modules
        }
        formats[matrix.name] = _only_one(found)
        if formats[matrix.name].block and not matrix.interleaved:
            _check_blocks(config, modules)
    for layer in config.moe_layers:
        names = [f"layers.{layer}.{unit}.gate_up" for unit in ("experts", "shared")]
        names += [name.replace("gate_up", "down") for name in names]
        fmt = _only_one({name: formats[name] for name in names})
        formats |= dict.fromkeys(names, fmt)
    return formats


def _check_blocks(config: RingConfig, modules: list[str]) -> None:
    """Refuse to stack modules where a block of the joint matrix would hold rows of two."""
    shapes = expected_tensors(config)
    for module in modules[:-1]:
        rows = shapes[module + ".weight"].shape[0]
        if rows % BLOCK:
            raise ConfigError(
                f"{module} has {rows} rows, which blocks of {BLOCK} do not divide",
                hint="use fp8, whose scales are per row",
            )


def _only_one(formats: dict[str, MatrixFormat]) -> MatrixFormat:
    (first, fmt), *others = formats.items()
    for name, other in others:
        if other != fmt:
            raise ConfigError(
                f"{first} and {name} are in different formats, but the cuda target runs them "
                "as one matrix",
                hint="give all experts of a layer one scheme, and query_key_value that of g_proj",
            )
    return fmt


def write_packed(
    weights: CheckpointWeights,
    directory: Path,
    *,
    decay_index: DecayIndex = DecayIndex.SERVING,
    progress: Progress | None = None,
) -> int:
    """Write `WEIGHTS_FILE` into a directory; memory stays within a few tens of megabytes.

    Args:
        weights: an open checkpoint, quantized or not.
        directory: existing.
        decay_index: form of the decay, whose table is stored.
        progress: told of the bytes that are written.

    Returns:
        Bytes of the file.

    Raises:
        ConfigError: see `formats_of`.
        CheckpointError: a weight cannot be read, or holds NaN or infinity.
        OSError: the file cannot be written.
    """
    config = weights.config
    formats = formats_of(config, dict(weights.schemes))
    tensors = packed_tensors(config, formats)
    report = progress or NoProgress()
    report.start("packing weights", sum(tensor.nbytes for tensor in tensors), "bytes")
    source = _Source(weights, formats, decay_index)
    fp8_cache = any(weights.kv_scales(layer) for layer in config.softmax_layers)
    path = directory / WEIGHTS_FILE
    with path.open("xb") as file:
        file.write(_header(tensors, fp8_cache=fp8_cache))
        for tensor in tensors:
            written = _write(file, source.chunks(tensor), report)
            if written != tensor.nbytes:
                raise AssertionError(f"{tensor.name}: {written} bytes, expected {tensor.nbytes}")
    report.finish()
    return path.stat().st_size


def _header(tensors: Iterable[PackedTensor], *, fp8_cache: bool) -> bytes:
    about = {"format": "ringexport-packed", "kv_cache": "fp8_e4m3" if fp8_cache else "bf16"}
    entries: dict[str, object] = {"__metadata__": about}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (offset, offset + tensor.nbytes),
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write(file: BinaryIO, chunks: Iterator[Array], report: Progress) -> int:
    total = 0
    for chunk in chunks:
        data = np.ascontiguousarray(chunk).view(np.uint8).reshape(-1)
        file.write(data.data)
        report.advance(data.nbytes)
        total += data.nbytes
    return total


class _Source:
    """Produces the values of packed tensors from a checkpoint."""

    def __init__(
        self,
        weights: CheckpointWeights,
        formats: dict[str, MatrixFormat],
        decay_index: DecayIndex,
    ) -> None:
        self._weights = weights
        self._formats = formats
        self._decay_index = decay_index
        self._matrices = {matrix.name: matrix for matrix in matrices(weights.config)}

    def chunks(self, tensor: PackedTensor) -> Iterator[Array]:
        """Yield C-ordered pieces that follow each other."""
        name = tensor.name
        if name == "embedding":
            yield from self._plain(("model.word_embeddings",))
        elif name in self._matrices:
            yield from self._matrix(self._matrices[name])
        elif name.endswith(".scale"):
            yield from self._scales(self._matrices[name.removesuffix(".scale")])
        else:
            yield self._vector(name).astype(np.float32).reshape(tensor.shape)

    def _matrix(self, matrix: Matrix) -> Iterator[Array]:
        plain = self._formats[matrix.name].number_format is None
        for unit in matrix.modules:
            if not matrix.interleaved:
                yield from self._plain(unit) if plain else self._codes(unit)
                continue
            pieces = self._plain(unit) if plain else self._codes(unit)
            gate, up = (np.concatenate(list(part)) for part in _halves(pieces, matrix))
            yield np.stack((gate, up), axis=1).reshape(-1, matrix.shape[1])

    def _plain(self, modules: tuple[str, ...]) -> Iterator[Array]:
        """Yield the rows of unquantized modules in bf16."""
        for module in modules:
            name = module + ".weight"
            self._weights.check_finite([name])
            rows, columns = self._weights.info(name).shape
            step = max(1, _BLOCK_BYTES // (columns * 4))
            for start in range(0, rows, step):
                block = self._weights.read_rows(name, start, min(start + step, rows))
                yield block.astype(ml_dtypes.bfloat16, copy=False)
            self._weights.release(name)

    def _codes(self, modules: tuple[str, ...]) -> Iterator[Array]:
        for module in modules:
            yield self._weights.codes(module + ".weight")
            self._weights.release(module + ".weight")

    def _scales(self, matrix: Matrix) -> Iterator[Array]:
        block = self._formats[matrix.name].block
        for unit in matrix.modules:
            scales = [self._scale(module) for module in unit]
            if matrix.interleaved and not block:
                yield np.stack([scale.reshape(-1) for scale in scales], axis=1)
            else:
                yield from scales

    def _scale(self, module: str) -> npt.NDArray[np.float32]:
        quantized: Quantized = self._weights.quantized(module + ".weight")
        return quantized.weight_scale

    def _vector(self, name: str) -> npt.NDArray[np.float32]:
        config, weights = self._weights.config, self._weights
        if name == "final_norm":
            return weights.read_f32("model.norm.weight")
        _, number, rest = name.split(".", 2)
        layer = int(number)
        prefix = f"model.layers.{layer}."
        if rest == "attention.log_decay":
            heads, layers = config.num_attention_heads, config.num_hidden_layers
            return log_decay(heads, layer, layers, self._decay_index)
        if rest == "attention.kv_scale":
            return np.array(weights.kv_scales(layer) or (1.0, 1.0), np.float32)
        if rest == "router_bias" and not config.expert_bias:
            return np.zeros(config.num_experts, np.float32)
        return weights.read_f32(prefix + _VECTORS[rest])


_VECTORS = {
    "input_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "attention.query_norm": "attention.query_layernorm.weight",
    "attention.key_norm": "attention.key_layernorm.weight",
    "attention.output_norm": "attention.g_norm.weight",
    "router": "mlp.gate.weight",
    "router_bias": "mlp.gate.expert_bias",
}


def _halves(pieces: Iterator[Array], matrix: Matrix) -> tuple[list[Array], list[Array]]:
    """Split the blocks of rows of gate and up, which follow each other, at the middle."""
    parts: tuple[list[Array], list[Array]] = ([], [])
    rows = 0
    for piece in pieces:
        parts[rows >= matrix.shape[0] // 2].append(piece)
        rows += len(piece)
    return parts
