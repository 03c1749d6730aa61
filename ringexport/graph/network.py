"""The portable graph of a whole network: prefill and decode in one, state and cache in and out."""

from dataclasses import dataclass

import onnx

from ringexport.checkpoint.config import RingConfig
from ringexport.checkpoint.weights import CheckpointWeights
from ringexport.graph import initializers
from ringexport.graph.blocks import BlockBuilder, Step
from ringexport.graph.builder import GraphBuilder
from ringexport.graph.initializers import AnyArray, ComputeDtype
from ringexport.graph.quantized import EmitterFactory, QuantizedEmitter
from ringexport.ops.decay import DecayIndex
from ringexport.ops.rotary import split_rotary_tables

__all__ = ["Network", "build_network"]

INT32 = onnx.TensorProto.INT32
INT64 = onnx.TensorProto.INT64
FLOAT = onnx.TensorProto.FLOAT


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A graph before lowering.

    Attributes:
        builder: nodes, weights and contract functions.
        inputs, outputs: what the runner binds (docs/graph.md).
        probes: further outputs, of the probe graph only: hidden states and expert ids.
    """

    builder: GraphBuilder
    inputs: list[onnx.ValueInfoProto]
    outputs: list[onnx.ValueInfoProto]
    probes: list[onnx.ValueInfoProto]


def build_network(
    config: RingConfig,
    weights: CheckpointWeights,
    *,
    decay_index: DecayIndex = DecayIndex.SERVING,
    dtype: ComputeDtype = ComputeDtype.FP32,
    emitter: EmitterFactory = QuantizedEmitter,
) -> Network:
    """Build the graph of a checkpoint; weights are read only when the graph is saved.

    Args:
        config: of the model.
        weights: where the weights will come from.
        decay_index: form of the decay, folded into the graph as one constant per linear layer.
        dtype: of activations, matrices and KV cache.
        emitter: makes what adds quantized modules in the form that the runtime takes.
    """
    builder = GraphBuilder()
    blocks = BlockBuilder(builder, config, weights, decay_index, dtype, emitter)
    step = _step(builder, config)
    inputs, outputs, probes = _plain_inputs(), [], []
    hidden = blocks.embedding()
    for layer, kind in enumerate(config.layer_kinds):
        past = _state_infos(config, layer, dtype, "past")
        present = _state_infos(config, layer, dtype, "present")
        with builder.scope(f"layers.{layer}"):
            attend = blocks.linear_attention if kind == "linear" else blocks.softmax_attention
            attended = attend(layer, hidden, [info.name for info in past + present], step)
            if layer == config.num_hidden_layers - 1:
                # Behind the last attention, only tokens whose logits are wanted matter.
                attended = blocks.wanted(attended, "wanted_attended")
                hidden = blocks.wanted(hidden, "wanted_hidden")
            attended = blocks.output_projection(layer, attended)
            hidden = builder.node("Add", [hidden, attended], "attention_residual")
            mixed = blocks.mlp(layer, hidden)
            hidden = builder.node("Add", [hidden, mixed], "residual", value=f"hidden.{layer}")
        inputs += past
        outputs += present
        probes += _probes(config, layer, dtype)
    blocks.head(hidden)
    outputs.insert(0, _info("logits", FLOAT, ["B", "L", config.vocab_size]))
    probes.append(_info("hidden.final", dtype.onnx, ["B", "L", config.hidden_size]))
    return Network(builder=builder, inputs=inputs, outputs=outputs, probes=probes)


def _step(builder: GraphBuilder, config: RingConfig) -> Step:
    """Compute what all layers share: cosines and sines at the positions of the new tokens."""
    length = config.context_length
    tables = split_rotary_tables(config.inv_freq(), config.attention_factor, length)
    with builder.scope("positions"):
        shape = builder.node("Shape", ["tokens"], "shape")
        count = builder.node("Gather", [shape, builder.scalar(1)], "count")
        index = builder.node("Range", [builder.scalar(0), count, builder.scalar(1)], "index")
        start = builder.node("Cast", ["position"], "start", to=INT64)
        column = builder.node("Unsqueeze", [start, builder.ints(1)], "column")
        absolute = builder.node("Add", [column, index], "absolute")
        # Padding behind the last token of a full context would leave the tables.
        ids = builder.node("Min", [absolute, builder.scalar(length - 1)], "ids")
        step = builder.scalar(tables.step)
        coarse = builder.node("Div", [ids, step], "coarse")
        fine = builder.node("Mod", [ids, step], "fine")
        coarse_cos, coarse_sin = _rows(builder, tables.coarse, coarse, "coarse")
        fine_cos, fine_sin = _rows(builder, tables.fine, fine, "fine")
        cos = _combined(builder, "Sub", (coarse_cos, fine_cos), (coarse_sin, fine_sin), "cos")
        sin = _combined(builder, "Add", (coarse_sin, fine_cos), (coarse_cos, fine_sin), "sin")
    return Step(cos=cos, sin=sin)


def _rows(
    builder: GraphBuilder, tables: tuple[AnyArray, AnyArray], rows: str, label: str
) -> list[str]:
    """Gather rows of a cosine and a sine table."""
    gathered = []
    for name, table in zip(("cos", "sin"), tables, strict=True):
        weight = initializers.from_array(f"rotary.{label}_{name}", table)
        gathered.append(builder.node("Gather", [builder.weight(weight), rows], f"{label}_{name}"))
    return gathered


def _combined(
    builder: GraphBuilder, op: str, left: tuple[str, str], right: tuple[str, str], label: str
) -> str:
    """Add or subtract two products."""
    products = [
        builder.node("Mul", list(pair), f"{label}_{name}")
        for pair, name in ((left, "left"), (right, "right"))
    ]
    return builder.node(op, products, label)


def _plain_inputs() -> list[onnx.ValueInfoProto]:
    return [
        _info("tokens", INT64, ["B", "T"]),
        _info("lengths", INT32, ["B"]),
        _info("position", INT32, ["B"]),
        _info("logits_index", INT64, ["B", "L"]),
    ]


def _state_infos(
    config: RingConfig, layer: int, dtype: ComputeDtype, when: str
) -> list[onnx.ValueInfoProto]:
    """Return the state tensors of a layer; `when` is past or present."""
    dim = config.head_dim
    if config.layer_kinds[layer] == "linear":
        shape: list[str | int] = ["B", config.num_attention_heads, dim, dim]
        return [_info(f"{when}_state.{layer}", FLOAT, shape)]
    shape = ["B", config.num_key_value_heads, "S", dim]
    return [_info(f"{when}_{part}.{layer}", dtype.onnx, shape) for part in ("key", "value")]


def _probes(config: RingConfig, layer: int, dtype: ComputeDtype) -> list[onnx.ValueInfoProto]:
    tokens = "L" if layer == config.num_hidden_layers - 1 else "T"
    probes = [_info(f"hidden.{layer}", dtype.onnx, ["B", tokens, config.hidden_size])]
    if config.is_moe_layer(layer):
        probes.append(_info(f"expert_ids.{layer}", INT64, ["N", config.num_experts_per_tok]))
    return probes


def _info(name: str, dtype: int, shape: list[str | int]) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, dtype, shape)
