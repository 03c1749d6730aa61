"""What every test shares: the tiny checkpoint, seeds, and the rule for missing hardware."""

import functools
import importlib.util
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ringexport.settings import rest_torch_threads
from tests.checkpoints import make_checkpoint

SEED = 20261121

rest_torch_threads()
# A shell that starts tests in the background lets them ignore Ctrl-C, and so every command in them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of 6 layers in two shards; shared, so copy it before changing it."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny-checkpoint"))


@pytest.fixture(scope="session")
def host_plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The TensorRT plugin library, compiled without kernels: builds engines that nothing runs."""
    from tests.plugins.native import compile_host_library

    return compile_host_library(tmp_path_factory.mktemp("host-plugins"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(SEED)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seed the global generators; torch only where a test file has imported it."""
    random.seed(SEED)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(SEED)


@functools.cache
def _missing_gpu() -> str | None:
    if not Path("/dev/nvidiactl").exists():
        return "no NVIDIA GPU: /dev/nvidiactl does not exist"
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device"


@functools.cache
def _missing_trt() -> str | None:
    names = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
    if any(importlib.util.find_spec(name) for name in names):
        return None
    return "neither tensorrt nor tensorrt_rtx is installed"


NEEDS: dict[str, Callable[[], str | None]] = {"gpu": _missing_gpu, "trt": _missing_trt}


def _required() -> set[str]:
    names = os.environ.get("RINGEXPORT_REQUIRE", "").split(",")
    return {name.strip() for name in names if name.strip()}


def pytest_configure(config: pytest.Config) -> None:
    del config
    unknown = sorted(_required() - NEEDS.keys())
    if unknown:
        msg = f"RINGEXPORT_REQUIRE names {unknown}, expected some of {sorted(NEEDS)}"
        raise pytest.UsageError(msg)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here and say why; RINGEXPORT_REQUIRE=gpu,trt makes it a failure."""
    for need, missing in NEEDS.items():
        reason = missing() if item.get_closest_marker(need) else None
        if reason is None:
            continue
        if need in _required():
            pytest.fail(f"RINGEXPORT_REQUIRE asks for {need}: {reason}", pytrace=False)
        pytest.skip(f"needs {need}: {reason}")
