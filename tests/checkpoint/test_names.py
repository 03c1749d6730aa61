"""The table of tensor names against the published counts and an independent table."""

import math
from pathlib import Path
from typing import Any

import pytest

from ringexport.checkpoint import RingConfig, TensorKind, expected_tensors
from tests.checkpoints import tensor_shapes, tiny_config

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize(
    ("model", "count", "parameters", "gigabytes"),
    [
        ("mini", 14_845, 16_423_448_320, 32.847),
        ("flash", 24_217, 104_181_665_536, 208.36),
    ],
)
def test_published_counts(model: str, count: int, parameters: int, gigabytes: float) -> None:
    specs = expected_tensors(RingConfig.from_file(DATA / f"ring-{model}-linear-2.0.json"))
    assert len(specs) == count
    assert sum(math.prod(spec.shape) for spec in specs.values()) == parameters
    assert 2 * parameters / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_published_parameters_by_part() -> None:
    specs = expected_tensors(RingConfig.from_file(DATA / "ring-mini-linear-2.0.json"))

    def parameters(prefix: str) -> int:
        return sum(math.prod(s.shape) for n, s in specs.items() if n.startswith(prefix))

    assert parameters("model.layers.0.attention.") == 20_973_824
    assert parameters("model.layers.4.attention.") == 10_486_016
    assert parameters("model.layers.1.mlp.") == 808_976_640
    assert parameters("model.layers.1.mlp.experts.0.") == 3_145_728


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_hidden_layers": 8, "first_k_dense_replace": 0},
        {"num_hidden_layers": 3, "first_k_dense_replace": 3},
        {"tie_word_embeddings": True},
        {"moe_router_enable_expert_bias": False},
        {"num_shared_experts": 2, "moe_shared_expert_intermediate_size": 24},
        {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 40},
    ],
    ids=repr,
)
def test_table_and_parameter_count_agree_with_an_independent_table(
    overrides: dict[str, Any],
) -> None:
    values = tiny_config(**overrides)
    config = RingConfig.from_dict(values, source="config.json")
    specs = expected_tensors(config)
    shapes = tensor_shapes(values)
    assert {name: spec.shape for name, spec in specs.items()} == shapes
    assert config.num_parameters == sum(math.prod(shape) for shape in shapes.values())


def test_every_kind_is_used_and_norms_are_vectors() -> None:
    specs = expected_tensors(RingConfig.from_dict(tiny_config(), source="config.json"))
    assert {spec.kind for spec in specs.values()} == set(TensorKind)
    for name, spec in specs.items():
        assert (spec.kind is TensorKind.NORM) == ("norm" in name), name
        assert len(spec.shape) == (1 if "norm" in name or "bias" in name else 2), name
