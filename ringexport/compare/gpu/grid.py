"""A grid of decode and prefill speeds of one engine, reported only if its results are right."""

import gc
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ringexport.compare.gpu.agreement import Agreement, References, check_decode, check_prefill
from ringexport.compare.gpu.decode import DecodeSpeed, measure_decode
from ringexport.compare.gpu.memory import EngineMemory, forget_peak, measure_memory
from ringexport.compare.gpu.opening import Gpu
from ringexport.compare.gpu.prefill import PrefillSpeed, measure_prefill
from ringexport.compare.gpu.profile import StepProfile, profile_decode
from ringexport.compare.gpu.traffic import measure_read_rate
from ringexport.compare.speed import BenchConfig
from ringexport.errors import ConfigError, RingExportError, ToleranceExceededError
from ringexport.kernels.library import KernelLibrary
from ringexport.progress import NoProgress, Progress
from ringexport.runtime.backends.cuda.graphs import BATCH_BUCKETS
from ringexport.runtime.backends.cuda.runner import CudaOptions, CudaRunner
from ringexport.runtime.backends.cuda.weights import DeviceWeights

__all__ = [
    "GridPoint",
    "GridResult",
    "check_engine",
    "check_grid",
    "compare_engine",
    "measure_grid",
    "measure_point",
]

_CHECKED_PROMPT = 1000
"""Enough that many tokens share an expert: other kernels than those of a few rows run."""
_DECODED = 32
"""Room for the tokens of the checks of decoding, whatever the prompt's length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GridPoint:
    """Decoding of some rows at some context: how fast, where the time goes, what it takes."""

    speed: DecodeSpeed
    profile: StepProfile
    memory: EngineMemory

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        memory, profile = self.memory.to_dict(), self.profile.to_dict()
        return self.speed.to_dict() | {"profile": profile, "memory": memory}


@dataclass(slots=True, kw_only=True)
class GridResult:
    """What was measured.

    Attributes:
        read_rate: bytes a second that this GPU read in the same run.
        agreements: with the reference; all were within their bound.
        decode: a point for each context and batch.
        prefill: a point for each prompt length and batch.
        skipped: point to the reason why it was not measured.
    """

    read_rate: float
    agreements: list[Agreement] = field(default_factory=list)
    decode: list[GridPoint] = field(default_factory=list)
    prefill: list[PrefillSpeed] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "read_rate_bytes_per_s": self.read_rate,
            "agreement": [one.to_dict() for one in self.agreements],
            "decode": [point.to_dict() for point in self.decode],
            "prefill": [one.to_dict() for one in self.prefill],
            "skipped": self.skipped,
        }


@contextmanager
def _skipping(result: GridResult, what: str) -> Iterator[None]:
    """Note why a point does not fit; wrong results still end everything."""
    try:
        yield
    except ToleranceExceededError:
        raise
    except RingExportError as error:
        result.skipped[what] = error.message
    torch.cuda.empty_cache()


def check_engine(
    weights: DeviceWeights, library: KernelLibrary, batches: tuple[int, ...]
) -> list[Agreement]:
    """Return what `compare_engine` found.

    Args:
        weights, library, batches: as there.

    Raises:
        ToleranceExceededError: the logits differ by more than bf16 explains.
    """
    found = compare_engine(weights, library, batches)
    for agreement in found:
        agreement.check()
    return found


def compare_engine(
    weights: DeviceWeights, library: KernelLibrary, batches: tuple[int, ...]
) -> list[Agreement]:
    """Compare the engine with the reference: a prompt, and decoding at each batch.

    Args:
        weights: of the engine.
        library: the kernel library.
        batches: rows that are decoded together.
    """
    references = References(weights)
    prompt = min(_CHECKED_PROMPT, weights.config.context_length)
    options = CudaOptions(max_batch=max(batches), max_context=prompt + _DECODED)
    with CudaRunner(weights, library, model_digest=str, options=options) as runner:
        found = [check_prefill(runner, references, tokens=prompt)]
        found += [check_decode(runner, references, batch=batch) for batch in batches]
    del references, runner
    gc.collect()  # the reference's head is large, and in a cycle with its layers
    torch.cuda.empty_cache()
    return found


def check_grid(config: BenchConfig, context_length: int) -> None:
    """Refuse numbers that the fast engine cannot be measured with.

    Args:
        config: the grid.
        context_length: tokens that a row of the model holds.

    Raises:
        ConfigError: as `BenchConfig.check`, or more rows than one captured step decodes.
    """
    config.check(context_length)
    rows, most = max(config.batch), BATCH_BUCKETS[-1]
    if rows > most:
        raise ConfigError(
            f"bench would decode {rows:,} rows in one step, the fast engine takes {most} at most",
            hint="give a smaller --batch",
        )


def measure_grid(
    gpu: Gpu,
    weights: DeviceWeights,
    config: BenchConfig,
    *,
    progress: Progress | None = None,
) -> GridResult:
    """Check the engine, then measure every point of the grid; points that do not fit are skipped.

    Args:
        gpu: that the engine runs on.
        weights: of the engine.
        config: batches, contexts and prompt lengths; `decode` steps a run.
        progress: told of the points.

    Raises:
        ConfigError: as `check_grid`.
        ToleranceExceededError: wrong results, or a router that has collapsed.
    """
    check_grid(config, weights.config.context_length)
    report = progress or NoProgress()

    result = GridResult(read_rate=measure_read_rate(gpu.device))
    report.start("checking the results")
    result.agreements = check_engine(weights, gpu.library, config.batch)
    report.finish()
    points = [*itertools.product(config.context, config.batch)]
    prompts = [*itertools.product(config.prefill, config.batch)]
    report.start("measuring", len(points) + len(prompts), "points")
    for context, batch in points:
        with _skipping(result, f"decode, batch {batch}, context {context:,}"):
            point = measure_point(gpu, weights, config, result.read_rate, (batch, context))
            result.decode.append(point)
        report.advance()
    for tokens, batch in prompts:
        with _skipping(result, f"prompts, {batch} x {tokens:,}"):
            result.prefill.append(_prefill_point(gpu, weights, config, (batch, tokens)))
        report.advance()
    report.finish()
    return result


def measure_point(
    gpu: Gpu,
    weights: DeviceWeights,
    config: BenchConfig,
    read_rate: float,
    shape: tuple[int, int],
) -> GridPoint:
    """Measure one point of decoding; what it took of the GPU is free afterwards.

    Args:
        gpu: that the engine runs on.
        weights: of the engine, which `check_engine` has found right.
        config: `decode` steps a run, `repeat` runs.
        read_rate: bytes a second of the GPU.
        shape: rows, and tokens of each.

    Raises:
        ToleranceExceededError: a router that has collapsed.
        RingExportError: the memory of the GPU does not suffice.
    """
    batch, context = shape
    forget_peak()
    options = CudaOptions(max_batch=batch, max_context=context + config.decode)
    with CudaRunner(weights, gpu.library, model_digest=str, options=options) as runner:
        speed = measure_decode(
            runner,
            weights,
            batch=batch,
            context=context,
            read_rate=read_rate,
            steps=config.decode,
            repeat=config.repeat,
        )
        memory = measure_memory(runner, gpu.used_before)
        del runner
    torch.cuda.empty_cache()
    profile = profile_decode(weights, gpu.library, batch=batch, context=context)
    return GridPoint(speed=speed, profile=profile, memory=memory)


def _prefill_point(
    gpu: Gpu, weights: DeviceWeights, config: BenchConfig, shape: tuple[int, int]
) -> PrefillSpeed:
    """Measure `shape` = (prompts, tokens of each)."""
    batch, tokens = shape
    options = CudaOptions(max_batch=batch, max_context=tokens)
    with CudaRunner(weights, gpu.library, model_digest=str, options=options) as runner:
        return measure_prefill(runner, batch=batch, tokens=tokens, repeat=config.repeat)
