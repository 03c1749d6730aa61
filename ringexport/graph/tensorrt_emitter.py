"""Projections and experts of quantized checkpoints, as TensorRT and the plugins run them.

* Static activations: QuantizeLinear and DequantizeLinear around the product, which TensorRT fuses.
* Activations per token: the plugin RingQuantizedProjection, which quantizes its input itself.
* Weights only: DequantizeLinear before the product.
* Routed experts: the plugin RingQuantizedExperts, which always quantizes its inputs per token.

GPUs before sm_89 have no FP8 in TensorRT. There the plugins take FP8 codes as int8 tensors, static
activations are quantized per token, and other FP8 projections are dequantized.

Scales stay fp32 everywhere; `output_dtype` of DequantizeLinear brings the dtype of the graph.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from ringexport.checkpoint.weights import CheckpointWeights
from ringexport.errors import GraphError
from ringexport.graph.builder import GraphBuilder
from ringexport.graph.initializers import AnyArray, ComputeDtype, LazyInitializer, from_array
from ringexport.graph.quantized import row_scales
from ringexport.ops.plugin_ops import (
    QUANTIZED_EXPERTS,
    QUANTIZED_PROJECTION,
    ProjectionForm,
    experts_fit_plugin,
    is_per_row,
    projection_form,
)
from ringexport.ops.quantization import NumberFormat
from ringexport.ops.schemes import ModuleScheme

__all__ = ["TensorRtEmitter"]

FLOAT = onnx.TensorProto.FLOAT


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRtEmitter:
    """An `Emitter` for graphs that TensorRT's parser reads.

    Attributes:
        has_fp8: every GPU that the engine is for has FP8 in TensorRT.
    """

    builder: GraphBuilder
    weights: CheckpointWeights
    dtype: ComputeDtype = ComputeDtype.BF16
    has_fp8: bool = True

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
            value: [..., in].
            module: name in the checkpoint, without ``.weight``.
            label: of the node, and of the weight.
            rows: first row, and the row behind the last.
            output: name of the product in fp32, if the graph exposes it.
        """
        scheme = self.weights.schemes.get(module, ModuleScheme())
        in_features = self.weights.info(f"{module}.weight").shape[1]
        form = projection_form(scheme, in_features, rows[1] - rows[0], has_fp8=self.has_fp8)
        if form is ProjectionForm.DEQUANTIZED:
            return None
        if form is ProjectionForm.STATIC:
            product = self._static(value, module, label, rows)
        elif form is ProjectionForm.PER_TOKEN:
            product = self._per_token(value, module, label, rows)
        else:
            product = self._weight_only(value, module, label, rows)
        if output is None:
            return product
        return self.builder.node("Cast", [product], f"{label}.cast", value=output, to=FLOAT)

    def rounded(self, value: str, modules: list[str], label: str) -> str:
        """Return the value: what is not quantized by `projection` stays as it is."""
        del modules, label
        return value

    def experts(self, inputs: list[str], experts: list[str], label: str, top_k: int) -> str | None:
        """Add routed experts with 8-bit weights; None if they are not in a layout of the plugin.

        Args:
            inputs: hidden [N, D], expert_ids and routing_weights [N, k].
            experts: name prefixes of the experts of a layer.
            label: of the weights.
            top_k: experts per token.
        """
        width, hidden = self.weights.info(f"{experts[0]}.gate_proj.weight").shape
        number_format = self._expert_format(experts)
        if number_format is None or not experts_fit_plugin(hidden, width):
            return None
        gate_up = [[f"{expert}.gate_proj", f"{expert}.up_proj"] for expert in experts]
        down = [[f"{expert}.down_proj"] for expert in experts]
        weights = [
            *self._stacked(gate_up, (2 * width, hidden), f"{label}.gate_up_proj", number_format),
            *self._stacked(down, (hidden, width), f"{label}.down_proj", number_format),
        ]
        attributes = {
            "num_experts": len(experts),
            "top_k": top_k,
            "fp8_bytes": int(self._are_bytes(number_format.dtype)),
        }
        (output,) = self.builder.contract(
            QUANTIZED_EXPERTS, [*inputs, *weights], attributes, "mlp.experts"
        )
        return output

    def expert_weights(self, experts: list[str], label: str) -> list[str] | None:
        """Return None: what `experts` does not take is dequantized when it is written."""
        del experts, label
        return None

    def _format(self, module: str) -> NumberFormat | None:
        """Return the format of weights with scales per row, None for others."""
        scheme = self.weights.schemes.get(module, ModuleScheme())
        return scheme.weights.format if scheme.weights and is_per_row(scheme) else None

    def _are_bytes(self, codes: np.dtype[np.generic]) -> bool:
        """Tell whether the bytes of codes go into int8 tensors."""
        return codes == NumberFormat.FP8_E4M3.dtype and not self.has_fp8

    def _in_graph(self, codes: np.dtype[np.generic]) -> np.dtype[np.generic]:
        """Return the type of the tensors that hold codes; values change theirs by `view`."""
        return np.dtype(np.int8) if self._are_bytes(codes) else codes

    def _expert_format(self, experts: list[str]) -> NumberFormat | None:
        """Return the format of all experts' matrices, None if it is not one per row."""
        names = ("gate_proj", "up_proj", "down_proj")
        found = {self._format(f"{expert}.{name}") for expert in experts for name in names}
        return found.pop() if len(found) == 1 else None

    def _static(self, value: str, module: str, label: str, rows: tuple[int, int]) -> str:
        scale = self.weights.input_scale(module)
        number_format = self._format(module)
        if scale is None or number_format is None:
            raise GraphError(f"{module} has static activations without an input scale")
        build = self.builder
        constant = build.constant(np.array(scale, dtype=np.float32), "input_scale")
        zero = build.constant(np.zeros((), dtype=number_format.dtype), "zero")
        codes = build.node("QuantizeLinear", [value, constant, zero], f"{label}.quantize")
        real = self._dequantized([codes, constant, zero], f"{label}.input", None)
        matrix = self._matrix(module, label, rows)
        return build.node("MatMul", [real, matrix], f"{label}.matmul")

    def _weight_only(self, value: str, module: str, label: str, rows: tuple[int, int]) -> str:
        matrix = self._matrix(module, label, rows)
        return self.builder.node("MatMul", [value, matrix], f"{label}.matmul")

    def _per_token(self, value: str, module: str, label: str, rows: tuple[int, int]) -> str:
        codes, scale = self._row_weights(module, label, rows, transposed=False)
        stored = self.weights.quantized(f"{module}.weight").values
        attributes = {"fp8_bytes": int(self._are_bytes(stored.dtype))}
        (product,) = self.builder.contract(
            QUANTIZED_PROJECTION, [value, codes, scale], attributes, f"{label}.matmul"
        )
        return product

    def _matrix(self, module: str, label: str, rows: tuple[int, int]) -> str:
        """Dequantized [in, out] matrix; TensorRT keeps the codes."""
        codes, scale = self._row_weights(module, label, rows, transposed=True)
        return self._dequantized([codes, scale], f"{label}.dequantize", 1)

    def _dequantized(self, inputs: list[str], label: str, axis: int | None) -> str:
        attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
        return self.builder.node(
            "DequantizeLinear", inputs, label, output_dtype=self.dtype.onnx, **attributes
        )

    def _row_weights(
        self, module: str, label: str, rows: tuple[int, int], *, transposed: bool
    ) -> tuple[str, str]:
        """Add the codes of some rows, [out, in] or [in, out], and their scales [out]."""
        first, last = rows
        name = self.builder.scoped(label)
        quantized = self.weights.quantized(f"{module}.weight")
        in_features = quantized.values.shape[1]
        dtype = self._in_graph(quantized.values.dtype)

        def chunks() -> Iterator[AnyArray]:
            stored = self.weights.codes(f"{module}.weight", rows)
            yield np.ascontiguousarray(stored.T if transposed else stored).view(dtype)

        shape = (last - first, in_features)
        codes = LazyInitializer(
            name=name,
            shape=shape[::-1] if transposed else shape,
            dtype=dtype,
            chunks=chunks,
        )
        scales = np.ascontiguousarray(row_scales(quantized)[first:last, 0])
        return self.builder.weight(codes), self.builder.weight(from_array(f"{name}.scale", scales))

    def _stacked(
        self,
        modules: list[list[str]],
        shape: tuple[int, int],
        label: str,
        number_format: NumberFormat,
    ) -> list[str]:
        """Stack codes [E, rows, in] and scales [E, rows], the rows of each expert alternating."""
        name = self.builder.scoped(label)
        code_dtype = self._in_graph(number_format.dtype)

        def stack(*, scales: bool) -> Iterator[AnyArray]:
            for parts in modules:
                dtype = np.dtype(np.float32) if scales else number_format.dtype
                stacked = np.empty(shape[:1] if scales else shape, dtype=dtype)
                for index, part in enumerate(parts):
                    weight = f"{part}.weight"
                    if scales:
                        values = row_scales(self.weights.quantized(weight))[:, 0]
                    else:
                        values = self.weights.codes(weight)
                    stacked[index :: len(parts)] = values
                yield stacked if scales else stacked.view(code_dtype)

        codes = LazyInitializer(
            name=name,
            shape=(len(modules), *shape),
            dtype=code_dtype,
            chunks=lambda: stack(scales=False),
        )
        scale = LazyInitializer(
            name=f"{name}.scale",
            shape=(len(modules), shape[0]),
            dtype=np.dtype(np.float32),
            chunks=lambda: stack(scales=True),
        )
        return [self.builder.weight(codes), self.builder.weight(scale)]
