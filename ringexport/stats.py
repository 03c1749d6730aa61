"""What calibration saw: frozen numbers per module, and the file that keeps them.

The file is safetensors: one fp32 tensor per module and quantity, named ``module:quantity``, and
one metadata entry with everything else, so that the same stats always give the same bytes.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from ringexport.errors import CalibrationError, OutputError

__all__ = ["CLIP_OBSERVERS", "CalibrationStats", "Quantity"]

FORMAT = "ringexport-calibration-stats"
FORMAT_VERSION = 1
_METADATA_KEY = "ringexport"
_COUNTS = ("num_samples", "num_tokens")
_TEXTS = ("model_digest", "calibration_set", "settings")


class Quantity(StrEnum):
    """What was observed of a module; all are fp32.

    INPUT_ABSMAX: largest magnitude of the input, [1].
    INPUT_RANGE: magnitude to which an observer clips the input, [1]; wins over INPUT_ABSMAX.
    INPUT_CHANNEL_ABSMAX: largest magnitude of each input channel, [in].
    INPUT_CLIPS: the magnitude that each observer would clip at, [len(CLIP_OBSERVERS)].
    INPUT_TOKENS: tokens that were observed, [1]; 0: borrowed from other experts of the layer.
    INPUT_HISTOGRAM: shares of the elements in bins of equal width over 0..INPUT_HISTOGRAM_TOP.
    INPUT_HISTOGRAM_TOP: upper edge of the last bin, a power of two, [1].
    INPUT_SAMPLES: inputs of some tokens, the same ones for all modules, [tokens, in]; signed.
    KEY_ABSMAX, VALUE_ABSMAX: of what enters the KV cache, [1]; of the module ``...attention``.
    STATE_ABSMAX: of each head's recurrent state after the samples, [heads]; of ``...attention``.
    EXPERT_TOKENS: tokens that each expert received, [experts]; of the module ``...mlp.gate``.
    EXPERT_FORCED: further tokens that were shown to starved experts, [experts]; likewise.
    SMOOTH_STRENGTH: SmoothQuant's migration strength, [1]; of the module that absorbs the factors.
    """

    INPUT_ABSMAX = "input_absmax"
    INPUT_RANGE = "input_range"
    INPUT_CHANNEL_ABSMAX = "input_channel_absmax"
    INPUT_CLIPS = "input_clips"
    INPUT_TOKENS = "input_tokens"
    INPUT_HISTOGRAM = "input_histogram"
    INPUT_HISTOGRAM_TOP = "input_histogram_top"
    INPUT_SAMPLES = "input_samples"
    KEY_ABSMAX = "key_absmax"
    VALUE_ABSMAX = "value_absmax"
    STATE_ABSMAX = "state_absmax"
    EXPERT_TOKENS = "expert_tokens"
    EXPERT_FORCED = "expert_forced"
    SMOOTH_STRENGTH = "smooth_strength"


CLIP_OBSERVERS = (
    "percentile",
    "fp8_e4m3:mse",
    "fp8_e4m3:entropy",
    "int8:mse",
    "int8:entropy",
)
"""What the elements of INPUT_CLIPS are; percentile serves every format."""

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationStats:
    """The result of one calibration.

    Attributes:
        model_digest: SHA-256 of the calibrated checkpoint's config and weights, hexadecimal.
        calibration_set: name and digest of the prompts.
        num_samples, num_tokens: how much was run.
        settings: JSON of everything else that shaped the numbers, the decay index among it.
        entries: (module, quantity) -> fp32 array, finite and not negative.

    Raises:
        CalibrationError: an array that is not fp32, or holds a negative or non-finite number.
    """

    model_digest: str
    calibration_set: str
    num_samples: int
    num_tokens: int
    entries: Mapping[tuple[str, Quantity], Array]
    settings: str = "{}"

    def __post_init__(self) -> None:
        for (module, quantity), array in self.entries.items():
            fits = np.isfinite(array) & ((array >= 0) | (quantity is Quantity.INPUT_SAMPLES))
            if array.dtype != np.float32 or not fits.all():
                raise CalibrationError(
                    f"{quantity} of {module} holds {array.dtype} values that are not finite and "
                    ">= 0, expected float32",
                    hint="calibrate again",
                )

    def find(self, module: str, quantity: Quantity) -> Array | None:
        """Return what was observed of `module`, None if it was not."""
        return self.entries.get((module, quantity))

    def get(self, module: str, quantity: Quantity, shape: tuple[int, ...] = (1,)) -> Array:
        """Return what was observed of `module`.

        Raises:
            CalibrationError: it was not observed, or has another shape.
        """
        found = self.find(module, quantity)
        if found is None:
            raise CalibrationError(
                f"the calibration stats lack {quantity} of {module}",
                hint="calibrate again; every module that is quantized needs its own scale",
            )
        if found.shape != shape:
            raise CalibrationError(
                f"{quantity} of {module} has shape {list(found.shape)}, expected {list(shape)}",
                hint="the calibration stats are of another model",
            )
        return found

    def input_range(self, module: str) -> float:
        """Return the magnitude that the input of `module` is quantized to, > 0.

        Raises:
            CalibrationError: not observed, or nothing but zeros was.
        """
        known = self.find(module, Quantity.INPUT_RANGE) is not None
        quantity = Quantity.INPUT_RANGE if known else Quantity.INPUT_ABSMAX
        found = float(self.get(module, quantity)[0])
        if found == 0:
            raise CalibrationError(
                f"{module} saw nothing but zeros during calibration",
                hint="use more prompts, or force every expert to be used",
            )
        return found

    def with_ranges(self, observer: str) -> Self:
        """Return stats whose INPUT_RANGE is what `observer` says.

        Args:
            observer: one of `CLIP_OBSERVERS`, or "absmax".

        Raises:
            CalibrationError: another name.
        """
        if observer != "absmax" and observer not in CLIP_OBSERVERS:
            raise CalibrationError(
                f"observer {observer!r:.80} is not known, expected absmax, "
                f"{', '.join(CLIP_OBSERVERS)}"
            )
        kept = {key: array for key, array in self.entries.items() if key[1] != Quantity.INPUT_RANGE}
        if observer != "absmax":
            column = CLIP_OBSERVERS.index(observer)
            kept |= {
                (module, Quantity.INPUT_RANGE): array[column : column + 1]
                for (module, quantity), array in self.entries.items()
                if quantity is Quantity.INPUT_CLIPS
            }
        return replace(self, entries=kept)

    @property
    def digest(self) -> str:
        """SHA-256 of the contents, hexadecimal; the same as that of the file's bytes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """Return the contents of the file."""
        about = {name: getattr(self, name) for name in (*_TEXTS, *_COUNTS)}
        about |= {"format": FORMAT, "format_version": FORMAT_VERSION}
        arrays = {
            f"{module}:{quantity}": np.ascontiguousarray(array)
            for (module, quantity), array in sorted(self.entries.items())
        }
        metadata = {_METADATA_KEY: json.dumps(about, sort_keys=True)}
        return bytes(safetensors.numpy.save(arrays, metadata))

    def save(self, path: Path) -> None:
        """Write the file; an older one is replaced in one step.

        Raises:
            OutputError: it cannot be written.
        """
        temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:12]}")
        try:
            with temporary.open("wb") as file:
                file.write(self.to_bytes())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as failure:
            raise OutputError(f"cannot write {path}: {failure.strerror or failure}") from failure
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file that `save` wrote.

        Raises:
            CalibrationError: unreadable, damaged, of another kind or a newer version.
        """
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except OSError as failure:
            reason = failure.strerror or f"{failure!s:.200}".removesuffix(f": {path}")
            raise CalibrationError(
                f"cannot read the calibration stats {path}: {reason}",
                hint="give the file that --save-stats wrote",
            ) from failure
        except (safetensors.SafetensorError, TypeError, KeyError) as failure:
            raise CalibrationError(
                f"cannot read the calibration stats {path}: {failure!s:.200}",
                hint="calibrate again",
            ) from failure
        about = _read_metadata(metadata.get(_METADATA_KEY, ""), path)
        entries = {_read_name(name, path): array for name, array in arrays.items()}
        return cls(**about, entries=entries)


def _read_metadata(text: str, path: Path) -> dict[str, Any]:
    try:
        about = json.loads(text)
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise CalibrationError(
            f"{path} holds no calibration stats", hint="give the file that --save-stats wrote"
        )
    if about.get("format_version") != FORMAT_VERSION:
        raise CalibrationError(
            f"{path} is in version {about.get('format_version')!r:.40} of its format, expected "
            f"{FORMAT_VERSION}",
            hint="use the ringexport that wrote it, or calibrate again",
        )
    texts = all(isinstance(about.get(name), str) for name in _TEXTS)
    counts = all(type(about.get(name)) is int and about[name] >= 0 for name in _COUNTS)
    if not (texts and counts) or len(about) != len(_TEXTS) + len(_COUNTS) + 2:
        raise CalibrationError(f"{path} has damaged metadata", hint="calibrate again")
    return {name: about[name] for name in (*_TEXTS, *_COUNTS)}


def _read_name(name: str, path: Path) -> tuple[str, Quantity]:
    module, _, quantity = name.rpartition(":")
    if not module or quantity not in list(Quantity):
        raise CalibrationError(
            f"{path} holds {name!r:.120}, expected module:quantity", hint="calibrate again"
        )
    return module, Quantity(quantity)
