"""The memory that the fast engine plans, and contexts stretched by YaRN, without a GPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ringexport.checkpoint import RingConfig
from ringexport.errors import RingExportError
from ringexport.ops.rotary import rotary_tables
from ringexport.packing.layout import packed_tensors
from ringexport.pipeline.packed import packed_recipe
from ringexport.runtime.backends.cuda.plan import plan_memory
from ringexport.runtime.backends.cuda.runner import CudaOptions
from ringexport.runtime.backends.cuda.state import MemoryPlan
from ringexport.runtime.backends.cuda.weights import DeviceWeights

CONFIGS = Path(__file__).parents[1] / "checkpoint" / "data"
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


class Workspaces:
    """Says what the kernels need: 1,000 bytes a token for experts, 10 for routers, 5 to prefill."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def workspace_bytes(self, op: str, **fields: Any) -> int:
        tokens = fields.get("tokens", fields.get("max_length"))
        assert isinstance(tokens, int)
        self.asked.append((op, tokens))
        return {"experts": 1000, "router": 10, "linear_attention_prefill": 5}[op] * tokens


def weights_of(name: str, recipe: str, config: RingConfig | None = None) -> DeviceWeights:
    config = config or RingConfig.from_file(CONFIGS / f"{name}.json")
    chosen = packed_recipe(recipe, config)
    tensors = {
        tensor.name: torch.empty(tensor.shape, dtype=DTYPES[str(tensor.dtype)], device="meta")
        for tensor in packed_tensors(config, chosen.formats)
    }
    return DeviceWeights(config, tensors, source="nothing", fp8_cache=chosen.fp8_cache)


def plan(weights: DeviceWeights, rows: int, capacity: int, **options: int) -> MemoryPlan:
    return plan_memory(
        weights,
        Workspaces(),
        CudaOptions(max_batch=rows, **options),
        capacity=capacity,
        cache_dtype=torch.float8_e4m3fn if weights.fp8_cache else torch.bfloat16,
    )


def test_the_parts_of_ring_mini() -> None:
    weights = weights_of("ring-mini-linear-2.0", "fp8")
    found = plan(weights, 8, 4096)
    assert found.weights == weights.nbytes
    assert 17.1e9 < found.weights < 17.3e9
    assert found.recurrent_state == 8 * 16 * 16 * 128 * 128 * 4
    assert found.kv_cache == 8 * 4 * 2 * 4096 * 4 * 128 * 2
    per_token = 4 * 2048 + 2 * 8192 + 3 * 2048 + 2 * 2048 + 4 * 2048
    logits = (2 * 8 + 64) * 157184 * 4
    rotary = 4096 * 64 * 4
    tokens = 8 * 4096
    assert found.workspace == tokens * (per_token + 1015) + logits + rotary + 900_000_000


@pytest.mark.parametrize(
    ("options", "rows", "capacity", "tokens"),
    [
        ({}, 1, 100, 100),
        ({"prefill_chunk": 64}, 2, 100, 128),
        ({"prefill_tokens": 150}, 2, 100, 150),
    ],
)
def test_a_step_is_no_larger_than_its_rows(
    options: dict[str, int], rows: int, capacity: int, tokens: int
) -> None:
    library = Workspaces()
    plan_memory(
        weights_of("ring-mini-linear-2.0", "bf16"),
        library,
        CudaOptions(max_batch=rows, **options),
        capacity=capacity,
        cache_dtype=torch.bfloat16,
    )
    assert max(asked for _, asked in library.asked) == tokens
    assert {op for op, _ in library.asked} == {"experts", "router", "linear_attention_prefill"}


def test_formats_change_what_is_needed() -> None:
    plans = {name: plan(weights_of("ring-mini-linear-2.0", name), 4, 4096) for name in
             ("bf16", "fp8", "fp8-all", "int8")}  # fmt: skip
    assert plans["bf16"].weights > 1.9 * plans["fp8"].weights
    assert plans["fp8"].weights == plans["int8"].weights
    assert plans["int8"].workspace > plans["fp8"].workspace  # its products are int32 first
    assert 2 * plans["fp8-all"].kv_cache == plans["fp8"].kv_cache
    assert plans["fp8-all"].workspace > plans["fp8"].workspace  # a copy of the cache in bf16


def test_ring_flash_fits_one_h200() -> None:
    weights = weights_of("ring-flash-linear-2.0", "fp8")
    free = 149_000_000_000
    plan(weights, 1, 131072).check(free)
    plan(weights, 64, 4096).check(free)
    with pytest.raises(RingExportError, match="64 sequences of 131,072 tokens need"):
        plan(weights, 64, 131072).check(free)


def test_contexts_of_yarn() -> None:
    config = RingConfig.from_file(CONFIGS / "ring-mini-linear-2.0.json").with_yarn(4.0)
    assert config.context_length == 524_288
    weights = weights_of("", "fp8", config)
    one = plan(weights, 1, config.context_length)
    assert one.kv_cache == 524_288 * 8192
    one.check(25_000_000_000)
    plan(weights, 16, config.context_length).check(100_000_000_000)
    cos, sin = rotary_tables(config.inv_freq(), config.attention_factor, config.context_length)
    assert cos.shape == sin.shape == (524_288, config.rotary_dim // 2)
    for place in (0, 131_072, 524_287):
        angle = place * config.inv_freq()
        for table, function in ((cos, np.cos), (sin, np.sin)):
            expected = config.attention_factor * function(angle)
            assert np.abs(table[place] - expected).max() < 1e-6
