"""Quantize a checkpoint: bf16 in, compressed-tensors out, one block of rows at a time."""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ringexport.bundle.files import check_apart, sync_path
from ringexport.checkpoint import CheckpointWeights
from ringexport.checkpoint.encoded import kv_scale_names
from ringexport.checkpoint.shards import INDEX_NAME
from ringexport.errors import CalibrationError, ConfigError, QuantizationError
from ringexport.ops.quantization import NumberFormat
from ringexport.progress import NoProgress, Progress
from ringexport.quantize.compressed_tensors import quantization_config
from ringexport.quantize.layout import OutputShard, plan_shards
from ringexport.quantize.recipe import Recipe
from ringexport.quantize.resolve import ResolvedRecipe, resolve_recipe
from ringexport.quantize.shard import ShardWriter
from ringexport.quantize.smoothing import channel_absmax, weight_folds
from ringexport.quantize.transforms import TensorFold
from ringexport.quantize.workdir import FORMAT, REPORT_NAME, WorkDirectory
from ringexport.stats import CalibrationStats, Quantity
from ringexport.strict_json import read_object
from ringexport.version import __version__

__all__ = [
    "MAX_SHARD_BYTES",
    "QuantizeEstimate",
    "QuantizeResult",
    "estimate",
    "quantize_checkpoint",
]

MAX_SHARD_BYTES = 5_000_000_000
_CONFIG_NAME = "config.json"
_CONFIG_LIMIT_BYTES = 1 << 20
_SIDECAR_SUFFIXES = frozenset({".json", ".jinja", ".model", ".py", ".tiktoken", ".txt"})
_SIDECAR_LIMIT_BYTES = 1 << 28
_FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeEstimate:
    """What quantizing would do.

    Attributes:
        resolved: the scheme of every module.
        source_bytes: of the source's weights.
        output_bytes: of the output's weights.
        files: names of the weight files.
    """

    resolved: ResolvedRecipe
    source_bytes: int
    output_bytes: int
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeResult:
    """What quantizing did.

    Attributes:
        path: of the quantized checkpoint.
        resolved: the scheme of every module.
        source_bytes, output_bytes: of the weights.
        saturated: elements that were clipped, by module; modules without any are left out.
        reused_files: weight files that an earlier, interrupted run had finished.
        seconds: from start to end.
    """

    path: Path
    resolved: ResolvedRecipe
    source_bytes: int
    output_bytes: int
    saturated: Mapping[str, int]
    reused_files: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """An opened source and everything that was decided about the output."""

    weights: CheckpointWeights
    resolved: ResolvedRecipe
    stats: CalibrationStats | None
    folds: Mapping[str, TensorFold] = field(default_factory=dict)
    shards: tuple[OutputShard, ...] = ()


def estimate(checkpoint: Path, recipe: Recipe) -> QuantizeEstimate:
    """Resolve a recipe for a checkpoint and say how large the output would be; nothing is written.

    Raises:
        RingExportError: as `quantize_checkpoint`, except for missing calibration stats.
    """
    with CheckpointWeights.open(checkpoint) as weights:
        resolved = _resolve(weights, recipe)
        shards = plan_shards(weights, resolved, {}, MAX_SHARD_BYTES)
        return QuantizeEstimate(
            resolved=resolved,
            source_bytes=sum(shard.source_bytes for shard in shards),
            output_bytes=sum(shard.nbytes for shard in shards),
            files=tuple(shard.name for shard in shards),
        )


def quantize_checkpoint(
    checkpoint: Path,
    output: Path,
    recipe: Recipe,
    *,
    stats: CalibrationStats | None = None,
    threads: int = 1,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Write a quantized copy of a checkpoint in the compressed-tensors format.

    The same inputs always give the same bytes. Nothing appears at `output` before it is complete;
    an earlier quantized checkpoint there is replaced in one step. A run that was interrupted or
    killed is continued by the next one with the same inputs: files that it had finished are kept.

    Args:
        checkpoint: folder of an unquantized checkpoint.
        output: folder to write.
        recipe: which modules are quantized and how.
        stats: of a calibration of this checkpoint, for static scales and SmoothQuant.
        threads: blocks that are quantized at the same time; each takes about 75 MB.
        max_shard_bytes: of tensor data per file.
        progress: told about the bytes read.

    Raises:
        CheckpointError, ConfigError: a source that cannot be used.
        QuantizationError: a recipe that quantizes nothing, or weights that are not finite.
        CalibrationError: stats that are missing or do not fit.
        OutputError: the output cannot be written.
    """
    started = time.monotonic()
    progress = progress or NoProgress()
    check_apart(checkpoint, output)
    with CheckpointWeights.open(checkpoint) as weights:
        resolved = _resolve(weights, recipe)
        _check_stats(resolved, stats)
        folds = weight_folds(weights, resolved, stats, progress) if stats else {}
        constants = _constants(weights, resolved, stats, folds) if stats else {}
        shards = plan_shards(weights, resolved, constants, max_shard_bytes)
        job = _Job(weights=weights, resolved=resolved, stats=stats, folds=folds, shards=shards)
        directory = WorkDirectory(output, _work_key(job, max_shard_bytes))
        directory.open(sum(shard.nbytes for shard in shards))
        writer = ShardWriter(weights=weights, folds=folds, threads=threads, progress=progress)
        try:
            saturated, reused = _write_shards(job, writer, directory)
            _write_rest(job, directory, saturated)
            with CheckpointWeights.open(directory.path):
                pass
            directory.publish()
        except OSError as failure:
            directory.discard()
            raise directory.translate(failure) from failure
        except Exception:
            directory.discard()
            raise
        finally:
            directory.keep()
    return QuantizeResult(
        path=output,
        resolved=resolved,
        source_bytes=sum(shard.source_bytes for shard in shards),
        output_bytes=sum(shard.nbytes for shard in shards),
        saturated={name: count for name, count in saturated.items() if count},
        reused_files=reused,
        seconds=time.monotonic() - started,
    )


def _resolve(weights: CheckpointWeights, recipe: Recipe) -> ResolvedRecipe:
    if weights.config.quantization is not None:
        raise QuantizationError(
            f"{weights.path} is quantized already", hint="use the bf16 checkpoint"
        )
    resolved = resolve_recipe(recipe, weights.config)
    if not resolved.quantized:
        raise QuantizationError(
            f"recipe {recipe.name} quantizes nothing, so there is nothing to write",
            hint="use the checkpoint as it is, or another recipe",
        )
    return resolved


def _check_stats(resolved: ResolvedRecipe, stats: CalibrationStats | None) -> None:
    reasons = resolved.stats_reasons
    if reasons and stats is None:
        raise CalibrationError(
            f"recipe {resolved.recipe.name} needs calibration stats: {', '.join(reasons)}",
            hint="give the stats of a calibration with --stats, or use a recipe without: "
            "fp8, fp8-block, int8-weight-only",
        )


def _constants(
    weights: CheckpointWeights,
    resolved: ResolvedRecipe,
    stats: CalibrationStats,
    folds: Mapping[str, TensorFold],
) -> dict[str, dict[str, float]]:
    """Return the static scales: source tensor after which they are written -> name -> value."""
    constants: dict[str, dict[str, float]] = {}
    for name, entry in resolved.quantized.items():
        inputs = entry.scheme.activations
        if inputs is None or not entry.scheme.needs_stats:
            continue
        largest = stats.input_range(name)
        fold = folds.get(entry.module.weight)
        if fold is not None and fold.columns is not None:
            channels = channel_absmax(stats, [name], entry.module.shape[1])
            largest = float((channels / fold.columns).max())
        scale = np.float32(largest / inputs.format.half_range)
        constants[entry.module.weight] = {f"{name}.input_scale": float(scale)}
    cache = resolved.recipe.kv_cache
    if cache is not None:
        for layer in weights.config.softmax_layers:
            source = f"model.layers.{layer}.attention.query_key_value.weight"
            scales = _kv_constants(layer, cache.format, stats)
            constants[source] = constants.get(source, {}) | scales
    return constants


def _kv_constants(
    layer: int, number_format: NumberFormat, stats: CalibrationStats
) -> dict[str, float]:
    module = f"model.layers.{layer}.attention"
    scales = {}
    quantities = (Quantity.KEY_ABSMAX, Quantity.VALUE_ABSMAX)
    for name, quantity in zip(kv_scale_names(layer), quantities, strict=True):
        largest = float(stats.get(module, quantity)[0])
        if largest == 0:
            raise CalibrationError(f"{quantity} of {module} is 0", hint="use more prompts")
        scales[name] = largest / number_format.half_range
    return scales


def _work_key(job: _Job, max_shard_bytes: int) -> str:
    """Return a digest of everything that the output depends on.

    Files of the source count by name, size and time of change, config.json by its contents.
    """
    files = [*job.weights.files(), *_sidecars(job.weights.path)]
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    config = (job.weights.path / _CONFIG_NAME).read_bytes()
    parts = {
        "format": _FORMAT_VERSION,
        "version": __version__,
        "source": [str(job.weights.path.resolve()), states],
        "config": hashlib.sha256(config).hexdigest(),
        "recipe": repr(job.resolved.recipe),
        "stats": None if job.stats is None else job.stats.digest,
        "max_shard_bytes": max_shard_bytes,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _write_shards(
    job: _Job, writer: ShardWriter, directory: WorkDirectory
) -> tuple[dict[str, int], int]:
    """Write the weight files that are not there yet; return saturated counts and files reused."""
    saturated: dict[str, int] = {}
    reused = 0
    total = sum(shard.source_bytes for shard in job.shards)
    writer.progress.start(f"quantize to {job.resolved.recipe.name}", total, "bytes")
    for shard in job.shards:
        note = directory.find_part(shard.name, shard.nbytes)
        if note is None:
            note = {"saturated": writer.write(shard, directory.unfinished(shard.name))}
            directory.finish_part(shard.name, note)
        else:
            reused += 1
            writer.progress.note(f"{shard.name} was finished by an earlier run")
            writer.progress.advance(shard.source_bytes)
        saturated |= note["saturated"]
    writer.progress.finish()
    return saturated, reused


def _write_rest(job: _Job, directory: WorkDirectory, saturated: Mapping[str, int]) -> None:
    """Write config, index, tokenizer files and the report."""
    source = job.weights.path
    config = read_object(source / _CONFIG_NAME, limit_bytes=_CONFIG_LIMIT_BYTES, error=ConfigError)
    config.pop("quantization", None)
    config["quantization_config"] = quantization_config(job.resolved)
    directory.write_json(_CONFIG_NAME, config)
    names = [_CONFIG_NAME, REPORT_NAME, *(shard.name for shard in job.shards)]
    if len(job.shards) > 1:
        directory.write_json(INDEX_NAME, _index(job.shards))
        names.append(INDEX_NAME)
    for path in _sidecars(source):
        shutil.copyfile(path, directory.path / path.name)
        sync_path(directory.path / path.name)
        names.append(path.name)
    directory.write_json(REPORT_NAME, _report(job, saturated, names))
    directory.remove_notes()


def _index(shards: tuple[OutputShard, ...]) -> dict[str, Any]:
    places = {tensor.name: shard.name for shard in shards for tensor in shard.outputs}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.outputs)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def _report(job: _Job, saturated: Mapping[str, int], names: list[str]) -> dict[str, Any]:
    recipe = job.resolved.recipe
    return {
        "format": FORMAT,
        "format_version": _FORMAT_VERSION,
        "tool": {"name": "ringexport", "version": __version__},
        "recipe": {
            "name": recipe.name,
            "description": recipe.description,
            "compute_dtype": recipe.compute_dtype,
            "recurrent_state": recipe.recurrent_state,
        },
        "stats_digest": None if job.stats is None else job.stats.digest,
        "smoothed_tensors": len(job.folds),
        "schemes": [
            {
                "kind": row.kind,
                "weights": str(row.scheme.weights) if row.scheme.weights else None,
                "activations": str(row.scheme.activations) if row.scheme.activations else None,
                "modules": row.modules,
                "parameters": row.parameters,
            }
            for row in job.resolved.rows()
        ],
        "quantized_modules": len(job.resolved.quantized),
        "saturated": {name: count for name, count in sorted(saturated.items()) if count},
        "files": sorted(names),
    }


def _sidecars(source: Path) -> list[Path]:
    """Return the files beside the weights that a copy needs: tokenizer, templates, model code."""
    skipped = {_CONFIG_NAME, INDEX_NAME, REPORT_NAME}
    return sorted(
        path
        for path in source.iterdir()
        if path.is_file()
        and path.name not in skipped
        and not path.name.startswith(".")
        and (path.suffix in _SIDECAR_SUFFIXES or path.name.startswith("LICENSE"))
        and path.stat().st_size <= _SIDECAR_LIMIT_BYTES
    )
