"""Recipes: which modules are quantized and how, read strictly from TOML.

calibration/recipes/README.md describes the syntax.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from ringexport.checkpoint.fields import Fields
from ringexport.errors import ConfigError
from ringexport.ops.quantization import Granularity, NumberFormat
from ringexport.quantize.modules import check_target
from ringexport.quantize.scheme import (
    PRESETS,
    ActivationMode,
    ActivationScheme,
    KvCacheScheme,
    ModuleScheme,
    StateFormat,
    WeightObserver,
    WeightScheme,
)

__all__ = ["ComputeDtype", "Fold", "Recipe", "RecipeRule", "SmoothQuant", "StateFormat"]

_RECIPE_KEYS = frozenset(
    {"base", "compute_dtype", "description", "kv_cache", "recurrent_state", "rules", "smoothquant"}
)
_RULE_KEYS = frozenset({"activations", "except", "scheme", "targets", "weights"})


class ComputeDtype(StrEnum):
    """The dtype of everything that is not quantized. CPU targets compute bf16 in fp32."""

    BF16 = "bf16"
    FP32 = "fp32"


class Fold(StrEnum):
    """Where SmoothQuant's factors on a module's input can be divided out again.

    INPUT_NORM: input_layernorm, before query_key_value and g_proj.
    POST_ATTENTION_NORM: post_attention_layernorm, before the MLP or router and experts.
    OUTPUT_NORM: g_norm of linear layers, before dense.
    UP_PROJ: rows of up_proj, before down_proj.
    """

    INPUT_NORM = "input_norm"
    POST_ATTENTION_NORM = "post_attention_norm"
    OUTPUT_NORM = "output_norm"
    UP_PROJ = "up_proj"


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothQuant:
    """Move outliers of activations into weights (arXiv 2211.10438).

    Attributes:
        strength: migration strength 0..1, or None to search it per layer.
        folds: where factors are folded.
    """

    strength: float | None = 0.5
    folds: tuple[Fold, ...] = tuple(Fold)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeRule:
    """One scheme for the modules that match a target and no exception.

    Attributes:
        targets, exceptions: kinds of modules, patterns of names, or ``re:`` expressions.
        scheme: how the modules are quantized.
    """

    targets: tuple[str, ...]
    exceptions: tuple[str, ...] = ()
    scheme: ModuleScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a whole model is quantized. Later rules win over earlier ones.

    Attributes:
        name: of the recipe, for people and manifests.
        description: one sentence.
        rules: may be empty, for recipes that quantize nothing.
        compute_dtype: of everything that no rule selects.
        kv_cache: None for the compute dtype.
        recurrent_state: format of the linear layers' state.
        smoothquant: None for none.
    """

    name: str
    description: str = ""
    rules: tuple[RecipeRule, ...] = ()
    compute_dtype: ComputeDtype = ComputeDtype.BF16
    kv_cache: KvCacheScheme | None = None
    recurrent_state: StateFormat = StateFormat.FP32
    smoothquant: SmoothQuant | None = None

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], *, name: str, source: str, base: Self | None = None
    ) -> Self:
        """Read a parsed TOML document.

        Args:
            values: the document; not modified.
            name: of the recipe.
            source: what to call it in messages.
            base: the recipe that its key `base` names; its rules come first, and its other
                values are the defaults.

        Raises:
            ConfigError: unknown keys, wrong types, or schemes that contradict themselves.
        """
        fields = Fields(values, source)
        fields.refuse_unknown(_RECIPE_KEYS)
        start = base or cls(name=name)
        rules = _tables(fields, "rules")
        smooth = fields.raw("smoothquant")
        cache = _optional(fields, "kv_cache", [*NumberFormat, "none"])
        return cls(
            name=name,
            description=_text(fields, "description", start.description),
            rules=start.rules
            + tuple(_rule(rule, f"{source}: rules[{i}]") for i, rule in enumerate(rules)),
            compute_dtype=ComputeDtype(
                _optional(fields, "compute_dtype", list(ComputeDtype)) or start.compute_dtype
            ),
            kv_cache=start.kv_cache if cache is None else _kv_cache(cache),
            recurrent_state=StateFormat(
                _optional(fields, "recurrent_state", list(StateFormat)) or start.recurrent_state
            ),
            smoothquant=start.smoothquant
            if smooth is None
            else _smoothquant(fields, f"{source}: smoothquant"),
        )


def _rule(values: Mapping[str, Any], source: str) -> RecipeRule:
    fields = Fields(values, source)
    fields.refuse_unknown(_RULE_KEYS)
    targets = _targets(fields, "targets", source)
    if not targets:
        raise fields.bad("targets", "a list of at least one kind or pattern")
    exceptions = _targets(fields, "except", source)
    return RecipeRule(targets=targets, exceptions=exceptions, scheme=_scheme(fields, source))


def _scheme(fields: Fields, source: str) -> ModuleScheme:
    weights, activations = fields.raw("weights"), fields.raw("activations")
    if ("scheme" in fields) == (weights is not None):
        raise ConfigError(
            f"{source} needs either a scheme or weights",
            hint=f"schemes: {', '.join(PRESETS)}",
        )
    if "scheme" in fields:
        if activations is not None:
            raise ConfigError(f"{source} holds both scheme and activations, expected one of them")
        return PRESETS[_optional(fields, "scheme", list(PRESETS)) or ""]
    try:
        return ModuleScheme(
            weights=_weights(_table(fields, "weights"), f"{source}: weights"),
            activations=_activations(_table(fields, "activations"), f"{source}: activations")
            if activations is not None
            else None,
        )
    except ConfigError as error:
        if error.message.startswith(source):
            raise
        raise ConfigError(f"{source}: {error.message}", hint=error.hint) from None


def _weights(values: Mapping[str, Any], source: str) -> WeightScheme:
    fields = Fields(values, source)
    fields.refuse_unknown({"format", "granularity", "observer"})
    _require(fields, source, "format", "granularity")
    return WeightScheme(
        format=NumberFormat(fields.choice("format", list(NumberFormat))),
        granularity=Granularity.parse(_text(fields, "granularity", "")),
        observer=WeightObserver(
            _optional(fields, "observer", list(WeightObserver)) or WeightObserver.ABSMAX
        ),
    )


def _activations(values: Mapping[str, Any], source: str) -> ActivationScheme:
    fields = Fields(values, source)
    fields.refuse_unknown({"format", "granularity", "mode"})
    _require(fields, source, "format", "granularity", "mode")
    return ActivationScheme(
        format=NumberFormat(fields.choice("format", list(NumberFormat))),
        granularity=Granularity.parse(_text(fields, "granularity", "")),
        mode=ActivationMode(fields.choice("mode", list(ActivationMode))),
    )


def _smoothquant(parent: Fields, source: str) -> SmoothQuant | None:
    if parent.raw("smoothquant") is False:
        return None
    fields = Fields(_table(parent, "smoothquant"), source)
    fields.refuse_unknown({"folds", "strength"})
    strength: float | None = 0.5
    if fields.raw("strength") == "search":
        strength = None
    elif "strength" in fields:
        strength = fields.number("strength", 0.0, 1.0)
    folds = fields.raw("folds")
    if folds is None:
        return SmoothQuant(strength=strength)
    if not isinstance(folds, list) or not all(fold in list(Fold) for fold in folds):
        raise fields.bad("folds", f"a list of {', '.join(Fold)}")
    return SmoothQuant(strength=strength, folds=tuple(fold for fold in Fold if fold in folds))


def _kv_cache(name: str) -> KvCacheScheme | None:
    return None if name == "none" else KvCacheScheme(format=NumberFormat(name))


def _targets(fields: Fields, key: str, source: str) -> tuple[str, ...]:
    found = fields.raw(key) if key in fields else []
    if not isinstance(found, list) or not all(isinstance(item, str) and item for item in found):
        raise fields.bad(key, "a list of kinds or patterns")
    for target in found:
        check_target(target, f"{source}: {key}")
    return tuple(found)


def _tables(fields: Fields, key: str) -> list[Mapping[str, Any]]:
    found = fields.raw(key) if key in fields else []
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise fields.bad(key, "a list of tables, written [[rules]]")
    return found


def _table(fields: Fields, key: str) -> Mapping[str, Any]:
    found = fields.raw(key)
    if not isinstance(found, dict):
        raise fields.bad(key, "a table")
    return found


def _text(fields: Fields, key: str, default: str) -> str:
    found = fields.raw(key) if key in fields else default
    if not isinstance(found, str):
        raise fields.bad(key, "a text")
    return found


def _optional(fields: Fields, key: str, choices: list[str]) -> str | None:
    return fields.choice(key, choices) if key in fields else None


def _require(fields: Fields, source: str, *keys: str) -> None:
    missing = [key for key in keys if key not in fields]
    if missing:
        raise ConfigError(f"{source} lacks {', '.join(missing)}")
