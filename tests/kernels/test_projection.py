"""The small-M matrix product against the product of its dequantized operands in fp64."""

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ringexport.errors import ShapeError
from ringexport.kernels.library import Prologue, ScaleKind
from tests.kernels.support import DTYPES, Guarded, assert_within_torch, library

pytestmark = pytest.mark.gpu

FP8, INT8 = torch.float8_e4m3fn, torch.int8
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
RANGE = {FP8: 448.0, INT8: 127.5}
EPS = 1e-6
BLOCK = 128
TENSOR, CHANNEL, BLOCKS = ScaleKind.TENSOR, ScaleKind.CHANNEL, ScaleKind.BLOCK128


@dataclass(frozen=True)
class Quantized:
    """Codes, their scales, and the real numbers that they stand for in fp64."""

    codes: Tensor
    scale: Tensor
    real: Tensor


def quantize(values: Tensor, dtype: torch.dtype, tiles: tuple[int, int]) -> Quantized:
    """Quantize fp32 [rows, columns] with one scale per tile, as ringexport/quantize does."""
    rows, columns = values.shape
    high, wide = min(tiles[0], rows), min(tiles[1], columns)
    padded = F.pad(values.float(), (0, -columns % wide, 0, -rows % high))
    grid = padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high))
    # torch divides a CUDA tensor by a number through its reciprocal: a last bit that decides ties.
    largest = grid.abs().amax((1, 3))
    scale = largest / torch.full_like(largest, RANGE[dtype])
    scale = scale.masked_fill(scale == 0, torch.finfo(FP32).eps)
    spread = scale.repeat_interleave(high, 0).repeat_interleave(wide, 1)[:rows, :columns]
    scaled = values.float() / spread
    if dtype == INT8:
        codes = scaled.round().clamp(-128, 127).to(INT8)
    else:
        codes = scaled.clamp(-448, 448).to(FP8)
    return Quantized(codes, scale, codes.double() * spread.double())


def weight_of(n: int, k: int, dtype: torch.dtype, kind: int) -> Quantized:
    """Random weights with channels of very different size."""
    values = torch.randn(n, k, device="cuda") * torch.logspace(-2, 0, n, device="cuda")[:, None]
    if dtype not in RANGE:
        rounded = values.to(dtype)
        return Quantized(rounded, torch.empty(0, device="cuda"), rounded.double())
    tiles = {TENSOR: (n, k), CHANNEL: (1, k), BLOCKS: (BLOCK, BLOCK)}[kind]
    return quantize(values, dtype, tiles)


def token_tiles(kind: int) -> tuple[int, int]:
    return (1, BLOCK) if kind == BLOCKS else (1, 1 << 30)


def run(
    weight: Quantized, x: Tensor, output: Tensor, kind: int = ScaleKind.NONE, **fields: object
) -> None:
    """Launch the projection of x [m, k] into output [m, n] on the current stream."""
    n, k = weight.codes.shape
    library().call(
        "projection",
        input=x,
        weight=weight.codes,
        weight_scale=weight.scale,
        output=output,
        input_row_stride=x.stride(0),
        output_row_stride=output.stride(0),
        m=x.shape[0],
        n=n,
        k=k,
        input_dtype=DTYPES[x.dtype],
        weight_dtype=DTYPES[weight.codes.dtype],
        output_dtype=DTYPES[output.dtype],
        weight_scale_kind=kind,
        **fields,
    ).launch(torch.cuda.current_stream().cuda_stream)


def symmetric_difference(got: Tensor, truth: Tensor) -> float:
    a, b = got.double(), truth.double()
    return float(1 - 2 * (a * b).sum() / (a * a + b * b).sum())


def assert_product(got: Tensor, truth: Tensor) -> None:
    """Level L3: fp32 output by symmetric difference, 16-bit output to its rounding."""
    assert torch.isfinite(got).all()
    if got.dtype == FP32:
        assert symmetric_difference(got, truth) <= 1e-6
    else:
        assert_within_torch(got, truth.float().to(got.dtype), truth)


SHAPES = [(2048, 2048), (3072, 2048), (48, 64), (208, 320), (2048, 5120), (1040, 1088)]


@pytest.mark.parametrize("m", [1, 2, 5, 8, 9, 16, 17, 32, 64])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [FP8, INT8], ids=["fp8", "int8"])
def test_codes(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    for kind in (TENSOR, CHANNEL, BLOCKS):
        weight = weight_of(n, k, dtype, kind)
        x = quantize(torch.randn(m, k, device="cuda"), dtype, token_tiles(kind))
        guarded = Guarded((m, n), FP32)
        run(weight, x.codes, guarded.tensor, kind, input_scale=x.scale)
        assert_product(guarded.check(), x.real @ weight.real.T)


def test_int8_sums_exactly() -> None:
    weight = weight_of(2048, 2048, INT8, CHANNEL)
    x = quantize(torch.randn(4, 2048, device="cuda"), INT8, token_tiles(CHANNEL))
    output = torch.empty(4, 2048, device="cuda")
    run(weight, x.codes, output, CHANNEL, input_scale=x.scale)
    sums = (x.codes.double() @ weight.codes.double().T).float()
    assert torch.equal(output, sums * (x.scale * weight.scale.T))


@pytest.mark.parametrize("m", [1, 3, 8, 13, 32, 50, 64])
@pytest.mark.parametrize(("n", "k"), [*SHAPES, (10000, 256)])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_half_weights(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    weight = weight_of(n, k, dtype, ScaleKind.NONE)
    x = torch.randn(m, k, device="cuda").to(dtype)
    truth = x.double() @ weight.real.T
    for output_dtype in (FP32, dtype):
        guarded = Guarded((m, n), output_dtype)
        run(weight, x, guarded.tensor)
        assert_product(guarded.check(), truth)


@pytest.mark.parametrize("m", [1, 2, 7, 8, 16, 64])
@pytest.mark.parametrize("dtype", [FP8, INT8, BF16], ids=["fp8", "int8", "bf16"])
@pytest.mark.parametrize("kind", [CHANNEL, BLOCKS, TENSOR], ids=["channel", "block", "static"])
@pytest.mark.parametrize("k", [256, 2048, 5120])
def test_rms_norm_prologue(m: int, dtype: torch.dtype, kind: int, k: int) -> None:
    weight = weight_of(2048, k, dtype, kind)
    norm = torch.rand(k, device="cuda") + 0.5
    static = torch.tensor([5.0 / RANGE.get(dtype, 1.0)], device="cuda")
    for residual_dtype in (FP32, BF16):
        residual = (torch.randn(m, k, device="cuda") * 3).to(residual_dtype)
        wide = residual.float()
        y = wide * norm * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
        guarded = Guarded((m, 2048), FP32)
        fields = {"norm_weight": norm, "norm_eps": EPS, "prologue": Prologue.RMS_NORM}
        if kind == TENSOR:
            fields["static_scale"] = static
        run(weight, residual, guarded.tensor, kind if dtype in RANGE else ScaleKind.NONE, **fields)
        real = y.to(dtype).double()
        if dtype in RANGE:
            of_rms_norm = {
                "residual": residual,
                "weight": norm,
                "residual_dtype": DTYPES[residual_dtype],
                "static_scale": static if kind == TENSOR else 0,
            }
            real = quantized_by_kernel("rms_norm", dtype, kind, k, rows=m, **of_rms_norm)
        assert_product(guarded.check(), real @ weight.real.T)


def quantized_by_kernel(op: str, dtype: torch.dtype, kind: int, k: int, **fields: object) -> Tensor:
    """Return what a norm kernel of its own makes of the input, in fp64.

    The largest code of a row lies on a tie (absmax / (absmax / 127.5)): which way it is rounded
    hangs on the last bit of the norm, so torch cannot be asked.
    """
    rows = int(fields["rows"])
    codes = torch.empty(rows, k, device="cuda", dtype=dtype)
    scale = torch.empty(rows, -(-k // BLOCK) if kind == BLOCKS else 1, device="cuda")
    library().call(
        op,
        quantized=codes,
        scale=scale,
        columns=k,
        eps=EPS,
        dtype=DTYPES[BF16],
        quantized_dtype=DTYPES[dtype],
        scale_kind=kind,
        **fields,
    ).launch(torch.cuda.current_stream().cuda_stream)
    spread = scale.repeat_interleave(BLOCK, 1)[:, :k] if kind == BLOCKS else scale
    if kind == TENSOR:
        spread = fields["static_scale"]
    return codes.double() * spread.double()


def input_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what the product sees of an input that is not normed, in fp64."""
    if dtype not in RANGE:
        return x.to(dtype).double()
    return quantize(x.float(), dtype, token_tiles(CHANNEL)).real


@pytest.mark.parametrize("m", [1, 3, 8, 33])
@pytest.mark.parametrize("dtype", [FP8, INT8, BF16], ids=["fp8", "int8", "bf16"])
@pytest.mark.parametrize("kind", [CHANNEL, BLOCKS], ids=["channel", "block"])
@pytest.mark.parametrize(("k", "groups"), [(256, 4), (2048, 4), (4096, 4), (2048, 16), (960, 5)])
def test_gate_prologue(m: int, dtype: torch.dtype, kind: int, k: int, groups: int) -> None:
    weight = weight_of(1024, k, dtype, kind)
    norm = torch.rand(k, device="cuda") + 0.5
    both = torch.randn(m, 2 * k + 16, device="cuda").bfloat16()
    x, gate = both[:, :k], both[:, k + 16 :]
    grouped = x.float().unflatten(1, (groups, -1))
    factor = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + EPS)
    y = (grouped * factor).flatten(1) * norm * torch.sigmoid(gate.float())
    guarded = Guarded((m, 1024), FP32)
    run(
        weight,
        x,
        guarded.tensor,
        kind if dtype in RANGE else ScaleKind.NONE,
        gate=gate,
        gate_row_stride=both.stride(0),
        norm_weight=norm,
        norm_eps=EPS,
        num_norm_groups=groups,
        prologue=Prologue.GROUP_NORM_GATE,
    )
    real = y.to(dtype).double()
    if dtype in RANGE:
        of_gate = {"input": x, "gate": gate, "weight": norm, "num_norm_groups": groups}
        of_gate |= dict.fromkeys(("input_row_stride", "gate_row_stride"), both.stride(0))
        real = quantized_by_kernel("group_norm_gate", dtype, kind, k, rows=m, **of_gate)
    assert_product(guarded.check(), real @ weight.real.T)


@pytest.mark.parametrize("dtype", [FP8, INT8, BF16, FP16], ids=["fp8", "int8", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("n", "k"), [(16400, 4096), (30000, 1024), (2064, 3840), (8192, 64), (48, 4096)]
)
def test_one_row_through_many_tiles(n: int, k: int, dtype: torch.dtype) -> None:
    kind = CHANNEL if dtype in RANGE else ScaleKind.NONE
    weight = weight_of(n, k, dtype, kind)
    x = torch.randn(1, k, device="cuda").to(FP16 if dtype == FP16 else BF16)
    before = torch.randn(1, n, device="cuda")
    guarded = Guarded((1, n), FP32)
    outputs = []
    for _ in range(3):
        guarded.tensor.copy_(before)
        run(weight, x, guarded.tensor, kind, accumulate=1, programmatic_launch=1)
        outputs.append(guarded.check().clone())
    assert_product(outputs[0], before.double() + input_of(x, dtype) @ weight.real.T)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("m", [1, 8, 40])
@pytest.mark.parametrize("dtype", [FP8, INT8, FP16], ids=["fp8", "int8", "fp16"])
def test_accumulates_into_the_residual(m: int, dtype: torch.dtype) -> None:
    kind = CHANNEL if dtype in RANGE else ScaleKind.NONE
    weight = weight_of(2048, 2048, dtype, kind)
    x = torch.randn(m, 2048, device="cuda").to(FP16)
    real = input_of(x, dtype)
    guarded = Guarded((m, 2048), FP32)
    before = torch.randn(m, 2048, device="cuda")
    guarded.tensor.copy_(before)
    run(weight, x, guarded.tensor, kind, accumulate=1)
    assert_product(guarded.check(), before.double() + real @ weight.real.T)


@pytest.mark.parametrize("dtype", [FP8, INT8, BF16], ids=["fp8", "int8", "bf16"])
def test_rows_of_zeros_and_rows_apart(dtype: torch.dtype) -> None:
    kind = CHANNEL if dtype in RANGE else ScaleKind.NONE
    weight = weight_of(320, 512, dtype, kind)
    wide = torch.randn(6, 640, device="cuda").bfloat16()
    wide[2] = 0
    x = wide[:, 64:576]
    guarded = Guarded((6, 400), BF16)
    run(weight, x, guarded.tensor[:, :320], kind)
    got = guarded.check()
    assert got[:, 320:].isnan().all()
    assert (got[2, :320] == 0).all()
    assert_product(got[:, :320], input_of(x, dtype) @ weight.real.T)


@pytest.mark.parametrize("m", [1, 8, 16, 64])
@pytest.mark.parametrize("dtype", [FP8, INT8, BF16], ids=["fp8", "int8", "bf16"])
def test_same_inputs_same_bits(m: int, dtype: torch.dtype) -> None:
    kind = CHANNEL if dtype in RANGE else ScaleKind.NONE
    weight = weight_of(2048, 2048, dtype, kind)
    x = torch.randn(m, 2048, device="cuda").bfloat16()
    outputs = [torch.empty(m, 2048, device="cuda") for _ in range(5)]
    for output in outputs:
        run(weight, x, output, kind, programmatic_launch=1)
    torch.cuda.synchronize()
    assert all(torch.equal(outputs[0], output) for output in outputs[1:])


def test_chained_in_a_graph() -> None:
    """Programmatic launches: each product reads what the one before wrote."""
    weight = weight_of(2048, 2048, FP8, CHANNEL)
    buffers = [torch.randn(4, 2048, device="cuda") * 5e-3 for _ in range(9)]

    def chain(programmatic: int) -> None:
        for before, after in itertools.pairwise(buffers):
            run(weight, before, after, CHANNEL, programmatic_launch=programmatic)

    chain(0)
    torch.cuda.synchronize()
    expected = buffers[-1].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(1)
    for _ in range(20):
        for buffer in buffers[1:]:
            buffer.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(buffers[-1], expected)


@pytest.mark.parametrize("m", [1, 8, 40])
def test_products_in_a_chain(m: int) -> None:
    """A product asks for its weights early, for its input when the one before has ended."""
    weight = weight_of(2048, 2048, BF16, ScaleKind.NONE)
    first = torch.randn(m, 2048, device="cuda").bfloat16()

    def chain(programmatic: int) -> list[Tensor]:
        outputs = [first, *(torch.full_like(first, torch.nan) for _ in range(8))]
        for before, after in itertools.pairwise(outputs):
            run(weight, before, after, programmatic_launch=programmatic)
            if not programmatic:
                torch.cuda.synchronize()
        return outputs

    for found, expected in zip(chain(1), chain(0), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [FP8, INT8, BF16], ids=["fp8", "int8", "bf16"])
@pytest.mark.parametrize(("offset", "width"), [(1, 400), (0, 323), (8, 336)])
def test_outputs_lie_anywhere(dtype: torch.dtype, offset: int, width: int) -> None:
    kind = CHANNEL if dtype in RANGE else ScaleKind.NONE
    weight = weight_of(208, 256, dtype, kind)
    x = torch.randn(5, 256, device="cuda").bfloat16()
    codes = quantize(x.float(), dtype, token_tiles(CHANNEL)) if dtype in RANGE else None
    guarded = Guarded((5, width), BF16)
    output = guarded.tensor[:, offset : offset + 208]
    if codes is None:
        run(weight, x, output)
    else:
        run(weight, codes.codes, output, kind, input_scale=codes.scale)
    got = guarded.check()[:, offset : offset + 208]
    assert_product(got, input_of(x, dtype) @ weight.real.T)


@pytest.mark.parametrize(
    ("field", "value"),
    [("m", 0), ("n", 24), ("k", 96), ("weight", 0), ("input", 0), ("output", 0),
     ("weight_scale", 0), ("weight_scale_kind", ScaleKind.NONE), ("input_dtype", 4),
     ("prologue", 3), ("output_dtype", 3), ("input_row_stride", 8)],
)  # fmt: skip
def test_names_the_wrong_field(field: str, value: int) -> None:
    weight = weight_of(64, 128, FP8, CHANNEL)
    x = torch.zeros(2, 128, device="cuda", dtype=BF16)
    output = torch.zeros(2, 64, device="cuda")
    fields = {
        "input": x, "weight": weight.codes, "weight_scale": weight.scale, "output": output,
        "input_row_stride": 128, "output_row_stride": 64, "m": 2, "n": 64, "k": 128,
        "input_dtype": DTYPES[BF16], "weight_dtype": DTYPES[FP8], "output_dtype": DTYPES[FP32],
        "weight_scale_kind": CHANNEL,
    }  # fmt: skip
    with pytest.raises(ShapeError, match=rf"projection: {field} is"):
        library().call("projection", **{**fields, field: value})
