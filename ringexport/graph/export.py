"""Export a checkpoint to an ONNX graph in a directory."""

from dataclasses import dataclass
from pathlib import Path

import onnx

from ringexport.checkpoint.weights import CheckpointWeights
from ringexport.errors import GraphError
from ringexport.graph.initializers import ComputeDtype
from ringexport.graph.lower_cuda import lower_cuda
from ringexport.graph.lower_ort import lower_ort
from ringexport.graph.network import build_network
from ringexport.graph.passes.join_projections import join_projections
from ringexport.graph.save import write_weights
from ringexport.ops.decay import DecayIndex
from ringexport.progress import NoProgress, Progress

__all__ = [
    "GRAPH_FILE",
    "PROBE_FILE",
    "WEIGHTS_FILE",
    "GraphInfo",
    "check_graph",
    "export_graph",
]

GRAPH_FILE = "model.onnx"
PROBE_FILE = "probe.onnx"
WEIGHTS_FILE = "weights.bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphInfo:
    """What was exported.

    Attributes:
        nodes: of the main graph, before function bodies are inlined.
        weight_bytes: of all weights.
        opsets: domain to version.
    """

    nodes: int
    weight_bytes: int
    opsets: dict[str, int]


def export_graph(
    weights: CheckpointWeights,
    directory: Path,
    *,
    decay_index: DecayIndex = DecayIndex.SERVING,
    dtype: str = ComputeDtype.FP32,
    provider: str = "cpu",
    progress: Progress | None = None,
) -> GraphInfo:
    """Write model.onnx, probe.onnx and weights.bin, which both graphs share.

    The model is never in memory: each weight is read, converted and written in chunks.

    Args:
        weights: an open checkpoint.
        directory: existing, empty.
        decay_index: form of the decay.
        dtype: of activations, matrices and KV cache; a `ComputeDtype`.
        provider: execution provider of ONNX Runtime that the graph is for, cpu or cuda.
        progress: told of the bytes that are written.

    Raises:
        CheckpointError: a weight cannot be read, or holds NaN or infinity.
        GraphError: the finished graph does not pass the ONNX checker.
        OSError: a file cannot be written.
    """
    dtype = ComputeDtype(dtype)
    network = build_network(weights.config, weights, decay_index=decay_index, dtype=dtype)
    builder = network.builder
    builder.nodes, builder.weights = join_projections(builder.nodes, builder.weights)
    total = sum(weight.nbytes for weight in builder.weights)
    report = progress or NoProgress()
    report.start("writing the graph and its weights", total, "bytes")
    tensors = write_weights(builder.weights, directory / WEIGHTS_FILE, report.advance)
    report.finish()
    for name, with_probes in ((GRAPH_FILE, False), (PROBE_FILE, True)):
        model = lower_ort(network, tensors, with_probes=with_probes)
        model = lower_cuda(model) if provider == "cuda" else model
        (directory / name).write_bytes(model.SerializeToString(deterministic=True))
        check_graph(directory / name)
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    return GraphInfo(nodes=len(builder.nodes), weight_bytes=total, opsets=opsets)


def check_graph(path: Path) -> None:
    """Let the ONNX checker look at a graph.

    Raises:
        GraphError: it does not pass.
    """
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        first = str(error).strip().splitlines()[0]
        msg = f"{path.name} does not pass the ONNX checker: {first}"
        raise GraphError(msg) from error
