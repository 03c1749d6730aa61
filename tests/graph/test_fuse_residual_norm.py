"""The pass that fuses residual adds with norms, on graphs in ONNX text."""

import onnx.parser
import pytest

from ringexport.errors import GraphError
from ringexport.graph.passes.fuse_residual_norm import fuse_residual_norm

GRAPH = """
residual (float[1,2,4] a, float[1,2,4] b) => (float[1,2,4] out, float[1,2,4] both)
{
    both = Add (a, b)
    normed = RMSNormalization <axis = -1, epsilon = 0.001> (both, scale)
    other = Sigmoid (both)
    out = Mul (normed, other)
}
"""


def nodes_of(text: str) -> list[onnx.NodeProto]:
    nodes = list(onnx.parser.parse_graph(text).node)
    for index, node in enumerate(nodes):
        node.name = f"node{index}"
    return nodes


def test_add_and_norm_become_one_node_that_keeps_both_values() -> None:
    nodes = nodes_of(GRAPH)
    fused = fuse_residual_norm(nodes, {"scale"})
    kinds = [node.op_type for node in fused]
    assert kinds == ["SkipSimplifiedLayerNormalization", "Sigmoid", "Mul"]
    assert list(fused[0].input) == ["a", "b", "scale"]
    assert list(fused[0].output) == ["normed", "", "", "both"]
    assert fused[0].attribute[0].f == pytest.approx(0.001)
    assert [node.op_type for node in nodes] == ["Add", "RMSNormalization", "Sigmoid", "Mul"]


def test_norm_with_a_computed_scale_stays() -> None:
    fused = fuse_residual_norm(nodes_of(GRAPH), set())
    assert [node.op_type for node in fused][:2] == ["Add", "RMSNormalization"]


def test_second_norm_of_a_sum_stays() -> None:
    text = GRAPH.replace("other = Sigmoid (both)", "other = RMSNormalization (both, scale)")
    fused = fuse_residual_norm(nodes_of(text), {"scale"})
    kinds = [node.op_type for node in fused]
    assert kinds == ["SkipSimplifiedLayerNormalization", "RMSNormalization", "Mul"]


def test_value_that_is_produced_twice_is_refused() -> None:
    text = GRAPH.replace("other = Sigmoid (both)", "both = Sigmoid (a)\n other = Sigmoid (both)")
    with pytest.raises(GraphError, match="produced by two nodes"):
        fuse_residual_norm(nodes_of(text), {"scale"})
