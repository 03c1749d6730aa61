"""What a graph for TensorRT computes, with the plugins' contracts in place of the plugins."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from ringexport.checkpoint import RingConfig
from ringexport.checkpoint.weights import CheckpointWeights
from ringexport.compare.tolerances import TOLERANCES
from ringexport.graph.export import GRAPH_FILE, WEIGHTS_FILE
from ringexport.graph.initializers import ComputeDtype
from ringexport.graph.lower_tensorrt import export_tensorrt_graph, lower_tensorrt
from ringexport.graph.network import build_network
from ringexport.graph.passes.plugin_form import plugin_weights
from ringexport.graph.save import write_weights
from ringexport.graph.tensorrt_emitter import TensorRtEmitter
from ringexport.pipeline.calibrated import CalibrationRequest
from ringexport.pipeline.quantized import quantize
from ringexport.quantize.run import quantize_checkpoint
from ringexport.quantize.shipped import load_recipe
from ringexport.runtime.registry import open_checkpoint_runner
from tests.graph.plugin_reference import run_lowered
from tests.numerics import assert_close, nan_filled

Array = npt.NDArray[Any]

NANO = Path(__file__).parents[2] / "models" / "ring-nano"
TOKENS, CAPACITY = 12, 32
FP8_TYPE = onnx.TensorProto.FLOAT8E4M3FN
SAMPLES = {"fp8-static": 4}
"""Prompts of a recipe that calibrates."""


def fp32_graph(
    weights: CheckpointWeights, folder: Path, *, has_fp8: bool = True
) -> onnx.ModelProto:
    """Lower in fp32, which the plugins do not take, so that no rounding hides a mistake."""
    network = build_network(
        weights.config,
        weights,
        dtype=ComputeDtype.FP32,
        emitter=partial(TensorRtEmitter, has_fp8=has_fp8),
    )
    stored = plugin_weights(network.builder.nodes, network.builder.weights)
    tensors = write_weights(stored, folder / WEIGHTS_FILE, lambda _: None)
    model = lower_tensorrt(network, tensors)
    (folder / GRAPH_FILE).write_bytes(model.SerializeToString())
    return onnx.load(folder / GRAPH_FILE)


def tokens_of(config: RingConfig) -> Array:
    return np.random.default_rng(1).integers(0, config.vocab_size, (1, TOKENS))


def logits_of(model: onnx.ModelProto, dtype: npt.DTypeLike) -> Array:
    """Return the logits of a graph of ring-nano at each position, [tokens, vocabulary]."""
    with CheckpointWeights.open(NANO) as weights:
        config = weights.config
    tokens = tokens_of(config)
    inputs: dict[str, Array] = {
        "tokens": tokens,
        "lengths": np.array([TOKENS], np.int32),
        "position": np.zeros(1, np.int32),
        "logits_index": np.arange(TOKENS)[None],
    }
    heads, kv_heads, dim = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    for layer in config.linear_layers:
        inputs[f"past_state.{layer}"] = np.zeros((1, heads, dim, dim), np.float32)
    for layer in config.softmax_layers:
        for part in ("key", "value"):
            inputs[f"past_{part}.{layer}"] = np.zeros((1, kv_heads, CAPACITY, dim), dtype)
    logits: Array = run_lowered(model, inputs)["logits"][0].astype(np.float64)
    return logits


def compared(model: onnx.ModelProto, checkpoint: Path, dtype: npt.DTypeLike) -> Array:
    """Return the cosine of the logits of each position with those of the torch reference."""
    found = logits_of(model, dtype)
    with CheckpointWeights.open(checkpoint) as weights:
        tokens = tokens_of(weights.config)
    with open_checkpoint_runner(checkpoint) as runner:
        logits = runner.prefill(tokens, None, runner.new_state(1), every_position=True)
    expected = logits[0].astype(np.float64)
    norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
    cosine: Array = (found * expected).sum(axis=-1) / norms
    return cosine


def test_unquantized_in_fp32(tmp_path: Path) -> None:
    with CheckpointWeights.open(NANO) as weights:
        model = fp32_graph(weights, tmp_path)
    assert 1 - compared(model, NANO, np.float32).min() < TOLERANCES["reference_values"].bound ** 2


def test_ragged_calls_on_a_state(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """What is at padding, and in a cache behind its tokens, may be anything."""
    with CheckpointWeights.open(tiny_checkpoint) as weights:
        model, config = fp32_graph(weights, tmp_path), weights.config
    rows, rng = 3, np.random.default_rng(2)
    heads, kv_heads, dim = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    state = {
        f"past_state.{layer}": np.zeros((rows, heads, dim, dim), np.float32)
        for layer in config.linear_layers
    }
    for layer in config.softmax_layers:
        for part in ("key", "value"):
            state[f"past_{part}.{layer}"] = nan_filled((rows, kv_heads, CAPACITY, dim))
    position = np.zeros(rows, np.int32)
    with open_checkpoint_runner(tiny_checkpoint) as runner:
        expected_state = runner.new_state(rows)
        for lengths in ([9, 4, 1], [0, 5, 2], [1, 1, 1], [7, 3, 16]):
            sizes = np.array(lengths, np.int32)
            tokens = rng.integers(0, config.vocab_size, (rows, max(lengths)))
            plain = {"tokens": tokens, "lengths": sizes, "position": position}
            last = np.maximum(sizes - 1, 0)[:, None].astype(np.int64)
            found = run_lowered(model, {**plain, "logits_index": last, **state})
            expected = runner.prefill(tokens, lengths, expected_state)
            used = sizes > 0
            bound = TOLERANCES["hidden_fp32"].bound
            assert_close(found["logits"][used, 0], expected[used], rtol=bound)
            state = {name: found[name.replace("past", "present")] for name in state}
            position = position + sizes


def test_unquantized_in_bf16(tmp_path: Path) -> None:
    with CheckpointWeights.open(NANO) as weights:
        export_tensorrt_graph(weights, tmp_path)
    model = onnx.load(tmp_path / GRAPH_FILE)
    dtype = ComputeDtype.BF16.numpy
    # The reference is fp32. Random tokens: one near tie of the router moves one position.
    assert np.median(compared(model, NANO, dtype)) > 0.999


@pytest.mark.parametrize(
    ("recipe", "has_fp8"),
    [("fp8", True), ("int8-weight-only", True), ("fp8", False), ("fp8-static", False)],
)
def test_quantized(tmp_path: Path, recipe: str, has_fp8: bool) -> None:
    checkpoint, folder = tmp_path / "checkpoint", tmp_path / "graph"
    quantize(
        NANO, checkpoint, load_recipe(recipe), CalibrationRequest(num_samples=SAMPLES.get(recipe))
    )
    folder.mkdir()
    with CheckpointWeights.open(checkpoint) as weights:
        model = fp32_graph(weights, folder, has_fp8=has_fp8)
    has_types = any(tensor.data_type == FP8_TYPE for tensor in model.graph.initializer)
    assert has_types == (has_fp8 and recipe == "fp8")
    # int8-weight-only: the plugin of the experts also quantizes their inputs. fp8-static without
    # FP8 types: inputs are quantized per token, those of the reference with static scales.
    assert np.median(compared(model, checkpoint, np.float32)) > 0.999


def test_bytes_of_fp8_codes_mean_the_same(tmp_path: Path) -> None:
    """A weight-only DequantizeLinear gives what is dequantized when the graph is written."""
    checkpoint = tmp_path / "checkpoint"
    quantize_checkpoint(NANO, checkpoint, load_recipe("fp8"))
    found = []
    for has_fp8 in (True, False):
        folder = tmp_path / str(has_fp8)
        folder.mkdir()
        with CheckpointWeights.open(checkpoint) as weights:
            found.append(logits_of(fp32_graph(weights, folder, has_fp8=has_fp8), np.float32))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-5)
