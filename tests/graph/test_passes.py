"""The passes for ONNX Runtime, on small graphs: what they fuse, and what they leave alone."""

import numpy as np
import onnx
import onnx.parser
import pytest

from ringexport.graph.initializers import LazyInitializer, from_array
from ringexport.graph.passes.fuse_routing import fuse_routing
from ringexport.graph.passes.join_projections import join_projections
from ringexport.graph.passes.share_token_mask import share_token_mask

ROUTED = """
<ir_version: 10, opset_import: ["" : 23, "ringexport" : 1]>
routed (float[b,t,8] x, float[8,4] router, float[4] bias, float[4,4,8] gu, float[4,8,2] down)
    => (float[b,t,8] y)
{
    flat = Reshape (x, two_dims)
    ids, weights = ringexport.RingRouter <num_experts = 4, top_k = 2, n_group = 1, topk_group = 1,
        normalize = 1, routed_scaling_factor = 2.5> (flat, router, bias)
    mixed = ringexport.RingExperts <num_experts = 4, top_k = 2> (flat, ids, weights, gu, down)
    shape = Shape (x)
    y = Reshape (mixed, shape)
}
"""


def nodes_of(text: str) -> list[onnx.NodeProto]:
    nodes = list(onnx.parser.parse_model(text).graph.node)
    for index, node in enumerate(nodes):
        node.name = f"node{index}"
    return nodes


def kinds(nodes: list[onnx.NodeProto]) -> list[str]:
    return [node.op_type for node in nodes]


def test_router_and_experts_become_one_node() -> None:
    (fused,) = fuse_routing(nodes_of(ROUTED))
    assert fused.op_type == "RingRoutedExperts"
    assert list(fused.input) == ["x", "router", "bias", "gu", "down"]
    assert list(fused.output) == ["y", "ids"]
    assert {entry.name for entry in fused.attribute} == {
        "num_experts",
        "top_k",
        "n_group",
        "topk_group",
        "routed_scaling_factor",
    }


def test_shape_that_others_read_stays() -> None:
    text = ROUTED.replace("y = Reshape", "other = Expand (bias, shape)\n    y = Reshape")
    assert kinds(fuse_routing(nodes_of(text))) == ["RingRoutedExperts", "Shape", "Expand"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("normalize = 1", "normalize = 0"),
        ("shape = Shape (x)", "other = Neg (weights)\n shape = Shape (x)"),
        ("shape = Shape (x)", "other = Neg (flat)\n shape = Shape (x)"),
        ("shape = Shape (x)", "shape = Shape (flat)"),
        ("mixed = ringexport.RingExperts", "rounded = Neg (flat)\n mixed = ringexport.RingExperts"),
        ("y = Reshape (mixed, shape)", "z = Neg (mixed)\n y = Reshape (z, shape)"),
    ],
    ids=["raw weights", "weights read", "tokens read", "other shape", "third reader", "no restore"],
)
def test_what_only_looks_alike_stays(old: str, new: str) -> None:
    nodes = nodes_of(ROUTED.replace(old, new))
    assert kinds(fuse_routing(nodes)) == kinds(nodes)


def test_linear_layers_share_one_mask() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 23, "ringexport" : 1]>
    two (float[b,t,8] x, float[b,2,4,4] s0, float[b,2,4,4] s1, float[2] d, int32[b] lengths)
        => (float[b,t,8] z)
    {
        y, p0 = ringexport.RingLinearAttention <num_heads = 2, query_scale = 0.5>
            (x, x, x, s0, d, lengths)
        z, p1 = ringexport.RingLinearAttention <num_heads = 2, query_scale = 0.5>
            (y, y, y, s1, d, lengths)
    }
    """
    mask, first, second = share_token_mask(nodes_of(text))
    assert mask.op_type == "RingTokenMask"
    assert list(mask.input) == ["tokens", "lengths"]
    assert first.op_type == second.op_type == "RingMaskedLinearAttention"
    assert list(second.input) == ["y", "y", "y", "s1", "d", mask.output[0]]
    assert list(first.output) == ["y", "p0"]


def test_without_linear_layers_there_is_no_mask() -> None:
    assert kinds(share_token_mask(nodes_of(ROUTED))) == kinds(nodes_of(ROUTED))


def projections(
    *sizes: tuple[str, int, int],
) -> tuple[list[onnx.NodeProto], list[LazyInitializer]]:
    """Make products (input, out, block) with 64 inputs, codes that count, and scales."""
    nodes, weights = [], []
    for index, (value, out, block) in enumerate(sizes):
        shape = (out, 64 // block, block)
        codes = (np.arange(out * 64) + index).astype(np.uint8).reshape(shape)
        scale = np.full((out, 1), index + 1, dtype=np.float32)
        weights += [from_array(f"w{index}", codes), from_array(f"s{index}", scale)]
        nodes.append(
            onnx.helper.make_node(
                "RingInt8Projection",
                [value, f"w{index}", f"s{index}"],
                [f"y{index}"],
                name=f"node{index}",
                domain="ringexport",
                in_features=64,
                out_features=out,
                block_size=block,
            )
        )
    return nodes, weights


def test_products_of_one_input_are_joined() -> None:
    nodes, weights = projections(("x", 3, 32), ("other", 2, 32), ("x", 5, 32), ("x", 4, 16))
    between = onnx.helper.make_node("Neg", ["y0"], ["z"], name="between")
    result, kept = join_projections([nodes[0], between, *nodes[1:]], weights)
    assert kinds(result) == [
        "RingInt8Projection",
        "Split",
        "Neg",
        "RingInt8Projection",
        "RingInt8Projection",
    ]
    named = {weight.name: weight.to_array() for weight in kept}
    product, split = result[:2]
    assert [entry.i for entry in product.attribute if entry.name == "out_features"] == [8]
    assert list(split.output) == ["y0", "y2"]
    np.testing.assert_array_equal(named[split.input[1]], [3, 5])
    old = {weight.name: weight.to_array() for weight in weights}
    np.testing.assert_array_equal(named[product.input[1]], np.concatenate([old["w0"], old["w2"]]))
    np.testing.assert_array_equal(named[product.input[2]][:, 0], [1] * 3 + [3] * 5)
    assert set(named) - {*product.input, split.input[1]} == {"w1", "s1", "w3", "s3"}


def test_single_products_stay() -> None:
    nodes, weights = projections(("x", 3, 32), ("y0", 2, 32))
    assert join_projections(nodes, weights) == (nodes, weights)
