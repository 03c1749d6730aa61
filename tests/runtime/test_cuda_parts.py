"""The parts of the cuda backend that need no GPU: slots, plans, weights, joined attention."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ringexport.checkpoint import CheckpointWeights, RingConfig
from ringexport.errors import BackendUnavailableError, BundleError, RingExportError
from ringexport.ops.quantization import NumberFormat
from ringexport.packing.layout import MatrixFormat, matrices, packed_tensors
from ringexport.runtime.backends.cuda.graphs import BATCH_BUCKETS, DecodeGraphs, bucket_of
from ringexport.runtime.backends.cuda.network import PackedRows
from ringexport.runtime.backends.cuda.open import open_packed, why_not_here
from ringexport.runtime.backends.cuda.prefill_attention import _joined
from ringexport.runtime.backends.cuda.random_weights import random_weights
from ringexport.runtime.backends.cuda.runner import CudaOptions, CudaRunner, _groups
from ringexport.runtime.backends.cuda.state import MemoryPlan, StatePool
from ringexport.runtime.backends.cuda.weights import DeviceWeights

RING_NANO = Path(__file__).parents[2] / "models" / "ring-nano"
CPU = torch.device("cpu")
FP8 = MatrixFormat(NumberFormat.FP8_E4M3)
BLOCK = MatrixFormat(NumberFormat.FP8_E4M3, block=True)
INT8 = MatrixFormat(NumberFormat.INT8)


@pytest.fixture(scope="module")
def config() -> RingConfig:
    return RingConfig.from_file(RING_NANO / "config.json")


@pytest.fixture
def pool(config: RingConfig) -> StatePool:
    return StatePool(config, CPU, slots=3, capacity=8)


def test_slots_are_taken_once_and_come_back_empty(pool: StatePool) -> None:
    first, second = pool.take(2), pool.take(1)
    assert len({*first, *second}) == 3
    assert pool.free == 0
    with pytest.raises(RingExportError, match="1 more sequences were asked for, 0 slots are free"):
        pool.take(1)
    for state in pool.recurrent_state.values():
        state.fill_(7.0)
    pool.give_back(second)
    assert pool.take(1) == second
    for state in pool.recurrent_state.values():
        assert not state[second].any()
        assert state[first].all()


def test_copying_takes_the_used_part_of_the_cache(pool: StatePool) -> None:
    for tensor in (*pool.recurrent_state.values(), *pool.keys.values(), *pool.values.values()):
        tensor.copy_(torch.randn(tensor.shape))
    before = {layer: key.clone() for layer, key in pool.keys.items()}
    pool.copy([0], [2], 5)
    for layer, key in pool.keys.items():
        assert torch.equal(key[2, :, :5], before[layer][0, :, :5])
        assert torch.equal(key[2, :, 5:], before[layer][2, :, 5:])
        assert torch.equal(key[1], before[layer][1])
    for state in pool.recurrent_state.values():
        assert torch.equal(state[2], state[0])


def test_an_8_bit_cache_is_read_with_its_scales(config: RingConfig) -> None:
    pool = StatePool(config, CPU, slots=1, capacity=4, cache_dtype=torch.float8_e4m3fn)
    layer = config.softmax_layers[0]
    pool.keys[layer].copy_(torch.full(pool.keys[layer].shape, 1.5))
    keys, values = pool.cached(layer, 0, 3, torch.tensor([2.0, 4.0]))
    assert keys.dtype == torch.bfloat16
    assert keys.shape == (config.num_key_value_heads, 3, config.head_dim)
    assert bool((keys == 3.0).all())
    assert not values.any()


def test_bytes_per_slot_are_those_of_the_tensors(config: RingConfig) -> None:
    pool = StatePool(config, CPU, slots=2, capacity=16)
    recurrent, cache = StatePool.bytes_per_slot(config, 16, torch.bfloat16)
    assert 2 * recurrent == sum(state.nbytes for state in pool.recurrent_state.values())
    tensors = (*pool.keys.values(), *pool.values.values())
    assert 2 * cache == sum(tensor.nbytes for tensor in tensors)


def test_a_plan_that_does_not_fit_says_what_takes_how_much() -> None:
    plan = MemoryPlan(
        weights=17_200_000_000,
        recurrent_state=1_000_000_000,
        kv_cache=30_000_000_000,
        workspace=500_000_000,
        slots=64,
        capacity=131072,
    )
    plan.check(plan.total)
    with pytest.raises(RingExportError, match=r"64 sequences of 131,072 tokens need 48.70 GB"):
        plan.check(plan.total - 1)


@pytest.mark.parametrize(
    ("lengths", "most", "expected"),
    [
        ([3, 0, 2], 5, [[0, 2]]),
        ([3, 3, 3], 6, [[0, 1], [2]]),
        ([9, 1], 4, [[0], [1]]),
        ([0, 0], 4, []),
    ],
)
def test_rows_are_grouped_by_tokens(
    lengths: list[int], most: int, expected: list[list[int]]
) -> None:
    assert _groups(np.array(lengths), most) == expected


def test_buckets_hold_what_they_are_for() -> None:
    assert [bucket_of(size, BATCH_BUCKETS) for size in (1, 3, 64, 65, 256)] == [1, 4, 64, 128, 256]
    assert bucket_of(300, BATCH_BUCKETS) == 300


def test_more_rows_than_a_graph_holds_are_replayed_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def run_steps(_: object, tokens: Any, state: Any, rows: Any, steps: int) -> Any:
        assert len(tokens) == len(rows) <= BATCH_BUCKETS[-1]
        calls.append((list(rows), state, steps))
        return SimpleNamespace(tokens=torch.from_numpy(np.pad(tokens + 1, (0, 3))))

    monkeypatch.setattr(CudaRunner, "_run_steps", run_steps)
    runner: Any = CudaRunner.__new__(CudaRunner)
    found = runner.replay(np.arange(300), "state", range(300), steps=2)
    assert found.tolist() == list(range(1, 301))
    assert calls == [(list(range(256)), "state", 2), (list(range(256, 300)), "state", 2)]


def test_graphs_are_captured_once_and_the_largest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[int] = []
    monkeypatch.setattr(DecodeGraphs, "_capture", lambda _, batch: captured.append(batch) or batch)
    unused: Any = None
    graphs = DecodeGraphs(unused, CPU, 4096, lambda: 0)
    assert graphs.step(3) == graphs.step(4) == 4
    assert captured == [4]
    graphs.capture_all(5)
    assert captured == [4, 8, 2, 1]
    graphs.capture_all(1000)
    assert captured == [4, 8, 2, 1, 256, 128, 64, 32, 16]


@pytest.mark.parametrize("fmt", [FP8, BLOCK, INT8], ids=["fp8", "fp8-block", "int8"])
def test_random_weights_have_the_packed_shapes(config: RingConfig, fmt: MatrixFormat) -> None:
    chosen = {
        matrix.name: fmt
        for matrix in matrices(config)
        if not (fmt.block and any(size % 128 for size in matrix.shape))
    }
    weights = random_weights(config, chosen, CPU)
    for tensor in packed_tensors(config, chosen):
        assert tuple(weights[tensor.name].shape) == tensor.shape
    matrix = weights.matrix("layers.0.attention.input")
    assert matrix.format == fmt
    real = matrix.values.float()
    assert matrix.scale is not None
    if fmt.block:
        real *= matrix.scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    else:
        real *= matrix.scale[:, None]
    assert real.std().item() == pytest.approx(config.hidden_size**-0.5, rel=0.03)


def test_weights_that_do_not_fit_the_config_are_refused(config: RingConfig) -> None:
    tensors = {t.name: torch.empty(t.shape) for t in packed_tensors(config, {})}
    with pytest.raises(BundleError, match="does not fit the model's config: final_norm"):
        DeviceWeights(config, tensors | {"final_norm": torch.empty(3)}, source="it")
    del tensors["layers.1.router"]
    with pytest.raises(BundleError, match=r"layers\.1\.router"):
        DeviceWeights(config, tensors, source="it")


def test_attention_over_two_parts_joins_to_the_whole() -> None:
    scores, values = torch.randn(2, 5, 9).double(), torch.randn(2, 9, 4).double()

    def part(keys: slice) -> tuple[torch.Tensor, torch.Tensor]:
        some = scores[..., keys]
        return some.softmax(-1) @ values[:, keys], some.logsumexp(-1, keepdim=True)

    joined = _joined(part(slice(0, 6)), part(slice(6, 9)))
    torch.testing.assert_close(joined.double(), scores.softmax(-1) @ values, rtol=0, atol=1e-6)


def test_joining_costs_16_bit_outputs_no_more_than_their_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    own, past = (torch.randn(1, 2, 64, 32, generator=generator) for _ in range(2))
    sums = [torch.randn(1, 2, 64, 1, generator=generator) * 3 for _ in range(2)]
    exact = _joined((own, sums[0]), (past, sums[1]))
    rounded = _joined((own.bfloat16(), sums[0]), (past.bfloat16(), sums[1]))
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=3e-2)


def test_packed_rows_know_their_last_tokens() -> None:
    starts, lengths = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 4], [3, 1, 7]))
    empty = torch.zeros(3, dtype=torch.int32)
    rows = PackedRows(
        slots=empty, position=empty, max_context=8, starts=starts, lengths=lengths, last_only=True
    )
    assert rows.last_tokens.tolist() == [2, 3, 10]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_backend_says_so(tmp_path: Path) -> None:
    found = why_not_here("cuda:sm_90", None)
    assert found is not None
    assert "no CUDA device" in found[0]
    with pytest.raises(BackendUnavailableError, match="cannot be loaded"):
        open_packed(
            tmp_path,
            RING_NANO / "config.json",
            library=tmp_path / "nothing.so",
            model_digest=str,
            options=CudaOptions(),
        )


def test_the_packed_file_names_its_cache_format(tmp_path: Path) -> None:
    from safetensors import safe_open

    from ringexport.packing.writer import WEIGHTS_FILE, write_packed

    with CheckpointWeights.open(RING_NANO) as weights:
        write_packed(weights, tmp_path)
    with safe_open(tmp_path / WEIGHTS_FILE, framework="pt") as file:
        assert file.metadata()["kv_cache"] == "bf16"
