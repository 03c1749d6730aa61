"""Products of many rows through torch: cuBLASLt reaches the card's peak there."""

import torch
from torch import Tensor

from ringexport.ops.quantization import NumberFormat
from ringexport.runtime.backends.cuda.kernels import Activations
from ringexport.runtime.backends.cuda.weights import DeviceMatrix

__all__ = ["product"]

_MIN_ROWS = 17
"""Fewer rows are padded to this: torch's int8 product takes no fewer."""


def product(source: Activations, matrix: DeviceMatrix, out: Tensor) -> None:
    """Write source [M, K] x matrix [N, K]^T to `out` [M, N].

    Args:
        source: codes in the matrix's format, or bf16 for a bf16 matrix.
        matrix: the weights.
        out: bf16 or fp32.
    """
    weight = matrix.values.t()
    if matrix.format.number_format is None:
        assert source.values is not None
        if out.dtype == torch.float32:
            torch.mm(source.values, weight, out_dtype=torch.float32, out=out)
        else:
            torch.mm(source.values, weight, out=out)
        return
    codes, scale = source.codes, source.scale
    assert codes is not None
    assert scale is not None
    assert matrix.scale is not None
    if matrix.format.number_format is NumberFormat.INT8:
        exact = _int8_product(codes, weight)
        torch.mul(exact * scale[:, None], matrix.scale, out=out)
        return
    if matrix.format.block:
        # cuBLASLt wants the scales of neighbouring tokens to be neighbours.
        scale_a, scale_b = scale.t().contiguous().t(), matrix.scale.t()
    else:
        scale_a, scale_b = scale[:, None], matrix.scale[None, :]
    found = torch._scaled_mm(  # noqa: SLF001 - torch has no public name for it
        codes,
        weight,
        scale_a=scale_a,
        scale_b=scale_b,
        out_dtype=torch.bfloat16,
        use_fast_accum=not matrix.format.block,
        **({"out": out} if out.dtype == torch.bfloat16 else {}),
    )
    if out.dtype != torch.bfloat16:
        out.copy_(found)


def _int8_product(codes: Tensor, weight: Tensor) -> Tensor:
    """Return the exact int32 product."""
    rows = len(codes)
    if rows < _MIN_ROWS:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, _MIN_ROWS - rows))
    return torch._int_mm(codes, weight)[:rows]  # noqa: SLF001 - torch has no public name for it
