"""``ringexport build``: a checkpoint becomes a bundle."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ringexport.cli.app import App, command_options, json_option, pass_app, worker_threads
from ringexport.cli.schemes import calibration_options, scheme_json, show_schemes
from ringexport.pipeline.request import AUTO, DECAY_INDICES, RECIPES, BuildRequest

if TYPE_CHECKING:
    from ringexport.cli.console import Terminal
    from ringexport.pipeline.build import BuildEstimate, BuildResult

__all__ = ["command"]

_ESTIMATE_KEYS = (
    "architecture",
    "num_parameters",
    "source_bytes",
    "bundle_bytes",
    "work_bytes",
    "free_bytes",
    "notes",
)


@click.command("build")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    metavar="BUNDLE",
    required=True,
    type=click.Path(path_type=Path),
    help="Directory to write; an older bundle there is replaced when the new one is complete.",
)
@click.option(
    "--recipe",
    default=AUTO,
    show_default=True,
    metavar="NAME|FILE.toml",
    help=f"Quantization recipe: {AUTO}, {', '.join(RECIPES)}, or your own file. "
    "auto takes the checkpoint as it is: a bf16 one is computed in fp32 on the CPU.",
)
@calibration_options
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="TARGET",
    default=(AUTO,),
    show_default=True,
    help="What to build for, such as onnxruntime:cpu or tensorrt-rtx:sm_89+sm_120; may be given "
    "several times.",
)
@click.option(
    "--profile",
    metavar="NAME|FILE.toml",
    help="Shape ranges and builder options of TensorRT engines (engines/profiles).  "
    "[default: default]",
)
@click.option(
    "--decay-index",
    type=click.Choice(DECAY_INDICES),
    default=BuildRequest.__dataclass_fields__["decay_index"].default,
    show_default=True,
    help="Form of the layer factor of the decay, on which public implementations disagree.",
)
@click.option(
    "--gate",
    metavar="LIMITS",
    help="Fail unless the quantized model is this close to the checkpoint on held-out texts, such "
    "as ppl=0.5%,kl=0.005,top1=97%.",
)
@click.option(
    "--gate-fallback",
    is_flag=True,
    help="Leave the worst modules unquantized until the gate is passed, and say which.",
)
@click.option(
    "--dry-run", is_flag=True, help="Check everything, show the decisions, write nothing."
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
    targets: tuple[str, ...],
    profile: str | None,
    decay_index: str,
    calibration: str | None,
    calibration_samples: int | None,
    stats_path: Path | None,
    gate: str | None,
    gate_fallback: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Build an engine bundle from a CHECKPOINT directory.

    Nothing appears at BUNDLE before it is complete, digested and tried; whatever fails or
    interrupts the build leaves an older bundle as it was. With a quantizing recipe, the checkpoint
    is calibrated if need be and quantized first; a build that was killed is continued by the next
    one with the same arguments. A CHECKPOINT that is quantized already is built as it is.
    """
    from ringexport.pipeline.build import build, estimate

    request = BuildRequest(
        checkpoint=checkpoint,
        output=output,
        recipe=recipe,
        targets=targets,
        decay_index=decay_index,
        calibration=calibration,
        calibration_samples=calibration_samples,
        stats=stats_path,
        threads=worker_threads(app),
        gate=gate,
        gate_fallback=gate_fallback,
        profile=profile,
        plugin_library=app.settings.plugin_library,
        kernel_library=app.settings.kernel_library,
    )
    terminal = app.terminal
    if dry_run:
        _show_estimate(app, terminal, estimate(request), as_json)
        return
    with terminal.progress() as progress:
        result = build(request, progress=progress)
    if as_json:
        app.write_json(_result_json(result))
        return
    from ringexport.cli.console import format_bytes

    resolved = result.manifest.build
    terminal.say(
        f"built {result.path}: {format_bytes(result.nbytes)}, {', '.join(resolved.targets)},"
        f" recipe {resolved.recipe}, decay index {resolved.decay_index},"
        f" in {sum(result.seconds.values()):.1f} s"
    )
    quantization = result.manifest.quantization
    first = quantization.notes if quantization is not None else ()
    shown = {*first, *result.untried.values()}
    for note in (*first, *(note for note in result.notes if note not in shown)):
        terminal.say(f"note: {note}")
    where = "try it" if len(result.untried) < len(resolved.targets) else "where it can run"
    terminal.say(f'{where}: ringexport run {shlex.quote(str(result.path))} "Once upon a time"')


def _show_estimate(app: App, terminal: "Terminal", found: "BuildEstimate", as_json: bool) -> None:
    plan = found.quantization
    reasons = plan.resolved.stats_reasons if plan.resolved is not None else ()
    if as_json:
        values = {name: getattr(found, name) for name in _ESTIMATE_KEYS}
        values |= {"build": asdict(found.build), "needs_calibration": list(reasons)}
        app.write_json(values | {"schemes": scheme_json(plan.rows)})
        return
    from ringexport.cli.console import format_bytes

    build = found.build
    if plan.rows:
        show_schemes(terminal, plan.rows)
    terminal.facts(
        {
            "recipe": build.recipe,
            "compute dtype": build.compute_dtype,
            "targets": ", ".join(build.targets),
            "decay index": build.decay_index,
            "model": f"{found.architecture}, {found.num_parameters:,} parameters",
            "weights read": format_bytes(found.source_bytes),
            "bundle, at most": format_bytes(found.bundle_bytes),
            "work folder, at most": format_bytes(found.work_bytes),
            "needs calibration": "; ".join(reasons) or "no",
            "free on that disk": format_bytes(found.free_bytes),
        }
    )
    for note in found.notes:
        terminal.say(f"note: {note}")
    terminal.say("dry run: nothing was written")


def _result_json(result: "BuildResult") -> dict[str, object]:
    return {
        "bundle": str(result.path),
        "bytes": result.nbytes,
        "build": asdict(result.manifest.build),
        "seconds": result.seconds,
        "notes": list(result.notes),
    }
