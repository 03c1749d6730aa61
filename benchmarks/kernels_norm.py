"""Time norms, quantization and rotary embedding at Ring-mini's shapes beside the copy rate.

    python benchmarks/kernels_norm.py

Results are compared with torch in tests/kernels/test_norm.py; here one row of each is looked at.
"""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from benchmarks.gpu_timing import median_us, print_rows, rotating
from ringexport.kernels.library import DType, KernelCall, KernelLibrary, ScaleKind
from ringexport.settings import load_settings

COPY_TBPS = 4.28  # measured on the H200
WIDTH, GROUPS, HEADS, KV_HEADS, DIM, ROTARY = 2048, 4, 16, 4, 128, 64
ROWS = (1, 8, 64, 512, 4096, 32768)
BF16, FP32 = torch.bfloat16, torch.float32
EPS = 1e-6


def random(rows: int, columns: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(rows, columns, device="cuda").to(dtype)


def rms_norm(rows: int) -> dict[str, Any]:
    """Residual add, norm, codes."""
    return {
        "delta": random(rows, WIDTH),
        "residual": random(rows, WIDTH, FP32),
        "weight": torch.ones(WIDTH, device="cuda"),
        "residual_dtype": DType.FLOAT32,
        "eps": EPS,
    }


def group_norm_gate(rows: int) -> dict[str, Any]:
    """Attention output and gate in, codes out; the gate is a part of a wider row."""
    return {
        "input": random(rows, WIDTH),
        "gate": random(rows, 4 * WIDTH)[:, 3 * WIDTH :],
        "weight": torch.ones(WIDTH, device="cuda"),
        "input_row_stride": WIDTH,
        "gate_row_stride": 4 * WIDTH,
        "num_norm_groups": GROUPS,
        "eps": EPS,
    }


def quantize(rows: int) -> dict[str, Any]:
    """16-bit rows in, codes out."""
    return {"input": random(rows, WIDTH), "input_row_stride": WIDTH}


def qk_norm_rotary(rows: int) -> dict[str, Any]:
    """Query and key in place."""
    wide = random(rows, (HEADS + 2 * KV_HEADS) * DIM)
    angles = torch.rand(rows, ROTARY // 2, device="cuda")
    return {
        "query": wide,
        "key": wide[:, HEADS * DIM :],
        "query_norm": torch.ones(DIM, device="cuda"),
        "key_norm": torch.ones(DIM, device="cuda"),
        "rotary_cos": angles.cos(),
        "rotary_sin": angles.sin(),
        "position": torch.arange(rows, dtype=torch.int32, device="cuda"),
        "row_stride": wide.stride(0),
        "tokens": rows,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": DIM,
        "rotary_dim": ROTARY,
        "norm_eps": EPS,
    }


BYTES = {  # per row, read and written
    "rms_norm": WIDTH * (2 + 4 + 4 + 1),
    "group_norm_gate": WIDTH * (2 + 2 + 1),
    "quantize": WIDTH * (2 + 1),
    "qk_norm_rotary": (HEADS + KV_HEADS) * DIM * 4 + ROTARY * 4,
}
CODES = dict.fromkeys(BYTES, ", FP8 codes") | {"qk_norm_rotary": ""}
MAKERS = {f.__name__: f for f in (rms_norm, group_norm_gate, quantize, qk_norm_rotary)}


def call_of(library: KernelLibrary, op: str, rows: int) -> KernelCall:
    """Return one call on data of its own."""
    fields = MAKERS[op](rows) | {"dtype": DType.BFLOAT16, "programmatic_launch": 1}
    if op != "qk_norm_rotary":
        fields |= {
            "rows": rows,
            "columns": WIDTH,
            "quantized": torch.empty(rows, WIDTH, device="cuda", dtype=torch.float8_e4m3fn),
            "quantized_dtype": DType.FP8_E4M3,
            "scale": torch.empty(rows, device="cuda"),
            "scale_kind": ScaleKind.CHANNEL,
        }
    return library.call(op, **fields)


def measure(library: KernelLibrary, op: str, rows: int) -> dict[str, Any]:
    """Return one row of the table."""
    nbytes = BYTES[op] * rows
    calls = [call_of(library, op, rows) for _ in range(min(rotating(nbytes), 64))]
    steps = [
        lambda call=call: call.launch(torch.cuda.current_stream().cuda_stream) for call in calls
    ]
    us = median_us(steps * -(-64 // len(steps)), replays=3)
    rate = nbytes / us / 1e6
    return {
        "op": op.replace("_", " ").replace("rms norm", "residual and rms norm") + CODES[op],
        "shape": f"{rows:,} rows",
        "us": us,
        "TB/s": rate,
        "fraction": rate / COPY_TBPS,
    }


def rows(counts: Iterable[int] = ROWS) -> Iterator[dict[str, Any]]:
    """Measure all ops at numbers of rows."""
    settings = load_settings()
    if settings.kernel_library is None:
        sys.exit("set RINGEXPORT_KERNEL_LIBRARY to the library to measure")
    library = KernelLibrary.open(settings.kernel_library)
    yield from (measure(library, op, count) for op in MAKERS for count in counts)


if __name__ == "__main__":
    print_rows(rows())
