"""What an op contract consists of; every other description of an op is derived from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

__all__ = ["DOMAIN", "Attributes", "OpSpec", "TensorArg"]

DOMAIN = "ringexport"
"""ONNX domain of the contract ops. TensorRT's parser dispatches on the op type alone, whatever the
domain, so the op types themselves must not collide with its built-in importers."""

Attributes = Mapping[str, int | float]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorArg:
    """One input or output: its name, dimensions by name and dtype.

    Attributes:
        name: as in the graph.
        shape: named dimensions, such as ``"B T H*K"``; the letters are those of docs/ops.md.
        dtype: ``float`` stands for the activation dtype of the graph (fp32, fp16 or bf16), ``code``
            for int8 or FP8-E4M3.
        text: one phrase for the documentation.
        alias: of an output, the input whose buffer it takes over.
    """

    name: str
    shape: str
    dtype: str
    text: str
    alias: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpSpec:
    """The contract of one op.

    Attributes:
        name: ONNX op type.
        summary: what it computes, in one sentence.
        inputs: in order.
        outputs: in order.
        attributes: name to meaning, in order.
        function_body: renders the ONNX function, as ONNX text, for given attribute values. It uses
            only ops that ONNX Runtime runs.
        references_attributes: the body refers to attributes of the node instead, so that one
            function serves nodes with different values.
        sizes: letter of a shape to the attribute that gives it.
        reals: attributes that are real numbers; the others are integers.
    """

    name: str
    summary: str
    inputs: tuple[TensorArg, ...]
    outputs: tuple[TensorArg, ...]
    attributes: Mapping[str, str]
    function_body: Callable[[Attributes], str]
    references_attributes: bool = False
    sizes: Mapping[str, str] = field(default_factory=dict)
    reals: frozenset[str] = frozenset()

    def function(self, attributes: Attributes) -> str:
        """Return the ONNX text of the model-local function that defines the op.

        Most bodies have the attribute values written into them, because a shape cannot be computed
        from an attribute reference.
        """
        inputs = ", ".join(arg.name for arg in self.inputs)
        outputs = ", ".join(arg.name for arg in self.outputs)
        imports = f'"" : {OPSET}, "com.microsoft" : 1'
        body = self.function_body(attributes)
        declared = f" <{', '.join(self.attributes)}>" if self.references_attributes else ""
        return (
            f'<opset_import: [{imports}], domain: "{DOMAIN}">\n'
            f"{self.name}{declared} ({inputs}) => ({outputs})\n{{\n{body}\n}}"
        )


OPSET = 23
"""Version of the standard operator set: the first with RMSNormalization and RotaryEmbedding."""
