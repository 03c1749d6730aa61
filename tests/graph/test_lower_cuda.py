"""Softmax attention in the form for ONNX Runtime's CUDA provider."""

from pathlib import Path

import onnx
import pytest

from ringexport.checkpoint import CheckpointWeights
from ringexport.graph.export import export_graph
from ringexport.graph.lower_cuda import TOTAL_LENGTH, lower_cuda
from ringexport.ops.attention import ATTENTION


def exported(checkpoint: Path, directory: Path, dtype: str) -> onnx.ModelProto:
    directory.mkdir()
    with CheckpointWeights.open(checkpoint) as weights:
        export_graph(weights, directory, dtype=dtype, provider="cuda")
    return onnx.load(str(directory / "model.onnx"), load_external_data=False)


@pytest.mark.parametrize(
    ("dtype", "op"), [("fp32", "ScatterElements"), ("bf16", "GroupQueryAttention")]
)
def test_no_length_comes_back_from_the_gpu(
    tiny_checkpoint: Path, tmp_path: Path, dtype: str, op: str
) -> None:
    model = exported(tiny_checkpoint, tmp_path / "graph", dtype)
    assert TOTAL_LENGTH in [info.name for info in model.graph.input]
    nodes = [node for node in model.graph.node if node.op_type == ATTENTION.name]
    assert nodes
    assert {node.input[-1] for node in nodes} == {TOTAL_LENGTH}
    (function,) = (one for one in model.functions if one.name == ATTENTION.name)
    ops = [node.op_type for node in function.node]
    assert op in ops
    assert "ReduceMax" not in ops


def test_the_given_model_stays(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with CheckpointWeights.open(tiny_checkpoint) as weights:
        export_graph(weights, tmp_path)
    model = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False)
    before = model.SerializeToString(deterministic=True)
    assert lower_cuda(model).SerializeToString(deterministic=True) != before
    assert model.SerializeToString(deterministic=True) == before
