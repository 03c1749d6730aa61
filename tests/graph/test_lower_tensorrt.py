from pathlib import Path

import numpy as np
import onnx
import pytest

from ringexport.checkpoint.weights import CheckpointWeights
from ringexport.errors import GraphError
from ringexport.graph.initializers import ComputeDtype, from_array
from ringexport.graph.lower_tensorrt import export_tensorrt_graph
from ringexport.graph.passes.plugin_form import plugin_weights
from ringexport.ops.plugin_ops import PLUGIN_CONTRACTS
from ringexport.quantize.run import quantize_checkpoint
from ringexport.quantize.shipped import load_recipe

NANO = Path(__file__).parents[2] / "models" / "ring-nano"
CODES = {onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.INT8}
WEIGHT_ONLY = """
[[rules]]
targets = ["routed_experts", "dense_mlp"]
weights = { format = "fp8_e4m3", granularity = "channel" }
"""


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    folder = tmp_path_factory.mktemp("lowered")
    with CheckpointWeights.open(tiny_checkpoint) as weights:
        export_tensorrt_graph(weights, folder)
    return onnx.load(folder / "model.onnx")


def test_contract_ops_stay_nodes_without_functions(model: onnx.ModelProto) -> None:
    assert not model.functions
    found = {node.op_type for node in model.graph.node if node.domain == "ringexport"}
    assert found == {"RingLinearAttention", "RingAttention", "RingRouter", "RingExperts"}
    assert {entry.domain for entry in model.opset_import} == {"", "ringexport"}


def test_dtypes(model: onnx.ModelProto) -> None:
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    bf16, fp32 = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    assert kinds["embedding"] == bf16
    assert kinds["layers.1.mlp.router.weight"] == fp32
    inputs = {entry.name: entry.type.tensor_type.elem_type for entry in model.graph.input}
    assert inputs["past_state.0"] == fp32
    assert inputs["past_key.2"] == bf16
    outputs = {entry.name: entry.type.tensor_type.elem_type for entry in model.graph.output}
    assert outputs["logits"] == fp32


def test_the_router_has_one_row_per_expert(model: onnx.ModelProto, tiny_checkpoint: Path) -> None:
    (found,) = [
        tensor for tensor in model.graph.initializer if tensor.name == "layers.1.mlp.router.weight"
    ]
    with CheckpointWeights.open(tiny_checkpoint) as weights:
        expected = weights.read_f32("model.layers.1.mlp.gate.weight")
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(found), expected)


def lowered(checkpoint: Path, folder: Path, *, has_fp8: bool) -> onnx.ModelProto:
    folder.mkdir()
    with CheckpointWeights.open(checkpoint) as weights:
        export_tensorrt_graph(weights, folder, has_fp8=has_fp8)
    return onnx.load(folder / "model.onnx")


def plugin_codes(model: onnx.ModelProto) -> dict[str, tuple[int, int, bytes]]:
    """Return fp8_bytes, type and bytes of the codes that plugins take, by name."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type in {"RingQuantizedExperts", "RingQuantizedProjection"}:
            (flag,) = [entry.i for entry in node.attribute if entry.name == "fp8_bytes"]
            for tensor in (tensors[name] for name in node.input if name in tensors):
                if tensor.data_type in CODES:
                    found[tensor.name] = (flag, tensor.data_type, tensor.raw_data)
    return found


def test_fp8_codes_travel_as_bytes_where_tensorrt_has_no_fp8(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    quantize_checkpoint(NANO, checkpoint, load_recipe("fp8"))
    new = lowered(checkpoint, tmp_path / "new", has_fp8=True)
    old = lowered(checkpoint, tmp_path / "old", has_fp8=False)
    typed, untyped = plugin_codes(new), plugin_codes(old)
    assert typed.keys() == untyped.keys()
    assert len(typed) == 33 + 2 * 5
    for name, (flag, kind, data) in typed.items():
        assert (flag, kind) == (0, onnx.TensorProto.FLOAT8E4M3FN)
        assert untyped[name] == (1, onnx.TensorProto.INT8, data)
    kinds = {tensor.name: tensor.data_type for tensor in old.graph.initializer}
    assert onnx.TensorProto.FLOAT8E4M3FN not in kinds.values()
    # No kernel takes a width of 32.
    assert kinds["layers.1.mlp.shared_experts.down_proj"] == onnx.TensorProto.BFLOAT16
    assert not [node for node in old.graph.node if "QuantizeLinear" in node.op_type]


def test_fp8_weights_alone_are_dequantized_where_tensorrt_has_no_fp8(tmp_path: Path) -> None:
    recipe, checkpoint = tmp_path / "own.toml", tmp_path / "checkpoint"
    recipe.write_text(WEIGHT_ONLY)
    quantize_checkpoint(NANO, checkpoint, load_recipe(str(recipe)))
    new = lowered(checkpoint, tmp_path / "new", has_fp8=True)
    assert {node.op_type for node in new.graph.node} >= {"DequantizeLinear"}
    old = lowered(checkpoint, tmp_path / "old", has_fp8=False)
    assert len(plugin_codes(old)) == 2 * 5
    kinds = {tensor.name: tensor.data_type for tensor in old.graph.initializer}
    assert kinds["layers.0.mlp.down_proj"] == onnx.TensorProto.BFLOAT16


def test_int8_does_not_depend_on_fp8(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    quantize_checkpoint(NANO, checkpoint, load_recipe("int8-weight-only"))
    new = lowered(checkpoint, tmp_path / "new", has_fp8=True)
    assert lowered(checkpoint, tmp_path / "old", has_fp8=False) == new
    assert {flag for flag, _, _ in plugin_codes(new).values()} == {0}


def test_fp16_is_an_option(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with CheckpointWeights.open(tiny_checkpoint) as weights:
        export_tensorrt_graph(weights, tmp_path, dtype=ComputeDtype.FP16)
        with pytest.raises(GraphError, match="bf16 or fp16, not in fp32"):
            export_tensorrt_graph(weights, tmp_path, dtype=ComputeDtype.FP32)


def test_an_op_without_a_plugin_is_named() -> None:
    node = onnx.helper.make_node(
        "RingInt8Projection", ["a"], ["b"], name="layers.7.up", domain="ringexport"
    )
    with pytest.raises(GraphError, match=r"layers\.7\.up is a RingInt8Projection"):
        plugin_weights([node], [])


def test_a_node_with_other_inputs_is_named() -> None:
    node = onnx.helper.make_node(
        "RingRouter", ["a", "b"], ["c", "d"], name="layers.7.router", domain="ringexport"
    )
    with pytest.raises(GraphError, match=r"layers\.7\.router .* has 2 inputs .* expected 3"):
        plugin_weights([node], [])


def test_other_weights_stay_as_they_are() -> None:
    weights = [from_array("a", np.eye(3, dtype=np.float32))]
    assert plugin_weights([], weights) == weights


def test_plugins_take_no_int64() -> None:
    dtypes = {arg.dtype for spec in PLUGIN_CONTRACTS for arg in (*spec.inputs, *spec.outputs)}
    assert dtypes == {"float", "fp32", "int32", "code"}
