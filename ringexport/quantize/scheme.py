"""The schemes of `ringexport.ops.schemes` that recipes call by name."""

from collections.abc import Mapping
from types import MappingProxyType

from ringexport.ops.quantization import Granularity, NumberFormat
from ringexport.ops.schemes import (
    ActivationMode,
    ActivationScheme,
    KvCacheScheme,
    ModuleScheme,
    StateFormat,
    WeightObserver,
    WeightScheme,
)

__all__ = [
    "PRESETS",
    "ActivationMode",
    "ActivationScheme",
    "KvCacheScheme",
    "ModuleScheme",
    "StateFormat",
    "WeightObserver",
    "WeightScheme",
]


def _preset(
    number_format: NumberFormat, weights: str, activations: str = "", mode: str = "dynamic"
) -> ModuleScheme:
    inputs = None
    if activations:
        inputs = ActivationScheme(
            format=number_format,
            granularity=Granularity.parse(activations),
            mode=ActivationMode(mode),
        )
    weight = WeightScheme(format=number_format, granularity=Granularity.parse(weights))
    return ModuleScheme(weights=weight, activations=inputs)


PRESETS: Mapping[str, ModuleScheme] = MappingProxyType(
    {
        "unquantized": ModuleScheme(),
        "fp8_e4m3_dynamic": _preset(NumberFormat.FP8_E4M3, "channel", "token"),
        "fp8_e4m3_static": _preset(NumberFormat.FP8_E4M3, "channel", "tensor", "static"),
        "fp8_e4m3_block": _preset(NumberFormat.FP8_E4M3, "block(128, 128)", "group(128)"),
        "int8_w8a8": _preset(NumberFormat.INT8, "channel", "token"),
        "int8_w8a16": _preset(NumberFormat.INT8, "channel"),
    }
)
"""Schemes by name; calibration/recipes/README.md shows this table."""
