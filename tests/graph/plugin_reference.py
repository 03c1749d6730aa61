"""Run a graph that was lowered for TensorRT in ONNX's reference evaluator, plugins by contract."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from ringexport.ops.attention import attention
from ringexport.ops.linear_attention import linear_attention
from ringexport.ops.moe import Routing, experts, router
from ringexport.ops.plugin_ops import quantized_experts, quantized_projection

__all__ = ["run_lowered"]

Array = npt.NDArray[Any]


def _f32(array: Array) -> npt.NDArray[np.float32]:
    return np.asarray(array).astype(np.float32)


def _heads(array: Array, count: int) -> npt.NDArray[np.float32]:
    return _f32(array).reshape(*array.shape[:2], count, -1)


def _unwritten(output: Array, lengths: Array) -> Array:
    """Return an output as kernels leave it, which do not write to padding."""
    padding = np.arange(output.shape[1])[None, :, None] >= lengths[:, None, None]
    return np.where(padding, output.dtype.type(np.nan), output)


class RingLinearAttention(OpRun):
    op_domain = "ringexport"

    def _run(self, query, key, value, past, decay, lengths, num_heads, query_scale):  # type: ignore[no-untyped-def]  # noqa: PLR0917
        parts = [_heads(part, num_heads) for part in (query, key, value)]
        output, state = linear_attention(*parts, past, decay, lengths, query_scale=query_scale)
        return _unwritten(output.reshape(value.shape).astype(value.dtype), lengths), state


class RingAttention(OpRun):
    op_domain = "ringexport"

    def _run(  # type: ignore[no-untyped-def]
        self, query, key, value, past_key, past_value, position, lengths, **attributes
    ):
        heads, kv_heads = attributes["num_heads"], attributes["num_kv_heads"]
        output, *cache = attention(
            _heads(query, heads),
            _heads(key, kv_heads),
            _heads(value, kv_heads),
            (_f32(past_key), _f32(past_value)),
            position,
            lengths,
            softmax_scale=attributes["softmax_scale"],
        )
        shaped = output.reshape(query.shape).astype(query.dtype)
        cached = (part.astype(past_key.dtype) for part in cache)
        return _unwritten(shaped, lengths), *cached


class RingRouter(OpRun):
    op_domain = "ringexport"

    def _run(self, hidden, weight, bias, **attributes):  # type: ignore[no-untyped-def]
        routing = Routing(**attributes | {"normalize": bool(attributes["normalize"])})
        ids, weights = router(_f32(hidden), weight.T, bias, routing)
        return ids.astype(np.int32), weights


class RingExperts(OpRun):
    op_domain = "ringexport"

    def _run(self, hidden, ids, weights, gate_up, down, num_experts, top_k):  # type: ignore[no-untyped-def]
        del num_experts, top_k
        output = experts(_f32(hidden), ids, weights, _f32(gate_up), _f32(down))
        return (output.astype(hidden.dtype),)


class RingQuantizedExperts(OpRun):
    op_domain = "ringexport"

    def _run(  # type: ignore[no-untyped-def]
        self, hidden, ids, weights, gate_up, gate_up_scale, down, down_scale, **attributes
    ):
        output = quantized_experts(
            _f32(hidden),
            (ids, weights),
            (gate_up, gate_up_scale),
            (down, down_scale),
            fp8_bytes=bool(attributes["fp8_bytes"]),
        )
        return (output.astype(hidden.dtype),)


class RingQuantizedProjection(OpRun):
    op_domain = "ringexport"

    def _run(self, hidden, weight, scale, fp8_bytes):  # type: ignore[no-untyped-def]
        flat = _f32(hidden).reshape(-1, hidden.shape[-1])
        output = quantized_projection(flat, weight, scale, fp8_bytes=bool(fp8_bytes))
        return (output.reshape(*hidden.shape[:-1], -1).astype(hidden.dtype),)


class GatherND(OpRun):
    """ONNX's own, with batch_dims: the evaluator's takes minutes for it."""

    def _run(self, data, indices, batch_dims=1):  # type: ignore[no-untyped-def]
        assert batch_dims == 1
        return (np.take_along_axis(data, indices, axis=1),)


class RMSNormalization(OpRun):
    """ONNX's own, with statistics in fp32: the evaluator's are in the dtype of the input."""

    def _run(self, values, scale, axis=-1, epsilon=1e-5, stash_type=1):  # type: ignore[no-untyped-def]
        assert (axis, stash_type) == (-1, 1)
        real = _f32(values)
        real /= np.sqrt((real**2).mean(axis=-1, keepdims=True) + epsilon)
        return ((real.astype(values.dtype) * scale).astype(values.dtype),)


PLUGINS = [
    GatherND,
    RMSNormalization,
    RingLinearAttention,
    RingAttention,
    RingRouter,
    RingExperts,
    RingQuantizedExperts,
    RingQuantizedProjection,
]


def run_lowered(model: onnx.ModelProto, inputs: dict[str, Array]) -> dict[str, Array]:
    """Return the outputs of a model by name."""
    evaluator = ReferenceEvaluator(model, new_ops=PLUGINS)
    return dict(zip(evaluator.output_names, evaluator.run(None, inputs), strict=True))
