"""Contract of grouped-query softmax attention over an in-place KV cache."""

import numpy as np
import numpy.typing as npt

from ringexport.ops.spec import Attributes, OpSpec, TensorArg
from ringexport.tensors import match

__all__ = ["ATTENTION", "attention"]

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]


def attention(
    query: FloatArray,
    key: FloatArray,
    value: FloatArray,
    cache: tuple[FloatArray, FloatArray],
    position: IntArray,
    lengths: IntArray,
    *,
    softmax_scale: float,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Append key and value to the cache and attend causally to everything in it.

    Args:
        query: [B, T, H, K].
        key, value: [B, T, KV, K]; head h of the query reads head h // (H / KV).
        cache: past_key and past_value, each [B, KV, S, K], S the capacity; not modified.
        position: [B] tokens already in the cache.
        lengths: [B] valid new tokens of each row.
        softmax_scale: factor on the scores, normally K ** -0.5.

    Returns:
        output [B, T, H, K] (zero at padding), present_key and present_value [B, KV, S, K].

    Raises:
        ShapeError: named dimensions disagree.
    """
    dims = match("query", query, "B T H K")
    dims = match("key", key, "B T KV K", dims)
    match("value", value, "B T KV K", dims)
    past_key, past_value = cache
    match("past_value", past_value, "B KV S K", match("past_key", past_key, "B KV S K", dims))
    group = dims["H"] // dims["KV"]
    present_key, present_value = past_key.copy(), past_value.copy()
    output = np.zeros(query.shape, dtype=np.float32)
    for row in range(dims["B"]):
        start, count = int(position[row]), int(lengths[row])
        present_key[row, :, start : start + count] = key[row, :count].swapaxes(0, 1)
        present_value[row, :, start : start + count] = value[row, :count].swapaxes(0, 1)
        for token in range(count):
            seen = start + token + 1
            keys = np.repeat(present_key[row, :, :seen], group, axis=0)
            values = np.repeat(present_value[row, :, :seen], group, axis=0)
            scores = np.einsum("hk,hsk->hs", query[row, token], keys) * softmax_scale
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            output[row, token] = np.einsum("hs,hsk->hk", weights, values)
    return output, present_key, present_value


def _function_body(attributes: Attributes) -> str:
    return f"""
    one = Constant <value = int32 {{1}}> ()
    total = Add (position, lengths)
    last = Sub (total, one)
    longest = ReduceMax <keepdims = 0> (total)
    output, present_key, present_value = com.microsoft.GroupQueryAttention <
        num_heads = {attributes["num_heads"]}, kv_num_heads = {attributes["num_kv_heads"]},
        scale = {attributes["softmax_scale"]:.9g}
    > (query, key, value, past_key, past_value, last, longest)
    """


ATTENTION = OpSpec(
    name="RingAttention",
    summary="Causal grouped-query softmax attention that appends to a cache of fixed capacity.",
    inputs=(
        TensorArg(name="query", shape="B T H*K", dtype="float", text="normed and rotated query"),
        TensorArg(name="key", shape="B T KV*K", dtype="float", text="normed and rotated key"),
        TensorArg(name="value", shape="B T KV*K", dtype="float", text="value"),
        TensorArg(name="past_key", shape="B KV S K", dtype="float", text="cache of capacity S"),
        TensorArg(name="past_value", shape="B KV S K", dtype="float", text="cache of capacity S"),
        TensorArg(name="position", shape="B", dtype="int32", text="tokens already in the cache"),
        TensorArg(name="lengths", shape="B", dtype="int32", text="valid tokens of each row"),
    ),
    outputs=(
        TensorArg(name="output", shape="B T H*K", dtype="float", text="attention output"),
        TensorArg(
            name="present_key",
            shape="B KV S K",
            dtype="float",
            text="in place",
            alias="past_key",
        ),
        TensorArg(
            name="present_value",
            shape="B KV S K",
            dtype="float",
            text="in place",
            alias="past_value",
        ),
    ),
    attributes={
        "num_heads": "H",
        "num_kv_heads": "KV",
        "softmax_scale": "factor on the scores, K ** -0.5",
    },
    function_body=_function_body,
    sizes={"H": "num_heads", "KV": "num_kv_heads"},
    reals=frozenset({"softmax_scale"}),
)
