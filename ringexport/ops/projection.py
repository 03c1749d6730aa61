"""Contracts of projections with 8-bit weights."""

import numpy as np
import numpy.typing as npt

from ringexport.ops.spec import Attributes, OpSpec, TensorArg
from ringexport.tensors import match

__all__ = ["FP8_QUANTIZE", "INT8_PROJECTION", "int8_block_size", "int8_projection"]

FloatArray = npt.NDArray[np.float32]

INT8_ZERO = 128
"""Weights are stored as unsigned codes around this value."""

FP8_MAX = 448.0
LARGEST_BLOCK = 64
"""Inputs that share a scale. On ring-nano 64 has 15 % less KL than 128, and 32 not less again."""

SMALLEST_BLOCK = 16


def int8_block_size(*in_features: int) -> int | None:
    """Return the largest block of 16 to 64 that divides all of `in_features`, None without one."""
    size = LARGEST_BLOCK
    while size >= SMALLEST_BLOCK:
        if all(count % size == 0 for count in in_features):
            return size
        size //= 2
    return None


def int8_projection(
    hidden: FloatArray, weight: npt.NDArray[np.uint8], weight_scale: FloatArray
) -> FloatArray:
    """Multiply by an int8 weight: inputs are rounded to int8 per block, sums are exact.

    Args:
        hidden: [N, blocks * size].
        weight: [out, blocks, size] codes, real = (code - 128) * weight_scale.
        weight_scale: [out, blocks], or [out, 1] for all blocks of a row.

    Returns:
        output [N, out] fp32.
    """
    dims = match("weight_scale", weight_scale, "out _", match("weight", weight, "out blocks _"))
    weight_scale = np.broadcast_to(weight_scale, (dims["out"], dims["blocks"]))
    blocks = hidden.reshape(len(hidden), dims["blocks"], -1)
    input_scale = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    codes = np.rint(blocks / np.where(input_scale == 0, 1, input_scale))
    sums = np.einsum("nbs,obs->nob", codes, weight.astype(np.float64) - INT8_ZERO)
    output: FloatArray = np.zeros((len(hidden), dims["out"]), dtype=np.float32)
    output += np.einsum("nob,ob,nb->no", sums, weight_scale, input_scale[..., 0])
    return output


def _int8_body(attributes: Attributes) -> str:
    del attributes  # referenced: every projection has sizes of its own
    # The op wants a scale per block. A session spreads those of rows once, when it starts.
    return """
    row_blocks = Shape <start = 0, end = 2> (weight)
    block_scale = Expand (weight_scale, row_blocks)
    output = com.microsoft.MatMulNBits <
        K : int = @in_features, N : int = @out_features, block_size : int = @block_size,
        bits = 8, accuracy_level = 4
    > (hidden, weight, block_scale)
    """


def _fp8_body(attributes: Attributes) -> str:
    del attributes
    # Quantized and cast back, not QuantizeLinear and DequantizeLinear: ONNX Runtime would fuse
    # that pair with the product into an integer one, which does not take FP8.
    return f"""
    last_axis = Constant <value_ints = [-1]> ()
    magnitude = Abs (hidden)
    largest = ReduceMax <keepdims = 1> (magnitude, last_axis)
    limit = Constant <value = float {{{FP8_MAX}}}> ()
    fitted = Div (largest, limit)
    smallest = Constant <value = float {{1e-30}}> ()
    input_scale = Max (fitted, smallest)
    scaled = Div (hidden, input_scale)
    codes = Cast <to = 17, saturate = 1> (scaled)
    rounded = Cast <to = 1> (codes)
    output = Mul (rounded, input_scale)
    """


INT8_PROJECTION = OpSpec(
    name="RingInt8Projection",
    summary="Product with int8 weights; the input is quantized to int8 per block, dynamically.",
    inputs=(
        TensorArg(
            name="hidden", shape="... C*S", dtype="float", text="input of C blocks of size S"
        ),
        TensorArg(name="weight", shape="O C S", dtype="uint8", text="codes, 128 is zero"),
        TensorArg(
            name="weight_scale", shape="O C", dtype="fp32", text="real = code * scale; O 1: per row"
        ),
    ),
    outputs=(TensorArg(name="output", shape="... O", dtype="float", text="product"),),
    attributes={
        "in_features": "C * S",
        "out_features": "O",
        "block_size": "S, a power of two from 16",
    },
    function_body=_int8_body,
    references_attributes=True,
)

FP8_QUANTIZE = OpSpec(
    name="RingFp8Quantize",
    summary="Round every token to FP8-E4M3 under its own scale, and return real numbers.",
    inputs=(TensorArg(name="hidden", shape="... D", dtype="fp32", text="input of a projection"),),
    outputs=(TensorArg(name="output", shape="... D", dtype="fp32", text="rounded input"),),
    attributes={},
    function_body=_fp8_body,
)
