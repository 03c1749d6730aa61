"""``ringexport quantize --sensitivity``: which modules lose most, and a recipe for a budget."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ringexport.cli.app import App
from ringexport.errors import ConfigError

if TYPE_CHECKING:
    from ringexport.cli.console import Terminal
    from ringexport.pipeline.calibrated import CalibrationRequest
    from ringexport.pipeline.sensitivity import MixedRecipe, SensitivityRow

__all__ = ["run_sensitivity"]


def run_sensitivity(
    app: App,
    checkpoint: Path,
    output: Path,
    wanted: tuple[str, str],
    calibration: "CalibrationRequest",
    *,
    as_json: bool,
) -> None:
    """Measure every group of modules and write the mixed recipe.

    Args:
        app: knows terminal and threads.
        checkpoint: unquantized.
        output: TOML file to write.
        wanted: recipe, name or file, and size of the weights.
        calibration: where stats come from, if the recipe needs any.
        as_json: write JSON instead of a table.

    Raises:
        RingExportError: whatever is wrong with checkpoint, recipe, stats or output.
    """
    from ringexport.checkpoint import CheckpointWeights
    from ringexport.files import check_writable
    from ringexport.pipeline.calibrated import CalibrationPlan
    from ringexport.pipeline.gate import HeldOut
    from ringexport.pipeline.sensitivity import check_budget, parse_size, propose, sensitivity
    from ringexport.quantize.resolve import resolve_recipe
    from ringexport.quantize.shipped import load_recipe
    from ringexport.runtime.registry import RunnerOptions

    if output.suffix != ".toml" or output.is_dir():
        raise ConfigError(
            f"--sensitivity writes a recipe, and {output} is not a .toml file", hint="-o mixed.toml"
        )
    name, size = wanted
    recipe, budget = load_recipe(name), parse_size(size)
    check_writable(output)
    check_budget(checkpoint, recipe, budget)
    base = str(Path(name).absolute()) if name.endswith(".toml") else name
    terminal, stats = app.terminal, None
    with terminal.progress() as progress, tempfile.TemporaryDirectory() as scratch:
        with CheckpointWeights.open(checkpoint) as weights:
            if resolve_recipe(recipe, weights.config).stats_reasons:
                stats = CalibrationPlan(calibration).stats(weights, Path(scratch), progress)
        options = RunnerOptions(threads=app.settings.threads)
        with HeldOut(checkpoint, options=options) as held_out:
            rows = sensitivity(checkpoint, recipe, held_out.measure, stats=stats, progress=progress)
    mixed = propose(checkpoint, recipe, base, rows, budget)
    mixed.save(output)
    if as_json:
        app.write_json(
            {
                "recipe": name,
                "groups": [row.to_dict() for row in rows],
                "mixed": {
                    "path": str(output),
                    "bytes": mixed.num_bytes,
                    "predicted_kl": mixed.predicted_kl,
                    "kept": [group.target for group in mixed.kept],
                },
            }
        )
        return
    _show(terminal, output, rows, mixed)


def _show(
    terminal: "Terminal", output: Path, rows: "tuple[SensitivityRow, ...]", mixed: "MixedRecipe"
) -> None:
    from ringexport.cli.console import format_bytes

    terminal.table(
        ("modules", "KL mean", "perplexity", "saves", "KL per MB", "in the mixed recipe"),
        [
            (
                str(row.group),
                f"{row.kl_mean:.3g}",
                f"{100 * row.perplexity_change:+.3f}%",
                format_bytes(row.group.bytes_saved),
                f"{row.kl_per_megabyte:.3g}",
                "as it is" if row.group in mixed.kept else "quantized",
            )
            for row in rows
        ],
        right=(1, 2, 3, 4),
    )
    terminal.say(
        f"wrote {output}: weights of {format_bytes(mixed.num_bytes)}, "
        f"predicted KL {mixed.predicted_kl:.3g} nats per token"
    )
