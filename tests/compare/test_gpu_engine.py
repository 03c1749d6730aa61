"""Checks and measurements of the fast engine, with the reference in its place."""

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ringexport.checkpoint import RingConfig
from ringexport.compare.gpu import decode, drift, grid
from ringexport.errors import ToleranceExceededError
from ringexport.ops.quantization import NumberFormat
from ringexport.packing.layout import MatrixFormat, matrices
from ringexport.runtime.backends.cuda.random_weights import random_weights
from ringexport.runtime.backends.cuda.runner import CudaOptions
from ringexport.runtime.backends.cuda.weights import DeviceWeights
from tests.compare.reference_engine import ReferenceEngine
from tests.compare.test_gpu_reference import RING_NANO

CPU = torch.device("cpu")


def one_second() -> AbstractContextManager[Any]:
    """Return a timer that says that everything takes a second."""
    return nullcontext(SimpleNamespace(seconds=1.0))


@pytest.fixture(scope="module")
def config() -> RingConfig:
    return RingConfig.from_file(RING_NANO / "config.json")


@pytest.fixture(scope="module", params=["bf16", "fp8"])
def weights(request: pytest.FixtureRequest, config: RingConfig) -> DeviceWeights:
    fp8 = MatrixFormat(NumberFormat.FP8_E4M3)
    names = [matrix.name for matrix in matrices(config)] if request.param == "fp8" else []
    return random_weights(config, dict.fromkeys(names, fp8), CPU)


def engine(weights: DeviceWeights, rows: int, context: int) -> ReferenceEngine:
    options = CudaOptions(max_batch=rows, max_context=context)
    return ReferenceEngine(weights, None, model_digest=str, options=options)


def test_a_right_engine_passes(weights: DeviceWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "CudaRunner", ReferenceEngine)
    monkeypatch.setattr(grid, "_CHECKED_PROMPT", 24)
    library: Any = None
    found = grid.check_engine(weights, library, (1, 3))
    assert [one.positions for one in found] == [24, 17, 3 * 6]
    for one in found:
        assert 0.5 < one.factor < 1.5
        assert 0.9 < one.experts <= 1.0
        assert one.rounding.median_relative > 1e-3
    # Its own choices were used: far fewer positions would be close if routing were left free.
    assert found[0].engine.relative < 0.2


def test_a_wrong_engine_is_refused(weights: DeviceWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "CudaRunner", ReferenceEngine)
    monkeypatch.setattr(grid, "_CHECKED_PROMPT", 8)
    monkeypatch.setattr(ReferenceEngine, "wrong", 1.3)
    library: Any = None
    with pytest.raises(ToleranceExceededError, match="wrong results"):
        grid.check_engine(weights, library, (1,))


def test_states_do_not_drift(weights: DeviceWeights) -> None:
    runner = engine(weights, 1, 64)
    found = drift.measure_drift(runner, weights, (8, 24))
    assert [one.steps for one in found] == [8, 24]
    for one in found:
        one.check()
        assert 0 < one.engine_median <= one.engine < 0.2
        assert one.rounding_median <= one.rounding


def test_a_wrong_state_is_found(weights: DeviceWeights) -> None:
    runner = engine(weights, 1, 64)
    decay = weights.config.linear_layers[-1]
    true = weights[f"layers.{decay}.attention.log_decay"]
    kept = true.clone()
    states, experts = drift._decode(runner, runner_tokens(runner), (16,))
    true.mul_(0.5)
    try:
        wrong, _ = drift._decode(engine(weights, 1, 64), runner_tokens(runner), (16,))
    finally:
        true.copy_(kept)
    assert experts.keys() == set(weights.config.moe_layers)
    assert next(iter(experts.values())).shape[:2] == (1, 16)
    difference = (wrong[16][decay] - states[16][decay]).norm() / states[16][decay].norm()
    assert difference > 0.02


def runner_tokens(runner: ReferenceEngine) -> Any:
    return torch.arange(16)[None].numpy() % runner.spec.vocab_size


def test_steps_are_timed(weights: DeviceWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "GpuTimer", one_second)
    monkeypatch.setattr(decode, "GpuTimer", one_second)
    assert drift.time_steps(engine(weights, 1, 64), 64, window=16) == [1 / 16] * 4
    runner = engine(weights, 2, 40)
    found = decode.measure_decode(
        runner, weights, batch=2, context=32, read_rate=1e6, steps=4, repeat=3
    )
    assert found.step_us == pytest.approx(250_000)
    assert found.tokens_per_s == pytest.approx(8)
    assert found.limit_us == pytest.approx(found.bytes_moved)
    top_k = weights.config.num_experts_per_tok
    assert top_k <= found.experts_hit <= 2 * top_k
