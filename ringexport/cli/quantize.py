"""``ringexport quantize``: a bf16 checkpoint becomes a quantized one."""

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import click

from ringexport.cli.app import App, JsonValue, command_options, json_option, pass_app

if TYPE_CHECKING:
    from ringexport.cli.console import Terminal
    from ringexport.quantize.resolve import ResolvedRecipe
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
@click.option(
    "--stats",
    "stats_path",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Calibration stats, for recipes with static scales or SmoothQuant.",
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
    recipe: str,
    stats_path: Path | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write a quantized copy of a CHECKPOINT directory in the compressed-tensors format.

    Weights are read and written a few megabytes at a time. A run that was killed is continued by
    the next one with the same arguments; the same inputs always give the same bytes.
    """
    from ringexport.quantize.run import estimate, quantize_checkpoint
    from ringexport.quantize.shipped import load_recipe
    from ringexport.stats import CalibrationStats

    wanted = load_recipe(recipe)
    terminal = app.terminal
    if dry_run:
        _show_estimate(app, terminal, estimate(checkpoint, wanted), as_json=as_json)
        return
    stats = CalibrationStats.load(stats_path) if stats_path is not None else None
    with terminal.progress() as progress:
        result = quantize_checkpoint(
            checkpoint,
            output,
            wanted,
            stats=stats,
            threads=_threads(app),
            progress=progress,
        )
    if as_json:
        app.write_json(_result_json(result))
        return
    _show_result(terminal, result)


def _show_result(terminal: "Terminal", result: "QuantizeResult") -> None:
    from ringexport.cli.console import format_bytes

    moved = result.source_bytes + result.output_bytes
    terminal.say(
        f"quantized {len(result.resolved.quantized)} modules with recipe "
        f"{result.resolved.recipe.name} to {result.path}: {format_bytes(result.source_bytes)} "
        f"became {format_bytes(result.output_bytes)} in {result.seconds:.1f} s "
        f"({format_bytes(int(moved / max(result.seconds, 1e-9)))}/s read and written), "
        f"peak memory {format_bytes(_peak_bytes())}"
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
                "schemes": _scheme_rows(found.resolved),
                "modules": {
                    entry.module.name: _describe(entry.scheme.weights)
                    for entry in found.resolved.modules
                },
            }
        )
        return
    from ringexport.cli.console import format_bytes

    terminal.table(
        ("modules", "kind", "parameters", "weights", "activations", "first"),
        [
            (
                str(row["modules"]),
                row["kind"],
                f"{row['parameters']:,}",
                row["weights"],
                row["activations"],
                row["first"],
            )
            for row in _scheme_rows(found.resolved)
        ],
        right=(0, 2),
    )
    facts = {
        "recipe": found.resolved.recipe.name,
        "weights read": format_bytes(found.source_bytes),
        "weights written": format_bytes(found.output_bytes),
        "needs calibration stats": "; ".join(found.resolved.stats_reasons) or "no",
    }
    terminal.facts(facts)
    terminal.say("dry run: nothing was written")


def _scheme_rows(resolved: "ResolvedRecipe") -> list[dict[str, JsonValue]]:
    return [
        {
            "modules": row.modules,
            "kind": row.kind,
            "parameters": row.parameters,
            "weights": _describe(row.scheme.weights),
            "activations": _describe(row.scheme.activations),
            "first": row.example,
        }
        for row in resolved.rows()
    ]


def _describe(scheme: object) -> str:
    return "as they are" if scheme is None else str(scheme)


def _result_json(result: "QuantizeResult") -> JsonValue:
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
    }


def _threads(app: App) -> int:
    return app.settings.threads or min(os.cpu_count() or 1, 16)


def _peak_bytes() -> int:
    """Return the most memory that this process had resident, 0 where nobody knows."""
    if resource is None:
        return 0
    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
