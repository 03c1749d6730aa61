"""Norms, quantization and the rotary embedding against the same maths in fp64."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ringexport.errors import ShapeError
from ringexport.kernels.library import ScaleKind
from ringexport.ops.quantization import Granularity, GranularityKind, NumberFormat
from ringexport.runtime.backends.torch_quantized import fake_quantize
from tests.kernels.support import DTYPES, Guarded, assert_within_torch, library

pytestmark = pytest.mark.gpu

FP8, INT8 = torch.float8_e4m3fn, torch.int8
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FORMATS = {FP8: NumberFormat.FP8_E4M3, INT8: NumberFormat.INT8}
RANGE = {FP8: 448.0, INT8: 127.5}
CODES = pytest.mark.parametrize("codes", [FP8, INT8], ids=["fp8", "int8"])
KINDS = pytest.mark.parametrize(
    "kind",
    [ScaleKind.CHANNEL, ScaleKind.BLOCK128, ScaleKind.TENSOR],
    ids=["token", "block", "static"],
)
DTYPE = pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
ROWS = pytest.mark.parametrize("rows", [1, 2, 33, 500, 4097])
EPS = 1e-6
STATIC = 0.02


def launch(op: str, **fields: object) -> None:
    library().call(op, **fields).launch(torch.cuda.current_stream().cuda_stream)


class Codes:
    """Guarded room for codes and scales of [rows, columns], and their check."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, kind: int) -> None:
        self.kind = kind
        self.codes = Guarded((rows, columns), dtype)
        blocks = -(-columns // 128) if kind == ScaleKind.BLOCK128 else 1
        self.scale = Guarded((rows, blocks), FP32)
        static = torch.full((1,), STATIC, device="cuda")
        self.fields = {
            "quantized": self.codes.tensor,
            "quantized_dtype": DTYPES[dtype],
            "scale_kind": kind,
            **(
                {"static_scale": static}
                if kind == ScaleKind.TENSOR
                else {"scale": self.scale.tensor}
            ),
        }

    def check(self, truth: Tensor) -> None:
        """Compare with the quantization of fp32 `truth`; ulps of it may move a code to the next."""
        codes, scale = self.codes.check(), self.scale.check()
        columns = truth.shape[1]
        if self.kind == ScaleKind.TENSOR:
            assert scale.isnan().all()
            scale = torch.full_like(scale, STATIC)
        granularity = {
            ScaleKind.TENSOR: Granularity(GranularityKind.TENSOR),
            ScaleKind.CHANNEL: Granularity(GranularityKind.TOKEN),
            ScaleKind.BLOCK128: Granularity(GranularityKind.GROUP, columns=128),
        }[self.kind]
        static = STATIC if self.kind == ScaleKind.TENSOR else None
        expected = fake_quantize(truth, FORMATS[codes.dtype], granularity, static)
        spread = scale.repeat_interleave(128, 1)[:, :columns] if scale.shape[1] > 1 else scale
        real = codes.float() * spread
        wrong = (real - expected).abs() > 1e-5 * expected.abs() + 1e-30
        if codes.dtype == INT8:  # the largest number of a row is 127.5 steps: a tie
            wrong &= truth.abs() < 127.4 * spread
        assert wrong.float().mean() < 1e-4
        step = spread if codes.dtype == INT8 else expected.abs() / 8 + spread / 256
        assert ((real - expected).abs() <= 1.01 * step).all()

    def check_exactly(self, values: Tensor) -> None:
        """The codes of values that are in memory already: no rounding but that of the division."""
        codes, scale = self.codes.check(), self.scale.check()
        columns = values.shape[1]
        if self.kind == ScaleKind.BLOCK128:
            padded = torch.nn.functional.pad(values.float(), (0, -columns % 128))
            largest = padded.unflatten(1, (-1, 128)).abs().amax(-1)
        else:
            largest = values.float().abs().amax(-1, keepdim=True)
        wanted = largest / torch.full_like(largest, RANGE[codes.dtype])  # torch multiplies by 1 / x
        wanted = wanted.masked_fill(wanted == 0, torch.finfo(FP32).eps)
        if self.kind == ScaleKind.TENSOR:
            wanted = torch.full_like(wanted, STATIC)
        else:
            assert torch.equal(scale, wanted)
        scaled = values.float() / wanted.repeat_interleave(128, 1)[:, :columns] \
            if wanted.shape[1] > 1 else values.float() / wanted  # fmt: skip
        if codes.dtype == INT8:
            assert torch.equal(codes, scaled.round().clamp(-128, 127).to(INT8))
        else:
            rounded = scaled.clamp(-448, 448).to(FP8)
            assert torch.equal(codes.view(torch.uint8), rounded.view(torch.uint8))


@ROWS
@pytest.mark.parametrize("columns", [8, 256, 1000, 2048, 5120])
@DTYPE
@CODES
@KINDS
def test_quantize(
    rows: int, columns: int, dtype: torch.dtype, codes: torch.dtype, kind: int
) -> None:
    wide = torch.randn(rows, columns + 16, device="cuda").to(dtype)
    wide[0] = 0
    x = wide[:, 8 : columns + 8]
    room = Codes(rows, columns, codes, kind)
    launch(
        "quantize",
        input=x,
        input_row_stride=wide.stride(0),
        rows=rows,
        columns=columns,
        dtype=DTYPES[dtype],
        **room.fields,
    )
    room.check_exactly(x)


@CODES
def test_quantize_of_every_size_divides_exactly(codes: torch.dtype) -> None:
    scales = torch.logspace(-30, 4, 4096, device="cuda")[:, None]
    x = (torch.randn(4096, 512, device="cuda") * scales).to(BF16)
    room = Codes(4096, 512, codes, ScaleKind.CHANNEL)
    launch(
        "quantize", input=x, input_row_stride=512, rows=4096, columns=512, dtype=DTYPES[BF16],
        **room.fields,
    )  # fmt: skip
    room.check_exactly(x)


def rms_norm(x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    grouped = x.unflatten(-1, (groups, -1))
    factor = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + EPS)
    return (grouped * factor).flatten(-2) * weight.to(x.dtype)


@ROWS
@pytest.mark.parametrize("columns", [64, 256, 2040, 2048, 8192, 16384])
@DTYPE
def test_rms_norm(rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = torch.rand(columns, device="cuda") + 0.5
    for residual_dtype in (FP32, dtype):
        residual = (torch.randn(rows, columns, device="cuda") * 4).to(residual_dtype)
        delta = torch.randn(rows, columns, device="cuda").to(dtype)
        kept, output = Guarded((rows, columns), residual_dtype), Guarded((rows, columns), dtype)
        kept.tensor.copy_(residual)
        launch(
            "rms_norm",
            delta=delta,
            residual=kept.tensor,
            weight=weight,
            output=output.tensor,
            rows=rows,
            columns=columns,
            eps=EPS,
            dtype=DTYPES[dtype],
            residual_dtype=DTYPES[residual_dtype],
        )
        total = residual + delta
        assert torch.equal(kept.check(), total)
        truth = rms_norm(total.double(), weight)
        in_dtype = rms_norm(total.float(), weight).to(dtype)
        assert_within_torch(output.check(), in_dtype, truth)


@pytest.mark.parametrize("rows", [1, 500])
@pytest.mark.parametrize("columns", [256, 1000, 2048, 4096])
@CODES
@KINDS
def test_rms_norm_quantizes(rows: int, columns: int, codes: torch.dtype, kind: int) -> None:
    weight = torch.rand(columns, device="cuda") + 0.5
    residual = torch.randn(rows, columns, device="cuda") * 3
    before = residual.clone()
    output, room = Guarded((rows, columns), BF16), Codes(rows, columns, codes, kind)
    for with_output in (output.tensor, 0):
        launch(
            "rms_norm",
            residual=residual,
            weight=weight,
            output=with_output,
            rows=rows,
            columns=columns,
            eps=EPS,
            dtype=DTYPES[BF16],
            residual_dtype=DTYPES[FP32],
            **room.fields,
        )
        truth = rms_norm(residual.double(), weight)
        room.check(truth.float())
        assert_within_torch(output.check(), truth.float().bfloat16(), truth)
    assert torch.equal(residual, before)


@pytest.mark.parametrize("rows", [1, 3, 500, 4097])
@pytest.mark.parametrize(
    ("columns", "groups"), [(256, 4), (2048, 4), (4096, 4), (960, 5), (512, 1)]
)
@CODES
@KINDS
def test_group_norm_gate(
    rows: int, columns: int, groups: int, codes: torch.dtype, kind: int
) -> None:
    weight = torch.rand(columns, device="cuda") + 0.5
    both = torch.randn(rows, 2 * columns + 8, device="cuda").bfloat16()
    x, gate = both[:, :columns], both[:, columns + 8 :]
    output, room = Guarded((rows, columns), BF16), Codes(rows, columns, codes, kind)
    launch(
        "group_norm_gate",
        input=x,
        gate=gate,
        weight=weight,
        output=output.tensor,
        input_row_stride=both.stride(0),
        gate_row_stride=both.stride(0),
        rows=rows,
        columns=columns,
        num_norm_groups=groups,
        eps=EPS,
        dtype=DTYPES[BF16],
        **room.fields,
    )
    truth = rms_norm(x.double(), weight, groups) * torch.sigmoid(gate.double())
    in_dtype = (rms_norm(x.float(), weight, groups) * torch.sigmoid(gate.float())).bfloat16()
    assert_within_torch(output.check(), in_dtype, truth)
    room.check(truth.float())


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the first dimensions of x [N, H, K] by cos and sin [N, R/2], in half-split pairs."""
    half = cosine.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    c, s = cosine[:, None], sine[:, None]
    return torch.cat((first * c - second * s, second * c + first * s, rest), -1)


@dataclass(frozen=True)
class Heads:
    """Of a layer."""

    query: int
    key: int
    dim: int
    rotary: int


HEADS = [
    Heads(16, 16, 128, 64),
    Heads(16, 4, 128, 64),
    Heads(4, 2, 64, 32),
    Heads(3, 1, 64, 64),
    Heads(5, 5, 128, 128),
    Heads(4, 1, 64, 0),
]


@pytest.mark.parametrize("tokens", [1, 7, 500, 4097])
@pytest.mark.parametrize("shape", HEADS, ids=str)
@pytest.mark.parametrize("cache", [None, BF16, FP8], ids=["alone", "bf16", "fp8"])
@pytest.mark.parametrize("silu", [0, 1])
def test_qk_norm_rotary(tokens: int, shape: Heads, cache: torch.dtype | None, silu: int) -> None:
    heads, kv_heads, dim, rotary = shape.query, shape.key, shape.dim, shape.rotary
    capacity, slots = 600, max(1, tokens // 300)
    qkv = Guarded((tokens, heads + 2 * kv_heads, dim), BF16)
    before = torch.randn(qkv.tensor.shape, device="cuda").bfloat16()
    qkv.tensor.copy_(before)
    query, key, value = qkv.tensor.split((heads, kv_heads, kv_heads), dim=1)
    norms = torch.rand(2, dim, device="cuda") + 0.5
    angles = torch.rand(capacity, max(rotary // 2, 1), device="cuda") * 6.3
    order = torch.randperm(slots * capacity, device="cuda")[:tokens]
    position = (order % capacity).int()
    slot = torch.div(order, capacity, rounding_mode="floor").int()
    if tokens > 5:
        position[3] = -1
        slot[4] = -1
    key_scale, value_scale = (torch.tensor([s], device="cuda") for s in (0.02, 0.01))
    caches = [Guarded((slots, kv_heads, capacity, dim), cache or BF16) for _ in range(2)]
    fields = {}
    if cache is not None:
        fields = {
            "value": value, "key_cache": caches[0].tensor, "value_cache": caches[1].tensor,
            "slots": slot, "key_scale": key_scale, "value_scale": value_scale,
            "capacity": capacity, "cache_dtype": DTYPES[cache],
        }  # fmt: skip
    launch(
        "qk_norm_rotary",
        query=query,
        key=key,
        query_norm=norms[0],
        key_norm=norms[1],
        rotary_cos=angles.cos(),
        rotary_sin=angles.sin(),
        position=position,
        row_stride=qkv.tensor.stride(0),
        tokens=tokens,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        rotary_dim=rotary,
        silu=silu,
        norm_eps=EPS,
        dtype=DTYPES[BF16],
        **fields,
    )
    got = qkv.check()
    here = position >= 0
    assert torch.equal(got[~here], before[~here])
    assert torch.equal(got[:, heads + kv_heads :], before[:, heads + kv_heads :])
    at = position.clamp(min=0).long()
    half = rotary // 2
    for part, norm in ((slice(0, heads), norms[0]), (slice(heads, heads + kv_heads), norms[1])):

        def computed(dtype: torch.dtype, part: slice = part, norm: Tensor = norm) -> Tensor:
            x = before[:, part].to(dtype)
            x = torch.nn.functional.silu(x) if silu else x
            x = rms_norm(x, norm)
            return rotate(x, angles.cos()[at, :half].to(dtype), angles.sin()[at, :half].to(dtype))

        truth = computed(torch.float64)[here]
        assert_within_torch(got[:, part][here], computed(FP32)[here].bfloat16(), truth)
    if cache is not None:
        check_caches(caches, got.split((heads, kv_heads, kv_heads), dim=1), (slot, position))


def check_caches(
    caches: list[Guarded], qkv: tuple[Tensor, ...], places: tuple[Tensor, Tensor]
) -> None:
    """What is in the cache is what was written to the rows, but for its rounding; nothing else."""
    slot, position = (place.long() for place in places)
    cached = (slot >= 0) & (position >= 0)
    for room, rows, scale in zip(caches, qkv[1:], (0.02, 0.01), strict=True):
        tensor = room.check()
        found = tensor[slot[cached], :, position[cached]]
        if tensor.dtype == BF16:
            assert torch.equal(found, rows[cached])
        else:
            expected = fake_quantize(rows[cached].float(), NumberFormat.FP8_E4M3, scale=scale)
            error = (found.float() * scale - expected).abs()
            assert (error <= expected.abs() / 7 + scale / 256).all()
            assert (error > 1e-6).float().mean() < 0.05
        untouched = torch.ones(tensor.shape[0], tensor.shape[2], dtype=torch.bool, device="cuda")
        untouched[slot[cached], position[cached]] = False
        rest = tensor.transpose(1, 2)[untouched]
        assert rest.isnan().all()


@pytest.mark.parametrize(
    ("op", "field", "value"),
    [("rms_norm", "columns", 12), ("rms_norm", "residual", 0), ("rms_norm", "weight", 0),
     ("rms_norm", "dtype", 0), ("rms_norm", "residual_dtype", 1), ("rms_norm", "scale", 0),
     ("rms_norm", "scale_kind", 0), ("rms_norm", "quantized_dtype", 2), ("quantize", "input", 0),
     ("quantize", "input_row_stride", 12), ("quantize", "rows", -1), ("quantize", "quantized", 0),
     ("group_norm_gate", "gate", 0), ("group_norm_gate", "num_norm_groups", 0),
     ("group_norm_gate", "gate_row_stride", 8), ("qk_norm_rotary", "head_dim", 96),
     ("qk_norm_rotary", "rotary_dim", 24), ("qk_norm_rotary", "rotary_cos", 0),
     ("qk_norm_rotary", "position", 0), ("qk_norm_rotary", "row_stride", 12)],
)  # fmt: skip
def test_names_the_wrong_field(op: str, field: str, value: int) -> None:
    place = torch.zeros(1 << 12, device="cuda")
    pointers = [
        *("residual", "weight", "output", "quantized", "scale", "input", "gate", "query", "key"),
        *("query_norm", "key_norm", "rotary_cos", "rotary_sin", "position"),
    ]
    numbers = {
        "rows": 2, "columns": 64, "dtype": DTYPES[BF16], "residual_dtype": DTYPES[FP32],
        "quantized_dtype": DTYPES[FP8], "scale_kind": ScaleKind.CHANNEL, "input_row_stride": 64,
        "gate_row_stride": 64, "num_norm_groups": 2, "tokens": 1, "num_heads": 2, "num_kv_heads": 1,
        "head_dim": 64, "rotary_dim": 32, "row_stride": 256,
    }  # fmt: skip
    known = set(dict(library().pack(op, {})._fields_))
    fields = dict.fromkeys(pointers, place) | numbers | {field: value}
    with pytest.raises(ShapeError, match=rf"{op}: {field} is"):
        library().call(op, **{name: v for name, v in fields.items() if name in known})
