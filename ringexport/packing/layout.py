"""What a packed engine holds: the tensors of a model in the layout that the kernels read.

Projections that read the same input are one matrix, the experts of a layer are contiguous with
gate and up rows alternating, and every quantized matrix has its scales beside it under the name
with ".scale". The layers of a config and the formats of their matrices decide everything here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from ringexport.checkpoint import RingConfig
from ringexport.errors import ConfigError
from ringexport.ops.quantization import GranularityKind, NumberFormat
from ringexport.ops.schemes import ActivationMode, ModuleScheme

__all__ = ["BLOCK", "Matrix", "MatrixFormat", "PackedTensor", "matrices", "packed_tensors"]

BLOCK = 128
_ALTERNATIVES = "use fp8, fp8-block, fp8-all, int8 or bf16"


@dataclass(frozen=True, slots=True)
class MatrixFormat:
    """How a packed matrix is stored and multiplied.

    Attributes:
        number_format: 8-bit format of weights and inputs, None for bf16.
        block: scales per 128 x 128 weights and per 128 channels of a token, instead of per output
            channel and per token.
    """

    number_format: NumberFormat | None = None
    block: bool = False

    @classmethod
    def of(cls, scheme: ModuleScheme, module: str) -> "MatrixFormat":
        """Return the format that runs `scheme`.

        Raises:
            ConfigError: the kernels cannot run it; the hint names what they can.
        """
        weights, inputs = scheme.weights, scheme.activations
        if weights is None:
            return cls()
        if inputs is None or inputs.mode is not ActivationMode.DYNAMIC:
            how = "are not quantized" if inputs is None else "have static scales"
            raise ConfigError(
                f"the inputs of {module} {how}, the cuda target quantizes them per token",
                hint=_ALTERNATIVES,
            )
        pair = (str(weights.granularity), inputs.granularity.kind, inputs.granularity.columns)
        if pair == ("channel", GranularityKind.TOKEN, 0):
            return cls(weights.format)
        if pair == ("block(128, 128)", GranularityKind.GROUP, BLOCK):
            return cls(weights.format, block=True)
        raise ConfigError(
            f"{module} is quantized per {weights.granularity} with inputs per "
            f"{inputs.granularity}, which the cuda target does not run",
            hint=_ALTERNATIVES,
        )

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored values."""
        fmt = self.number_format
        return np.dtype(ml_dtypes.bfloat16) if fmt is None else fmt.dtype

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Return the shape of the scales of a matrix, () for none."""
        if self.number_format is None:
            return ()
        return (-(-rows // BLOCK), -(-columns // BLOCK)) if self.block else (rows,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One packed matrix and the modules of the checkpoint whose rows it holds.

    Attributes:
        name: in the packed engine.
        modules: stacked from top to bottom; [experts][modules of one expert] for experts.
        shape: [rows, columns] of one expert, or of the matrix.
        experts: number of experts, 0 for a plain matrix.
        interleaved: rows of the two modules alternate: gate, up.
    """

    name: str
    modules: tuple[tuple[str, ...], ...]
    shape: tuple[int, int]
    experts: int = 0
    interleaved: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTensor:
    """Name, shape and dtype of a stored tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return prod(self.shape) * self.dtype.itemsize


def matrices(config: RingConfig) -> Iterator[Matrix]:
    """Yield every matrix but embedding and router, in the order of the model."""
    hidden = config.hidden_size
    for layer in range(config.num_hidden_layers):
        source, target = f"model.layers.{layer}.", f"layers.{layer}."
        linear = config.is_linear_layer(layer)
        readers = ("query_key_value", "g_proj") if linear else ("query_key_value",)
        yield Matrix(
            name=target + "attention.input",
            modules=(tuple(f"{source}attention.{name}" for name in readers),),
            shape=(config.qkv_rows(layer) + config.linear_dim * linear, hidden),
        )
        yield Matrix(
            name=target + "attention.output",
            modules=((f"{source}attention.dense",),),
            shape=(hidden, config.linear_dim),
        )
        if config.is_moe_layer(layer):
            names = [f"{source}mlp.experts.{expert}." for expert in range(config.num_experts)]
            yield from _swiglu(
                target + "experts.", names, (config.moe_intermediate_size, hidden), stacked=True
            )
            shared = (config.shared_intermediate_size, hidden)
            yield from _swiglu(target + "shared.", [f"{source}mlp.shared_experts."], shared)
        else:
            dense = (config.intermediate_size, hidden)
            yield from _swiglu(target + "experts.", [f"{source}mlp."], dense, stacked=True)
    head = "model.word_embeddings" if config.tie_word_embeddings else "lm_head"
    yield Matrix(name="lm_head", modules=((head,),), shape=(config.vocab_size, hidden))


def _swiglu(
    target: str, units: list[str], sizes: tuple[int, int], *, stacked: bool = False
) -> Iterator[Matrix]:
    width, hidden = sizes
    count = len(units) if stacked else 0
    yield Matrix(
        name=target + "gate_up",
        modules=tuple((unit + "gate_proj", unit + "up_proj") for unit in units),
        shape=(2 * width, hidden),
        experts=count,
        interleaved=True,
    )
    yield Matrix(
        name=target + "down",
        modules=tuple((unit + "down_proj",) for unit in units),
        shape=(hidden, width),
        experts=count,
    )


def packed_tensors(
    config: RingConfig, formats: Mapping[str, MatrixFormat]
) -> tuple[PackedTensor, ...]:
    """Return every tensor of a packed engine in file order.

    Args:
        config: of the model.
        formats: matrix name -> format; what is not named is bf16.
    """
    bf16, hidden = np.dtype(ml_dtypes.bfloat16), config.hidden_size
    found = [
        PackedTensor(name="embedding", shape=(config.vocab_size, hidden), dtype=bf16),
        _fp32("final_norm", hidden),
    ]
    for layer in range(config.num_hidden_layers):
        found += _vectors(config, layer)
    for matrix in matrices(config):
        found += _stored(matrix, formats.get(matrix.name, MatrixFormat()))
    return tuple(found)


def _stored(matrix: Matrix, fmt: MatrixFormat) -> Iterator[PackedTensor]:
    batch = (matrix.experts,) if matrix.experts else ()
    yield PackedTensor(name=matrix.name, shape=(*batch, *matrix.shape), dtype=fmt.dtype)
    scale = fmt.scale_shape(*matrix.shape)
    if fmt.block and matrix.interleaved:  # blocks of gate, then blocks of up
        half = fmt.scale_shape(matrix.shape[0] // 2, matrix.shape[1])
        scale = (2, *half)
    if scale:
        yield _fp32(f"{matrix.name}.scale", *batch, *scale)


def _vectors(config: RingConfig, layer: int) -> Iterator[PackedTensor]:
    prefix, hidden = f"layers.{layer}.", config.hidden_size
    yield _fp32(prefix + "input_norm", hidden)
    yield _fp32(prefix + "mlp_norm", hidden)
    yield _fp32(prefix + "attention.query_norm", config.head_dim)
    yield _fp32(prefix + "attention.key_norm", config.head_dim)
    if config.is_linear_layer(layer):
        yield _fp32(prefix + "attention.output_norm", config.linear_dim)
        yield _fp32(prefix + "attention.log_decay", config.num_attention_heads)
    else:
        yield _fp32(prefix + "attention.kv_scale", 2)
    if config.is_moe_layer(layer):
        yield _fp32(prefix + "router", config.num_experts, hidden)
        yield _fp32(prefix + "router_bias", config.num_experts)


def _fp32(name: str, *shape: int) -> PackedTensor:
    return PackedTensor(name=name, shape=shape, dtype=np.dtype(np.float32))
