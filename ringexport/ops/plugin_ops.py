"""Contracts of the 8-bit ops that only plugins implement: no function of ONNX ops defines them.

Weights are int8 or FP8-E4M3 with one scale per output row; the inputs are quantized inside the op
to the same format, with one scale per token. TensorRT has FP8 tensors on GPUs from sm_89 on only,
while the kernels decode FP8 everywhere: older GPUs get the codes as bytes, `fp8_bytes`.
"""

from dataclasses import replace
from enum import StrEnum, auto
from functools import partial

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ringexport.ops.attention import ATTENTION
from ringexport.ops.linear_attention import LINEAR_ATTENTION
from ringexport.ops.moe import EXPERTS, ROUTER
from ringexport.ops.quantization import GranularityKind, NumberFormat
from ringexport.ops.schemes import ActivationMode, ModuleScheme
from ringexport.ops.spec import Attributes, OpSpec, TensorArg
from ringexport.tensors import match

__all__ = [
    "PLUGIN_CONTRACTS",
    "QUANTIZED_EXPERTS",
    "QUANTIZED_PROJECTION",
    "ProjectionForm",
    "experts_fit_plugin",
    "is_per_row",
    "projection_form",
    "quantize_tokens",
    "quantized_experts",
    "quantized_projection",
]

FloatArray = npt.NDArray[np.float32]
CodeArray = npt.NDArray[np.generic]

SMALLEST_SCALE = np.finfo(np.float32).eps
"""Of a token of zeros."""


class ProjectionForm(StrEnum):
    """How a TensorRT engine computes a projection of a quantized checkpoint.

    STATIC: TensorRT's own product of codes, inputs quantized with the static scale.
    PER_TOKEN: RingQuantizedProjection.
    WEIGHT_ONLY: the weights stay codes, the product is that of the activation dtype.
    DEQUANTIZED: weights in the activation dtype.
    """

    STATIC = auto()
    PER_TOKEN = auto()
    WEIGHT_ONLY = auto()
    DEQUANTIZED = auto()


def projection_form(
    scheme: ModuleScheme, in_features: int, out_features: int, *, has_fp8: bool
) -> ProjectionForm:
    """Choose the form of a projection.

    Args:
        scheme: of the module.
        in_features, out_features: of the matrix.
        has_fp8: every GPU that the engine is for has FP8 in TensorRT. Elsewhere FP8 modules whose
            inputs are quantized go to the plugin, the others are dequantized.
    """
    weights, inputs = scheme.weights, scheme.activations
    if weights is None or not is_per_row(scheme):
        return ProjectionForm.DEQUANTIZED
    fits = in_features % 64 == 0 and out_features % 16 == 0
    is_static = inputs is not None and inputs.mode is ActivationMode.STATIC
    per_token = inputs is not None and inputs.granularity.kind is GranularityKind.TOKEN
    if weights.format is NumberFormat.FP8_E4M3 and not has_fp8:
        runs = fits and (is_static or per_token)
        return ProjectionForm.PER_TOKEN if runs else ProjectionForm.DEQUANTIZED
    if is_static:
        return ProjectionForm.STATIC
    return ProjectionForm.PER_TOKEN if fits and per_token else ProjectionForm.WEIGHT_ONLY


def is_per_row(scheme: ModuleScheme) -> bool:
    """Tell whether the weights have one scale per row, or one for all rows."""
    return scheme.weights is not None and scheme.weights.granularity.kind in {
        GranularityKind.TENSOR,
        GranularityKind.CHANNEL,
    }


def experts_fit_plugin(hidden_size: int, intermediate_size: int) -> bool:
    """Tell whether RingExperts and RingQuantizedExperts have kernels for these experts."""
    return hidden_size % 128 == 0 and intermediate_size % 32 == 0


def quantize_tokens(
    hidden: FloatArray, number_format: NumberFormat
) -> tuple[CodeArray, FloatArray]:
    """Round every row to 8 bits under its own scale.

    Args:
        hidden: [N, D].
        number_format: of the codes; its `half_range` is what the largest magnitude becomes.

    Returns:
        codes [N, D] and input_scale [N, 1] fp32, real = codes * input_scale.
    """
    limit = np.float32(number_format.half_range)
    scale = np.abs(hidden).max(axis=-1, keepdims=True, initial=0.0).astype(np.float32) / limit
    scale = np.where(scale == 0, SMALLEST_SCALE, scale).astype(np.float32)
    scaled = hidden.astype(np.float32) / scale
    if number_format is NumberFormat.INT8:
        return np.clip(np.rint(scaled), -128, 127).astype(np.int8), scale
    return np.clip(scaled, -limit, limit).astype(number_format.dtype), scale


def quantized_projection(
    hidden: FloatArray, weight: CodeArray, weight_scale: FloatArray, *, fp8_bytes: bool = False
) -> FloatArray:
    """Multiply by an 8-bit weight; inputs are quantized per token to the format of the weight.

    Args:
        hidden: [N, D].
        weight: [O, D] int8 or FP8-E4M3.
        weight_scale: [O].
        fp8_bytes: `weight` is int8 and holds the bytes of FP8-E4M3 codes.

    Returns:
        output [N, O] fp32.

    Raises:
        ShapeError: named dimensions disagree.
    """
    dims = match("weight", weight, "O D", match("hidden", hidden, "N D"))
    match("weight_scale", weight_scale, "O", dims)
    if fp8_bytes:
        weight = weight.view(NumberFormat.FP8_E4M3.dtype)
    codes, input_scale = quantize_tokens(hidden, _format(weight))
    sums = codes.astype(np.float64) @ weight.astype(np.float64).T
    output: FloatArray = (sums * input_scale * weight_scale).astype(np.float32)
    return output


def quantized_experts(
    hidden: FloatArray,
    routing: tuple[npt.NDArray[np.integer], FloatArray],
    gate_up: tuple[CodeArray, FloatArray],
    down: tuple[CodeArray, FloatArray],
    *,
    fp8_bytes: bool = False,
) -> FloatArray:
    """Sum the routed SwiGLU experts of each token, in 8 bits.

    Args:
        hidden: [N, D].
        routing: expert_ids and routing_weights [N, k].
        gate_up: gate_up_proj [E, 2*I, D], whose rows alternate gate and up, and its scale [E, 2*I].
        down: down_proj [E, D, I] and its scale [E, D].
        fp8_bytes: both matrices are int8 and hold the bytes of FP8-E4M3 codes.

    Returns:
        output [N, D] fp32. The product of gate and up is quantized per token and expert again.
    """
    expert_ids, routing_weights = routing
    match("routing_weights", routing_weights, "N k", match("hidden", hidden, "N D"))
    output: FloatArray = np.zeros(hidden.shape, dtype=np.float32)
    multiply = partial(quantized_projection, fp8_bytes=fp8_bytes)
    for expert in np.unique(expert_ids):
        tokens, slots = np.nonzero(expert_ids == expert)
        both = multiply(hidden[tokens], gate_up[0][expert], gate_up[1][expert])
        gate, up = both[:, 0::2], both[:, 1::2]
        inner = (gate / (1.0 + np.exp(-gate)) * up).astype(np.float32)
        made = multiply(inner, down[0][expert], down[1][expert])
        np.add.at(output, tokens, routing_weights[tokens, slots][:, None] * made)
    return output


def _format(weight: CodeArray) -> NumberFormat:
    is_fp8 = weight.dtype == ml_dtypes.float8_e4m3fn
    return NumberFormat.FP8_E4M3 if is_fp8 else NumberFormat.INT8


def _no_body(attributes: Attributes) -> str:
    del attributes
    return ""


_FP8_BYTES = {"fp8_bytes": "1: int8 weights are the bytes of FP8-E4M3 codes; else 0"}

QUANTIZED_PROJECTION = OpSpec(
    name="RingQuantizedProjection",
    summary="Product with 8-bit weights; inputs are quantized per token (plugins only).",
    inputs=(
        TensorArg(name="hidden", shape="... D", dtype="float", text="input"),
        TensorArg(name="weight", shape="O D", dtype="code", text="int8 or FP8-E4M3"),
        TensorArg(name="weight_scale", shape="O", dtype="fp32", text="real = code * scale"),
    ),
    outputs=(TensorArg(name="output", shape="... O", dtype="float", text="product"),),
    attributes=_FP8_BYTES,
    function_body=_no_body,
)

QUANTIZED_EXPERTS = OpSpec(
    name="RingQuantizedExperts",
    summary="RingExperts with 8-bit weights; inputs are quantized per token (plugins only).",
    inputs=(
        *EXPERTS.inputs[:3],
        TensorArg(name="gate_up_proj", shape="E 2*I D", dtype="code", text="rows alternate"),
        TensorArg(name="gate_up_scale", shape="E 2*I", dtype="fp32", text="real = code * scale"),
        TensorArg(name="down_proj", shape="E D I", dtype="code", text="down projections"),
        TensorArg(name="down_scale", shape="E D", dtype="fp32", text="real = code * scale"),
    ),
    outputs=EXPERTS.outputs,
    attributes={**EXPERTS.attributes, **_FP8_BYTES},
    function_body=_no_body,
    sizes=EXPERTS.sizes,
)


def _plugin_form(spec: OpSpec) -> OpSpec:
    """Return the contract as a plugin has it.

    TensorRT's plugins take no int64, so that expert ids are int32. The router's matrix has one row
    per expert, as the kernel reads it.
    """

    def adapted(arg: TensorArg) -> TensorArg:
        if arg.name == "router_weight":
            return replace(arg, shape="E D", text="router")
        return replace(arg, dtype="int32") if arg.dtype == "int64" else arg

    return replace(
        spec,
        inputs=tuple(adapted(arg) for arg in spec.inputs),
        outputs=tuple(adapted(arg) for arg in spec.outputs),
    )


PLUGIN_CONTRACTS = tuple(
    _plugin_form(spec)
    for spec in (
        LINEAR_ATTENTION,
        ATTENTION,
        ROUTER,
        EXPERTS,
        QUANTIZED_EXPERTS,
        QUANTIZED_PROJECTION,
    )
)
"""Every op that the TensorRT plugins implement, in the form in which they take it."""
