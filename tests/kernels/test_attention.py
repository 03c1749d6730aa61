"""Decode attention over a cache against fp64, for every format, split and edge of the context."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.support import DTYPES, Guarded, assert_within_torch, library, workspace

pytestmark = pytest.mark.gpu
EPS = 1e-6
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, kw_only=True)
class Case:
    """One launch; contexts include the new token."""

    contexts: tuple[int, ...]
    group: int = 4
    kv_heads: int = 4
    head_dim: int = 128
    rotary_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    cache: torch.dtype = torch.bfloat16
    slots: tuple[int, ...] | None = None
    norm: bool = True
    spare: int = 5

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads

    @property
    def capacity(self) -> int:
        return max(self.contexts) + self.spare

    @property
    def num_slots(self) -> int:
        return max(self.slots) + 2 if self.slots else len(self.contexts)


class Inputs:
    """Random inputs of a case, and the fields of the call."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        generator = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cuda")

        rows, kv, width = len(case.contexts), case.kv_heads, case.head_dim
        self.fused = normal(rows, (case.heads + 2 * kv) * width).mul(2).to(case.dtype)
        query, key, value = self.fused.view(rows, -1, width).split((case.heads, kv, kv), dim=1)
        self.query, self.key, self.value = query, key, value
        self.key_scale = torch.tensor([0.021], device="cuda")
        self.value_scale = torch.tensor([0.017], device="cuda")
        shape = (case.num_slots, kv, case.capacity, width)
        past = [normal(*shape), normal(*shape)]
        if case.cache == FP8:
            past = [past[0] / self.key_scale, past[1] / self.value_scale]
        self.caches = [Guarded(shape, case.cache) for _ in past]
        self.slots = case.slots or tuple(range(rows))
        for cache, values in zip(self.caches, past, strict=True):
            for slot, context in zip(self.slots, case.contexts, strict=True):
                if slot >= 0:  # what is not written yet stays NaN
                    cache.tensor[slot, :, : context - 1] = values[slot, :, : context - 1].to(
                        case.cache
                    )
        self.before = [cache.tensor.clone() for cache in self.caches]
        self.norms = [normal(width).mul(0.2).add(1), normal(width).mul(0.2).add(1)]
        angles = (
            torch.rand(case.capacity, case.rotary_dim // 2, generator=generator, device="cuda")
            * 6.28
        )
        self.tables = [angles.cos(), angles.sin()]
        self.position = torch.tensor(case.contexts, dtype=torch.int32, device="cuda") - 1
        self.output = Guarded((rows, case.heads * width), case.dtype)

    def fields(self, max_context: int | None = None) -> dict[str, object]:
        """Return all fields with a fresh workspace."""
        case = self.case
        slots = torch.tensor(self.slots, dtype=torch.int32, device="cuda") if case.slots else 0
        fields: dict[str, object] = {
            "query": self.query, "key": self.key, "value": self.value,
            "query_norm": self.norms[0] if case.norm else 0,
            "key_norm": self.norms[1] if case.norm else 0,
            "rotary_cos": self.tables[0] if case.norm else 0,
            "rotary_sin": self.tables[1] if case.norm else 0,
            "key_cache": self.caches[0].tensor, "value_cache": self.caches[1].tensor,
            "key_scale": self.key_scale if case.cache == FP8 else 0,
            "value_scale": self.value_scale if case.cache == FP8 else 0,
            "position": self.position,
            "slots": slots,
            "output": self.output.tensor,
            "row_stride": self.fused.stride(0), "output_row_stride": case.heads * case.head_dim,
            "capacity": case.capacity, "max_context": max_context or max(case.contexts),
            "batch": len(case.contexts), "num_heads": case.heads, "num_kv_heads": case.kv_heads,
            "head_dim": case.head_dim, "rotary_dim": case.rotary_dim,
            "softmax_scale": case.head_dim**-0.5, "norm_eps": EPS,
            "dtype": DTYPES[case.dtype], "cache_dtype": DTYPES[case.cache],
        }  # fmt: skip
        return fields | workspace("attention_decode", **fields)

    def run(self, max_context: int | None = None) -> Tensor:
        """Launch once and return the output after a look at all guards."""
        library().call("attention_decode", **self.fields(max_context)).launch()
        for cache in self.caches:
            cache.check()
        return self.output.check()

    def rotated(self, heads: Tensor, norm: Tensor, row: int, dtype: torch.dtype) -> Tensor:
        """Norm and rotate heads [heads, K] of a row, rounding to `dtype` after each step."""
        case, x = self.case, heads.to(dtype if dtype == torch.float64 else torch.float32)
        if not case.norm:
            return x.to(dtype)
        x = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * norm).to(dtype)
        cos, sin = (table[self.position[row]].to(dtype) for table in self.tables)
        first, second, rest = x.split(
            (case.rotary_dim // 2, case.rotary_dim // 2, case.head_dim - case.rotary_dim), dim=-1
        )
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

    def expected(self, row: int, dtype: torch.dtype) -> Tensor:
        """Attend over the cache as the kernel left it, in `dtype`."""
        case, slot = self.case, self.slots[row]
        keys, values = (
            cache.tensor[slot, :, : case.contexts[row]].to(dtype) for cache in self.caches
        )
        if case.cache == FP8:
            keys, values = keys * self.key_scale.to(dtype), values * self.value_scale.to(dtype)
        query = self.rotated(self.query[row], self.norms[0], row, dtype)
        query = query.view(case.kv_heads, case.group, case.head_dim)
        scale = case.head_dim**-0.5
        if dtype == torch.float64:
            return ((query @ keys.mT) * scale).softmax(-1).matmul(values).flatten()
        return F.scaled_dot_product_attention(
            query[None], keys[None], values[None], scale=scale
        ).flatten()

    def check_cache(self, row: int) -> None:
        """Only the new token was written, rounded to nearest."""
        case, slot, position = self.case, self.slots[row], int(self.position[row])
        keys = self.rotated(self.key[row], self.norms[1], row, torch.float64)
        wanted = [keys, self.value[row].double()]
        scales = [self.key_scale.double(), self.value_scale.double()]
        for cache, truth, scale, before in zip(
            self.caches, wanted, scales, self.before, strict=True
        ):
            got = cache.tensor[slot, :, position].double()
            exact = (truth / scale).clamp(-448, 448) if case.cache == FP8 else truth
            half_ulp = 0.51 * torch.finfo(case.cache).eps * exact.abs()
            assert bool(((got - exact).abs() <= half_ulp + 2**-9).all())
            before[slot, :, position] = cache.tensor[slot, :, position]


def check(case: Case, max_context: int | None = None) -> None:
    """Run a case and compare every row."""
    inputs = Inputs(case)
    output = inputs.run(max_context)
    rows = [row for row, slot in enumerate(inputs.slots) if slot >= 0]
    for row in rows:
        inputs.check_cache(row)
    got = torch.stack([output[row] for row in rows])
    same_dtype = torch.stack([inputs.expected(row, case.dtype) for row in rows])
    truth = torch.stack([inputs.expected(row, torch.float64) for row in rows])
    assert_within_torch(got, same_dtype, truth)
    for row, slot in enumerate(inputs.slots):
        assert slot >= 0 or bool(output[row].isnan().all()), "a skipped row was written"
    for cache, before in zip(inputs.caches, inputs.before, strict=True):
        assert torch.equal(cache.tensor.view(torch.uint8), before.view(torch.uint8))


CONTEXTS = (1, 2, 15, 16, 17, 31, 33, 64, 127, 128, 129, 500, 1023, 4097)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float16, FP8], ids=str)
def test_every_length(head_dim: int, cache: torch.dtype) -> None:
    dtype = torch.bfloat16 if cache == FP8 else cache
    check(
        Case(
            contexts=CONTEXTS, head_dim=head_dim, rotary_dim=head_dim // 2, dtype=dtype, cache=cache
        )
    )


@pytest.mark.parametrize("group", [1, 3, 5, 8, 12, 16])
@pytest.mark.parametrize("cache", [torch.float16, FP8], ids=str)
def test_every_group(group: int, cache: torch.dtype) -> None:
    check(Case(contexts=(700, 3, 2049), group=group, kv_heads=2, dtype=torch.float16, cache=cache))


@pytest.mark.parametrize("context", [4096, 131_072, 524_288])
def test_one_row_with_many_splits(context: int) -> None:
    check(Case(contexts=(context,), spare=0))


def test_many_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    contexts = torch.randint(1, 600, (256,), generator=generator).tolist()
    check(Case(contexts=tuple(contexts), kv_heads=2))


def test_slots_and_skipped_rows() -> None:
    check(Case(contexts=(40, 300, 7, 1000), slots=(3, -1, 0, 5)))


def test_without_norm_and_rotary() -> None:
    check(Case(contexts=(40, 300), norm=False))


def test_full_rotary() -> None:
    check(Case(contexts=(40, 300), rotary_dim=128))


def test_max_context_is_only_a_bound() -> None:
    check(Case(contexts=(40, 300), spare=100_000), max_context=100_000)


def test_repeats_are_bitwise_equal() -> None:
    case = Case(contexts=(5000, 70_000, 33))
    inputs = Inputs(case)
    call = library().call("attention_decode", **inputs.fields())
    outputs = []
    for _ in range(5):
        inputs.output.tensor.fill_(float("nan"))
        call.launch()
        outputs.append(inputs.output.check().clone())
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("cache", [torch.bfloat16, FP8], ids=str)
def test_a_settled_cache_is_read_ahead(cache: torch.dtype) -> None:
    """Cached tokens may be read while the kernel ahead still writes queries, keys and values."""
    case = Case(contexts=(40, 300, 7, 4100), slots=(3, -1, 0, 5), cache=cache)
    plain, ahead = Inputs(case), Inputs(case)
    wanted = plain.run()
    late = Inputs(Case(contexts=(4096,) * 64))
    chained = {"programmatic_launch": 1}
    busy = library().call("attention_decode", **late.fields(), **chained)
    settled = library().call("attention_decode", **ahead.fields(), **chained, cache_settled=1)
    for _ in range(10):
        ahead.output.tensor.fill_(float("nan"))
        torch.cuda.synchronize()
        busy.launch()  # takes a while, but lets the next one start
        settled.launch()
        got = ahead.output.check()
        rows = [row for row, slot in enumerate(case.slots or ()) if slot >= 0]
        assert torch.equal(got[rows], wanted[rows])
