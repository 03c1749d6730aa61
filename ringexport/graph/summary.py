"""Say what an ONNX file holds, without loading its external data."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from ringexport.errors import GraphError

__all__ = ["GraphSummary", "GraphTensor", "summarize_graph"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphTensor:
    """An input or output: dimensions are numbers, names, or "?" if unknown."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSummary:
    """What `ringexport inspect` shows of a graph.

    Attributes:
        producer: name and version of the program that wrote it.
        ir_version: of the file format.
        opsets: domain to version.
        operators: op type, with its domain where it is not ONNX's own, to number of nodes.
        num_weights: tensors that the file holds or refers to.
        inputs, outputs: in order.
    """

    producer: str
    ir_version: int
    opsets: dict[str, int]
    operators: dict[str, int]
    num_weights: int
    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]


def summarize_graph(path: Path) -> GraphSummary:
    """Read the graph in `path`.

    Raises:
        GraphError: the file cannot be read, or holds no graph.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise GraphError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, DecodeError) as error:
        raise GraphError(f"{path} is no ONNX file: {error}") from error
    if not model.graph.output:
        raise GraphError(f"{path} is no ONNX file: it holds no graph with outputs")
    counts = Counter(
        f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        for node in model.graph.node
    )
    return GraphSummary(
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        ir_version=model.ir_version,
        opsets={entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        operators=dict(counts.most_common()),
        num_weights=len(model.graph.initializer),
        inputs=tuple(_tensor(value) for value in model.graph.input),
        outputs=tuple(_tensor(value) for value in model.graph.output),
    )


def _tensor(value: onnx.ValueInfoProto) -> GraphTensor:
    kind = value.type.tensor_type
    shape = tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?"
        for dim in kind.shape.dim
    )
    dtype = onnx.TensorProto.DataType.Name(kind.elem_type).lower()
    return GraphTensor(name=value.name, dtype=dtype, shape=shape)
