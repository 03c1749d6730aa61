"""Compute the mask of the padding once for all linear layers, instead of once in each.

Needs: graph inputs `tokens` and `lengths`, of whose tokens every linear layer sees all.
Guarantees: the same values under the same names, bit for bit.
"""

import onnx

from ringexport.graph.passes.contract_nodes import contract_attributes, contract_node, is_contract
from ringexport.ops.linear_attention import LINEAR_ATTENTION, MASKED_LINEAR_ATTENTION, TOKEN_MASK

__all__ = ["share_token_mask"]

MASK = "token_mask"


def share_token_mask(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Return the nodes with the mask shared; the given nodes are not changed.

    Args:
        nodes: in topological order.
    """
    result, masked = [], False
    for node in nodes:
        if not is_contract(node, LINEAR_ATTENTION):
            result.append(node)
            continue
        if not masked:
            result.append(contract_node(TOKEN_MASK, ["tokens", "lengths"], [MASK], MASK, {}))
            masked = True
        inputs = [*node.input[:-1], MASK]
        attributes = contract_attributes(node)
        result.append(
            contract_node(MASKED_LINEAR_ATTENTION, inputs, node.output, node.name, attributes)
        )
    return result
