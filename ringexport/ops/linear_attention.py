"""Contract of the linear-attention recurrence (lightning attention, "simple GLA")."""

import numpy as np
import numpy.typing as npt

from ringexport.ops.spec import Attributes, OpSpec, TensorArg
from ringexport.tensors import match

__all__ = ["LINEAR_ATTENTION", "MASKED_LINEAR_ATTENTION", "TOKEN_MASK", "linear_attention"]

FloatArray = npt.NDArray[np.float32]


def linear_attention(
    query: FloatArray,
    key: FloatArray,
    value: FloatArray,
    past_state: FloatArray,
    log_decay: FloatArray,
    lengths: npt.NDArray[np.int32],
    *,
    query_scale: float,
) -> tuple[FloatArray, FloatArray]:
    """Run the recurrence token by token: S = exp(log_decay) S + k v^T, o = query_scale q^T S.

    Args:
        query, key: [B, T, H, K].
        value: [B, T, H, V].
        past_state: [B, H, K, V] fp32; not modified.
        log_decay: [H] fp32, natural log per token, <= 0.
        lengths: [B]; tokens from `lengths` on are padding: they leave the state alone, and their
            output is defined by no one.
        query_scale: factor on the query, normally K ** -0.5.

    Returns:
        output [B, T, H, V] and present_state [B, H, K, V], both fp32.

    Raises:
        ShapeError: named dimensions disagree.

    Source: ONNX LinearAttention-27, update_rule "gated"; inclusionAI/Ring-V2.5@c7facea
    `modeling_bailing_moe_v2_5.py`.
    """
    dims = match("query", query, "B T H K")
    dims = match("key", key, "B T H K", dims)
    dims = match("value", value, "B T H V", dims)
    match("past_state", past_state, "B H K V", dims)
    match("log_decay", log_decay, "H", dims)
    match("lengths", lengths, "B", dims)
    state = past_state.astype(np.float32, copy=True)
    output = np.zeros(value.shape, dtype=np.float32)
    # exp() of a slow head's decay, rounded to fp32, is off by up to 1.5e-4 of its log.
    shrink = np.expm1(log_decay)[:, None, None]
    for row, length in enumerate(lengths):
        for token in range(int(length)):
            state[row] += shrink * state[row]
            state[row] += key[row, token, :, :, None] * value[row, token, :, None, :]
            output[row, token] = query_scale * np.einsum(
                "hk,hkv->hv", query[row, token], state[row]
            )
    return output, state


def _mask_body(tokens: str) -> str:
    """Return the body that computes the mask [B, T, 1] for a value [B, T, ...]."""
    return f"""
    time_axis = Constant <value = int64 {{1}}> ()
    mask_axis = Constant <value_ints = [-1]> ()
    rows_axis = Constant <value_ints = [1]> ()
    zero = Constant <value = int64 {{0}}> ()
    one = Constant <value = int64 {{1}}> ()
    tokens_shape = Shape ({tokens})
    num_tokens = Gather (tokens_shape, time_axis)
    index = Range (zero, num_tokens, one)
    lengths_long = Cast <to = 7> (lengths)
    rows = Unsqueeze (lengths_long, rows_axis)
    is_token = Less (index, rows)
    is_token_float = Cast <to = 1> (is_token)
    mask = Unsqueeze (is_token_float, mask_axis)
    """


def _masked_body(attributes: Attributes) -> str:
    heads, scale = attributes["num_heads"], attributes["query_scale"]
    return f"""
    decay = Mul (mask, log_decay)
    query_float = Cast <to = 1> (query)
    key_float = Cast <to = 1> (key)
    value_float = Cast <to = 1> (value)
    key_masked = Mul (key_float, mask)
    output_float, present_state = com.microsoft.LinearAttention <
        update_rule = "gated", q_num_heads = {heads}, kv_num_heads = {heads}, scale = {scale:.9g}
    > (query_float, key_masked, value_float, past_state, decay)
    output = CastLike (output_float, query)
    """


def _function_body(attributes: Attributes) -> str:
    return _mask_body("query") + _masked_body(attributes)


LINEAR_ATTENTION = OpSpec(
    name="RingLinearAttention",
    summary="Linear attention with a constant-size state and one decay per head.",
    inputs=(
        TensorArg(name="query", shape="B T H*K", dtype="float", text="normed and rotated query"),
        TensorArg(name="key", shape="B T H*K", dtype="float", text="normed and rotated key"),
        TensorArg(name="value", shape="B T H*V", dtype="float", text="value"),
        TensorArg(name="past_state", shape="B H K V", dtype="fp32", text="state before"),
        TensorArg(
            name="log_decay", shape="H", dtype="fp32", text="log of the decay per token, <= 0"
        ),
        TensorArg(name="lengths", shape="B", dtype="int32", text="valid tokens of each row"),
    ),
    outputs=(
        TensorArg(name="output", shape="B T H*V", dtype="float", text="attention output"),
        TensorArg(
            name="present_state",
            shape="B H K V",
            dtype="fp32",
            text="state after, in place",
            alias="past_state",
        ),
    ),
    attributes={"num_heads": "H", "query_scale": "factor on the query, K ** -0.5"},
    function_body=_function_body,
    sizes={"H": "num_heads"},
    reals=frozenset({"query_scale"}),
)

TOKEN_MASK = OpSpec(
    name="RingTokenMask",
    summary="1 at tokens and 0 at padding, for all linear layers of a graph of ONNX Runtime.",
    inputs=(
        TensorArg(name="tokens", shape="B T", dtype="int64", text="token ids, right padded"),
        LINEAR_ATTENTION.inputs[-1],
    ),
    outputs=(TensorArg(name="mask", shape="B T 1", dtype="fp32", text="of the tokens"),),
    attributes={},
    function_body=lambda _: _mask_body("tokens"),
)

MASKED_LINEAR_ATTENTION = OpSpec(
    name="RingMaskedLinearAttention",
    summary="RingLinearAttention with the mask of the tokens instead of their number.",
    inputs=(
        *LINEAR_ATTENTION.inputs[:-1],
        TensorArg(name="mask", shape="B T 1", dtype="fp32", text="from RingTokenMask"),
    ),
    outputs=LINEAR_ATTENTION.outputs,
    attributes=LINEAR_ATTENTION.attributes,
    function_body=_masked_body,
)
