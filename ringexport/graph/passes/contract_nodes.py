"""Nodes of contract ops, as passes read and make them."""

from collections.abc import Sequence

import onnx

from ringexport.ops.spec import DOMAIN, OpSpec

__all__ = ["contract_attributes", "contract_node", "is_contract"]


def is_contract(node: onnx.NodeProto, spec: OpSpec) -> bool:
    """Tell whether a node is of this contract op."""
    return bool(node.op_type == spec.name and node.domain == DOMAIN)


def contract_attributes(node: onnx.NodeProto) -> dict[str, int | float]:
    """Return the attributes of a contract node by name."""
    return {
        entry.name: entry.i if entry.type == onnx.AttributeProto.INT else entry.f
        for entry in node.attribute
    }


def contract_node(
    spec: OpSpec,
    inputs: Sequence[str],
    outputs: Sequence[str],
    name: str,
    attributes: dict[str, int | float],
) -> onnx.NodeProto:
    """Return a node with those of the attributes that the contract knows."""
    known = {key: value for key, value in attributes.items() if key in spec.attributes}
    return onnx.helper.make_node(
        spec.name, list(inputs), list(outputs), name=name, domain=DOMAIN, **known
    )
