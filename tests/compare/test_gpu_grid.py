"""What the grid reports, skips and refuses."""

import json
from typing import Any

import pytest

from ringexport.checkpoint import RingConfig
from ringexport.compare.gpu import grid
from ringexport.compare.gpu.traffic import expected_experts, moved_bytes
from ringexport.compare.speed import BenchConfig
from ringexport.errors import ConfigError, ToleranceExceededError
from ringexport.runtime.backends.cuda.random_weights import random_weights
from tests.compare import gpu_fakes
from tests.compare.test_gpu_reference import RING_NANO

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def weights() -> Any:
    config = RingConfig.from_file(RING_NANO / "config.json")
    return random_weights(config, {}, torch.device("cpu"))


def test_every_point_is_measured_or_named(weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_fakes.install(monkeypatch)
    config = BenchConfig(batch=(1, 8, 64), context=(128, 256), prefill=(512,), decode=4)
    found = grid.measure_grid(gpu_fakes.fake_gpu(), weights, config)
    points = [(point.speed.context, point.speed.batch) for point in found.decode]
    assert points == [(128, 1), (128, 8), (256, 1), (256, 8)]
    assert [(one.tokens, one.batch) for one in found.prefill] == [(512, 1), (512, 8)]
    assert found.skipped == {
        "decode, batch 64, context 128": "64 sequences need too much memory",
        "decode, batch 64, context 256": "64 sequences need too much memory",
        "prompts, 64 x 512": "64 sequences need too much memory",
    }
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    first = values["decode"][0]
    assert (first["tokens_per_s"], first["limit_tokens_per_s"]) == (2000.0, 4000.0)
    assert first["fraction_of_limit"] == 0.5
    assert first["memory"]["measured_bytes"] == 4_100_000_000
    assert first["memory"]["difference"] == pytest.approx(0.025)
    assert first["profile"]["launches"] == 36
    assert values["agreement"][0]["factor"] == pytest.approx(1.25)
    assert values["prefill"][1]["tokens_per_s"] == pytest.approx(409600)


def test_wrong_results_end_it(weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_fakes.install(monkeypatch)

    def wrong(*_: Any) -> Any:
        gpu_fakes.agreement(error=0.0161).check()

    monkeypatch.setattr(grid, "check_engine", wrong)
    with pytest.raises(ToleranceExceededError, match="no speed is reported for wrong results"):
        grid.measure_grid(gpu_fakes.fake_gpu(), weights, BenchConfig())


def test_a_collapsed_router_ends_it(weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_fakes.install(monkeypatch)

    def collapsed(*_: Any, batch: int, context: int, **__: Any) -> Any:
        speed = gpu_fakes.decode_speed(batch, context, hit=7.1)
        speed.check_routing()
        return speed

    monkeypatch.setattr(grid, "measure_decode", collapsed)
    with pytest.raises(ToleranceExceededError, match=r"7.1 experts are hit .* hits 8.0"):
        grid.measure_grid(gpu_fakes.fake_gpu(), weights, BenchConfig())
    gpu_fakes.decode_speed(1, 1, hit=7.3).check_routing()


def test_lengths_beyond_the_context_are_refused(weights: Any) -> None:
    with pytest.raises(ConfigError, match="the context holds"):
        grid.measure_grid(gpu_fakes.fake_gpu(), weights, BenchConfig(context=(1 << 20,)))


def test_bytes_of_a_step(weights: Any) -> None:
    config = weights.config
    experts = config.num_experts

    def moved(batch: int, context: int, hit: float) -> float:
        sizes = {"batch": batch, "context": context, "experts_hit": hit}
        return moved_bytes(weights, cache_dtype=torch.bfloat16, **sizes)

    one_expert = 3 * config.hidden_size * config.moe_intermediate_size * 2 * len(config.moe_layers)
    assert moved(1, 0, 5) - moved(1, 0, 4) == pytest.approx(one_expert)
    row = 2 * 2 * config.kv_dim * len(config.softmax_layers)
    assert moved(3, 10, 4) - moved(3, 9, 4) == pytest.approx(3 * row)
    state = 2 * 4 * config.linear_dim * config.head_dim * len(config.linear_layers)
    assert moved(2, 0, 4) - moved(1, 0, 4) == pytest.approx(state)
    assert expected_experts(config, 1) == pytest.approx(config.num_experts_per_tok)
    assert experts * 0.99 < expected_experts(config, 1000) <= experts
