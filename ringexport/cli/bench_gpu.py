"""``ringexport bench`` of the fast engine: a grid of speeds with limits and a profile."""

from pathlib import Path
from typing import TYPE_CHECKING

from ringexport.cli.app import App
from ringexport.errors import BackendUnavailableError

if TYPE_CHECKING:
    from ringexport.cli.console import Terminal
    from ringexport.compare.gpu.grid import GridResult
    from ringexport.compare.gpu.opening import Gpu
    from ringexport.compare.speed import BenchConfig
    from ringexport.progress import Progress
    from ringexport.runtime.backends.cuda.weights import DeviceWeights

__all__ = ["bench_bundle", "bench_random_weights"]

_KERNELS_SHOWN = 16
_MICROSECONDS = "{:,.1f}"


def bench_random_weights(
    app: App, path: Path, recipe: str, config: "BenchConfig", *, profile: bool, as_json: bool
) -> None:
    """Measure the fast engine with random weights.

    Args:
        app: settings and terminal.
        path: a published config.json.
        recipe: name or file, decides the number formats.
        config: the grid.
        profile: show the kernels.
        as_json: write JSON instead of tables.

    Raises:
        RingExportError: no GPU, no memory, wrong results, a collapsed router.
    """
    from ringexport.checkpoint import RingConfig
    from ringexport.compare.gpu.grid import check_grid
    from ringexport.compare.gpu.opening import find_gpu, random_engine
    from ringexport.pipeline.packed import packed_recipe

    model = RingConfig.from_file(path)
    chosen = packed_recipe(recipe, model)
    check_grid(config, model.context_length)
    gpu = find_gpu(app.settings.kernel_library)
    about = {"config": str(path), "recipe": chosen.name, "weights": "random"}
    with app.terminal.progress() as progress:
        progress.start("making random weights")
        weights = random_engine(gpu, model, chosen.formats, fp8_cache=chosen.fp8_cache)
        progress.finish()
        _bench(app, gpu, weights, config, progress, about, profile=profile, as_json=as_json)


def bench_bundle(
    app: App,
    path: Path,
    target: str,
    config: "BenchConfig",
    *,
    verify: bool,
    profile: bool,
    as_json: bool,
) -> None:
    """Measure the fast engine of a bundle.

    Args:
        app: settings and terminal.
        path: of the bundle.
        target: one of its cuda targets.
        config: the grid.
        verify: compare the digests of the bundle.
        profile: show the kernels.
        as_json: write JSON instead of tables.

    Raises:
        RingExportError: whatever is wrong with the bundle, and as `bench_random_weights`.
    """
    from ringexport.bundle import EngineBundle
    from ringexport.compare.gpu.grid import check_grid
    from ringexport.compare.gpu.opening import find_gpu, load_engine

    with app.terminal.progress() as progress:
        bundle = EngineBundle.open(path, verify=verify, progress=progress)
        if target not in bundle.targets:
            raise BackendUnavailableError(
                f"{path} has no target {target}, it has {', '.join(bundle.targets)}",
                hint="build it with: ringexport build --target " + target,
            )
        check_grid(config, bundle.manifest.model.context_length)
        directory = bundle.directory / bundle.targets[target].directory
        gpu = find_gpu(app.settings.kernel_library, target)
        model = bundle.directory / "model" / "config.json"
        weights = load_engine(gpu, directory, model, progress)
        about = {"bundle": str(path), "target": target}
        _bench(app, gpu, weights, config, progress, about, profile=profile, as_json=as_json)


def _bench(
    app: App,
    gpu: "Gpu",
    weights: "DeviceWeights",
    config: "BenchConfig",
    progress: "Progress",
    about: dict[str, str],
    *,
    profile: bool,
    as_json: bool,
) -> None:
    from ringexport.compare.conditions import measurement_conditions
    from ringexport.compare.gpu.grid import measure_grid

    conditions = about | gpu.conditions | measurement_conditions(app.settings.threads)
    result = measure_grid(gpu, weights, config, progress=progress)
    if as_json:
        app.write_json({"conditions": conditions} | result.to_dict())
        return
    terminal = app.terminal
    terminal.facts(conditions | {"read rate": f"{result.read_rate / 1e12:.2f} TB/s, measured now"})
    _show_agreement(terminal, result)
    _show_decode(terminal, result)
    _show_kinds(terminal, result)
    if profile:
        _show_kernels(terminal, result)
    _show_prefill(terminal, result)
    for what, reason in result.skipped.items():
        terminal.result(f"not measured: {what}: {reason}")


def _show_agreement(terminal: "Terminal", result: "GridResult") -> None:
    rows = [
        [
            one.what,
            str(one.positions),
            f"{one.engine.median_relative:.2e}",
            f"{one.rounding.median_relative:.2e}",
            f"{one.engine.mean_cosine:.6f}",
            f"{one.engine.top1:.0%}",
        ]
        for one in result.agreements
    ]
    columns = ["compared", "positions", "error", "of bf16 alone", "cosine", "same top token"]
    title = "Logits against the reference over the same weights"
    terminal.table(columns, rows, title=title, right=(1, 2, 3, 4, 5))


def _show_decode(terminal: "Terminal", result: "GridResult") -> None:
    rows = []
    for point in result.decode:
        speed, memory = point.speed, point.memory
        rows.append(
            [
                f"{speed.context:,}",
                str(speed.batch),
                f"{speed.step_us:,.0f}",
                f"{speed.tokens_per_s:,.0f}",
                f"{speed.bytes_moved / 1e9:.2f}",
                f"{speed.limit_tokens_per_s:,.0f}",
                f"{speed.fraction:.0%}",
                f"{speed.experts_hit:.1f} of {speed.experts_expected:.1f}",
                str(point.profile.launches),
                f"{memory.measured / 1e9:.2f} of {memory.plan.total / 1e9:.2f}",
            ]
        )
    columns = ["context", "batch", "us a step", "tokens/s", "GB a step", "limit", "of limit"]
    columns += ["experts hit", "kernels", "GB of memory, planned"]
    terminal.table(columns, rows, title="Decode", right=tuple(range(len(columns))))


def _show_kinds(terminal: "Terminal", result: "GridResult") -> None:
    kinds = list(dict.fromkeys(kind for point in result.decode for kind in point.profile.kinds))
    rows = []
    for point in result.decode:
        times = [point.profile.kinds.get(kind, 0.0) for kind in kinds]
        cells = [_MICROSECONDS.format(value) for value in (*times, sum(times))]
        rows.append([f"{point.speed.context:,}", str(point.speed.batch), *cells])
    columns = ["context", "batch", *kinds, "sum"]
    title = "Microseconds a step by kind of layer, kernels one after the other"
    terminal.table(columns, rows, title=title, right=tuple(range(len(columns))))


def _show_kernels(terminal: "Terminal", result: "GridResult") -> None:
    for point in result.decode:
        kernels = point.profile.kernels
        rows = [
            [
                _MICROSECONDS.format(one.us),
                str(one.launches),
                _MICROSECONDS.format(one.us / one.launches),
                one.name,
            ]
            for one in kernels[:_KERNELS_SHOWN]
        ]
        rest = kernels[_KERNELS_SHOWN:]
        if rest:
            us, launches = sum(one.us for one in rest), sum(one.launches for one in rest)
            rows.append([_MICROSECONDS.format(us), str(launches), "", "all others"])
        title = f"Kernels of a step, batch {point.speed.batch}, context {point.speed.context:,}"
        terminal.table(["us", "launches", "each", "kernel"], rows, title=title, right=(0, 1, 2))


def _show_prefill(terminal: "Terminal", result: "GridResult") -> None:
    rows = [
        [f"{one.batch} x {one.tokens:,}", f"{one.ms:,.1f}", f"{one.tokens_per_s:,.0f}"]
        for one in result.prefill
    ]
    columns = ["prompts", "ms until the first token", "tokens/s"]
    terminal.table(columns, rows, title="Prompts", right=(1, 2))
