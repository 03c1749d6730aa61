"""Fuse a router and its experts for ONNX Runtime, whose expert ops normalize and take any rank.

Needs: values that are produced once.
Guarantees: the same ids; the same sums of experts up to rounding, and up to weights whose sum is so
small that the contract's 1e-20 shows: scores below 1e-17. What the graph outputs keeps its name.
"""

from collections import Counter

import onnx

from ringexport.graph.passes.contract_nodes import contract_attributes, contract_node, is_contract
from ringexport.ops.moe import (
    EXPERTS,
    INT8_EXPERTS,
    ROUTED_EXPERTS,
    ROUTED_INT8_EXPERTS,
    ROUTER,
)

__all__ = ["fuse_routing"]

FUSED = ((EXPERTS, ROUTED_EXPERTS), (INT8_EXPERTS, ROUTED_INT8_EXPERTS))


def fuse_routing(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Return the nodes with routers and experts fused; the given nodes are not changed.

    A router stays if its weights are not normalized, or if it sees other values than its experts.

    Args:
        nodes: in topological order.
    """
    producers = {output: node for node in nodes for output in node.output}
    readers = Counter(name for node in nodes for name in node.input)
    reader = {name: node for node in nodes for name in node.input}
    made: dict[str, onnx.NodeProto] = {}
    dropped: set[str] = set()
    for node in nodes:
        router = producers.get(node.input[1]) if len(node.input) > 1 else None
        if router is None or not is_contract(router, ROUTER):
            continue
        found = _surrounding(node, router, producers, readers, reader)
        if found is None:
            continue
        flat, shape, restored = found
        made[node.name] = _fused(node, router, flat.input[0], restored.output[0])
        dropped |= {router.name, flat.name, restored.name}
        if readers[shape.output[0]] == 1:
            dropped.add(shape.name)
    kept = [node for node in nodes if node.name not in dropped]
    return [made.get(node.name, node) for node in kept]


def _surrounding(
    experts: onnx.NodeProto,
    router: onnx.NodeProto,
    producers: dict[str, onnx.NodeProto],
    readers: Counter[str],
    reader: dict[str, onnx.NodeProto],
) -> tuple[onnx.NodeProto, onnx.NodeProto, onnx.NodeProto] | None:
    """Return the nodes that make tokens of a value, read its shape and restore it; or None."""
    flat, restored = producers.get(router.input[0]), reader.get(experts.output[0])
    if flat is None or flat.op_type != "Reshape" or restored is None:
        return None
    shape = producers.get(restored.input[1]) if restored.op_type == "Reshape" else None
    if shape is None or shape.op_type != "Shape" or shape.input[0] != flat.input[0]:
        return None
    alone = (
        any(is_contract(experts, plain) for plain, _ in FUSED)
        and experts.input[0] == router.input[0]
        and list(experts.input[1:3]) == list(router.output)
        and contract_attributes(router)["normalize"]
        and readers[router.input[0]] == 2
        and all(readers[name] == 1 for name in (*router.output, experts.output[0]))
    )
    return (flat, shape, restored) if alone else None


def _fused(
    experts: onnx.NodeProto, router: onnx.NodeProto, hidden: str, output: str
) -> onnx.NodeProto:
    spec = next(fused for plain, fused in FUSED if is_contract(experts, plain))
    attributes = contract_attributes(router) | contract_attributes(experts)
    inputs = [hidden, *router.input[1:], *experts.input[3:]]
    return contract_node(spec, inputs, [output, router.output[0]], experts.name, attributes)
