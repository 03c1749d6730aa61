"""A NaN or an infinity in one row: it stays there, the row says so, and no other row changes.

Rows of a batch are requests that share tiles, scales and workspaces. Numbers that say how far a row
reaches are wrong here, too: what a kernel then leaves alone, and that it ends.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ringexport.errors import ShapeError
from ringexport.kernels.library import Prologue, ScaleKind
from tests.kernels import test_attention as attention
from tests.kernels import test_attention_prefill as prefill
from tests.kernels import test_grouped_experts as grouped
from tests.kernels import test_linear_attention as linear
from tests.kernels import test_moe as moe
from tests.kernels import test_projection as projection
from tests.kernels.moe_cases import Experts
from tests.kernels.support import DTYPES, Guarded, library, workspace

pytestmark = pytest.mark.gpu
FP8, INT8 = torch.float8_e4m3fn, torch.int8
BF16, FP32 = torch.bfloat16, torch.float32
VALUES = pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)


def check_rows(run: Callable[[], Tensor], spoil: Callable[[], object], bad: list[int]) -> None:
    """Run, spoil rows `bad` of the inputs, run again and compare.

    Args:
        run: launches with outputs that were never written, and returns them, [rows, ...].
        spoil: changes the inputs.
        bad: rows whose output may not hold one finite number afterwards.
    """
    clean = run().clone()
    assert bool(torch.isfinite(clean.float()).all())
    spoil()
    got = run()
    good = [row for row in range(len(got)) if row not in bad]
    assert torch.equal(got[good].view(torch.uint8), clean[good].view(torch.uint8)), "other rows"
    assert not bool(torch.isfinite(got[bad].float()).any()), "a row that looks as if it were right"


@VALUES
@pytest.mark.parametrize("tokens", [1, 2, 8, 40, 200])
@pytest.mark.parametrize(("weight_format", "kind"), moe.CASES)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_experts(weight_format: str, kind: str, tokens: int, norm: bool, value: float) -> None:
    """The paths of one and of few tokens, and those that sort them: tiles of 8 and of 16."""
    layer = Experts.make(
        experts=24, hidden=256, width=64, shared=32, weight_format=weight_format, kind=kind
    )
    run = moe.Run(layer, tokens, top_k=4, norm=norm)
    bad = sorted({tokens // 2, tokens - 1})

    def spoil() -> None:
        for row in bad:
            run.hidden[row, 3 + row] = run.residual[row, 3 + row] = value

    check_rows(run.launch, spoil, bad)


@pytest.mark.parametrize("tokens", [1, 8, 40, 200, 600])
@pytest.mark.parametrize(("weight_format", "kind"), moe.CASES)
def test_experts_of_hardly_anything(weight_format: str, kind: str, tokens: int) -> None:
    """A row so small that the reciprocal of its scale is infinite: zeros, and no NaN from its 0."""
    layer = Experts.make(
        experts=24, hidden=256, width=64, shared=32, weight_format=weight_format, kind=kind
    )
    run = moe.Run(layer, tokens, top_k=4)
    run.hidden[-1] = 1e-37
    run.hidden[-1, ::3] = 0
    output = run.launch().float()
    assert bool(torch.isfinite(output).all())
    assert output[-1].abs().max().item() < 1e-30


@pytest.mark.parametrize("tokens", [1, 3, 8, 50, 200, 600])
@pytest.mark.parametrize(("weight_format", "kind"), [("fp8", "channel"), ("bf16", "none")])
def test_experts_that_nobody_has(weight_format: str, kind: str, tokens: int) -> None:
    """No id is one of an expert, and no expert is shared: nothing to add up."""
    layer = Experts.make(
        experts=24, hidden=256, width=64, shared=0, weight_format=weight_format, kind=kind
    )
    run = moe.Run(layer, tokens, top_k=4)
    run.ids[:] = torch.tensor([-(1 << 31), -1, 24, (1 << 31) - 1], dtype=torch.int32)
    assert torch.equal(run.launch(run.dtype), torch.zeros_like(run.hidden))


def test_too_much_shared_memory_is_refused() -> None:
    """In one sentence, and without an error left behind for whoever asks CUDA next."""
    layer = Experts.make(
        experts=2, hidden=32768, width=32, shared=0, weight_format="bf16", kind="none"
    )
    run = moe.Run(layer, 8, top_k=2)
    with pytest.raises(ShapeError, match=r"shared memory is \d+, expected"):
        run.launch()
    assert bool((torch.ones(4, device="cuda") + 1 == 2).all())


@VALUES
@grouped.format_cases
def test_grouped_experts_of_many_tokens(weight: torch.dtype, kind: str, value: float) -> None:
    inputs = grouped.Inputs(grouped.case_of(weight, kind, tokens=513))
    bad = [0, 200, 512]

    def spoil() -> None:
        inputs.output.tensor.fill_(torch.nan)
        for row in bad:
            inputs.hidden[row, row % 256] = value

    check_rows(inputs.run, spoil, bad)


def projected(x: Tensor, weight: projection.Quantized, kind: int, **fields: object) -> Tensor:
    output = Guarded((len(x), len(weight.codes)), FP32)
    projection.run(weight, x, output.tensor, kind, **fields)
    return output.check()


@pytest.mark.parametrize("m", [1, 3, 8, 9, 33, 64])
@pytest.mark.parametrize("dtype", [FP8, INT8], ids=["fp8", "int8"])
@pytest.mark.parametrize("kind", [ScaleKind.CHANNEL, ScaleKind.BLOCK128], ids=["channel", "block"])
def test_projection_of_codes(m: int, dtype: torch.dtype, kind: int) -> None:
    weight = projection.weight_of(208, 320, dtype, kind)
    values = torch.randn(m, 320, device="cuda")
    x = projection.quantize(values, dtype, projection.token_tiles(kind))

    def run() -> Tensor:
        return projected(x.codes, weight, kind, input_scale=x.scale)

    check_rows(run, lambda: x.scale[m // 2].fill_(torch.nan), [m // 2])


@VALUES
@pytest.mark.parametrize("m", [1, 3, 8, 64])
@pytest.mark.parametrize("dtype", [FP8, INT8, BF16], ids=["fp8", "int8", "bf16"])
@pytest.mark.parametrize("kind", [ScaleKind.CHANNEL, ScaleKind.BLOCK128], ids=["channel", "block"])
@pytest.mark.parametrize("prologue", ["none", "rms_norm", "gate"])
@pytest.mark.parametrize("k", [256, 5120])
def test_projection(
    m: int, dtype: torch.dtype, kind: int, prologue: str, k: int, value: float
) -> None:
    kind = kind if dtype != BF16 else ScaleKind.NONE
    weight = projection.weight_of(2048, k, dtype, kind)
    x = torch.randn(m, k, device="cuda").to(FP32 if prologue == "rms_norm" else BF16)
    fields: dict[str, object] = {}
    if prologue != "none":
        fields = {"norm_weight": torch.rand(k, device="cuda") + 0.5, "norm_eps": 1e-6}
        fields["prologue"] = Prologue.RMS_NORM
    if prologue == "gate":
        gate = torch.randn(m, k, device="cuda").to(BF16)
        fields |= {"gate": gate, "gate_row_stride": k, "num_norm_groups": 1}
        fields["prologue"] = Prologue.GROUP_NORM_GATE

    def spoil() -> None:
        x[m - 1, k // 3] = value

    check_rows(lambda: projected(x, weight, kind, **fields), spoil, [m - 1])


@VALUES
@pytest.mark.parametrize("op", ["quantize", "rms_norm"])
@pytest.mark.parametrize("dtype", [FP8, INT8], ids=["fp8", "int8"])
@pytest.mark.parametrize("columns", [64, 1000, 5120])
def test_rows_that_are_quantized(op: str, dtype: torch.dtype, columns: int, value: float) -> None:
    """No code of INT8 says NaN: the scale has to."""
    x = torch.randn(5, columns, device="cuda").to(BF16)
    norm = torch.rand(columns, device="cuda") + 0.5

    def run() -> Tensor:
        codes, scale = Guarded((5, columns), dtype), Guarded((5, 1), FP32)
        fields: dict[str, object] = {"input": x, "input_row_stride": columns}
        if op == "rms_norm":
            fields = {"residual": x, "weight": norm, "eps": 1e-6, "residual_dtype": DTYPES[BF16]}
        fields |= {
            "quantized": codes.tensor,
            "scale": scale.tensor,
            "scale_kind": ScaleKind.CHANNEL,
        }
        fields |= {"rows": 5, "columns": columns}
        fields |= {"dtype": DTYPES[BF16], "quantized_dtype": DTYPES[dtype]}
        library().call(op, **fields).launch()
        return codes.check().float() * scale.check()

    def spoil() -> None:
        x[2, 5] = value

    check_rows(run, spoil, [2])


@pytest.mark.parametrize("cache", [BF16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_attention_decode(cache: torch.dtype, part: str) -> None:
    case = attention.Case(contexts=(3000, 17, 3000, 1), cache=cache, norm=part != "value")
    inputs = attention.Inputs(case)

    def run() -> Tensor:
        inputs.output.tensor.fill_(torch.nan)
        return inputs.run()

    def spoil() -> None:
        if part == "query" or cache == FP8:  # before sm_89 codes of a cache cannot be NaN
            inputs.query[2] = torch.nan
        else:
            getattr(inputs, part)[2] = torch.nan

    check_rows(run, spoil, [2])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("part", ["query", "keys", "values"])
def test_attention_prefill(head_dim: int, part: str) -> None:
    case = prefill.Case(
        lengths=(100, 33, 70), positions=(0, 500, 7), head_dim=head_dim, packed=True
    )
    inputs = prefill.Inputs(case)
    first, end = inputs.starts[1], inputs.starts[2]

    def spoil() -> None:
        inputs.output.tensor.fill_(torch.nan)
        if part == "query":
            inputs.query[first:end] = torch.nan
        else:
            inputs.caches[part == "values"].tensor[1, :, 3] = torch.nan

    check_rows(inputs.run, spoil, list(range(first, end)))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("position", [-1, -70, -(1 << 30)])
def test_attention_prefill_without_a_position(head_dim: int, position: int) -> None:
    """Nothing to attend to: the row is skipped. Waiting for keys that never come would hang."""
    case = prefill.Case(lengths=(70, 1, 33), positions=(5, 0, 7), head_dim=head_dim)
    inputs = prefill.Inputs(case)
    clean = inputs.run().clone().unflatten(0, (3, -1))
    inputs.output.tensor.fill_(torch.nan)
    fields = inputs.fields()
    positions = torch.tensor([5, position, 7], dtype=torch.int32, device="cuda")
    library().call("attention_prefill", **fields | {"position": positions}).launch()
    got = inputs.output.check().unflatten(0, (3, -1))
    assert bool(got[1].isnan().all())
    assert torch.equal(got[::2].nan_to_num(), clean[::2].nan_to_num())


@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_prefill_of_more_than_max_length(head_dim: int) -> None:
    """No row is longer than the host has said: the rest belongs to somebody else."""
    case = prefill.Case(lengths=(70, 70), positions=(5, 7), head_dim=head_dim)
    inputs = prefill.Inputs(case)
    clean = inputs.run().clone()
    inputs.output.tensor.fill_(torch.nan)
    lengths = torch.tensor([70, 90], dtype=torch.int32, device="cuda")
    library().call("attention_prefill", **inputs.fields() | {"lengths": lengths}).launch()
    assert torch.equal(inputs.output.check(), clean)


@pytest.mark.parametrize("dim", [64, 128])
def test_linear_attention_decode(dim: int) -> None:
    case = linear.decode_case(4, 4, dim, BF16)

    def run() -> Tensor:
        case.state.tensor.copy_(case.past)
        case.output.tensor.fill_(torch.nan)
        linear.launch_decode(case)
        states = case.state.check().flatten(1)
        return torch.cat((case.output.check().float(), states), dim=1)

    check_rows(run, lambda: case.qkv[1].fill_(torch.nan), [1])


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("longest", [130, 2000])
def test_linear_attention_prefill(dim: int, longest: int) -> None:
    """One segment for each row, and several."""
    case = linear.Case(heads=4, dim=dim, dtype=BF16, lengths=[100, longest, 70])

    def run() -> Tensor:
        case.state.tensor.copy_(case.past)
        case.output.tensor.fill_(torch.nan)
        case.prefill()
        ends = torch.tensor(case.starts, device="cuda") + torch.tensor(case.lengths, device="cuda")
        last = case.output.check()[ends - 1].float()
        return torch.cat((last, case.state.check().flatten(1)), dim=1)

    def spoil() -> None:
        case.qkv[case.starts[1] + longest - 3] = torch.nan

    check_rows(run, spoil, [1])


@pytest.mark.parametrize("dim", [64, 128])
def test_linear_attention_prefill_of_more_than_max_length(dim: int) -> None:
    """Neither the workspace nor the rows behind are touched."""
    case = linear.Case(heads=4, dim=dim, dtype=BF16, lengths=[3000, 900])
    case.prefill()
    clean = [case.output.check().clone(), case.state.check().clone()]
    case.state.tensor.copy_(case.past)
    case.output.tensor.fill_(torch.nan)
    fields = case.fields | {"max_length": 3000}
    size = workspace("linear_attention_prefill", **fields)["workspace_bytes"]
    assert isinstance(size, int)
    room = Guarded((size,), torch.uint8)
    case.prefill(
        lengths=[90_000, 900], max_length=3000, workspace=room.tensor, workspace_bytes=size
    )
    room.check()
    assert torch.equal(case.output.check(), clean[0])
    assert torch.equal(case.state.check(), clean[1])
