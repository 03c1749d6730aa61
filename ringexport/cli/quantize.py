"""``ringexport quantize``: a bf16 checkpoint becomes a quantized one."""

import contextlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import click

from ringexport.cli.app import (
    App,
    JsonValue,
    command_options,
    json_option,
    pass_app,
    worker_threads,
)
from ringexport.cli.schemes import calibration_options, scheme_json, show_schemes

if TYPE_CHECKING:
    from ringexport.cli.console import Terminal
    from ringexport.quantize.run import QuantizeEstimate, QuantizeResult

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows has no resource module; there the peak is not shown
    resource = None

__all__ = ["command"]


@click.command("quantize", short_help="Quantize a checkpoint to FP8 or INT8.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    metavar="CHECKPOINT_Q",
    required=True,
    type=click.Path(path_type=Path),
    help="Directory to write; an older quantized checkpoint there is replaced when the new one "
    "is complete.",
)
@click.option(
    "--recipe",
    default="fp8",
    show_default=True,
    metavar="NAME|FILE.toml",
    help="What is quantized and how: the name of a shipped recipe, or your own file.",
)
@calibration_options
@click.option(
    "--save-stats",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Keep the stats of the calibration, for --stats.",
)
@click.option(
    "--sensitivity",
    metavar="SIZE",
    help="Instead, quantize one group of modules at a time, show what each costs on held-out "
    "texts, and write a mixed recipe for weights of SIZE, such as 11MB, to OUTPUT.toml.",
)
@click.option(
    "--dry-run", is_flag=True, help="Show the scheme of every kind of module, write nothing."
)
@json_option
@command_options
@pass_app
def command(
    app: App,
    checkpoint: Path,
    output: Path,
    *,
    recipe: str,
    calibration: str | None,
    calibration_samples: int | None,
    stats_path: Path | None,
    save_stats: Path | None,
    sensitivity: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write a quantized copy of a CHECKPOINT directory in the compressed-tensors format.

    Weights are read and written a few megabytes at a time. A run that was killed is continued by
    the next one with the same arguments; the same inputs always give the same bytes. Recipes with
    static scales or SmoothQuant run a calibration first.
    """
    from ringexport.pipeline.calibrated import CalibrationRequest
    from ringexport.pipeline.quantized import quantize
    from ringexport.quantize.run import estimate
    from ringexport.quantize.shipped import load_recipe

    before = _peak_bytes()
    wanted = load_recipe(recipe)
    terminal = app.terminal
    if dry_run:
        _show_estimate(app, terminal, estimate(checkpoint, wanted), as_json=as_json)
        return
    request = CalibrationRequest(
        prompts=calibration, num_samples=calibration_samples, stats=stats_path
    )
    if sensitivity is not None:
        from ringexport.cli.sensitivity import run_sensitivity

        run_sensitivity(app, checkpoint, output, (recipe, sensitivity), request, as_json=as_json)
        return
    with terminal.progress() as progress:
        result = quantize(
            checkpoint,
            output,
            wanted,
            request,
            save_stats=save_stats,
            threads=worker_threads(app),
            progress=progress,
        )
    if as_json:
        app.write_json(_result_json(result, before))
        return
    _show_result(terminal, result, before)


def _show_result(terminal: "Terminal", result: "QuantizeResult", before: int) -> None:
    from ringexport.cli.console import format_bytes

    moved = result.source_bytes + result.output_bytes
    terminal.say(
        f"quantized {len(result.resolved.quantized)} modules with recipe "
        f"{result.resolved.recipe.name} to {result.path}: {format_bytes(result.source_bytes)} "
        f"became {format_bytes(result.output_bytes)} in {result.seconds:.1f} s "
        f"({format_bytes(int(moved / max(result.seconds, 1e-9)))}/s read and written), "
        f"peak memory {format_bytes(_peak_bytes())}, "
        f"{format_bytes(_peak_bytes() - before)} above the interpreter"
    )
    if result.reused_files:
        terminal.say(f"{result.reused_files} weight file(s) of an earlier run were used again")
    if result.saturated:
        total = sum(result.saturated.values())
        terminal.say(f"{total:,} elements of {len(result.saturated)} modules saturated")


def _show_estimate(
    app: App, terminal: "Terminal", found: "QuantizeEstimate", *, as_json: bool
) -> None:
    if as_json:
        app.write_json(
            {
                "recipe": found.resolved.recipe.name,
                "source_bytes": found.source_bytes,
                "output_bytes": found.output_bytes,
                "needs_stats": list(found.resolved.stats_reasons),
                "schemes": scheme_json(found.resolved.rows()),
                "modules": {
                    entry.module.name: str(entry.scheme.weights or "as they are")
                    for entry in found.resolved.modules
                },
            }
        )
        return
    from ringexport.cli.console import format_bytes

    show_schemes(terminal, found.resolved.rows())
    facts = {
        "recipe": found.resolved.recipe.name,
        "weights read": format_bytes(found.source_bytes),
        "weights written": format_bytes(found.output_bytes),
        "needs calibration": "; ".join(found.resolved.stats_reasons) or "no",
    }
    terminal.facts(facts)
    terminal.say("dry run: nothing was written")


def _result_json(result: "QuantizeResult", before: int) -> JsonValue:
    return {
        "checkpoint": str(result.path),
        "recipe": result.resolved.recipe.name,
        "quantized_modules": len(result.resolved.quantized),
        "source_bytes": result.source_bytes,
        "output_bytes": result.output_bytes,
        "saturated": dict(result.saturated),
        "reused_files": result.reused_files,
        "seconds": result.seconds,
        "peak_memory_bytes": _peak_bytes(),
        "memory_above_start_bytes": _peak_bytes() - before,
    }


def _peak_bytes() -> int:
    """Return the most memory that this process had resident, 0 where nobody knows.

    Linux says it in /proc; `getrusage` would count what the parent had before it started us.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(text.partition("VmHWM:")[2].split()[0]) * 1024
    if resource is None:
        return 0
    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
