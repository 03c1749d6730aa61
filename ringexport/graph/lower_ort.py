"""Lower the portable graph for ONNX Runtime: function bodies for contract ops, and fusions."""

import onnx
import onnx.parser

from ringexport.graph.network import Network
from ringexport.graph.passes.fuse_residual_norm import fuse_residual_norm
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
    nodes = fuse_residual_norm(network.builder.nodes, {tensor.name for tensor in tensors})
    graph = onnx.helper.make_graph(nodes, "ring", network.inputs, outputs, initializer=tensors)
    texts = network.builder.functions.values()
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
