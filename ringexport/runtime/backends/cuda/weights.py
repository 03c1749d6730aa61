"""The packed weights of an engine on the GPU: read from a file by several threads at once."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ringexport.checkpoint import RingConfig
from ringexport.errors import BundleError
from ringexport.kernels.library import DType, ScaleKind
from ringexport.ops.quantization import NumberFormat
from ringexport.packing.layout import MatrixFormat, matrices, packed_tensors
from ringexport.progress import NoProgress, Progress

__all__ = ["DeviceMatrix", "DeviceWeights", "load_weights"]

_READERS = 8
_NUMBER_FORMATS = {torch.float8_e4m3fn: NumberFormat.FP8_E4M3, torch.int8: NumberFormat.INT8}


@dataclass(frozen=True, slots=True)
class DeviceMatrix:
    """A packed matrix: values [(E,) N, K], its scales, and how it is multiplied."""

    values: Tensor
    scale: Tensor | None
    format: MatrixFormat

    @property
    def dtype(self) -> int:
        """The kernels' number for the dtype of the values."""
        fmt = self.format.number_format
        if fmt is None:
            return DType.BFLOAT16
        return DType.FP8_E4M3 if fmt is NumberFormat.FP8_E4M3 else DType.INT8

    @property
    def scale_kind(self) -> int:
        """The kernels' number for the granularity of the scales."""
        if self.format.number_format is None:
            return ScaleKind.NONE
        return ScaleKind.BLOCK128 if self.format.block else ScaleKind.CHANNEL

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)


class DeviceWeights:
    """Every tensor of a packed engine by name.

    Args:
        config: of the model.
        tensors: name -> tensor on the GPU, as `packed_tensors` lists them.
        source: what to call them in messages.
        fp8_cache: the KV cache is meant to be FP8-E4M3, with the scales that are stored.

    Raises:
        BundleError: a tensor is missing, unknown, or has another shape or dtype.
    """

    def __init__(
        self,
        config: RingConfig,
        tensors: Mapping[str, Tensor],
        *,
        source: str,
        fp8_cache: bool = False,
    ) -> None:
        self.config = config
        self.fp8_cache = fp8_cache
        self._tensors = dict(tensors)
        self._formats = {
            matrix.name: _format(self._tensors, matrix.name, stacked=matrix.experts > 0)
            for matrix in matrices(config)
        }
        self._check(source)

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor by its packed name."""
        return self._tensors[name]

    def matrix(self, name: str) -> DeviceMatrix:
        """Return a matrix with its scales."""
        scale = self._tensors.get(name + ".scale")
        return DeviceMatrix(self._tensors[name], scale, self._formats[name])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def _check(self, source: str) -> None:
        expected = {t.name: t.shape for t in packed_tensors(self.config, self._formats)}
        different = sorted(expected.keys() ^ self._tensors.keys())
        wrong = [
            name
            for name, shape in expected.items()
            if not different and tuple(self._tensors[name].shape) != shape
        ]
        if different or wrong:
            raise BundleError(
                f"{source} does not fit the model's config: {(different + wrong)[0]}",
                hint="build it again with: ringexport build",
            )


def _format(tensors: Mapping[str, Tensor], name: str, *, stacked: bool) -> MatrixFormat:
    """Read the format of a matrix off its values and scales."""
    values, scale = tensors.get(name), tensors.get(name + ".scale")
    if values is None or scale is None:
        return MatrixFormat()
    return MatrixFormat(_NUMBER_FORMATS.get(values.dtype), block=scale.dim() > 1 + stacked)


def load_weights(
    path: Path, config: RingConfig, device: torch.device, progress: Progress | None = None
) -> DeviceWeights:
    """Read a packed engine into GPU memory.

    Args:
        path: of the safetensors file.
        config: of the model.
        device: where to.
        progress: told of the bytes that have arrived.

    Raises:
        BundleError: the file cannot be read, or does not fit the config.
    """
    report = progress or NoProgress()
    lock = Lock()
    report.start("loading weights", path.stat().st_size, "bytes")

    def read(names: list[str]) -> dict[str, Tensor]:
        found = {}
        # A reader's own mapping and stream: page faults and copies of several tensors overlap.
        with (
            safe_open(path, framework="pt") as file,
            torch.cuda.device(device),
            torch.cuda.stream(torch.cuda.Stream(device)),  # type: ignore[no-untyped-call]
        ):
            for name in names:
                found[name] = file.get_tensor(name).to(device)
                with lock:
                    report.advance(found[name].nbytes)
            torch.cuda.current_stream().synchronize()
        return found

    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys(), key=lambda name: -_size(file, name))
            fp8_cache = (file.metadata() or {}).get("kv_cache") == "fp8_e4m3"
        with ThreadPoolExecutor(_READERS) as pool:
            parts = list(pool.map(read, [names[i::_READERS] for i in range(_READERS)]))
    except (OSError, SafetensorError) as error:
        raise BundleError(
            f"the packed weights {path} cannot be read: {error}",
            hint="build it again with: ringexport build",
        ) from error
    report.finish()
    tensors = {name: tensor for part in parts for name, tensor in part.items()}
    return DeviceWeights(config, tensors, source=str(path), fp8_cache=fp8_cache)


def _size(file: Any, name: str) -> int:
    shape = file.get_slice(name).get_shape()
    return int(torch.Size(shape).numel())
