"""Collects the nodes, weights and functions of one graph under unique, readable names."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from ringexport.errors import GraphError
from ringexport.graph.initializers import LazyInitializer, from_array
from ringexport.ops.spec import DOMAIN, Attributes, OpSpec

__all__ = ["GraphBuilder"]


class GraphBuilder:
    """An ONNX graph under construction.

    Values are named after the scope and node that produce them (``layers.3.experts/output``),
    so that an error of any runtime names the place in the model.

    Attributes:
        nodes: in execution order.
        weights: large tensors that are streamed to the external data file.
        functions: name of each contract op in the graph to its ONNX text.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[LazyInitializer] = []
        self.functions: dict[str, str] = {}
        self._scope: list[str] = []
        self._used: set[str] = set()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of everything that is added inside."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def name(self, label: str) -> str:
        """Return `label` in the current scope, made unique."""
        stem = self.scoped(label)
        name, count = stem, 1
        while name in self._used:
            count += 1
            name = f"{stem}_{count}"
        self._used.add(name)
        return name

    def scoped(self, label: str) -> str:
        """Return `label` in the current scope, as it is."""
        return ".".join([*self._scope, label])

    def node(
        self,
        op_type: str,
        inputs: list[str],
        label: str,
        *,
        value: str | None = None,
        **attributes: Any,
    ) -> str:
        """Add a node with one output and return the output's name: `value`, or made of `label`."""
        (output,) = self.multi_node(op_type, inputs, label, [value or ""], **attributes)
        return output

    def multi_node(
        self, op_type: str, inputs: list[str], label: str, values: list[str], **attributes: Any
    ) -> list[str]:
        """Add a node and return the names of its outputs; an empty name is made of `label`."""
        name = self.name(label)
        made = [
            value or (name if len(values) == 1 else f"{name}/{i}") for i, value in enumerate(values)
        ]
        self.nodes.append(onnx.helper.make_node(op_type, inputs, made, name=name, **attributes))
        return made

    def contract(
        self,
        spec: OpSpec,
        inputs: list[str],
        attributes: Attributes,
        label: str,
        *,
        values: dict[str, str] | None = None,
    ) -> list[str]:
        """Add a contract op, with the function that defines it, and return its outputs.

        Args:
            spec: of the op.
            inputs: in the order of the contract.
            attributes: as the contract names them.
            label: of the node.
            values: names for outputs that the graph exposes, by their name in the contract.

        Raises:
            GraphError: an earlier node of the op has attributes that need another function.
        """
        text = spec.function(attributes)
        if self.functions.setdefault(spec.name, text) != text:
            raise GraphError(f"{spec.name} is used with attributes that need different functions")
        stem = self.scoped(label)
        given = values or {}
        names = [given.get(arg.name, f"{stem}/{arg.name}") for arg in spec.outputs]
        return self.multi_node(spec.name, inputs, label, names, domain=DOMAIN, **attributes)

    def weight(self, weight: LazyInitializer) -> str:
        """Add a streamed weight and return its name."""
        self._used.add(weight.name)
        self.weights.append(weight)
        return weight.name

    def constant(self, values: npt.NDArray[Any], label: str) -> str:
        """Return the name of a small constant; equal constants share one name."""
        key = (values.dtype.name, values.shape, values.tobytes())
        if key not in self._constants:
            self._constants[key] = self.weight(
                from_array(f"constants.{len(self._constants)}.{label}", values)
            )
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """Return the name of a 1-D int64 constant, such as a shape or axes."""
        return self.constant(np.array(values, dtype=np.int64), "ints")

    def scalar(self, value: int) -> str:
        """Return the name of a 0-D int64 constant."""
        return self.constant(np.array(value, dtype=np.int64), "scalar")
