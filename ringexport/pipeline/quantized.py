"""Quantize on the way to a bundle or to a checkpoint: calibrate if needed, then quantize."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ringexport.bundle import CalibrationInfo, QuantizationInfo, SchemeInfo
from ringexport.checkpoint import CheckpointWeights, RingConfig
from ringexport.errors import CheckpointError, ConfigError
from ringexport.files import check_writable
from ringexport.ops.schemes import ModuleScheme
from ringexport.pipeline.calibrated import CalibrationPlan, CalibrationRequest
from ringexport.pipeline.gate import GateRequest
from ringexport.pipeline.request import AS_STORED, AUTO, UNQUANTIZED, unquantized_recipe
from ringexport.pipeline.target_schemes import check_runnable, computation_notes
from ringexport.pipeline.work import WorkFolder, remove_stale_work, source_state
from ringexport.progress import NoProgress, Progress
from ringexport.quantize.modules import quantizable_modules
from ringexport.quantize.recipe import Recipe
from ringexport.quantize.resolve import ResolvedRecipe, SchemeRow, resolve_recipe, scheme_rows
from ringexport.quantize.run import QuantizeResult, quantize_checkpoint
from ringexport.quantize.shipped import load_recipe
from ringexport.quantize.workdir import REPORT_NAME, check_output
from ringexport.stats import CalibrationStats

__all__ = [
    "QuantizationPlan",
    "plan_quantization",
    "quantize",
    "quantized_weights",
]

_CHECKPOINT_NAME = "quantized"
_REPORT_LIMIT_BYTES = 1 << 26


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationPlan:
    """What will be quantized and how, checked before any work.

    Attributes:
        name: of the recipe.
        schemes: of the quantized modules, by name; empty if nothing is quantized.
        rows: the same in short, unquantized kinds included.
        resolved: the recipe with all of its modules; None for a checkpoint that stays as it is.
        calibration: where the stats come from; None if none are needed.
        unused_calibration: the user asked for a calibration, and the recipe quantizes without one.
        gate: that the quantized model has to pass, None for none.
        targets: that have to run it.
    """

    name: str
    schemes: Mapping[str, ModuleScheme]
    targets: tuple[str, ...] = ()
    rows: tuple[SchemeRow, ...] = ()
    resolved: ResolvedRecipe | None = None
    calibration: CalibrationPlan | None = None
    unused_calibration: bool = False
    gate: GateRequest | None = None

    def with_gate(self, gate: GateRequest | None) -> "QuantizationPlan":
        """Return the plan with a gate.

        Raises:
            ConfigError: nothing is quantized, so that there is nothing to measure.
        """
        if gate is not None and self.resolved is None:
            raise ConfigError(
                f"a gate is given, and the recipe {self.name} quantizes nothing",
                hint="leave out --gate, or choose a recipe such as fp8",
            )
        return replace(self, gate=gate)

    def notes(self, config: RingConfig) -> tuple[str, ...]:
        """Say how the targets compute the modules, where it is not what their schemes say."""
        return computation_notes(config, self.schemes, self.targets)


def plan_quantization(
    weights: CheckpointWeights,
    recipe: str,
    calibration: CalibrationRequest,
    targets: tuple[str, ...],
) -> QuantizationPlan:
    """Decide what is quantized on the way from a checkpoint to a bundle.

    Args:
        weights: the checkpoint; one that is quantized already is taken as it is.
        recipe: a name, a .toml file, or "auto": what the checkpoint holds.
        calibration: where stats come from, if any are needed.
        targets: that have to run it.

    Raises:
        ConfigError: an unknown recipe, one for a quantized checkpoint, one that a target does not
            run, or a calibration for one that quantizes nothing.
        CalibrationError: prompts or stats that cannot be used.
    """
    config = weights.config
    if config.quantization is not None:
        return _plan_stored(weights, recipe, calibration, targets)
    if recipe == AUTO or recipe in UNQUANTIZED:
        name = unquantized_recipe(targets) if recipe == AUTO else recipe
        _refuse_calibration(calibration, name)
        return QuantizationPlan(name=name, schemes={}, targets=targets)
    resolved = resolve_recipe(load_recipe(recipe), config)
    schemes = {name: entry.scheme for name, entry in resolved.quantized.items()}
    found = resolved.recipe
    for target in targets:
        check_runnable(
            target,
            schemes,
            what=f"the recipe {found.name}",
            kv_cache=None if found.kv_cache is None else found.kv_cache.format,
            state=found.recurrent_state,
        )
    if not schemes:
        _refuse_calibration(calibration, found.name)
    needed = bool(resolved.stats_reasons)
    if calibration.stats is not None and not needed:
        CalibrationPlan(calibration)
    return QuantizationPlan(
        name=found.name,
        schemes=schemes,
        targets=targets,
        rows=resolved.rows(),
        resolved=resolved if schemes else None,
        calibration=CalibrationPlan(calibration) if needed else None,
        unused_calibration=calibration.is_explicit and not needed,
    )


def _plan_stored(
    weights: CheckpointWeights,
    recipe: str,
    calibration: CalibrationRequest,
    targets: tuple[str, ...],
) -> QuantizationPlan:
    if recipe not in {AUTO, AS_STORED}:
        raise ConfigError(
            f"{weights.path} is quantized already, so the recipe {recipe} cannot be applied",
            hint="leave out --recipe to build it as it is, or use the bf16 checkpoint",
        )
    _refuse_calibration(calibration, AS_STORED)
    stored = weights.config.quantization
    for target in targets:
        check_runnable(
            target,
            weights.schemes,
            what=f"the checkpoint {weights.path}",
            kv_cache=stored.kv_cache.format if stored and stored.kv_cache else None,
        )
    return QuantizationPlan(
        name=AS_STORED,
        schemes=weights.schemes,
        targets=targets,
        rows=_stored_rows(weights.config, weights.schemes),
    )


def _refuse_calibration(calibration: CalibrationRequest, recipe: str) -> None:
    if calibration.is_explicit:
        raise ConfigError(
            f"a calibration is given, and the recipe {recipe} quantizes nothing",
            hint="leave out --calibration, --calibration-samples and --stats,"
            " or choose a recipe such as int8",
        )


def _settled(
    plan: QuantizationPlan,
    weights: CheckpointWeights,
    stats: CalibrationStats | None,
    progress: Progress,
) -> tuple[QuantizationPlan, tuple[str, ...]]:
    """Return a plan that passes its gate, and what to say about that."""
    if plan.gate is None or plan.resolved is None:
        return plan, ()
    found = plan.gate.settle(weights.path, plan.resolved.recipe, stats, progress)
    resolved = resolve_recipe(found.recipe, weights.config)
    schemes = {name: entry.scheme for name, entry in resolved.quantized.items()}
    return replace(plan, resolved=resolved, schemes=schemes, rows=resolved.rows()), found.notes


@contextmanager
def quantized_weights(
    plan: QuantizationPlan,
    weights: CheckpointWeights,
    output: Path,
    *,
    threads: int,
    progress: Progress,
) -> Iterator[tuple[CheckpointWeights, QuantizationInfo | None]]:
    """Yield the weights to export and what to say about them.

    The quantized checkpoint lies in a folder beside `output`. It is removed at the end, also after
    an error; after an interrupt or a kill it stays for the next run with the same inputs.

    Args:
        plan: of `plan_quantization`.
        weights: the source.
        output: of the bundle.
        threads: for quantizing.
        progress: told about every stage.
    """
    if plan.unused_calibration:
        progress.note(f"the recipe {plan.name} needs no calibration; what was given is not used")
    if plan.resolved is None:
        remove_stale_work(output)
        info = _stored_info(plan, weights) if plan.schemes else None
        yield weights, info
        return
    inputs = _inputs(plan.resolved, plan.calibration, weights) | {"gate": repr(plan.gate)}
    with WorkFolder(output, inputs, progress) as folder:
        path = folder.path / _CHECKPOINT_NAME
        stats = _stats(plan.calibration, weights, folder.path, progress)
        plan, notes = _settled(plan, weights, stats, progress)
        assert plan.resolved is not None
        if path.is_dir():
            progress.note("the weights were quantized by an earlier run")
        else:
            recipe = plan.resolved.recipe
            quantize_checkpoint(
                weights.path, path, recipe, stats=stats, threads=threads, progress=progress
            )
        with CheckpointWeights.open(path) as exported:
            info = _info(plan, weights, exported, stats)
            yield exported, replace(info, notes=(*info.notes, *notes))


def quantize(
    checkpoint: Path,
    output: Path,
    recipe: Recipe,
    calibration: CalibrationRequest,
    *,
    save_stats: Path | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Write a quantized checkpoint, after a calibration if the recipe needs one.

    Args:
        checkpoint, output, recipe, threads, progress: as for `quantize_checkpoint`.
        calibration: where stats come from, if the recipe needs any.
        save_stats: file to keep the stats in.

    Raises:
        RingExportError: as `quantize_checkpoint`; stats of another checkpoint are refused.
    """
    progress = progress or NoProgress()
    with CheckpointWeights.open(checkpoint) as weights:
        needed = False
        if weights.config.quantization is None:  # else quantize_checkpoint says what is wrong
            resolved = resolve_recipe(recipe, weights.config)
            needed = bool(resolved.quantized and resolved.stats_reasons)
        if not needed:
            if calibration.stats is not None:
                CalibrationPlan(calibration)
            if calibration.is_explicit or save_stats is not None:
                progress.note(
                    f"the recipe {recipe.name} needs no calibration; what was given for one is"
                    " not used"
                )
            return quantize_checkpoint(
                checkpoint, output, recipe, threads=threads, progress=progress
            )
        check_output(output)
        if save_stats is not None:
            check_writable(save_stats)
        plan = CalibrationPlan(calibration)
        with WorkFolder(output, _inputs(resolved, plan, weights), progress) as folder:
            stats = plan.stats(weights, folder.path, progress)
            if save_stats is not None:
                stats.save(save_stats)
            return quantize_checkpoint(
                checkpoint, output, recipe, stats=stats, threads=threads, progress=progress
            )


def _inputs(
    resolved: ResolvedRecipe, calibration: CalibrationPlan | None, weights: CheckpointWeights
) -> dict[str, object]:
    return {
        "recipe": resolved.digest,
        "calibration": None if calibration is None else calibration.inputs,
        "source": source_state(weights),
    }


def _stats(
    calibration: CalibrationPlan | None,
    weights: CheckpointWeights,
    folder: Path,
    progress: Progress,
) -> CalibrationStats | None:
    return None if calibration is None else calibration.stats(weights, folder, progress)


def _info(
    plan: QuantizationPlan,
    source: CheckpointWeights,
    exported: CheckpointWeights,
    stats: CalibrationStats | None,
) -> QuantizationInfo:
    """Describe weights that were quantized on the way."""
    assert plan.resolved is not None
    report = _read_report(exported.path / REPORT_NAME)
    return QuantizationInfo(
        modules_sha256=plan.resolved.digest,
        schemes=_scheme_infos(plan.rows),
        source_bytes=sum(source.info(name).nbytes for name in source.names()),
        weight_bytes=_weight_bytes(exported),
        saturated={str(name): int(count) for name, count in report["saturated"].items()},
        calibration=None if stats is None else _calibration_info(stats),
        notes=plan.notes(exported.config),
    )


def _stored_info(plan: QuantizationPlan, weights: CheckpointWeights) -> QuantizationInfo:
    """Describe a checkpoint that was quantized when it came."""
    table = [[name, repr(scheme)] for name, scheme in sorted(plan.schemes.items())]
    size = _weight_bytes(weights)
    return QuantizationInfo(
        modules_sha256=hashlib.sha256(json.dumps(table).encode()).hexdigest(),
        schemes=_scheme_infos(plan.rows),
        source_bytes=size,
        weight_bytes=size,
        notes=plan.notes(weights.config),
    )


def _weight_bytes(weights: CheckpointWeights) -> int:
    return sum(path.stat().st_size for path in weights.files() if path.suffix == ".safetensors")


def _scheme_infos(rows: tuple[SchemeRow, ...]) -> tuple[SchemeInfo, ...]:
    return tuple(
        SchemeInfo(
            kind=row.kind,
            weights=None if row.scheme.weights is None else str(row.scheme.weights),
            activations=None if row.scheme.activations is None else str(row.scheme.activations),
            modules=row.modules,
            parameters=row.parameters,
        )
        for row in rows
    )


def _calibration_info(stats: CalibrationStats) -> CalibrationInfo:
    name, _, digest = stats.calibration_set.rpartition(":")
    return CalibrationInfo(
        prompts=name or digest,
        tokens_sha256=digest if name else None,
        stats_sha256=stats.digest,
        num_samples=stats.num_samples,
        num_tokens=stats.num_tokens,
    )


def _stored_rows(config: RingConfig, schemes: Mapping[str, ModuleScheme]) -> tuple[SchemeRow, ...]:
    modules = quantizable_modules(config)
    return scheme_rows((module, schemes.get(module.name, ModuleScheme())) for module in modules)


def _read_report(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            report = json.loads(file.read(_REPORT_LIMIT_BYTES))
    except (OSError, ValueError) as failure:
        raise CheckpointError(f"cannot read {path}: {failure!s:.200}") from failure
    if not isinstance(report, dict) or not isinstance(report.get("saturated"), dict):
        raise CheckpointError(f"{path} is damaged", hint="remove it and build again")
    return report
