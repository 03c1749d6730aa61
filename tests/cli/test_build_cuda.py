"""Bundles for targets on NVIDIA GPUs: built anywhere, run where the GPU is."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from safetensors import safe_open

from tests.cli.conftest import Call, assert_refused

RING_NANO = Path(__file__).parents[2] / "models" / "ring-nano"


@pytest.mark.parametrize(
    ("recipe", "dtype"), [("bf16", "BF16"), ("fp8", "F8_E4M3"), ("fp8-block", "F8_E4M3")]
)
def test_build_packs_the_weights(call: Call, tmp_path: Path, recipe: str, dtype: str) -> None:
    out = tmp_path / "bundle"
    called = call("build", RING_NANO, "-o", out, "--target", "cuda:sm_90", "--recipe", recipe)
    assert called.code == 0, called.err
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["build"]["compute_dtype"] == "bf16"
    target = manifest["targets"]["cuda:sm_90"]
    assert target["files"] == {"weights": "targets/cuda-sm_90/weights.safetensors"}
    with safe_open(out / target["files"]["weights"], framework="pt") as file:
        assert file.get_slice("layers.1.experts.gate_up").get_dtype() == dtype
        assert file.get_slice("layers.1.router").get_dtype() == "F32"
        assert file.get_slice("lm_head").get_dtype() == "BF16"
    assert call("inspect", out).code == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_run_says_what_is_missing(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    built = call("build", RING_NANO, "-o", out, "--target", "cuda:sm_90")
    assert built.code == 0
    assert "note: cuda:sm_90 was not tried: the backend cuda:sm_90 cannot run here" in built.err
    assert "trying" not in built.err
    assert_refused(call("run", out, "x"), 4, "torch sees no CUDA device")
    assert_refused(call("run", out, "x", "--backend", "cuda:sm_90"), 4, "NVIDIA GPU")


def test_a_build_is_tried_with_the_library_of_the_settings(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def why_not_here(target: str, library: Path | None) -> tuple[str, str]:
        asked.append((target, library))
        return "it is only asked", "no hint"

    monkeypatch.setattr("ringexport.runtime.backends.cuda.open.why_not_here", why_not_here)
    monkeypatch.setenv("RINGEXPORT_KERNEL_LIBRARY", "/elsewhere/libringkernels.so")
    built = call("build", RING_NANO, "-o", tmp_path / "bundle", "--target", "cuda:sm_90")
    assert built.code == 0, built.err
    assert set(asked) == {("cuda:sm_90", Path("/elsewhere/libringkernels.so"))}


def test_a_profile_is_for_tensorrt_alone(call: Call, tmp_path: Path) -> None:
    arguments = ("-o", tmp_path / "out", "--target", "cuda:sm_90", "--profile", "default")
    refused = call("build", RING_NANO, *arguments)
    assert_refused(refused, 3, "no TensorRT engine is built for cuda:sm_90")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_bench_says_at_once_what_it_leaves_out(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    assert call("build", RING_NANO, "-o", out, "--target", "cuda:sm_90").code == 0
    short = ("--prefill", "4", "--context", "4", "--decode", "2", "--repeat", "1")
    called = call("bench", out, *short)
    assert called.code == 0, called.err
    assert "note: cuda:sm_90 is not measured: the backend cuda:sm_90 cannot run here" in called.err
    assert "not measured: cuda:sm_90" in called.out


def test_bench_refuses_sizes_before_it_looks_for_a_gpu(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    assert call("build", RING_NANO, "-o", out, "--target", "cuda:sm_90").code == 0
    fast = ("bench", out, "--backend", "cuda:sm_90")
    assert_refused(call(*fast, "--batch", "8,257"), 3, "257 rows", "takes 256 at most")
    assert_refused(call(*fast, "--context", "9000"), 3, "the context holds 8192")


def test_one_bundle_holds_several_targets(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    targets = ("--target", "cuda:sm_90", "--target", "onnxruntime:cpu")
    assert call("build", RING_NANO, "-o", out, *targets, "--recipe", "bf16").code == 0
    called = call("run", out, "def f(", "--max-new-tokens", "4", "--json")
    assert called.code == 0, called.err
    assert called.json["backend"] == (
        "cuda:sm_90" if torch.cuda.is_available() else "onnxruntime:cpu"
    )


@pytest.mark.parametrize(("recipe", "cache"), [("auto", "BFLOAT16"), ("fp32", "FLOAT")])
def test_build_for_the_cuda_provider(call: Call, tmp_path: Path, recipe: str, cache: str) -> None:
    out = tmp_path / "bundle"
    called = call("build", RING_NANO, "-o", out, "--target", "onnxruntime:cuda", "--recipe", recipe)
    assert called.code == 0, called.err
    path = out / "targets" / "onnxruntime-cuda" / "model.onnx"
    graph = onnx.load(str(path), load_external_data=False).graph
    types = {info.name: info.type.tensor_type.elem_type for info in graph.input}
    assert types["past_key.2"] == getattr(onnx.TensorProto, cache)
    assert types["total_length"] == onnx.TensorProto.INT32
    assert call("inspect", out).code == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_cuda_provider_is_missing(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    assert call("build", RING_NANO, "-o", out, "--target", "onnxruntime:cuda").code == 0
    assert_refused(call("run", out, "x"), 4, "onnxruntime-gpu is not installed")
    refused = call("run", out, "x", "--backend", "onnxruntime:cuda")
    assert_refused(refused, 4, "onnxruntime-gpu is not installed")
    assert "ringexport[ort-cuda]" in refused.err


def test_the_cuda_provider_runs_no_quantized_modules(call: Call, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('base = "fp8"\n')
    arguments = ("-o", tmp_path / "out", "--target", "onnxruntime:cuda", "--recipe", recipe)
    assert_refused(call("build", RING_NANO, *arguments), 3, "runs no quantized modules")
