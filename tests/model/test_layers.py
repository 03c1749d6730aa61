"""Norms, rotary embedding, router and experts against the fp64 golden."""

import numpy as np
import pytest
import torch

from ringexport.model.layers import (
    apply_rotary,
    group_rms_norm,
    rms_norm,
    route,
    routed_experts,
)
from ringexport.ops.rotary import rotary_tables
from tests.golden import generate
from tests.model.support import VALUE_RTOL, golden, ring_config
from tests.numerics import assert_close

EPS = 1e-6


def fp32(name: str) -> torch.Tensor:
    return torch.from_numpy(golden("ops")[name]).float()


@pytest.mark.parametrize("groups", [1, 3, 8])
def test_group_norm_matches_the_golden(groups: int) -> None:
    actual = group_rms_norm(fp32("group_norm.input"), fp32("group_norm.weight"), groups, EPS)
    assert_close(actual, golden("ops")[f"group_norm.output.{groups}"], rtol=VALUE_RTOL)


def test_group_norm_of_constants() -> None:
    constants, weight = torch.tensor([3.0, -2e-3, 1e-3]), torch.arange(1.0, 13.0)
    expected = constants / (constants.square() + EPS).sqrt()
    actual = group_rms_norm(constants.repeat_interleave(4)[None], weight, 3, EPS)
    assert_close(actual[0], expected.repeat_interleave(4) * weight, rtol=1e-6)


def test_norms_compute_in_the_dtype_of_their_weight() -> None:
    hidden = (100 * torch.randn(4, 32)).bfloat16()
    actual = rms_norm(hidden, torch.ones(32), EPS)
    assert actual.dtype == torch.float32
    assert_close(actual, rms_norm(hidden.double(), torch.ones(32).double(), EPS), rtol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "yarn"])
def test_rotary_matches_the_golden_up_to_524288_positions(kind: str) -> None:
    yarn = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 131072,
    }
    config = ring_config(
        generate.Config(
            head_dim=32,
            rope_theta=1e6,
            rope_scaling=yarn if kind == "yarn" else None,
            max_position_embeddings=131072,
        )
    )
    np.testing.assert_allclose(
        config.inv_freq(), golden("ops")[f"rope.{kind}.inv_freq"], rtol=1e-14
    )
    assert config.attention_factor == pytest.approx(
        golden("ops")[f"rope.{kind}.attention_factor"][0], rel=1e-14
    )
    tables = rotary_tables(config.inv_freq(), config.attention_factor, 524288)
    cos, sin = (torch.from_numpy(table)[fp32("rope.positions").long()] for table in tables)
    actual = apply_rotary(fp32("rope.input"), cos, sin)
    assert_close(actual, golden("ops")[f"rope.{kind}.output"], rtol=VALUE_RTOL)


def test_yarn_golden_differs_from_plain() -> None:
    ops = golden("ops")
    assert np.abs(ops["rope.yarn.output"] - ops["rope.plain.output"]).max() > 0.1


@pytest.mark.parametrize("case", generate.ROUTER_CASES)
@pytest.mark.parametrize("bias", ["zero", "mixed", "negative"])
def test_router_matches_the_golden(case: str, bias: str) -> None:
    name = f"router.{case}.{bias}"
    config = ring_config(generate.ROUTER_CASES[case])
    expert_ids, weights = route(fp32(f"router.{case}.logits"), fp32(f"{name}.bias"), config)
    np.testing.assert_array_equal(expert_ids, golden("ops")[f"{name}.expert_ids"])
    assert_close(weights, golden("ops")[f"{name}.routing_weights"], rtol=VALUE_RTOL)
    assert (expert_ids.dtype, weights.dtype) == (torch.int64, torch.float32)


def test_router_ties_go_to_the_lower_id() -> None:
    """All 256 scores equal, as after a router of zeros; torch.topk would not promise an order."""
    config = ring_config(
        generate.Config(num_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4)
    )
    expert_ids, weights = route(torch.zeros(3, 256), torch.zeros(256), config)
    assert expert_ids.tolist() == [list(range(8))] * 3
    assert_close(weights, np.full((3, 8), 2.5 / 8), rtol=1e-6)


def test_experts_with_and_without_tokens() -> None:
    """First and last expert unused, one expert chosen by all, one twice as heavy."""
    random = torch.Generator().manual_seed(3)
    weights = {
        "mlp.experts.gate_up": torch.randn(6, 16, 12, generator=random),
        "mlp.experts.down": torch.randn(6, 12, 8, generator=random),
    }
    hidden = torch.randn(5, 12, generator=random)
    expert_ids = torch.tensor([[2, 1], [4, 2], [2, 3], [1, 2], [2, 4]])
    routing_weights = torch.rand(5, 2, generator=random) + torch.tensor([0.0, 1.0])
    actual = routed_experts(hidden, weights, expert_ids, routing_weights)
    expected = np.zeros((5, 12))
    for token in range(5):
        for expert, factor in zip(expert_ids[token], routing_weights[token], strict=True):
            gate_up = weights["mlp.experts.gate_up"][expert].double().numpy()
            x = hidden[token].double().numpy()
            inner = generate.silu(gate_up[:8] @ x) * (gate_up[8:] @ x)
            down = weights["mlp.experts.down"][expert].double().numpy()
            expected[token] += float(factor) * (down @ inner)
    assert_close(actual, expected, rtol=VALUE_RTOL)
