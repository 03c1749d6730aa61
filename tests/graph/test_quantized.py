"""Graphs of quantized checkpoints: the ops they use, their size, and what they compute."""

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import pytest
from tokenizers import Tokenizer

from ringexport.checkpoint import CheckpointWeights
from ringexport.errors import CheckpointError
from ringexport.graph.export import export_graph
from ringexport.graph.lower_tensorrt import export_tensorrt_graph
from ringexport.ops.decay import DecayIndex
from ringexport.packing.writer import write_packed
from ringexport.quantize.run import quantize_checkpoint
from ringexport.quantize.shipped import load_recipe
from tests.graph.test_export import Array, open_session, run_fresh, run_reference

ROOT = Path(__file__).parents[2]
RING_NANO = ROOT / "models" / "ring-nano"
TEXT = (ROOT / "calibration" / "text" / "heldout-english.txt").read_text(encoding="utf-8")[:600]
IDS = Tokenizer.from_file(str(RING_NANO / "tokenizer.json")).encode(TEXT).ids
TOKENS, LENGTHS = np.array([IDS[:96]]), [96]


def quantized(checkpoint: Path, directory: Path, recipe: str) -> CheckpointWeights:
    quantize_checkpoint(checkpoint, directory / "quantized", load_recipe(recipe))
    return CheckpointWeights.open(directory / "quantized")


def exported(weights: CheckpointWeights, directory: Path) -> tuple[onnx.ModelProto, Array]:
    (directory / "graph").mkdir()
    export_graph(weights, directory / "graph")
    model = onnx.load(directory / "graph" / "model.onnx", load_external_data=False)
    session = open_session(directory / "graph" / "model.onnx")
    return model, run_fresh(session, TOKENS, LENGTHS, capacity=128)["logits"]


def kinds(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


@pytest.mark.parametrize(
    ("recipe", "ops", "cosine"),
    [
        ("int8-weight-only", {"RingInt8Projection", "RingRoutedInt8Experts"}, 0.999),
        ("fp8", {"RingFp8Quantize", "RingExperts", "MatMul"}, 0.995),
        ("fp8-block", {"RingFp8Quantize", "RingExperts", "MatMul"}, 0.995),
    ],
)
def test_quantized_graph_runs_its_ops_and_stays_near_its_weights(
    tmp_path: Path, recipe: str, ops: set[str], cosine: float
) -> None:
    weights = quantized(RING_NANO, tmp_path, recipe)
    model, actual = exported(weights, tmp_path)
    assert ops <= kinds(model)
    golden = run_reference(weights, TOKENS, LENGTHS, DecayIndex.SERVING)["logits"].numpy()
    # What is left is the rounding of activations, which the reference does not do.
    assert not np.allclose(actual, golden, atol=1e-3)
    cosines = (actual * golden).sum(-1) / np.linalg.norm(actual, axis=-1)
    cosines /= np.linalg.norm(golden, axis=-1)
    assert np.median(cosines) >= cosine


def test_int8_matrices_are_stored_once_and_small(tmp_path: Path) -> None:
    weights = quantized(RING_NANO, tmp_path, "int8-weight-only")
    model, _ = exported(weights, tmp_path)
    sizes = {
        tensor.name: tensor.data_type
        for tensor in model.graph.initializer
        if tensor.name.endswith(("_proj", "lm_head"))
    }
    assert len(sizes) > 20
    assert set(sizes.values()) == {onnx.TensorProto.UINT8}
    table = next(tensor for tensor in model.graph.initializer if tensor.name == "embedding")
    assert table.data_type == onnx.TensorProto.BFLOAT16
    plain = tmp_path / "plain"
    plain.mkdir()
    with CheckpointWeights.open(RING_NANO) as unquantized:
        export_graph(unquantized, plain)
    quantized_bytes = (tmp_path / "graph" / "weights.bin").stat().st_size
    assert quantized_bytes < 0.34 * (plain / "weights.bin").stat().st_size


@pytest.mark.parametrize("write", [export_graph, export_tensorrt_graph, write_packed])
@pytest.mark.parametrize(
    "module", ["layers.0.attention.query_key_value", "layers.1.mlp.experts.3.up_proj"]
)
def test_fp8_codes_of_nan_are_found_when_they_are_written(
    tiny_checkpoint: Path, tmp_path: Path, module: str, write: Callable[..., Any]
) -> None:
    """GPUs that decode FP8 in software would take such a code for 480."""
    name = f"model.{module}.weight"
    with quantized(tiny_checkpoint, tmp_path, "fp8") as weights:
        info = weights.info(name)
        row, columns = info.shape[0] - 3, info.shape[1]
    raw = bytearray(info.file.read_bytes())
    raw[info.offset + row * columns + 9] = 0xFF
    info.file.write_bytes(raw)
    (tmp_path / "written").mkdir()
    with CheckpointWeights.open(tmp_path / "quantized") as weights:
        options = {"decay_index": DecayIndex.SERVING}
        with pytest.raises(CheckpointError) as caught:
            write(weights, tmp_path / "written", **options)
    assert f"tensor {name} holds nan at [{row}, 9]" in str(caught.value)


def test_schemes_are_listed_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Emitters ask for one of each module: a list for every question would be quadratic."""
    with quantized(tiny_checkpoint, tmp_path, "fp8") as weights:
        assert weights.schemes is weights.schemes
        assert isinstance(weights.schemes, MappingProxyType)
