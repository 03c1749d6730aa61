"""Contracts with 8-bit weights, run by ONNX Runtime, against fp64 on the same codes."""

import ml_dtypes
import numpy as np
import pytest

from ringexport.compare.tolerances import TOLERANCES
from ringexport.ops.moe import INT8_EXPERTS, ROUTED_INT8_EXPERTS, router
from ringexport.ops.projection import (
    FP8_QUANTIZE,
    INT8_PROJECTION,
    int8_block_size,
    int8_projection,
)
from tests.ops.test_contracts import ROUTINGS, Array, assert_close, normal, run_contract

KERNEL_FACTOR = TOLERANCES["kernel_factor"].bound
"""L2: how a kernel rounds inputs to int8 is its own; its error may be twice the reference's."""


def int8_weight(rng: np.random.Generator, *shape: int) -> tuple[Array, Array]:
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    return codes, (rng.random(shape[:-1]) / 500 + 1e-3).astype(np.float32)


@pytest.mark.parametrize(("blocks", "size"), [(1, 16), (4, 64), (3, 32)])
@pytest.mark.parametrize("tokens", [1, 7, 63])
def test_int8_projection(blocks: int, size: int, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    codes, scale = int8_weight(rng, 24, blocks, size)
    hidden = normal(rng, tokens, blocks * size)
    attributes = {"in_features": blocks * size, "out_features": 24, "block_size": size}
    inputs = {"hidden": hidden, "weight": codes, "weight_scale": scale}
    (actual,) = run_contract(INT8_PROJECTION, attributes, inputs)
    rounded = golden_round(hidden, size)
    real = (codes.astype(np.float64) - 128) * scale[..., None]
    golden = rounded @ real.reshape(24, -1).T
    assert_close(int8_projection(hidden, codes, scale), golden)
    exact = hidden.astype(np.float64) @ real.reshape(24, -1).T
    error, allowed = (np.linalg.norm(array - exact) for array in (actual, golden))
    assert 0 < error <= KERNEL_FACTOR * allowed


def test_a_scale_per_row_is_that_of_all_its_blocks() -> None:
    rng = np.random.default_rng(8)
    codes, scale = int8_weight(rng, 24, 4, 32)
    attributes = {"in_features": 128, "out_features": 24, "block_size": 32}
    rows = {"hidden": normal(rng, 5, 128), "weight": codes, "weight_scale": scale[:, :1].copy()}
    blocks = rows | {"weight_scale": np.repeat(scale[:, :1], 4, axis=1)}
    (of_rows,), (of_blocks,) = (
        run_contract(INT8_PROJECTION, attributes, inputs) for inputs in (rows, blocks)
    )
    np.testing.assert_array_equal(of_rows, of_blocks)
    np.testing.assert_array_equal(
        int8_projection(*rows.values()), int8_projection(*blocks.values())
    )


@pytest.mark.parametrize("name", ["grouped", "one group"])
def test_routed_int8_experts_are_router_and_int8_experts(name: str) -> None:
    routing, rng = ROUTINGS[name], np.random.default_rng(6)
    count, inner, width, block = routing.num_experts, 32, 64, 32
    hidden = normal(rng, 9, width)
    weight, bias = normal(rng, width, count) / 5, 0.1 * normal(rng, count) - 1.0
    gate_up, gate_up_scale = int8_weight(rng, count, 2 * inner, width)
    down, down_scale = int8_weight(rng, count, width, inner)
    matrices = {
        "gate_up_proj": gate_up,
        "gate_up_scale": gate_up_scale[..., None],
        "down_proj": down,
        "down_scale": down_scale[..., None],
    }
    sizes = {"num_experts": count, "top_k": routing.top_k, "block_size": block}
    attributes = {key: value for key, value in routing.attributes().items() if key != "normalize"}
    inputs = {"hidden": hidden, "router_weight": weight, "expert_bias": bias} | matrices
    output, ids = run_contract(ROUTED_INT8_EXPERTS, attributes | sizes, inputs)
    expected, weights = router(hidden, weight, bias, routing)
    np.testing.assert_array_equal(ids, expected)
    routed = {"hidden": hidden, "expert_ids": expected, "routing_weights": weights} | matrices
    (golden,) = run_contract(INT8_EXPERTS, sizes, routed)
    assert_close(output, golden)


def golden_round(values: Array, size: int) -> Array:
    """Round to 255 levels per block, one block at a time, fp64."""
    rounded = values.astype(np.float64)
    for start in range(0, values.shape[-1], size):
        block = rounded[:, start : start + size]
        step = np.abs(block).max(axis=-1, keepdims=True) / 127
        rounded[:, start : start + size] = np.rint(block / step) * step
    return rounded


@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("block", [16, 32])
def test_int8_experts(tokens: int, block: int) -> None:
    rng = np.random.default_rng(tokens)
    num_experts, top_k, width, inner = 16, 4, 64, 32
    hidden = normal(rng, tokens, width)
    ids = np.argsort(rng.random((tokens, num_experts)), axis=-1)[:, :top_k].astype(np.int64)
    weights = rng.random((tokens, top_k)).astype(np.float32)
    gate_up, gate_up_scale = int8_weight(rng, num_experts, 2 * inner, width // block, block)
    down, down_scale = int8_weight(rng, num_experts, width, inner // block, block)
    inputs = {
        "hidden": hidden,
        "expert_ids": ids,
        "routing_weights": weights,
        "gate_up_proj": gate_up.reshape(num_experts, 2 * inner, width),
        "gate_up_scale": gate_up_scale,
        "down_proj": down.reshape(num_experts, width, inner),
        "down_scale": down_scale,
    }
    attributes = {"num_experts": num_experts, "top_k": top_k, "block_size": block}
    (actual,) = run_contract(INT8_EXPERTS, attributes, inputs)
    real_gate_up = ((gate_up.astype(np.float64) - 128) * gate_up_scale[..., None]).reshape(
        num_experts, 2 * inner, width
    )
    real_down = ((down.astype(np.float64) - 128) * down_scale[..., None]).reshape(
        num_experts, width, inner
    )
    golden = np.zeros((tokens, width))
    for token in range(tokens):
        for expert, share in zip(ids[token], weights[token], strict=True):
            gate = real_gate_up[expert, 0::2] @ hidden[token]
            up = real_gate_up[expert, 1::2] @ hidden[token]
            golden[token] += share * (real_down[expert] @ (gate / (1 + np.exp(-gate)) * up))
    # Both inputs of an expert are rounded to int8 inside the op: about 1 % together.
    assert np.linalg.norm(actual - golden) < 0.03 * np.linalg.norm(golden)


def test_fp8_quantize_rounds_every_token_under_its_own_scale() -> None:
    rng = np.random.default_rng(5)
    hidden = normal(rng, 9, 40) * np.logspace(-3, 3, 9, dtype=np.float32)[:, None]
    hidden[4] = 0.0
    (actual,) = run_contract(FP8_QUANTIZE, {}, {"hidden": hidden})
    scale = np.maximum(np.abs(hidden).max(axis=-1, keepdims=True) / np.float32(448), 1e-30)
    codes = (hidden / scale).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_allclose(actual, codes.astype(np.float32) * scale, rtol=1e-6)
    assert (actual[4] == 0).all()
    relative = np.abs(actual - hidden).max(axis=-1) / np.maximum(np.abs(hidden).max(axis=-1), 1e-9)
    assert (relative < 1 / 16).all()


def test_block_size_divides_every_input() -> None:
    assert int8_block_size(2048, 512) == 64
    assert int8_block_size(256, 32) == 32
    assert int8_block_size(48) == 16
    assert int8_block_size(40) is None
