"""Lower the portable graph for ONNX Runtime: function bodies for contract ops, and fusions."""

import onnx
import onnx.parser

from ringexport.graph.network import Network
from ringexport.graph.passes.contract_nodes import contract_attributes
from ringexport.graph.passes.fuse_residual_norm import fuse_residual_norm
from ringexport.graph.passes.fuse_routing import fuse_routing
from ringexport.graph.passes.share_token_mask import share_token_mask
from ringexport.ops.reference import CONTRACTS
from ringexport.ops.spec import DOMAIN, OPSET

__all__ = ["lower_ort"]

IR_VERSION = 10
"""The lowest that has everything used here: older runtimes refuse newer ones."""


def lower_ort(
    network: Network, tensors: list[onnx.TensorProto], *, with_probes: bool
) -> onnx.ModelProto:
    """Return a model that any ONNX Runtime with the `com.microsoft` ops runs.

    Args:
        network: the portable graph.
        tensors: its weights, inline or external.
        with_probes: also output the hidden states and expert ids of every layer.
    """
    outputs = network.outputs + (network.probes if with_probes else [])
    nodes = fuse_routing(share_token_mask(network.builder.nodes))
    nodes = fuse_residual_norm(nodes, {tensor.name for tensor in tensors})
    read = {name for node in nodes for name in node.input}
    used = [tensor for tensor in tensors if tensor.name in read]
    graph = onnx.helper.make_graph(nodes, "ring", network.inputs, outputs, initializer=used)
    texts = _functions(nodes).values()
    return onnx.helper.make_model(
        graph,
        functions=[onnx.parser.parse_function(text) for text in texts],
        opset_imports=[
            onnx.helper.make_opsetid("", OPSET),
            onnx.helper.make_opsetid(DOMAIN, 1),
            onnx.helper.make_opsetid("com.microsoft", 1),
        ],
        ir_version=IR_VERSION,
        producer_name="ringexport",
    )


def _functions(nodes: list[onnx.NodeProto]) -> dict[str, str]:
    """Return every contract op among the nodes with the ONNX text of its function.

    Nodes of one op have attributes that ask for the same function: `GraphBuilder.contract`.
    """
    specs = {spec.name: spec for spec in CONTRACTS}
    contracts = {node.op_type: node for node in nodes if node.domain == DOMAIN}
    return {
        name: specs[name].function(contract_attributes(node)) for name, node in contracts.items()
    }
