"""A GPU that is not there: what the grid calls, with results that are known beforehand."""

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ringexport.compare.gpu import grid
from ringexport.compare.gpu.agreement import Agreement, LogitsError
from ringexport.compare.gpu.decode import DecodeSpeed
from ringexport.compare.gpu.memory import EngineMemory
from ringexport.compare.gpu.opening import Gpu
from ringexport.compare.gpu.prefill import PrefillSpeed
from ringexport.compare.gpu.profile import KernelTime, StepProfile
from ringexport.errors import RingExportError
from ringexport.runtime.backends.cuda.state import MemoryPlan

MAX_ROWS = 8
READ_RATE = 4e12
GB = 10**9


def fake_gpu() -> Gpu:
    library: Any = object()
    return Gpu(
        device=torch.device("cpu"),
        library=library,
        conditions={"gpu": "no real one"},
        used_before=GB,
    )


def open_runner(
    weights: Any, library: Any, *, model_digest: Any, options: Any
) -> AbstractContextManager[Any]:
    """Return a runner with room for 8 rows, of which only the plan is known."""
    del weights, library, model_digest
    if options.max_batch > MAX_ROWS:
        raise RingExportError(f"{options.max_batch} sequences need too much memory")
    plan = MemoryPlan(
        weights=GB, recurrent_state=GB, kv_cache=GB, workspace=GB, slots=1, capacity=1
    )
    return nullcontext(SimpleNamespace(plan=plan))


def agreement(*, error: float = 0.01, noise: float = 0.008) -> Agreement:
    def of(size: float) -> LogitsError:
        return LogitsError(
            max_error=size,
            mean_error=size,
            relative=size,
            median_relative=size,
            min_cosine=1 - size,
            mean_cosine=1 - size,
            top1=1.0,
        )

    return Agreement(what="decode", positions=5, engine=of(error), rounding=of(noise))


def decode_speed(batch: int, context: int, *, hit: float | None = None) -> DecodeSpeed:
    return DecodeSpeed(
        batch=batch,
        context=context,
        step_us=500.0 * batch,
        spread=0.01,
        bytes_moved=1e9,
        limit_us=250.0,
        experts_hit=8.0 * batch if hit is None else hit,
        experts_expected=8.0 * batch,
    )


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace what needs a GPU in the grid."""

    def decode(runner: Any, *_: Any, batch: int, context: int, **__: Any) -> DecodeSpeed:
        assert runner.plan.total == 4 * GB
        return decode_speed(batch, context)

    def profile(*_: Any, **__: Any) -> StepProfile:
        kernels = [KernelTime(name=f"kernel {i}", launches=2, us=20.0 - i) for i in range(18)]
        return StepProfile(kernels=tuple(kernels), kinds={"linear": 130.0, "head": 77.0})

    def prefill(*_: Any, batch: int, tokens: int, **__: Any) -> PrefillSpeed:
        return PrefillSpeed(batch=batch, tokens=tokens, ms=10.0, spread=0.0)

    def memory(runner: Any, before: int) -> EngineMemory:
        assert before == GB
        return EngineMemory(plan=runner.plan, measured=4 * GB + GB // 10)

    monkeypatch.setattr(grid, "CudaRunner", open_runner)
    monkeypatch.setattr(grid, "check_engine", lambda *_: [agreement()])
    monkeypatch.setattr(grid, "measure_decode", decode)
    monkeypatch.setattr(grid, "profile_decode", profile)
    monkeypatch.setattr(grid, "measure_prefill", prefill)
    monkeypatch.setattr(grid, "measure_read_rate", lambda _: READ_RATE)
    monkeypatch.setattr(grid, "measure_memory", memory)
    monkeypatch.setattr(grid, "forget_peak", lambda: None)
