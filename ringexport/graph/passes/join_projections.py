"""Join int8 projections of one input into one product, whose result is split.

ONNX Runtime rounds the input of every int8 product anew, and a product of one token is over in a
few microseconds: beside small matrices the calls cost more than what they compute.

Needs: matrices and scales that are weights of one node each.
Guarantees: the same values under the same names, bit for bit.
"""

from collections.abc import Iterator
from itertools import chain

import numpy as np
import onnx

from ringexport.graph.initializers import AnyArray, LazyInitializer, from_array
from ringexport.graph.passes.contract_nodes import contract_attributes, contract_node, is_contract
from ringexport.ops.projection import INT8_PROJECTION

__all__ = ["join_projections"]


def join_projections(
    nodes: list[onnx.NodeProto], weights: list[LazyInitializer]
) -> tuple[list[onnx.NodeProto], list[LazyInitializer]]:
    """Return nodes and weights with int8 projections joined; what is given is not changed.

    Args:
        nodes: in topological order.
        weights: of the graph.
    """
    groups: dict[tuple[str, float, float], list[onnx.NodeProto]] = {}
    for node in nodes:
        if is_contract(node, INT8_PROJECTION):
            sizes = contract_attributes(node)
            key = (node.input[0], sizes["in_features"], sizes["block_size"])
            groups.setdefault(key, []).append(node)
    several = [group for group in groups.values() if len(group) > 1]
    first = {group[0].name: group for group in several}
    joined = {node.name for group in several for node in group}
    named = {weight.name: weight for weight in weights}
    replaced = {name for group in several for node in group for name in node.input[1:]}
    kept = [weight for weight in weights if weight.name not in replaced]
    result = []
    for node in nodes:
        if node.name in first:
            made, added = _joined(first[node.name], named)
            result += made
            kept += added
        elif node.name not in joined:
            result.append(node)
    return result, kept


def _joined(
    group: list[onnx.NodeProto], named: dict[str, LazyInitializer]
) -> tuple[list[onnx.NodeProto], list[LazyInitializer]]:
    name = f"{group[0].name}.joined"
    rows = [int(contract_attributes(node)["out_features"]) for node in group]
    weight, scale = (
        _stacked([named[node.input[place]] for node in group], f"{name}.{label}")
        for place, label in ((1, "weight"), (2, "scale"))
    )
    split = from_array(f"{name}.rows", np.array(rows, dtype=np.int64))
    attributes = contract_attributes(group[0]) | {"out_features": sum(rows)}
    inputs = [group[0].input[0], weight.name, scale.name]
    product = contract_node(INT8_PROJECTION, inputs, [name], name, attributes)
    parts = onnx.helper.make_node(
        "Split",
        [name, split.name],
        [node.output[0] for node in group],
        name=f"{name}.split",
        axis=-1,
    )
    return [product, parts], [weight, scale, split]


def _stacked(parts: list[LazyInitializer], name: str) -> LazyInitializer:
    """Stack weights along their first axis, one chunk in memory at a time."""

    def chunks() -> Iterator[AnyArray]:
        yield from chain.from_iterable(part.chunks() for part in parts)

    rows = sum(part.shape[0] for part in parts)
    shape = (rows, *parts[0].shape[1:])
    return LazyInitializer(name=name, shape=shape, dtype=parts[0].dtype, chunks=chunks)
