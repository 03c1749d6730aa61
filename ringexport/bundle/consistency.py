"""The manifest against the bundle's own config.json: an index that was edited to lie is refused.

Layers below this one know the config and the decay better; here only plain keys are read, and the
decay is computed once more in a few lines of its own, so that neither side can hide a mistake.
"""

import math
from collections.abc import Iterator
from pathlib import Path

from ringexport.bundle.manifest import Manifest
from ringexport.bundle.strict_json import parse_object
from ringexport.errors import BundleError

__all__ = ["CONFIG_PATH", "check_consistency"]

CONFIG_PATH = "model/config.json"
_MAX_CONFIG_BYTES = 16 << 20
_DECAY_TOLERANCE = 1e-5  # the table went through fp32; forms differ by 1 / layers, at least 1e-3


def check_consistency(directory: Path, manifest: Manifest) -> None:
    """Compare sizes, context length and decay in the manifest with model/config.json.

    Keys that the config leaves out are not compared.

    Raises:
        BundleError: they differ, or the config cannot be read.
    """
    if all(entry.path != CONFIG_PATH for entry in manifest.files):
        raise BundleError(f"the bundle {directory} has no {CONFIG_PATH}")
    config = _read_config(directory / CONFIG_PATH)
    for what, found, expected in _facts(manifest, config):
        if expected is not None and found != expected:
            raise BundleError(
                f"the manifest of {directory} says that the {what} is {found},"
                f" its {CONFIG_PATH} says {expected}"
            )
    _check_decay(directory, manifest, config)


def _read_config(path: Path) -> dict[str, object]:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise BundleError(f"{path} is larger than any config")
        return parse_object(path.read_bytes().decode("utf-8"), source=str(path))
    except UnicodeDecodeError as error:
        raise BundleError(f"{path} is not UTF-8 text") from error
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error


def _facts(
    manifest: Manifest, config: dict[str, object]
) -> Iterator[tuple[str, object, object | None]]:
    """Yield name, value in the manifest and value in the config, None where it has none."""
    context = _context_length(config)
    yield "context length", manifest.model.context_length, context
    for name, target in manifest.targets.items():
        if "context_length" in target.limits:
            yield f"context length of {name}", target.limits["context_length"], context
    yield "number of layers", manifest.model.num_layers, _whole(config, "num_hidden_layers")
    yield "vocabulary size", manifest.model.vocab_size, _whole(config, "vocab_size")
    yield "decay index of the table", manifest.decay.form, manifest.build.decay_index


def _context_length(config: dict[str, object]) -> int | None:
    """Return the context in tokens, YaRN included; None if the config does not tell."""
    scaling = config.get("rope_scaling")
    if not isinstance(scaling, dict):
        return _whole(config, "max_position_embeddings")
    original = _whole(scaling, "original_max_position_embeddings")
    factor = scaling.get("factor")
    if original is None or isinstance(factor, bool) or not isinstance(factor, int | float):
        return None
    return int(original * factor) if abs(factor) < 1e9 else None


def _whole(values: dict[str, object], key: str) -> int | None:
    value = values.get(key)
    return value if type(value) is int else None


def _check_decay(directory: Path, manifest: Manifest, config: dict[str, object]) -> None:
    """Compare the table with the form that the manifest names, layer by layer."""
    table = manifest.decay.table
    for name, target in manifest.targets.items():
        if set(table) != {str(layer) for layer in target.io.linear_layers}:
            raise BundleError(
                f"the decay table of {directory} has the layers {', '.join(table) or 'none'},"
                f" {name} has the linear layers {', '.join(map(str, target.io.linear_layers))}"
            )
    heads, layers = _whole(config, "num_attention_heads"), _whole(config, "num_hidden_layers")
    if heads is None or layers is None or not 0 < heads <= 1 << 16:
        return
    for layer, found in table.items():
        expected = _log_decay(heads, int(layer), layers, manifest.decay.form)
        fits = len(found) == len(expected) and all(
            math.isclose(one, other, rel_tol=_DECAY_TOLERANCE)
            for one, other in zip(found, expected, strict=True)
        )
        if not fits:
            raise BundleError(
                f"the decay table of {directory} is not that of the decay index"
                f" {manifest.decay.form} in layer {layer}"
            )


def _log_decay(heads: int, layer: int, layers: int, form: str) -> list[float]:
    """Return the log decay per head; none for a form or layer that nobody knows."""
    if not 0 <= layer < layers:
        return []
    index = {"serving": layer, "hf": layer - 1, "clamped": max(0, layer - 1)}.get(form)
    if index is None:
        return []
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(heads - power)]
    factor = 1.0 - index / max(1, layers - 1) + 1e-5
    return [-slope * factor for slope in slopes]
