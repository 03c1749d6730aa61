"""Lower a graph of ONNX Runtime for its CUDA provider: softmax attention that stays on the GPU.

Needs: a lowered model, whose nodes of RingAttention all have the same attributes.
Guarantees: the same values. The nodes take a further input, the graph input `total_length` (int32
[1], tokens of the longest row behind the call), which lies in host memory: a length computed on the
GPU would have to come back in every layer before the kernel can be chosen. GroupQueryAttention has
no fp32 kernel there, so fp32 graphs spell attention out.
"""

from collections.abc import Callable

import onnx
import onnx.parser

from ringexport.ops.attention import ATTENTION
from ringexport.ops.spec import DOMAIN, OPSET

__all__ = ["TOTAL_LENGTH", "lower_cuda"]

TOTAL_LENGTH = "total_length"
Attributes = dict[str, int | float]


def lower_cuda(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with attention for the CUDA provider; the given one stays as it is."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    nodes = [node for node in graph.node if (node.domain, node.op_type) == (DOMAIN, ATTENTION.name)]
    if not nodes:
        return changed
    for node in nodes:
        node.input.append(TOTAL_LENGTH)
    shape = onnx.helper.make_tensor_value_info(TOTAL_LENGTH, onnx.TensorProto.INT32, [1])
    graph.input.append(shape)
    cache = next(info for info in graph.input if info.name == nodes[0].input[3])
    wide = cache.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    attributes = {
        entry.name: onnx.helper.get_attribute_value(entry) for entry in nodes[0].attribute
    }
    text = _function(attributes, _spelled_out if wide else _grouped)
    function = next(one for one in changed.functions if one.name == ATTENTION.name)
    function.CopyFrom(onnx.parser.parse_function(text))
    return changed


def _function(attributes: Attributes, body: Callable[[Attributes], str]) -> str:
    inputs = ", ".join([*(arg.name for arg in ATTENTION.inputs), TOTAL_LENGTH])
    outputs = ", ".join(arg.name for arg in ATTENTION.outputs)
    return (
        f'<opset_import: ["" : {OPSET}, "com.microsoft" : 1], domain: "{DOMAIN}">\n'
        f"{ATTENTION.name} ({inputs}) => ({outputs})\n{{\n{body(attributes)}\n}}"
    )


def _grouped(attributes: Attributes) -> str:
    return f"""
    one = Constant <value = int32 {{1}}> ()
    total = Add (position, lengths)
    last = Sub (total, one)
    output, present_key, present_value = com.microsoft.GroupQueryAttention <
        num_heads = {attributes["num_heads"]}, kv_num_heads = {attributes["num_kv_heads"]},
        scale = {attributes["softmax_scale"]:.9g}
    > (query, key, value, past_key, past_value, last, {TOTAL_LENGTH})
    """


def _spelled_out(attributes: Attributes) -> str:
    """Write the new keys and values into the cache, and attend to its first `total_length` slots.

    Rows are padded only where no row has a past (the runner sees to that): what padding writes
    into the cache lies behind the tokens of its row, where nobody looks before it is overwritten.
    """
    kv_heads = int(attributes["num_kv_heads"])
    group = int(attributes["num_heads"]) // kv_heads
    return f"""
    zero = Constant <value = int64 {{0}}> ()
    one = Constant <value = int64 {{1}}> ()
    axis_0 = Constant <value_ints = [0]> ()
    axis_1 = Constant <value_ints = [1]> ()
    axis_2 = Constant <value_ints = [2]> ()
    axes_1_2 = Constant <value_ints = [1, 2]> ()
    axes_1_3 = Constant <value_ints = [1, 3]> ()
    split = Constant <value_ints = [0, 0, {kv_heads}, -1]> ()
    key_split = Reshape (key, split)
    key_heads = Transpose <perm = [0, 2, 1, 3]> (key_split)
    value_split = Reshape (value, split)
    value_heads = Transpose <perm = [0, 2, 1, 3]> (value_split)
    count = Shape <start = 1, end = 2> (key)
    num_tokens = Squeeze (count, axis_0)
    index = Range (zero, num_tokens, one)
    start = Cast <to = 7> (position)
    start_column = Unsqueeze (start, axis_1)
    slot = Add (start_column, index)
    slot_column = Unsqueeze (slot, axes_1_3)
    heads_shape = Shape (key_heads)
    slots = Expand (slot_column, heads_shape)
    present_key = ScatterElements <axis = 2> (past_key, slots, key_heads)
    present_value = ScatterElements <axis = 2> (past_value, slots, value_heads)
    first = Constant <value = int32[1] {{0}}> ()
    time = Constant <value = int32[1] {{2}}> ()
    keys = Slice (present_key, first, {TOTAL_LENGTH}, time)
    values = Slice (present_value, first, {TOTAL_LENGTH}, time)
    keys_of_group = Unsqueeze (keys, axis_2)
    values_of_group = Unsqueeze (values, axis_2)
    keys_transposed = Transpose <perm = [0, 1, 2, 4, 3]> (keys_of_group)
    query_shape = Constant <value_ints = [0, 0, {kv_heads}, {group}, -1]> ()
    query_split = Reshape (query, query_shape)
    query_heads = Transpose <perm = [0, 2, 3, 1, 4]> (query_split)
    scale = Constant <value = float {{{attributes["softmax_scale"]:.9g}}}> ()
    query_scaled = Mul (query_heads, scale)
    scores = MatMul (query_scaled, keys_transposed)
    key_count = Shape <start = 2, end = 3> (keys)
    num_keys = Squeeze (key_count, axis_0)
    key_index = Range (zero, num_keys, one)
    slot_rows = Unsqueeze (slot, axis_2)
    later = Greater (key_index, slot_rows)
    later_of_heads = Unsqueeze (later, axes_1_2)
    never = Constant <value = float {{-1e30}}> ()
    masked = Where (later_of_heads, never, scores)
    weights = Softmax <axis = -1> (masked)
    mixed = MatMul (weights, values_of_group)
    mixed_tokens = Transpose <perm = [0, 3, 1, 2, 4]> (mixed)
    merged = Constant <value_ints = [0, 0, -1]> ()
    output = Reshape (mixed_tokens, merged)
    """
