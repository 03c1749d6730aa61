"""A checkpoint folder: everything about it is checked when it is opened, and no data is read.

Data is memory-mapped and streams: `read_f32` and `check_finite` drop a tensor's pages when they
are done, so a checkpoint larger than memory can be walked through.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ringexport.checkpoint.config import RingConfig
from ringexport.checkpoint.encoded import (
    EncodedWeight,
    check_dtypes,
    encoded_weights,
    kv_scale_names,
    scale_tensors,
)
from ringexport.checkpoint.fields import show
from ringexport.checkpoint.names import TensorKind, expected_tensors
from ringexport.checkpoint.safetensors_file import SafetensorsFile, TensorInfo
from ringexport.checkpoint.shards import (
    INDEX_NAME,
    checkpoint_file,
    count_tensors,
    first_names,
    open_shards,
)
from ringexport.errors import CheckpointError, MissingTensorError, ShapeError, UnknownTensorError
from ringexport.ops.quantization import Quantized, dequantize
from ringexport.ops.schemes import ModuleScheme

__all__ = ["CheckpointSummary", "CheckpointWeights", "KindSummary"]

_CONFIG_NAME = "config.json"
_BLOCK_ELEMENTS = 1 << 18  # the temporaries of a block stay in the cache
_QUANTIZED = re.compile(r"(weight_scale|weight_packed|weight_zero_point|qweight|qzeros|\.scales)")


@dataclass(frozen=True, slots=True)
class KindSummary:
    """Totals of the tensors of one kind."""

    num_tensors: int
    num_parameters: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSummary:
    """What `ringexport inspect` shows of a checkpoint.

    Attributes:
        num_tensors, num_parameters, num_bytes: totals.
        kinds: totals by what the tensors are for, in the order of `TensorKind`.
        dtypes: number of tensors by stored dtype.
        files: size in bytes by file name, of the weight files.
    """

    num_tensors: int
    num_parameters: int
    num_bytes: int
    kinds: Mapping[TensorKind, KindSummary]
    dtypes: Mapping[str, int]
    files: Mapping[str, int]


class CheckpointWeights:
    """The config and the tensors of one checkpoint folder. Use as a context manager, or close.

    Attributes:
        path: the folder.
        config: its config.json.
    """

    def __init__(self, path: Path, config: RingConfig, shards: list[SafetensorsFile]) -> None:
        self.path = path
        self.config = config
        self._shards = shards
        self._specs = expected_tensors(config)
        self._owners = {name: shard for shard in shards for name in shard.tensors}
        self._encoded = encoded_weights(config, self._specs, self._owners)
        self._scales = scale_tensors(config, self._encoded, self._owners)
        self._check_names()
        self._check_shapes()
        infos = {name: shard.tensors[name] for name, shard in self._owners.items()}
        check_dtypes(infos, self._encoded)

    @classmethod
    def open(cls, path: Path, *, rope_scaling: Mapping[str, Any] | None = None) -> Self:
        """Open a checkpoint folder and check all of it except the values.

        Args:
            path: folder with config.json and either model.safetensors or
                model.safetensors.index.json and the files that it names.
            rope_scaling: see `RingConfig.from_file`.

        Raises:
            ConfigError: a config.json that cannot be used.
            CheckpointError: files that are missing, damaged, pickled, or outside the folder.
            MissingTensorError, UnknownTensorError: tensors that do not fit the config.
        """
        try:
            _check_folder(path)
            config_path = checkpoint_file(path, _CONFIG_NAME)
            config = RingConfig.from_file(config_path, rope_scaling=rope_scaling)
            return cls(path, config, open_shards(path))
        except OSError as failure:
            raise CheckpointError(
                f"cannot read {failure.filename}: {failure.strerror}"
            ) from failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Refuse further reads. Arrays that were read stay valid."""
        for shard in self._shards:
            shard.close()

    def names(self) -> tuple[str, ...]:
        """Return all tensor names in the order in which the model uses them."""
        return tuple(self._specs)

    def info(self, name: str) -> TensorInfo:
        """Return dtype, shape, size and place of a tensor; a packed weight counts as unpacked.

        Raises:
            MissingTensorError: no such tensor.
        """
        weight = self._encoded.get(name)
        if weight is None or not weight.packed:
            return self._owner(name).tensors[name]
        info = self._owner(weight.stored).tensors[weight.stored]
        dtype = weight.weights.format.dtype
        return replace(info, name=name, dtype=dtype, shape=weight.shape)

    def files(self) -> list[Path]:
        """Return the files that make up the checkpoint: config, index if any, weights."""
        index = self.path / INDEX_NAME
        listed = [index] if index.exists() else []
        return [self.path / _CONFIG_NAME, *listed, *(shard.path for shard in self._shards)]

    def read(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor in its stored dtype as a read-only view of the mapped file.

        bf16 is `ml_dtypes.bfloat16`. Values are not checked. The pages stay in memory until
        `release`. A quantized weight is returned as the real numbers that it stands for, a new
        fp32 array; `quantized` gives what is stored.
        """
        if name in self._encoded:
            return dequantize(self.quantized(name))
        return self._owner(name).read(name)

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Return rows [start, stop) of a tensor's first dimension, otherwise like `read`.

        Raises:
            ShapeError: rows outside the tensor.
        """
        rows = self.info(name).shape[0]
        if not 0 <= start <= stop <= rows:
            raise ShapeError(f"{name} has {rows} rows, asked for {start} to {stop}")
        weight = self._encoded.get(name)
        if weight is None or start == stop:
            return self.read(name)[start:stop]
        first = weight.first_row(start)
        return dequantize(self._decode(weight, first, stop))[start - first :]

    def read_f32(self, name: str) -> npt.NDArray[np.float32]:
        """Return a tensor as a new fp32 array, its values checked, and release its pages.

        Raises:
            CheckpointError: a NaN or infinity.
        """
        values = self.read(name)
        if name not in self._encoded:
            values = values.astype(np.float32)
        self.release(name)
        _check_finite(name, self.info(name).file, values)
        return values

    @cached_property
    def schemes(self) -> Mapping[str, ModuleScheme]:
        """How each quantized module is quantized, by its name; empty for a plain checkpoint."""
        return MappingProxyType({each.module: each.scheme for each in self._encoded.values()})

    def quantized(self, name: str) -> Quantized:
        """Return a quantized weight as it is stored: values are a view, as `read` gives it.

        Raises:
            CheckpointError: the weight is not quantized, or has a damaged scale.
            MissingTensorError: no such tensor.
        """
        weight = self._encoded.get(name)
        if weight is None:
            raise CheckpointError(f"{self._owner(name).path}: {name} is not quantized")
        return self._decode(weight, 0, weight.shape[0])

    def codes(self, name: str, rows: tuple[int, int] | None = None) -> npt.NDArray[Any]:
        """Return the codes of some rows, all by default, of a quantized weight: a view, checked.

        Raises:
            CheckpointError: as `quantized`, and for FP8 codes of NaN.
            MissingTensorError: no such tensor.
        """
        first, last = rows or (0, self.info(name).shape[0])
        values = self.quantized(name).values[first:last]
        if values.dtype != np.int8:
            _check_finite(name, self.info(name).file, values, first)
        return values

    def input_scale(self, module: str) -> float | None:
        """Return the static scale of a module's input (it multiplies), None without one.

        Raises:
            CheckpointError: it is not a positive number.
        """
        weight = self._encoded.get(f"{module}.weight")
        if weight is None or weight.input_scale is None:
            return None
        return self._positive(weight.input_scale)

    def kv_scales(self, layer: int) -> tuple[float, float] | None:
        """Return the static scales of a softmax layer's cached keys and values, or None.

        Raises:
            CheckpointError: they are not positive numbers.
        """
        key, value = kv_scale_names(layer)
        if key not in self._scales:
            return None
        return self._positive(key), self._positive(value)

    def check_finite(self, names: Iterable[str] | None = None) -> None:
        """Read tensors through, all by default, with bounded memory.

        Raises:
            CheckpointError: a NaN or infinity; the message names tensor and index.
        """
        for name in self.names() if names is None else names:
            _check_finite(name, self.info(name).file, self.read(name))
            self.release(name)

    def prefetch(self, name: str) -> None:
        """Ask the system to load a tensor from the disk soon; it takes no memory of the process."""
        weight = self._encoded.get(name)
        stored = name if weight is None else weight.stored
        self._owner(stored).prefetch(stored)

    def release(self, name: str) -> None:
        """Drop a tensor's pages from memory; arrays that view them load them again."""
        weight = self._encoded.get(name)
        stored = name if weight is None else weight.stored
        self._owner(stored).release(stored)

    def summary(self) -> CheckpointSummary:
        """Add up what the checkpoint holds, without reading data."""
        counts: dict[TensorKind, list[int]] = {kind: [0, 0, 0] for kind in TensorKind}
        for name, spec in self._specs.items():
            info = self.info(name)
            totals = counts[spec.kind]
            totals[0] += 1
            totals[1] += info.nbytes // info.dtype.itemsize
            totals[2] += info.nbytes
        kinds = {kind: KindSummary(*totals) for kind, totals in counts.items() if totals[0]}
        return CheckpointSummary(
            num_tensors=len(self._specs),
            num_parameters=sum(kind.num_parameters for kind in kinds.values()),
            num_bytes=sum(kind.num_bytes for kind in kinds.values()),
            kinds=kinds,
            dtypes=dict(Counter(self.info(name).dtype.name for name in self._specs)),
            files={shard.path.name: shard.size_bytes for shard in self._shards},
        )

    def _decode(self, weight: EncodedWeight, start: int, stop: int) -> Quantized:
        scale = self._owner(weight.scale).read(weight.scale)
        stored = self._owner(weight.stored).read(weight.stored)
        return weight.decode(stored, scale, (start, stop))

    def _positive(self, name: str) -> float:
        found = float(self._owner(name).read(name).reshape(-1)[0])
        if not 0 < found < float("inf"):
            raise CheckpointError(f"{name} is {found:g}, expected a positive number")
        return found

    def _owner(self, name: str) -> SafetensorsFile:
        try:
            return self._owners[name]
        except KeyError:
            raise MissingTensorError(f"{self.path} has no tensor {show(name)}") from None

    def _check_names(self) -> None:
        """Compare the names in the files with those that the config calls for."""
        values = [
            self._encoded[name].stored if name in self._encoded else name for name in self._specs
        ]
        known = {*values, *self._scales}
        unknown = [name for name in self._owners if name not in known]
        if unknown:
            raise UnknownTensorError(
                f"{self.path} holds {count_tensors(unknown)} that its config does not explain: "
                f"{first_names(unknown)}",
                hint=_explain_unknown(unknown, self.config.num_hidden_layers),
            )
        missing = [name for name in (*values, *self._scales) if name not in self._owners]
        if missing:
            raise MissingTensorError(
                f"{self.path} lacks {len(missing)} of {len(known)} tensors: {first_names(missing)}",
                hint="download the whole checkpoint, and the config.json that belongs to it",
            )

    def _check_shapes(self) -> None:
        plain = {
            name: (spec.shape,) for name, spec in self._specs.items() if name not in self._encoded
        }
        stored = {weight.stored: (weight.stored_shape,) for weight in self._encoded.values()}
        expected = plain | stored | self._scales
        infos = {name: self._owner(name).tensors[name] for name in expected}
        wrong = [name for name, shapes in expected.items() if infos[name].shape not in shapes]
        if not wrong:
            return
        info, shape = infos[wrong[0]], expected[wrong[0]][0]
        others = f"; {count_tensors(wrong[1:])} more of the wrong shape" if wrong[1:] else ""
        raise CheckpointError(
            f"{info.file}: tensor {info.name} has shape {list(info.shape)}, expected "
            f"{list(shape)}{others}",
            hint="config.json and weights are of different models",
        )


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        problem = "is not a folder" if path.exists() else "does not exist"
        raise CheckpointError(
            f"{path} {problem}",
            hint="give the folder of a downloaded checkpoint; nothing is downloaded for you",
        )


def _explain_unknown(names: list[str], num_layers: int) -> str:
    """Return the hint for tensors that are known from other models or formats."""
    for name in names:
        layer = re.match(r"model\.layers\.(\d{1,9})\.", name)
        if name.startswith("model.mtp") or (layer and int(layer[1]) >= num_layers):
            return (
                "these are multi-token-prediction (MTP) layers of a later model, or "
                "num_hidden_layers is wrong; MTP is not implemented"
            )
        if ".switch_mlp." in name:
            return "this is an mlx export with stacked experts; use the original checkpoint"
        if _QUANTIZED.search(name):
            return "this checkpoint is quantized, but not in the way that its config.json says"
    return "config.json and weights are of different models"


def _check_finite(name: str, file: Path, values: npt.NDArray[Any], first_row: int = 0) -> None:
    """Raise CheckpointError for the first NaN or infinity, looking at one block at a time.

    Both have all exponent bits set, in FP8-E4M3 all bits but the sign. Comparing bits is five times
    as fast as `isfinite` on bf16.
    """
    exponent = np.array(np.inf, values.dtype).view(f"u{values.itemsize}")
    flat = values.reshape(-1)
    bits = flat.view(exponent.dtype)
    for start in range(0, flat.size, _BLOCK_ELEMENTS):
        if np.max(bits[start : start + _BLOCK_ELEMENTS] & exponent) != exponent:
            continue
        finite = np.isfinite(flat[start : start + _BLOCK_ELEMENTS])
        position = start + int(np.argmin(finite))
        index = [int(i) for i in np.unravel_index(position, values.shape)]
        index[:1] = [first_row + row for row in index[:1]]
        raise CheckpointError(
            f"{file}: tensor {name} holds {float(flat[position])} at {index}, expected finite "
            "values",
            hint="the file is damaged, or the model was saved after it diverged",
        )
