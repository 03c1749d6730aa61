"""Correctness and speed of the fast engine on this machine's GPU.

python benchmarks/cuda_engine.py check            ring-nano against the torch reference
python benchmarks/cuda_engine.py decode fp8 1,8   a full-size config with random weights
"""

import statistics
import sys
import tempfile
import time
import unittest.mock
from pathlib import Path

import numpy as np
import torch
from tables import markdown, replace

from ringexport.checkpoint import CheckpointWeights, RingConfig
from ringexport.errors import RingExportError
from ringexport.kernels.library import KernelLibrary
from ringexport.model import linear_attention
from ringexport.ops.quantization import NumberFormat
from ringexport.packing.layout import MatrixFormat, matrices
from ringexport.packing.writer import write_packed
from ringexport.runtime.backends.cuda.graphs import BATCH_BUCKETS
from ringexport.runtime.backends.cuda.network import Crossovers
from ringexport.runtime.backends.cuda.random_weights import random_weights
from ringexport.runtime.backends.cuda.runner import CudaOptions, CudaRunner
from ringexport.runtime.backends.cuda.state import StatePool
from ringexport.runtime.backends.cuda.weights import DeviceWeights, load_weights
from ringexport.runtime.backends.torch_ref import TorchRunner
from ringexport.settings import load_settings

ROOT = Path(__file__).parent.parent
READ_RATE = 4.59e12
"""Bytes a second that one H200 reads at most: the maximum over 4 GiB, measured."""
DECODE_HEADER = (
    "recipe", "context", "batch", "us a step", "tokens/s", "TB/s", "of the read rate",
    "experts hit a layer", "launches",
)  # fmt: skip
PREFILL_HEADER = ("recipe", "prompts", "ms", "tokens/s")
MINI = ROOT / "tests" / "checkpoint" / "data" / "ring-mini-linear-2.0.json"


def library() -> KernelLibrary:
    path = load_settings().kernel_library or ROOT / "build" / "plugins" / "libringkernels.so"
    return KernelLibrary.open(path)


def formats(config: RingConfig, recipe: str) -> dict[str, MatrixFormat]:
    """Return the formats of a recipe: design.md, decision 5."""
    if recipe == "bf16":
        return {}
    number_format = NumberFormat.INT8 if recipe.startswith("int8") else NumberFormat.FP8_E4M3
    fmt = MatrixFormat(number_format, block=recipe.endswith("block"))
    chosen = {}
    for matrix in matrices(config):
        parts = matrix.name.split(".")
        softmax = parts[0] == "layers" and not config.is_linear_layer(int(parts[1]))
        plain = matrix.name == "lm_head" or (softmax and parts[2] == "attention")
        if not plain or recipe.endswith("all"):
            chosen[matrix.name] = fmt
    return chosen


def check(checkpoint: Path) -> None:
    """Compare prefill and decode logits of a small checkpoint with the torch reference."""
    torch.backends.cuda.matmul.allow_tf32 = False
    rng = np.random.default_rng(0)
    device = torch.device("cuda")
    with tempfile.TemporaryDirectory() as folder:
        with CheckpointWeights.open(checkpoint) as weights:
            config = weights.config
            write_packed(weights, Path(folder))
        packed = load_weights(Path(folder) / "weights.safetensors", config, device)
    runner = CudaRunner(packed, library(), model_digest=str, options=CudaOptions(max_batch=16))
    truth = TorchRunner(checkpoint, model_digest=str, device="cuda")
    # Not FLA's kernels: compiling them takes longer than everything else here.
    with unittest.mock.patch.object(linear_attention, "fla", linear_attention.plain):
        same = TorchRunner(checkpoint, model_digest=str, device="cuda", dtype="bfloat16")
    for batch, length in ((1, 1), (1, 7), (3, 500), (12, 65), (1, 2500)):
        tokens = rng.integers(0, config.vocab_size, (batch, length))
        lengths = rng.integers(1, length + 1, batch)
        states = [one.new_state(batch) for one in (runner, truth, same)]
        firsts = [
            one.prefill(tokens, lengths, state)
            for one, state in zip((runner, truth, same), states, strict=True)
        ]
        report(f"prefill {batch} x {length}", *firsts)
        for step in range(3):
            following = rng.integers(0, config.vocab_size, batch)
            found = [
                one.decode(following, state)
                for one, state in zip((runner, truth, same), states, strict=True)
            ]
            report(f"  decode {step}", *found)


def report(what: str, got: np.ndarray, truth: np.ndarray, same: np.ndarray) -> None:
    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a.astype(np.float64), b.astype(np.float64)
        return float(
            (a * b).sum(-1).min() / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)).min()
        )

    agree = (got.argmax(-1) == truth.argmax(-1)).mean()
    print(
        f"{what:20} error {np.abs(got - truth).max():.4f}"
        f" (torch bf16 {np.abs(same - truth).max():.4f})"
        f" cosine {cosine(got, truth):.6f} ({cosine(same, truth):.6f}) top-1 {agree:.2f}",
        flush=True,
    )


def profile(recipe: str, batches: list[int], context: int = 4096) -> None:
    """Print where the time of one decode step goes, kernel by kernel."""
    config = RingConfig.from_file(MINI)
    weights = random_weights(config, formats(config, recipe), torch.device("cuda"))
    for batch in batches:
        for chained in (False, True):
            options = CudaOptions(
                max_batch=batch,
                max_context=context + 512,
                fp8_cache=recipe.endswith("all"),
                chained=chained,
            )
            runner = CudaRunner(weights, library(), model_digest=str, options=options)
            state = runner.new_state(batch)
            state.position[:] = context
            tokens = np.arange(batch) * 37
            runner.replay(tokens, state, range(batch), steps=4)
            activities = [torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) as found:
                runner.replay(tokens, state, range(batch), steps=8)
            events = [e for e in found.events() if "Mem" not in e.name]
            span = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
            print(f"{recipe} b{batch} chained={chained}: {span / 8:.0f} us a step")
            totals: dict[str, list[float]] = {}
            for event in events:
                name = event.name.replace("ringkernels::", "").replace("void ", "")[:90]
                totals.setdefault(name, []).append(event.device_time)
            for name, times in sorted(totals.items(), key=lambda item: -sum(item[1]))[:16]:
                print(
                    f"  {sum(times) / 8:8.1f} us {len(times) // 8:4} x {np.mean(times):7.2f} {name}"
                )
            runner.close()
            del runner, state


def prefill(recipe: str) -> list[list[object]]:
    """Time prompts of random tokens, the logits of their last token on the host included."""
    rows: list[list[object]] = []
    config = RingConfig.from_file(MINI)
    weights = random_weights(config, formats(config, recipe), torch.device("cuda"))
    rng = np.random.default_rng(0)
    for batch, length in ((1, 4096), (8, 4096), (1, 32768), (1, 131072)):
        options = CudaOptions(max_batch=batch, max_context=length + 64)
        runner = CudaRunner(weights, library(), model_digest=str, options=options)
        tokens = rng.integers(0, config.vocab_size, (batch, length))
        times = []
        for _ in range(4):
            state = runner.new_state(batch)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            runner.prefill(tokens, None, state)
            times.append(time.perf_counter() - begin)
            del state
        seconds = statistics.median(times[1:])
        rate = batch * length / seconds
        rows.append([recipe, f"{batch} x {length:,}", f"{seconds * 1e3:.1f}", f"{rate:,.0f}"])
        print(*rows[-1], sep="  ", flush=True)
        runner.close()
        del runner
    return rows


def sweep(recipe: str, batches: list[int], context: int = 4096) -> None:
    """Time decode steps with different crossovers between the ways to compute."""
    config = RingConfig.from_file(MINI)
    weights = random_weights(config, formats(config, recipe), torch.device("cuda"))
    for batch in batches:
        for fused in (0, batch):
            for eight, plain in ((0, 0), (batch, 0), (batch, batch)):
                chosen = Crossovers(fused=fused, skinny_8bit=eight, skinny_bf16=plain)
                if fused and not plain:
                    continue
                if batch > 64 and (fused or eight):
                    continue
                try:
                    seconds = time_decode(weights, recipe, batch, context, chosen)[0]
                except RingExportError as error:
                    print(f"b{batch} {chosen}: {error}", flush=True)
                    continue
                print(f"{recipe} b{batch} {chosen}: {seconds * 1e6:.0f} us", flush=True)


def time_decode(
    weights: DeviceWeights,
    recipe: str,
    batch: int,
    context: int,
    crossovers: Crossovers | None = None,
) -> tuple[float, float, int]:
    """Return seconds a step, distinct experts hit a layer, and launches a step."""
    rng = np.random.default_rng(0)
    options = CudaOptions(
        max_batch=batch,
        max_context=context + 512,
        fp8_cache=recipe.endswith("all"),
        crossovers=crossovers or Crossovers(),
    )
    runner = CudaRunner(weights, library(), model_digest=str, options=options)
    for cache in (*runner.pool.keys.values(), *runner.pool.values.values()):
        cache.copy_(torch.randn(cache.shape[1:], device=cache.device).to(cache.dtype))
    for state in runner.pool.recurrent_state.values():
        state.normal_()
    state = runner.new_state(batch)
    state.position[:] = context
    tokens = rng.integers(0, weights.config.vocab_size, batch)
    runner.replay(tokens, state, range(batch), steps=8)
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        runner.replay(tokens, state, range(batch), steps=32)
        times.append((time.perf_counter() - begin) / 32)
    hit = statistics.mean(len(torch.unique(ids)) for ids in runner.network.expert_ids.values())
    launches = runner.graphs.step(batch, context + 32).launches
    runner.close()
    return statistics.median(times), hit, launches


def moved_bytes(weights: DeviceWeights, batch: int, context: int, hit: float) -> float:
    """Return the bytes that a decode step has to move: weights once, caches read, states both ways.

    Args:
        weights: of the engine.
        batch: rows.
        context: tokens that each row holds.
        hit: distinct experts chosen in a layer, on average.
    """
    config, total = weights.config, 0.0
    for matrix in matrices(config):
        nbytes = weights.matrix(matrix.name).nbytes
        total += nbytes * hit / matrix.experts if matrix.experts > 1 else nbytes
    total += sum(weights[f"layers.{layer}.router"].nbytes for layer in config.moe_layers)
    cache_dtype = torch.float8_e4m3fn if weights.fp8_cache else torch.bfloat16
    state, cache = StatePool.bytes_per_slot(config, context, cache_dtype)
    return total + batch * (2 * state + cache)


def decode(recipe: str, batches: list[int], context: int) -> list[list[object]]:
    """Time decode steps at `context` tokens with random weights; return the rows of the table."""
    config = RingConfig.from_file(MINI)
    weights = random_weights(config, formats(config, recipe), torch.device("cuda"))
    weights.fp8_cache = recipe.endswith("all")
    rows: list[list[object]] = []
    for batch in batches:
        seconds, hit, launches = time_decode(weights, recipe, batch, context)
        rate = moved_bytes(weights, batch, context, hit) / seconds
        expected = config.num_experts * (
            1 - (1 - config.num_experts_per_tok / config.num_experts) ** batch
        )
        if hit < 0.9 * expected:
            sys.exit(
                f"no speed is reported: {hit:.1f} experts are hit a layer, expected {expected:.1f}"
            )
        rows.append(
            [
                recipe,
                f"{context:,}",
                batch,
                f"{seconds * 1e6:,.0f}",
                f"{batch / seconds:,.0f}",
                f"{rate / 1e12:.2f}",
                f"{rate / READ_RATE:.0%}",
                f"{hit:.1f}",
                launches,
            ]
        )
        print(*rows[-1], sep="  ", flush=True)
    return rows


def docs() -> None:
    """Measure everything and write it to docs/performance.md."""
    check(ROOT / "models" / "ring-nano")
    rows = decode("fp8", list(BATCH_BUCKETS), 4096)
    rows += decode("fp8-all", [1], 4096) + decode("int8", [1, 8, 64], 4096)
    rows += decode("bf16", [1, 8], 4096) + decode("fp8", [1], 131072)
    replace("performance.md", "gpu-decode", markdown(DECODE_HEADER, rows))
    replace("performance.md", "gpu-prefill", markdown(PREFILL_HEADER, prefill("fp8")))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["check", *rest]:
            check(Path(rest[0]) if rest else ROOT / "models" / "ring-nano")
        case ["profile", recipe, batches]:
            profile(recipe, [int(one) for one in batches.split(",")])
        case ["sweep", recipe, batches]:
            sweep(recipe, [int(one) for one in batches.split(",")])
        case ["prefill", recipe]:
            prefill(recipe)
        case ["decode", recipe, batches, *rest]:
            decode(recipe, [int(one) for one in batches.split(",")], int(rest[0]) if rest else 4096)
        case ["docs"]:
            docs()
        case _:
            sys.exit(__doc__)
