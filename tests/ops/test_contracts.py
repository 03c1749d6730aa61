"""Every contract op, run by ONNX Runtime through its function body, against an fp64 loop."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnxruntime as ort
import pytest

from ringexport.errors import ShapeError
from ringexport.ops.attention import ATTENTION, attention
from ringexport.ops.decay import DecayIndex, layer_factor, log_decay, slopes
from ringexport.ops.linear_attention import (
    LINEAR_ATTENTION,
    MASKED_LINEAR_ATTENTION,
    TOKEN_MASK,
    linear_attention,
)
from ringexport.ops.moe import EXPERTS, ROUTED_EXPERTS, ROUTER, Routing, experts, router
from ringexport.ops.spec import DOMAIN, OPSET, OpSpec
from tests import numerics

Array = npt.NDArray[Any]
RELATIVE = 1e-5
"""L1 of craft: fp32 sums against fp64, relative to the largest value."""


def run_contract(
    spec: OpSpec, attributes: Mapping[str, int | float], inputs: Mapping[str, Array]
) -> list[Array]:
    """Run one contract op in ONNX Runtime."""
    infos = [
        onnx.helper.make_tensor_value_info(
            name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
        )
        for name, value in inputs.items()
    ]
    names = [arg.name for arg in spec.outputs]
    node = onnx.helper.make_node(
        spec.name, [arg.name for arg in spec.inputs], names, domain=DOMAIN, **attributes
    )
    dtypes = {"fp32": 1, "int64": 7}
    float_type = onnx.helper.np_dtype_to_tensor_dtype(next(iter(inputs.values())).dtype)
    outputs = [
        onnx.helper.make_tensor_value_info(
            arg.name, dtypes.get(arg.dtype, float_type), arg.shape.split()
        )
        for arg in spec.outputs
    ]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "op", infos, outputs),
        functions=[onnx.parser.parse_function(spec.function(attributes))],
        opset_imports=[
            onnx.helper.make_opsetid("", OPSET),
            onnx.helper.make_opsetid(DOMAIN, 1),
            onnx.helper.make_opsetid("com.microsoft", 1),
        ],
        ir_version=10,
    )
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(names, dict(inputs)))


def assert_close(actual: Array, golden: Array, bound: float = RELATIVE) -> None:
    numerics.assert_close(actual, golden, rtol=bound)


def normal(rng: np.random.Generator, *shape: int) -> npt.NDArray[np.float32]:
    return rng.standard_normal(shape).astype(np.float32)


def golden_linear_attention(
    query: Array, key: Array, value: Array, state: Array, decay: Array, scale: float
) -> tuple[Array, Array]:
    """Parallel form of one row, fp64: no recurrence, so nothing is shared with the references."""
    tokens = query.shape[0]
    since = np.arange(tokens)[:, None] - np.arange(tokens)[None, :]
    keep = np.where(since >= 0, np.exp(decay[:, None, None] * since), 0.0)
    scores = np.einsum("thk,shk->hts", query, key) * keep
    carried = np.exp(decay[None, :] * (np.arange(tokens) + 1)[:, None])
    output = np.einsum("hts,shv->thv", scores, value)
    output += np.einsum("thk,hkv->thv", query, state) * carried[..., None]
    left = np.exp(decay[None, :] * (tokens - 1 - np.arange(tokens))[:, None])
    present = np.exp(decay * tokens)[:, None, None] * state
    present += np.einsum("th,thk,thv->hkv", left, key, value)
    return scale * output, present


@pytest.mark.parametrize(
    ("heads", "dim", "tokens", "lengths"),
    [(4, 16, 1, [1, 1]), (4, 16, 7, [7, 3]), (6, 8, 63, [63, 1, 40]), (3, 64, 500, [500])],
)
def test_linear_attention(heads: int, dim: int, tokens: int, lengths: list[int]) -> None:
    rng = np.random.default_rng(tokens)
    rows = len(lengths)
    query, key, value = (normal(rng, rows, tokens, heads, dim) for _ in range(3))
    state = normal(rng, rows, heads, dim, dim)
    decay = log_decay(heads, 2, 6, DecayIndex.SERVING)
    counts = np.array(lengths, dtype=np.int32)
    scale = dim**-0.5
    reference = linear_attention(query, key, value, state, decay, counts, query_scale=scale)
    flat = {
        name: array.reshape(rows, tokens, -1)
        for name, array in (("query", query), ("key", key), ("value", value))
    }
    flat |= {"past_state": state, "log_decay": decay, "lengths": counts}
    attributes = {"num_heads": heads, "query_scale": scale}
    output, present = run_contract(LINEAR_ATTENTION, attributes, flat)
    for row, length in enumerate(lengths):
        inputs = [array[row, :length].astype(np.float64) for array in (query, key, value)]
        golden, golden_state = golden_linear_attention(
            *inputs, state[row].astype(np.float64), decay.astype(np.float64), scale
        )
        actual = output[row, :length].reshape(golden.shape)
        assert_close(actual, golden)
        assert_close(reference[0][row, :length], golden)
        assert_close(present[row], golden_state, RELATIVE * np.sqrt(length))
        assert_close(reference[1][row], golden_state, RELATIVE * np.sqrt(length))


def test_slow_decay_over_a_long_text() -> None:
    """The last linear layer of Ring-mini forgets half of its state in 3,371 tokens."""
    rng = np.random.default_rng(20)
    tokens, dim = 20_000, 4
    query, key, value = (normal(rng, 1, tokens, 1, dim) for _ in range(3))
    decay = log_decay(16, 18, 20, DecayIndex.SERVING)[-1:]
    golden = np.zeros((dim, dim))
    for k, v in zip(key[0, :, 0].astype(np.float64), value[0, :, 0], strict=True):
        golden = np.exp(np.float64(decay[0])) * golden + np.outer(k, v)
    state = np.zeros((1, 1, dim, dim), dtype=np.float32)
    counts = np.array([tokens], dtype=np.int32)
    _, present = linear_attention(query, key, value, state, decay, counts, query_scale=1.0)
    assert_close(present[0, 0], golden)


@pytest.mark.parametrize(
    ("position", "lengths"),
    [([0, 0], [5, 5]), ([0, 0], [5, 2]), ([9], [4]), ([9, 3, 0], [1, 1, 1])],
)
def test_attention(position: list[int], lengths: list[int]) -> None:
    rng = np.random.default_rng(len(lengths))
    rows, tokens, heads, kv_heads, dim, capacity = len(lengths), max(lengths), 4, 2, 16, 24
    query = normal(rng, rows, tokens, heads, dim)
    key, value = (normal(rng, rows, tokens, kv_heads, dim) for _ in range(2))
    cache = [normal(rng, rows, kv_heads, capacity, dim) for _ in range(2)]
    counts, start = np.array(lengths, dtype=np.int32), np.array(position, dtype=np.int32)
    scale = dim**-0.5
    arrays64 = [array.astype(np.float64) for array in (query, key, value, *cache)]
    golden = attention(*arrays64[:3], tuple(arrays64[3:]), start, counts, softmax_scale=scale)
    inputs = {
        name: array.reshape(rows, tokens, -1)
        for name, array in (("query", query), ("key", key), ("value", value))
    }
    inputs |= {"past_key": cache[0], "past_value": cache[1], "position": start, "lengths": counts}
    attributes = {"num_heads": heads, "num_kv_heads": kv_heads, "softmax_scale": scale}
    output, present_key, _ = run_contract(ATTENTION, attributes, inputs)
    for row, length in enumerate(lengths):
        actual = output[row, :length].reshape(length, heads, dim)
        assert_close(actual, golden[0][row, :length])
        seen = position[row] + length
        assert_close(present_key[row, :, :seen], golden[1][row, :, :seen])


ROUTINGS = {
    "grouped": Routing(
        num_experts=16, top_k=4, n_group=4, topk_group=2, normalize=True, routed_scaling_factor=2.5
    ),
    "one group": Routing(
        num_experts=12, top_k=3, n_group=1, topk_group=1, normalize=True, routed_scaling_factor=1.0
    ),
    "raw weights": Routing(
        num_experts=16, top_k=8, n_group=8, topk_group=4, normalize=False, routed_scaling_factor=2.0
    ),
}


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize("bias", [0.0, -3.0], ids=["any bias", "all biased scores below zero"])
def test_router(routing: Routing, bias: float) -> None:
    rng = np.random.default_rng(3)
    hidden = normal(rng, 41, 24)
    weight = normal(rng, 24, routing.num_experts) / 5
    expert_bias = bias + 0.1 * normal(rng, routing.num_experts)
    ids, weights = router(hidden, weight, expert_bias, routing)
    inputs = {"hidden": hidden, "router_weight": weight, "expert_bias": expert_bias}
    actual_ids, actual_weights = run_contract(ROUTER, routing.attributes(), inputs)
    golden = golden_router(hidden, weight, expert_bias, routing)
    np.testing.assert_array_equal(ids, golden[0])
    np.testing.assert_array_equal(actual_ids, golden[0])
    assert_close(actual_weights, golden[1])
    assert_close(weights, golden[1])


def golden_router(
    hidden: Array, weight: Array, bias: Array, routing: Routing
) -> tuple[Array, Array]:
    """Plain Python over one token at a time, fp64."""
    size = routing.num_experts // routing.n_group
    all_ids, all_weights = [], []
    for token in hidden.astype(np.float64):
        score = 1 / (1 + np.exp(-(token @ weight.astype(np.float64))))
        biased = score + bias
        groups = [biased[g * size : (g + 1) * size] for g in range(routing.n_group)]
        ranked = sorted(range(routing.n_group), key=lambda g: (-np.sort(groups[g])[-2:].sum(), g))
        opened = set(ranked[: routing.topk_group])
        allowed = [e for e in range(routing.num_experts) if e // size in opened]
        ids = sorted(allowed, key=lambda e: (-biased[e], e))[: routing.top_k]
        chosen = score[ids]
        if routing.normalize:
            chosen = chosen / (chosen.sum() + 1e-20)
        all_ids.append(ids)
        all_weights.append(chosen * routing.routed_scaling_factor)
    return np.array(all_ids), np.array(all_weights)


def test_router_breaks_ties_towards_the_lower_expert() -> None:
    routing = ROUTINGS["grouped"]
    hidden = np.zeros((3, 8), dtype=np.float32)
    inputs = {
        "hidden": hidden,
        "router_weight": np.ones((8, 16), dtype=np.float32),
        "expert_bias": np.zeros(16, dtype=np.float32),
    }
    ids, _ = run_contract(ROUTER, routing.attributes(), inputs)
    expected = np.tile(np.arange(4), (3, 1))
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(router(*inputs.values(), routing)[0], expected)


@pytest.mark.parametrize("tokens", [1, 63])
def test_experts(tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    num_experts, top_k, width, inner = 16, 4, 24, 8
    hidden = normal(rng, tokens, width)
    # Only a few experts, so that others have no token at all.
    ids = np.argsort(rng.random((tokens, 6)), axis=-1)[:, :top_k].astype(np.int64) * 3
    weights = rng.random((tokens, top_k)).astype(np.float32) * 2
    weights[0, 1] = 0.0
    gate_up = normal(rng, num_experts, 2 * inner, width) / 5
    down = normal(rng, num_experts, width, inner) / 3
    golden = np.zeros((tokens, width))
    for token in range(tokens):
        for expert, share in zip(ids[token], weights[token], strict=True):
            gate = gate_up[expert, 0::2].astype(np.float64) @ hidden[token]
            up = gate_up[expert, 1::2].astype(np.float64) @ hidden[token]
            golden[token] += share * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
    inputs = {
        "hidden": hidden,
        "expert_ids": ids,
        "routing_weights": weights,
        "gate_up_proj": gate_up,
        "down_proj": down,
    }
    (actual,) = run_contract(EXPERTS, {"num_experts": num_experts, "top_k": top_k}, inputs)
    assert_close(actual, golden)
    assert_close(experts(*inputs.values()), golden)


@pytest.mark.parametrize("name", ["grouped", "one group"])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24)], ids=["tokens", "rows"])
def test_routed_experts_are_router_and_experts(name: str, shape: tuple[int, ...]) -> None:
    routing, rng = ROUTINGS[name], np.random.default_rng(9)
    count, inner, width = routing.num_experts, 8, shape[-1]
    hidden = normal(rng, *shape)
    weight = normal(rng, width, count) / 5
    # Scores of 1e-17 as well: their logarithms must not be cut off.
    hidden.reshape(-1, width)[0] *= 20.0
    inputs = {
        "hidden": hidden,
        "router_weight": weight,
        "expert_bias": 0.1 * normal(rng, count) - 1.0,
        "gate_up_proj": normal(rng, count, 2 * inner, width) / 5,
        "down_proj": normal(rng, count, width, inner) / 3,
    }
    attributes = {key: value for key, value in routing.attributes().items() if key != "normalize"}
    output, ids = run_contract(ROUTED_EXPERTS, attributes, inputs)
    tokens = hidden.reshape(-1, width)
    expected, weights = router(tokens, weight, inputs["expert_bias"], routing)
    np.testing.assert_array_equal(ids, expected)
    golden = experts(tokens, expected, weights, inputs["gate_up_proj"], inputs["down_proj"])
    assert output.shape == shape
    assert_close(output.reshape(golden.shape), golden)


def test_routed_experts_break_ties_towards_the_lower_expert() -> None:
    routing = ROUTINGS["grouped"]
    attributes = {key: value for key, value in routing.attributes().items() if key != "normalize"}
    gate_up = np.ones((16, 2, 8), dtype=np.float32)
    down = np.arange(16, dtype=np.float32)[:, None, None] * np.ones((1, 8, 1), dtype=np.float32)
    inputs = {
        "hidden": np.ones((3, 8), dtype=np.float32),
        "router_weight": np.zeros((8, 16), dtype=np.float32),
        "expert_bias": np.zeros(16, dtype=np.float32),
        "gate_up_proj": gate_up,
        "down_proj": down,
    }
    output, ids = run_contract(ROUTED_EXPERTS, attributes, inputs)
    np.testing.assert_array_equal(ids, np.tile(np.arange(4), (3, 1)))
    # Expert i contributes i times the same: the mean of 0 to 3 tells that the op took these.
    value = 2.5 * 1.5 * 64 / (1 + np.exp(-8.0))
    np.testing.assert_allclose(output, value, rtol=1e-5)


def test_masked_linear_attention_is_linear_attention() -> None:
    rng = np.random.default_rng(4)
    shape, lengths = (3, 6, 8), np.array([6, 1, 4], dtype=np.int32)
    inputs = {name: normal(rng, *shape) for name in ("query", "key", "value")}
    inputs["past_state"] = normal(rng, 3, 2, 4, 4)
    inputs["log_decay"] = np.array([-0.5, -0.01], dtype=np.float32)
    attributes = {"num_heads": 2, "query_scale": 0.5}
    whole = run_contract(LINEAR_ATTENTION, attributes, inputs | {"lengths": lengths})
    tokens = np.zeros(shape[:2], dtype=np.int64)
    (mask,) = run_contract(TOKEN_MASK, {}, {"tokens": tokens, "lengths": lengths})
    np.testing.assert_array_equal(mask[..., 0], np.arange(6) < lengths[:, None])
    parts = run_contract(MASKED_LINEAR_ATTENTION, attributes, inputs | {"mask": mask})
    for part, expected in zip(parts, whole, strict=True):
        np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize(
    "spec", [ATTENTION, EXPERTS, LINEAR_ATTENTION, ROUTER], ids=lambda s: s.name
)
def test_contract_is_complete(spec: OpSpec) -> None:
    names = [arg.name for arg in (*spec.inputs, *spec.outputs)]
    assert len(set(names)) == len(names)
    assert all(arg.text and arg.shape and arg.dtype for arg in (*spec.inputs, *spec.outputs))


def test_shape_errors_name_both_shapes() -> None:
    state = np.zeros((1, 2, 4, 4), dtype=np.float32)
    good, bad = np.zeros((1, 3, 2, 4), dtype=np.float32), np.zeros((1, 3, 2, 5), dtype=np.float32)
    lengths = np.array([3], dtype=np.int32)
    decay = np.zeros(2, dtype=np.float32)
    with pytest.raises(ShapeError, match=r"key has shape \[1, 3, 2, 5\], expected \[B=1, T=3, H=2"):
        linear_attention(good, bad, good, state, decay, lengths, query_scale=1.0)


@pytest.mark.parametrize(
    ("layer", "head", "form", "expected"),
    [
        (0, 0, DecayIndex.SERVING, -0.707114),
        (0, 15, DecayIndex.SERVING, -0.00390629),
        (10, 0, DecayIndex.SERVING, -0.334952),
        (18, 15, DecayIndex.SERVING, -0.000205631),
        (0, 0, DecayIndex.HF, -0.744330),
        (18, 0, DecayIndex.HF, -0.0744394),
        (18, 15, DecayIndex.HF, -0.000411223),
        (0, 0, DecayIndex.CLAMPED, -0.707114),
        (1, 0, DecayIndex.CLAMPED, -0.707114),
        (18, 15, DecayIndex.CLAMPED, -0.000411223),
    ],
)
def test_log_decay_of_ring_mini(layer: int, head: int, form: DecayIndex, expected: float) -> None:
    assert log_decay(16, layer, 20, form)[head] == pytest.approx(expected, rel=2e-6)


def test_slopes_of_a_head_count_that_is_no_power_of_two() -> None:
    expected = [2.0**-n for n in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    np.testing.assert_allclose(slopes(12), expected, rtol=1e-15)
    assert layer_factor(0, 1, DecayIndex.SERVING) == pytest.approx(1.00001)
