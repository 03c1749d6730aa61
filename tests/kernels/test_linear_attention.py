"""Linear attention on the GPU: decode step and prefill against fp64, edge cases, and each other."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from ringexport.errors import ShapeError
from ringexport.model.layers import apply_rotary, rms_norm
from ringexport.model.linear_attention import LinearInputs, chunked, recurrent
from ringexport.ops.decay import DecayIndex, log_decay
from tests.kernels.support import DTYPES, Guarded, assert_within_torch, library

pytestmark = pytest.mark.gpu

EPS = 1e-6
POSITIONS = 300
SHAPES = [(4, 64), (16, 128)]
HALVES = [torch.bfloat16, torch.float16]


def decays(heads: int, layer: int = 1) -> Tensor:
    table = log_decay(heads, layer, 20, DecayIndex.SERVING)
    return torch.from_numpy(table).cuda()


@dataclasses.dataclass(kw_only=True)
class Case:
    """Rows of tokens, packed, beside a pool of states; row b uses state `slots[b]`."""

    heads: int
    dim: int
    dtype: torch.dtype
    lengths: list[int]
    layer: int = 1
    seed: int = 0
    extra_slots: int = 0
    log_decay: Tensor | None = None  # [H]; None: of `layer`

    def __post_init__(self) -> None:
        generator = torch.Generator("cuda").manual_seed(self.seed)
        self.random = functools.partial(torch.randn, generator=generator, device="cuda")
        tokens = max(1, sum(self.lengths))
        # Query, key and value side by side, as one projection leaves them.
        self.qkv = self.random(tokens, 3, self.heads, self.dim).to(self.dtype)
        self.starts = [sum(self.lengths[:row]) for row in range(len(self.lengths))]
        self.slots = list(range(len(self.lengths)))
        pool = len(self.lengths) + self.extra_slots
        self.past = self.random(pool, self.heads, self.dim, self.dim)
        given = self.log_decay
        self.decay = decays(self.heads, self.layer) if given is None else given
        self.scale = self.dim**-0.5
        self.state = Guarded(self.past.shape, torch.float32)
        self.state.tensor.copy_(self.past)
        self.output = Guarded((tokens, self.heads * self.dim), self.dtype)
        self.room = Guarded((0,), torch.float32)  # the workspace of the last prefill

    @property
    def fields(self) -> dict[str, Any]:
        query, key, value = self.qkv.unbind(1)
        return {
            "query": query,
            "key": key,
            "value": value,
            "log_decay": self.decay,
            "state": self.state.tensor,
            "output": self.output.tensor,
            "row_stride": 3 * self.heads * self.dim,
            "output_row_stride": self.heads * self.dim,
            "batch": len(self.lengths),
            "num_heads": self.heads,
            "head_dim": self.dim,
            "query_scale": self.scale,
            "dtype": DTYPES[self.dtype],
        }

    def prefill(self, **changes: Any) -> None:
        lengths = changes.pop("lengths", self.lengths)
        fields = self.fields | {
            "starts": torch.tensor(self.starts, dtype=torch.int32, device="cuda"),
            "lengths": torch.tensor(lengths, dtype=torch.int32, device="cuda"),
            "slots": torch.tensor(self.slots, dtype=torch.int32, device="cuda"),
            "max_length": max(lengths),
        }
        fields |= changes
        # Zeros would hide reads of what no block has written.
        size = library().workspace_bytes("linear_attention_prefill", **fields)
        self.room = Guarded((size // 4,), torch.float32)
        room = {"workspace": self.room.tensor, "workspace_bytes": size} if size > 0 else {}
        library().call("linear_attention_prefill", **(room | fields)).launch(current_stream())

    def reference(
        self, row: int, dtype: torch.dtype, past: Tensor, tokens: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Return output [T, H * D] and state of one row, computed by torch in `dtype`."""
        here = slice(self.starts[row], self.starts[row] + self.lengths[row])
        query, key, value = self.qkv[here][tokens].to(dtype).unbind(1)
        output, state = chunked(
            LinearInputs(
                query=query[None],
                key=key[None],
                value=value[None],
                log_decay=self.decay.to(dtype),
                past_state=past[None].to(dtype),
                query_scale=self.scale,
            )
        )
        return output[0].flatten(1), state[0]

    def check(self, row: int, past: Tensor, *, slot: int | None = None) -> None:
        """Compare one row of the kernel's result with torch's, both against fp64."""
        truth, true_state = self.reference(row, torch.float64, past)
        same, _ = self.reference(row, torch.float32, past)
        here = slice(self.starts[row], self.starts[row] + self.lengths[row])
        self.room.check()
        assert_within_torch(self.output.check()[here], same.to(self.dtype), truth)
        state = self.state.check()[self.slots[row] if slot is None else slot]
        assert_state(state, true_state, self.lengths[row])


def current_stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def assert_state(got: Tensor, truth: Tensor, tokens: int) -> None:
    """Level L1: the fp32 state grows its error like a random walk."""
    assert bool(torch.isfinite(got).all())
    error = ((got.double() - truth).abs().max() / truth.abs().max()).item()
    bound = 1e-5 * max(1, tokens) ** 0.5
    assert error <= bound, f"relative state error {error:.3e}, bound {bound:.3e}"


# ---- decode ------------------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class Step:
    """One decode step with everything fused: SiLU, norms, rotary embedding."""

    case: Case
    rotary_dim: int
    silu: bool

    def __post_init__(self) -> None:
        random, case = self.case.random, self.case
        self.norms = [1 + 0.1 * random(case.dim) for _ in range(2)]
        angles = 6.28 * torch.rand(POSITIONS, self.rotary_dim // 2, device="cuda")
        self.cos, self.sin = angles.cos(), angles.sin()
        rows = len(case.lengths)
        self.position = torch.randint(0, POSITIONS, (rows,), dtype=torch.int32, device="cuda")

    @property
    def fields(self) -> dict[str, Any]:
        return {
            "query_norm": self.norms[0],
            "key_norm": self.norms[1],
            "rotary_cos": self.cos,
            "rotary_sin": self.sin,
            "position": self.position,
            "rotary_dim": self.rotary_dim,
            "silu": int(self.silu),
            "norm_eps": EPS,
        }

    def prepared(self, dtype: torch.dtype) -> list[Tensor]:
        tensors = [t.to(dtype) for t in self.case.qkv.unbind(1)]
        if self.silu:
            tensors = [torch.nn.functional.silu(t) for t in tensors]
        cos, sin = (table[self.position.long()].to(dtype) for table in (self.cos, self.sin))
        for i, norm in enumerate(self.norms):
            tensors[i] = apply_rotary(rms_norm(tensors[i], norm.to(dtype), EPS), cos, sin)
        return tensors


def decode_case(batch: int, heads: int, dim: int, dtype: torch.dtype, **rest: Any) -> Case:
    return Case(heads=heads, dim=dim, dtype=dtype, lengths=[1] * batch, **rest)


def launch_decode(case: Case, **more: Any) -> None:
    fields = case.fields | more
    library().call("linear_attention_decode", **fields).launch(current_stream())


def step_in(case: Case, tensors: list[Tensor], slots: list[int], dtype: torch.dtype) -> Any:
    query, key, value = (t[:, None].to(dtype) for t in tensors)
    output, state = recurrent(
        LinearInputs(
            query=query,
            key=key,
            value=value,
            log_decay=case.decay.to(dtype),
            past_state=case.past[slots].to(dtype),
            query_scale=case.scale,
        )
    )
    return output[:, 0].flatten(1), state


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize(("heads", "dim"), [*SHAPES, (5, 128)])
@pytest.mark.parametrize("batch", [1, 3, 70])
def test_decode(batch: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    case = decode_case(batch, heads, dim, dtype)
    launch_decode(case)
    slots = list(range(batch))
    truth, true_state = step_in(case, list(case.qkv.unbind(1)), slots, torch.float64)
    same, _ = step_in(case, list(case.qkv.unbind(1)), slots, torch.float32)
    assert_within_torch(case.output.check(), same.to(dtype), truth)
    assert_state(case.state.check(), true_state, 0)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize(
    ("heads", "dim", "rotary_dim"), [(4, 64, 32), (16, 128, 64), (2, 128, 128)]
)
@pytest.mark.parametrize("silu", [False, True])
def test_decode_fused(
    heads: int, dim: int, rotary_dim: int, dtype: torch.dtype, silu: bool
) -> None:
    case = decode_case(5, heads, dim, dtype)
    step = Step(case=case, rotary_dim=rotary_dim, silu=silu)
    launch_decode(case, **step.fields)
    slots = list(range(5))
    truth, true_state = step_in(case, step.prepared(torch.float64), slots, torch.float64)
    same, _ = step_in(case, step.prepared(torch.float32), slots, torch.float32)
    assert_within_torch(case.output.check(), same.to(dtype), truth)
    assert_state(case.state.check(), true_state, 0)


def test_decode_slots() -> None:
    """Rows find their slot; a slot below 0 skips the row, other slots are left alone."""
    case = decode_case(4, 16, 128, torch.bfloat16, extra_slots=3)
    slots = [5, -1, 0, 3]
    launch_decode(case, slots=torch.tensor(slots, dtype=torch.int32, device="cuda"))
    truth, true_state = step_in(case, list(case.qkv.unbind(1)), slots, torch.float64)
    output, state = case.output.check(), case.state.check()
    used = [0, 2, 3]
    torch.testing.assert_close(output[used].double(), truth[used], rtol=1e-2, atol=1e-2)
    assert bool(output[1].isnan().all())
    for row in used:
        assert_state(state[slots[row]], true_state[row], 0)
    for slot in (1, 2, 4, 6):
        assert torch.equal(state[slot], case.past[slot])


def test_decode_programmatic_chain() -> None:
    """Steps that may overlap still see the state of the step before."""
    case = decode_case(8, 16, 128, torch.float32)
    for _ in range(50):
        launch_decode(case, programmatic_launch=1)
    one_by_one = decode_case(8, 16, 128, torch.float32)
    for _ in range(50):
        launch_decode(one_by_one)
        torch.cuda.synchronize()
    assert torch.equal(case.state.check(), one_by_one.state.check())


def test_decode_reads_a_settled_state_ahead() -> None:
    """The state may be read while the kernel ahead still writes the queries, keys and values."""
    slots = torch.tensor([3, -1, 0, 1], dtype=torch.int32, device="cuda")
    ahead, plain = (decode_case(4, 16, 128, torch.bfloat16, extra_slots=1) for _ in range(2))
    late = decode_case(64, 16, 128, torch.bfloat16)
    for _ in range(20):
        launch_decode(late, programmatic_launch=1)  # takes a while, but lets the next one start
        launch_decode(ahead, slots=slots, programmatic_launch=1, state_settled=1)
        torch.cuda.synchronize()
    for _ in range(20):
        launch_decode(plain, slots=slots)
        torch.cuda.synchronize()
    assert torch.equal(ahead.state.check(), plain.state.check())
    used = [0, 2, 3]
    assert torch.equal(ahead.output.check()[used], plain.output.check()[used])


# ---- prefill -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("heads", "dim"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 500, 1029, 4097])
def test_prefill(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    case = Case(heads=heads, dim=dim, dtype=dtype, lengths=[tokens])
    case.prefill()
    case.check(0, case.past[0])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("heads", "dim"), SHAPES)
def test_prefill_ragged(heads: int, dim: int, dtype: torch.dtype) -> None:
    """Rows of any length in any slot; empty and skipped rows stay as they were."""
    lengths = [700, 0, 1, 1300, 64, 33]
    case = Case(heads=heads, dim=dim, dtype=dtype, lengths=lengths, extra_slots=2)
    case.slots = [7, 2, 0, 1, -1, 4]
    case.prefill()
    for row in (0, 2, 3, 5):
        case.check(row, case.past[case.slots[row]])
    state = case.state.check()
    for slot in (2, 3, 5, 6):
        assert torch.equal(state[slot], case.past[slot])
    skipped = slice(case.starts[4], case.starts[4] + 64)
    assert bool(case.output.check()[skipped].isnan().all())


def test_prefill_small_model() -> None:
    """The shapes of ring-nano: rows of two segments, and one of three tokens."""
    case = Case(heads=4, dim=64, dtype=torch.bfloat16, lengths=[500, 499, 3])
    case.prefill()
    for row in range(3):
        case.check(row, case.past[row])


@pytest.mark.parametrize("tokens", [70, 1500])
def test_prefill_reset(tokens: int) -> None:
    """A reset row starts from zero, whatever the state holds; a row without tokens keeps it."""
    case = Case(heads=16, dim=128, dtype=torch.bfloat16, lengths=[tokens, tokens, 0])
    case.state.tensor[0] = float("nan")
    case.prefill(reset=torch.tensor([1, 0, 1], dtype=torch.int32, device="cuda"))
    case.check(0, torch.zeros_like(case.past[0]))
    case.check(1, case.past[1])
    assert torch.equal(case.state.check()[2], case.past[2])


def test_prefill_padding() -> None:
    """Without `starts` rows lie `max_length` apart; their padding is neither read nor written."""
    case = Case(heads=16, dim=128, dtype=torch.bfloat16, lengths=[300, 300])
    case.qkv[100:300] = float("nan")
    case.prefill(starts=None, lengths=[100, 300])
    output = case.output.check()
    assert bool(output[100:300].isnan().all())
    case.lengths = [100, 300]
    case.check(0, case.past[0])
    case.check(1, case.past[1])


@pytest.mark.parametrize("slowest", [-1e-7, -0.7, -30.0, 0.0])
@pytest.mark.parametrize("tokens", [130, 5000])
def test_prefill_decay(tokens: int, slowest: float) -> None:
    decay = torch.tensor([slowest, -0.01], device="cuda")
    case = Case(heads=2, dim=128, dtype=torch.bfloat16, lengths=[tokens], log_decay=decay)
    case.prefill()
    case.check(0, case.past[0])


def test_prefill_no_bias() -> None:
    """A slow decay is not lost to rounding: keys and values of one sign show any drift."""
    decay = torch.tensor([-1e-7, -1e-5, -2e-4, -3e-3], device="cuda")
    case = Case(heads=4, dim=128, dtype=torch.bfloat16, lengths=[20000], log_decay=decay)
    case.qkv.abs_()
    case.prefill()
    case.check(0, case.past[0])


@pytest.mark.parametrize(
    ("heads", "dim", "lengths"),
    [
        (16, 128, [32768]),
        (1, 128, [9000]),
        (1, 64, [70_000]),
        (5, 64, [3000, 0, 640, 1]),
        (33, 128, [4000, 513]),
        (16, 128, [2100, 1300, 1, 1700]),
    ],
)
def test_prefill_shares(heads: int, dim: int, lengths: list[int]) -> None:
    """Whatever is forgotten when, blocks of equal work add up what every segment needs."""
    chunks = torch.randint(1, 80, (heads,), generator=torch.Generator().manual_seed(heads))
    chunks[0] = 100_000
    decay = (-22 / (64 * chunks)).float().cuda()
    case = Case(heads=heads, dim=dim, dtype=torch.bfloat16, lengths=lengths, log_decay=decay)
    case.prefill()
    for row, length in enumerate(lengths):
        if length > 0:
            case.check(row, case.past[row])


@pytest.mark.parametrize(("heads", "dim"), SHAPES)
def test_prefill_shares_without_rows(heads: int, dim: int) -> None:
    """Skipped and empty rows have no share in the work; of a row too long the plan's part has."""
    lengths = [2100, 1300, 900, 1700]
    case = Case(heads=heads, dim=dim, dtype=torch.bfloat16, lengths=lengths, extra_slots=1)
    case.slots = [4, -1, 2, 0]
    case.prefill(lengths=[2100, 1300, 0, 1700], max_length=2000)
    case.lengths[0] = 2000
    case.check(0, case.past[4])
    case.check(3, case.past[0])
    state = case.state.check()
    for slot in (1, 2, 3):
        assert torch.equal(state[slot], case.past[slot])
    assert bool(case.output.check()[2000 : case.starts[3]].isnan().all())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("split", [1, 64, 500, 1001])
def test_prefill_in_parts(split: int, dtype: torch.dtype) -> None:
    """A row in two calls ends where one call ends."""
    case = Case(heads=16, dim=128, dtype=dtype, lengths=[1500])
    case.prefill(lengths=[split])
    start, case.starts = case.starts, [split]
    case.prefill(lengths=[1500 - split])
    case.starts = start
    case.check(0, case.past[0])


def test_prefill_equals_decode() -> None:
    """Token by token, in chunks, and half of each: one result."""
    case = Case(heads=16, dim=128, dtype=torch.bfloat16, lengths=[200])
    case.prefill(lengths=[120])
    query, key, value = case.qkv.unbind(1)
    for token in range(120, 200):
        rows = {"query": query[token], "key": key[token], "value": value[token]}
        launch_decode(case, output=case.output.tensor[token], **rows)
    case.check(0, case.past[0])


@pytest.mark.parametrize("layer", [0, 18])
def test_drift(layer: int) -> None:
    """Level L5: 2,048 decode steps stay with chunked prefill."""
    tokens = 2048
    case = Case(heads=16, dim=128, dtype=torch.bfloat16, lengths=[tokens], layer=layer)
    truth64 = case.reference(0, torch.float64, case.past[0], slice(64))[1]
    truth = case.reference(0, torch.float64, case.past[0])[1]
    query, key, value = case.qkv.unbind(1)
    errors = {}
    for token in range(tokens):
        rows = {"query": query[token], "key": key[token], "value": value[token]}
        launch_decode(case, output=case.output.tensor[token], **rows)
        if token == 63:
            errors[64] = relative_error(case.state.tensor[0], truth64)
    errors[tokens] = relative_error(case.state.check()[0], truth)
    bound = (tokens / 64) ** 0.5 * max(errors[64], torch.finfo(torch.float32).eps)
    assert errors[tokens] <= bound, errors
    chunks = Case(heads=16, dim=128, dtype=torch.bfloat16, lengths=[tokens], layer=layer)
    chunks.prefill()
    assert_state(chunks.state.check()[0], case.state.tensor[0].double(), tokens)


def relative_error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


def test_prefill_programmatic_chain() -> None:
    """Prefills that may overlap still see the state of the one before."""
    case = Case(heads=16, dim=128, dtype=torch.bfloat16, lengths=[2000])
    other = Case(heads=16, dim=128, dtype=torch.bfloat16, lengths=[2000])
    for _ in range(5):
        case.prefill(programmatic_launch=1)
        other.prefill()
        torch.cuda.synchronize()
    assert torch.equal(case.state.check(), other.state.check())
    assert torch.equal(case.output.check(), other.output.check())


@pytest.mark.parametrize(
    ("op", "change", "field"),
    [
        ("linear_attention_decode", {"head_dim": 96}, "head_dim"),
        ("linear_attention_decode", {"dtype": 3}, "dtype"),
        ("linear_attention_decode", {"row_stride": 100}, "row_stride"),
        ("linear_attention_decode", {"state": None}, "state"),
        ("linear_attention_prefill", {"dtype": 0}, "dtype"),
        ("linear_attention_prefill", {"lengths": None}, "lengths"),
        ("linear_attention_prefill", {"workspace_bytes": 16}, "workspace_bytes"),
        ("linear_attention_prefill", {"output_row_stride": 2052}, "output_row_stride"),
    ],
)
def test_refused(op: str, change: dict[str, Any], field: str) -> None:
    case = Case(heads=16, dim=128, dtype=torch.bfloat16, lengths=[1])
    fields = case.fields
    if op.endswith("prefill"):
        lengths = torch.ones(1, dtype=torch.int32, device="cuda")
        room = torch.zeros(1 << 26, dtype=torch.uint8, device="cuda")
        fields |= {"lengths": lengths, "max_length": 4096}
        fields |= {"workspace": room, "workspace_bytes": room.numel()}
    library().call(op, **fields)
    with pytest.raises(ShapeError, match=f": {field} is"):
        library().call(op, **fields | change)
