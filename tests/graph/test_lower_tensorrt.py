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
