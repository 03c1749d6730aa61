"""The layers of a parsed network as a table: an engine without a GPU cannot be looked into."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from ringexport.engine.flavor import TensorRt

__all__ = ["LayerRow", "LayerTensor", "describe_layers", "layer_counts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTensor:
    """A tensor of a layer: dimensions are numbers, -1 where they vary."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """One layer.

    Attributes:
        name: as in the graph.
        kind: TensorRT's kind of layer, such as "MATRIX_MULTIPLY".
        plugin: name of the plugin, for plugin layers.
        inputs, outputs: in order.
    """

    name: str
    kind: str
    plugin: str | None
    inputs: tuple[LayerTensor, ...]
    outputs: tuple[LayerTensor, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def describe_layers(tensorrt: TensorRt, network: Any) -> tuple[LayerRow, ...]:
    """Return one row for each layer of a parsed network, in order."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return tuple(_row(tensorrt, layer) for layer in layers)


def layer_counts(layers: tuple[LayerRow, ...]) -> dict[str, int]:
    """Return how many layers there are of each kind; plugins under their own names."""
    return dict(Counter(layer.plugin or layer.kind for layer in layers).most_common())


def _row(tensorrt: TensorRt, layer: Any) -> LayerRow:
    trt = tensorrt.module
    kind = layer.type
    inputs = tuple(_tensor(layer.get_input(index)) for index in range(layer.num_inputs))
    outputs = tuple(_tensor(layer.get_output(index)) for index in range(layer.num_outputs))
    name, plugin = layer.name, None
    if kind == trt.LayerType.PLUGIN_V3:
        layer.__class__ = trt.IPluginV3Layer  # how the bindings cast to the layer's own class
        core = layer.plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
        plugin = str(core.plugin_name)
    return LayerRow(name=name, kind=kind.name, plugin=plugin, inputs=inputs, outputs=outputs)


def _tensor(tensor: Any) -> LayerTensor:
    if tensor is None:  # an optional input that is left out
        return LayerTensor(name="", dtype="", shape=())
    return LayerTensor(name=tensor.name, dtype=tensor.dtype.name, shape=_shape(tensor))


def _shape(tensor: Any) -> tuple[int, ...]:
    try:
        return tuple(tensor.shape)
    except ValueError:  # of unknown rank
        return ()
