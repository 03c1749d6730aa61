"""The compiled library without a GPU: what it exports, and what its checks say."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ringexport.errors import ShapeError
from ringexport.kernels.library import OPS, DType, KernelLibrary, ScaleKind
from ringexport.settings import load_settings

DEFAULT = Path(__file__).parents[2] / "build" / "plugins" / "libringkernels.so"
POINTER = 1 << 20  # never followed: the checks only look at it


@pytest.fixture(scope="module")
def path() -> Path:
    found = load_settings().kernel_library or DEFAULT
    if not found.is_file():
        pytest.skip(f"{found} is not built: make plugins needs nvcc and cmake")
    return found


@pytest.fixture(scope="module")
def library(path: Path) -> KernelLibrary:
    return KernelLibrary.open(path)


def test_only_the_c_interface_is_exported(path: Path) -> None:
    tool = shutil.which("nm")
    if tool is None:
        pytest.skip("nm is not installed")
    listing = subprocess.run(
        [tool, "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True
    ).stdout
    names = {line.split()[-1] for line in listing.splitlines()}
    verbs = ("validate", "workspace_bytes", "params_bytes", "launch")
    assert names == {"ring_layout"} | {f"ring_{op}_{verb}" for op in OPS for verb in verbs}


def rms_norm(**changes: Any) -> dict[str, Any]:
    return {
        "residual": POINTER,
        "weight": POINTER,
        "output": POINTER,
        "rows": 3,
        "columns": 256,
        "eps": 1e-6,
        "dtype": DType.BFLOAT16,
        "residual_dtype": DType.FLOAT32,
    } | changes


def projection(**changes: Any) -> dict[str, Any]:
    return {
        "input": POINTER,
        "input_scale": POINTER,
        "weight": POINTER,
        "weight_scale": POINTER,
        "output": POINTER,
        "input_row_stride": 256,
        "output_row_stride": 512,
        "m": 2,
        "n": 512,
        "k": 256,
        "input_dtype": DType.FP8_E4M3,
        "weight_dtype": DType.FP8_E4M3,
        "output_dtype": DType.BFLOAT16,
        "weight_scale_kind": ScaleKind.CHANNEL,
    } | changes


def linear_decode(**changes: Any) -> dict[str, Any]:
    return {
        **dict.fromkeys(("query", "key", "value", "log_decay", "state", "output"), POINTER),
        "row_stride": 768,
        "output_row_stride": 256,
        "batch": 2,
        "num_heads": 4,
        "head_dim": 64,
        "query_scale": 0.125,
        "dtype": DType.BFLOAT16,
    } | changes


def sample(**changes: Any) -> dict[str, Any]:
    return {
        "logits": POINTER,
        "tokens": POINTER,
        "workspace": POINTER,
        "workspace_bytes": 1 << 24,
        **dict.fromkeys(("temperature", "seed", "position"), POINTER),
        **dict.fromkeys(("penalty", "seen", "seen_slot"), POINTER),
        "row_stride": 1024,
        "rows": 2,
        "vocab_size": 1000,
    } | changes


def embed(**changes: Any) -> dict[str, Any]:
    return {
        "tokens": POINTER,
        "table": POINTER,
        "residual": POINTER,
        "rows": 2,
        "columns": 64,
        "vocab_size": 1000,
        "dtype": DType.BFLOAT16,
    } | changes


GOOD = {
    "rms_norm": rms_norm,
    "projection": projection,
    "linear_attention_decode": linear_decode,
    "sample": sample,
    "embed": embed,
}


@pytest.mark.parametrize("op", GOOD)
def test_right_parameters_pass(library: KernelLibrary, op: str) -> None:
    fields = GOOD[op]()
    if op == "projection":
        size = library.workspace_bytes(op, **fields)
        fields |= {"workspace": POINTER, "workspace_bytes": size}
    assert library.call(op, **fields).op == op


@pytest.mark.parametrize(
    ("op", "field", "value"),
    [
        ("rms_norm", "residual", 0),
        ("rms_norm", "weight", 0),
        ("rms_norm", "columns", 255),
        ("rms_norm", "rows", -1),
        ("rms_norm", "dtype", DType.INT8),
        ("projection", "weight", 0),
        ("projection", "weight", POINTER + 2),
        ("projection", "m", 0),
        ("projection", "n", 500),
        ("projection", "k", 250),
        ("projection", "weight_scale", 0),
        ("linear_attention_decode", "state", 0),
        ("linear_attention_decode", "head_dim", 96),
        ("linear_attention_decode", "batch", -1),
        ("sample", "row_stride", 999),
        ("sample", "rows", 0),
        ("sample", "workspace_bytes", 8),
        ("sample", "logits", POINTER + 4),
        ("sample", "seed", 0),
        ("sample", "seen", 0),
        ("embed", "columns", 68),
        ("embed", "dtype", DType.FLOAT32),
        ("embed", "table", POINTER + 2),
    ],
)
def test_a_wrong_parameter_is_named(
    library: KernelLibrary, op: str, field: str, value: Any
) -> None:
    with pytest.raises(ShapeError, match=rf"^{op}: {field} is .*, expected "):
        library.call(op, **GOOD[op](**{field: value}))


@pytest.mark.parametrize(
    ("op", "sizes", "field"),
    [
        (
            "attention_decode",
            {"batch": 1 << 30, "num_kv_heads": 4, "num_heads": 16, "head_dim": 128},
            "batch",
        ),
        (
            "attention_decode",
            {"batch": 8, "num_kv_heads": 1 << 17, "num_heads": 1 << 17, "head_dim": 64},
            "num_kv_heads",
        ),
        ("router", {"tokens": 1 << 24, "num_experts": 1 << 30, "hidden_size": 2048}, "num_experts"),
    ],
)
def test_a_workspace_may_be_asked_for_before_the_checks(
    library: KernelLibrary, op: str, sizes: dict[str, int], field: str
) -> None:
    assert library.workspace_bytes(op, **sizes) > 0
    with pytest.raises(ShapeError, match=rf"^{op}: {field} is "):
        library.call(op, **sizes)


def test_an_unknown_parameter_is_refused(library: KernelLibrary) -> None:
    with pytest.raises(ShapeError, match="rms_norm has no parameter 'sharpness'"):
        library.call("rms_norm", **rms_norm(), sharpness=3)
