"""Write ``quantization_config`` in the words of compressed-tensors, so that others can load it.

Source: compressed-tensors 0.20.0 `quantization/quant_config.py`, `config/base.py`.
"""

import re
from collections.abc import Collection, Iterable
from typing import Any

from ringexport.ops.quantization import Granularity, GranularityKind, NumberFormat
from ringexport.ops.schemes import ActivationMode, ModuleScheme, WeightObserver
from ringexport.quantize.resolve import ResolvedRecipe

__all__ = ["is_packed", "quantization_config"]

_TYPES = {NumberFormat.FP8_E4M3: "float", NumberFormat.INT8: "int"}
_FORMATS = {NumberFormat.FP8_E4M3: "float-quantized", NumberFormat.INT8: "int-quantized"}
_WEIGHT_ONLY = "naive-quantized"
_PACKED = "pack-quantized"
_PACKED_KINDS = frozenset({GranularityKind.CHANNEL, GranularityKind.GROUP})
_MIXED = "mixed-precision"
_OBSERVERS = {WeightObserver.ABSMAX: "minmax", WeightObserver.MSE: "mse"}
_ALWAYS_IGNORED = ("model.word_embeddings", r"re:model\.layers\.\d+\.mlp\.gate$")
"""Tools that go by names alone, not by classes, would take these for linear modules."""

_EXPERT = re.compile(r"(.*\.mlp\.experts\.)\d+(\..*)")


def quantization_config(resolved: ResolvedRecipe) -> dict[str, Any]:
    """Return the value of ``quantization_config`` for a checkpoint of this recipe.

    One scheme is written as the target "Linear" with everything else in `ignore`, the form that
    every reader knows; several schemes name their modules.
    """
    by_scheme: dict[ModuleScheme, list[str]] = {}
    plain = []
    for entry in resolved.modules:
        if entry.scheme.weights is None:
            plain.append(entry.module.name)
        else:
            by_scheme.setdefault(entry.scheme, []).append(entry.module.name)
    everything = [entry.module.name for entry in resolved.modules]
    groups = {}
    for number, (scheme, names) in enumerate(by_scheme.items()):
        targets = ["Linear"] if len(by_scheme) == 1 else _patterns(names, everything)
        groups[f"group_{number}"] = _group(scheme, targets)
    formats = {group["format"] for group in groups.values()}
    config: dict[str, Any] = {
        "config_groups": groups,
        "format": formats.pop() if len(formats) == 1 else _MIXED,
        "ignore": [*_ALWAYS_IGNORED, *_patterns(plain, everything)],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
    cache = resolved.recipe.kv_cache
    if cache is not None:
        tensor = Granularity(GranularityKind.TENSOR)
        config["kv_cache_scheme"] = _arguments(cache.format, tensor, dynamic=False)
    return config


def is_packed(scheme: ModuleScheme) -> bool:
    """Say whether weights are written as ``weight_packed``: INT8 without quantized activations.

    Engines load such weights in no other form. Tiles are not known to them, and are not packed.
    """
    weights = scheme.weights
    return (
        weights is not None
        and scheme.activations is None
        and weights.format is NumberFormat.INT8
        and weights.granularity.kind in _PACKED_KINDS
    )


def _format(scheme: ModuleScheme) -> str:
    assert scheme.weights is not None
    return _WEIGHT_ONLY if scheme.activations is None else _FORMATS[scheme.weights.format]


def _group(scheme: ModuleScheme, targets: list[str]) -> dict[str, Any]:
    weights, activations = scheme.weights, scheme.activations
    assert weights is not None
    inputs = None
    if activations is not None:
        dynamic = activations.mode is ActivationMode.DYNAMIC
        inputs = _arguments(activations.format, activations.granularity, dynamic=dynamic)
    return {
        "format": _PACKED if is_packed(scheme) else _format(scheme),
        "input_activations": inputs,
        "output_activations": None,
        "targets": targets,
        "weights": _arguments(weights.format, weights.granularity, dynamic=False)
        | {"observer": _OBSERVERS[weights.observer]},
    }


def _arguments(
    number_format: NumberFormat, granularity: Granularity, *, dynamic: bool
) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "dynamic": dynamic,
        "num_bits": 8,
        "strategy": granularity.kind.value,
        "symmetric": True,
        "type": _TYPES[number_format],
    }
    if granularity.kind is GranularityKind.GROUP:
        arguments["group_size"] = granularity.columns
    if granularity.kind is GranularityKind.BLOCK:
        arguments["block_structure"] = [granularity.rows, granularity.columns]
    return arguments


def _patterns(names: Iterable[str], everything: Collection[str]) -> list[str]:
    """Return `names` with all experts of a layer as one expression, where all are among them."""
    sizes: dict[str, int] = {}
    for name in everything:
        key = _expert_pattern(name)
        sizes[key] = sizes.get(key, 0) + 1
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_expert_pattern(name), []).append(name)
    patterns = []
    for key, members in found.items():
        patterns += [key] if len(members) == sizes[key] else members
    return patterns


def _expert_pattern(name: str) -> str:
    match = _EXPERT.fullmatch(name)
    return f"re:{re.escape(match[1])}\\d+{re.escape(match[2])}$" if match else name
