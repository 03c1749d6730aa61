"""What the fast engine takes of the GPU's memory, how fast it starts, and its longest context."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from engine_setup import MINI, Table, conditions, gpu, runner_of, weights_of
from safetensors.torch import save_file

from ringexport.checkpoint import RingConfig
from ringexport.compare.gpu.memory import forget_peak, measure_memory
from ringexport.compare.gpu.opening import Gpu, load_engine
from ringexport.errors import OutputError, RingExportError
from ringexport.packing.layout import packed_tensors
from ringexport.packing.writer import WEIGHTS_FILE
from ringexport.pipeline.packed import packed_recipe
from ringexport.progress import NoProgress
from ringexport.runtime.backends.cuda.runner import CudaOptions, CudaRunner

__all__ = ["long_context", "memory", "open_once", "start"]

_MEMORY_HEADER = (
    "recipe", "rows x context", "weights", "states", "KV cache", "workspace", "planned, GB",
    "measured, GB", "difference",
)  # fmt: skip
_START_HEADER = (
    "process", "interpreter and imports", "GPU and kernels", "weights", "GB/s",
    "memory and graphs", "first prompt and step", "seconds in all",
)  # fmt: skip
_LONG_HEADER = (
    "recipe", "context", "prompt read", "first token, s", "tokens/s", "decode, us a step",
    "tokens/s", "planned, GB", "measured, GB", "difference",
)  # fmt: skip
_SHAPES = ((1, 131072), (16, 8192), (64, 4096), (256, 4096))
_YARN = 4.0
_LONG_STEPS = 1024
"""A power of two: attention of long prompts is fastest where lengths are multiples of 2,048."""


def memory(place: Gpu, recipes: Sequence[str]) -> None:
    """Read prompts and decode as much at a time as the engine takes; compare with its plan."""
    table = Table("performance.md", "gpu-memory", _MEMORY_HEADER, key=1)
    table.lead = f"{conditions(place)}."
    for recipe in recipes:
        weights = weights_of(place, recipe)
        for batch, context in _SHAPES:
            forget_peak()
            with runner_of(place, weights, batch, context) as runner:
                found = measure_memory(runner, place.used_before)
            del runner
            plan = found.plan
            parts = (plan.weights, plan.recurrent_state, plan.kv_cache, plan.workspace, plan.total)
            cells = [f"{part / 1e9:.2f}" for part in (*parts, found.measured)]
            table.add([recipe, f"{batch} x {context:,}", *cells, f"{found.difference:+.1%}"])
        del weights


def start(folder: Path) -> None:
    """Open a packed engine of full size in a new process, up to the first token.

    The file was just written, or read by the process before, and lies in the page cache.

    Args:
        folder: to write the engine into, 17 GB; it must not exist, and is gone afterwards.

    Raises:
        OutputError: the folder exists.
    """
    if folder.exists():
        raise OutputError(
            f"{folder} exists, and what this benchmark writes there is deleted at its end",
            hint="name a folder without it",
        )
    place = gpu()
    try:
        _write_engine(place, folder)
        _time_openings(place, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _time_openings(place: Gpu, folder: Path) -> None:
    table = Table("performance.md", "gpu-start", _START_HEADER)
    size = (folder / WEIGHTS_FILE).stat().st_size / 1e9
    table.lead = f"{conditions(place)}; Ring-mini in FP8, {size:.1f} GB; seconds."
    for number in (1, 2):
        begin = time.time()
        command = [sys.executable, str(Path(__file__).with_name("cuda_engine.py")), "open-once"]
        done = subprocess.run(
            [*command, str(folder)], stdout=subprocess.PIPE, text=True, check=True
        )
        whole = time.time() - begin
        parts = json.loads(done.stdout.splitlines()[-1])
        cells = [f"{parts[name]:.1f}" for name in ("opened", "loaded", "rate", "ready", "ran")]
        table.add([number, f"{parts['imported'] - begin:.1f}", *cells, f"{whole:.1f}"])


def _write_engine(place: Gpu, folder: Path) -> None:
    weights = weights_of(place, "fp8")
    formats = packed_recipe("fp8", weights.config).formats
    names = [tensor.name for tensor in packed_tensors(weights.config, formats)]
    tensors = {name: weights[name].cpu() for name in names}
    folder.mkdir(parents=True)
    begin = time.perf_counter()
    save_file(tensors, folder / WEIGHTS_FILE)
    print(f"written in {time.perf_counter() - begin:.1f} s", flush=True)
    del weights
    torch.cuda.empty_cache()


def open_once(folder: Path, imported: float) -> None:
    """Open the engine in `folder`, and print how long each part took as JSON.

    Args:
        folder: with packed weights of Ring-mini.
        imported: seconds since the epoch when the modules had been imported.
    """
    begin = time.perf_counter()
    place = gpu()
    opened = time.perf_counter()
    weights = load_engine(place, folder, MINI, NoProgress())
    loaded = time.perf_counter()
    options = CudaOptions(max_batch=256, max_context=4096, capture_ahead=True)
    with CudaRunner(weights, place.library, model_digest=str, options=options) as runner:
        torch.cuda.synchronize()
        ready = time.perf_counter()
        state = runner.new_state(1)
        runner.prefill(np.arange(100)[None], None, state)
        runner.decode([1], state)
        done = time.perf_counter()
    gigabytes = (folder / WEIGHTS_FILE).stat().st_size / 1e9
    parts = {
        "imported": imported,
        "opened": opened - begin,
        "loaded": loaded - opened,
        "rate": gigabytes / (loaded - opened),
        "ready": ready - loaded,
        "ran": done - ready,
    }
    print(json.dumps(parts))


def long_context(place: Gpu, recipe: str = "fp8") -> None:
    """Read a prompt that almost fills a context stretched by YaRN, and decode behind it."""
    config = RingConfig.from_file(MINI).with_yarn(_YARN)
    weights = weights_of(place, recipe, config)
    context = config.context_length
    length = context - 2 * _LONG_STEPS
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, length))
    forget_peak()
    with runner_of(place, weights, 1, context) as runner:
        state = runner.new_state(1)
        begin = time.perf_counter()
        logits = runner.prefill(ids, None, state)
        first = time.perf_counter() - begin
        if not np.isfinite(logits).all():
            raise RingExportError(f"logits after {length:,} tokens hold infinities or NaN")
        tokens = logits.argmax(-1)
        tokens = runner.replay(tokens, state, range(1), steps=_LONG_STEPS)  # the step is captured
        begin = time.perf_counter()
        runner.replay(tokens, state, range(1), steps=_LONG_STEPS)
        step = (time.perf_counter() - begin) / _LONG_STEPS
        del state
        found = measure_memory(runner, place.used_before)
    cells = [f"{context:,}", f"{length:,}", f"{first:.2f}", f"{length / first:,.0f}"]
    cells += [f"{step * 1e6:,.0f}", f"{1 / step:,.0f}"]
    cells += [f"{found.plan.total / 1e9:.2f}", f"{found.measured / 1e9:.2f}"]
    table = Table("performance.md", "gpu-long", _LONG_HEADER)
    table.lead = f"{conditions(place)}."
    table.add([recipe, *cells, f"{found.difference:+.1%}"])
