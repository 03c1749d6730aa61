"""Everything that `ringexport eval --against` measures, and its report."""

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from ringexport.bundle import MANIFEST_NAME
from ringexport.checkpoint import CheckpointWeights
from ringexport.checkpoint.names import TensorKind
from ringexport.compare.conditions import measurement_conditions
from ringexport.compare.html import ModuleRange, ReportPage, render
from ringexport.compare.perplexity import PairScore, Text, perplexity_pair
from ringexport.compare.quality import (
    DriftPoint,
    LayerQuality,
    LongContext,
    layer_quality,
    long_context,
    state_drift,
)
from ringexport.errors import OutputError
from ringexport.files import check_writable
from ringexport.ops.quantization import Granularity, GranularityKind
from ringexport.progress import NoProgress, Progress
from ringexport.quantize.modules import quantizable_modules
from ringexport.quantize.scales import absmax_tiles
from ringexport.runtime.runner import ProbeRunner, Runner
from ringexport.stats import CalibrationStats, Quantity

__all__ = [
    "Quality",
    "check_report",
    "expert_coverage",
    "measure_quality",
    "module_ranges",
    "write_report",
]

_WHOLE = Granularity(GranularityKind.TENSOR)
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How far a model is from its reference.

    Attributes:
        pair: scores on the texts.
        layers: empty if one of the runners cannot show its layers.
        drift: over decode steps; empty if it was not measured.
        longest: at the end of the longest context, None if it was not measured.
    """

    pair: PairScore
    layers: tuple[LayerQuality, ...] = ()
    drift: tuple[DriftPoint, ...] = ()
    longest: LongContext | None = None

    def to_dict(self) -> dict[str, object]:
        """Return JSON values."""
        return {
            **self.pair.to_dict(),
            "layers": [row.to_dict() for row in self.layers],
            "drift": [point.to_dict() for point in self.drift],
            "longest_context": None if self.longest is None else self.longest.to_dict(),
        }


def measure_quality(
    runner: Runner,
    against: Runner,
    texts: Sequence[Text],
    *,
    window: int | None = None,
    deep: bool = False,
    progress: Progress | None = None,
) -> Quality:
    """Compare two runners on texts.

    Args:
        runner: the model under test.
        against: the reference.
        texts: scored ones.
        window: see `perplexity_pair`.
        deep: measure drift and the longest context too, which takes minutes.
        progress: told about every stage.

    Raises:
        ConfigError: vocabularies differ, or there is nothing to score.
        ToleranceExceededError: a model computes NaN or infinity.
    """
    progress = progress or NoProgress()
    pair = perplexity_pair(runner, against, texts, window=window, progress=progress)
    layers: tuple[LayerQuality, ...] = ()
    if all(callable(getattr(one, "probe", None)) for one in (runner, against)):
        probes = cast("tuple[ProbeRunner, ProbeRunner]", (runner, against))
        layers = layer_quality(*probes, texts, progress=progress)
    if not deep:
        return Quality(pair=pair, layers=layers)
    tokens = np.concatenate([text.tokens for text in texts])
    return Quality(
        pair=pair,
        layers=layers,
        longest=long_context(runner, against, tokens, progress=progress),
        drift=state_drift(runner, against, tokens, progress=progress),
    )


def check_report(path: Path, stats: Path | None) -> CalibrationStats | None:
    """Find out before minutes of measuring whether a report can be written; return its stats.

    Raises:
        CalibrationError: stats that cannot be read.
        OutputError: the page cannot be written there.
    """
    check_writable(path)
    return None if stats is None else CalibrationStats.load(stats)


def write_report(
    path: Path,
    quality: Quality,
    models: tuple[Path, Path],
    texts: Sequence[Path],
    *,
    stats: CalibrationStats | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the HTML page; an older one is replaced in one step.

    Args:
        path: of the page.
        quality: what it shows.
        models: the model under test and the reference; ranges of weights are the reference's.
        texts: that were scored.
        stats: of a calibration of the reference.
        progress: told about the weights that are read.

    Raises:
        CheckpointError: the reference cannot be read.
        OutputError: the page cannot be written.
    """
    model, reference = models
    is_checkpoint = not (reference / MANIFEST_NAME).is_file()
    ranges = module_ranges(reference, stats, progress) if is_checkpoint else ()
    page = ReportPage(
        model=str(model),
        reference=str(reference),
        texts=[text.name for text in texts],
        pair=quality.pair,
        layers=quality.layers,
        drift=quality.drift,
        longest=quality.longest,
        coverage={} if stats is None else expert_coverage(stats),
        ranges=ranges,
        conditions=measurement_conditions(None),
    )
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:12]}")
    try:
        temporary.write_text(render(page), encoding="utf-8")
        temporary.replace(path)
    except OSError as failure:
        raise OutputError(f"cannot write {path}: {failure.strerror or failure}") from failure
    finally:
        temporary.unlink(missing_ok=True)


def expert_coverage(stats: CalibrationStats) -> dict[int, tuple[float, ...]]:
    """Return layer -> tokens that each of its experts saw in calibration."""
    coverage = {}
    for (module, quantity), array in stats.entries.items():
        found = _LAYER.fullmatch(module)
        if quantity is Quantity.EXPERT_TOKENS and found is not None:
            coverage[int(found[1])] = tuple(float(value) for value in array)
    return coverage


def module_ranges(
    checkpoint: Path, stats: CalibrationStats | None, progress: Progress | None = None
) -> tuple[ModuleRange, ...]:
    """Return the largest magnitudes of all weights and of their inputs, by name without layer.

    Args:
        checkpoint: folder; all of its weights are read, one at a time.
        stats: of a calibration, None for no inputs.
        progress: told about the bytes.

    Raises:
        CheckpointError: weights that cannot be used.
    """
    progress = progress or NoProgress()
    values: dict[str, tuple[list[float], list[float]]] = {}
    with CheckpointWeights.open(checkpoint) as weights:
        modules = quantizable_modules(weights.config)
        total = sum(weights.info(module.weight).nbytes for module in modules)
        progress.start("reading the ranges of the weights", total, "bytes")
        for module in modules:
            array = np.ascontiguousarray(weights.read(module.weight))
            largest = float(absmax_tiles(array, _WHOLE, name=module.weight)[0])
            weights.release(module.weight)
            found = values.setdefault(_short_name(module.name, module.kind), ([], []))
            found[0].append(largest)
            seen = None if stats is None else stats.find(module.name, Quantity.INPUT_ABSMAX)
            if seen is not None:
                found[1].append(float(seen[0]))
            progress.advance(weights.info(module.weight).nbytes)
    progress.finish()
    return tuple(
        ModuleRange(name=name, weights=found[0], inputs=found[1]) for name, found in values.items()
    )


def _short_name(module: str, kind: TensorKind) -> str:
    found = _LAYER.fullmatch(module)
    name = _EXPERT.sub(".experts.", found[2]) if found else module
    return f"{name} (softmax)" if kind is TensorKind.SOFTMAX_ATTENTION else name
