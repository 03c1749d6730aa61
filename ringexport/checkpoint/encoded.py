"""Quantized weights of a checkpoint: which tensors belong to them, and how they are decoded."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ringexport.checkpoint.config import RingConfig
from ringexport.checkpoint.names import TensorKind, TensorSpec
from ringexport.checkpoint.safetensors_file import FLOAT_DTYPES, TensorInfo
from ringexport.errors import CheckpointError
from ringexport.ops.quantization import Granularity, GranularityKind, Quantized
from ringexport.ops.schemes import ModuleScheme, WeightScheme

__all__ = ["EncodedWeight", "check_dtypes", "encoded_weights", "kv_scale_names", "scale_tensors"]

_PLAIN_KINDS = frozenset({TensorKind.EMBEDDING, TensorKind.NORM, TensorKind.ROUTER})
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedWeight:
    """One weight that is stored in 8 bits.

    Attributes:
        module: its name without ".weight".
        shape: [out, in].
        scheme: of weights and activations.
        scale: name of the tensor that multiplies it.
        input_scale: name of its static activation scale, None where there is none.
        packed: stored as int32 words of four codes, 128 added to each.
    """

    module: str
    shape: tuple[int, ...]
    scheme: ModuleScheme
    scale: str
    input_scale: str | None
    packed: bool = False

    @property
    def stored(self) -> str:
        """Name of the tensor that holds its values."""
        return f"{self.module}.weight_packed" if self.packed else f"{self.module}.weight"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the tensor that holds its values."""
        return (self.shape[0], -(-self.shape[1] // 4)) if self.packed else self.shape

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """Dtype of the tensor that holds its values."""
        return np.dtype(np.int32) if self.packed else self.weights.format.dtype

    @property
    def weights(self) -> WeightScheme:
        """The scheme of the weight alone."""
        assert self.scheme.weights is not None
        return self.scheme.weights

    @property
    def granularity(self) -> Granularity:
        """Which elements share a scale."""
        return self.weights.granularity

    def first_row(self, row: int) -> int:
        """Return the first row of the tiles that hold `row`."""
        if self.granularity.kind is GranularityKind.TENSOR:
            return row
        tile, _ = self.granularity.tile(self.shape)
        return row // tile * tile

    def decode(
        self, stored: npt.NDArray[Any], scale: npt.NDArray[Any], rows: tuple[int, int]
    ) -> Quantized:
        """Put some rows of the values and their scale together.

        Args:
            stored: all values, as they are in the file.
            scale: all of the scale, in any of the shapes that are in use.
            rows: [start, stop); start is a `first_row`.

        Raises:
            CheckpointError: a scale that is not a positive finite number.
        """
        start, stop = rows
        values = stored[start:stop]
        if self.packed:
            codes = np.ascontiguousarray(values).view(np.uint8)[:, : self.shape[1]]
            values = np.bitwise_xor(codes, np.uint8(0x80)).view(np.int8)
        factors = scale.astype(np.float32).reshape(self.granularity.scale_shape(self.shape))
        if not (np.isfinite(factors) & (factors > 0)).all():
            raise CheckpointError(f"{self.scale} holds a value that is not positive and finite")
        if self.granularity.kind is not GranularityKind.TENSOR:
            tile, _ = self.granularity.tile(self.shape)
            factors = factors[start // tile : -(-stop // tile)]
        return Quantized(values=values, weight_scale=factors, granularity=self.granularity)


def encoded_weights(
    config: RingConfig, specs: Mapping[str, TensorSpec], present: Collection[str]
) -> dict[str, EncodedWeight]:
    """Return the quantized weights by name, in the order of `specs`.

    Args:
        config: says which modules are quantized.
        specs: the tensors of the model.
        present: the tensors in the files.
    """
    stored = config.quantization
    if stored is None:
        return {}
    modules = [name.removesuffix(".weight") for name in _quantizable(specs)]
    found = {}
    for module, group in stored.resolve(modules, present).items():
        found[f"{module}.weight"] = EncodedWeight(
            module=module,
            shape=specs[f"{module}.weight"].shape,
            scheme=group.scheme,
            scale=f"{module}.{stored.scale_name}",
            input_scale=f"{module}.input_scale" if group.scheme.needs_stats else None,
            packed=group.packed,
        )
    return found


def scale_tensors(
    config: RingConfig, encoded: Mapping[str, EncodedWeight], present: Collection[str]
) -> dict[str, Shapes]:
    """Return what has to be there beside values, with the shapes that it may have.

    These are scales, and the shapes of packed weights.
    """
    one: Shapes = ((1,), ())
    scales: dict[str, Shapes] = {}
    for weight in encoded.values():
        shape = weight.granularity.scale_shape(weight.shape)
        scales[weight.scale] = one if shape == (1,) else (shape,)
        if weight.granularity.kind is GranularityKind.CHANNEL:
            scales[weight.scale] = (shape, shape[:1])
        if weight.input_scale is not None:
            scales[weight.input_scale] = one
        if weight.packed:
            scales[f"{weight.module}.weight_shape"] = ((2,),)
    if config.quantization is not None and config.quantization.kv_cache is not None:
        names = [name for layer in config.softmax_layers for name in kv_scale_names(layer)]
        if any(name in present for name in names):  # engines take 1.0 where none is given
            scales |= dict.fromkeys(names, one)
    return scales


def kv_scale_names(layer: int) -> tuple[str, str]:
    """Return the names of the scales of cached keys and values of a softmax layer."""
    prefix = f"model.layers.{layer}.attention."
    return prefix + "k_scale", prefix + "v_scale"


def check_dtypes(infos: Mapping[str, TensorInfo], encoded: Mapping[str, EncodedWeight]) -> None:
    """Check that quantized weights are stored in their format, and nothing else in 8 bits.

    Raises:
        CheckpointError: another dtype; the message names tensor and file.
    """
    stored = {weight.stored: weight.stored_dtype for weight in encoded.values()}
    for name, info in infos.items():
        allowed: tuple[np.dtype[Any], ...] = (stored[name],) if name in stored else FLOAT_DTYPES
        if name.endswith(".weight_shape"):
            allowed = (np.dtype(np.int64), np.dtype(np.int32))
        if info.dtype not in allowed:
            raise CheckpointError(
                f"{info.file}: tensor {name} has dtype {info.dtype}, expected "
                f"{', '.join(dtype.name for dtype in allowed)}",
                hint="quantization_config in config.json and weights do not belong together",
            )


def _quantizable(specs: Mapping[str, TensorSpec]) -> Iterator[str]:
    yield from (name for name, spec in specs.items() if spec.kind not in _PLAIN_KINDS)
