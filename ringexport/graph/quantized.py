"""Projections and experts of quantized checkpoints, as ONNX Runtime on a CPU runs them.

INT8 weights stay int8: their products run on int8 codes. FP8 weights are stored as FP8 and become
fp32 when a session starts; inputs are rounded to FP8 as the scheme says, products run in fp32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx

from ringexport.checkpoint.weights import CheckpointWeights
from ringexport.errors import GraphError
from ringexport.graph.builder import GraphBuilder
from ringexport.graph.initializers import AnyArray, ComputeDtype, LazyInitializer, from_array
from ringexport.ops.moe import INT8_EXPERTS
from ringexport.ops.plugin_ops import is_per_row
from ringexport.ops.projection import FP8_QUANTIZE, INT8_PROJECTION, INT8_ZERO, int8_block_size
from ringexport.ops.quantization import GranularityKind, NumberFormat, Quantized
from ringexport.ops.schemes import ActivationMode, ActivationScheme, ModuleScheme

__all__ = ["Emitter", "EmitterFactory", "QuantizedEmitter", "row_scales"]

FLOAT = onnx.TensorProto.FLOAT
FP8 = onnx.TensorProto.FLOAT8E4M3FN


class Emitter(Protocol):
    """Adds the quantized parts of one checkpoint to a graph, in the form that a runtime takes.

    Each method returns None for what is to be added as if it were not quantized.
    """

    def projection(
        self,
        value: str,
        module: str,
        label: str,
        rows: tuple[int, int],
        *,
        output: str | None = None,
    ) -> str | None:
        """Multiply a value by some rows of a module."""

    def rounded(self, value: str, modules: list[str], label: str) -> str:
        """Round the input of modules whose products are computed from dequantized weights."""

    def experts(self, inputs: list[str], experts: list[str], label: str, top_k: int) -> str | None:
        """Add routed experts."""

    def expert_weights(self, experts: list[str], label: str) -> list[str] | None:
        """Add stacked matrices for RingExperts."""


class EmitterFactory(Protocol):
    """Makes the emitter of one graph."""

    def __call__(
        self, *, builder: GraphBuilder, weights: CheckpointWeights, dtype: ComputeDtype
    ) -> Emitter:
        """Return an emitter for a graph, a checkpoint and the dtype of activations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedEmitter:
    """Adds the quantized parts of one checkpoint to a graph for ONNX Runtime."""

    builder: GraphBuilder
    weights: CheckpointWeights
    dtype: ComputeDtype = ComputeDtype.FP32

    def scheme(self, module: str) -> ModuleScheme | None:
        """Return how a module is quantized; None for one that is not."""
        found = self.weights.schemes.get(module)
        return found if found is not None and found.weights is not None else None

    def projection(
        self,
        value: str,
        module: str,
        label: str,
        rows: tuple[int, int],
        *,
        output: str | None = None,
    ) -> str | None:
        """Multiply `value` by some rows of a quantized module; None if it is to be dequantized.

        Args:
            value: [..., in] fp32.
            module: name in the checkpoint, without ``.weight``.
            label: of the node, and of the weight.
            rows: first row, and the row behind the last.
            output: name of the product, if the graph exposes it.
        """
        scheme = self.scheme(module)
        if scheme is None or scheme.weights is None:
            return None
        if not is_per_row(scheme):
            return None
        if scheme.weights.format is NumberFormat.INT8:
            return self._int8_projection(value, module, label, rows, output)
        return self._fp8_projection(value, module, label, rows, output)

    def rounded(self, value: str, modules: list[str], label: str) -> str:
        """Round the input [..., in] of FP8 modules as their scheme says; of others, return it.

        Modules that share an input and do not agree on its scheme get it as it is.
        """
        found = {self.weights.schemes.get(module, ModuleScheme()).activations for module in modules}
        activations = found.pop()
        if found or activations is None or activations.format is not NumberFormat.FP8_E4M3:
            return value
        if activations.mode is ActivationMode.STATIC:
            return self._rounded_static(value, modules[0], label)
        return self._rounded_dynamic(value, modules[0], label, activations)

    def experts(self, inputs: list[str], experts: list[str], label: str, top_k: int) -> str | None:
        """Add routed experts with int8 weights; None if they are not int8 in a layout of the op.

        Args:
            inputs: hidden [N, D], expert_ids and routing_weights [N, k].
            experts: name prefixes of the experts of a layer.
            label: of the weights.
            top_k: experts per token.
        """
        width, hidden = self.weights.info(f"{experts[0]}.gate_proj.weight").shape
        block = int8_block_size(width, hidden)
        if block is None or not self._all_per_row(experts, NumberFormat.INT8):
            return None
        gate_up, down = self._stacked_experts(experts, label, np.dtype(np.uint8))
        attributes = {"num_experts": len(experts), "top_k": top_k, "block_size": block}
        (output,) = self.builder.contract(
            INT8_EXPERTS, [*inputs, *gate_up, *down], attributes, "mlp.experts"
        )
        return output

    def expert_weights(self, experts: list[str], label: str) -> list[str] | None:
        """Return gate_up_proj and down_proj in fp32, dequantized from FP8 when a session starts.

        None if the experts are not FP8 with scales per row; arguments as of `experts`.
        """
        if not self._all_per_row(experts, NumberFormat.FP8_E4M3):
            return None
        build, values = self.builder, []
        for name, parts in zip(
            ("gate_up_proj", "down_proj"),
            self._stacked_experts(experts, label, NumberFormat.FP8_E4M3.dtype),
            strict=True,
        ):
            codes, scale = parts
            real = build.node("Cast", [codes], f"mlp.experts.{name}.real", to=FLOAT)
            values.append(build.node("Mul", [real, scale], f"mlp.experts.{name}.dequantized"))
        return values

    def _all_per_row(self, experts: list[str], wanted: NumberFormat) -> bool:
        """Tell whether all matrices of the experts have this format and scales per row."""
        for expert in experts:
            for name in ("gate_proj", "up_proj", "down_proj"):
                scheme = self.scheme(f"{expert}.{name}")
                if scheme is None or scheme.weights is None:
                    return False
                if scheme.weights.format is not wanted:
                    return False
                if not is_per_row(scheme):
                    return False
        return True

    def _stacked_experts(
        self, experts: list[str], label: str, dtype: np.dtype[np.generic]
    ) -> tuple[list[str], list[str]]:
        """Add codes and scales of gate_up_proj [E, 2*I, D] and of down_proj [E, D, I].

        Scales are [E, rows, 1].
        """
        width, hidden = self.weights.info(f"{experts[0]}.gate_proj.weight").shape
        gate_up = [[f"{expert}.gate_proj", f"{expert}.up_proj"] for expert in experts]
        down = [[f"{expert}.down_proj"] for expert in experts]
        return (
            self._stacked(gate_up, (2 * width, hidden), dtype, f"{label}.gate_up_proj"),
            self._stacked(down, (hidden, width), dtype, f"{label}.down_proj"),
        )

    def _int8_projection(
        self, value: str, module: str, label: str, rows: tuple[int, int], output: str | None
    ) -> str | None:
        first, last = rows
        in_features = self.weights.info(f"{module}.weight").shape[1]
        block = int8_block_size(in_features)
        if block is None:
            return None
        blocks = in_features // block
        quantized = self.weights.quantized(f"{module}.weight")
        scale = row_scales(quantized)[first:last]

        def chunks() -> Iterator[AnyArray]:
            stored = self.weights.codes(f"{module}.weight", rows)
            yield _codes(stored).reshape(last - first, blocks, block)

        weight = LazyInitializer(
            name=self.builder.scoped(label),
            shape=(last - first, blocks, block),
            dtype=np.dtype(np.uint8),
            chunks=chunks,
        )
        inputs = [
            value,
            self.builder.weight(weight),
            self.builder.weight(from_array(f"{weight.name}.scale", np.ascontiguousarray(scale))),
        ]
        sizes = {"in_features": in_features, "out_features": last - first, "block_size": block}
        exposed = {"output": output} if output else None
        (product,) = self.builder.contract(
            INT8_PROJECTION, inputs, sizes, f"{label}.matmul", values=exposed
        )
        return product

    def _fp8_projection(
        self, value: str, module: str, label: str, rows: tuple[int, int], output: str | None
    ) -> str:
        first, last = rows
        name = self.builder.scoped(label)
        in_features = self.weights.info(f"{module}.weight").shape[1]

        def chunks() -> Iterator[AnyArray]:
            yield np.ascontiguousarray(self.weights.codes(f"{module}.weight", rows).T)

        codes = LazyInitializer(
            name=name,
            shape=(in_features, last - first),
            dtype=NumberFormat.FP8_E4M3.dtype,
            chunks=chunks,
        )
        scale = row_scales(self.weights.quantized(f"{module}.weight"))[first:last].T
        scales = from_array(f"{name}.scale", np.ascontiguousarray(scale))
        build = self.builder
        real = build.node("Cast", [build.weight(codes)], f"{label}.real", to=FLOAT)
        matrix = build.node("Mul", [real, build.weight(scales)], f"{label}.dequantized")
        rounded = self.rounded(value, [module], label)
        return build.node("MatMul", [rounded, matrix], f"{label}.matmul", value=output)

    def _rounded_static(self, value: str, module: str, label: str) -> str:
        scale = self.weights.input_scale(module)
        if scale is None:
            raise GraphError(f"{module} has static activations without an input scale")
        build = self.builder
        constant = build.constant(np.array(scale, dtype=np.float32), "input_scale")
        scaled = build.node("Div", [value, constant], f"{label}.scaled")
        codes = build.node("Cast", [scaled], f"{label}.codes", to=FP8, saturate=1)
        rounded = build.node("Cast", [codes], f"{label}.rounded", to=FLOAT)
        return build.node("Mul", [rounded, constant], f"{label}.input")

    def _rounded_dynamic(
        self, value: str, module: str, label: str, activations: ActivationScheme
    ) -> str:
        build = self.builder
        width = self.weights.info(f"{module}.weight").shape[1]
        size = width
        if activations.granularity.kind is GranularityKind.GROUP:
            size = min(width, activations.granularity.columns)
        if activations.granularity.kind is GranularityKind.TENSOR or width % size:
            raise GraphError(
                f"{module}: inputs of {width} quantized per {activations.granularity} are not"
                " supported in a graph",
                hint="use activations per token",
            )
        if size == width:
            return build.contract(FP8_QUANTIZE, [value], {}, f"{label}.input")[0]
        shape = build.node("Shape", [value], f"{label}.shape")
        groups = build.node("Reshape", [value, build.ints(-1, size)], f"{label}.groups")
        (rounded,) = build.contract(FP8_QUANTIZE, [groups], {}, f"{label}.rounded")
        return build.node("Reshape", [rounded, shape], f"{label}.input")

    def _stacked(
        self,
        modules: list[list[str]],
        shape: tuple[int, int],
        dtype: np.dtype[np.generic],
        label: str,
    ) -> list[str]:
        """Stack the modules of all experts, the rows of the modules of one alternating."""
        rows, width = shape
        name = self.builder.scoped(label)

        def stack(
            sizes: tuple[int, int], dtype: np.dtype[np.generic], scales: bool
        ) -> Iterator[AnyArray]:
            for parts in modules:
                stacked = np.empty(sizes, dtype=dtype)
                for index, part in enumerate(parts):
                    if scales:
                        values: AnyArray = row_scales(self.weights.quantized(f"{part}.weight"))
                    else:
                        stored = self.weights.codes(f"{part}.weight")
                        values = _codes(stored) if stored.dtype == np.int8 else stored
                    stacked[index :: len(parts)] = values
                yield stacked

        fp32 = np.dtype(np.float32)
        count = len(modules)
        weight = LazyInitializer(
            name=name,
            shape=(count, rows, width),
            dtype=dtype,
            chunks=lambda: stack((rows, width), dtype, scales=False),
        )
        scale = LazyInitializer(
            name=f"{name}.scale",
            shape=(count, rows, 1),
            dtype=fp32,
            chunks=lambda: stack((rows, 1), fp32, scales=True),
        )
        return [self.builder.weight(weight), self.builder.weight(scale)]


def _codes(values: AnyArray) -> npt.NDArray[np.uint8]:
    """Shift int8 values to the unsigned codes of the op, 128 for zero."""
    return (values.astype(np.int16) + INT8_ZERO).astype(np.uint8)


def row_scales(quantized: Quantized) -> npt.NDArray[np.float32]:
    """Return one scale per row, [rows, 1] fp32, of a tensor quantized per tensor or channel."""
    rows = quantized.values.shape[0]
    scale = quantized.weight_scale.astype(np.float32).reshape(-1, 1)
    return np.ascontiguousarray(np.broadcast_to(scale, (rows, 1)))
