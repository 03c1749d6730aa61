"""The product of more than 64 rows against the product of its dequantized operands in fp64."""

import pytest
import torch

from ringexport.errors import ShapeError
from ringexport.kernels.library import ScaleKind
from tests.kernels.support import (
    DTYPES,
    Guarded,
    assert_within_torch,
    library,
    product,
    workspace,
)
from tests.kernels.test_projection import (
    BF16,
    CHANNEL,
    FP8,
    FP16,
    INT8,
    TENSOR,
    Quantized,
    quantize,
    token_tiles,
    weight_of,
)

pytestmark = pytest.mark.gpu
CODES = pytest.mark.parametrize("codes", [FP8, INT8], ids=["fp8", "int8"])
ROWS = pytest.mark.parametrize("m", [65, 192, 193, 500, 4097])
SHAPES = pytest.mark.parametrize(("n", "k"), [(2048, 2048), (48, 64), (208, 320), (1040, 1088)])


def run(
    weight: Quantized, x: torch.Tensor, output: torch.Tensor, kind: int, **more: object
) -> None:
    n, k = weight.codes.shape
    fields: dict[str, object] = {
        "input": x, "weight": weight.codes, "weight_scale": weight.scale, "output": output,
        "input_row_stride": x.stride(0), "output_row_stride": n, "m": len(x), "n": n, "k": k,
        "input_dtype": DTYPES[x.dtype], "weight_dtype": DTYPES[weight.codes.dtype],
        "output_dtype": DTYPES[output.dtype], "weight_scale_kind": kind,
    } | more  # fmt: skip
    library().call("projection", **fields, **workspace("projection", **fields)).launch()


@ROWS
@SHAPES
@CODES
def test_rows_are_quantized(m: int, n: int, k: int, codes: torch.dtype) -> None:
    weight = weight_of(n, k, codes, CHANNEL)
    for dtype in (BF16, FP16):
        # Rows lie apart, as a slice of a wider product leaves them.
        x = torch.randn(m, 2 * k, device="cuda").to(dtype)[:, :k]
        real = quantize(x.float(), codes, token_tiles(CHANNEL)).real
        guarded = Guarded((m, n), dtype)
        run(weight, x, guarded.tensor, CHANNEL)
        truth = real @ weight.real.T
        assert_within_torch(guarded.check(), truth.float().to(dtype), truth)


@ROWS
@CODES
@pytest.mark.parametrize("kind", [TENSOR, CHANNEL], ids=["tensor", "channel"])
def test_codes_that_are_given(m: int, codes: torch.dtype, kind: int) -> None:
    weight = weight_of(1040, 1088, codes, kind)
    x = quantize(torch.randn(m, 1088, device="cuda"), codes, token_tiles(kind))
    guarded = Guarded((m, 1040), BF16)
    run(weight, x.codes, guarded.tensor, kind, input_scale=x.scale)
    truth = x.real @ weight.real.T
    assert_within_torch(guarded.check(), truth.float().to(BF16), truth)


@ROWS
@SHAPES
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_half_weights(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    weight = weight_of(n, k, dtype, ScaleKind.NONE)
    x = torch.randn(m, k, device="cuda").to(dtype)
    guarded = Guarded((m, n), dtype)
    run(weight, x, guarded.tensor, ScaleKind.NONE)
    truth = x.double() @ weight.real.T
    assert_within_torch(guarded.check(), product(x, weight.codes.T), truth)


@pytest.mark.parametrize(
    ("field", "value"),
    [("accumulate", 1), ("output_row_stride", 80), ("prologue", 1), ("output_dtype", 0)],
)
def test_what_only_few_rows_may_ask_for_is_named(field: str, value: int) -> None:
    weight = weight_of(64, 128, FP8, CHANNEL)
    x, output = (torch.zeros(65, size, device="cuda", dtype=BF16) for size in (128, 64))
    with pytest.raises(ShapeError, match=rf"projection: {field} is"):
        run(weight, x, output, CHANNEL, norm_weight=torch.ones(128).cuda(), **{field: value})
