"""Fuse a residual add with the RMS norm behind it into the one op of ONNX Runtime that does both.

Needs: values that are produced once; scales of norms that are initializers.
Guarantees: the same values under the same names, including the sum, which others may read.
"""

import onnx

from ringexport.errors import GraphError

__all__ = ["fuse_residual_norm"]


def fuse_residual_norm(nodes: list[onnx.NodeProto], initializers: set[str]) -> list[onnx.NodeProto]:
    """Return the nodes with Add + RMSNormalization fused; the given nodes are not changed.

    Args:
        nodes: in topological order.
        initializers: names of the weights.

    Raises:
        GraphError: a value is produced twice.
    """
    producers = {output: node for node in nodes for output in node.output}
    if len(producers) != sum(len(node.output) for node in nodes):
        raise GraphError("fuse_residual_norm: a value of the graph is produced by two nodes")
    norm_of: dict[str, onnx.NodeProto] = {}
    for norm in nodes:
        add = producers.get(norm.input[0]) if norm.op_type == "RMSNormalization" else None
        if add is not None and add.op_type == "Add" and norm.input[1] in initializers:
            norm_of.setdefault(add.name, norm)
    fused_norms = {norm.name for norm in norm_of.values()}
    result = []
    for node in nodes:
        if node.name in norm_of:
            result.append(_fused(node, norm_of[node.name]))
        elif node.name not in fused_norms:
            result.append(node)
    return result


def _fused(add: onnx.NodeProto, norm: onnx.NodeProto) -> onnx.NodeProto:
    epsilon = next(entry.f for entry in norm.attribute if entry.name == "epsilon")
    return onnx.helper.make_node(
        "SkipSimplifiedLayerNormalization",
        [*add.input, norm.input[1]],
        [norm.output[0], "", "", add.output[0]],
        name=norm.name,
        domain="com.microsoft",
        epsilon=epsilon,
    )
