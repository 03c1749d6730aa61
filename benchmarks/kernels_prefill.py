"""Attention and projections of many tokens at Ring-mini's shape, beside torch."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.gpu_timing import median_us, print_rows
from ringexport.kernels.library import KernelCall, ScaleKind
from tests.kernels.support import DTYPES, library, workspace

PRODUCT_RATE = {torch.bfloat16: 788e12, torch.float8_e4m3fn: 1290e12, torch.int8: 1290e12}
"""FLOP a second of torch's largest products on one H200, measured; for INT8 that of FP8."""
NAMES = {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}
KV_HEADS, GROUP, WIDTH = 4, 4, 128
HEADS = KV_HEADS * GROUP
ATTENTION = ((1, 4096, 0), (8, 4096, 0), (1, 32768, 0), (1, 8192, 24576), (4, 512, 4096))
PROJECTIONS = ((256, 8192, 2048), (2048, 8192, 2048), (4096, 8192, 2048), (4096, 2048, 2048))


def attention_call(batch: int, length: int, position: int) -> tuple[KernelCall, list[torch.Tensor]]:
    """Return a launch, and query, keys, values and output."""
    capacity = position + length
    query = torch.randn(batch * length, HEADS * WIDTH, device="cuda").bfloat16()
    shape = (batch, KV_HEADS, capacity, WIDTH)
    keys, values = (torch.randn(shape, device="cuda").bfloat16() for _ in range(2))
    output = torch.empty_like(query)
    call = library().call(
        "attention_prefill",
        query=query,
        key_cache=keys,
        value_cache=values,
        position=torch.full((batch,), position, dtype=torch.int32, device="cuda"),
        lengths=torch.full((batch,), length, dtype=torch.int32, device="cuda"),
        output=output,
        row_stride=HEADS * WIDTH,
        output_row_stride=HEADS * WIDTH,
        capacity=capacity,
        batch=batch,
        max_length=length,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=WIDTH,
        softmax_scale=WIDTH**-0.5,
        dtype=DTYPES[torch.bfloat16],
    )
    return call, [query, keys, values, output]


def attention_row(batch: int, length: int, position: int) -> dict[str, object]:
    """Check and time one shape; torch has it without a cache only."""
    call, (query, keys, values, output) = attention_call(batch, length, position)

    def launch() -> None:
        call.launch(torch.cuda.current_stream().cuda_stream)

    split = query.view(batch, length, HEADS, WIDTH).transpose(1, 2)
    launch()
    torch.cuda.synchronize()
    last = split[-1, :, -64:].float()  # the last tokens of the last row
    mask = torch.ones(64, position + length, device="cuda", dtype=torch.bool)
    mask = mask.tril(position + length - 64)
    many = [part[-1].float().repeat_interleave(GROUP, 0) for part in (keys, values)]
    wanted = F.scaled_dot_product_attention(last, *many, attn_mask=mask).transpose(0, 1)
    got = output[-64:].float().view_as(wanted)
    error = ((got - wanted).norm() / wanted.norm()).item()
    if not error < 0.01:
        raise AssertionError(f"relative error {error}")
    us = median_us([launch], replays=2)
    flops = 4 * HEADS * WIDTH * batch * length * (position + (length + 1) / 2)
    row: dict[str, object] = {
        "op": "attention prefill, bf16",
        "shape": f"{batch} x {length:,} tokens" + (f" behind {position:,}" if position else ""),
        "us": us,
        "TFLOP/s": flops / us / 1e6,
        "fraction": flops / us * 1e6 / PRODUCT_RATE[torch.bfloat16],
    }
    if position == 0:

        def reference() -> None:
            F.scaled_dot_product_attention(split, keys, values, is_causal=True, enable_gqa=True)

        row["reference us"] = median_us([reference], replays=2)
    return row


def projection_row(codes: torch.dtype, m: int, n: int, k: int) -> dict[str, object]:
    """Check and time one product of bf16 rows, which are quantized on the way."""
    x = torch.randn(m, k, device="cuda").bfloat16()
    weight = (torch.randn(n, k, device="cuda") * 30).to(codes)
    scale = torch.full((n,), 0.001, device="cuda")
    output = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
    fields: dict[str, object] = {
        "input": x, "weight": weight, "weight_scale": scale, "output": output,
        "input_row_stride": k, "output_row_stride": n, "m": m, "n": n, "k": k,
        "input_dtype": DTYPES[x.dtype], "weight_dtype": DTYPES[codes],
        "output_dtype": DTYPES[output.dtype], "weight_scale_kind": ScaleKind.CHANNEL,
    }  # fmt: skip
    call = library().call("projection", **fields, **workspace("projection", **fields))

    def launch() -> None:
        call.launch(torch.cuda.current_stream().cuda_stream)

    launch()
    torch.cuda.synchronize()
    wanted = x.float() @ (weight.float() * scale[:, None]).T
    error = ((output.float() - wanted).norm() / wanted.norm()).item()
    if not error < 0.04:
        raise AssertionError(f"relative error {error}")
    us = median_us([launch])
    flops = 2 * m * n * k
    row: dict[str, object] = {
        "op": f"projection {NAMES[codes]} of many rows, quantized inside",
        "shape": f"{m:,} x {k} to {n}",
        "us": us,
        "TFLOP/s": flops / us / 1e6,
        "fraction": flops / us * 1e6 / PRODUCT_RATE[codes],
    }
    if codes == torch.float8_e4m3fn:
        rows, token_scale = x.to(codes), torch.ones(m, 1, device="cuda")

        def reference() -> None:  # without quantizing
            torch._scaled_mm(  # noqa: SLF001
                rows, weight.T, token_scale, scale[None], out_dtype=torch.bfloat16
            )

        row["reference us"] = median_us([reference])
    return row


def rows() -> Iterator[dict[str, object]]:
    """Measure every shape."""
    for shape in ATTENTION:
        yield attention_row(*shape)
        torch.cuda.empty_cache()
    for codes in (torch.float8_e4m3fn, torch.int8):
        yield from (projection_row(codes, *shape) for shape in PROJECTIONS)


if __name__ == "__main__":
    print_rows(rows())
