"""Calibration stats for a recipe: those of a file, or those of a calibration that is run now."""

import importlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ringexport.checkpoint import CheckpointWeights
from ringexport.checkpoint.digest import checkpoint_digest, weight_bytes
from ringexport.errors import BackendUnavailableError, CalibrationError, ConfigError
from ringexport.ops.decay_index import DecayIndex
from ringexport.progress import Progress
from ringexport.stats import CalibrationStats

if TYPE_CHECKING:
    from ringexport.calibrate import CalibrationSettings, PromptSet

__all__ = ["DEFAULT_PROMPTS", "CalibrationPlan", "CalibrationRequest"]

DEFAULT_PROMPTS = "all"
_STATS_NAME = "stats.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRequest:
    """Where stats come from, as asked for.

    Attributes:
        prompts: a shipped prompt set, several joined with "+", or a .jsonl file; None for all
            shipped ones.
        num_samples: prompts at most, None for the default.
        stats: file of an earlier calibration, instead of prompts.
        decay_index: which form of the decay the model runs with.

    Raises:
        ConfigError: both stats and prompts.
    """

    prompts: str | None = None
    num_samples: int | None = None
    stats: Path | None = None
    decay_index: str = DecayIndex.SERVING.value

    def __post_init__(self) -> None:
        if self.stats is not None and (self.prompts is not None or self.num_samples):
            raise ConfigError(
                "both calibration stats and a calibration are asked for",
                hint="give --stats, or --calibration and --calibration-samples",
            )

    @property
    def is_explicit(self) -> bool:
        """Whether the user said anything about calibration."""
        return any(one is not None for one in (self.prompts, self.num_samples, self.stats))


class CalibrationPlan:
    """A request whose files have been read and checked; nothing has been computed.

    Raises:
        CalibrationError: an unknown prompt set, or a file that cannot be used.
        BackendUnavailableError: torch is not installed.
    """

    def __init__(self, request: CalibrationRequest) -> None:
        self._decay_index = DecayIndex(request.decay_index)
        self._stats: CalibrationStats | None = None
        self._prompts: PromptSet | None = None
        self._settings: CalibrationSettings | None = None
        if request.stats is not None:
            self._stats = CalibrationStats.load(request.stats)
            _check_decay(self._stats, self._decay_index)
            return
        calibrate = _calibrate_package()
        name = DEFAULT_PROMPTS if request.prompts is None else request.prompts
        prompts: PromptSet = calibrate.load_prompts(name)
        if prompts.name == name:  # a file counts by its name: its folder must not shape the output
            prompts = replace(prompts, name=Path(name).name)
        self._prompts = prompts
        settings: dict[str, object] = {"decay_index": self._decay_index}
        if request.num_samples is not None:
            settings["num_samples"] = request.num_samples
        self._settings = calibrate.CalibrationSettings(**settings)

    @property
    def inputs(self) -> dict[str, object]:
        """Everything that the stats depend on beside the checkpoint; JSON."""
        if self._stats is not None:
            return {"stats": self._stats.digest}
        assert self._prompts is not None
        assert self._settings is not None
        return {
            "prompts": [self._prompts.name, self._prompts.digest],
            "settings": self._settings.to_json(),
        }

    def stats(
        self, weights: CheckpointWeights, folder: Path, progress: Progress
    ) -> CalibrationStats:
        """Return stats of a checkpoint.

        Args:
            weights: the checkpoint.
            folder: of a `WorkFolder` whose name depends on `inputs` and the checkpoint; a
                calibration that was interrupted is continued, a finished one is taken from it.
            progress: told about the bytes hashed, and tokens x layers.

        Raises:
            CalibrationError: stats of another checkpoint, or a calibration that failed.
        """
        kept = folder / _STATS_NAME
        if kept.is_file():
            progress.note("the calibration was finished by an earlier run")
            return CalibrationStats.load(kept)
        progress.start("digest the checkpoint", weight_bytes(weights), "bytes")
        digest = checkpoint_digest(weights, advance=progress.advance)
        progress.finish()
        if self._stats is not None:
            _check_model(self._stats, digest, weights.path)
            return self._stats
        assert self._prompts is not None
        found: CalibrationStats = _calibrate_package().calibrate(
            weights,
            self._prompts,
            self._settings,
            progress=progress,
            workdir=folder,
            model_digest=digest,
        )
        found.save(kept)
        return found


def _check_model(stats: CalibrationStats, digest: str, checkpoint: Path) -> None:
    if stats.model_digest != digest:
        raise CalibrationError(
            f"the calibration stats are of another checkpoint than {checkpoint}: they were made "
            f"for {stats.model_digest[:12]}, this one is {digest[:12]}",
            hint="calibrate this checkpoint, with --calibration instead of --stats",
        )


def _check_decay(stats: CalibrationStats, wanted: DecayIndex) -> None:
    try:
        settings = json.loads(stats.settings)
    except ValueError:
        settings = None
    found = settings.get("decay_index") if isinstance(settings, dict) else None
    if found is not None and found != wanted.value:
        raise CalibrationError(
            f"the calibration stats were made with the decay index {found}, expected {wanted}",
            hint="calibrate again, or choose the decay index of the stats",
        )


def _calibrate_package() -> ModuleType:
    """Import `ringexport.calibrate`, which loads torch, only when a calibration is asked for."""
    try:
        return importlib.import_module("ringexport.calibrate")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("ringexport"):
            raise
        raise BackendUnavailableError(
            f"calibrating needs the package {error.name}, which is not installed",
            hint="pip install 'ringexport[torch]', or give finished stats with --stats",
        ) from error
