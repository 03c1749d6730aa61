"""Attention of many new tokens over a cache against fp64: ragged rows, groups, slots, tiles."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ringexport.errors import ShapeError
from tests.kernels.support import DTYPES, Guarded, assert_within_torch, library

pytestmark = pytest.mark.gpu
HALVES = [torch.bfloat16, torch.float16]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Rows of `lengths` new tokens behind `positions` tokens in the cache."""

    lengths: tuple[int, ...]
    positions: tuple[int, ...]
    group: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    slots: tuple[int, ...] | None = None
    packed: bool = False

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads

    @property
    def context(self) -> int:
        return max(map(sum, zip(self.lengths, self.positions, strict=True)))


class Inputs:
    """Random inputs of a case; what the kernel may not read is NaN."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        generator = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cuda")

        rows, longest = len(case.lengths), max(case.lengths)
        self.starts = [row * longest for row in range(rows)]
        if case.packed:
            self.starts = [sum(case.lengths[:row]) for row in range(rows)]
        tokens = sum(case.lengths) if case.packed else rows * longest
        # Twice as wide as needed: query and something else side by side.
        wide = normal(tokens, 2 * case.heads * case.head_dim).mul(2).to(case.dtype)
        self.query = wide[:, : case.heads * case.head_dim]
        self.slots = case.slots or tuple(range(rows))
        shape = (max(self.slots) + 1, case.kv_heads, case.context + 3, case.head_dim)
        self.caches = [Guarded(shape, case.dtype) for _ in range(2)]
        for row, slot in enumerate(self.slots):
            if slot < 0:
                continue
            end = case.positions[row] + case.lengths[row]
            for cache in self.caches:
                cache.tensor[slot, :, :end] = normal(case.kv_heads, end, case.head_dim).to(
                    case.dtype
                )
        self.output = Guarded((tokens, case.heads * case.head_dim), case.dtype)

    def fields(self) -> dict[str, object]:
        case = self.case

        def ints(values: tuple[int, ...] | list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device="cuda")

        return {
            "query": self.query,
            "key_cache": self.caches[0].tensor,
            "value_cache": self.caches[1].tensor,
            "position": ints(case.positions),
            "slots": ints(case.slots) if case.slots else 0,
            "starts": ints(self.starts) if case.packed else 0,
            "lengths": ints(case.lengths),
            "output": self.output.tensor,
            "row_stride": self.query.stride(0),
            "output_row_stride": case.heads * case.head_dim,
            "capacity": case.context + 3,
            "batch": len(case.lengths),
            "max_length": max(case.lengths),
            "num_heads": case.heads,
            "num_kv_heads": case.kv_heads,
            "head_dim": case.head_dim,
            "softmax_scale": case.head_dim**-0.5,
            "dtype": DTYPES[case.dtype],
        }

    def run(self) -> Tensor:
        library().call("attention_prefill", **self.fields()).launch()
        for cache in self.caches:
            cache.check()
        return self.output.check()

    def expected(self, row: int, dtype: torch.dtype) -> Tensor:
        """Output [tokens, H * K] of a row, in `dtype`."""
        case, slot, start = self.case, self.slots[row], self.starts[row]
        length, position = case.lengths[row], case.positions[row]
        shape = (length, case.heads, case.head_dim)
        query = self.query[start : start + length].reshape(shape).transpose(0, 1).to(dtype)
        keys, values = (
            cache.tensor[slot, :, : position + length].to(dtype).repeat_interleave(case.group, 0)
            for cache in self.caches
        )
        index = torch.arange(position + length, device="cuda")
        seen = index[None] <= index[position:, None]
        scale = case.head_dim**-0.5
        if dtype == torch.float64:
            scores = ((query @ keys.mT) * scale).masked_fill(~seen, -torch.inf)
            output = scores.softmax(-1) @ values
        else:
            output = F.scaled_dot_product_attention(
                query[None], keys[None], values[None], attn_mask=seen, scale=scale
            )[0]
        return output.transpose(0, 1).reshape(length, -1)


def check(case: Case) -> None:
    inputs = Inputs(case)
    output = inputs.run()
    written = torch.zeros(len(output), dtype=torch.bool, device="cuda")
    for row, (slot, length) in enumerate(zip(inputs.slots, case.lengths, strict=True)):
        if slot < 0 or length == 0:
            continue
        part = slice(inputs.starts[row], inputs.starts[row] + length)
        written[part] = True
        assert_within_torch(
            output[part],
            inputs.expected(row, case.dtype),
            inputs.expected(row, torch.float64),
        )
    assert bool(output[~written].isnan().all()), "padding or a skipped row was written"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 63, 64, 65, 500])
def test_every_length(length: int, head_dim: int, dtype: torch.dtype) -> None:
    check(Case(lengths=(length,), positions=(0,), head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("position", [1, 63, 64, 100, 4097])
def test_behind_a_cache(position: int) -> None:
    check(Case(lengths=(70,), positions=(position,)))


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8, 12, 16])
def test_every_group(group: int) -> None:
    check(Case(lengths=(140, 9), positions=(0, 200), group=group))


@pytest.mark.parametrize("packed", [False, True])
def test_ragged_rows(packed: bool) -> None:
    case = Case(lengths=(500, 1, 0, 129, 64), positions=(0, 77, 5, 300, 64), packed=packed)
    check(case)


def test_slots_and_skipped_rows() -> None:
    check(Case(lengths=(40, 80, 80), positions=(3, 0, 50), slots=(4, -1, 0)))


def test_many_tokens() -> None:
    check(Case(lengths=(4097,), positions=(0,), kv_heads=1))


def test_repeats_are_bitwise_equal() -> None:
    inputs = Inputs(Case(lengths=(300, 150), positions=(0, 90)))
    first = inputs.run().clone()
    assert torch.equal(inputs.run().view(torch.int16), first.view(torch.int16))


def test_large_scores_stay_finite() -> None:
    inputs = Inputs(Case(lengths=(130,), positions=(60,)))
    inputs.query.mul_(300)
    output = inputs.run()
    truth = inputs.expected(0, torch.float64)
    assert_within_torch(output, inputs.expected(0, torch.bfloat16), truth)


@pytest.mark.parametrize(
    ("field", "value"),
    [("head_dim", 96), ("num_heads", 7), ("row_stride", 60), ("softmax_scale", 0.0), ("query", 0)],
)
def test_a_wrong_field_is_named(field: str, value: float) -> None:
    fields = Inputs(Case(lengths=(4,), positions=(0,))).fields() | {field: value}
    with pytest.raises(ShapeError, match=field):
        library().call("attention_prefill", **fields)
