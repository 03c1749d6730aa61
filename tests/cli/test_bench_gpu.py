"""bench of the fast engine, with a GPU that is not there, and without one."""

from pathlib import Path

import pytest

from tests.cli.conftest import Call, assert_refused
from tests.compare import gpu_fakes


@pytest.fixture
def no_real_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_fakes.install(monkeypatch)
    fake = gpu_fakes.fake_gpu()
    monkeypatch.setattr("ringexport.compare.gpu.opening.find_gpu", lambda *_: fake)


@pytest.mark.usefixtures("no_real_gpu")
def test_bench_of_random_weights(call: Call, tiny_checkpoint: Path) -> None:
    config = tiny_checkpoint / "config.json"
    wanted = ("--batch", "1,8,16", "--context", "64", "--prefill", "32", "--recipe", "bf16")
    called = call("bench", "--random-weights", config, *wanted, "--json")
    assert called.code == 0, called.err
    assert called.json["conditions"]["recipe"] == "bf16"
    assert called.json["read_rate_bytes_per_s"] == gpu_fakes.READ_RATE
    assert [point["batch"] for point in called.json["decode"]] == [1, 8]
    assert set(called.json["skipped"]) == {"decode, batch 16, context 64", "prompts, 16 x 32"}
    shown = call("bench", "--random-weights", config, *wanted).out
    for text in ("4.00 TB/s, measured now", "8.0 of 8.0", "4,000", "50%", "130.0", "207.0"):
        assert text in shown
    assert "not measured: prompts, 16 x 32: 16 sequences need too much memory" in shown
    assert "kernel 0" not in shown
    shown = call("bench", "--random-weights", config, *wanted, "--profile").out
    assert "kernel 15" in shown
    assert "all others" in shown


def test_bench_of_random_weights_refuses(call: Call, bundle: Path, tiny_checkpoint: Path) -> None:
    config = ("--random-weights", tiny_checkpoint / "config.json")
    assert_refused(call("bench"), 2, "either a BUNDLE or --random-weights")
    assert_refused(call("bench", bundle, *config), 2, "either a BUNDLE or --random-weights")
    assert_refused(call("bench", *config, "--backend", "torch"), 2, "'--backend'")
    assert_refused(call("bench", bundle, "--recipe", "fp8"), 2, "'--recipe'")
    only = ("--backend", "onnxruntime:cpu", "--backend", "torch")
    for backends in ((), only[:2], only[2:], only, (*only, "--backend", "cuda:sm_90")):
        refused = call("bench", bundle, "--profile", *backends)
        assert_refused(refused, 2, "'--profile'", "only the fast engine")
    assert_refused(call("bench", "--random-weights", "no.json"), 3, "no.json", "check the path")
    assert_refused(call("bench", *config, "--recipe", "int8-weight-only"), 3, "not quantized")
    assert_refused(call("bench", *config, "--context", "5000"), 3, "the context holds 4096")
    assert_refused(call("bench", *config, "--batch", "8,257"), 3, "257 rows", "takes 256 at most")
    assert_refused(call("bench", bundle, "--backend", "cuda:sm_90"), 4, "no target cuda:sm_90")


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
def test_bench_of_random_weights_needs_a_gpu(call: Call, tiny_checkpoint: Path) -> None:
    called = call("bench", "--random-weights", tiny_checkpoint / "config.json", "--recipe", "bf16")
    assert_refused(called, 4, "torch sees no CUDA device")
