"""The fast engine at Ring-mini's size with random weights: single points of speed."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ringexport.checkpoint import RingConfig
from ringexport.kernels.library import KernelLibrary
from ringexport.ops.quantization import NumberFormat
from ringexport.packing.layout import MatrixFormat, matrices
from ringexport.runtime.backends.cuda.random_weights import random_weights
from ringexport.runtime.backends.cuda.runner import CudaOptions, CudaRunner
from ringexport.runtime.backends.cuda.weights import DeviceWeights
from ringexport.settings import load_settings

__all__ = ["engine_weights", "median_seconds", "open_engine", "time_decode", "time_prefill"]

ROOT = Path(__file__).parent.parent
MINI = ROOT / "tests" / "checkpoint" / "data" / "ring-mini-linear-2.0.json"
STEPS = 32


def engine_weights(recipe: str) -> DeviceWeights:
    """Return random weights in the formats of the recipe bf16 or fp8."""
    config = RingConfig.from_file(MINI)
    formats: dict[str, MatrixFormat] = {}
    for matrix in matrices(config):
        _, _, rest = matrix.name.partition("layers.")
        layer, _, part = rest.partition(".")
        softmax = part.startswith("attention") and not config.is_linear_layer(int(layer))
        if recipe == "fp8" and matrix.name != "lm_head" and not softmax:
            formats[matrix.name] = MatrixFormat(NumberFormat.FP8_E4M3)
    return random_weights(config, formats, torch.device("cuda"))


def open_engine(weights: DeviceWeights, rows: int, context: int) -> CudaRunner:
    """Return a runner with room for rows of so many tokens."""
    path = load_settings().kernel_library or ROOT / "build" / "plugins" / "libringkernels.so"
    options = CudaOptions(max_batch=rows, max_context=context)
    return CudaRunner(weights, KernelLibrary.open(path), model_digest=str, options=options)


def time_decode(weights: DeviceWeights, batch: int, context: int) -> float:
    """Return seconds a step, each with the token chosen before it; states and caches are random."""
    runner = open_engine(weights, batch, context + 2 * STEPS)
    state, pool = runner.new_state(batch), runner.pool
    tokens = np.random.default_rng(0).integers(0, weights.config.vocab_size, batch)
    for _ in range(2):  # a slot may be emptied when it is first used: filled in between
        state.position[:] = context
        runner.replay(tokens, state, range(batch), steps=STEPS)
        for tensor in (*pool.recurrent_state.values(), *pool.keys.values(), *pool.values.values()):
            tensor.normal_()
    step = runner.graphs.step(batch, context + STEPS)
    times = []
    for _ in range(6):
        step.position.fill_(context)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(STEPS):
            step.graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / STEPS)
    runner.close()
    return statistics.median(times[1:])


def time_prefill(weights: DeviceWeights, batch: int, length: int) -> float:
    """Return seconds from ids on the host to the last logits there."""
    tokens = np.random.default_rng(0).integers(0, weights.config.vocab_size, (batch, length))
    runner = open_engine(weights, batch, length + 64)
    seconds = median_seconds(lambda: runner.prefill(tokens, None, runner.new_state(batch)))
    runner.close()
    return seconds


def median_seconds(run: Callable[[], Any], repeats: int = 4) -> float:
    """Return the median time of a call after one that is not counted."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])
