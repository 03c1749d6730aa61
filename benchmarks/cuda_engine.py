"""Correctness, speed, memory and start-up of the fast engine on this machine's GPU.

python benchmarks/cuda_engine.py agree            full-size logits against the reference
python benchmarks/cuda_engine.py drift            states and speed over 4,096 steps
python benchmarks/cuda_engine.py text             ring-nano's text against the CPU's
python benchmarks/cuda_engine.py memory           planned and measured bytes
python benchmarks/cuda_engine.py start FOLDER     seconds until the first token; writes 17 GB
python benchmarks/cuda_engine.py flash            Ring-flash in FP8
python benchmarks/cuda_engine.py sweep fp8 1,8    crossovers between the ways to compute
python benchmarks/cuda_engine.py docs             tables of docs/performance.md and numerics.md

Single points are measured by `ringexport bench --random-weights CONFIG.json`.
"""

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tables import markdown, replace

from ringexport.checkpoint import CheckpointWeights, RingConfig
from ringexport.compare.gpu.agreement import Agreement
from ringexport.compare.gpu.decode import measure_decode
from ringexport.compare.gpu.drift import DRIFT_STEPS, measure_drift, time_steps
from ringexport.compare.gpu.grid import (
    GridResult,
    check_engine,
    measure_grid,
    measure_point,
)
from ringexport.compare.gpu.memory import EngineMemory, used_bytes
from ringexport.compare.gpu.opening import Gpu, find_gpu, load_engine, random_engine
from ringexport.compare.gpu.prefill import measure_prefill
from ringexport.compare.gpu.traffic import measure_read_rate
from ringexport.compare.speed import BenchConfig, greedy, prompt_tokens
from ringexport.errors import RingExportError
from ringexport.packing.layout import packed_tensors
from ringexport.packing.writer import WEIGHTS_FILE, write_packed
from ringexport.pipeline.packed import packed_recipe
from ringexport.progress import NoProgress
from ringexport.runtime.backends.cuda.network import Crossovers
from ringexport.runtime.backends.cuda.runner import CudaOptions, CudaRunner
from ringexport.runtime.backends.cuda.weights import DeviceWeights
from ringexport.runtime.backends.torch_ref import TorchRunner
from ringexport.settings import load_settings

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "tests" / "checkpoint" / "data"
MINI = CONFIGS / "ring-mini-linear-2.0.json"
FLASH = CONFIGS / "ring-flash-linear-2.0.json"
NANO = ROOT / "models" / "ring-nano"
DECODE_HEADER = (
    "recipe", "context", "batch", "us a step", "tokens/s", "GB a step", "limit, tokens/s",
    "of the limit", "experts hit a layer", "kernels",
)  # fmt: skip
KINDS = ("linear", "softmax", "dense", "experts", "several layers", "head", "embedding")
KINDS_HEADER = ("recipe", "context", "batch", *KINDS, "sum, us")
PREFILL_HEADER = ("recipe", "prompts", "ms", "tokens/s")
AGREE_HEADER = (
    "recipe", "compared", "positions", "largest error", "mean error", "of their size",
    "bf16 alone", "cosine", "same top token", "bf16 alone", "same experts", "bf16 alone",
)  # fmt: skip
DRIFT_HEADER = ("weights", "steps", "engine", "bf16 alone", "engine, median", "bf16, median")
MEMORY_HEADER = (
    "recipe", "rows x context", "weights", "states", "KV cache", "workspace", "planned", "measured",
    "difference",
)  # fmt: skip


def gpu() -> Gpu:
    library = load_settings().kernel_library or ROOT / "build" / "plugins" / "libringkernels.so"
    return find_gpu(library)


def weights_of(place: Gpu, recipe: str, path: Path = MINI) -> DeviceWeights:
    config = RingConfig.from_file(path)
    chosen = packed_recipe(recipe, config)
    return random_engine(place, config, chosen.formats, fp8_cache=chosen.fp8_cache)


def nano_weights(place: Gpu, folder: Path) -> DeviceWeights:
    with CheckpointWeights.open(NANO) as checkpoint:
        write_packed(checkpoint, folder)
    return load_engine(place, folder, NANO / "config.json", NoProgress())


def runner_of(place: Gpu, weights: DeviceWeights, rows: int, context: int) -> CudaRunner:
    options = CudaOptions(max_batch=rows, max_context=context)
    return CudaRunner(weights, place.library, model_digest=str, options=options)


def show(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    print(markdown(header, rows), flush=True)


def agree(place: Gpu, recipes: Sequence[str], batches: tuple[int, ...]) -> list[list[object]]:
    """Compare logits at full size with the reference over the same weights."""
    rows: list[list[object]] = []
    for recipe in recipes:
        weights = weights_of(place, recipe)
        found = check_engine(weights, place.library, batches)
        rows += [agreement_row(recipe, one) for one in found]
        del weights
    show(AGREE_HEADER, rows)
    return rows


def agreement_row(recipe: str, found: Agreement) -> list[object]:
    engine, rounding = found.engine, found.rounding
    return [
        recipe,
        found.what,
        found.positions,
        f"{engine.max_error:.3f}",
        f"{engine.mean_error:.4f}",
        f"{engine.median_relative:.2%}",
        f"{rounding.median_relative:.2%}",
        f"{engine.mean_cosine:.6f}",
        f"{engine.top1:.1%}",
        f"{rounding.top1:.1%}",
        f"{found.experts:.2%}",
        f"{found.experts_rounding:.2%}",
    ]


def drift(place: Gpu, folder: Path) -> list[list[object]]:
    """Compare states after up to 4,096 steps, and time the steps."""
    rows: list[list[object]] = []
    measured = []
    for name in ("full size, fp8", "ring-nano, bf16"):
        weights = nano_weights(place, folder) if "nano" in name else weights_of(place, "fp8")
        steps = min(DRIFT_STEPS[-1], weights.config.context_length)
        with runner_of(place, weights, 1, steps) as runner:
            times = time_steps(runner, steps)
            middle = statistics.median(times)
            print(
                f"{name}: {middle * 1e6:.1f} us a token, windows of 128 from 1 to {steps:,} tokens:"
                f" {min(times) / middle - 1:+.1%} to {max(times) / middle - 1:+.1%}, the last"
                f" {times[-1] / times[0] - 1:+.1%} of the first",
                flush=True,
            )
            found = measure_drift(runner, weights, [one for one in DRIFT_STEPS if one <= steps])
        measured += found
        for one in found:
            errors = (one.engine, one.rounding, one.engine_median, one.rounding_median)
            rows.append([name, f"{one.steps:,}", *(f"{error:.2e}" for error in errors)])
        show(DRIFT_HEADER, rows)
        del weights, runner
    for one in measured:
        one.check()
    return rows


def text(place: Gpu, folder: Path, tokens: int = 64) -> None:
    """Compare ring-nano's greedy text with that of the fp32 reference on the CPU."""
    weights = nano_weights(place, folder)
    truth = TorchRunner(NANO, model_digest=str)
    with runner_of(place, weights, 1, 1024) as runner:
        for length in (8, 64, 300):
            prompt = prompt_tokens(length, weights.config.vocab_size)
            found, _ = greedy(runner, prompt, tokens)
            expected, logits = greedy(truth, prompt, tokens)
            same = next((i for i in range(tokens) if found[i] != expected[i]), tokens)
            line = f"prompt of {length}: {same} of {tokens} greedy tokens are equal"
            if same < tokens:
                gap = logits[same][expected[same]] - logits[same][found[same]]
                line += f", then a gap of {gap / logits[same].std():.4f} standard deviations"
            print(line, flush=True)


def memory(place: Gpu, recipes: Sequence[str] = ("fp8",)) -> list[list[object]]:
    """Read prompts and decode as much at a time as the engine takes; compare with its plan."""
    rows: list[list[object]] = []
    for recipe, (batch, context) in itertools.product(
        recipes, ((1, 131072), (16, 8192), (64, 4096))
    ):
        weights = weights_of(place, recipe)
        torch.cuda.empty_cache()
        with runner_of(place, weights, batch, context) as runner:
            ids = np.zeros((batch, min(context, 8192) - 8), dtype=np.int64)
            ids[:] = prompt_tokens(ids.shape[1], weights.config.vocab_size)
            state = runner.new_state(batch)
            runner.prefill(ids, None, state)
            runner.decode(np.zeros(batch, dtype=np.int64), state)
            taken = used_bytes(place.device) - place.used_before
            found = EngineMemory(plan=runner.plan, measured=taken)
            peak = torch.cuda.max_memory_allocated() / 1e9
            held = torch.cuda.memory_reserved() / 1e9
        plan = found.plan
        parts = (plan.weights, plan.recurrent_state, plan.kv_cache, plan.workspace, plan.total)
        cells = [f"{part / 1e9:.2f}" for part in (*parts, found.measured)]
        rows.append([recipe, f"{batch} x {context:,}", *cells, f"{found.difference:+.1%}"])
        print(f"{rows[-1]} peak {peak:.2f} GB allocated, {held:.2f} reserved", flush=True)
        del weights, runner, state
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    show(MEMORY_HEADER, rows)
    return rows


def start(folder: Path) -> None:
    """Open a packed engine whose file is in the page cache, up to the first token."""
    begin = time.perf_counter()
    place = gpu()
    opened = time.perf_counter()
    path = folder / WEIGHTS_FILE
    if not path.exists():
        weights = weights_of(place, "fp8")
        formats = packed_recipe("fp8", weights.config).formats
        names = [tensor.name for tensor in packed_tensors(weights.config, formats)]
        tensors = {name: weights[name].cpu() for name in names}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
        print(f"written: {path.stat().st_size / 1e9:.1f} GB; run it again", flush=True)
        return
    weights = load_engine(place, folder, MINI, NoProgress())
    loaded = time.perf_counter()
    with runner_of(place, weights, 8, 8192) as runner:
        state = runner.new_state(1)
        runner.prefill(np.arange(100)[None], None, state)
        runner.decode([1], state)
        done = time.perf_counter()
    print(
        f"GPU and kernels {opened - begin:.1f} s, weights {loaded - opened:.1f} s"
        f" ({path.stat().st_size / 1e9 / (loaded - opened):.1f} GB/s), memory, first prompt and"
        f" first step {done - loaded:.1f} s, in all {done - begin:.1f} s after the imports",
        flush=True,
    )


def flash(place: Gpu) -> GridResult:
    """Decode and read prompts with Ring-flash in FP8 on one GPU."""
    weights = weights_of(place, "fp8", FLASH)
    config = BenchConfig(batch=(1,), context=(4096, 131008), prefill=(4096,), decode=32, repeat=5)
    result = measure_grid(place, weights, config)
    show(AGREE_HEADER, [agreement_row("flash fp8", one) for one in result.agreements])
    show(DECODE_HEADER, decode_rows("flash fp8", result))
    show(KINDS_HEADER, kind_rows("flash fp8", result))
    show(PREFILL_HEADER, prefill_rows("flash fp8", result))
    return result


def decode_rows(name: str, result: GridResult) -> list[list[object]]:
    return [
        [
            name,
            f"{one.context:,}",
            one.batch,
            f"{one.step_us:,.0f}",
            f"{one.tokens_per_s:,.0f}",
            f"{one.bytes_moved / 1e9:.2f}",
            f"{one.limit_tokens_per_s:,.0f}",
            f"{one.fraction:.0%}",
            f"{one.experts_hit:.1f}",
            point.profile.launches,
        ]
        for point in result.decode
        for one in (point.speed,)
    ]


def kind_rows(name: str, result: GridResult) -> list[list[object]]:
    rows: list[list[object]] = []
    for point in result.decode:
        times = [point.profile.kinds.get(kind, 0.0) for kind in KINDS]
        cells = [f"{us:,.0f}" for us in (*times, sum(times))]
        rows.append([name, f"{point.speed.context:,}", point.speed.batch, *cells])
    return rows


def prefill_rows(name: str, result: GridResult) -> list[list[object]]:
    return [
        [name, f"{one.batch} x {one.tokens:,}", f"{one.ms:,.1f}", f"{one.tokens_per_s:,.0f}"]
        for one in result.prefill
    ]


def prompts(place: Gpu, weights: DeviceWeights, recipe: str) -> list[list[object]]:
    """Time prompts that the bars are about."""
    found = GridResult(read_rate=1.0)
    for batch, length in ((1, 4096), (8, 4096), (1, 32768), (1, 131072)):
        with runner_of(place, weights, batch, length) as runner:
            found.prefill.append(measure_prefill(runner, batch=batch, tokens=length))
    return prefill_rows(recipe, found)


def sweep(place: Gpu, recipe: str, batches: list[int], context: int = 4096) -> None:
    """Time decode steps with different crossovers between the ways to compute."""
    weights = weights_of(place, recipe)
    rate = measure_read_rate(place.device)
    for batch, fused, (eight, plain) in itertools.product(
        batches, (False, True), ((0, 0), (1, 0), (1, 1))
    ):
        if (fused and not plain) or (batch > 64 and (fused or eight)):
            continue
        chosen = Crossovers(
            fused=fused * batch, skinny_8bit=eight * batch, skinny_bf16=plain * batch
        )
        options = CudaOptions(max_batch=batch, max_context=context + 64, crossovers=chosen)
        try:
            with CudaRunner(weights, place.library, model_digest=str, options=options) as runner:
                found = measure_decode(
                    runner, weights, batch=batch, context=context, read_rate=rate
                )
        except RingExportError as error:
            print(f"b{batch} {chosen}: {error}", flush=True)
            continue
        print(f"{recipe} b{batch} {chosen}: {found.step_us:.0f} us", flush=True)


POINTS = {
    "fp8": ((1, 4096), (8, 4096), (64, 4096), (256, 4096), (1, 131008)),
    "fp8-all": ((1, 4096),),
    "int8": ((1, 4096), (8, 4096), (64, 4096)),
    "bf16": ((1, 4096), (8, 4096)),
}
"""Recipe to batches and contexts that the tables show."""


def docs(place: Gpu) -> None:
    """Measure everything and write it to docs/performance.md and docs/numerics.md.

    The pages are written after every recipe, so that what is measured is kept.
    """
    config = BenchConfig(decode=32, repeat=5)
    read_rate = measure_read_rate(place.device)
    tables: dict[str, list[list[object]]] = {name: [] for name in _PAGES}
    for recipe, points in POINTS.items():
        weights = weights_of(place, recipe)
        batches = tuple(dict.fromkeys(batch for batch, _ in points))
        checked = check_engine(weights, place.library, batches)
        found = [measure_point(place, weights, config, read_rate, point) for point in points]
        part = GridResult(read_rate=read_rate, agreements=checked, decode=found)
        tables["gpu-agreement"] += [agreement_row(recipe, one) for one in checked]
        tables["gpu-decode"] += decode_rows(recipe, part)
        tables["gpu-kinds"] += kind_rows(recipe, part)
        write_tables(tables, read_rate)
        show(DECODE_HEADER, decode_rows(recipe, part))
        if recipe == "fp8":
            tables["gpu-prefill"] = prompts(place, weights, recipe)
            write_tables(tables, read_rate)
            show(PREFILL_HEADER, tables["gpu-prefill"])
        del weights


_PAGES = {
    "gpu-agreement": ("numerics.md", AGREE_HEADER),
    "gpu-decode": ("performance.md", DECODE_HEADER),
    "gpu-kinds": ("performance.md", KINDS_HEADER),
    "gpu-prefill": ("performance.md", PREFILL_HEADER),
}


def write_tables(tables: dict[str, list[list[object]]], read_rate: float) -> None:
    """Write those tables that have rows."""
    for name, (page, header) in _PAGES.items():
        if tables[name]:
            rate = f"Read rate in the same run: {read_rate / 1e12:.2f} TB/s.\n\n"
            lead = rate if name == "gpu-decode" else ""
            replace(page, name, lead + markdown(header, tables[name]))


def main(arguments: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        match list(arguments):
            case ["agree", *recipes]:
                agree(gpu(), recipes or ("bf16", "fp8", "int8"), (1, 8, 64))
            case ["drift"]:
                drift(gpu(), Path(folder))
            case ["text"]:
                text(gpu(), Path(folder))
            case ["memory", *recipes]:
                memory(gpu(), recipes or ("fp8",))
            case ["start", path]:
                start(Path(path))
            case ["flash"]:
                flash(gpu())
            case ["sweep", recipe, batches]:
                sweep(gpu(), recipe, [int(one) for one in batches.split(",")])
            case ["docs"]:
                docs(gpu())
            case _:
                sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
