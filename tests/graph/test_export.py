"""The exported graph: against the reference, in every compute dtype, streamed, reproducible."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
import torch

from ringexport.checkpoint import CheckpointWeights
from ringexport.errors import GraphError
from ringexport.graph.builder import GraphBuilder
from ringexport.graph.export import export_graph
from ringexport.graph.initializers import ComputeDtype, LazyInitializer, from_array
from ringexport.graph.save import ALIGNMENT, write_weights
from ringexport.model import ReferenceModel
from ringexport.ops.decay import DecayIndex
from ringexport.ops.linear_attention import LINEAR_ATTENTION
from tests.checkpoints import make_checkpoint
from tests.numerics import assert_close

Array = npt.NDArray[Any]

VARIANTS: dict[str, dict[str, Any]] = {
    "published layout": {},
    "six heads": {"num_attention_heads": 6, "num_key_value_heads": 3, "group_norm_size": 3},
    "tail layer, one expert group": {"num_hidden_layers": 7, "n_group": 1, "topk_group": 1},
    "silu on qkv": {"linear_silu": True},
    "tied embeddings": {"tie_word_embeddings": True},
    "raw routing weights": {"norm_topk_prob": False},
    "two dense layers": {"first_k_dense_replace": 2},
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 4096,
        }
    },
}


def open_session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_fresh(
    session: ort.InferenceSession, tokens: Array, lengths: list[int], capacity: int = 64
) -> dict[str, Array]:
    """Run one call on an empty state and return every output by name."""
    rows = tokens.shape[0]
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    feeds: dict[str, Array] = {
        "tokens": tokens.astype(np.int64),
        "lengths": np.array(lengths, dtype=np.int32),
        "position": np.zeros(rows, dtype=np.int32),
        "logits_index": np.tile(np.arange(tokens.shape[1]), (rows, 1)),
    }
    for value in session.get_inputs():
        if value.name.startswith("past"):
            sizes = {"B": rows, "S": capacity}
            shape = [sizes.get(dim, dim) for dim in value.shape]
            feeds[value.name] = np.zeros(shape, dtype=types[value.type])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def run_reference(
    weights: CheckpointWeights, tokens: Array, lengths: list[int], decay_index: DecayIndex
) -> Mapping[str, torch.Tensor]:
    """Run the reference in fp64 and return its logits and taps."""
    model = ReferenceModel(weights.config, weights, decay_index=decay_index, dtype=torch.float64)
    taps: dict[str, torch.Tensor] = {}
    state = model.new_state(tokens.shape[0])
    logits = model.forward(
        torch.tensor(tokens), torch.tensor(lengths), state, every_position=True, taps=taps
    )
    return {**taps, "logits": logits}


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("decay_index", list(DecayIndex))
def test_graph_equals_the_reference(
    tmp_path: Path, overrides: dict[str, Any], decay_index: DecayIndex
) -> None:
    weights = CheckpointWeights.open(make_checkpoint(tmp_path / "model", **overrides))
    (tmp_path / "graph").mkdir()
    export_graph(weights, tmp_path / "graph", decay_index=decay_index)
    lengths = [9, 4]
    tokens = np.random.default_rng(7).integers(0, 300, (2, 9))
    actual = run_fresh(open_session(tmp_path / "graph" / "probe.onnx"), tokens, lengths)
    golden = run_reference(weights, tokens, lengths, decay_index)
    names = [f"hidden.{layer}" for layer in range(weights.config.num_hidden_layers)]
    for name in [*names, "logits"]:
        for row, length in enumerate(lengths):
            expected = golden[name][row, :length].numpy()
            assert_close(actual[name][row, :length], expected, rtol=2e-5)


def test_decay_forms_give_different_graphs(tmp_path: Path, tiny_checkpoint: Path) -> None:
    weights = CheckpointWeights.open(tiny_checkpoint)
    tokens = np.random.default_rng(7).integers(0, 300, (1, 9))
    logits = []
    for form in DecayIndex:
        (tmp_path / form).mkdir()
        export_graph(weights, tmp_path / form, decay_index=form)
        outputs = run_fresh(open_session(tmp_path / form / "model.onnx"), tokens, [9])
        logits.append(outputs["logits"])
    assert np.abs(logits[0] - logits[1]).max() > 1e-3
    assert np.abs(logits[0] - logits[2]).max() > 1e-3
    assert np.abs(logits[1] - logits[2]).max() > 1e-3


def test_fp16_graph_runs_and_stays_close(tmp_path: Path, tiny_checkpoint: Path) -> None:
    weights = CheckpointWeights.open(tiny_checkpoint)
    export_graph(weights, tmp_path, dtype=ComputeDtype.FP16)
    tokens = np.random.default_rng(7).integers(0, 300, (2, 9))
    actual = run_fresh(open_session(tmp_path / "model.onnx"), tokens, [9, 4])["logits"]
    golden = run_reference(weights, tokens, [9, 4], DecayIndex.SERVING)["logits"].numpy()
    actual[1, 4:] = golden[1, 4:]
    cosine = (actual * golden).sum() / np.linalg.norm(actual) / np.linalg.norm(golden)
    assert actual.dtype == np.float32
    assert cosine >= 0.9999


def test_bf16_graph_passes_the_checker_and_halves_the_weights(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    weights = CheckpointWeights.open(tiny_checkpoint)
    sizes = {}
    for dtype in (ComputeDtype.FP32, ComputeDtype.BF16):
        (tmp_path / dtype).mkdir()
        sizes[dtype] = export_graph(weights, tmp_path / dtype, dtype=dtype).weight_bytes
    assert sizes[ComputeDtype.BF16] < 0.75 * sizes[ComputeDtype.FP32]
    model = onnx.load(tmp_path / "bf16" / "model.onnx", load_external_data=False)
    states = {value.name: value.type.tensor_type.elem_type for value in model.graph.output}
    assert states["present_state.0"] == onnx.TensorProto.FLOAT
    assert states["present_key.2"] == onnx.TensorProto.BFLOAT16


def test_export_is_reproducible(tmp_path: Path, tiny_checkpoint: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        export_graph(CheckpointWeights.open(tiny_checkpoint), tmp_path / name)
    for file in ("model.onnx", "probe.onnx", "weights.bin"):
        first, second = (tmp_path / name / file for name in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


def test_every_node_and_value_has_a_unique_name(tmp_path: Path, tiny_checkpoint: Path) -> None:
    export_graph(CheckpointWeights.open(tiny_checkpoint), tmp_path)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    nodes = [node.name for node in graph.node]
    values = [value for node in graph.node for value in node.output if value]
    assert all(nodes)
    assert len(set(nodes)) == len(nodes)
    assert len(set(values)) == len(values)


def test_external_tensors_are_aligned_and_small_ones_inline(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    export_graph(CheckpointWeights.open(tiny_checkpoint), tmp_path)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    external = [tensor for tensor in graph.initializer if tensor.external_data]
    assert external
    for tensor in external:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert int(entries["offset"]) % ALIGNMENT == 0
        assert entries["location"] == "weights.bin"


def test_weight_whose_chunks_are_short_is_refused(tmp_path: Path) -> None:
    array = np.zeros((64, 64), dtype=np.float32)
    short = LazyInitializer(name="w", shape=(65, 64), dtype=array.dtype, chunks=lambda: [array])
    with pytest.raises(GraphError, match="w has 16384 bytes, expected 16640"):
        write_weights([short], tmp_path / "weights.bin", lambda _: None)


def test_large_weights_lie_beyond_two_gibibytes(tmp_path: Path) -> None:
    """Offsets above 2**31 reach ONNX Runtime; the file is sparse, so it costs no disk."""
    rows = (1 << 31) // (4 * 1024) + 1
    matrix = np.random.default_rng(0).standard_normal((8, 1024)).astype(np.float32)
    path = tmp_path / "weights.bin"
    (tensor,) = write_weights([from_array("matrix", matrix)], path, lambda _: None)
    offset = rows * 4 * 1024
    offset += -offset % ALIGNMENT
    with path.open("r+b") as file:
        data = file.read()
        file.seek(offset)
        file.write(data)
    for entry in tensor.external_data:
        if entry.key == "offset":
            entry.value = str(offset)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Gather", ["matrix", "index"], ["row"])],
        "large",
        [onnx.helper.make_tensor_value_info("index", onnx.TensorProto.INT64, [1])],
        [onnx.helper.make_tensor_value_info("row", onnx.TensorProto.FLOAT, [1, 1024])],
        initializer=[tensor],
    )
    opsets = [onnx.helper.make_opsetid("", 23)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    (tmp_path / "large.onnx").write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(tmp_path / "large.onnx"))
    (row,) = open_session(tmp_path / "large.onnx").run(None, {"index": np.array([5])})
    np.testing.assert_array_equal(row[0], matrix[5])


MEASURE_EXPORT = """
import resource, sys
from pathlib import Path
from ringexport.checkpoint import CheckpointWeights
from ringexport.graph.builder import GraphBuilder
from ringexport.graph.export import export_graph
weights = CheckpointWeights.open(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
info = export_graph(weights, Path(sys.argv[2]))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(info.weight_bytes, (after - before) * 1024)
"""


def test_export_never_holds_the_model(tmp_path: Path) -> None:
    """Peak memory grows by far less than the model while its weights pass through."""
    checkpoint = make_checkpoint(
        tmp_path / "model", num_experts=64, hidden_size=512, moe_intermediate_size=128
    )
    (tmp_path / "graph").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", MEASURE_EXPORT, checkpoint, tmp_path / "graph"],
        capture_output=True,
        text=True,
        check=True,
    )
    weight_bytes, grown = (int(value) for value in result.stdout.split())
    assert weight_bytes > 200 << 20
    assert grown < 0.25 * weight_bytes


def test_one_op_cannot_have_two_functions() -> None:
    builder = GraphBuilder()
    inputs = ["q", "k", "v", "past", "decay", "lengths"]
    scale = {"query_scale": 0.5}
    builder.contract(LINEAR_ATTENTION, inputs, {"num_heads": 2, **scale}, "first")
    builder.contract(LINEAR_ATTENTION, inputs, {"num_heads": 2, **scale}, "same")
    with pytest.raises(GraphError, match="RingLinearAttention is used with attributes"):
        builder.contract(LINEAR_ATTENTION, inputs, {"num_heads": 4, **scale}, "other")
