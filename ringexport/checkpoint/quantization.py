"""What config.json says about quantized weights: compressed-tensors, and block FP8 as in DeepSeek.

Both are read strictly into the schemes of `ringexport.ops.schemes`; anything else, or anything
that would change how values are decoded, is refused by name.

Source: compressed-tensors 0.20.0 `quantization/quant_config.py`, `quant_args.py`; the
``quantization_config`` of DeepSeek-V3 ("quant_method": "fp8").
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ringexport.checkpoint.fields import Fields, show
from ringexport.errors import ConfigError
from ringexport.ops.quantization import Granularity, NumberFormat
from ringexport.ops.schemes import (
    ActivationMode,
    ActivationScheme,
    KvCacheScheme,
    ModuleScheme,
    WeightScheme,
)

__all__ = ["QuantizedGroup", "StoredQuantization", "read_quantization"]

_LINEAR = "Linear"
_PACKED = "pack-quantized"
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", _PACKED)
_CONFIG_KEYS = frozenset(
    {
        "config_groups",
        "format",
        "global_compression_ratio",
        "ignore",
        "kv_cache_scheme",
        "quant_method",
        "quantization_status",
        "version",
    }
)
_EMPTY_KEYS = ("moe_sparsity_config", "sparsity_config", "transform_config")
_GROUP_KEYS = frozenset({"format", "input_activations", "output_activations", "targets", "weights"})
_ARGS_KEYS = frozenset(
    {
        "actorder",
        "block_structure",
        "dynamic",
        "group_size",
        "num_bits",
        "observer",
        "observer_kwargs",
        "scale_dtype",
        "strategy",
        "symmetric",
        "type",
        "zp_dtype",
    }
)
_BLOCK_FP8_KEYS = frozenset(
    {
        "activation_scheme",
        "fmt",
        "ignored_layers",
        "modules_to_not_convert",
        "quant_method",
        "scale_fmt",
        "weight_block_size",
    }
)
_HINT = f"8-bit checkpoints in the formats {', '.join(_FORMATS)} can be read"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedGroup:
    """Modules that share a scheme.

    Attributes:
        targets: names, ``re:`` expressions, or the class name "Linear".
        scheme: how they are quantized.
        packed: INT8 codes are stored with 128 added, four to an int32, as ``weight_packed``.
    """

    targets: tuple[str, ...]
    scheme: ModuleScheme
    packed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredQuantization:
    """How the weights of a checkpoint are stored.

    Attributes:
        method: "compressed-tensors" or "fp8".
        groups: schemes and what they apply to.
        ignore: names and ``re:`` expressions that no group applies to.
        kv_cache: scheme of the KV cache, None for none.
        scale_name: last part of the name of a weight's scale; it always multiplies.
        by_presence: a module is quantized if its scale is there, instead of by its name.
    """

    method: str
    groups: tuple[QuantizedGroup, ...]
    ignore: tuple[str, ...] = ()
    kv_cache: KvCacheScheme | None = None
    scale_name: str = "weight_scale"
    by_presence: bool = False

    def resolve(
        self, modules: Iterable[str], present: Collection[str]
    ) -> dict[str, QuantizedGroup]:
        """Return the group of each quantized module.

        Args:
            modules: names of all modules that can be quantized.
            present: names of all tensors in the files.
        """
        if self.by_presence:
            group = self.groups[0]
            return {name: group for name in modules if f"{name}.{self.scale_name}" in present}
        ignored = _Matcher(self.ignore)
        matchers = [(_Matcher(group.targets), group) for group in self.groups]
        chosen = {}
        for name in modules:
            if ignored(name):
                continue
            found = [group for matches, group in matchers if matches(name)]
            found = found or [group for group in self.groups if _LINEAR in group.targets]
            if found:
                chosen[name] = found[0]
        return chosen


def read_quantization(values: object, source: str) -> StoredQuantization:
    """Read the value of ``quantization_config``.

    Args:
        values: parsed JSON.
        source: what to call it in messages.

    Raises:
        ConfigError: another method, an unknown key, or a scheme that is not implemented.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source} is {show(values)}, expected an object")
    fields = Fields(values, source)
    method = fields.raw("quant_method")
    if method == "compressed-tensors":
        return _compressed_tensors(fields, source)
    if method == "fp8":
        return _block_fp8(fields, source)
    raise ConfigError(
        f"{source}: quant_method is {show(method)}, expected 'compressed-tensors' or 'fp8'",
        hint=f"{_HINT}; or use the bf16 checkpoint",
    )


def _compressed_tensors(fields: Fields, source: str) -> StoredQuantization:
    fields.refuse_unknown(_CONFIG_KEYS | set(_EMPTY_KEYS))
    for key in _EMPTY_KEYS:
        if fields.raw(key):
            raise fields.bad(key, "nothing", hint=_HINT)
    if fields.raw("quantization_status") not in {None, "compressed"}:
        raise fields.bad("quantization_status", "'compressed'")
    if fields.raw("format") != "mixed-precision":
        fields.require(["format"])
        fields.choice("format", _FORMATS)
    groups = fields.raw("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise fields.bad("config_groups", "an object with at least one group")
    cache = fields.raw("kv_cache_scheme")
    return StoredQuantization(
        method="compressed-tensors",
        groups=tuple(
            _group(group, f"{source}: {name}", fields.raw("format"))
            for name, group in groups.items()
        ),
        ignore=_names(fields, "ignore"),
        kv_cache=None if cache is None else _kv_cache(cache, f"{source}: kv_cache_scheme"),
    )


def _group(values: object, source: str, outer_format: str) -> QuantizedGroup:
    fields = _fields(values, source)
    fields.refuse_unknown(_GROUP_KEYS)
    if fields.raw("output_activations") is not None:
        raise fields.bad("output_activations", "null", hint=_HINT)
    if fields.raw("format") is not None or outer_format == "mixed-precision":
        fields.require(["format"])
        fields.choice("format", _FORMATS)
    targets = _names(fields, "targets")
    if not targets:
        raise fields.bad("targets", "a list of names")
    inputs = fields.raw("input_activations")
    weights = _fields(fields.raw("weights"), f"{source}.weights")
    number_format, granularity, dynamic = _arguments(weights)
    if dynamic:
        raise weights.bad("dynamic", "false")
    scheme = ModuleScheme(
        weights=WeightScheme(format=number_format, granularity=granularity),
        activations=_activations(inputs, f"{source}.input_activations") if inputs else None,
    )
    packed = (fields.raw("format") or outer_format) == _PACKED
    if packed and (number_format is not NumberFormat.INT8 or inputs):
        raise ConfigError(f"{source} packs what is not INT8 weights alone", hint=_HINT)
    return QuantizedGroup(targets=targets, scheme=scheme, packed=packed)


def _activations(values: object, source: str) -> ActivationScheme:
    number_format, granularity, dynamic = _arguments(_fields(values, source))
    mode = ActivationMode.DYNAMIC if dynamic else ActivationMode.STATIC
    return ActivationScheme(format=number_format, granularity=granularity, mode=mode)


def _kv_cache(values: object, source: str) -> KvCacheScheme:
    fields = _fields(values, source)
    number_format, granularity, dynamic = _arguments(fields)
    if dynamic or str(granularity) != "tensor":
        raise fields.bad("strategy", "'tensor', not dynamic")
    return KvCacheScheme(format=number_format)


def _arguments(fields: Fields) -> tuple[NumberFormat, Granularity, bool]:
    """Read one QuantizationArgs: format, granularity, and whether it is dynamic."""
    fields.refuse_unknown(_ARGS_KEYS)
    fields.require(["num_bits", "type", "strategy"])
    fields.integer("num_bits", 8, 8)
    number_format = {"float": NumberFormat.FP8_E4M3, "int": NumberFormat.INT8}[
        fields.choice("type", ("float", "int"))
    ]
    if "symmetric" in fields and not fields.flag("symmetric"):
        raise fields.bad("symmetric", "true", hint=_HINT)
    for key in ("actorder", "scale_dtype"):
        if fields.raw(key) not in {None, "weight", "static"}:
            raise fields.bad(key, "null", hint=_HINT)
    strategy = fields.choice("strategy", ("tensor", "channel", "token", "group", "block"))
    if strategy == "group":
        strategy = f"group({fields.integer('group_size', 1, 1 << 20)})"
    if strategy == "block":
        rows, columns = _block(fields, "block_structure")
        strategy = f"block({rows}, {columns})"
    dynamic = fields.flag("dynamic") if "dynamic" in fields else False
    return number_format, Granularity.parse(strategy), dynamic


def _block_fp8(fields: Fields, source: str) -> StoredQuantization:
    fields.refuse_unknown(_BLOCK_FP8_KEYS)
    if fields.raw("fmt") not in {None, "e4m3"}:
        raise fields.bad("fmt", "'e4m3'")
    if fields.raw("weight_block_size") is None:
        raise ConfigError(
            f"{source} has no weight_block_size; FP8 with one scale per tensor is not supported",
            hint="use a block-FP8 or compressed-tensors checkpoint, or the bf16 one",
        )
    rows, columns = _block(fields, "weight_block_size")
    if fields.raw("activation_scheme") not in {None, "dynamic"}:
        raise fields.bad("activation_scheme", "'dynamic'")
    scheme = ModuleScheme(
        weights=WeightScheme(
            format=NumberFormat.FP8_E4M3, granularity=Granularity.parse(f"block({rows},{columns})")
        ),
        activations=ActivationScheme(
            format=NumberFormat.FP8_E4M3,
            granularity=Granularity.parse(f"group({columns})"),
            mode=ActivationMode.DYNAMIC,
        ),
    )
    return StoredQuantization(
        method="fp8",
        groups=(QuantizedGroup(targets=(_LINEAR,), scheme=scheme),),
        ignore=_names(fields, "modules_to_not_convert") + _names(fields, "ignored_layers"),
        scale_name="weight_scale_inv",
        by_presence=True,
    )


def _fields(values: object, source: str) -> Fields:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source} is {show(values)}, expected an object")
    return Fields(values, source)


def _names(fields: Fields, key: str) -> tuple[str, ...]:
    found: Any = fields.raw(key) or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise fields.bad(key, "a list of names")
    for name in found:
        try:
            re.compile(name.removeprefix("re:") if name.startswith("re:") else "")
        except re.error:
            raise fields.bad(key, f"regular expressions, not {show(name)}") from None
    return tuple(found)


def _block(fields: Fields, key: str) -> tuple[int, int]:
    found: Any = fields.raw(key)
    if (
        not isinstance(found, list)
        or len(found) != 2
        or not all(type(size) is int and 1 <= size <= 1 << 16 for size in found)
    ):
        raise fields.bad(key, "[rows, columns]")
    return found[0], found[1]


class _Matcher:
    """Exact names in a set, expressions in a list: names come by the ten thousand."""

    def __init__(self, targets: Iterable[str]) -> None:
        targets = tuple(targets)
        self._names = {target for target in targets if not target.startswith("re:")}
        self._expressions = [
            re.compile(target.removeprefix("re:")) for target in targets if target.startswith("re:")
        ]

    def __call__(self, name: str) -> bool:
        return name in self._names or any(found.match(name) for found in self._expressions)
