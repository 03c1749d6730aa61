"""Lower the portable graph for TensorRT: contract ops stay nodes, which plugins implement."""

from functools import partial
from pathlib import Path

import onnx

from ringexport.checkpoint.weights import CheckpointWeights
from ringexport.errors import GraphError
from ringexport.graph.export import GRAPH_FILE, WEIGHTS_FILE, GraphInfo, check_graph
from ringexport.graph.initializers import ComputeDtype
from ringexport.graph.network import Network, build_network
from ringexport.graph.passes.plugin_form import plugin_weights
from ringexport.graph.save import write_weights
from ringexport.graph.tensorrt_emitter import TensorRtEmitter
from ringexport.ops.decay import DecayIndex
from ringexport.ops.spec import DOMAIN, OPSET
from ringexport.progress import NoProgress, Progress

__all__ = ["DTYPES", "export_tensorrt_graph", "lower_tensorrt"]

IR_VERSION = 10

DTYPES = (ComputeDtype.BF16, ComputeDtype.FP16)
"""What the plugins compute in."""


def lower_tensorrt(network: Network, tensors: list[onnx.TensorProto]) -> onnx.ModelProto:
    """Return a model that TensorRT's ONNX parser reads with the plugin library loaded.

    Args:
        network: the portable graph, built with `TensorRtEmitter`.
        tensors: its weights in the form of `plugin_weights`, inline or external.
    """
    graph = onnx.helper.make_graph(
        network.builder.nodes, "ring", network.inputs, network.outputs, initializer=tensors
    )
    return onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, 1)],
        ir_version=IR_VERSION,
        producer_name="ringexport",
    )


def export_tensorrt_graph(
    weights: CheckpointWeights,
    directory: Path,
    *,
    decay_index: DecayIndex = DecayIndex.SERVING,
    dtype: ComputeDtype = ComputeDtype.BF16,
    has_fp8: bool = True,
    progress: Progress | None = None,
) -> GraphInfo:
    """Write model.onnx and weights.bin for an engine builder.

    Args:
        weights: an open checkpoint, which may be quantized.
        directory: existing, empty.
        decay_index: form of the decay.
        dtype: of activations, matrices and KV cache; one of `DTYPES`.
        has_fp8: every GPU that the engine is for has FP8 in TensorRT.
        progress: told of the bytes that are written.

    Raises:
        CheckpointError: a weight cannot be read, or holds NaN or infinity.
        GraphError: a dtype that the plugins lack, or a graph that the ONNX checker refuses.
        OSError: a file cannot be written.
    """
    if dtype not in DTYPES:
        raise GraphError(f"the plugins compute in {' or '.join(DTYPES)}, not in {dtype}")
    network = build_network(
        weights.config,
        weights,
        decay_index=decay_index,
        dtype=dtype,
        emitter=partial(TensorRtEmitter, has_fp8=has_fp8),
    )
    stored = plugin_weights(network.builder.nodes, network.builder.weights)
    total = sum(weight.nbytes for weight in stored)
    report = progress or NoProgress()
    report.start("writing the graph for TensorRT", total, "bytes")
    tensors = write_weights(stored, directory / WEIGHTS_FILE, report.advance)
    report.finish()
    model = lower_tensorrt(network, tensors)
    (directory / GRAPH_FILE).write_bytes(model.SerializeToString(deterministic=True))
    check_graph(directory / GRAPH_FILE)
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    return GraphInfo(nodes=len(network.builder.nodes), weight_bytes=total, opsets=opsets)
