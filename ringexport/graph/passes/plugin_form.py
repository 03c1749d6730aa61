"""Give the contract ops of a graph the form in which plugins take them.

Needs: weights of routers that only routers read.
Guarantees: every contract op is one that the plugins implement, with as many inputs as they take.
The matrices of routers have one row per expert. Functions are dropped: TensorRT's parser would use
them instead of the plugins. Expert ids become int32, which only the plugins see.
"""

from dataclasses import replace

import numpy as np
import onnx

from ringexport.errors import GraphError
from ringexport.graph.initializers import LazyInitializer
from ringexport.ops.moe import ROUTER
from ringexport.ops.plugin_ops import PLUGIN_CONTRACTS
from ringexport.ops.spec import DOMAIN

__all__ = ["plugin_weights"]


def plugin_weights(
    nodes: list[onnx.NodeProto], weights: list[LazyInitializer]
) -> list[LazyInitializer]:
    """Return the weights with those of routers transposed.

    Args:
        nodes: of the graph; they stay as they are.
        weights: of the graph.

    Raises:
        GraphError: a contract op that no plugin implements, or with other inputs.
    """
    contracts = {spec.name: spec for spec in PLUGIN_CONTRACTS}
    matrices = set()
    for node in nodes:
        if node.domain != DOMAIN:
            continue
        spec = contracts.get(node.op_type)
        if spec is None:
            raise GraphError(f"plugin_form: {node.name} is a {node.op_type}, which has no plugin")
        if len(node.input) != len(spec.inputs) or len(node.output) != len(spec.outputs):
            raise GraphError(
                f"plugin_form: {node.name} ({node.op_type}) has {len(node.input)} inputs and"
                f" {len(node.output)} outputs, expected {len(spec.inputs)} and {len(spec.outputs)}"
            )
        if spec.name == ROUTER.name:
            matrices.add(node.input[1])
    return [_transposed(weight) if weight.name in matrices else weight for weight in weights]


def _transposed(weight: LazyInitializer) -> LazyInitializer:
    rows, columns = weight.shape
    return replace(
        weight,
        shape=(columns, rows),
        chunks=lambda: [np.ascontiguousarray(weight.to_array().T)],
    )
